"""Whole runs: the same figures from the same seed, any number of ranks and any micro-batch; schedules; what trains."""

import contextlib
import importlib
import itertools
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
    args = module.Hyperparameters.parse(flags)
    return module, args, module.set_up(args, 0)


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


def test_validation_sequences_of_any_number_of_ranks(data, monkeypatch):
    """Each sequence once, in whole micro-batches filled up with targets that count for nothing; some ranks are idle."""
    script = importlib.import_module("train_gpt2")
    for sequences, ranks, device_bsz in itertools.product((1, 2, 5, 11), (1, 2, 3, 4), (1, 3, 4)):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        args = script.Hyperparameters.parse(["--track=tiny", "--device=cpu", "--seq_len=32",
                                             f"--device_bsz={device_bsz}", f"--val_tokens={32 * sequences + 5}"])
        stream = script.TokenStream(data, "val", 1, "1 token", 0)
        parts = [script.validation_set(stream, args, rank) for rank in range(ranks)]
        kept = []
        for inputs, targets in parts:
            assert inputs.shape == targets.shape == (len(inputs), 32) and len(inputs) % device_bsz == 0
            real = (targets >= 0).all(1)
            assert (targets[~real] == -100).all() and (real[1:] <= real[:-1]).all()
            assert abs(real.sum() - sequences / ranks) < 1, "the sequences are not dealt out evenly"
            kept.append((inputs[real], targets[real]))
        expected = torch.from_numpy(stream.read(0, 32 * sequences + 1))
        assert torch.equal(torch.cat([x for x, _ in kept]).flatten(), expected[:-1]), (sequences, ranks)
        assert torch.equal(torch.cat([y for _, y in kept]).flatten(), expected[1:])

        totals = []  # (sum, count) of every rank, as they go into the sum over all of them
        monkeypatch.setattr(script, "all_sum", lambda total: totals.append(total.clone()) or torch.tensor([1, 1, 0]))

        def mean_target(inputs, targets):
            assert len(inputs) == device_bsz and (targets >= 0).any(), "its mean would be no number"
            return targets[targets >= 0].double().mean()

        for part in parts:
            script.validate(mean_target, part, args)
        total, count, asked = sum(totals).tolist()
        assert asked == 0 and count == 32 * sequences and math.isclose(total, expected[1:].sum().item(), rel_tol=1e-12)


@pytest.mark.parametrize("script", SCRIPTS)
def test_train_loss_is_the_global_batch_mean(script, data, tmp_path):
    """... and the gradient is its gradient, by hand and whatever the micro-batches."""
    for device_bsz in (4, 2, 1):
        module, args, (_, (train, _, _), model, optimizers, _) = load(
            script, *tiny(script, data, tmp_path, "--device_bsz", device_bsz))
        with torch.no_grad():
            for p in model.parameters():  # past the zeros of the start, or most gradients would be 0
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.02)
        tokens = torch.from_numpy(train.read(0, 4 * 32 + 1))
        x, y = tokens[:-1].view(4, 32), tokens[1:].view(4, 32)
        logits = model.logits(x).double()
        expected = -logits.log_softmax(-1).gather(-1, y[..., None]).mean()
        expected.backward()
        by_hand = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        seen = {}
        for optimizer in optimizers:
            optimizer.step = lambda: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
        loss, asked, *squares = module.train_step(model, optimizers, x, y, args).tolist()
        assert math.isclose(loss, expected.item(), rel_tol=1e-6) and asked == 0, device_bsz
        norms = [math.sqrt(square) for square in squares]
        assert norms == pytest.approx([g.norm().item() for g in by_hand.values()], rel=3e-5, abs=1e-8)
        worst = 0.0
        assert all(p.grad is None for p in model.parameters()), "gradients are left over for the next step"
        for name, g in by_hand.items():
            if name == "blocks.0.att.mix":  # the GPT's first block mixes its values with themselves
                assert g == 0 and seen[name].abs() < 1e-9
                continue
            error = (seen[name] - g).norm() / g.norm()
            worst = max(worst, error)
            assert g.norm() > 0 and error < 2e-5, f"{name}: gradient {error:.1e} off with micro-batches of {device_bsz}"
        print(script, device_bsz, f"loss {abs(loss / expected.item() - 1):.1e}, gradients {worst:.1e}")


def snapshot(model, optimizers):
    return ([t.clone() for t in model.state_dict().values()],
            [{k: v for g in o.state_dict()["param_groups"] for k, v in g.items()} for o in optimizers],
            [len(o.state) for o in optimizers], torch.get_rng_state())


@pytest.fixture(params=SCRIPTS)
def warm(request, data, tmp_path):
    """What warm_up takes, with a call of it."""
    script, args, (_, (_, val, _), model, optimizers, _) = load(request.param, *tiny(request.param, data, tmp_path))
    batches = script.validation_set(val, args, 0)
    return script, model, optimizers, lambda: script.warm_up(model, model, optimizers, batches, 4, args)


def test_warm_up_leaves_no_trace(warm, monkeypatch):
    script, model, optimizers, warm_up = warm
    step, hashes = script.train_step, []

    def careless(*arguments):
        torch.rand(3)  # as dropout would
        loss = step(*arguments)
        hashes.append(script.state_hash(model))
        return loss

    monkeypatch.setattr(script, "train_step", careless)
    before, digest = snapshot(model, optimizers), script.state_hash(model)
    assert warm_up() == digest
    after = snapshot(model, optimizers)
    assert len(set(hashes + [digest])) == 3, "the warm-up steps did not train"
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0]))
    assert before[1:3] == after[1:3] and after[2] == [0, 0]
    assert torch.equal(before[3], after[3]), "the random state has moved on"
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("forget", ("model", "Adam", "Muon"))
def test_warm_up_notices_what_is_left(warm, forget, monkeypatch):
    script, model, optimizers, warm_up = warm
    for thing in (model, *optimizers):
        if type(thing).__name__ == forget or (forget == "model" and thing is model):
            monkeypatch.setattr(thing, "load_state_dict", lambda state: None)
    with pytest.raises(RuntimeError, match="warm-up left a trace"):
        warm_up()


def test_state_hash_sees_every_bit():
    script = importlib.import_module("train_gpt2")
    model = torch.nn.BatchNorm1d(4)
    seen = {script.state_hash(model)}
    for tensor in (model.weight.data, model.running_mean, model.num_batches_tracked):
        flat = tensor.view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
        flat[0] ^= 1
        seen.add(script.state_hash(model))
    model.weight.data, model.bias.data = model.bias.data, model.weight.data
    seen.add(script.state_hash(model))
    assert len(seen) == 5


def test_learning_rate_and_momentum():
    script = importlib.import_module("train_gpt2")
    args = script.Hyperparameters(steps=100, warmdown_steps=40, warmup_steps=4, muon_warmup=20)
    got = [script.rate(step, args) for step in range(101)]
    expected = [(step + 1) / 5 for step in range(4)] + [1.0] * 57 + [(100 - step) / 40 for step in range(61, 101)]
    assert got == pytest.approx(expected, abs=1e-15) and got[100] == 0
    no_rise = script.Hyperparameters(steps=3242)
    assert [script.rate(step, no_rise) for step in (0, 2315, 2316)] == [1, 1, 1]
    assert script.rate(2317, no_rise) == 925 / 926 and script.rate(3241, no_rise) == 1 / 926
    for warmdown, rates in ((0, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (2, [1, 1, 1, 0.5]), (9, [1, 0.75, 0.5, 0.25])):
        short = script.Hyperparameters(steps=4, warmdown_steps=warmdown, warmup_steps=0)
        assert [script.rate(step, short) for step in range(4)] == rates, warmdown
    assert [script.momentum(step, args) for step in (0, 5, 10, 20, 21, 99)] == pytest.approx(
        [0.85, 0.875, 0.90, 0.95, 0.95, 0.95], abs=1e-15)
    assert script.momentum(250, no_rise) == pytest.approx(0.90, abs=1e-15), "500 steps on track fineweb"

    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizers = [torch.optim.Adam([p], lr=3.0), script.Muon([p], lr=0.5)]
    for group in (g for o in optimizers for g in o.param_groups):
        group["initial_lr"] = group["lr"]
    for step in (80, 2, 80):
        script.schedule(optimizers, step, args)
        assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([3 * got[step], 0.5 * got[step]])
        assert optimizers[1].param_groups[0]["momentum"] == script.momentum(step, args)
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
    print(script, flags, val)
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
    print(script, kernel, dtype, val, f"{far:.1e}")
    assert all(map(math.isfinite, val))
    assert far < (1e-12 if dtype == "fp32" else 1e-3 if script == "train_rwkv6" else 2e-4), far


@pytest.mark.parametrize("script, kernel", [(script, kernel) for script in SCRIPTS for kernel in KERNELS[script]])
def test_compiles_in_one_graph(script, kernel, data, tmp_path):
    """fullgraph=True refuses any break; the compiled model gives the same loss and gradients."""
    flags = tiny(script, data, tmp_path, "--seq_len", 16, *(["--kernel", kernel] if kernel else []))
    _, _, (_, (train, _, _), model, _, _) = load(script, *flags)
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
        about, defaults = field.metadata["help"], field.metadata["defaults"]
        assert re.search(rf"--{name}\b", text), name
        assert " ".join(about.split()) in text and len(about.split()) >= 2, name
        fineweb, shown = defaults["fineweb"], f"[{defaults['fineweb']}]"
        if fineweb != defaults["tiny"]:
            shown = f"[fineweb {fineweb}, tiny {defaults['tiny']}]"
        if fineweb != "":
            after = text[text.index(" ".join(about.split())) + len(" ".join(about.split())):]
            assert after.strip().startswith(shown), f"--{name} hides its default {shown}"


def test_defaults_of_the_tracks():
    """The race as the issue states it, and the same tokens for both models on track tiny."""
    parsed = {}
    for script, track in itertools.product(SCRIPTS, ("fineweb", "tiny")):
        parsed[script, track] = importlib.import_module(script).Hyperparameters.parse(["--track", track])
    for script, steps, warmdown in (
            ("train_rwkv7", 3200, 914), ("train_rwkv6", 5100, 1450), ("train_gpt2", 3242, 926)):
        args = parsed[script, "fineweb"]
        assert (args.steps, args.warmdown_steps) == (steps, warmdown)
        assert (args.bsz * args.seq_len, args.seq_len) == (524288, 1024)
        assert (args.layers, args.width, args.val_tokens, args.epochs) == (12, 768, 10485760, 1)
        assert importlib.import_module(script).TARGET["fineweb"] == 3.28
        assert parsed[script, "tiny"].vocab_size == 257 and parsed[script, "tiny"].seq_len == 256
    for name in ("bsz", "seq_len", "steps", "val_tokens", "data"):
        assert len({getattr(parsed[script, "tiny"], name) for script in SCRIPTS}) == 1, name


def test_the_documented_command_of_rwkv6():
    """... is what it names and the race's defaults; Muon's scale is the one of its rate."""
    script = importlib.import_module("train_rwkv6")
    flags = "--adam_lr 0.0020 --emb_scale 1.5 --muon_lr 0.00036 --headsz 64 --bsz 512 --device_bsz 64"
    assert flags in script.__doc__
    args, plain = script.Hyperparameters.parse(flags.split()), script.Hyperparameters.parse([])
    assert {name for name in vars(args) if vars(args)[name] != vars(plain)[name]} == {
        "adam_lr", "emb_scale", "device_bsz"}
    assert (args.adam_lr, args.emb_scale, args.device_bsz) == (0.0020, 1.5, 64)
    assert (args.muon_lr, args.muon_scale, args.headsz, args.bsz) == (0.00036, "rms", 64, 512)


def test_tiny_models_are_of_one_size():
    """Within 3 % of each other, about a million outside the embedding."""
    active = []
    for script in SCRIPTS:
        module = importlib.import_module(script)
        args = module.Hyperparameters.parse(["--track=tiny", "--device=cpu"] + ["--kernel=torch"] * ("rwkv" in script))
        with torch.device("meta"), contextlib.redirect_stderr(None):
            model = module.build_model(args)
        active.append(sum(p.numel() for name, p in model.named_parameters() if name not in model.lookups))
    assert max(active) / min(active) < 1.03, active
    assert 0.8e6 < min(active) and max(active) < 1.25e6, active


@pytest.mark.parametrize("script", SCRIPTS)
def test_check_looks_at_everything_and_writes_nothing(script, data, tmp_path):
    """What run_*.sh asks for before it starts several ranks: one process speaks for WORLD_SIZE of them."""
    flags = tiny(script, data, tmp_path / "records", "--check")
    done = run_script(script, *flags, WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not (tmp_path / "records").exists()
    for wrong, named in (("--steps=0", "--steps 0"), ("--headsz=24", "headsz 24"), (f"--data={tmp_path}", "no train")):
        done = run_script(script, *flags, wrong, WORLD_SIZE="2")
        assert done.returncode == 1 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
