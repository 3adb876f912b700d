"""Whole runs: the same figures from the same seed and with any micro-batch; warm-up, schedules, kernels, defaults."""

import ast
import contextlib
import importlib
import math
import re

import pytest
import torch
import torch.nn.functional as F

from helpers import SCRIPTS, make_corpus, one_thread, only_record, run_here, run_script, tiny

KERNELS = {"train_rwkv7": ("torch", "cpu"), "train_rwkv6": ("torch", "cpu"), "train_gpt2": (None,)}


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data"), train=(700, 900, 1500))


def losses(records):
    """(train losses as printed in the log, validation losses in full)."""
    _, log, result = only_record(records)
    return re.findall(r"^step:\d+/\d+ train_loss:(\S+)", log, re.M), [point["val_loss"] for point in result["curve"]]


def load(script, *flags):
    module = importlib.import_module(script)
    args = module.parse(flags)
    return module, args, module.set_up(args)


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_figures(script, data, tmp_path):
    """Bitwise, from two processes of two threads each; another seed gives others."""
    kernel = ("--kernel", "cpu") if "rwkv" in script else ()
    flags = lambda name, seed: tiny(script, data, tmp_path / name, "--dtype", "mixed", "--random_seed", seed, *kernel)
    for name in ("first", "again"):
        done = run_script(script, *flags(name, 3), OMP_NUM_THREADS="2")
        assert done.returncode == 0, done.stderr
    run_here(script, *flags("other", 4))
    first, again, other = (losses(tmp_path / name) for name in ("first", "again", "other"))
    assert len(first[0]) == 6 and len(first[1]) == 4
    assert first == again
    assert first[0] != other[0] and all(abs(a - b) > 1e-5 for a, b in zip(first[1][1:], other[1][1:])), (first, other)


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_the_means_over_all_tokens(script, data, tmp_path):
    """... and the gradient is the train loss's gradient, by hand and whatever the micro-batches."""
    for device_bsz in (4, 2, 1):
        module, args, ((train, val, _), model, optimizers, _) = load(
            script, *tiny(script, data, tmp_path, "--device_bsz", device_bsz))
        with torch.no_grad():
            for p in model.parameters():  # past the zeros of the start, or most gradients would be 0
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.02)

        def by_definition(stream, sequences):
            tokens = torch.from_numpy(stream.read(0, sequences * 32 + 1))
            x, y = tokens[:-1].view(sequences, 32), tokens[1:].view(sequences, 32)
            return x, y, -model.logits(x).double().log_softmax(-1).gather(-1, y[..., None]).mean()

        validated = module.validate(model, module.validation_set(val, args), args)  # 11 sequences
        assert math.isclose(validated, by_definition(val, 11)[2].item(), rel_tol=1e-6), device_bsz
        x, y, expected = by_definition(train, 4)
        expected.backward()
        by_hand = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        seen = {}
        for optimizer in optimizers:
            optimizer.step = lambda: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
        loss, asked = module.train_step(model, optimizers, x, y, args).tolist()
        assert math.isclose(loss, expected.item(), rel_tol=1e-6) and asked == 0, device_bsz
        assert all(p.grad is None for p in model.parameters()), "gradients are left over for the next step"
        for name, g in by_hand.items():
            if name == "blocks.0.att.mix":  # the GPT's first block mixes its values with themselves
                assert g == 0 and seen[name].abs() < 1e-9
                continue
            error = (seen[name] - g).norm() / g.norm()
            assert g.norm() > 0 and error < 2e-5, f"{name}: gradient {error:.1e} off with micro-batches of {device_bsz}"


@pytest.fixture(params=SCRIPTS)
def warm(request, data, tmp_path):
    """What warm_up takes, with a call of it."""
    script, args, ((_, val, _), model, optimizers, _) = load(request.param, *tiny(request.param, data, tmp_path))
    batches = script.validation_set(val, args)
    return script, model, optimizers, lambda: script.warm_up(model, model, optimizers, batches, args)


def test_warm_up_leaves_no_trace(warm, monkeypatch):
    script, model, optimizers, warm_up = warm
    step, hashes = script.train_step, []

    def careless(*arguments):
        torch.rand(3)  # as dropout would
        loss = step(*arguments)
        hashes.append(script.state_hash(model))
        return loss

    def snapshot():
        return [t.clone() for t in (*model.state_dict().values(), torch.get_rng_state())]

    monkeypatch.setattr(script, "train_step", careless)
    tensors, digest = snapshot(), script.state_hash(model)
    assert warm_up() == dict(before=digest, after=digest)
    assert len(set(hashes + [digest])) == 3, "the warm-up steps did not train"
    assert all(map(torch.equal, tensors, snapshot())), "the weights or the random state have moved on"
    assert not any(optimizer.state for optimizer in optimizers)
    assert all(p.grad is None for p in model.parameters())


def test_warm_up_notices_what_is_left(warm, monkeypatch):
    _, model, _, warm_up = warm
    monkeypatch.setattr(model, "load_state_dict", lambda state: None)
    with pytest.raises(RuntimeError, match="warm-up left a trace"):
        warm_up()


def test_learning_rate_and_momentum():
    script = importlib.import_module("train_gpt2")
    args = script.Hyperparameters(steps=100, warmdown_steps=40, warmup_steps=4, muon_warmup=20)
    got = [script.rate(step, args) for step in range(101)]
    expected = [(step + 1) / 5 for step in range(4)] + [1.0] * 57 + [(100 - step) / 40 for step in range(61, 101)]
    assert got == pytest.approx(expected, abs=1e-15) and got[100] == 0
    no_rise = script.Hyperparameters(steps=3242)
    assert [script.rate(step, no_rise) for step in (0, 2316, 2317, 3241)] == [1, 1, 925 / 926, 1 / 926]
    for warmdown, rates in ((0, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (9, [1, 0.75, 0.5, 0.25])):
        short = script.Hyperparameters(steps=4, warmdown_steps=warmdown, warmup_steps=0)
        assert [script.rate(step, short) for step in range(4)] == rates, warmdown
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizers = [torch.optim.Adam([p], lr=3.0), script.Muon([p], lr=0.5)]
    for group in (g for o in optimizers for g in o.param_groups):
        group["initial_lr"] = group["lr"]
    for step, momentum in ((80, 0.95), (5, 0.875), (0, 0.85), (80, 0.95)):
        script.schedule(optimizers, step, args)
        assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([3 * got[step], 0.5 * got[step]])
        assert optimizers[1].param_groups[0]["momentum"] == pytest.approx(momentum, abs=1e-15)
    assert "momentum" not in optimizers[0].param_groups[0]


@pytest.mark.parametrize("script, flags", (("train_rwkv7", ("--head_lr", 0.02)), ("train_gpt2", ("--head_lr", 0.02)),
                                           ("train_rwkv7", ("--x070", "--head_lr", 0.02)),
                                           ("train_rwkv6", ("--adam_lr", 0.02))))
def test_loss_falls_on_text_that_repeats(script, flags, tmp_path):
    fox = b"The quick brown fox jumps over the lazy dog. "
    corpus = make_corpus(tmp_path / "data", train=(6000,), val=(450,), text=fox)
    run_here(script, *tiny(script, corpus, tmp_path / "records", "--steps", 30, "--warmdown_steps", 15,
                           "--val_every", 10, *flags))
    train, val = losses(tmp_path / "records")
    assert 5.5 < val[0] < 7.5, "it knew something before the first step"
    assert val[3] < val[2] < val[1] < 2 and val[3] < 0.7, val
    assert float(train[-1]) < 0.7, train


@pytest.mark.parametrize("script, kernel, dtype", [
    (script, kernel, dtype) for script in SCRIPTS for kernel in KERNELS[script] for dtype in ("fp32", "mixed", "bf16")])
def test_every_kernel_and_precision(script, kernel, dtype, data, tmp_path):
    """Two steps each; all of them near the fp32 figures of the script. Where the head starts at zero, so do the
    logits and their rounding; RWKV-6's, tied to the embedding, reach 3, and bf16 rounds them to 1 part in 500."""
    flags = ["--dtype", dtype, "--steps", 2, "--val_tokens", 64] + (["--kernel", kernel] if kernel else [])
    run_here(script, *tiny(script, data, tmp_path / "records", *flags))
    train, val = losses(tmp_path / "records")
    _, _, result = only_record(tmp_path / "records")
    assert result["config"]["dtype"] == dtype and result["config"].get("kernel") == kernel
    run_here(script, *tiny(script, data, tmp_path / "fp32", *flags, "--dtype", "fp32"))
    far = max(abs(a - b) for a, b in zip(val, losses(tmp_path / "fp32")[1], strict=True))
    assert all(map(math.isfinite, val))
    assert far < (1e-12 if dtype == "fp32" else 1e-3 if script == "train_rwkv6" else 2e-4), far


@pytest.mark.parametrize("script, kernel", [(script, kernel) for script in SCRIPTS for kernel in KERNELS[script]])
def test_compiles_in_one_graph(script, kernel, data, tmp_path):
    """fullgraph=True refuses any break; the compiled model gives the same loss and gradients."""
    flags = tiny(script, data, tmp_path, "--seq_len", 16, *(["--kernel", kernel] if kernel else []))
    _, _, ((train, _, _), model, *_) = load(script, *flags)
    tokens = torch.from_numpy(train.read(0, 33))
    x, y = tokens[:-1].view(2, 16), tokens[1:].view(2, 16)
    torch.compiler.reset()
    results = []
    for form in (model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)):
        loss = form(x, y)
        loss.backward()
        results.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        model.zero_grad()
    (loss, grads), (compiled_loss, compiled_grads) = results
    assert math.isclose(loss, compiled_loss, rel_tol=1e-6)
    for name, g in grads.items():
        assert F.mse_loss(compiled_grads[name], g).sqrt() <= 1e-5 * g.square().mean().sqrt() + 1e-12, name
    torch.compiler.reset()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    """Needs no GPU; every field with its meaning and its default on either track."""
    done = run_script(script, "--help", CUDA_VISIBLE_DEVICES="", COLUMNS="200")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    module = importlib.import_module(script)
    assert module.__doc__.strip().splitlines()[0] in done.stdout
    text = " ".join(done.stdout.split())
    for name, field in module.Hyperparameters.__dataclass_fields__.items():
        shown = re.search(rf"^    {name}: {field.type.__name__} = (\S+)  # \w+", done.stdout, re.M)[1]
        assert ast.literal_eval(shown) == field.default, name
        assert name not in module.TINY or f" --{name} {module.TINY[name]}" in text, name


@pytest.mark.parametrize("script, steps, warmdown", (
    ("train_rwkv7", 3200, 914), ("train_rwkv6", 5100, 1450), ("train_gpt2", 3242, 926)))
def test_defaults_of_the_tracks(script, steps, warmdown):
    """The race as it is stated, and on track tiny the same tokens for all models, of about a million parameters."""
    module = importlib.import_module(script)
    args = module.parse(["--track", "fineweb"])
    assert (args.steps, args.warmdown_steps) == (steps, warmdown)
    assert (args.bsz * args.seq_len, args.seq_len) == (524288, 1024)
    assert (args.layers, args.width, args.val_tokens, args.epochs) == (12, 768, 10485760, 1)
    args, gpt2 = (importlib.import_module(name).parse(["--track=tiny", "--device=cpu"])
                  for name in (script, "train_gpt2"))
    assert args.vocab_size == 257 and args.seq_len == 256
    for name in ("bsz", "steps", "val_tokens", "data"):
        assert getattr(args, name) == getattr(gpt2, name), name
    with torch.device("meta"), contextlib.redirect_stderr(None):
        model = module.build_model(args)
    active = sum(p.numel() for name, p in model.named_parameters() if name not in model.lookups)
    assert 1_000_000 < active < 1_030_000, f"{active:,}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_check_looks_at_everything_and_writes_nothing(script, data, tmp_path):
    """What run_*.sh asks for before it starts several ranks: one process speaks for WORLD_SIZE of them."""
    flags = tiny(script, data, tmp_path / "records", "--check")
    done = run_script(script, *flags, WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not (tmp_path / "records").exists()
    for wrong, named in (("--steps=0", "--steps 0"), ("--headsz=24", "headsz 24"), (f"--data={tmp_path}", "no train")):
        done = run_script(script, *flags, wrong, WORLD_SIZE="2")
        assert done.returncode in (1, 2) and named in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("command", (
    "train_rwkv7 --adam_lr 0.0026 --muon_lr 0.02 --ln_lr 0.0090 --headsz 64 --bsz 512 --device_bsz 32 --fast_cuda",
    "train_rwkv7 --adam_lr 0.0026 --fast_cuda", "train_rwkv7 --wind_cuda", "train_rwkv7 --x070",
    "train_rwkv6 --adam_lr 0.0020 --emb_scale 1.5 --muon_lr 0.00036 --headsz 64 --bsz 512 --device_bsz 64"))
def test_documented_flags(command):
    """Letter by letter, those of the ancestors' users too."""
    script, *flags = command.split()
    args = vars(importlib.import_module(script).parse(flags))
    for name, value in zip(flags, [*flags[1:], "--"]):
        if name.startswith("--"):
            assert args[name[2:]] == (True if value.startswith("--") else type(args[name[2:]])(value)), name
