"""The data loader: each token once whatever the split into ranks, and one clear line for every kind of bad shard."""

import hashlib
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


def batches(stream, steps, bsz, seq_len, first, last):
    args = types.SimpleNamespace(steps=steps, bsz=bsz, seq_len=seq_len, device="cpu")
    loader = script.DataLoader(stream, args, first, last)
    return [loader.next() for _ in range(steps)]


@pytest.fixture
def share(monkeypatch):
    """share(count, rank) of the script for a number of ranks; some get one sequence more than others, some none."""
    def dealt(count, rank, ranks):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        first, last = script.share(count, rank)
        assert count // ranks <= last - first <= -(-count // ranks)
        return first, last
    return dealt


@pytest.mark.parametrize("ranks", (1, 3, 4, 5, 13))
@pytest.mark.parametrize("bsz, seq_len", ((12, 7), (24, 13), (12, 1)))
def test_every_token_once_whatever_the_ranks(folder, share, ranks, bsz, seq_len):
    n = bsz * seq_len
    steps = (TOTAL - 1) // n
    stream = script.TokenStream(folder, "train", steps * n + 1, f"{steps} steps")
    parts = [batches(stream, steps, bsz, seq_len, *share(bsz, rank, ranks)) for rank in range(ranks)]
    seen = []
    for step in range(steps):
        inputs = torch.cat([part[step][0] for part in parts])
        targets = torch.cat([part[step][1] for part in parts])
        assert inputs.shape == targets.shape == (bsz, seq_len) and inputs.dtype == targets.dtype == torch.int64
        assert inputs.flatten().tolist() == list(range(1000 + step * n, 1000 + (step + 1) * n)), f"step {step}"
        assert torch.equal(targets, inputs + 1), f"step {step}: targets are not the next tokens"
        seen += inputs.flatten().tolist()
    assert len(seen) == len(set(seen)) == steps * n


def test_the_stream_repeats(folder):
    need = 3 * TOTAL + 5
    stream = script.TokenStream(folder, "train", need, "9 steps", repeat=4)
    assert len(stream) == TOTAL
    expected = 1000 + np.arange(need) % TOTAL
    assert np.array_equal(stream.read(0, need), expected)
    for position, count in ((TOTAL - 1, 2), (TOTAL, 1), (2 * TOTAL + 36, 3), (38, 0), (TOTAL - 3, 2 * TOTAL)):
        assert np.array_equal(stream.read(position, count), expected[position:position + count]), (position, count)
    inputs = torch.cat([x.flatten() for x, _ in batches(stream, 6, 10, 51, 0, 10)])
    assert np.array_equal(inputs.numpy(), 1000 + np.arange(6 * 510) % TOTAL)


def test_prime_below():
    sieve = [n for n in range(2, 3000) if all(n % d for d in range(2, n))]
    for n in range(3000):
        assert script.prime_below(n) == max((p for p in sieve if p < n and p % 3 == 2), default=0), n
    assert script.prime_below(10**7) == 9999971
    for p in (2, 5, 11, 1013):
        assert sorted(k**3 % p for k in range(p)) == list(range(p)), f"{p}: k^3 leaves a chunk out"


@pytest.mark.parametrize("ranks", (1, 3, 4, 5, 13))
@pytest.mark.parametrize("bsz, seq_len", ((12, 7), (24, 13), (12, 1)))
def test_cubic_order(folder, share, ranks, bsz, seq_len):
    """Over two epochs, whatever the ranks: the k-th sequence is chunk k^3 mod p, so each chunk comes once an epoch."""
    p = max(n for n in range((TOTAL - 1) // seq_len) if n % 3 == 2 and all(n % d for d in range(2, n)))
    steps = 2 * p // bsz
    stream = script.TokenStream(folder, "train", steps * bsz * seq_len + 1, f"{steps} steps", 2, cubic=seq_len)
    assert len(stream) == TOTAL, "the cubic order takes every shard"
    parts = [batches(stream, steps, bsz, seq_len, *share(bsz, rank, ranks)) for rank in range(ranks)]
    chunks = []
    for step in range(steps):
        inputs = torch.cat([part[step][0] for part in parts])
        targets = torch.cat([part[step][1] for part in parts])
        assert inputs.shape == targets.shape == (bsz, seq_len) and inputs.is_contiguous() and targets.is_contiguous()
        chunks += ((inputs[:, 0] - 1000) // seq_len).tolist()
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(seq_len)), f"step {step}: not a chunk"
        assert torch.equal(targets, inputs + 1), f"step {step}: targets are not the next tokens"
    assert chunks == [k**3 % p for k in range(steps * bsz)]
    assert len(set(chunks[:p])) == min(p, len(chunks)) and max(chunks) < p


def test_too_few_chunks_for_the_cubic_order(folder):
    p = 89  # the first below (1018 - 1) // 10 = 101; 97 mod 3 = 1
    stream = lambda need, repeat, cubic: script.TokenStream(folder, "train", need, "9 steps", repeat, cubic)
    assert stream(2 * p * 10 + 1, 2, 10).prime == p
    refusal(lambda: stream(2 * p * 10 + 11, 2, 10), "9 steps need 179 chunks of 10", folder, "has 89", "--epochs 2",
            "fewer --steps")
    refusal(lambda: stream(401, 9, 400), "has 0", "More text")


def test_only_the_shards_that_are_needed(folder):
    (folder / "toy_train_000003.bin").write_bytes(b"nobody opens this one")
    stream = script.TokenStream(folder, "train", 138, "1 steps")
    assert [path.name for path in stream.paths] == [f"toy_train_00000{i}.bin" for i in range(3)]
    assert len(stream) == 138
    with pytest.raises(ValueError, match="toy_train_000003.bin"):
        script.TokenStream(folder, "train", 139, "1 steps")


def test_splits_and_order_of_names(folder):
    write_shard(folder / "toy_val_000000.bin", [1, 2, 3])
    write_shard(folder / "a_train_000009.bin", [4, 5])
    assert script.TokenStream(folder, "val", 3, "3 validation tokens").read(0, 3).tolist() == [1, 2, 3]
    assert script.TokenStream(folder, "train", 3, "1 steps").read(0, 3).tolist() == [4, 5, 1000]


def refusal(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    for part in map(str, parts):
        assert part in message, f"{part!r} is not in: {message}"
    return message


def damage_header_cut(path):
    os.truncate(path, 1000)
    return "truncated", "1000 bytes"


def damage_no_bytes(path):
    os.truncate(path, 0)
    return "truncated", "0 bytes"


def damage_tail_cut(path):
    os.truncate(path, 1024 + 2 * 90)
    return "100", "90"


def damage_half_a_token(path):
    os.truncate(path, 1024 + 2 * 90 + 1)
    return "100", "90.5"


def damage_tail_added(path):
    with open(path, "ab") as f:
        f.write(b"\0\0")
    return "100", "101"


def damage_magic(path):
    write_shard(path, range(100), magic=20240801)
    return "20240801", "20240520", "data/README.md"


def damage_no_tokens(path):
    write_shard(path, [])
    return ["0 tokens"]


def damage_negative(path):
    write_shard(path, range(100), count=-100)
    return "-100", "100"


def damage_version(path):
    write_shard(path, range(100), version=7)
    return "version 7", "version 1"


@pytest.mark.parametrize("damage", (damage_header_cut, damage_no_bytes, damage_tail_cut, damage_half_a_token,
                                    damage_tail_added, damage_no_tokens, damage_negative, damage_magic,
                                    damage_version))
def test_bad_shards(tmp_path, damage):
    path = write_shard(tmp_path / "toy_train_000000.bin", range(100))
    assert len(script.open_shard(path)) == 100
    named = damage(path)
    refusal(lambda: script.TokenStream(tmp_path, "train", 10, "1 steps"), path, *named)


def test_a_count_past_31_bits_of_bytes(tmp_path):
    """2^30 tokens fit the header's int32, their bytes do not."""
    path = write_sparse_shard(tmp_path / "toy_train_000000.bin", 2**30 + 3)
    assert len(script.open_shard(path)) == 2**30 + 3


def test_ids_beyond_the_vocabulary(folder):
    stream = script.TokenStream(folder, "train", TOTAL, "1 steps")
    top = 1000 + TOTAL - 1
    assert len(stream.fingerprint(top + 1)) == len(SIZES)
    refusal(lambda: stream.fingerprint(top), folder / "toy_train_000006.bin", f"token id {top}", f"vocabulary of {top}")
    first = 1000 + SIZES[0]
    with pytest.raises(ValueError, match=f"token id .* vocabulary of {first}"):
        stream.fingerprint(first)


def test_fingerprint_is_the_files(folder):
    stream = script.TokenStream(folder, "train", 200, "1 steps")
    assert stream.fingerprint(5000) == [
        dict(name=path.name, tokens=size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        for path, size in zip(sorted(folder.iterdir()), SIZES[:4])]


@pytest.mark.parametrize("name", ("fineweb10B", "fineweb100B"))
def test_too_few_shards_of_fineweb(tmp_path, name):
    folder = tmp_path / name
    for i in range(1, 10):
        write_sparse_shard(folder / f"fineweb_train_{i:06d}.bin", 100_000_000)
    message = refusal(lambda: script.TokenStream(folder, "train", 3200 * 524288 + 1, "3200 steps"))
    assert message == (f"3200 steps need 1,678M train tokens; {folder} has 900M in 9 shards, at --epochs 1. "
                       f"Fewer --steps, more --epochs or more text: python data/cached_{name}.py 17")
    assert len(script.TokenStream(folder, "train", 900_000_000, "1716 steps").paths) == 9
    refusal(lambda: script.TokenStream(folder, "train", 900_000_001, "1717 steps"), "1717 steps need 900M train tokens")


def test_no_shards(tmp_path):
    for name, way_out in (("fineweb10B", "python data/cached_fineweb10B.py 3"), ("pydocs", "python data/pydocs.py"),
                          ("mine", "data/README.md")):
        (tmp_path / name).mkdir()
        for folder in (tmp_path / name, tmp_path / "gone" / name):
            refusal(lambda: script.TokenStream(folder, "train", 200_000_001, "400 steps"), "no train shards", folder,
                    "*_train_*.bin", way_out)


def test_too_few_tokens_for_the_epochs(folder):
    assert len(script.TokenStream(folder, "train", 3 * TOTAL, "9 steps", repeat=3)) == TOTAL
    refusal(lambda: script.TokenStream(folder, "train", 3 * TOTAL + 1, "9 steps", repeat=3), "9 steps need", folder,
            "--epochs 3", "Fewer --steps")
    assert len(script.TokenStream(folder, "train", 10 * TOTAL, "as many as there are", repeat=0)) == TOTAL


def test_a_read_error_reaches_the_training_loop(folder):
    stream, reads = script.TokenStream(folder, "train", TOTAL, "3 steps"), []
    read = stream.read

    def failing(position, count):
        reads.append(position)
        if len(reads) == 3:
            raise OSError(5, "Input/output error", "shard")
        return read(position, count)

    stream.read = failing
    loader = script.DataLoader(stream, types.SimpleNamespace(steps=5, bsz=2, seq_len=10, device="cpu"), 0, 2)
    assert loader.next()[0][0, 0] == 1000 and loader.next()[0][0, 0] == 1020
    with pytest.raises(OSError, match="Input/output error"):
        loader.next()
