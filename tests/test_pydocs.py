"""data/pydocs.py: the corpus made of the text inside Python. To run: ./test.sh tests/test_pydocs.py"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from helpers import ROOT, load_program, tree

TRAIN, VAL = "pydocs_train_000001.bin", "pydocs_val_000000.bin"
pydocs = load_program("data/pydocs.py")


def run(*arguments):
    program = [sys.executable, str(ROOT / "data" / "pydocs.py"), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One build for all tests that only read it."""
    out = tmp_path_factory.mktemp("corpus") / "py docs"
    done = run("--out", out)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "train" in done.stdout, done.stdout
    return out


def test_format_split_and_text(corpus):
    assert sorted(tree(corpus)) == ["manifest.json", TRAIN, VAL, "token_bytes.bin"]  # and no temporary file
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert (manifest["dataset"], manifest["tokenizer"], manifest["vocab_size"]) == ("pydocs", "bytes", 257)
    assert manifest["document_mark"] == 256 and manifest["python"] == "%d.%d.%d" % sys.version_info[:3]
    assert [(s["name"], s["split"]) for s in manifest["shards"]] == [(TRAIN, "train"), (VAL, "val")]
    assert len(manifest["fingerprint"]) == 64 and manifest["files"] > 200
    sizes, parts = [], []
    for entry in manifest["shards"]:
        data = (corpus / entry["name"]).read_bytes()
        header, body = np.frombuffer(data, "<i4", 256), np.frombuffer(data, "<u2", offset=1024)
        assert header[:3].tolist() == [20240520, 1, len(body)] and not header[3:].any(), header[:8]
        assert (entry["bytes"], entry["tokens"]) == (len(data), len(body))
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert body[0] == 256 and body.max() == 256
        documents = np.split(body, np.flatnonzero(body == 256)[1:])
        sizes.append(len(body))
        parts.append([bytes(document[1:].astype(np.uint8)).decode() for document in documents])
    both = parts[0] + parts[1]
    assert manifest["documents"] == len(both) > 200
    assert sizes[1] >= 64 * 1024 and 0.09 < sizes[1] / sum(sizes) < 0.13, sizes
    assert len({" ".join(text.split()) for text in both}) == len(both), "a document occurs twice"
    assert min(len(text.encode()) for text in both) >= 256
    train, val = ({" ".join(p.split()) for p in "\n\n".join(part).split("\n\n")} for part in parts)
    shared = {p for p in train & val if len(p) >= 64}
    assert not shared, f"{len(shared)} paragraphs are in train and val, e.g. {sorted(shared)[:1]}"
    text = "".join(both)
    assert sum(c.isascii() for c in text) / len(text) > 0.999
    assert text.count(" the ") > 10_000, "this is not English"


def test_intact_is_quick_and_force_makes_the_same_again(corpus):
    before, times = tree(corpus), [path.stat().st_mtime_ns for path in sorted(corpus.iterdir())]
    start = os.times()
    done = run("--out", corpus)
    seconds = sum(os.times()[2:4]) - sum(start[2:4])  # of the child, on the processor: the same on a busy machine
    assert done.returncode == 0 and "intact" in done.stdout and len(done.stdout.splitlines()) == 1, done
    assert seconds < 0.5, f"{seconds} s with the interpreter's start"
    assert times == [path.stat().st_mtime_ns for path in sorted(corpus.iterdir())]
    assert "intact" not in run("--out", corpus, "--force").stdout
    assert times != [path.stat().st_mtime_ns for path in sorted(corpus.iterdir())]
    assert tree(corpus) == before, "two builds differ"


def test_what_is_broken_is_made_anew(corpus, tmp_path):
    whole = tree(corpus)
    manifest = whole["manifest.json"]
    for name, data, why in (
            (TRAIN, whole[TRAIN][:5000], TRAIN), (VAL, whole[VAL][:5000] + b"?" + whole[VAL][5001:], VAL),
            ("token_bytes.bin", None, "lacks token_bytes.bin"), ("manifest.json", b"{", "no readable manifest"),
            ("manifest.json", manifest.replace(b'"python": "', b'"python": "0.'), "made by Python 0."),
            (VAL, None, f"lacks {VAL}")):
        shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
        (tmp_path / name).unlink()
        if data is not None:
            (tmp_path / name).write_bytes(data)
        assert why in pydocs.stale(str(tmp_path))[0], (name, why)
    done = run("--out", tmp_path)
    assert done.returncode == 0 and why in done.stdout and "intact" not in done.stdout, done
    assert tree(tmp_path) == whole and pydocs.stale(str(tmp_path))[0] == ""


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "shard").write_bytes(b"old")
    monkeypatch.setattr(pydocs.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pydocs.write(str(tmp_path / "shard"), b"new")
    assert tree(tmp_path) == {"shard": b"old"}


def test_a_library_without_sources_and_a_place_not_to_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.py").write_text(f'"""A module whose docstring is the only one of the library. {"x" * 300}"""\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["pydocs.py", "--out", str(tmp_path / "one.py" / "out")])
    for parts in (["lacks its sources"], ["cannot write", "--out"]):
        assert pydocs.main() == 1
        error = capsys.readouterr().err
        assert all(part in error for part in parts) and error.count("\n") == 1, error
        for limit in ("MIN_TEXT", "MIN_VAL"):
            monkeypatch.setattr(pydocs, limit, 0)
    assert os.listdir(tmp_path) == ["one.py"]


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
    docs, files, fingerprint = pydocs.documents(str(lib))
    assert set(docs) == {"topic all", "module a.py", "module b.py", "module c.py"} and files == 4
    assert docs["topic all"] == f"All that:\n\n{long.rstrip()}\n"
    assert docs["module a.py"] == (f"First {long.rstrip()}\n\nSecond of them, with a class in between:\n\n"
                                   "    kept indent\nend\n\nThird: nested in a branch, and asynchronous.\n")
    assert "two of the modules" in docs["module b.py"] and "two of the modules" not in docs["module c.py"]
    (lib / "bad.py").write_text("def f(:\n")
    assert pydocs.documents(str(lib))[2] == fingerprint, "a file without text is no source"
    (lib / "b.py").write_text((lib / "b.py").read_text() + "# more\n")
    assert pydocs.documents(str(lib))[2] != fingerprint
