"""data/binidx.py: the pairs of RWKV's trainer, there and back, and read as that trainer reads them.
To run: ./test.sh tests/test_binidx.py"""

import json
import random
import struct
import sys

import numpy as np
import pytest

from helpers import ROOT, tree, write_shard

sys.path.insert(0, str(ROOT / "data"))
import binidx  # noqa: E402
import text  # noqa: E402


def read_pair(prefix):
    """[document] of a pair, after the format's description and not after the program's code."""
    data = prefix.with_suffix(".idx").read_bytes()
    magic, version, kind, pieces, ends = struct.unpack_from("<9sQBQQ", data)
    assert (magic, version, kind) == (b"MMIDIDX\0\0", 1, 8) and len(data) == 34 + 12 * pieces + 8 * ends
    sizes = struct.unpack_from(f"<{pieces}i", data, 34)
    pointers = struct.unpack_from(f"<{pieces}q", data, 34 + 4 * pieces)
    documents = struct.unpack_from(f"<{ends}q", data, 34 + 12 * pieces)
    assert documents == tuple(range(pieces + 1)), "one piece a document"
    tokens = np.fromfile(prefix.with_suffix(".bin"), "<u2")
    assert sum(sizes) == len(tokens) and pointers == tuple(2 * sum(sizes[:i]) for i in range(pieces))
    return [tokens[p // 2:p // 2 + size].tolist() for p, size in zip(pointers, sizes)]


def write_pair(prefix, documents, kind=8, type="<u2"):
    """A pair whose documents are lists of pieces, which lie in .bin in the opposite order."""
    pieces = [piece for document in documents for piece in document]
    body, pointers = b"", {}
    for i in reversed(range(len(pieces))):
        pointers[i], body = len(body), body + np.array(pieces[i], type).tobytes()
    ends = np.cumsum([0] + [len(document) for document in documents])
    prefix.with_suffix(".bin").write_bytes(body)
    prefix.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, kind, len(pieces), len(ends))
        + np.array([len(piece) for piece in pieces], "<i4").tobytes()
        + np.array([pointers[i] for i in range(len(pieces))], "<i8").tobytes() + ends.astype("<i8").tobytes())
    return prefix


def convert(*arguments):
    return binidx.main([str(argument) for argument in arguments])


@pytest.fixture
def made(tmp_path):
    """A folder that text.py made, of short and long documents over several shards."""
    generator = random.Random(0)
    lines = ["".join(generator.choices("abé ", k=generator.choice((1, 30, 900)))) + "x" for _ in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=line)) + "\n" for line in lines))
    assert text.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "mine"), "--shard_size", "20000"]) == 0
    return tmp_path / "mine", lines


@pytest.mark.parametrize("block", (1 << 20, 64, 7))
def test_there_and_back(made, tmp_path, capsys, monkeypatch, block):
    folder, lines = made
    monkeypatch.setattr(binidx, "BLOCK", block)
    monkeypatch.setattr(binidx, "SHARD_TOKENS", 20000)
    assert convert(folder, "--out", tmp_path / "pairs" / "p") == 0
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == [
        "p_train.bin", "p_train.idx", "p_val.bin", "p_val.idx"]
    for split, texts in (("val", lines[9::20]), ("train", [line for i, line in enumerate(lines) if i % 20 != 9])):
        documents = read_pair(tmp_path / "pairs" / f"p_{split}")
        assert documents == [[*text.encode(), 256] for text in texts], split

    pair = [tmp_path / "pairs" / "p_train.idx", tmp_path / "pairs" / "p_val"]
    assert convert(*pair, "--tokenizer", "bytes", "--out", tmp_path / "back") == 0
    assert convert(tmp_path / "back", "--out", tmp_path / "again" / "p") == 0
    assert tree(tmp_path / "again") == tree(tmp_path / "pairs")
    ours, back = tree(folder), tree(tmp_path / "back")
    manifests = [json.loads(t.pop("manifest.json")) for t in (ours, back)]
    assert ours == back
    for key in ("dataset", "tokenizer", "tokenizer_sha256", "vocab_size", "document_mark", "documents", "shards"):
        assert manifests[0][key] == manifests[1][key], key


@pytest.mark.parametrize("kind, type", ((8, "<u2"), (4, "<i4"), (5, "<i8")))
def test_pairs_of_other_tools(tmp_path, kind, type):
    """Several pieces a document, in any order in .bin, with and without a mark at the end, empty ones."""
    train = write_pair(tmp_path / "t", [[[5, 6], [7, 0]], [[8, 9]], [[0]], [[], [65529, 0]]], kind, type)
    val = write_pair(tmp_path / "v", [[[1, 2, 0]]], kind, type)
    flags = ["--tokenizer", "rwkv_world", "--vocab_size", 65536, "--document_mark", 0]
    assert convert(train, val, *flags, "--out", tmp_path / "out") == 0
    tokens = np.fromfile(tmp_path / "out" / "text_train_000001.bin", "<u2", offset=1024)
    assert tokens.tolist() == [0, 5, 6, 7, 0, 8, 9, 0, 0, 65529]
    assert np.fromfile(tmp_path / "out" / "text_val_000000.bin", "<u2", offset=1024).tolist() == [0, 1, 2]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["tokenizer_sha256"], manifest["vocab_size"]) == ("rwkv_world", None, 65536)
    assert convert(tmp_path / "out", "--out", tmp_path / "pairs" / "p") == 0
    assert read_pair(tmp_path / "pairs" / "p_train") == [[5, 6, 7, 0], [8, 9, 0], [0], [65529, 0]]


def test_one_pair_is_split(tmp_path):
    prefix = write_pair(tmp_path / "t", [[[i, i + 1, 256]] for i in range(100)])
    assert convert(prefix, "--tokenizer", "bytes", "--val", 0.1, "--out", tmp_path / "out") == 0
    val = np.fromfile(tmp_path / "out" / "text_val_000000.bin", "<u2", offset=1024).reshape(-1, 3)
    assert val.tolist() == [[256, i, i + 1] for i in range(4, 100, 10)]


def test_bad_input(made, tmp_path, capsys):
    folder, _ = made
    good = write_pair(tmp_path / "good", [[[1, 2, 256]], [[3, 256]]])
    (tmp_path / "out").mkdir()

    def refused(*flags, parts):
        before = tree(tmp_path)
        assert convert(*flags, "--out", tmp_path / "out" / "o") == 1
        out, err = capsys.readouterr()
        assert err.startswith("binidx.py: ") and err.count("\n") == 1 and not out, err
        assert all(str(part) in err for part in parts), err
        assert tree(tmp_path) == before and not list((tmp_path / "out").iterdir())

    capsys.readouterr()
    byte_pairs = "--tokenizer", "x", "--vocab_size", 65536, "--document_mark", 0
    large = write_pair(tmp_path / "large", [[[1, 70000]]], 4, "<i4")
    negative = write_pair(tmp_path / "negative", [[[1, -1]]], 4, "<i4")
    none, one = write_pair(tmp_path / "none", []), write_pair(tmp_path / "one", [[[1]]])
    refused(good, good, parts=["--tokenizer"])
    refused(good, good, "--tokenizer", "rwkv", parts=["--vocab_size", "--document_mark"])
    refused(good, good, *byte_pairs, "--vocab_size", 70000, parts=["65536"])
    refused(good, good, *byte_pairs, "--vocab_size", 256, parts=["id 256", "good.bin"])
    refused(large, large, *byte_pairs, parts=["70000", "uint16"])
    for inputs, parts in (
            ([good, good, good], ["a train and a val pair"]), ([tmp_path / "out"], ["no shards"]),
            ([tmp_path / "gone"], ["gone.idx", "NAME.bin and NAME.idx"]), ([negative, good], ["id -1"]),
            ([none, good], ["2 documents", "none"]), ([one], ["1 documents", "--val"])):
        refused(*inputs, "--tokenizer", "bytes", parts=parts)
    refused(folder, "--tokenizer", "gpt2", parts=[folder, "bytes", "gpt2"])
    for i, (suffix, change, part) in enumerate((
            (".idx", lambda data: b"x" + data[1:], "MMIDIDX"), (".idx", lambda data: data[:20], "MMIDIDX"),
            (".idx", lambda data: data[:-8], "damaged"), (".bin", lambda data: data[:-2], "damaged"),
            (".idx", lambda data: data[:17] + b"\7" + data[18:], "type 7"))):
        bad = write_pair(tmp_path / f"bad{i}", [[[1, 2, 256]], [[3, 256]]])
        path = bad.with_suffix(suffix)
        path.write_bytes(change(path.read_bytes()))
        refused(bad, bad, "--tokenizer", "bytes", parts=[bad, part])
    write_shard(tmp_path / "d" / "my_train_000001.bin", [1, 2, 3])
    refused(tmp_path / "d", "--tokenizer", "bytes", parts=["my_train_000001.bin", "document mark 256"])
    write_shard(tmp_path / "d" / "my_train_000001.bin", [256, 2, 3], count=5)
    refused(tmp_path / "d", "--tokenizer", "bytes", parts=["my_train_000001.bin is damaged", "by its size"])


def test_nothing_is_overwritten_unasked(made, tmp_path, capsys):
    (tmp_path / "p_val.idx").write_text("mine")
    before = tree(tmp_path)
    assert convert(made[0], "--out", tmp_path / "p") == 1 and "--overwrite" in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert convert(made[0], "--out", tmp_path / "p", "--overwrite") == 0
    read_pair(tmp_path / "p_val")
