"""sample.py: samplers against their formulas, text, states, --check with bugs to find, --eval against training's own
figure, and what users get wrong. Models: random ones on disk (every term counts), and one trained run a script."""

import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import types
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import formats
import recurrent
import sample
from helpers import ROOT, SCRIPTS, make_corpus, one_thread, only_record, run_here, tiny, write_shard
from test_recurrent import CASES, scattered

TEXT = (ROOT / "README.md").read_bytes()[:6000]


def write_checkpoint(path, script, config, weights, **more):
    """A checkpoint as the training scripts write it after the last step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = dict(schema=3, finished=True, script=f"{script.__name__}.py", run="random", step=1, config=asdict(config),
                  tokenizer="bytes", tokenizer_sha256=sample.tokenizers.Bytes.sha256)
    weights = {name: t.contiguous() for name, t in weights.items()}
    safetensors.torch.save_file(weights, path, metadata=dict(checkpoint=json.dumps({**header, **more})))
    return path


@pytest.fixture(scope="module", autouse=True)
def quick():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """{case: checkpoint} of models with noise on every parameter."""
    return {case: write_checkpoint(tmp_path_factory.mktemp("random") / "run_step000001.safetensors", *scattered(case))
            for case in CASES}


@pytest.fixture(params=CASES)
def path(request, paths):
    return paths[request.param]


@pytest.fixture
def gpt(paths):
    return paths["train_gpt2"]


@pytest.fixture
def say(capsys):
    """What sample.py says: (text, notes) of a call that must end well, or with the status expected."""
    def call(*argv, status=0):
        capsys.readouterr()
        try:
            ended = sample.main([str(a) for a in argv])
        except SystemExit as error:
            ended = error.code
        out, err = capsys.readouterr()
        assert ended == status, out + err
        return out, err
    return call


@pytest.fixture
def refused(say):
    """A call that must say what is wrong in one line, with these words, and do nothing else."""
    def call(*argv, words, status=1):
        out, err = say(*argv, status=status)
        assert out == "" and err.startswith("sample.py: ") and err.count("\n") == 1, err
        assert not [word for word in words if word not in err], err
    return call


# Samplers, each against its formula in plain Python


def distributions():
    """Probabilities that are multiples of 1/64, whose sums are exact: many ties, many zeros."""
    rng = random.Random(0)
    for _ in range(60):
        counts = [0] * rng.choice((1, 2, 5, 20))
        for _ in range(64):
            counts[int(len(counts) * rng.random() ** rng.choice((1, 3)))] += 1
        yield [n / 64 for n in counts]


RULES = dict(top_k=lambda p, rank, before, best, k: rank < k,
             top_p=lambda p, rank, before, best, share, x=1.0: before < share or p > x,
             min_p=lambda p, rank, before, best, m: p >= m * best,
             top_a=lambda p, rank, before, best, a: p >= a * best ** 2)
FLAGS = [("top_k", [(1,), (2,), (3,), (7,), (100,)]), ("top_p", [(0.0,), (0.25,), (0.5,), (33 / 64,), (1.0,)]),
         ("top_p", [(0.25, 0.0), (0.5, 3 / 64), (0.0, 5 / 64), (0.5, 1.0)]), ("min_p", [(0.05,), (0.5,), (1.0,)]),
         ("top_a", [(0.2,), (1.0,), (2.5,), (1e9,)])]


def plain(name, p, *flags):
    """What a rule keeps of p, and the best token whatever it says, scaled to the sum 1; the lower id first."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    before = itertools.accumulate((p[i] for i in order), initial=0)
    kept = {i for rank, (i, sum_before) in enumerate(zip(order, before))
            if rank == 0 or RULES[name](p[i], rank, sum_before, p[order[0]], *flags)}
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("name, values", FLAGS)
def test_filters(name, values):
    changed = 0
    for p, flags in itertools.product(distributions(), values):
        got, want = getattr(sample, name)(torch.tensor(p, dtype=torch.float64), *flags), plain(name, p, *flags)
        assert (got - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-15, (p, flags)
        assert got[p.index(max(p))] > 0, "the best token stays"
        changed += want != p
    assert changed > 60


def test_penalties_and_temperature():
    rng = random.Random(1)
    z = [rng.gauss(0, 3) for _ in range(50)] + [0.0, -math.inf, 2.0, -2.0]
    count = [rng.choice((0, 0, 1, 5)) for _ in z]
    seen = [rng.random() < 0.5 for _ in z]
    Z, n, s = torch.tensor(z, dtype=torch.float64), torch.tensor(count), torch.tensor(seen)
    for r in (1.3, 0.5):
        assert sample.repetition(Z, s, r).tolist() == [
            (x / r if x > 0 else x * r) if was_seen else x for x, was_seen in zip(z, seen)]
    for a in (0.4, -1.5):
        assert sample.presence(Z, n, a).tolist() == [x - a if c else x for x, c in zip(z, count)]
        assert sample.frequency(Z, n, a).tolist() == pytest.approx([x - a * c for x, c in zip(z, count)], abs=1e-14)
    for t in (0.3, 1.0, 7.0):
        total = sum(math.exp(x / t) for x in z)
        assert sample.temperature(Z, t).tolist() == pytest.approx([math.exp(x / t) / total for x in z], rel=1e-12)
    assert sample.temperature(Z, 1e-9)[max(range(len(z)), key=z.__getitem__)] == 1, "as cold as can be"


def test_draw():
    for p in distributions():
        below, tensor = list(itertools.accumulate(p)), torch.tensor(p, dtype=torch.float64)
        for u in (*(j / 640 for j in range(640)), 1 - 2**-53):
            want = next(i for i in range(len(p)) if u < below[i])
            assert sample.draw(tensor, u) == want and p[want] > 0


def how(**flags):
    off = dict(temperature=1.0, top_k=0, top_p=1.0, top_p_x=1.0, min_p=0.0, top_a=0.0, repetition=1.0, presence=0.0,
               frequency=0.0)
    return types.SimpleNamespace(**{**off, **flags})


def test_order_of_the_samplers():
    """All at once, and each pair, are the formulas one after the other in the documented order."""
    rng = random.Random(2)
    kinds = dict(repetition=1.4, presence=0.5, frequency=0.3, temperature=1.7, top_k=9, top_p=0.8, top_p_x=0.05,
                 min_p=0.1, top_a=0.3)
    both = [dict(min_p=rng.uniform(0.02, 0.3), top_a=rng.uniform(0.3, 2)) for _ in range(20)]
    for flags in [kinds, {}, *(dict(pair) for pair in itertools.combinations(kinds.items(), 2)), *both]:
        z = [rng.gauss(0, 2) for _ in range(30)]
        count, f = [rng.choice((0, 0, 1, 3)) for _ in z], how(**flags)
        seen = [c > 0 or rng.random() < 0.2 for c in count]
        x = [v if not s else v / f.repetition if v > 0 else v * f.repetition for v, s in zip(z, seen)]
        x = [v - f.presence * (c > 0) - f.frequency * c for v, c in zip(x, count)]
        p = [math.exp(v / f.temperature) for v in x]
        p = plain("top_k", [v / sum(p) for v in p], f.top_k or len(p))
        p = plain("top_p", p, f.top_p, f.top_p_x) if f.top_p < 1 else p
        p = plain("top_a", plain("min_p", p, f.min_p), f.top_a)
        for u in ((j + 0.5) / 53 for j in range(53)):
            want = next(i for i, below in enumerate(itertools.accumulate(p)) if u < below)
            got = sample.choose(torch.tensor(z, dtype=torch.float64), torch.tensor(seen), torch.tensor(count), f, u)
            assert got == want, flags


def test_edges_of_choosing():
    none = torch.zeros(4)
    pick = lambda z, u=0.5, **flags: sample.choose(torch.tensor(z), none > 0, none, how(**flags), u)
    inf = math.inf
    assert pick([1.0, 3.0, 3.0, 0.0], temperature=0) == 1, "greedy, the lower id among equals"
    assert {pick([-inf, 2.0, -inf, 2.0], u / 50) for u in range(50)} == {1, 3}
    assert {pick([0.0] * 4, u / 50, top_k=2) for u in range(50)} == {0, 1}, "ties at the edge"
    for bad in ([math.nan, 1.0, 1.0, 1.0], [-inf] * 4, [inf, 0.0, 0.0, 0.0]):
        for t in (0, 1.0):
            with pytest.raises(ValueError, match="not finite"):
                pick(bad, temperature=t)
    for flags in (dict(repetition=1e-320), dict(frequency=-1e308), dict(presence=-1e308, frequency=-1e308)):
        with pytest.raises(ValueError, match="not finite: --repetition"):
            sample.choose(torch.tensor([1.0, 2.0]), none[:2] == 0, torch.tensor([5.0, 0.0]), how(**flags), 0.5)


# Text


@pytest.mark.parametrize("text", ["plain", "zwölf € 𝕏 你好 🙂", "\n\t"])
def test_characters_wait_for_their_end(text):
    parts = []
    out = sample.Text(sample.tokenizers.Bytes(), parts.append)
    for i, byte in enumerate(text.encode()):
        out.add(byte)
        assert "".join(parts) == text.encode()[:i + 1].decode("utf-8", "ignore")
    assert parts == list(text)
    out.add("€".encode()[0])  # never ends
    out.end()
    assert "".join(parts) == text + "\ufffd"
    out.add(256)
    out.add(ord("x"))
    assert "".join(parts) == text + "\ufffd\n---\nx"


def test_greedy_text_is_that_of_the_parallel_form(path, say, monkeypatch):
    """Token after token, as it comes; the model sees the mark and the prompt."""
    model, ids, parts = formats.load(path), [256, *b"Sun"], []
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(model.parallel().logits(torch.tensor([ids]))[0, -1, :257].argmax()))
        if ids[-1] == 256:
            break
    monkeypatch.setattr(sample, "write", parts.append)
    say(path, "--start", "Sun", "--temperature", 0, "--max_new_tokens", 20)
    assert "".join(parts) == bytes(i for i in ids if i < 256).decode("utf-8", "replace") + "\n"
    assert parts[0] == "Sun" and len(parts) > 3


def test_a_sample_is_the_same_however_many(path, say, monkeypatch):
    """Its own random numbers, and no state from the samples before it. The prompt is read once."""
    flags = (path, "--start", "The state of", "--max_new_tokens", 40, "--go_on", "--top_p", 0.95, "--repetition", 1.3,
             "--frequency", 0.5)
    reads, prefill = [], recurrent.Model.prefill
    monkeypatch.setattr(recurrent.Model, "prefill", lambda *a, **k: reads.append(1) or prefill(*a, **k))
    three, one = say(*flags, "--num_samples", 3)[0], say(*flags)[0]
    assert len(reads) == 2
    begin, *texts = re.split(r"--- sample \d of 3\n", three)
    assert begin == "" and texts[0] == one and len(set(texts)) == 3
    assert all(text.startswith("The state of") for text in texts)
    assert say(*flags, "--seed", 2)[0] != one
    together = say(*flags, "--num_samples", 3, "--batch", 3)[0]
    assert together == three, "in fp32 a batch rounds alike on this machine, but for rare luck"


def test_where_a_text_begins(gpt, tmp_path):
    """Prompts are seen but not counted, the mark neither; after a state, a prompt ends a character that was cut."""
    model, file = formats.load(gpt), tmp_path / "state"
    model.new_state().save(file, model, pending=7, seen=[7], count={"7": 2}, waiting=[0xE2])
    for start, load, read, seen_then, counts, left in (
            ("aba", None, [256, 97, 98, 97], [97, 98], {}, b""), ("", file, [7], [7], {7: 2}, b"\xe2"),
            ("x", file, [7, 120], [7, 120], {7: 2}, b"")):
        args = types.SimpleNamespace(start=start, load_state=load, mark=True)
        prompt, state, tokens, seen, count, waiting = sample.begin(model, sample.tokenizers.Bytes(), args)
        assert (prompt, state.position, tokens.tolist(), waiting) == (start, 0, read, left)
        assert seen[0].nonzero().flatten().tolist() == seen_then
        assert {i: n for i, n in enumerate(count[0].tolist()) if n} == counts


def test_prompts(gpt, say, tmp_path):
    long = TEXT[:1500].decode("utf-8", "ignore")  # three pieces of prefill, six contexts
    (tmp_path / "prompt.txt").write_text(long, encoding="utf-8")
    assert say(gpt, "--start", f"FILE:{tmp_path / 'prompt.txt'}", "--max_new_tokens", 5)[0].startswith(long)
    for flags, read in (([], 1), (["--start", "abc"], 4), (["--start", "abc", "--no-mark"], 3)):
        assert f"[train_gpt2, step 1: {read} tokens read" in say(gpt, *flags, "--max_new_tokens", 1)[1]


def drawn(rows, n=1, V=3, mark=2, **flags):
    """(what is drawn, what the model read) of a model whose logits are given, one row a step."""
    steps, read, zeros = iter(rows), [], torch.zeros(n, V)

    def model(tokens, state):
        read.append(tokens.flatten().tolist())
        return torch.tensor(next(steps)).expand(len(tokens), 1, -1).clone()
    flags = how(**{**dict(max_new_tokens=len(rows), go_on=False, temperature=0), **flags})
    rngs = [random.Random(i) for i in range(n)]
    return list(sample.generate(model, None, 2, zeros > 0, zeros, flags, rngs, mark)), read


def test_stops_at_the_mark_and_never_draws_padding():
    rows = [[0.0, 1.0, 0.5, 9.0], [0.0, 0.0, 5.0, 9.0], [1.0, 0.0, 0.0, 9.0]]  # id 3 is padding
    assert drawn(rows) == ([[1], [2]], [[2], [1]])
    assert drawn(rows, go_on=True) == ([[1], [2], [0]], [[2], [1], [2]])
    assert drawn(rows, max_new_tokens=1) == ([[1]], [[2]]) and drawn(rows, max_new_tokens=0) == ([], [])
    flat = [[0.0, 0.0, 0.0, 50.0]] * 200
    steps, _ = drawn(flat, n=3, temperature=1.0)
    ends = [next((t for t, step in enumerate(steps) if step[i] == 2), len(steps)) for i in range(3)]
    assert len(set(ends)) > 1 and len(steps) == max(ends) + 1, "a batch ends with its last"
    for i, end in enumerate(ends):
        assert all(step[i] in (0, 1) for step in steps[:end]) and all(step[i] is None for step in steps[end + 1:])


def test_penalties_count_the_text():
    for flags, ids in ((dict(presence=0.5), [0, 1, 0, 0]), (dict(frequency=0.5), [0, 1, 0, 1]),
                       (dict(repetition=2.0), [0, 1, 0, 0])):
        assert drawn([[1.0, 0.9, -9.0]] * 4, **flags)[0] == [[i] for i in ids]
    assert drawn([[0.9, 0.9, 1.0]] * 3, repetition=2.0, presence=1.0, go_on=True)[0] == [[2]] * 3, "but not the mark"


# States


def test_a_saved_state_goes_on(path, say, tmp_path):
    """Two halves are the whole, penalties included; from a prompt's state too."""
    flags = path, "--temperature", 0, "--repetition", 1.2, "--presence", 3, "--frequency", 1, "--go_on"
    whole = say(*flags, "--start", "State:", "--max_new_tokens", 40)[0]
    first = say(*flags, "--start", "State:", "--max_new_tokens", 15, "--save_state", tmp_path / "half")[0]
    second = say(*flags, "--max_new_tokens", 25, "--load_state", tmp_path / "half")[0]
    assert first[:-1] + second == whole and len(second) > 3, "a character that was cut is whole again too"
    say(*flags, "--start", "Sta", "--max_new_tokens", 0, "--save_state", tmp_path / "prompt")
    rest = say(*flags, "--start", "te:", "--max_new_tokens", 40, "--load_state", tmp_path / "prompt")[0]
    assert "Sta" + rest == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "prompt"]


def test_states_that_do_not_fit(paths, gpt, say, refused, tmp_path):
    """What recurrent.py finds is said in one line; and what lacks that of a text, or is of more than one."""
    state, model = tmp_path / "state", formats.load(gpt)
    say(gpt, "--dtype", "int8", "--max_new_tokens", 2, "--save_state", state)
    say(gpt, "--dtype", "int8", "--max_new_tokens", 2, "--load_state", state)
    refused(gpt, "--load_state", state, words=["dtype is int8"])
    refused(paths["train_rwkv7"], "--load_state", state, words=["another model"])
    refused(gpt, "--load_state", tmp_path / "gone", words=["gone", "--save_state"])
    for batch, facts in ((1, {}), (2, dict(pending=1, seen=[], count={}, waiting=[]))):
        model.new_state(batch).save(state, model, **facts)
        refused(gpt, "--load_state", state, words=["not saved by sample.py"])
    model.header["tokenizer"] = "another name"
    assert model.load_state(state)[0].position == 0, "the same vocabulary"


# Check


def table(out):
    """[dtype, form, cells, verdict] of --check."""
    return [[line[:4], line[6:17].strip(), *line[17:].split(maxsplit=5)] for line in out.splitlines()
            if line.startswith(("fp32 ", "bf16 "))]


def test_distance():
    generator = torch.Generator().manual_seed(0)
    true, z = (torch.randn(6, 9, generator=generator) * 3 for _ in range(2))
    z[:4] = true[:4] + 0.01 * z[:4]
    d = sample.distance(z, dict(a=torch.tensor([1.0, 2.5]), b=torch.tensor([[8.0]])), true,
                        dict(a=torch.tensor([1.0, 2.0]), b=torch.tensor([[10.0]])))
    pairs = list(zip(true.double().tolist(), z.double().tolist()))
    largest = max(abs(a - b) for row in pairs for a, b in zip(*row))
    softmax = lambda row: [math.exp(x) / sum(map(math.exp, row)) for x in row]
    kl = sum(p * math.log(p / q) for row in pairs for p, q in zip(*map(softmax, row))) / 6
    top1 = sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs) / 6
    assert d == pytest.approx(dict(absolute=largest, logits=largest / true.abs().max().item(), kl=kl, top1=top1,
                                   state=0.25), rel=1e-6) and 0 < top1 < 1
    assert sample.distance(z, None, true, None)["state"] is None


def test_all_forms_agree(path, say, tmp_path, monkeypatch):
    """All of one checkpoint: another step may be saved between fp32 and bf16."""
    (tmp_path / "text").write_bytes(TEXT)
    (tmp_path / "checkpoints").symlink_to(path.parent)
    monkeypatch.setattr(formats, "CHECKPOINTS", tmp_path / "checkpoints")
    loaded, load = [], formats.load
    monkeypatch.setattr(formats, "load", lambda where, *a: loaded.append(where.resolve()) or load(where, *a))
    out = say("latest", "--check", "--text", tmp_path / "text", "--tokens", 150)[0]
    assert loaded == [path.resolve()] * 2
    lines = table(out)
    assert [line[:2] for line in lines] == [[d, f] for d in ("fp32", "bf16") for f in (
        "parallel", "one piece", "odd pieces", "one by one", "limit")]
    assert "all forms agree" in out and f"150 tokens of {tmp_path / 'text'}" in out
    rows = [line for line in lines if line[1] != "limit"]
    assert all(float(line[3]) > 1e-4 for line in rows if line[0] == "bf16"), "bf16 is bf16"
    assert [line[-1] for line in rows] == [*["ok"] * 4, "-", "ok, sets the limit of state", "ok", "ok"], (
        "no limit holds what set it")


@pytest.mark.parametrize("name, digest, words", [
    ("mine", "1" * 64, ["the model's tokenizer, mine, is not known here"]),
    ("gpt2", None, ["tiktoken is not installed", "r50k_base.tiktoken"])])
def test_without_data_or_vocabulary(name, digest, words, say, refused, tmp_path, monkeypatch):
    """--check and the loss need none: sample.py's own head serves any vocabulary, only bytes are not known."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    script, config, weights = scattered("train_gpt2")
    config.data = str(tmp_path / "gone")
    path = write_checkpoint(tmp_path / "x_step000001.safetensors", script, config, weights, tokenizer=name,
                            tokenizer_sha256=digest)
    shard = write_shard(tmp_path / "one.bin", [256, *TEXT[:600]])
    for flags, source in (([], "sample.py's own head"), (["--text", shard], shard)):
        assert f"20 tokens of {source}" in say(path, "--check", "--tokens", 20, *flags)[0]
    got, out = evaluated(say, path, "--eval", shard)
    assert got["tokens"] == 512 and "bits_per_byte" not in got and f"not known: {words[0]}" in out
    refused(path, words=[*words, "--tokenizer FILE"])
    if digest:
        refused(path, "--tokenizer", "bytes", words=["wrong tokenizer", "mine, sha256 111111111111"])


# Bugs that --check must find; made from outside, whatever the inside of recurrent.py


def forgets(name, when=lambda T: True):
    """A part of the state is lost between two calls, of T tokens each."""
    def broken(right):
        @torch.inference_mode()
        def call(self, tokens, state, last=False):
            if name in state.tensors and when(tokens.size(1)):
                state.tensors[name].zero_()
            return right(self, tokens, state, last)
        return call
    return recurrent.Model, "__call__", broken


def changed(model, **weights):
    """A model whose recurrent form, but not the training script's, has other weights."""
    other = {**model.trained, **{name: change(model.trained[name]) for name, change in weights.items()}}
    broken = type(model)(model.config, other, model.dtype, model.device, model.header, model.script)
    broken.trained = model.trained
    return broken


SLIP = {"blocks.0.att.w0": lambda t: t + 0.02}
BUGS = [  # the bug; what is replaced, by a function of the right one; its models
    ("time mixing's shift is dropped", forgets("att_x"), ["train_rwkv7", "train_rwkv6"]),
    ("channel mixing's shift is dropped", forgets("ffn_x"), ["train_rwkv7"]),
    ("the heads' state between pieces", forgets("wkv", when=lambda T: T > 1), ["train_rwkv7", "train_rwkv6"]),
    ("the heads' state at single tokens", forgets("wkv", when=lambda T: T == 1), ["train_rwkv7", "train_rwkv6"]),
    ("keys are dropped", forgets("k"), ["train_gpt2"]), ("values are dropped", forgets("v"), ["train_gpt2"]),
    ("position is forgotten", (recurrent.GPT2, "rotate", lambda right: staticmethod(
        lambda x, cos, sin: right(x, cos[:1].expand_as(cos), sin[:1].expand_as(sin)))), ["train_gpt2"]),
    ("not a number", (recurrent.GPT2, "softcap", lambda right: lambda *a: right(*a) * math.nan), ["train_gpt2"]),
    ("a small slip", (formats, "load", lambda right: lambda *a: changed(right(*a), **SLIP)),
     ["train_rwkv7", "train_rwkv6"])]


@pytest.mark.parametrize("name, bug, case", [(name, bug, case) for name, bug, cases in BUGS for case in cases])
def test_check_finds(name, bug, case, paths, say, monkeypatch, tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    owner, function, broken = bug
    monkeypatch.setattr(owner, function, broken(getattr(owner, function)))
    out = say(paths[case], "--check", "--text", tmp_path / "text", "--tokens", 80, status=1)[0]
    assert "do NOT agree" in out
    words = "BROKEN: logits" if name == "a small slip" else "BROKEN: logits, kl"
    assert any(line[0] == "fp32" and line[-1].startswith(words) for line in table(out))


def test_check_would_miss_no_weight(path):
    """Any parameter that the recurrent form left out (0 for it) would break the limits in fp32."""
    model, tokens = formats.load(path), torch.from_numpy(np.frombuffer(TEXT[:64], np.uint8).astype(np.int64))[None]
    with torch.no_grad():
        true = model.parallel().logits(tokens)[0]
    figures = lambda m: sample.distance(m(tokens, m.new_state())[0], None, true, None)
    assert figures(changed(model))["logits"] < sample.FP32["logits"] / 10
    for name in (name for name in model.trained if name != "blocks.0.att.mix"):  # v is v_first there
        assert figures(changed(model, **{name: torch.zeros_like}))["logits"] > 3 * sample.FP32["logits"], name


# Trained runs, and --eval


@pytest.fixture(scope="module", params=SCRIPTS)
def run(request, tmp_path_factory):
    """A short run in fp32 of a script: checkpoint, folder of the data, result.json."""
    folder = tmp_path_factory.mktemp(request.param)
    tokens = [token for part in TEXT.split(b"\n\n") for token in (256, *part)]
    write_shard(folder / "data" / "toy_train_000001.bin", tokens)
    write_shard(folder / "data" / "toy_val_000000.bin", tokens[3000:4800])
    write_shard(folder / "data" / "toy_val_000001.bin", tokens[:900])
    (folder / "data" / "token_bytes.bin").write_bytes(bytes([1] * 256 + [0]))
    run_here(request.param, *tiny(request.param, folder / "data", folder / "records", "--steps", 60, "--val_tokens",
                                  2500, "--val_every", 60, "--checkpoints", folder / "checkpoints"))
    record, _, result = only_record(folder / "records")
    return next((folder / "checkpoints").glob(f"{record.name}_*")), folder / "data", result


def evaluated(say, *argv):
    out, _ = say(*argv)
    return json.loads(out.splitlines()[-1]), out


def test_eval_is_the_loss_of_training(run, say):
    path, data, result = run
    got, out = evaluated(say, path, "--eval", data)
    final = result["final"]
    assert abs(got["loss"] - final["val_loss"]) < 1e-5 and got["tokens"] == final["val_tokens"] == 2496
    bits = final["val_loss"] * 2496 / final["text_bytes"] / math.log(2)
    assert abs(got["bits_per_byte"] - bits) < 1e-5 and got["bytes"] == final["text_bytes"]
    assert final["val_loss"] < 4.5, "the run learned"
    assert f"{got['loss']:.4f} ± {got['standard_error']:.4f} nats per token" in out
    assert evaluated(say, path, "--eval", data / "val")[0]["loss"] == got["loss"]
    out = say(path, "--check", "--tokens", 100)[0]
    assert "all forms agree" in out and f"100 tokens of {data}/val" in out


def test_eval_by_hand(run, say):
    """Contexts, documents and standard errors, from the training script's own module."""
    path, data, _ = run
    shards = [np.fromfile(shard, "<u2", offset=1024) for shard in sorted(data.glob("*val*"))]
    model, tokens = formats.load(path).parallel(), torch.from_numpy(np.concatenate(shards).astype(np.int64))[:1501]

    def nats(x):
        with torch.no_grad():
            return F.cross_entropy(model.logits(x[None, :-1])[0], x[1:], reduction="none").double().tolist()
    marks = [i for i in range(1500) if tokens[i] == 256]
    starts = [0, *(m for m in marks if m)]
    by_document = [nats(tokens[a:b + 1]) for a, b in zip(starts, [*starts[1:], 1500])]
    sequences = lambda size: [nats(tokens[i:i + size + 1]) for i in range(0, 1500, size)]
    D, text = len(starts), (tokens[1:] < 256).numpy()
    for context, want in ((100, sequences(100)), (750, sequences(750)), (0, by_document)):
        losses = np.concatenate(want)
        got, out = evaluated(say, path, "--eval", data, "--context", context, "--eval_tokens", 1500)
        assert got["tokens"] == len(losses) == 1500 and got["documents"] == D > 3
        assert got["loss"] == pytest.approx(losses.sum() / 1500, abs=1e-6)
        for key, x, size in (("standard_error", losses, np.ones(1500)),
                             ("bits_standard_error", losses / math.log(2), text)):
            residuals = np.add.reduceat(x - x.sum() / size.sum() * size, starts)
            error = math.sqrt(D / (D - 1) * (residuals ** 2).sum()) / size.sum()
            assert got[key] == pytest.approx(error, abs=1e-6)
        assert (f"{context} tokens" if context else "whole documents") in out


def test_standard_error_is_that_of_repeated_draws():
    """Over many draws of documents the estimates scatter by what ratio() says."""
    rng = np.random.default_rng(0)

    def draw():
        sizes = rng.integers(5, 400, 60)
        return sample.ratio(sizes * (2 + rng.normal(0, 0.3, 60)), sizes)
    means, errors = zip(*(draw() for _ in range(2000)))
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.06)


def test_eval_of_a_shard_and_of_text(gpt, say, tmp_path):
    write_shard(tmp_path / "one.bin", [256, *TEXT[:2000]])
    (tmp_path / "one.txt").write_bytes(TEXT[:2000])
    (tmp_path / "lines.txt").write_bytes(b"one line\r\n\ranother\r\n" * 40)
    result = lambda name, *flags: evaluated(say, gpt, "--eval", tmp_path / name, *flags)[0]
    shard, text, short = result("one.bin"), result("one.txt"), result("one.txt", "--eval_tokens", 60)
    assert shard["tokens"] == text["tokens"] == 1792 and shard["loss"] == text["loss"], "7 sequences of 256"
    assert shard["standard_error"] is None and shard["documents"] == 1
    assert (short["tokens"], short["context"]) == (60, 60)
    assert result("lines.txt", "--context", 0)["bytes"] == 40 * 20
    for dtype in ("bf16", "int8"):
        loss = result("one.bin", "--dtype", dtype)["loss"]
        assert loss != shard["loss"] and loss == pytest.approx(shard["loss"], rel=0.02)


# Bad input


def test_an_official_file(say, refused, tmp_path):
    """One of plain x070 names no tokenizer: it is given."""
    torch.save(scattered("train_rwkv7 x070")[2], tmp_path / "model.pth")
    (tmp_path / "text.txt").write_bytes(TEXT[:1000])
    path = tmp_path / "model.pth", "--tokenizer", "bytes"
    refused(path[0], "--start", "x", words=["--tokenizer FILE"])
    assert say(*path, "--start", "x", "--max_new_tokens", 5)[0].startswith("x")
    assert evaluated(say, *path, "--eval", tmp_path / "text.txt", "--context", 0)[0]["bytes"] == 1000
    assert "all forms agree" in say(*path, "--check", "--tokens", 40)[0]


@pytest.mark.parametrize("flags, words", [
    (["--top_p", 2], ["--top_p", "2 is no number from 0 to 1", "1: off"]),
    (["--temperature", -1], ["--temperature", "-1 is no number of at least 0"]),
    (["--top_k", 1.5], ["--top_k", "whole number", "0: off"]), (["--seed", "1" + "0" * 400], ["--seed"]),
    (["--repetition", 0], ["--repetition", "above 0", "1: off"]),
    (["--frequency", "inf"], ["--frequency", "inf is no number"]),
    (["--num_samples", 0], ["--num_samples", "at least 1"]), (["--top_p_x", 0.1], ["--top_p_x", "--top_p"]),
    (["--save_state", "no/folder/F"], ["--save_state no/folder/F", "no such folder"]),
    (["--save_state", ROOT], [f"--save_state {ROOT}", "is a folder", "Name a file"]),
    (["--save_state", "F", "--num_samples", 2], ["--save_state", "--num_samples 1"]),
    (["--device", "cuda"], ["--device cpu"]), (["--check", "--eval", "x"], ["--eval", "--check"]),
    (["--top-p", 0.5], ["--top-p", "--help"])])
def test_bad_flags(flags, words, gpt, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(gpt, *flags, words=words, status=2)


def test_bad_input(gpt, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin").write_bytes("zwölf".encode("latin-1"))
    (tmp_path / "empty").touch()
    write_shard(tmp_path / "high.bin", [300] * 600)
    data, other, torn = (make_corpus(tmp_path / name) for name in ("data", "other", "torn"))
    (other / "manifest.json").write_text('{"tokenizer": "gpt2", "tokenizer_sha256": "0f"}')
    (torn / "manifest.json").write_text("{")
    shutil.copy(gpt, "cut.safetensors")
    os.truncate("cut.safetensors", 1000)
    refused("latest", words=["no checkpoint", "./run_rwkv7.sh --track tiny"])
    refused("cut.safetensors", words=["damaged"])
    for flags, words in (
            (["--start", "FILE:gone.txt"], ["gone.txt", "No such file"]), (["--start", "FILE:data"], ["cannot read"]),
            (["--start", "FILE:latin"], ["latin", "UTF-8", "iconv"]), (["--start", "\udcff"], ["Unicode", "FILE:"]),
            (["--no-mark"], ["no document mark", "--start"]), (["--tokenizer", "empty"], ["empty", "single bytes"]),
            (["--eval", "gone"], ["no such data: gone"]), (["--eval", tmp_path], ["no val shards"]),
            (["--eval", "empty"], ["make no sequence"]), (["--eval", "high.bin"], ["up to id 300", "257 ids"]),
            (["--eval", data, "--context", 1000], ["449 tokens", "no sequence of 1000", "--context"]),
            (["--eval", other], ["tokens of gpt2", "reads bytes"]), (["--eval", torn], ["manifest.json", "damaged"]),
            (["--check", "--text", "empty"], ["empty", "nothing to compare"])):
        refused(gpt, *flags, words=words)


def test_a_terminal_gets_no_control_characters(monkeypatch, capsys):
    sample.write("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\x1b[2J\n"
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True)
    sample.write("a\x1b[2J\té你\r\n\r")
    assert capsys.readouterr().out == "a\ufffd[2J\té你\n\ufffd"
