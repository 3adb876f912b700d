"""data/tokenizer.py: vocabulary files, with and without tiktoken. The names and hashes are in test_text.py.
To run: ./test.sh tests/test_tokenizer.py"""

import random
import sys

import numpy as np
import pytest

from helpers import ROOT

sys.path.append(str(ROOT / "data"))
import tokenizer  # noqa: E402

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MERGES = [*b"th|the| t| the|in|ing|  |\n\n|an| a|and| and|'s|ll|\xc3\xa9|er| 1|12".split(b"|")]
ODD = [*map(chr, (*range(0x180), *range(0x2000, 0x2070), 0x3000, 0x4E00, 0x661, 0x2160, 0xBD, 0x1D54F, 0x1F600, 0x301,
                  0x180E, 0xFEFF)), *" \n'sdtlvr1" * 40]


def texts(count=300):
    generator = random.Random(0)
    return ["", TEXT, *["".join(generator.choices(ODD, k=40)) for _ in range(count)]]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "small.tiktoken"
    path.write_bytes(tokenizer.canonical([bytes([i]) for i in range(256)] + MERGES))
    return path


@pytest.fixture
def world(tmp_path):
    """A file of the form of RWKV's own vocabulary."""
    tokens = [bytes([i]) for i in range(256)] + [*MERGES, b"\xe4\xbd", "你好".encode(), b"a b"]
    lines = []
    for i, token in enumerate(tokens, 1):
        text = token.decode("utf-8", "ignore")
        lines.append(f"{i} {(text if text.encode() == token else token)!r} {len(token)}\n")
    path = tmp_path / "rwkv_vocab.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path, tokens


def test_byte_pairs_without_tiktoken(pairs, monkeypatch):
    fast = tokenizer.from_file(pairs)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    slow = tokenizer.from_file(pairs)
    assert type(fast) is tokenizer.BytePairs and type(slow) is tokenizer.SlowBytePairs
    assert (slow.sha256, slow.name, slow.document_mark) == (fast.sha256, "small", 256 + len(MERGES))
    for text in texts():
        ids = slow.encode(text)
        assert ids.dtype == "<u2" and np.array_equal(ids, fast.encode(text)), text
        assert slow.decode([*ids, slow.document_mark]) == text.encode()


def test_the_longest_token_first(world):
    path, tokens = world
    own = tokenizer.from_file(path)
    assert (own.name, own.document_mark, own.vocab_size) == ("rwkv_world", 0, len(tokens) + 1)
    for text in texts(50):
        data, want = text.encode(), []
        while data:
            best = max((t for t in tokens if data.startswith(t)), key=len)
            want.append(tokens.index(best) + 1)
            data = data[len(best):]
        assert own.encode(text).tolist() == want
        assert own.decode([0, *want]) == text.encode()


def test_as_the_rwkv_package(tmp_path):
    theirs = pytest.importorskip("rwkv.rwkv_tokenizer", reason="the package rwkv (tests/requirements.txt) is missing")
    path = next(iter(ROOT.__class__(theirs.__file__).parent.glob("rwkv_vocab_v*.txt")))
    own, known = tokenizer.from_file(path), theirs.TRIE_TOKENIZER(str(path))
    assert (own.name, own.vocab_size) == ("rwkv_world", 65530)
    for text in texts():
        assert own.encode(text).tolist() == known.encode(text) and own.decode(known.encode(text)) == text.encode()


def test_lengths(world):
    own = tokenizer.from_file(world[0])  # the others are in test_text.py
    assert own.lengths().tolist() == [len(own.decode([i])) for i in range(own.vocab_size)]
    assert own.lengths()[own.encode(TEXT)].sum() == len(TEXT.encode()) and own.lengths()[0] == 0


@pytest.mark.parametrize("line, said", [
    ("1 'a' 2", "line 1 is not"), ("1 'a", "line 1"), ("1 'a' 1\n2 [1] 1", "line 2"), ("1 'a' 1\n1 'b' 1", "line 2"),
    ("1 'a' 1\n2 3 3", "line 2"), ("1 'a' 1\n2 b'a' 1", "line 2"), ("1 'a' 1\n2 __import__('os') 1", "line 2"),
    ("1 'a'+open('x').read() 1", "line 1"), ("70000 'a' 1", "single bytes")])
def test_bad_files_of_rwkv(tmp_path, line, said):
    (tmp_path / "vocab").write_text(line)
    with pytest.raises(tokenizer.Failure, match=said) as failure:
        tokenizer.from_file(tmp_path / "vocab")
    assert str(tmp_path / "vocab") in str(failure.value)


def test_for_model(pairs, world):
    mine = tokenizer.from_file(pairs)
    assert tokenizer.for_model({}, 257).name == "bytes"
    assert tokenizer.for_model(dict(tokenizer="bytes", tokenizer_sha256=tokenizer.Bytes.sha256), 257).name == "bytes"
    about = dict(tokenizer="small", tokenizer_sha256=mine.sha256)
    assert tokenizer.for_model(about, mine.vocab_size, str(pairs)).sha256 == mine.sha256
    assert tokenizer.for_model({}, 300, str(world[0])).name == "rwkv_world", "tables are padded"
    for about, size, wanted, said in (
            (about, mine.vocab_size, None, "small, is not known here"), ({}, 1000, None, "tokenizer is not known here"),
            (about, mine.vocab_size, "bytes", "wrong tokenizer: bytes"), ({}, 65536, "bytes", "65536 ids"),
            (about, mine.vocab_size, str(world[0]), "wrong tokenizer"), ({}, 257, str(pairs), "wrong tokenizer: .*275"),
            ({}, 257, "gone", "cannot read")):
        with pytest.raises(tokenizer.Failure, match=said):
            tokenizer.for_model(about, size, wanted)
