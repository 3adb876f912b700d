"""sample.py: samplers against their formulas, text, states, --check with bugs to find, --eval against training's own
figure, and what users get wrong. Models: random ones on disk (every term counts), and one trained run a script."""

import hashlib
import itertools
import json
import math
import random
import sys
import types
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import recurrent
import sample
from helpers import ROOT, SCRIPTS, make_corpus, one_thread, only_record, run_here, signed, tiny, write_shard
from test_recurrent import CASES, scattered

TEXT = (ROOT / "README.md").read_bytes()[:6000]


def write_checkpoint(folder, script, config, weights, **about):
    """A checkpoint's folder as the training scripts write it."""
    folder.mkdir(parents=True)
    safetensors.torch.save_file({name: t.contiguous() for name, t in weights.items()}, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    about = dict(dict(format=1, script=f"{script.__name__}.py", run="random", step=1, config=asdict(config),
                      tokenizer="bytes", tokenizer_sha256=sample.tokenizers.Bytes.sha256,
                      files={"model.safetensors": dict(sha256=hashlib.sha256(data).hexdigest())}), **about)
    (folder / "checkpoint.json").write_text(json.dumps(signed(about)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """{case: checkpoint} of models with noise on every parameter."""
    return {case: write_checkpoint(tmp_path_factory.mktemp("random") / "step000001", *scattered(case))
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


# Samplers, each against its formula in plain Python


def distributions():
    """Probabilities that are multiples of 1/64, whose sums are exact: many ties, many zeros."""
    rng = random.Random(0)
    for _ in range(60):
        counts = [0] * rng.choice((1, 2, 5, 20))
        for _ in range(64):
            counts[int(len(counts) * rng.random() ** rng.choice((1, 3)))] += 1
        yield [n / 64 for n in counts]


def normal(p, kept):
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def by_rank(p):
    return sorted(range(len(p)), key=lambda i: (-p[i], i))


def plain_top_k(p, k):
    return normal(p, set(by_rank(p)[:k]))


def plain_top_p(p, share, x=1.0):
    kept, total = set(), 0.0
    for i in by_rank(p):
        if total < share or p[i] > x or not kept:
            kept.add(i)
        total += p[i]
    return normal(p, kept)


def plain_min_p(p, m):
    return normal(p, {i for i in range(len(p)) if p[i] >= m * max(p)} | {by_rank(p)[0]})


def plain_top_a(p, a):
    return normal(p, {i for i in range(len(p)) if not p[i] < a * max(p) ** 2} | {by_rank(p)[0]})


FILTERS = {
    "top_k": [(1,), (2,), (3,), (7,), (100,)], "top_p": [(0.0,), (0.25,), (0.5,), (33 / 64,), (1.0,)],
    "top_p with x": [(0.25, 0.0), (0.5, 3 / 64), (0.0, 5 / 64), (0.5, 1.0)],
    "min_p": [(0.05,), (0.5,), (1.0,)], "top_a": [(0.2,), (1.0,), (2.5,), (1e9,)]}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(name):
    function, plain = getattr(sample, name.split()[0]), globals()[f"plain_{name.split()[0]}"]
    changed = 0
    for p, flags in itertools.product(distributions(), FILTERS[name]):
        got = function(torch.tensor(p, dtype=torch.float64), *flags)
        want = plain(p, *flags)
        assert (got - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-15, (p, flags)
        assert got[by_rank(p)[0]] > 0, "the best token stays"
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
            (x / r if x > 0 else x * r) if there else x for x, there in zip(z, seen)]
    for a in (0.4, -1.5):
        assert sample.presence(Z, n, a).tolist() == [x - a if c else x for x, c in zip(z, count)]
        assert sample.frequency(Z, n, a).tolist() == pytest.approx([x - a * c for x, c in zip(z, count)], abs=1e-14)
    for t in (0.3, 1.0, 7.0):
        total = sum(math.exp(x / t) for x in z)
        assert sample.temperature(Z, t).tolist() == pytest.approx([math.exp(x / t) / total for x in z], rel=1e-12)
    assert sample.temperature(Z, 1e-9)[max(range(len(z)), key=z.__getitem__)] == 1, "as cold as can be"


def test_draw():
    for p in distributions():
        for u in (*(j / 640 for j in range(640)), 1 - 2**-53):
            below = list(itertools.accumulate(p))
            want = next(i for i in range(len(p)) if u < below[i])
            assert sample.draw(torch.tensor(p, dtype=torch.float64), u) == want and p[want] > 0


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
        p = plain_top_k([v / sum(p) for v in p], f.top_k or len(p))
        p = plain_top_p(p, f.top_p, f.top_p_x) if f.top_p < 1 else p
        p = plain_top_a(plain_min_p(p, f.min_p), f.top_a)
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
    for flags in (dict(top_p=0.0), dict(top_a=1e9), dict(min_p=1.0), dict(top_k=1), dict(top_p=0.0, top_p_x=0.99)):
        assert {pick([0.5, 1.0, 0.9, -inf], u / 50, **flags) for u in range(50)} == {1}, flags
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
    model, ids, parts = recurrent.load(path), [256, *b"Sun"], []
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
    parts = three.split("--- sample ")
    assert parts[0] == "" and [part[:7] for part in parts[1:]] == ["1 of 3\n", "2 of 3\n", "3 of 3\n"]
    texts = [part[7:] for part in parts[1:]]
    assert texts[0] == one and len(set(texts)) == 3 and all(text.startswith("The state of") for text in texts)
    assert say(*flags, "--num_samples", 3)[0] == three, "the same again"
    assert say(*flags, "--seed", 2)[0] != one
    together = say(*flags, "--num_samples", 3, "--batch", 3)[0]
    assert together == three, "in fp32 a batch rounds alike on this machine, but for rare luck"


def test_the_mark_is_not_penalised(gpt):
    args = types.SimpleNamespace(start="aba", load_state=None, mark=True)
    prompt, state, tokens, seen, count, waiting = sample.begin(recurrent.load(gpt), sample.tokenizers.Bytes(), args)
    assert (prompt, tokens.tolist(), waiting) == ("aba", [256, 97, 98, 97], b"") and state.position == 0
    assert seen[0].nonzero().flatten().tolist() == [97, 98] and not count.any(), "the prompt is not counted"


def test_prompts(gpt, say, tmp_path):
    long = TEXT.decode("utf-8", "ignore")
    (tmp_path / "prompt.txt").write_text(long, encoding="utf-8")
    out, notes = say(gpt, "--start", f"FILE:{tmp_path / 'prompt.txt'}", "--max_new_tokens", 5)
    assert out.startswith(long) and f"{len(long.encode()) + 1} tokens read" in notes and "5 drawn" in notes
    assert "[train_gpt2, step 1: 1 tokens read" in say(gpt, "--max_new_tokens", 5)[1], "the document mark alone"
    assert "[train_gpt2, step 1: 3 tokens read" in say(gpt, "--start", "abc", "--no-mark", "--max_new_tokens", 1)[1]


class Fixed:
    """A model whose logits are given, one row a step."""

    def __init__(self, rows):
        self.rows, self.read = iter(rows), []

    def __call__(self, tokens, state):
        self.read.append(tokens.flatten().tolist())
        return torch.tensor(next(self.rows)).expand(len(tokens), 1, -1).clone()


def drawn(rows, n=1, V=3, mark=2, **flags):
    model, zeros = Fixed(rows), torch.zeros(n, V)
    flags = how(**{**dict(max_new_tokens=len(rows), go_on=False, temperature=0), **flags})
    rngs = [random.Random(i) for i in range(n)]
    return list(sample.generate(model, None, 2, zeros > 0, zeros, flags, rngs, mark)), model.read


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
    assert drawn([[1.0, 0.9, -9.0]] * 4, presence=0.5)[0] == [[0], [1], [0], [0]]
    assert drawn([[1.0, 0.9, -9.0]] * 4, frequency=0.5)[0] == [[0], [1], [0], [1]]
    assert drawn([[1.0, 0.9, -9.0]] * 4, repetition=2.0)[0] == [[0], [1], [0], [0]]
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


def test_a_prompt_ends_a_character_that_was_cut(gpt, tmp_path):
    model, file = recurrent.load(gpt), tmp_path / "state"
    model.new_state().save(file, model, pending=7, seen=[7], count={"7": 2}, waiting=[0xE2])
    for start, bytes_left in (("", b"\xe2"), ("x", b"")):
        args = types.SimpleNamespace(start=start, load_state=file, mark=True)
        _, _, tokens, seen, count, waiting = sample.begin(model, sample.tokenizers.Bytes(), args)
        assert (tokens.tolist(), waiting) == ([7, *start.encode()], bytes_left)
        assert count[0].nonzero().tolist() == [[7]] and count[0, 7] == 2 and seen.sum() == 1 + len(start)


def test_states_that_do_not_fit(paths, gpt, say, tmp_path):
    def refused(file, path, *parts):
        out, err = say(path, "--load_state", file, status=1)
        assert err.startswith("sample.py: ") and err.count("\n") == 1 and out == ""
        for part in parts:
            assert part in err
    state = tmp_path / "state"
    say(gpt, "--start", "x", "--max_new_tokens", 0, "--save_state", state)
    refused(state, paths["train_rwkv7"], "another model")
    refused(tmp_path / "gone", gpt, "gone", "--save_state")
    (tmp_path / "noise").write_bytes(b"noise")
    refused(tmp_path / "noise", gpt, "no saved state")
    model = recurrent.load(gpt)
    sample.open_tokenizer(model, types.SimpleNamespace(tokenizer=None))
    model.new_state().save(state, model)
    refused(state, gpt, "not saved by sample.py")
    model.new_state(2).save(state, model, pending=1, seen=[], count={}, waiting=[])
    refused(state, gpt, "not saved by sample.py")
    say(gpt, "--dtype", "int8", "--max_new_tokens", 2, "--save_state", state)
    say(gpt, "--dtype", "int8", "--max_new_tokens", 2, "--load_state", state)
    refused(state, gpt, "dtype is int8")
    model.new_state().save(state, model, pending=1, seen=[], count={}, waiting=[])
    model.about["tokenizer"] = "another name"
    assert model.load_state(state)[0].position == 0, "the same vocabulary"
    model.about["tokenizer_sha256"] = "other"
    model.new_state().save(state, model, pending=1, seen=[], count={}, waiting=[])
    refused(state, gpt, "tokenizer_sha256")


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


def test_all_forms_agree(path, say, tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    out = say(path, "--check", "--text", tmp_path / "text", "--tokens", 150)[0]
    lines = table(out)
    assert [line[:2] for line in lines] == [[d, f] for d in ("fp32", "bf16") for f in (
        "parallel", "one piece", "odd pieces", "one by one", "limit")]
    assert "all forms agree" in out and f"150 tokens of {tmp_path / 'text'}" in out
    for line in lines:
        if line[0] == "bf16" and line[1] != "limit":
            assert float(line[3]) > 1e-4, "bf16 is bf16"
    verdicts = [line[-1] for line in lines if line[1] != "limit"]
    assert verdicts == ["ok"] * 4 + ["-", "ok, sets the limit of state", "ok", "ok"], "no limit holds what set it"


def test_check_without_data_or_vocabulary(paths, say, tmp_path, monkeypatch):
    """The run's data is gone: sample.py's own head serves any vocabulary. A shard can be given too."""
    script, config, weights = scattered("train_gpt2")
    config.data = str(tmp_path / "gone")
    path = write_checkpoint(tmp_path / "step000001", script, config, weights, tokenizer="mine", tokenizer_sha256="1")
    assert "20 tokens of sample.py's own head" in say(path, "--check", "--tokens", 20)[0]
    write_shard(tmp_path / "one.bin", [256, *TEXT[:600]])
    out = say(path, "--check", "--tokens", 20, "--text", tmp_path / "one.bin")[0]
    assert f"20 tokens of {tmp_path / 'one.bin'}" in out


# Bugs that --check must find; made from outside, whatever the inside of recurrent.py. (the bug, its models)


def forgets(*names, when=lambda T: True):
    """Parts of the state are lost between two calls, of T tokens each."""
    def bug(monkeypatch):
        right = recurrent.Model.__call__

        @torch.inference_mode()
        def call(self, tokens, state, last=False):
            for name in (name for name in names if name in state.tensors and when(tokens.size(1))):
                state.tensors[name].zero_()
            return right(self, tokens, state, last)
        monkeypatch.setattr(recurrent.Model, "__call__", call)
    return bug


def changed(model, **weights):
    """A model whose recurrent form, but not the training script's, has other weights."""
    other = {**model.trained, **{name: change(model.trained[name]) for name, change in weights.items()}}
    broken = type(model)(model.config, other, model.dtype, model.device, model.about, model.script)
    broken.trained = model.trained
    return broken


def ignores(**weights):
    def bug(monkeypatch):
        right = recurrent.load
        monkeypatch.setattr(recurrent, "load", lambda *a: changed(right(*a), **{
            name.replace("__", "."): change for name, change in weights.items()}))
    return bug


def becomes(value):
    return lambda t: torch.full_like(t, value)


def forgets_position(monkeypatch):
    right = recurrent.GPT2.rotate
    monkeypatch.setattr(recurrent.GPT2, "rotate", staticmethod(lambda x, cos, sin: right(
        x, cos[:1].expand_as(cos), sin[:1].expand_as(sin))))


BUGS = {
    "time mixing's shift is dropped": (forgets("att_x"), ["train_rwkv7", "train_rwkv6"]),
    "channel mixing's shift is dropped": (forgets("ffn_x"), ["train_rwkv7"]),
    "the heads' state is dropped": (forgets("wkv"), ["train_rwkv7", "train_rwkv6"]),
    "it is dropped between pieces": (forgets("wkv", when=lambda T: T > 1), ["train_rwkv7", "train_rwkv6"]),
    "it is dropped at single tokens": (forgets("wkv", when=lambda T: T == 1), ["train_rwkv7", "train_rwkv6"]),
    "keys are dropped": (forgets("k"), ["train_gpt2"]), "values are dropped": (forgets("v"), ["train_gpt2"]),
    "position is forgotten": (forgets_position, ["train_gpt2"]),
    "v_first is forgotten": (ignores(blocks__1__att__v0=becomes(-1e9)), ["train_rwkv7", "train_rwkv7 x070"]),
    "v_first is forgotten by the GPT": (ignores(blocks__1__att__mix=becomes(0)), ["train_gpt2"]),
    "nothing decays": (ignores(blocks__1__att__w0=becomes(-1e9)), ["train_rwkv7 x070", "train_rwkv6"]),
    "a small slip": (ignores(blocks__0__att__w0=lambda t: t + 0.02), ["train_rwkv7", "train_rwkv6"])}


@pytest.mark.parametrize("bug, case", [(bug, case) for bug in BUGS for case in BUGS[bug][1]])
def test_check_finds(bug, case, paths, say, monkeypatch, tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    BUGS[bug][0](monkeypatch)
    out = say(paths[case], "--check", "--text", tmp_path / "text", "--tokens", 80, status=1)[0]
    assert "do NOT agree" in out
    assert any(line[0] == "fp32" and line[-1].startswith("BROKEN: ") for line in table(out))


def test_check_would_miss_no_weight(path):
    """Any parameter that the recurrent form left out (0 for it) would break the limits in fp32."""
    model, tokens = recurrent.load(path), torch.from_numpy(np.frombuffer(TEXT[:64], np.uint8).astype(np.int64))[None]
    with torch.no_grad():
        true = model.parallel().logits(tokens)[0]
    figures = lambda m: sample.distance(m(tokens, m.new_state())[0], None, true, None)
    assert figures(changed(model))["logits"] < sample.FP32["logits"] / 10
    for name in (name for name in model.trained if name != "blocks.0.att.mix"):  # v is v_first there
        assert figures(changed(model, **{name: becomes(0)}))["logits"] > 3 * sample.FP32["logits"], name


def test_check_of_not_a_number(gpt, say, monkeypatch, tmp_path):
    right = recurrent.GPT2.softcap
    monkeypatch.setattr(recurrent.GPT2, "softcap", lambda self, z: right(self, z) * math.nan)
    (tmp_path / "text").write_bytes(TEXT)
    assert "BROKEN: logits, kl" in say(gpt, "--check", "--text", tmp_path / "text", "--tokens", 20, status=1)[0]


# Trained runs, and --eval


@pytest.fixture(scope="module", params=SCRIPTS)
def run(request, tmp_path_factory):
    """A short run in fp32 of a script: checkpoint, folder of the data, result.json."""
    folder = tmp_path_factory.mktemp(request.param)
    tokens = [token for part in TEXT.split(b"\n\n") for token in (256, *part)]
    write_shard(folder / "data" / "toy_train_000001.bin", tokens)
    write_shard(folder / "data" / "toy_val_000000.bin", tokens[3000:4800])
    write_shard(folder / "data" / "toy_val_000001.bin", tokens[:900])
    run_here(request.param, *tiny(request.param, folder / "data", folder / "records", "--steps", 60, "--val_tokens",
                                  2500, "--val_every", 60, "--checkpoints", folder / "checkpoints"))
    record, _, result = only_record(folder / "records")
    return folder / "checkpoints" / record.name, folder / "data", result


def evaluated(say, *argv):
    out, _ = say(*argv)
    return json.loads(out.splitlines()[-1]), out


def test_eval_is_the_loss_of_training(run, say):
    path, data, result = run
    got, out = evaluated(say, path, "--eval", data)
    final = result["final"]
    assert abs(got["loss"] - final["val_loss"]) < 1e-5 and got["tokens"] == final["val_tokens"] == 2496
    assert abs(got["bits_per_byte"] - final["bits_per_byte"]) < 1e-5 and got["bytes"] == final["text_bytes"]
    assert final["val_loss"] < 4.5, "the run learned"
    assert f"{got['loss']:.4f} ± {got['standard_error']:.4f} nats per token" in out
    assert evaluated(say, path, "--eval", data / "val")[0]["loss"] == got["loss"]


def test_eval_by_hand(run, say):
    """Contexts, documents and standard errors, from the training script's own module."""
    path, data, _ = run
    shards = [np.fromfile(shard, "<u2", offset=1024) for shard in sorted(data.glob("*val*"))]
    model, tokens = recurrent.load(path).parallel(), torch.from_numpy(np.concatenate(shards).astype(np.int64))[:1501]

    def nats(x):
        with torch.no_grad():
            return F.cross_entropy(model.logits(x[None, :-1])[0], x[1:], reduction="none").double().tolist()
    marks = [i for i in range(1500) if tokens[i] == 256]
    starts = [0, *(m for m in marks if m)]
    document = [sum(s <= i for s in starts) for i in range(1500)]
    by_document = [nats(tokens[a:b + 1]) for a, b in zip(starts, [*starts[1:], 1500])]
    sequences = lambda size: [nats(tokens[i:i + size + 1]) for i in range(0, 1500, size)]
    for flags, want in (((100,), sequences(100)), ((750,), sequences(750)), ((0,), by_document)):
        losses = list(itertools.chain(*want))
        got, out = evaluated(say, path, "--eval", data, "--context", *flags, "--eval_tokens", 1500)
        assert got["tokens"] == len(losses) == 1500 and got["documents"] == len(starts) == len(set(document)) > 3
        assert got["loss"] == pytest.approx(sum(losses) / 1500, abs=1e-6)
        sums = {d: [0.0, 0, 0] for d in document}
        for i, (d, loss) in enumerate(zip(document, losses)):
            sums[d] = [sums[d][0] + loss, sums[d][1] + 1, sums[d][2] + (tokens[i + 1].item() < 256)]
        D = len(sums)
        for key, column, scale in (("standard_error", 1, 1), ("bits_standard_error", 2, math.log(2))):
            n = sum(s[column] for s in sums.values())
            mean = sum(losses) / scale / n
            error = math.sqrt(D / (D - 1) * sum((s[0] / scale - mean * s[column]) ** 2 for s in sums.values())) / n
            assert got[key] == pytest.approx(error, abs=1e-6)
        assert ("whole documents" if flags == (0,) else f"{flags[0]} tokens") in out


def test_check_of_a_trained_run(run, say):
    path, data, _ = run
    out = say(path, "--check", "--tokens", 100)[0]
    assert "all forms agree" in out and f"100 tokens of {data}/val" in out


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
    shard, text = (evaluated(say, gpt, "--eval", tmp_path / name)[0] for name in ("one.bin", "one.txt"))
    assert shard["tokens"] == text["tokens"] == 1792 and shard["loss"] == text["loss"], "7 sequences of 256"
    assert shard["standard_error"] is None and shard["documents"] == 1
    short = evaluated(say, gpt, "--eval", tmp_path / "one.txt", "--eval_tokens", 60)[0]
    assert (short["tokens"], short["context"]) == (60, 60)
    (tmp_path / "lines.txt").write_bytes(b"one line\r\n\ranother\r\n" * 40)
    assert evaluated(say, gpt, "--eval", tmp_path / "lines.txt", "--context", 0)[0]["bytes"] == 40 * 20
    rounded = evaluated(say, gpt, "--eval", tmp_path / "one.bin", "--dtype", "bf16")[0]
    eight = evaluated(say, gpt, "--eval", tmp_path / "one.bin", "--dtype", "int8")[0]
    for other in (rounded, eight):
        assert other["loss"] != shard["loss"] and other["loss"] == pytest.approx(shard["loss"], rel=0.02)


def test_eval_without_the_vocabulary(paths, say, tmp_path, monkeypatch):
    """A model on GPT-2's tokens, no tiktoken: the loss is known, the bytes are not. Text cannot be read."""
    script, config, weights = scattered("train_gpt2")
    path = write_checkpoint(tmp_path / "step000001", script, config, weights, tokenizer="gpt2", tokenizer_sha256=None)

    def missing(name):
        raise sample.tokenizers.Failure("tiktoken is not installed: pip install -r data/requirements.txt")
    monkeypatch.setattr(sample.tokenizers, "need", missing)
    write_shard(tmp_path / "one.bin", [256, *TEXT[:600]])
    got, out = evaluated(say, path, "--eval", tmp_path / "one.bin")
    assert got["tokens"] == 512 and "bits_per_byte" not in got and "not known: tiktoken is not installed" in out
    err = say(path, "--start", "x", status=1)[1]
    assert "tiktoken is not installed" in err and "r50k_base.tiktoken" in err and "--tokenizer FILE" in err


def test_bench_is_called(monkeypatch):
    monkeypatch.setitem(sys.modules, "bench", types.SimpleNamespace(main=lambda argv: argv))
    assert sample.main(["latest", "--bench", "--rounds", "3"]) == ["latest", "--rounds", "3"]


# Bad input


def test_an_official_file(say, tmp_path):
    """One of plain x070 names no tokenizer: it is given."""
    torch.save(scattered("train_rwkv7 x070")[2], tmp_path / "model.pth")
    (tmp_path / "text.txt").write_bytes(TEXT[:1000])
    path = tmp_path / "model.pth", "--tokenizer", "bytes"
    assert "--tokenizer FILE" in say(path[0], "--start", "x", status=1)[1]
    assert say(*path, "--start", "x", "--max_new_tokens", 5)[0].startswith("x")
    assert evaluated(say, *path, "--eval", tmp_path / "text.txt", "--context", 0)[0]["bytes"] == 1000
    assert "all forms agree" in say(*path, "--check", "--tokens", 40)[0]


def test_check_loads_one_checkpoint(gpt, say, tmp_path, monkeypatch):
    """Another step may be saved between fp32 and bf16."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "run").symlink_to(gpt.parent)
    monkeypatch.setattr(recurrent, "CHECKPOINTS", tmp_path / "checkpoints")
    loaded, load = [], recurrent.load
    monkeypatch.setattr(recurrent, "load", lambda path, *a: loaded.append(path) or load(path, *a))
    say("latest", "--check", "--tokens", 5)
    assert [path.resolve() for path in loaded] == [gpt.resolve()] * 2


def damaged(path, tmp_path):
    copy = tmp_path / "step000001"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[:-10 if file.suffix == ".safetensors" else None])
    return copy


BAD_FLAGS = {
    "top_p": (["--top_p", 2], ["--top_p", "2 is no number from 0 to 1", "1: off"]),
    "top_p nan": (["--top_p", "nan"], ["--top_p", "nan"]),
    "negative temperature": (["--temperature", -1], ["--temperature", "-1 is no number of at least 0"]),
    "infinite temperature": (["--temperature", "inf"], ["--temperature"]),
    "top_k": (["--top_k", 1.5], ["--top_k", "whole number", "0: off"]),
    "repetition": (["--repetition", 0], ["--repetition", "above 0", "1: off"]),
    "presence": (["--presence", "x"], ["--presence", "x is no number", "0: off"]),
    "frequency": (["--frequency", "inf"], ["--frequency", "inf is no number"]),
    "min_p": (["--min_p", 1.5], ["--min_p", "0: off"]),
    "top_a": (["--top_a", -0.2], ["--top_a", "0: off"]),
    "huge": (["--seed", "1" + "0" * 400], ["--seed"]),
    "no folder": (["--save_state", "no/folder/F"], ["--save_state no/folder/F", "no such folder"]),
    "a folder": (["--save_state", ROOT], [f"--save_state {ROOT}", "is a folder", "Name a file"]),
    "top_p_x alone": (["--top_p_x", 0.1], ["--top_p_x", "--top_p"]),
    "no sample": (["--num_samples", 0], ["--num_samples", "at least 1"]),
    "negative length": (["--max_new_tokens", -1], ["--max_new_tokens"]),
    "one state of many": (["--save_state", "F", "--num_samples", 2], ["--save_state", "--num_samples 1"]),
    "two tasks": (["--check", "--eval", "x"], ["--eval", "--check"]),
    "misspelt": (["--top-p", 0.5], ["Did you mean --top_p?"]),
    "no GPU": (["--device", "cuda"], ["--device cpu"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, gpt, say, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags, parts = BAD_FLAGS[case]
    out, err = say(gpt, *flags, status=2)
    assert out == "" and err.startswith("sample.py: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_bad_input(gpt, say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(*argv):
        *argv, parts = argv
        out, err = say(*argv, status=1)
        assert out == "" and err.startswith("sample.py: ") and err.count("\n") == 1, err
        for part in parts:
            assert part in err, err
    (tmp_path / "latin").write_bytes("zwölf".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "words").write_bytes(b"no vocabulary\n")
    (tmp_path / "small.tiktoken").write_bytes(sample.tokenizers.canonical([bytes([i]) for i in range(256)]
                                                                           + [bytes([i, i]) for i in range(200)]))
    refused("latest", ["no checkpoint", "./run_rwkv7.sh --track tiny"])
    refused("nowhere", ["nowhere", "no such folder", "latest"])
    refused(damaged(gpt, tmp_path), ["damaged", "bytes", "Take another step"])
    refused(gpt, "--start", "FILE:gone.txt", ["gone.txt", "No such file"])
    refused(gpt, "--start", f"FILE:{tmp_path}", ["cannot read"])
    refused(gpt, "--start", "FILE:latin", ["latin", "UTF-8", "iconv"])
    refused(gpt, "--start", "\udcff", ["Unicode", "FILE:"])
    refused(gpt, "--no-mark", ["--no-mark", "--start"])
    refused(gpt, "--tokenizer", "gone", ["cannot read the vocabulary gone"])
    refused(gpt, "--tokenizer", "empty", ["empty", "single bytes"])
    refused(gpt, "--tokenizer", "words", ["words line 1"])
    refused(gpt, "--tokenizer", "small.tiktoken", ["wrong tokenizer", "457 ids", "bytes, sha256 e66088df4cdb"])
    refused(gpt, "--eval", "gone", ["no such data: gone"])
    refused(gpt, "--eval", tmp_path, ["no val shards"])
    refused(gpt, "--eval", "empty", ["make no sequence"])
    write_shard(tmp_path / "high.bin", [300] * 600)
    refused(gpt, "--eval", "high.bin", ["up to id 300", "257 ids"])
    data = make_corpus(tmp_path / "data")
    refused(gpt, "--eval", data, "--context", 1000, ["449 tokens", "no sequence of 1000", "--context"])
    (data / "manifest.json").write_text('{"tokenizer": "gpt2", "tokenizer_sha256": "0f"}')
    refused(gpt, "--eval", data, ["tokens of gpt2", "reads bytes"])
    (data / "manifest.json").write_text("{")
    refused(gpt, "--eval", data, ["manifest.json", "damaged"])
    refused(gpt, "--check", "--text", "empty", ["empty", "nothing to compare"])


def test_tokenizer_that_is_not_known(say, tmp_path):
    script, config, weights = scattered("train_gpt2")
    about = dict(tokenizer="mine", tokenizer_sha256="1" * 64)
    path = write_checkpoint(tmp_path / "step000001", script, config, weights, **about)
    assert "mine" in (err := say(path, status=1)[1]) and "--tokenizer FILE" in err
    err = say(path, "--tokenizer", "bytes", status=1)[1]
    assert "wrong tokenizer" in err and "mine, sha256 111111111111" in err
    none = write_checkpoint(tmp_path / "step000002", script, config, weights, tokenizer=None, tokenizer_sha256=None)
    assert say(none, "--start", "x", "--max_new_tokens", 3)[0].startswith("x"), "257 ids are bytes"


def test_a_terminal_gets_no_control_characters(monkeypatch, capsys):
    sample.write("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\x1b[2J\n"
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True)
    sample.write("a\x1b[2J\té你\r\n\r")
    assert capsys.readouterr().out == "a\ufffd[2J\té你\n\ufffd"
