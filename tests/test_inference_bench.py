"""bench.py and recurrent.py's int8 weights: what is computed and written. Nothing is timed here."""

import json
import statistics

import pytest
import torch

import bench
import formats
import recurrent
import sample
from helpers import make_corpus, one_thread
from recurrent import FAMILIES
from test_recurrent import scattered, tokens
from test_sample import write_checkpoint


@pytest.fixture(autouse=True)
def quick():
    with one_thread():
        yield


def build(name, weights=None):
    script, config, own = scattered(name)
    return FAMILIES[name](config, weights or own, "fp32", "cpu", dict(tokenizer="bytes"), script)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("out, into", [(64, 96), (257, 192), (31, 33)])
def test_product_with_int8_is_off_by_no_more_than_rounding(out, into, rows):
    generator = torch.Generator().manual_seed(out)
    W, x = torch.randn(out, into, generator=generator), torch.randn(rows, 1, into, generator=generator)
    W[0], W[1] = 0, 1e-3 * W[1]  # a row of zeros and a row with a scale of its own
    small = recurrent.Int8(W)
    step = W.abs().amax(1) / 127 * 1.006  # of a row: its largest / 127, rounded up to what bf16 holds
    assert small.rounded.dtype == torch.int8 and small.rounded.abs().max() <= 127
    assert (small.rounded.float() * small.scale.float()[:, None] - W).abs().amax(1).le(step / 2 + 1e-12).all()
    exact, got = x.double() @ W.double().T, small.product(x)
    bf16 = 2**-8 * (x.abs() @ W.abs().T + exact.abs())  # few rows: x and the result are rounded to bf16
    bound = x.abs().sum(-1, keepdim=True) * step / 2 + (bf16 if rows <= 16 and into % 32 == 0 else 1e-5)
    assert got.shape == exact.shape and got.dtype == torch.float32
    assert ((got - exact).abs() <= bound + 1e-9).all(), ((got - exact).abs() / (bound + 1e-9)).max()
    assert rows == 40 or (got - exact)[..., 2:].abs().max() > 0, "nothing was rounded"


@pytest.mark.parametrize("name", FAMILIES)
def test_int8_model_is_the_fp32_model_with_rounded_weights(name):
    model = build(name)
    small, rounded = model.quantize(), {key: t.clone() for key, t in model.trained.items()}
    assert small.dtype == "int8" and small.hash == model.hash
    held = {**small.W, **{f"blocks.{l}.{key}": t for l, p in enumerate(small.blocks) for key, t in p.items()}}
    quantized = {key: t for key, t in held.items() if isinstance(t, recurrent.Int8)}
    assert {"head.weight"} < set(quantized), "the head is a matrix that every token reads"
    assert not set(quantized) & set(recurrent.LOOK_UPS)
    for key, t in quantized.items():
        W = t.rounded.float() * t.scale.float()[:, None]
        if key in rounded:
            rounded[key] = W.T if recurrent.on_the_right(key) else W
    like = build(name, rounded)
    if "head.weight" not in rounded:  # RWKV-6 ties it to the embeddings, which stay as they are
        head = quantized["head.weight"]
        like.W["head.weight"] = head.rounded.float() * head.scale.float()[:, None]
    text = tokens(1, 40)
    a, b, plain = (m(text, m.new_state()) for m in (small, like, model))
    size = plain.std()
    assert (a - b).abs().max() < 1e-4 * size, "40 rows: fp32 on both sides"
    assert 1e-4 * size < (a - plain).abs().max() < 0.2 * size
    one = small.new_state()
    last = [small(text[:, t:t + 1], one) for t in range(40)][-1]
    assert (last[:, 0] - a[:, -1]).abs().max() < 0.1 * size, "one row: activations in bf16"
    assert all(t.dtype == torch.float32 for t in one.tensors.values())
    matrices = sum(t.rounded.numel() for t in quantized.values())
    assert model.weight_bytes(read=True) - small.weight_bytes(read=True) > 2.9 * matrices
    with pytest.raises(ValueError, match="recurrently only"):
        small.parallel()


def result_of(name):
    args = bench.parse(["x", "--positions", "24,48,96", "--rounds", "3", "--chunk", "16"])
    trained = build(name)
    return bench.bench([trained, build("train_gpt2")], trained, args, print)


def test_states_and_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "bandwidth", lambda: lambda: [1e10, 2e10])
    result = result_of("train_rwkv7")
    assert capsys.readouterr().out.startswith("Random tokens stand in for the text, loss is not measured: ")
    sizes = {}
    for line in result["positions"]:
        sizes.setdefault(line["model"], []).append(line["state_bytes"])
    config = build("train_gpt2").config
    assert sizes == {"RWKV-7": [build("train_rwkv7").new_state().bytes()] * 3,
                     "GPT-2": [2 * 4 * config.layers * config.width * n for n in (24, 48, 96)]}
    assert [row["memory"] for row in result["slopes"]] == ["constant", "grows"]
    assert [(row["model"], row["dtype"]) for row in result["speed"]] == [
        (model, dtype) for model in ("RWKV-7", "GPT-2") for dtype in ("fp32", "int8")]
    for row in result["speed"]:
        assert row["ms"] > 0 and row["tokens_per_s"] == pytest.approx(1e3 / row["ms"])
        assert row["bound_share"] is None, "a model this small stays in the caches"
    out = tmp_path / "deep" / "out"
    bench.show(result, out, print)
    assert {p.name for p in out.iterdir()} - {"bench.png"} == {"table.md", "bench.csv", "bench.json"}
    head, *rows = (out / "bench.csv").read_text().splitlines()
    assert head == "model,dtype,position,ms,ms_error,state_bytes" and len(rows) == 6
    printed, table = capsys.readouterr().out.splitlines(), (out / "table.md").read_text()
    again = json.loads(printed[-1])
    assert again == json.loads((out / "bench.json").read_text()) == json.loads(json.dumps(result))
    assert "\n".join(printed).startswith(table.rstrip("\n"))
    assert {line.count("|") for line in table.splitlines()} == {0, 3 + 6, 9}, table


def test_share_of_the_bound(monkeypatch):
    rounds = [([1e9, 2e9], 4.0, 1.0), ([1e9, 2e9], 4.0, 2.0), ([2e9, 2e8], 4.0, 4.0)]
    numbers = lambda job: rounds if "speed" in job else [4.0] * 3
    monkeypatch.setattr(bench, "measure", lambda jobs, rounds: {job: numbers(job) for job in jobs})
    monkeypatch.setattr(recurrent.Model, "weight_bytes", lambda self, read=False: 8e7 if self.dtype == "fp32" else 2e7)
    result = result_of("train_rwkv6")
    fp32, int8 = (row for row in result["speed"] if row["model"] == "RWKV-6")
    assert result["bandwidth"] == dict(mv=1e9, linear=2e9)
    assert fp32["bound_share"] == pytest.approx(80e6 / 2e9 * 1e3 / 4) and int8["bound_share"] is None
    assert (fp32["times_fp32"], int8["times_fp32"]) == (1, statistics.median([4, 2, 1]))


def test_loss_of_both():
    model, text = build("train_rwkv7"), tokens(1, 600)[0]
    loss, T = bench.losses([model, model.quantize()], text), min(model.config.seq_len, 256)
    pieces = text[:len(text) // (T + 1) * (T + 1)].view(-1, T + 1)
    with torch.no_grad():
        z = model.parallel().logits(pieces[:, :-1])[..., :model.vocab_size]
    assert loss["pieces"] == len(pieces) > 1
    assert loss["fp32"] == pytest.approx(torch.nn.functional.cross_entropy(z.mT, pieces[:, 1:]).item(), rel=1e-4)
    assert loss["change"] == pytest.approx(loss["int8"] - loss["fp32"], abs=1e-6) and loss["change"] != 0


def test_a_shape_and_what_int8_costs_a_trained_model(tmp_path, monkeypatch, capsys):
    """Times are of the shape's models, the loss of the checkpoint's; its data may lie in the repository's folder."""
    script, config, weights = scattered("train_rwkv6")
    data, path = make_corpus(tmp_path / "data", val=(5000,)), tmp_path / "x_step000001.safetensors"
    config.data = "data"
    write_checkpoint(path, script, config, weights)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "random_model", lambda name, track: build(name))
    monkeypatch.setattr(bench, "bandwidth", lambda: lambda: [1e10, 2e10])
    monkeypatch.setattr(bench, "losses", lambda pair, text, right=bench.losses: right(pair, text[:800]))
    flags = ["--positions", "24,48", "--rounds", "2", "--chunk", "16", "--out", tmp_path / "out"]
    assert sample.main(["--bench", path, "--shape", "124m", *flags]) == 0, "it is bench.py's main()"
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert [row["model"] for row in result["slopes"]] == ["RWKV-7", "RWKV-6", "GPT-2"]
    assert result["loss"]["model"] == "RWKV-6, random, step 1" and result["loss"]["change"] != 0
    assert f"Validation loss: RWKV-6, random, step 1: fp32 {result['loss']['fp32']:.4f}, int8 " in out
    model = formats.load(path)
    below, _ = bench.validation(model, 2000)
    model.config.data = str(data)
    absolute, reason = bench.validation(model, 2000)
    assert reason is None and torch.equal(absolute, below)


@pytest.mark.parametrize("flags, word, status", [
    ([], "give a CHECKPOINT", 2), (["x", "--rounds", "0"], "at least 1", 2), (["x", "--positions", "9,3"], "rising", 2),
    (["x", "--rouns", "3"], "--rouns", 2), (["--shape", "7b"], "124m", 2), (["nothing"], "nothing: no such file", 1)])
def test_bad_flags(flags, word, status, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        ended = bench.main(flags)
    except SystemExit as stopped:
        ended = stopped.code
    err = capsys.readouterr().err
    assert ended == status and err.startswith("bench.py: ") and word in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
