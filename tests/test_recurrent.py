"""recurrent.py: the models token by token, in pieces and at once give the same logits; states are plain values."""

import importlib
import json

import pytest
import torch

import recurrent

CASES = {"train_rwkv7": {}, "train_rwkv7 x070": dict(x070=True), "train_rwkv6": {}, "train_gpt2": {}}


def scattered(case):
    """(script, Hyperparameters, {name: tensor}): the tiny model with noise on every parameter, so that no term is 0."""
    script = importlib.import_module(case.split()[0])
    kernel = {} if case == "train_gpt2" else dict(kernel="torch")
    config = script.Hyperparameters(track="tiny", device="cpu", dtype="fp32", **kernel, **CASES[case])
    torch.manual_seed(0)
    model = script.build_model(config)
    noise = lambda p: torch.randn_like(p) * (0.5 / p.shape[-1] ** 0.5 if min(p.shape[-2:], default=1) > 1 else 0.1)
    return script, config, {name: p.detach() + noise(p) for name, p in model.state_dict().items()}


@pytest.fixture(scope="module", params=CASES)
def model(request):
    script, config, weights = scattered(request.param)
    family = dict(train_gpt2=recurrent.GPT2, train_rwkv6=recurrent.RWKV6, train_rwkv7=recurrent.RWKV7)[script.__name__]
    return family(config, weights, "fp32", "cpu", dict(step=1, tokenizer="bytes", tokenizer_sha256="x"), script)


def tokens(*shape):
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(1))


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_one_by_one_and_in_pieces_are_the_parallel_form(model):
    text = tokens(2, 150)
    with torch.no_grad():
        whole = model.parallel().logits(text)
    one, pieces = model.new_state(2), model.new_state(2)
    assert difference(torch.cat([model(text[:, t:t + 1], one) for t in range(150)], 1), whole) < 1e-5
    assert difference(torch.cat([model(part, pieces) for part in text.split([37, 1, 64, 48], 1)], 1), whole) < 1e-5
    assert one.position == pieces.position == 150
    for name in one.tensors:
        a, b = (s.tensors[name][..., :150, :] if name in "kv" else s.tensors[name] for s in (one, pieces))
        assert difference(a, b) < 1e-5, name
    assert difference(model.prefill(text, model.new_state(2), chunk=64)[:, 0], whole[:, -1]) < 1e-5


def test_a_state_is_a_plain_value(model):
    text, state = tokens(1, 20), model.new_state()
    model(text, state)
    kept = state.clone()
    first = model(text[:, :5], state)
    assert torch.equal(model(text[:, :5], kept.clone()), first) and kept.position == 20
    three = kept.branch(3)
    assert difference(model(text[:, :5].repeat(3, 1), three), first.repeat(3, 1, 1)) < 1e-5
    assert torch.equal(model(text[:, :5], model.new_state()), model(text[:, :5], model.new_state()))


def test_state_survives_a_file(model, tmp_path):
    text, state = tokens(1, 20), model.new_state()
    model(text, state)
    state.save(tmp_path / "state", model, text="so far")
    again, facts = model.load_state(tmp_path / "state")
    assert facts["text"] == "so far" and again.position == 20
    assert torch.equal(model(text[:, :5], again), model(text[:, :5], state))
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_state_of_another_model_is_refused(model, tmp_path):
    model.new_state().save(tmp_path / "state", model)
    for change, word in ((dict(about=dict(model.about, tokenizer="gpt2")), "tokenizer"), (dict(dtype="bf16"), "dtype"),
                         (dict(weights={n: t + 1 for n, t in model.trained.items()}), "model_sha256")):
        now = dict(config=model.config, weights=model.trained, dtype="fp32", about=model.about, script=model.script)
        with pytest.raises(ValueError, match=word):
            type(model)(**{**now, **change}).load_state(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"no state")
    with pytest.raises(ValueError, match="no saved state"):
        model.load_state(tmp_path / "state")


@pytest.mark.parametrize("where", ["nothing", "empty", "latest"])
def test_no_checkpoint(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint|no such folder"):
        recurrent.load(where)


def test_damaged_checkpoint(tmp_path):
    folder = tmp_path / "step000001"
    folder.mkdir()
    for about in ({}, dict(format=9, script="train_gpt2.py"), dict(format=1, script="os.py"),
                  dict(format=1, script="train_gpt2.py", files={})):
        (folder / "checkpoint.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match="is damaged: .*Take another step"):
            recurrent.load(folder)
