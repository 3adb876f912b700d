"""data/text.py and data/tokenizer.py: shards of your own text, right, the same every time, in little memory.
To run: ./test.sh tests/test_text.py"""

import base64
import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import train_gpt2
from helpers import ROOT, SCRIPTS, load_program, only_record, run_here, tiny, tree

sys.path.insert(0, str(ROOT / "data"))
import text  # noqa: E402
import tokenizer  # noqa: E402

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("tiktoken")
WORDS = ["the", "theme", " ", "  ", "\n", "\r\n", "a", "don't", "1234", "é", "汉字", "😀", "\u00a0", "\x1c", "...",
         "<", "<|end"]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    """A vocabulary of the 256 bytes and what a few merges make of them, in tiktoken's form."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t", b" th", b" the", b"em", b"\n\n", b"12", b"34",
                                                 b"1234", b"  ", b"\xc3\xa9", b"do", b"don", b"'t", b".."]
    path = tmp_path_factory.mktemp("vocab") / "small.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))
    return path


def shards(folder, split=""):
    """The tokens of a split, over its shards; each shard checked against the format and the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", "token_bytes.bin"] + [entry["name"] for entry in manifest["shards"]])
    found = []
    for entry in manifest["shards"]:
        if split not in entry["split"]:
            continue
        data = (folder / entry["name"]).read_bytes()
        header = np.frombuffer(data, "<i4", 256)
        assert header[:3].tolist() == [20240520, 1, entry["tokens"]] and not header[3:].any()
        assert len(data) == entry["bytes"] == 1024 + 2 * entry["tokens"]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"] and f"_{entry['split']}_" in entry["name"]
        found.append(np.frombuffer(data, "<u2", offset=1024))
    return np.concatenate(found)


def documents(tokens, mark=256):
    assert tokens[0] == mark
    return [part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == mark)[1:])]


def texts(folder, split=""):
    return [bytes(document).decode() for document in documents(shards(folder, split))]


def make(*arguments):
    assert text.main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments):
    """-> the one line with which it fails"""
    capsys.readouterr()
    assert text.main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("text.py: ") and err.count("\n") == 1 and "Traceback" not in err and not out, err
    return err


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(dict(n=i, text=line)) + "\n" for i, line in enumerate(lines)))
    return path


def test_every_document_once(tmp_path, capsys):
    lines = [f"document {i} é " * (1 + i % 7) for i in range(210)]
    make(write_jsonl(tmp_path / "a.jsonl", lines), "--out", tmp_path / "out", "--shard_size", 4000)
    held_out = lines[9::20]
    assert texts(tmp_path / "out", "val") == held_out
    assert texts(tmp_path / "out", "train") == [line for line in lines if line not in held_out]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["shards"]) >= 3 and all(s["tokens"] == 4000 for s in manifest["shards"][:2]), "whole shards"
    assert (manifest["documents"], manifest["tokenizer"], manifest["vocab_size"]) == (210, "bytes", 257)
    assert manifest["tokenizer_sha256"] == tokenizer.Bytes.sha256
    assert f"--data {tmp_path / 'out'}" in capsys.readouterr().out
    for share, count in ((0.05, 11), (0.37, 78), (0.9, 189)):
        make(tmp_path / "a.jsonl", "--out", tmp_path / str(share), "--val", share)
        assert len(texts(tmp_path / str(share), "val")) == count


def test_by_tail(tmp_path):
    book = "".join(f"Line {i}: é汉😀.\n" for i in range(3000))
    (tmp_path / "book.txt").write_text(book)
    for size in (10**8, 7001, 1000):
        make(tmp_path / "book.txt", "--by", "tail", "--out", tmp_path / str(size), "--shard_size", size)
        train, val = (shards(tmp_path / str(size), split) for split in ("train", "val"))
        total = len(book.encode()) + 1
        assert len(val) == round(0.05 * total) + 1 and len(train) + len(val) == total + 1
        assert train[0] == val[0] == 256 and bytes([*train[1:].tolist(), *val[1:].tolist()]).decode() == book
    lines = [f"document {i:02}" for i in range(20)]
    make(write_jsonl(tmp_path / "a.jsonl", lines), "--by", "tail", "--val", 0.5, "--out", tmp_path / "lines")
    assert texts(tmp_path / "lines", "val") == lines[10:], "no mark where one stands already"


def test_forms_of_input(tmp_path):
    """One text as .txt, .jsonl, .parquet, in .gz and .zst and in folders: the same tokens."""
    lines = [f"Document {i}\nof several lines, é.\n" for i in range(40)]
    separated = "<|endoftext|>\n".join(lines).encode()
    write_jsonl(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.txt").write_bytes(separated)
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + separated.replace(b"|>\n", b"|>\r\n") + b"<|endoftext|>\n")
    half = len(separated) // 2
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(separated[:half]) + gzip.compress(separated[half:]))
    (tmp_path / "e.jsonl.zst").write_bytes(pyarrow.compress((tmp_path / "a.jsonl").read_bytes(), "zstd", asbytes=True))
    table = pyarrow.table(dict(id=list(range(40)), text=lines))
    parquet.write_table(table, tmp_path / "f.parquet", row_group_size=7)
    (tmp_path / "g" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "g" / "b.jsonl", lines[20:])
    write_jsonl(tmp_path / "g" / "a.jsonl", lines[:20])
    (tmp_path / "g" / "notes.md").write_text("not read")
    (tmp_path / "g" / ".hidden.txt").write_text("not read")
    write_jsonl(tmp_path / "h.jsonl", []).write_text("".join('{"content": %s}\n\n' % json.dumps(s) for s in lines))
    for name in ("a.jsonl", "b.txt", "c.txt", "d.txt.gz", "e.jsonl.zst", "f.parquet", "g", "h.jsonl"):
        out = tmp_path / "out" / name
        make(tmp_path / name, "--out", out, *(["--field", "content"] if name == "h.jsonl" else []))
        assert texts(out, "train") == lines[:9] + lines[10:29] + lines[30:], name
        assert texts(out, "val") == lines[9:30:20], name


@pytest.mark.parametrize("seed, more", [
    (0, []), (1, ["--dedup"]), (2, ["--by", "tail"]), (3, ["--dedup", "--by", "tail"])])
def test_blocks_leave_no_trace(tmp_path, monkeypatch, seed, more):
    """Separators, characters and bad bytes at the borders of blocks, and documents that wait on the disk."""
    generator = random.Random(seed)
    data = b"".join(generator.choice((b"<|endoftext|>", b"<|endoftext|>\r\n", b"<|endoftext|>\n", b"<|end", b"\xe6\xb1",
                                      "汉😀".encode(), b"a", b"\xff", b"\n", b"\r", b" ")) for _ in range(3000))
    (tmp_path / "a.txt").write_bytes(data)
    flags = [tmp_path / "a.txt", "--val", 0.3, *more]
    make(*flags, "--out", tmp_path / "whole")
    monkeypatch.setattr(text, "IN_MEMORY", 5)
    for block in (1, 2, 7, 64):
        monkeypatch.setattr(text, "BLOCK", block)
        make(*flags, "--out", tmp_path / str(block))
        assert tree(tmp_path / str(block)) == tree(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "manifest.json").read_text())["replaced"] > 100


def test_dedup_and_empty_documents(tmp_path, capsys):
    lines = ["one", "two", "one", "", "  \n", "three", "two", "one "] * 2
    make(write_jsonl(tmp_path / "a.jsonl", lines), "--dedup", "--val", 0.5, "--out", tmp_path / "out")
    assert sorted(texts(tmp_path / "out")) == ["one", "one ", "three", "two"]
    assert "8 duplicates" in (out := capsys.readouterr().out) and "4 empty" in out
    make(tmp_path / "a.jsonl", "--val", 0.5, "--out", tmp_path / "all")
    assert len(texts(tmp_path / "all")) == 12


def test_invalid_utf8(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe\xfd bad \xe6\xb1 cut" + b" fine" * 20 + b"\xe6\xb1")
    (tmp_path / "b.jsonl").write_text('{"text": "half \\ud83d of a pair, a whole \\ud83d\\ude00"}\n' * 2)
    make(tmp_path / "a.txt", "--by", "tail", "--out", tmp_path / "a")
    assert "".join(texts(tmp_path / "a")).startswith("good \ufffd\ufffd\ufffd bad \ufffd cut fine")
    assert "5 invalid" in capsys.readouterr().out
    make(tmp_path / "b.jsonl", "--val", 0.5, "--out", tmp_path / "b")
    assert texts(tmp_path / "b") == ["half \ufffd of a pair, a whole 😀"] * 2
    assert "2 invalid" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_byte_pairs(tmp_path, monkeypatch, vocab, seed):
    """Long documents are encoded in parts and have the tokens of the whole; marks in the text are text."""
    generator = random.Random(seed)
    bpe = tokenizer.load("gpt2", vocab)
    lines = ["".join(generator.choices(WORDS, k=400)) + " x\n" for _ in range(12)] + ["<|endoftext|>"]
    write_jsonl(tmp_path / "a.jsonl", lines)
    flags = ["--tokenizer", "gpt2", "--vocab", vocab, "--val", 0.2]
    for block in (1 << 16, 256):
        monkeypatch.setattr(text, "BLOCK", block)
        make(tmp_path / "a.jsonl", *flags, "--out", tmp_path / str(block))
        found = documents(shards(tmp_path / str(block)), bpe.document_mark)
        assert sorted(found) == sorted(bpe.encode(line).tolist() for line in lines), block
    assert {bpe.decode(part).decode() for part in found} == set(lines)
    assert max(map(max, found)) > 255, "nothing was merged"


@pytest.mark.parametrize("flags", ([], ["--tokenizer", "gpt2"]))
def test_bytes_of_text(tmp_path, vocab, flags):
    """What the tokens of a validation set stand for, counted as the training scripts do, is the text itself."""
    lines = ["the  then\n\n 1234..", "zwölf, 你好 🙂", "a", "don't\tthem ", *[f"text {i} é" for i in range(40)]]
    write_jsonl(tmp_path / "a.jsonl", lines)
    out = tmp_path / "out"
    make(tmp_path / "a.jsonl", *flags, *(["--vocab", vocab] if flags else []), "--val", 0.5, "--out", out)
    (out / "manifest.json").unlink()
    args = types.SimpleNamespace(seq_len=1, steps=1, stop_after=0, bsz=1, order="sequential", epochs=1, track="tiny",
                                 val_tokens=10**6, vocab_size=65536, data=out)
    assert train_gpt2.open_data(args)[2]["text_bytes"] == sum(len(line.encode()) for line in lines[0::2])
    (out / "token_bytes.bin").write_bytes(bytes(10))
    assert train_gpt2.open_data(args)[2]["text_bytes"] is None, "of ids beyond the table"
    (out / "token_bytes.bin").unlink()
    assert train_gpt2.open_data(args)[2]["text_bytes"] is None


def test_names_and_hashes(tmp_path, vocab):
    lines = [base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256)]
    assert tokenizer.load().sha256 == hashlib.sha256(b"".join(lines)).hexdigest()
    assert load_program("data/pydocs.py").TOKENIZER_SHA256 == tokenizer.load().sha256
    small = tokenizer.load("gpt2", vocab)
    assert small.sha256 == hashlib.sha256(vocab.read_bytes()).hexdigest()
    assert (small.name, small.document_mark, small.vocab_size) == ("small", 272, 273)
    (tmp_path / "x.tiktoken").write_text("".join(sorted(vocab.read_text().splitlines(True))))
    assert tokenizer.load("gpt2", tmp_path / "x.tiktoken").sha256 == small.sha256, "the order of lines is no matter"


@pytest.mark.parametrize("change, said", [
    (lambda lines: ["".join(lines)[:-2]], "272 ranks"), (lambda lines: ["no vocabulary at all\n"], "line 1"),
    (lambda lines: lines[:-5] + lines[-3:], "270 ranks"), (lambda lines: lines[:200], "single bytes"),
    (lambda lines: [f"{base64.b64encode(b'%d' % i).decode()} {i}\n" for i in range(65536)], "65535"),
    (lambda lines: [*lines, f"IQ== {len(lines)}\n"], "different tokens")])
def test_bad_vocabularies(vocab, tmp_path, change, said):
    (tmp_path / "bad").write_text("".join(change(vocab.read_text().splitlines(True))))
    with pytest.raises(tokenizer.Failure, match=f"{tmp_path / 'bad'} .*{said}"):
        tokenizer.load("gpt2", tmp_path / "bad")


def test_no_vocabulary(vocab, tmp_path, monkeypatch):
    with pytest.raises(tokenizer.Failure, match="cannot read the vocabulary"):
        tokenizer.load("gpt2", tmp_path / "gone")
    monkeypatch.setattr("tiktoken.load.load_tiktoken_bpe", lambda *_, **__: 1 / 0)
    with pytest.raises(tokenizer.Failure, match="--vocab FILE"):
        tokenizer.load("gpt2")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(tokenizer.Failure, match="pip install -r data/requirements.txt"):
        tokenizer.load("gpt2", vocab)


GOOD = b'{"text": "a line"}\n' * 30
BAD = {  # what is wrong: a file of this name, its bytes, flags; what is said
    "empty text": ("a.txt", b" \n" * 9, "", ["no text in", "a.txt"]),
    "one document": ("a.txt", b"a document", "", ["1 document(s)", "--by tail"]),
    "line without text": ("a.jsonl", GOOD + b'{"content": "x", "id": 7}\n', "", ["line 31", "content, id", "--field"]),
    "number for a text": ("a.jsonl", b'{"text": 7}\n', "", ["line 1", '"text"']),
    "list for an object": ("a.jsonl", GOOD + b'["text"]\n', "", ["line 31", "list"]),
    "no JSON": ("a.jsonl", GOOD + b'{"text": "cut sho\n' + GOOD, "", ["line 31", "not JSON", "one object a line"]),
    "deep JSON": ("a.jsonl", b"[" * 10**5 + b"\n", "", ["line 1", "not JSON"]),
    "long line": ("a.jsonl", b'{"text": "' + b"x" * 2**25 + b'"}\n', "", ["line 1", "longer than 32 MB", ".txt"]),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "", ["UTF-16", "iconv"]),
    "cut .gz": ("a.txt.gz", gzip.compress(os.urandom(9999))[:-999], "", ["a.txt.gz", "cut short"]),
    "no .gz": ("a.txt.gz", b"plain text", "", ["a.txt.gz", "damaged"]),
    "cut .zst": ("a.txt.zst", pyarrow.compress(os.urandom(9999), "zstd", asbytes=True)[:-99], "", ["a.txt.zst"]),
    "no .zst": ("a.txt.zst", b"plain text", "", ["a.txt.zst", "damaged"]),
    "no parquet": ("a.parquet", b"plain text", "", ["a.parquet", "no parquet file"]),
    "packed parquet": ("a.parquet.gz", gzip.compress(b"PAR1"), "", ["a.parquet.gz", "unpack"]),
    "other suffix": ("a.pdf", b"%PDF", "", ["a.pdf", ".txt, .jsonl, .parquet"]),
    "share of 0": ("a.jsonl", GOOD, "--val 0", ["--val 0"]),
    "share that is no number": ("a.jsonl", GOOD, "--val nan", ["--val nan"]),
    "shards of 0": ("a.jsonl", GOOD, "--shard_size 0", ["--shard_size 0"]),
    "shards too large": ("a.jsonl", GOOD, f"--shard_size {2**31}", ["--shard_size", "2^31"]),
    "vocabulary of bytes": ("a.jsonl", GOOD, "--vocab x", ["--vocab", "--tokenizer gpt2"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, capsys):
    name, data, flags, parts = BAD[case]
    (tmp_path / name).write_bytes(data)
    err = fails(capsys, tmp_path / name, "--out", tmp_path / "mine", *flags.split())
    assert all(part in err for part in parts), err
    assert os.listdir(tmp_path) == [name], "something half-made is left"


def test_no_input(tmp_path, capsys):
    assert "gone.txt does not exist" in fails(capsys, tmp_path / "gone.txt", "--out", tmp_path / "o")
    (tmp_path / "in").mkdir()
    err = fails(capsys, tmp_path / "in", "--out", tmp_path / "o")
    assert "no .txt" in err and str(tmp_path / "in") in err, err
    parquet.write_table(pyarrow.table(dict(text=[1, 2], body=["a", None])), tmp_path / "in" / "a.parquet")
    err = fails(capsys, tmp_path / "in" / "a.parquet", "--out", tmp_path / "o")
    assert "text (int64), body (string)" in err and "--field" in err, err


def test_flags(tmp_path, capsys):
    for flags, part in ((["x.txt"], "--out"), (["--out", "x"], "INPUT"), (["x.txt", "--out", "x", "--val", "y"], "'y'"),
                        (["x.txt", "--out", "x", "--tokeniser", "gpt2"], "--tokeniser")):
        with pytest.raises(SystemExit) as ended:
            text.main(flags)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and part in err and "--help" in err, err


def test_what_is_not_installed(tmp_path, capsys, monkeypatch):
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("a.parquet", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"x")
        assert "pip install -r data/requirements.txt" in fails(capsys, tmp_path / name, "--out", tmp_path / "o")


def test_what_is_never_overwritten(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "out"

    def refused(*more, out=out):
        before = tree(tmp_path)
        err = fails(capsys, source, "--val", 0.5, "--out", out, *more)
        assert tree(tmp_path) == before
        return err

    out.mkdir()
    make(source, "--val", 0.5, "--out", out)  # an empty folder is as good as none
    assert "--overwrite" in refused()
    (out / "thesis.txt").write_text("mine")
    assert "thesis.txt" in refused("--overwrite")
    (out / "thesis.txt").unlink()
    write_jsonl(source, ["three", "four"])
    (tmp_path / "link").symlink_to("out")
    for way in ("out", "out/../out", "link"):
        make(source, "--val", 0.5, "--out", tmp_path / way, "--overwrite")
        assert sorted(texts(out)) == ["four", "three"] and sorted(os.listdir(tmp_path)) == ["a.jsonl", "link", "out"]
    (out / "manifest.json").write_text('{"dataset": "pydocs"}')
    assert "not of this program" in refused("--overwrite")
    for path in out.glob("*.bin"):
        path.unlink()
    (out / "manifest.json").write_text('{"dataset": "pydocs", "shards": []}')
    assert "manifest.json" in refused("--overwrite"), "of another program, alone"
    assert "exists" in refused("--overwrite", out=source)
    assert "cannot write" in refused(out=source / "out")


def run(*arguments, **options):
    program = [sys.executable, str(ROOT / "data" / "text.py"), *map(str, arguments)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_full_disk(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text " * 200_000)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    process = run(tmp_path / "a.txt", "--by", "tail", "--out", tmp_path / "o", preexec_fn=limit)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1 and "File too large" in err and "--out" in err and err.count("\n") == 1, err
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number, status", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_a_killed_run_leaves_nothing(tmp_path, number, status):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "out").mkdir()
    process = run(tmp_path / "a.txt", "--by", "tail", "--out", tmp_path / "out" / "mine")
    with open(tmp_path / "a.txt", "wb") as fifo:
        fifo.write(b"text " * 10**6)
        while not list((tmp_path / "out").glob(".mine.*.part/*.bin")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
    assert process.returncode == status and "Traceback" not in err and os.listdir(tmp_path / "out") == [], err


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
class TestMemory:
    """Inputs that take more than the limit (MB) where they, or their tokens, are in memory as a whole."""

    def check(self, limit, source, *flags):
        code = "import sys, text; assert not text.main(sys.argv[1:]); print(open('/proc/self/status').read())"
        command = [sys.executable, "-c", code, str(source), "--out", str(source.with_name("out")), *flags]
        done = subprocess.run(command, cwd=ROOT / "data", capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split("VmHWM:")[1].split()[0]) / 1024 < limit

    @pytest.mark.parametrize("flags", ([], ["--dedup"]))
    def test_text_without_line_ends(self, tmp_path, flags):
        with open(tmp_path / "a.txt", "wb") as file:
            file.truncate(120 << 20)  # no room on the disk: zeros
        self.check(150, tmp_path / "a.txt", "--by", "tail", *flags)

    def test_packed_lines(self, tmp_path):
        with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as file:
            for i in range(120):
                file.write(b'{"text": "%d %s"}\n' % (i, b"x" * (1 << 20)))
        self.check(150, tmp_path / "a.jsonl.gz")

    def test_longest_line(self, tmp_path):
        line = json.dumps(dict(text="😀" + "x" * (2**25 - 100)), ensure_ascii=False) + "\n"  # 4 bytes a character
        (tmp_path / "a.jsonl").write_text(line * 2)
        self.check(500, tmp_path / "a.jsonl", "--val", "0.5")

    def test_one_row_group(self, tmp_path):
        part = os.urandom(500).hex()
        table = pyarrow.table(dict(text=[f"{i} {part}" for i in range(120_000)]))
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=120_000, use_dictionary=False)
        self.check(200, tmp_path / "a.parquet")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_train_on_it(script, tmp_path, vocab):
    """Shuffled, on byte pairs; what they refuse is in test_loader.py."""
    generator = random.Random(0)
    write_jsonl(tmp_path / "a.jsonl", ["".join(generator.choices(WORDS, k=100)) for _ in range(60)])
    make(tmp_path / "a.jsonl", "--out", tmp_path / "pairs", "--val", 0.2, "--tokenizer", "gpt2", "--vocab", vocab)
    more = ["--order", "shuffled", "--vocab_size", 273]
    run_here(script, *tiny(script, tmp_path / "pairs", tmp_path / "records", *more))
    folder, log, result = only_record(tmp_path / "records")
    assert result["data"]["manifest"]["tokenizer"] == "small"
    assert hashlib.sha256(vocab.read_bytes()).hexdigest() in log
