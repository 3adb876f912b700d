"""data/fineweb.py: shards made of a small parquet file in FineWeb's columns, with a vocabulary of a few tokens.
To run: ./test.sh tests/test_fineweb.py"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import train_rwkv7
from helpers import ROOT, tree
from test_text import shards

pa = pytest.importorskip("pyarrow", reason="pip install -r data/requirements.txt")
tiktoken, datasets = pytest.importorskip("tiktoken"), pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")
sys.path.append(str(ROOT / "data"))
import fineweb  # noqa: E402

SCRIPT, SIZE = ROOT / "data" / "fineweb.py", 5000
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's, as OpenAI wrote it
PAIRS = [b"th", b"the", b" t", b"he", b" a", b"an", b"and", b" th", b" the", b"in", b"er", b"\n\n"]


def name(number):
    return f"fineweb_train_{number:06d}.bin" if number else "fineweb_val_000000.bin"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two parquet files, a vocabulary, and the tokens they must become."""
    folder = tmp_path_factory.mktemp("raw")
    ranks = {token: i for i, token in enumerate([bytes([i]) for i in range(256)] + PAIRS)}
    (folder / "ranks").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in ranks.items()))
    random = np.random.default_rng(0)
    words = "the and in another theater, it's 1234 Käse 日本 🙂 \n\n end.".split(" ")
    texts = [" ".join(random.choice(words, random.integers(1, 40))) for _ in range(600)]
    texts[-1] = "the last"
    texts[3:6] = "", "a mark <|endoftext|> in the text is text", "one document of several shards " * 900
    bpe = tiktoken.Encoding("toy", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    tokens = []
    for text in texts:
        tokens += [len(ranks), *bpe.encode_ordinary(text)]
    if len(tokens) % 2:  # an even number of them: two shards can be full
        texts[-1] += "1"
        tokens += bpe.encode_ordinary("1")
    for i, part in enumerate((texts[:350], texts[350:])):
        more = dict.fromkeys(("id", "dump", "url", "date", "file_path", "language"), ["x"] * len(part))
        table = pa.table(dict(more, text=part, language_score=[0.99] * len(part), token_count=[9] * len(part)))
        pq.write_table(table, folder / f"{i:03d}_00000.parquet", row_group_size=100)
    return folder, np.array(tokens, "<u2")


@pytest.fixture
def run(world, tmp_path):
    """Runs the script to its end or until a file is there: then kill -9."""
    def call(until=None, preload="", **flags):
        flags = dict(version="10B", input=world[0], vocab=world[0] / "ranks", shard_size=SIZE, workers=1,
                     out=tmp_path / "out") | flags
        flags = [str(part) for key, value in flags.items() if value is not None for part in (f"--{key}", value)]
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env.update(HF_HOME=str(world[0] / "home"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", PYTHONUTF8="1")
        process = subprocess.Popen([sys.executable, str(SCRIPT), *flags], env=env | dict(PYTHONPATH=str(preload)),
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            for _ in range(2400 if until else 0):
                if until.exists() or process.poll() is not None:
                    process.kill()
                    break
                time.sleep(0.01)
            process.output, process.errors = process.communicate(timeout=120)  # when its workers have ended, too
        finally:
            process.kill()
        assert "Traceback" not in process.errors, process.errors
        return process
    return call


def refused(done, *parts):
    assert done.returncode == 1, (done.output, done.errors)
    said = [line for line in re.split("[\r\n]", done.errors) if line.strip() and not re.search(r"%\||Generating", line)]
    assert len(said) == 1 and said[0].startswith("fineweb.py: "), said
    for part in map(str, parts):
        assert part in said[0], f"{part!r} is not in: {said[0]}"


def whole(out, tokens):
    """Shards that hold these tokens, a manifest that says so, and nothing else."""
    (out / ".lock").unlink()
    assert np.array_equal(shards(out), tokens)
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["shards"]] == [name(i) for i in range(-(-len(tokens) // SIZE))]
    for i, entry in enumerate(manifest["shards"]):
        assert entry["tokens"] == SIZE or i == len(manifest["shards"]) - 1
        assert entry["mtime_ns"] == (out / name(i)).stat().st_mtime_ns
        assert entry["split"] == ("train" if i else "val")
    return manifest


def test_shards_are_the_documents(run, world, tmp_path):
    done = run()
    assert done.returncode == 0 and f"{len(world[1]):,} tokens of 600 documents" in done.output, done.errors
    manifest = whole(tmp_path / "out", world[1])
    mark = 256 + len(PAIRS)
    assert (manifest["tokenizer"], manifest["document_mark"], manifest["vocab_size"]) == ("ranks", mark, mark + 1)
    assert manifest["tokenizer_sha256"] == hashlib.sha256((world[0] / "ranks").read_bytes()).hexdigest()
    assert (manifest["dataset"], manifest["documents"], manifest["shard_size"]) == ("fineweb10B", 600, SIZE)
    assert (world[1] == mark).sum() == 600 and world[1][0] == mark
    stream = train_rwkv7.TokenStream(tmp_path / "out", "train", len(world[1]) - SIZE)
    assert np.array_equal(stream.read(0, len(stream)), world[1][SIZE:])


def test_killed_it_goes_on_and_what_is_damaged_is_made_again(run, world, tmp_path):
    """With another number of workers each time."""
    run(until=tmp_path / "out" / name(1))
    kept = sorted((tmp_path / "out").glob("fineweb_*.bin"))[0]  # else killed too early to say anything
    before = kept.stat().st_mtime_ns
    done = run(workers=2)
    assert done.returncode == 0 and ("going on in document" in done.errors or "intact" in done.output), done.errors
    whole(tmp_path / "out", world[1])
    assert kept.stat().st_mtime_ns == before

    data = bytearray((tmp_path / "out" / name(4)).read_bytes())
    data[3000] ^= 1
    (tmp_path / "out" / name(4)).write_bytes(data)
    os.utime(tmp_path / "out" / name(2))  # only touched
    done = run(workers=5)
    assert done.returncode == 0 and "4 shards are whole: going on in document" in done.errors, done.errors
    whole(tmp_path / "out", world[1])


@pytest.mark.parametrize("kind", ("bin", "json"))
def test_killed_at_any_moment(run, world, tmp_path, kind):
    """Just before the second rename of a shard, which is just after that of the manifest, and just before that."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import os
rename, count = os.replace, 0
def replace(source, target):
    global count
    count += str(target).endswith({kind!r})
    if count == 2:
        os._exit(9)
    rename(source, target)
os.replace = replace
""")
    assert run(preload=tmp_path).returncode == 9
    done = run()
    assert done.returncode == 0, done.errors
    whole(tmp_path / "out", world[1])


@pytest.mark.parametrize("flags, part", [
    ("--version 1B", "10B"), ("--version 10B --shard_size 0", "'0' is not a whole number from 1"), ("", "--version"),
    (f"--version 10B --shard_size {2**31}", f"'{2**31}'"), ("--version 10B --workers many", "'many'")])
def test_command_line(flags, part, capsys):
    with pytest.raises(SystemExit) as ended:
        fineweb.main(flags.split())
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and part in err, err


def test_bad_input(run, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "no.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table(dict(content=["x"])), tmp_path / "other.parquet")
    for flag, wrong, *parts in (
            ("input", "nowhere", "does not exist"), ("input", "no.parquet", "cannot read", "parquet"),
            ("input", "empty", "no .parquet files in"), ("input", "other.parquet", "no column `text`", "content"),
            ("vocab", "gone", "cannot read the vocabulary"), ("out", "no.parquet/o", "cannot read or write", "--out")):
        flags = dict(input=world[0], vocab=world[0] / "ranks", out=tmp_path / "out") | {flag: tmp_path / wrong}
        assert fineweb.main(["--version=10B", *[f"--{key}={value}" for key, value in flags.items()]]) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fineweb.py: ")]
        assert len(said) == 1 and all(part in said[0] for part in (wrong, *parts)), said
    assert not (tmp_path / "out").exists()
    refused(run(shard_size=len(world[1])), "fill no more than the val shard", "--shard_size")


def test_a_folder_with_other_shards(run, world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name(1)).write_bytes(b"copied here by hand")
    refused(run(), name(1), "stands in no manifest.json", "--out")
    (tmp_path / "out" / name(1)).unlink()
    half = len(world[1]) // 2  # the last shard is full, too
    assert run(shard_size=half).returncode == 0
    written = tree(tmp_path / "out")
    again = run(shard_size=half)
    assert "2 shards" in again.output and "intact, nothing to make" in again.output, again.errors
    refused(run(), f"shard_size is {half} there, {SIZE} here", "--out")
    assert tree(tmp_path / "out") == written and {name(0), name(1)} <= set(written) and name(2) not in written
