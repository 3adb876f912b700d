"""The data loader: each token once whatever the split into ranks, and one clear line for every kind of bad shard."""

import json
import os
import types

import numpy as np
import pytest
import torch

import train_gpt2 as script  # the section is shared, byte for byte (test_sections.py)
from helpers import write_shard, write_sparse_shard

SIZES = (37, 1, 100, 211, 64, 5, 600)  # tokens: borders at odd places, one shard smaller than any sequence
TOTAL = sum(SIZES)


@pytest.fixture
def folder(tmp_path):
    """Shards that hold 1000, 1001, ...: every token is different and says where it belongs."""
    start = 1000
    for i, size in enumerate(SIZES):
        write_shard(tmp_path / f"toy_train_{i:06d}.bin", np.arange(start, start + size))
        start += size
    return tmp_path


def dealt(stream, steps, args, ranks, monkeypatch):
    """[(inputs, targets)] of the steps, the shares of all ranks put together; some ranks may have none."""
    monkeypatch.setattr(script, "WORLD_SIZE", ranks)
    found = []
    for step in range(steps):
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(script, "RANK", rank)
            parts.append(script.batch(stream, step, args))
        sizes = [len(inputs) for inputs, _ in parts]
        assert max(sizes) - min(sizes) <= 1 and all(x.dtype == torch.int64 for part in parts for x in part)
        inputs, targets = (torch.cat(tensors) for tensors in zip(*parts))
        assert inputs.shape == targets.shape == (args.bsz, args.seq_len)
        assert torch.equal(targets, inputs + 1), f"step {step}: targets are not the next tokens"
        found.append(inputs)
    return found


def flags(bsz, seq_len, order="sequential", **more):
    return types.SimpleNamespace(bsz=bsz, seq_len=seq_len, order=order, device="cpu", **more)


@pytest.mark.parametrize("ranks", (1, 3, 4, 5, 13))
@pytest.mark.parametrize("bsz, seq_len", ((12, 7), (24, 13), (12, 1)))
def test_every_token_once_whatever_the_ranks(folder, monkeypatch, ranks, bsz, seq_len):
    n = bsz * seq_len
    steps = (TOTAL - 1) // n
    stream = script.TokenStream(folder, "train", steps * n + 1)
    for step, inputs in enumerate(dealt(stream, steps, flags(bsz, seq_len), ranks, monkeypatch)):
        assert inputs.flatten().tolist() == list(range(1000 + step * n, 1000 + (step + 1) * n)), f"step {step}"


def test_the_stream_repeats(folder):
    need = 3 * TOTAL + 5
    stream = script.TokenStream(folder, "train", need)
    assert len(stream) == TOTAL
    expected = 1000 + np.arange(need) % TOTAL
    assert np.array_equal(stream.read(0, need), expected)
    for position, count in ((TOTAL - 1, 2), (TOTAL, 1), (2 * TOTAL + 36, 3), (TOTAL - 3, 2 * TOTAL)):
        assert np.array_equal(stream.read(position, count), expected[position:position + count]), (position, count)
    inputs = torch.cat([script.batch(stream, step, flags(10, 51))[0].flatten() for step in range(6)])
    assert np.array_equal(inputs.numpy(), 1000 + np.arange(6 * 510) % TOTAL)


@pytest.mark.parametrize("ranks", (1, 3, 4, 5, 13))
@pytest.mark.parametrize("bsz, seq_len", ((12, 7), (24, 13), (12, 1)))
def test_shuffled_order(folder, monkeypatch, ranks, bsz, seq_len):
    """Each epoch reads every whole chunk after its phase once, in an order of its own, whatever the ranks."""
    args, stream = flags(bsz, seq_len, "shuffled"), script.TokenStream(folder, "train")
    count = len(script.shuffled(TOTAL, seq_len, 0))
    assert TOTAL - 2 * seq_len < count * seq_len <= TOTAL - seq_len
    inputs = torch.cat(dealt(stream, 3 * count // bsz, args, ranks, monkeypatch))
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(seq_len)), "not a chunk"
    epochs = (inputs[:, 0] - 1000).split(count)
    for epoch, starts in enumerate(epochs[:2]):
        phase = int(starts.min())
        assert 0 <= phase < seq_len and sorted(starts.tolist()) == list(range(phase, phase + count * seq_len, seq_len))
        assert starts.tolist() == script.shuffled(TOTAL, seq_len, epoch).tolist() != sorted(starts.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_shuffled_order_stays():
    """The same in every numpy: old records go on meaning what they meant."""
    assert script.shuffled(2100, 256, 0).tolist() == [1708, 684, 428, 1196, 940, 172, 1452]
    assert script.shuffled(2100, 256, 3).tolist() == [1386, 618, 1130, 1642, 874, 362, 106]


def test_only_the_shards_that_are_needed(folder):
    (folder / "toy_train_000003.bin").write_bytes(b"nobody opens this one")
    (folder / "._toy_train_000000.bin").write_bytes(b"left by a Mac")
    stream = script.TokenStream(folder, "train", 138)
    assert [path.name for path in stream.paths] == [f"toy_train_00000{i}.bin" for i in range(3)]
    assert len(stream) == 138
    with pytest.raises(ValueError, match="toy_train_000003.bin"):
        script.TokenStream(folder, "train", 139)


def test_splits_and_order_of_names(folder):
    write_shard(folder / "toy_val_000000.bin", [1, 2, 3])
    write_shard(folder / "a_train_000009.bin", [4, 5])
    assert script.TokenStream(folder, "val", 3).read(0, 3).tolist() == [1, 2, 3]
    assert script.TokenStream(folder, "train", 3).read(0, 3).tolist() == [4, 5, 1000]


def refusal(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    for part in map(str, parts):
        assert part in message, f"{part!r} is not in: {message}"
    return message


def add_two_bytes(path):
    with open(path, "ab") as file:
        file.write(b"\0\0")


NO_SHARD = "no whole token shard of version 1", "data/README.md"
DAMAGES = {  # how a shard of 100 tokens is damaged, and what the message must name
    "header cut": (lambda path: os.truncate(path, 1000), NO_SHARD),
    "no bytes": (lambda path: os.truncate(path, 0), NO_SHARD),
    "tail cut": (lambda path: os.truncate(path, 1024 + 2 * 90), ("100", "90")),
    "half a token": (lambda path: os.truncate(path, 1024 + 2 * 90 + 1), ("100", "90.5")),
    "tail added": (add_two_bytes, ("100", "101")),
    "no tokens": (lambda path: write_shard(path, []), ("0 tokens",)),
    "negative count": (lambda path: write_shard(path, range(100), count=-100), ("-100", "100")),
    "magic": (lambda path: write_shard(path, range(100), magic=20240801), NO_SHARD),
    "version": (lambda path: write_shard(path, range(100), version=7), NO_SHARD)}


@pytest.mark.parametrize("what", DAMAGES)
def test_bad_shards(tmp_path, what):
    path = write_shard(tmp_path / "toy_train_000000.bin", range(100))
    assert len(script.open_shard(path)) == 100
    damage, named = DAMAGES[what]
    damage(path)
    refusal(lambda: script.TokenStream(tmp_path, "train", 10), path, *named)


def test_a_count_past_31_bits_of_bytes(tmp_path):
    """2^30 tokens fit the header's int32, their bytes do not."""
    path = write_sparse_shard(tmp_path / "toy_train_000000.bin", 2**30 + 3)
    assert len(script.open_shard(path)) == 2**30 + 3


def test_another_tokenizer_and_shards_not_in_the_manifest(folder):
    write_shard(folder / "toy_val_000000.bin", range(30))
    args = settings(folder, track="tiny", bsz=1, seq_len=10, val_tokens=20, steps=1, vocab_size=1037)
    facts = script.open_data(args)[2]
    assert facts["train"] == [dict(name="toy_train_000000.bin", tokens=SIZES[0], sha256=None)]
    assert (facts["val_tokens"], facts["text_bytes"], facts["manifest"]) == (20, None, {})
    args.vocab_size = 1036
    refusal(lambda: script.open_data(args), folder, "an unknown tokenizer, 1037 ids", "--vocab_size 1036")
    shards = [dict(name=path.name, tokens=(path.stat().st_size - 1024) // 2, sha256="f" * 64)
              for path in folder.glob("*.bin")]
    (folder / "manifest.json").write_text(json.dumps(dict(tokenizer="x", vocab_size=30, shards=shards)))
    refusal(lambda: script.open_data(args), folder, "tokens of x, 30 ids", "--vocab_size 30")
    args.vocab_size = 30
    facts = script.open_data(args)[2]
    assert facts["val"][0]["sha256"] == "f" * 64 and facts["manifest"] == dict(tokenizer="x", vocab_size=30)
    write_shard(folder / "toy_val_000000.bin", range(29))
    refusal(lambda: script.open_data(args), folder / "toy_val_000000.bin", "not what manifest.json lists")
    write_shard(folder / "toy_val_000000.bin", range(30))
    write_shard(folder / "a_train_000000.bin", range(30))
    refusal(lambda: script.open_data(args), folder / "a_train_000000.bin", "not what manifest.json lists")


def settings(folder, **more):
    return types.SimpleNamespace(**{**dict(
        data=folder, track="fineweb", stop_after=0, steps=3200, bsz=512, seq_len=1024, order="sequential", epochs=1,
        val_tokens=1, vocab_size=50257, check=True), **more})


@pytest.mark.parametrize("name", ("fineweb10B", "fineweb100B"))
def test_too_few_shards_of_fineweb(tmp_path, name):
    folder = tmp_path / name
    for i in range(1, 10):
        write_sparse_shard(folder / f"fineweb_train_{i:06d}.bin", 100_000_000)
    write_sparse_shard(folder / "fineweb_val_000000.bin", 2000)
    message = refusal(lambda: script.open_data(settings(folder)))
    assert message.startswith("1,677,721,601 train tokens are needed (--steps 3200, --val_tokens 1); "
                              f"{folder} has 900,000,000 at --epochs 1. Fetch or make them: python data/cached_")
    assert len(script.open_data(settings(folder, steps=1716, val_tokens=1024))[0].paths) == 9
    refusal(lambda: script.open_data(settings(folder, steps=1717)), "900,202,497 train tokens are needed (--steps 1717")
    refusal(lambda: script.open_data(settings(folder, steps=1, val_tokens=2000)), "2,001 val tokens are needed",
            "--val_tokens 2000", "has 2,000")
    write_sparse_shard(folder / "fineweb_val_000000.bin", 1024)
    refusal(lambda: script.open_data(settings(folder, steps=1, track="tiny")), "1,025 val tokens are needed")


def test_no_shards(tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        refusal(lambda: script.TokenStream(folder, "train"), "no train shards", folder, "*_train_*.bin",
                "data/cached_fineweb10B.py", "data/pydocs.py", "data/README.md")


@pytest.mark.parametrize("order, there", (("sequential", TOTAL), ("shuffled", 1001)))
def test_too_few_tokens_for_the_epochs(folder, order, there):
    """The last target of a sequence is no input of it: of 1018 tokens 100 chunks of 10 are whole whatever the phase."""
    write_shard(folder / "toy_val_000000.bin", range(30))
    args = settings(folder, track="tiny", bsz=1, seq_len=10, val_tokens=20, order=order, epochs=2)
    for args.steps in (1, (2 * there - 1) // 10):
        assert len(script.open_data(args)[0]) == (TOTAL if order == "shuffled" or args.steps > 1 else 37)
    args.steps += 1
    refusal(lambda: script.open_data(args), f"--steps {args.steps}", folder, "train tokens are needed", "--epochs 2")
