"""recurrent.py: the models token by token, in pieces and at once give the same logits; states are plain values."""

import importlib
import json
import random
from dataclasses import asdict

import pytest
import safetensors.torch
import torch

import formats
import recurrent
from helpers import tree

CASES = {"train_rwkv7": {}, "train_rwkv7 x070": dict(x070=True), "train_rwkv6": {}, "train_gpt2": {}}


def scattered(case):
    """(script, Hyperparameters, {name: tensor}): the tiny model with noise on every parameter, so that no term is 0."""
    script = importlib.import_module(case.split()[0])
    kernel = {} if case == "train_gpt2" else dict(kernel="torch")
    config = script.Hyperparameters(**{**script.TINY, "device": "cpu", "dtype": "fp32", **kernel, **CASES[case]})
    torch.manual_seed(0)
    model = script.build_model(config)
    noise = lambda p: torch.randn_like(p) * (0.5 / p.shape[-1] ** 0.5 if min(p.shape[-2:], default=1) > 1 else 0.1)
    return script, config, {name: p.detach() + noise(p) for name, p in model.state_dict().items()}


@pytest.fixture(scope="module", params=CASES)
def model(request):
    script, config, weights = scattered(request.param)
    return recurrent.FAMILIES[script.__name__](
        config, weights, "fp32", "cpu", dict(step=1, tokenizer="bytes", tokenizer_sha256="x"), script)


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
    for change, word in ((dict(header=dict(model.header, tokenizer_sha256="y")), "tokenizer_sha256"),
                         (dict(dtype="bf16"), "dtype"),
                         (dict(weights={n: t + 1 for n, t in model.trained.items()}), "model_sha256")):
        now = dict(config=model.config, weights=model.trained, dtype="fp32", header=model.header, script=model.script)
        with pytest.raises(ValueError, match=word):
            type(model)(**{**now, **change}).load_state(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"no state")
    with pytest.raises(ValueError, match="no saved state"):
        model.load_state(tmp_path / "state")


def test_damaged_states(model, tmp_path):
    state, facts = model.new_state(), model.identity()
    model(tokens(1, 9), state)
    tensors, name = state.tensors, "k" if "k" in state.tensors else "wkv"
    damage = [([1], tensors, "no saved state"), (facts, tensors, "no 'position'"), ("x", tensors, "no saved state"),
              (dict(facts, position="9"), tensors, "its position is 9"), (dict(facts, position=-1), tensors, "is -1"),
              (dict(facts, position=9), {**tensors, name: tensors[name].repeat_interleave(2, 1)}, "of batches 1, 2"),
              (dict(facts, position=9), {**tensors, name: torch.ones(3)}, "does not fit"),
              (dict(facts, position=9), {"x": torch.ones(3)}, "does not fit")]
    if name == "k":
        damage += [(dict(facts, position=500), tensors, "not those of 500 tokens"),
                   (dict(facts, position=9), dict(tensors, v=tensors["v"][:, :, :, :9].clone()), "of 9 tokens")]
    for facts, tensors, said in damage:
        safetensors.torch.save_file(tensors, tmp_path / "state", metadata=dict(state=json.dumps(facts)))
        with pytest.raises(ValueError, match=said):
            model.load_state(tmp_path / "state")


def test_a_state_that_cannot_be_written(model, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")
    (tmp_path / "state").write_bytes(b"precious")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ValueError, match="cannot write .*No space left on device. Make room"):
        model.new_state().save(tmp_path / "state", model)
    assert tree(tmp_path) == dict(state=b"precious")


@pytest.mark.parametrize("where, words", [
    ("nothing", "nothing: no such file"), ("empty", "is a folder without weights"), ("latest", "no checkpoint in")])
def test_no_checkpoint(where, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        formats.load(where)


def test_damaged_checkpoint(tmp_path):
    path = tmp_path / "x.safetensors"
    for about, said in (([], ""), (3, ""), (dict(schema=9, script="train_gpt2.py"), "schema 9"),
                        (dict(schema=3, script="os.py"), "script os.py"),
                        (dict(schema=3, script="train_gpt2.py"), "no 'config' in its header"),
                        (dict(schema=3, script="train_gpt2.py", config={}, step="7"), "its config or step is none")):
        safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata=dict(checkpoint=json.dumps(about)))
        with pytest.raises(ValueError, match=f"is damaged: .*{said}.*Take another step"):
            formats.load(path)


def test_an_unfinished_runs_weights_alone(tmp_path):
    """What else its checkpoint holds is passed over unread."""
    script, config, weights = scattered("train_gpt2")
    about = dict(schema=3, script="train_gpt2.py", config=asdict(config), step=3)
    more = {"lm_head:exp_avg": torch.ones(3), "losses": torch.ones(3), "random": torch.ones(2)}
    safetensors.torch.save_file({**weights, **more}, tmp_path / "x.safetensors",
                                metadata=dict(checkpoint=json.dumps(about)))
    assert formats.load(tmp_path / "x.safetensors").trained.keys() == weights.keys()


def test_damaged_pth(tmp_path):
    """Bytes changed at random, in both of torch's formats: one line, whatever torch says to it."""
    rng, small = random.Random(0), {f"blocks.0.{i}": torch.ones(4) for i in range(6)}
    for zipped in (True, False):
        torch.save(small, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "whole.pth").read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 2, 8))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            (tmp_path / "x.pth").write_bytes(data)
            with pytest.raises(ValueError) as caught:
                formats.load(tmp_path / "x.pth")
            assert "\n" not in str(caught.value)


def test_the_last_step_is_the_largest_number(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHECKPOINTS", tmp_path)
    for name in ("step999999.safetensors", "step1000000.safetensors", "step000002.safetensors", "step1000001.part"):
        (tmp_path / f"run_{name}").touch()
    (tmp_path / "other_step2000000.safetensors").touch()
    for path in ("run", tmp_path / "records" / "run"):
        assert formats.find(path).name == "run_step1000000.safetensors"
    assert formats.find("latest").parent == tmp_path


def test_lambdas_stay_as_in_training():
    script, config, weights = scattered("train_rwkv7")
    model = recurrent.RWKV7(config, weights, "bf16", "cpu", {}, script)
    assert [p["lambdas"] for p in model.blocks] == [weights[f"blocks.{l}.lambdas"].tolist() for l in range(model.L)]
    assert model.parallel().blocks[1].lambdas.dtype == torch.float32
