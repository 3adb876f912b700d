"""data/pydocs.py: the corpus made of the text inside Python."""

import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "data" / "pydocs.py"
TRAIN, VAL = "pydocs_train_000001.bin", "pydocs_val_000000.bin"


def load():
    spec = importlib.util.spec_from_file_location("pydocs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def tokens(path):
    header = np.fromfile(path, dtype="<i4", count=256)
    body = np.fromfile(path, dtype="<u2", offset=1024)
    assert header[0] == 20240520 and header[1] == 1 and header[2] == len(body) and not header[3:].any(), header[:8]
    return body


def texts(path):
    body = tokens(path)
    starts = np.flatnonzero(body == 256)
    return [bytes(part[1:].astype(np.uint8)).decode() for part in np.split(body, starts[1:])]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One build for all tests that only read it."""
    out = tmp_path_factory.mktemp("corpus") / "py docs"
    done = run("--out", out)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "train" in done.stdout, done.stdout
    return out


def test_format(corpus):
    names = sorted(path.name for path in corpus.iterdir())
    assert names == ["manifest.json", TRAIN, VAL, "token_bytes.bin"]  # and no temporary file
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert (manifest["dataset"], manifest["tokenizer"], manifest["vocab_size"]) == ("pydocs", "bytes", 257)
    assert manifest["document_mark"] == 256 and manifest["python"] == "%d.%d.%d" % sys.version_info[:3]
    assert [(s["name"], s["split"]) for s in manifest["shards"]] == [(TRAIN, "train"), (VAL, "val")]
    documents = 0
    for entry in manifest["shards"]:
        data = (corpus / entry["name"]).read_bytes()
        body = tokens(corpus / entry["name"])
        assert (entry["bytes"], entry["tokens"]) == (len(data), len(body))
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert body[0] == 256 and body.max() == 256
        documents += int((body == 256).sum())
    assert manifest["documents"] == documents > 200
    assert len(manifest["fingerprint"]) == 64 and manifest["files"] > 200


def test_split_and_text(corpus):
    train, val = texts(corpus / TRAIN), texts(corpus / VAL)
    sizes = [len(tokens(corpus / name)) for name in (TRAIN, VAL)]
    assert sizes[1] >= 64 * 1024 and 0.09 < sizes[1] / sum(sizes) < 0.13, sizes
    everything = [" ".join(text.split()) for text in train + val]
    assert len(set(everything)) == len(everything), "a document occurs twice"
    assert min(len(text.encode()) for text in train + val) >= 256
    long = [{" ".join(p.split()) for text in part for p in text.split("\n\n")} for part in (train, val)]
    shared = {p for p in long[0] & long[1] if len(p) >= 64}
    assert not shared, f"{len(shared)} paragraphs are in train and val, e.g. {sorted(shared)[:1]}"
    both = "".join(train + val)
    assert sum(c.isascii() for c in both) / len(both) > 0.999
    assert both.count(" the ") > 10_000, "this is not English"


def test_two_builds_are_identical(corpus, tmp_path):
    assert run("--out", tmp_path, "--force").returncode == 0
    for name in (TRAIN, VAL, "manifest.json"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes(), name


def test_intact_is_quick_and_force_rebuilds(corpus):
    before = {path.name: path.stat().st_mtime_ns for path in corpus.iterdir()}
    start = os.times()
    done = run("--out", corpus)
    seconds = sum(os.times()[2:4]) - sum(start[2:4])  # of the child, on the processor: the same on a busy machine
    assert done.returncode == 0 and "intact" in done.stdout and len(done.stdout.splitlines()) == 1, done
    assert seconds < 0.5, f"{seconds} s with the interpreter's start"
    assert before == {path.name: path.stat().st_mtime_ns for path in corpus.iterdir()}
    assert "intact" not in run("--out", corpus, "--force").stdout
    assert before != {path.name: path.stat().st_mtime_ns for path in corpus.iterdir()}


def break_by_truncation(out):
    (out / TRAIN).write_bytes((out / TRAIN).read_bytes()[:5000])
    return TRAIN


def break_one_byte(out):
    data = bytearray((out / VAL).read_bytes())
    data[5000] ^= 1
    (out / VAL).write_bytes(data)
    return VAL


def break_by_removal(out):
    (out / VAL).unlink()
    return VAL


def break_manifest(out):
    (out / "manifest.json").write_text("{")
    return ""


def break_version(out):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["python"] = "3.1.4"
    (out / "manifest.json").write_text(json.dumps(manifest))
    return "made by Python 3.1.4"


@pytest.mark.parametrize("damage", [break_by_truncation, break_one_byte, break_by_removal, break_manifest,
                                    break_version])
def test_what_is_broken_is_made_anew(corpus, tmp_path, damage):
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    named = damage(tmp_path)
    done = run("--out", tmp_path)
    assert done.returncode == 0 and named in done.stdout and "intact" not in done.stdout, done
    for path in corpus.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert "intact" in run("--out", tmp_path).stdout


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    done = run("--out", tmp_path / "file" / "out")
    assert done.returncode == 1 and "cannot write" in done.stderr and "--out" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    pydocs = load()
    (tmp_path / "shard").write_bytes(b"old")
    monkeypatch.setattr(pydocs.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        pydocs.write(str(tmp_path / "shard"), b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["shard"] and (tmp_path / "shard").read_bytes() == b"old"


def test_a_library_without_sources(tmp_path, monkeypatch, capsys):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "one.py").write_text('"""A module whose docstring is the only one of the library."""\n')
    pydocs = load()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(sys, "argv", ["pydocs.py", "--out", str(tmp_path / "out")])
    assert pydocs.main() == 1
    error = capsys.readouterr().err
    assert "lacks its sources" in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_what_is_taken_from_a_source(tmp_path):
    """Order, cleaning, repeats, what is skipped; nothing is executed."""
    lib = tmp_path / "lib"
    long = "A sentence that is long enough to be a document by itself and is not in any other module. " * 3
    repeat = "A paragraph of more than sixty-four characters that stands in two of the modules.\n"
    for name, source in {
        "a.py": f'"""First {long}"""\nraise SystemExit\nclass C:\n    """Second of them, with a class in between:\n\n'
                f'        kept indent\n    end\n    """\n    def f(self):\n        """Too short."""\n'
                f'if 1:\n    async def g():\n        """Third: nested in a branch, and asynchronous.\\x00"""\n',
        "b.py": f'"""{repeat}\n{long} b"""\n',
        "c.py": f'"""{repeat}\n{long} c"""\n',
        "bad.py": "def (:\n",
        "nul.py": "\0",
        "test/t.py": f'"""{long} t"""\n',
        "x/tests/t.py": f'"""{long} t"""\n',
        "site-packages/s.py": f'"""{long} s"""\n',
        "encodings/e.py": f'"""{long} e"""\n',
        "pydoc_data/topics.py": f"# by a tool\ntopics = {{'if': {long!r},\n 'all': 'All that:\\n\\n' {long!r}}}\n",
    }.items():
        (lib / name).parent.mkdir(parents=True, exist_ok=True)
        (lib / name).write_text(source)
    docs, files, fingerprint = load().documents(str(lib))
    assert set(docs) == {"topic all", "module a.py", "module b.py", "module c.py"} and files == 4
    assert docs["topic all"] == f"All that:\n\n{long.rstrip()}\n"
    assert docs["module a.py"] == (f"First {long.rstrip()}\n\nSecond of them, with a class in between:\n\n"
                                   "    kept indent\nend\n\nThird: nested in a branch, and asynchronous.\n")
    assert "two of the modules" in docs["module b.py"] and "two of the modules" not in docs["module c.py"]
    (lib / "bad.py").write_text("def f(:\n")
    assert load().documents(str(lib))[2] == fingerprint, "a file without text is no source"
    (lib / "b.py").write_text((lib / "b.py").read_text() + "# more\n")
    assert load().documents(str(lib))[2] != fingerprint
