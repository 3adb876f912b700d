"""inference/formats.py and the official x070 layout: the rwkv package computes what our models do, there and back."""

import importlib
import os
import pickle
import re
import subprocess
import sys
import zipfile
from dataclasses import asdict

import pytest
import safetensors.torch
import torch

import formats
from helpers import ROOT, environment, make_corpus, run_here, tiny, tree
from test_sample import write_checkpoint

PLAIN = dict(x070=True, width=128, headsz=64, layers=3)  # 64 is the size that the package's CUDA kernel is made for
CASES = {"plain": ("train_rwkv7", PLAIN), "heads of 32": ("train_rwkv7", dict(x070=True, width=96, headsz=32)),
         "speedrun": ("train_rwkv7", dict(width=64)), "train_rwkv6": ("train_rwkv6", dict(width=64)),
         "train_gpt2": ("train_gpt2", dict(width=128))}
LIMIT = 3e-6  # of differences of the logits of 256 tokens, relative to the largest, which is 3 to 7; measured 1.5e-6
TOKENS = torch.randint(257, (1, 256), generator=torch.Generator().manual_seed(5))

PACKAGE = """
import os, sys
os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
import torch
from rwkv.model import RWKV
tokens, results = torch.load(sys.argv[1], weights_only=True), {}
for path in sys.argv[2:]:
    model, state, one = RWKV(path[:-len(".pth")], "cpu fp32"), None, []
    at_once, _ = model.forward(tokens, None, full_output=True)
    for token in tokens:
        logits, state = model.forward([token], state)
        one.append(logits)
    first, state = model.forward(tokens[:100], None, full_output=True)
    rest, _ = model.forward(tokens[100:], state, full_output=True)
    results[path] = dict(at_once=at_once, one_by_one=torch.stack(one), in_parts=torch.cat((first, rest)))
torch.save(results, sys.argv[1])
"""


def scatter(t, generator):
    """t with noise, so that no term of the model is 0 and vectors differ from channel to channel."""
    size = 0.7 / t.shape[-1] ** 0.5 if min(t.shape[-2:], default=1) > 1 else 0.2
    return t + size * torch.randn(t.shape, generator=generator)


def scattered(case):
    """Script, Hyperparameters and weights of a tiny model with all parameters scattered."""
    script, flags = importlib.import_module(CASES[case][0]), CASES[case][1]
    kernel = {} if "gpt2" in script.__name__ else dict(kernel="torch")
    config = script.Hyperparameters(**{**script.TINY, "device": "cpu", "dtype": "fp32", **kernel, **flags})
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    weights = {name: scatter(p.detach(), generator) for name, p in script.build_model(config).state_dict().items()}
    return script, config, weights


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    about = dict(run="a_run", step=7)
    made = {case: write_checkpoint(root / f"{case.replace(' ', '_')}_step000007.safetensors", *scattered(case), **about)
            for case in CASES}
    data = make_corpus(root / "data", train=(9000,), text=(ROOT / "LICENSE").read_bytes())
    run_here("train_rwkv7", *tiny("train_rwkv7", data, root / "records", "--checkpoints", root / "runs", "--x070",
                                  "--width", 64, "--headsz", 32, "--steps", 40, "--val_every", 40))
    made["trained"], = (root / "runs").iterdir()
    return made


def foreign(folder):
    """A .pth as others write them: bf16, other low ranks, a wide ffn, an odd vocabulary, v0 to v2 in layer 0 too, and
    the dimensions of size 1 lost."""
    C, H, N, V, hidden, generator = 128, 2, 64, 301, 512, torch.Generator().manual_seed(1)
    normal = lambda *shape: scatter(torch.zeros(shape), generator).bfloat16()
    norm = lambda name: {f"{name}.weight": 1 + normal(C), f"{name}.bias": normal(C)}
    found = {"emb.weight": normal(V, C), "head.weight": normal(V, C), **norm("ln_out"), **norm("blocks.0.ln0")}
    for l in range(2):
        att, ffn = f"blocks.{l}.att.", f"blocks.{l}.ffn."
        found |= norm(f"blocks.{l}.ln1") | norm(f"blocks.{l}.ln2") | norm(f"{att}ln_x")
        found |= {att + x: 0.5 + normal(C) for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0",
                                                     "k_k", "k_a")}
        for x, rank in (("w", 24 + 8 * l), ("a", 40), ("v", 8), ("g", 72)):
            found |= {f"{att}{x}1": normal(C, rank), f"{att}{x}2": normal(rank, C)}
        found |= {f"{att}{x}.weight": normal(C, C) for x in ("receptance", "key", "value", "output")}
        found |= {f"{att}r_k": normal(H, N), f"{ffn}x_k": normal(C)}
        found |= {f"{ffn}key.weight": normal(hidden, C), f"{ffn}value.weight": normal(C, hidden)}
    torch.save(found, folder / "foreign.pth")
    return folder / "foreign.pth"


@pytest.fixture(scope="module")
def files(checkpoints, tmp_path_factory):
    """{case: .pth}: exported ones and a foreign one."""
    folder = tmp_path_factory.mktemp("files")
    for case in ("plain", "heads of 32", "trained"):
        assert formats.main([str(checkpoints[case]), "--to", "rwkv", "--out", str(folder / f"{case}.pth")]) == 0
    return {**{path.stem: path for path in folder.iterdir()}, "foreign": foreign(folder)}


@pytest.fixture(scope="module")
def package(files):
    """{case: {mode: logits (256, V)}} of the rwkv package, which takes its settings from a process's environment."""
    exchange = files["plain"].with_name("exchange")
    torch.save(TOKENS[0].tolist(), exchange)
    done = subprocess.run([sys.executable, "-c", PACKAGE, str(exchange), *map(str, files.values())], env=environment(),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = torch.load(exchange, weights_only=True)
    return {case: results[str(path)] for case, path in files.items()}


def ours(model):
    """{mode: logits (256, V)}."""
    state, parts = model.new_state(), model.new_state()
    with torch.no_grad():
        return dict(parallel=model.parallel().logits(TOKENS)[0],
                    one_by_one=torch.cat([model(TOKENS[:, t:t + 1], state) for t in range(256)], 1)[0],
                    in_parts=torch.cat([model(part, parts) for part in TOKENS.split([37, 1, 218], 1)], 1)[0])


# --------------------------------------------------------------------------------------------------------------------
# The rwkv package

@pytest.mark.parametrize("case", ["plain", "heads of 32", "trained", "foreign"])
def test_the_package_computes_the_same(case, checkpoints, files, package):
    mine, its = ours(formats.load(checkpoints.get(case, files[case]))), package[case]
    assert mine["parallel"].abs().max() > 2, "logits too small to tell anything"
    zeros = [name for name, t in torch.load(files[case], weights_only=True).items() if not t.any()]
    assert not zeros, f"not trained: {zeros}"
    largest = mine["parallel"].abs().max()
    errors = {f"{a} / {b}": ((mine[a] - its[b]).abs().max() / largest).item() for a in mine for b in its}
    assert max(errors.values()) < LIMIT, errors


def test_every_parameter_takes_part(files):
    """So that agreement says something about each of them."""
    model = formats.load(files["plain"])
    module, few = model.parallel(), TOKENS[:, :64]
    with torch.no_grad():
        before, generator = module.logits(few), torch.Generator().manual_seed(2)
        for name, p in module.named_parameters():
            kept = p.clone()
            p.copy_(scatter(kept, generator))
            change = (module.logits(few) - before).abs().max()
            assert change > 100 * LIMIT * before.abs().max(), f"{name}: {change:.1e}"
            p.copy_(kept)
        assert torch.equal(module.logits(few), before)


def test_layout(files):
    """Names, shapes and types of the file itself, of which foreign() wrote the names out once more."""
    found, theirs = (torch.load(files[case], weights_only=True) for case in ("plain", "foreign"))
    names = {name for name in theirs if not re.fullmatch(r"blocks\.0\.att\.v[012]", name)}
    names |= {name.replace("blocks.1.", "blocks.2.") for name in names}
    assert set(found) == names
    assert all(type(t) is torch.Tensor and t.dtype == torch.float32 and t.is_contiguous() for t in found.values())
    for name, shape in {"emb.weight": (384, 128), "head.weight": (384, 128), "blocks.1.att.r_k": (2, 64),
                        "blocks.1.att.x_r": (1, 1, 128), "blocks.2.ffn.x_k": (1, 1, 128), "blocks.1.att.g1": (128, 64),
                        "blocks.1.att.g2": (64, 128), "blocks.0.ffn.key.weight": (448, 128)}.items():
        assert found[name].shape == shape, name


# --------------------------------------------------------------------------------------------------------------------
# There and back

def same_logits(a, b):
    return all(torch.equal(x, y) for x, y in zip(ours(a).values(), ours(b).values()))


def test_pth_and_back(checkpoints, files, tmp_path):
    first, again = formats.load(checkpoints["plain"]), formats.load(files["plain"])
    assert same_logits(first, again) and first.hash == again.hash
    sizes = lambda model: [getattr(model.config, name) for name in ("layers", "width", "headsz", "ffn_ratio", "x070")]
    assert sizes(again) == sizes(first) and again.config.vocab_size == 384 and again.step is None
    assert formats.main([str(files["plain"]), "--to", "rwkv", "--out", str(tmp_path / "again.pth")]) == 0
    assert formats.load(tmp_path / "again.pth").hash == first.hash


@pytest.mark.parametrize("case", ["speedrun", "train_rwkv6", "train_gpt2"])
def test_safetensors_and_back(case, checkpoints, tmp_path, capsys):
    first, out = formats.load(checkpoints[case]), tmp_path / "model.safetensors"
    assert formats.main([str(checkpoints[case]), "--to", "safetensors", "--out", str(out)]) == 0
    assert "257 on are padding" in capsys.readouterr().out
    again = formats.load(out)
    assert same_logits(first, again) and first.hash == again.hash
    assert asdict(again.config) == asdict(first.config)
    assert {key: again.header.get(key) for key in formats.KEPT} == {key: first.header.get(key) for key in formats.KEPT}
    assert list(tree(tmp_path)) == ["model.safetensors"]
    assert out.read_bytes() != checkpoints[case].read_bytes() and again.header["finished"]


def test_foreign_files(files, tmp_path):
    """Sizes are the file's own; the same from safetensors and torch's old format; exported again; bf16 of ours."""
    model = formats.load(files["foreign"])
    config = model.config
    assert (config.layers, config.width, config.headsz, config.ffn_ratio, config.vocab_size, config.x070) == (
        2, 128, 64, 4.0, 301, True)
    assert model.trained["blocks.1.att.w1"].shape == (128, 32) and ours(model)["parallel"].shape == (256, 301)
    found = torch.load(files["foreign"], weights_only=True)
    safetensors.torch.save_file(found, tmp_path / "official.safetensors")
    torch.save(found, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("official.safetensors", "old.pth"):
        assert formats.load(tmp_path / name).hash == model.hash
    out = tmp_path / "ours.safetensors"
    assert formats.main([str(files["foreign"]), "--to", "safetensors", "--dtype", "bf16", "--out", str(out)]) == 0
    assert same_logits(formats.load(out), model) and formats.load(out).hash == model.hash
    flags = ["--dtype", "bf16", "--to", "rwkv", "--out"]
    assert formats.main([str(files["plain"]), *flags, str(tmp_path / "half.pth")]) == 0
    half, whole = torch.load(tmp_path / "half.pth", weights_only=True), torch.load(files["plain"], weights_only=True)
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert (tmp_path / "half.pth").stat().st_size < 0.6 * files["plain"].stat().st_size


# --------------------------------------------------------------------------------------------------------------------
# What is refused

def refused(capsys, *flags, parts):
    capsys.readouterr()
    assert formats.main(list(map(str, flags))) == 1
    said = capsys.readouterr().err
    assert said.startswith("formats.py: ") and said.count("\n") == 1 and len(said) < 700, said
    for part in parts:
        assert part in said, f"{part!r} is not in: {said}"


@pytest.mark.parametrize("case, parts", [
    ("speedrun", ["x0 lambdas", "RMSNorm", "softcap 30"]),
    ("train_rwkv6", ["att.u", "token shift", "emb_scale", "head tied"]),
    ("train_gpt2", ["attention", "lambdas", "softcap 30"])])
def test_what_is_not_plain_is_refused(case, parts, checkpoints, tmp_path, capsys):
    refused(capsys, checkpoints[case], "--to", "rwkv", "--out", tmp_path / "model.pth",
            parts=["not plain x070", "--x070", "--to safetensors", *parts])
    assert not tree(tmp_path)


def test_each_part_alone_is_refused(checkpoints):
    for part, value, word in (("x0_lambdas", 1, "lambdas"), ("rms_norm", 1, "RMSNorm"), ("softcap", 15.0, "softcap")):
        model = formats.load(checkpoints["plain"])
        assert formats.without_place(model) == []
        setattr(model.config, part, value)
        only, = formats.without_place(model)
        assert word in only


def test_output(checkpoints, tmp_path, capsys, monkeypatch):
    flags, out = [checkpoints["plain"], "--to", "rwkv", "--out"], tmp_path / "model.pth"
    out.write_bytes(b"precious")
    (tmp_path / "folder.pth").mkdir()
    refused(capsys, *flags, out, parts=["is there already", "--force"])
    refused(capsys, *flags, tmp_path / "folder.pth", "--force", parts=["is there already. Name another"])
    refused(capsys, *flags, tmp_path / "gone" / "model.pth", parts=["gone is no folder"])
    refused(capsys, *flags, tmp_path / "model.bin", parts=["writes a .pth file"])
    refused(capsys, tmp_path / "nothing.pth", *flags[1:], tmp_path / "x.pth", parts=["no such file"])

    def full(weights, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed\nC++ stack")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        refused(capsys, *flags, out, "--force", parts=["cannot write", "Make room"])
    assert tree(tmp_path) == {"model.pth": b"precious"}
    os.link(out, tmp_path / "link")  # whoever has the old file open keeps it whole: the new one took its name
    assert formats.main([*map(str, flags), str(out), "--force"]) == 0
    assert (tmp_path / "link").read_bytes() == b"precious"
    assert formats.load(out).hash == formats.load(checkpoints["plain"]).hash
    with pytest.raises(SystemExit) as ended:
        formats.main([str(checkpoints["plain"]), "--to", "onnx", "--out", "x"])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


def test_bad_files(files, tmp_path, monkeypatch):
    """One clear line each, and nothing in them is run."""
    monkeypatch.chdir(tmp_path)
    good, raw = torch.load(files["plain"], weights_only=True), files["plain"].read_bytes()
    less = lambda *gone: {name: t for name, t in good.items() if name not in gone}
    with zipfile.ZipFile("zip", "w") as file:
        file.writestr("x", "no weights")
    damaged = ["is damaged, or no file of tensors"]
    bad = {  # tables that torch saves, files as they are, what is said
        "x060": ({"blocks.0.att.time_maa_x": torch.zeros(3)}, ["not plain x060", "lacks emb.weight"]),
        "x052": ({"blocks.0.att.gate.weight": torch.zeros(3), "blocks.0.att.time_decay": torch.zeros(3)}, ["x052"]),
        "x04": ({"blocks.0.att.time_decay": torch.zeros(3)}, ["RWKV-4"]),
        "lacking": (less("emb.weight", "blocks.2.att.w1"), ["lacks", "emb.weight", "blocks.2.att.w1"]),
        "no sizes": (less("blocks.0.att.r_k", "blocks.0.ffn.key.weight"), ["lacks blocks.0.att.r_k", "ffn.key"]),
        "no block": (less(*(name for name in good if name.startswith("blocks.1."))), ["lacks", "blocks.1.", "more"]),
        "more": ({**good, "blocks.0.ffn.s_emb.weight": torch.ones(3)}, ["has besides it blocks.0.ffn.s_emb.weight"]),
        "shape": ({**good, "blocks.1.ln2.bias": torch.ones(127)}, ["blocks.1.ln2.bias is (127,) float32, not (128,)"]),
        "rank": ({**good, "blocks.1.att.g2": torch.ones(31, 128)}, ["blocks.1.att.g2 is (31, 128)"]),
        "table": ({**good, "emb.weight": torch.ones(384, 100)}, ["plain x070"]),
        "heads": ({**good, "blocks.0.att.r_k": torch.ones(3, 50)}, ["r_k"]),
        "int8": ({**good, "head.weight": torch.ones(384, 128, dtype=torch.int8)}, ["head.weight", "int8"]),
        "strangers": ({"weight": torch.ones(3)}, ["none of the models", "GPT-2", "(weight)"]),
        "nobody": ({}, ["none of the models"]),
        "list": ([torch.ones(3)], ["no table of tensors"]), "numbers": ({1: torch.ones(3)}, ["no table of tensors"]),
        "wrapped": (dict(network=good, step=3), ["no table of tensors"]),
        "object": ({"a": Malicious()}, ["Python object", "could run code"]),
        "module": (torch.nn.Linear(2, 2), ["Python object", "Linear"]), "text": (b"no weights\n" * 9, damaged),
        "empty": (b"", damaged), "pickle": (pickle.dumps(Malicious()), damaged), "cut": (raw[:-100], damaged),
        "zipped": ((tmp_path / "zip").read_bytes(), damaged), "text.safetensors": (b"no weights", damaged)}
    for name, (content, parts) in bad.items():
        path = tmp_path / (name if "." in name else f"{name}.pth")
        path.write_bytes(content) if type(content) is bytes else torch.save(content, path)
        with pytest.raises(ValueError) as caught:
            formats.load(path.name)
        said = str(caught.value)
        assert said.startswith(path.name) and "\n" not in said and said.endswith(".") and len(said) < 400, said
        assert all(part in said for part in parts), f"{parts} not all in: {said}"
    assert not (tmp_path / "executed").exists()
