"""data/cached_fineweb10B.py and its sister: processes of their own, with the real client of the hub, against a server
on loopback (hub.py) that speaks the hub's protocol and fails in every way a network does.
To run: ./test.sh tests/test_cached_fineweb.py"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import train_rwkv7
from helpers import ROOT, load_program, write_shard
from hub import COMMIT, Hub

SCRIPT, REPO = ROOT / "data" / "cached_fineweb10B.py", "/datasets/kjj0/fineweb10B-gpt2"
VAL, ONE, TWO = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
CHUNK = 1 << 20  # of the script: what a broken connection may cost
SETTINGS = re.compile(r"(?i)(HF_|HUGGING|.*_PROXY$)")  # of the one who runs the tests
IMPATIENT = ("-c", "import sys; sys.path[0] = sys.argv.pop(1).rpartition('/')[0]; import cached_fineweb10B as script;"
             "script.FIRST_PAUSE = 0.05; script.leave(script.main('fineweb10B', 'kjj0/fineweb10B-gpt2', 103, ''))")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    made, random = {}, np.random.default_rng(0)
    for name, tokens in ((VAL, 700_000), (ONE, 1_250_000), (TWO, 1_250_000)):
        body = np.append(50256, random.integers(50257, size=tokens - 1))
        made[name] = write_shard(tmp_path_factory.mktemp("shards") / name, body).read_bytes()
    return made


@pytest.fixture
def hub(shards):
    server = Hub({f"{REPO}/{name}": data for name, data in shards.items()})
    yield server
    server.close()


@pytest.fixture
def start(hub, tmp_path):
    """with start(...) as process: starts the script as a user would and waits for what `until` asks; then kill -9."""
    @contextlib.contextmanager
    def call(*arguments, until=lambda: True, script=SCRIPT, prefix=(), limit=None, **env):
        clean = {key: value for key, value in os.environ.items() if not SETTINGS.match(key)}
        clean.update(HF_ENDPOINT=hub.url(), HF_HOME=str(tmp_path / "home"), NO_PROXY="127.0.0.1", PYTHONUTF8="1")
        program = [sys.executable, *prefix, str(script), *map(str, arguments), "--out", str(tmp_path / "out")]
        with subprocess.Popen(program, env=clean | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              preexec_fn=limit) as process:
            try:
                deadline = time.monotonic() + 30
                while not until():
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                yield process
            finally:
                process.kill()
    return call


@pytest.fixture
def run(start, tmp_path):
    """Runs the script to its end. out: its --out."""
    def call(*arguments, **options):
        with start(*arguments, **options) as process:
            process.output, process.errors = process.communicate(timeout=60)
        assert "Traceback" not in process.errors, process.errors
        return process
    call.out = tmp_path / "out"
    return call


def whole(run, shards, names=(VAL, ONE, TWO)):
    """Every shard is there, the manifest describes it, nothing else is left behind."""
    assert {path.name for path in run.out.iterdir()} == {*names, "manifest.json", "token_bytes.bin", ".lock"}
    manifest = json.loads((run.out / "manifest.json").read_text())
    assert (manifest["dataset"], manifest["source"]) == ("fineweb10B", "kjj0/fineweb10B-gpt2")
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["document_mark"]) == ("gpt2", 50257, 50256)
    assert [entry["name"] for entry in manifest["shards"]] == list(names)
    lengths = np.fromfile(run.out / "token_bytes.bin", np.uint8)  # of GPT-2's tokens: the bytes first, no mark
    assert (len(lengths), lengths[:256].tolist(), lengths.max(), lengths[-1]) == (50257, [1] * 256, 128, 0)
    for entry in manifest["shards"]:
        data, path = shards[entry["name"]], run.out / entry["name"]
        assert path.read_bytes() == data, entry["name"]
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
        assert entry["tokens"] == (len(data) - 1024) // 2 and entry["mtime_ns"] == path.stat().st_mtime_ns
        assert entry["split"] == ("val" if entry["name"] == VAL else "train")
    return manifest["shards"]


def refused(done, *parts, lines=1):
    """One clear line, after at most lines - 1 others and the bar."""
    assert done.returncode == 1, (done.output, done.errors)
    said = [line for line in re.split("[\r\n]", done.errors) if line.strip() and "%|" not in line]
    assert 1 <= len(said) <= lines and all(str(part) in said[-1] for part in parts), (parts, said)


def flipped(data):
    """With one bit changed."""
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


def flip(path):
    path.write_bytes(flipped(path.read_bytes()))


def fetched(hub):
    """The names of the shards that the store was asked for."""
    return [request.path.rsplit("/", 1)[1] for request in hub.asked(server="store")]


def test_fetch_fetch_more_and_fetch_again(hub, run, shards):
    done = run(1, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.errors
    entries = whole(run, shards, (VAL, ONE))
    assert all(entry["hub_checksum"] and entry["commit"] == COMMIT for entry in entries)
    size = len(shards[VAL]) + len(shards[ONE])
    assert f"fetching 2 files, {size / 1e9:.2f} GB, from {hub.url()}" in done.output
    assert "1 train shards and the val shard, 1,950,000 tokens" in done.output
    assert "3.90M/3.90M" in done.errors or "100%" in done.errors, done.errors  # the bar reached the total
    assert sum(request.sent for request in hub.asked(server="store")) == size  # not a byte twice
    assert {r.headers.get("authorization") for r in hub.asked(server="hub")} == {"Bearer hf_secret"}
    assert {r.headers.get("authorization") for r in hub.asked(server="store")} == {None}, "the token went to a stranger"

    hub.requests.clear()
    done = run(2)
    assert done.returncode == 0 and "1 files fetched" in done.output, done
    whole(run, shards)
    assert {request.path.rsplit("/", 1)[1] for request in hub.requests} == {TWO}

    hub.requests.clear()
    before = {path: path.stat().st_mtime_ns for path in run.out.iterdir() if path.name != ".lock"}
    again = run(2)
    assert again.returncode == 0 and "intact, nothing to fetch" in again.output and again.errors == ""
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    check = run("--check")
    assert check.returncode == 0 and "3 shards, 3,200,000 tokens, every byte as it should be" in check.output
    refused(run("--check", 4), "2 of 5 shards missing", lines=3)
    os.utime(run.out / ONE)  # touched: read and kept
    assert "intact" in run(2).output and hub.requests == []
    whole(run, shards)

    args = train_rwkv7.parse(["--data", str(run.out), "--steps", "4", "--val_tokens", "2048"])
    facts = train_rwkv7.open_data(args)[2]  # a record takes the hashes from the manifest
    assert [(shard["name"], shard["sha256"]) for shard in facts["train"]] == [
        (name, hashlib.sha256(shards[name]).hexdigest()) for name in (ONE, TWO)]
    assert facts["manifest"]["tokenizer"] == "gpt2" and facts["text_bytes"]


def test_the_100B_sister(hub, run, shards, tmp_path):
    hub.files = {path.replace("10B", "100B"): data for path, data in hub.files.items()}
    sister = SCRIPT.with_name("cached_fineweb100B.py")
    done = run(1, script=sister)
    assert done.returncode == 0 and (run.out / ONE).read_bytes() == shards[ONE], done.errors
    assert json.loads((run.out / "manifest.json").read_text())["source"] == "kjj0/fineweb100B-gpt2"
    refused(run(1), "fineweb100B", "--out")  # this folder is taken


@pytest.mark.parametrize("flags, count", [
    ("18", 18), ("", None), ("--steps 3200", 17), ("--steps 190", 1), ("--steps 3200 --bsz 512 --seq_len 64", 2),
    (f"--steps {10**8 // 1024} --bsz 1", 1), ("--steps 1000000 --bsz 1 --seq_len 100", 2)])  # one token too many
def test_counts(flags, count):
    assert load_program("data/cached_fineweb10B.py").parse("x", "fineweb10B", 103, "", flags.split()).count == count
    defaults = train_rwkv7.Hyperparameters()
    assert (defaults.bsz, defaults.seq_len) == (512, 1024), "the program's defaults are those of the track"


@pytest.mark.parametrize("flags, parts", [
    ("0", ["0 train shards", "at least 1"]), ("104", ["104", "fineweb10B has 103"]), ("-1", ["-1"]),
    ("many", ["'many' is not a number"]), ("1.5", ["'1.5' is not a number"]), ("1 2", ["2"]),
    ("3 --steps 5", ["not both"]), ("--steps 40000", ["--steps 40000", "210 shards", "has 103"]),
    ("--steps 0", ["at least 1"]), ("--bsz x", ["'x'"]), ("1 --jobs 0", ["at least 1"])])
def test_command_line(flags, parts, capsys):
    with pytest.raises(SystemExit) as ended:
        load_program("data/cached_fineweb10B.py").main("fineweb10B", "", 103, "", flags.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and all(part in said for part in parts), said


def test_command_line_of_the_100B_sister_as_a_process(run, hub, tmp_path):
    """Its number of shards is its own; nothing is asked of the hub, nothing begun."""
    done = run(1031, script=SCRIPT.with_name("cached_fineweb100B.py"))
    assert done.returncode == 2 and "fineweb100B has 1030" in done.errors and done.errors.count("\n") == 1, done.errors
    assert hub.requests == [] and not run.out.exists()


@pytest.mark.parametrize("kinds, tries", [(("cut", "reset"), 3), (("hang",), 2), (("cut", "whole"), 2)])
def test_a_broken_connection_goes_on_where_it_broke(hub, run, shards, kinds, tries):
    hub.faults[ONE] = list(zip(kinds, (1_300_000, 600_000)))
    done = run(1, prefix=IMPATIENT, HF_HUB_DOWNLOAD_TIMEOUT="1" if "hang" in kinds else "10")
    assert done.returncode == 0, done.errors
    whole(run, shards, (VAL, ONE))
    starts = [int(r.headers.get("range", "bytes=0-")[6:-1]) for r in hub.asked(server="store", name=ONE)]
    starts = [0] * ("hang" in kinds) + starts  # the silent request has not ended
    assert len(starts) == tries and starts == sorted(starts) and starts[0] == 0, starts
    assert starts[1] == CHUNK, "what had arrived was fetched again"


@pytest.mark.parametrize("number, status, said", [
    (signal.SIGKILL, -9, ""), (signal.SIGINT, 130, "interrupted; the same command goes on from here\n")])
def test_an_ended_download_goes_on_where_it_stopped(hub, start, run, shards, number, status, said):
    def arrived():
        parts = run.out.glob(f".{ONE}.*.part")
        return (run.out / VAL).exists() and any(part.stat().st_size >= 2 * CHUNK for part in parts)

    hub.faults[ONE] = [("hang", 2_200_000)]
    with start(1, until=arrived) as process:
        assert not (run.out / ONE).exists()
        process.send_signal(number)
        errors = process.communicate(timeout=20)[1]
    assert process.returncode == status and errors.endswith(said) and "Traceback" not in errors, errors
    hub.requests.clear()
    done = run(1)
    assert done.returncode == 0 and "from an earlier try" in done.output, done.errors
    whole(run, shards, (VAL, ONE))
    request, = hub.asked(server="store")
    assert request.headers["range"] == f"bytes={2 * CHUNK}-" and request.path.endswith(ONE)


def test_parts_of_another_version_are_not_used(hub, run, shards):
    run.out.mkdir()
    (run.out / f".{ONE}.0123456789abcdef.part").write_bytes(b"x" * 2_000_000)
    (run.out / f".{VAL}.{hashlib.sha256(shards[VAL]).hexdigest()[:16]}.part").write_bytes(shards[VAL][:1_000_001])
    (run.out / f".{TWO}.{hashlib.sha256(shards[TWO]).hexdigest()[:16]}.part").write_bytes(shards[TWO] + b"too much")
    done = run(2, prefix=IMPATIENT)
    assert done.returncode == 0, done.errors
    whole(run, shards)
    ranges = {r.path.rsplit("/", 1)[1]: r.headers.get("range") for r in hub.asked(server="store")}
    assert ranges == {VAL: "bytes=1000001-", ONE: None, TWO: None}


def test_damaged_bytes_are_fetched_again(hub, run, shards):
    hub.faults[ONE] = [("bytes", flipped(shards[ONE]))] * 10
    refused(run(1), ONE, "is damaged: sha256", "3 times over", "HF_ENDPOINT", lines=3)
    assert len(hub.asked(server="store", name=ONE)) == 3 and not (run.out / ONE).exists()
    assert not list(run.out.glob(".*.part")) and (run.out / VAL).exists()

    del hub.faults[ONE][1:]
    hub.requests.clear()
    done = run(1)
    assert done.returncode == 0 and f"{ONE} is damaged: sha256" in done.errors and "fetching it again" in done.errors
    whole(run, shards, (VAL, ONE))
    assert len(hub.asked(server="store", name=ONE)) == 2


@pytest.mark.parametrize("data, part", [
    (b"<html>Sign in to the hotel's network</html>" * 99, "is no shard: it begins with"),
    (b"", "is no shard: 0 bytes"), ([50256, 50300], "token id 50300, the vocabulary ends at 50256")])
def test_what_is_no_shard(hub, run, tmp_path, data, part):
    data = data if isinstance(data, bytes) else write_shard(tmp_path / "s", data).read_bytes()
    hub.files[f"{REPO}/{ONE}"], hub.checksums = data, False
    refused(run(1), ONE, part, lines=3)
    assert not (run.out / ONE).exists() and len(hub.asked(server="store", name=ONE)) <= 3


@pytest.mark.parametrize("change, parts", [
    (lambda hub: hub.files.pop(f"{REPO}/{ONE}"),
     [f"HUB{REPO}/resolve/main/{ONE}", "does not exist (HTTP 404)", "HF_ENDPOINT"]),
    (lambda hub: hub.faults.update({VAL: [("hub", 401)]}),
     ["no access to kjj0/fineweb10B-gpt2", "HTTP 401", "HF_TOKEN"]),
    (lambda hub: setattr(hub, "commit", None), ["does not answer as the hub does", "HF_ENDPOINT"]),
    (lambda hub: hub.sizes.update({f"{REPO}/{ONE}": 10**16}), ["10000000.00 GB to fetch", "GB free in", "--out"])],
    ids=("not there", "no access", "something else answers", "disk too small"))
def test_what_is_refused_before_it_begins(hub, run, change, parts):
    change(hub)
    refused(run(1), *(part.replace("HUB", hub.url()) for part in parts))
    assert hub.asked(server="store") == [] and os.listdir(run.out) == [".lock"]


def test_too_many_requests_then_success(hub, run, shards):
    """From a mirror, moreover, that gives no checksums."""
    hub.checksums = False
    hub.faults[VAL] = [("hub", 429, {"Retry-After": 1}), ("store", 429, {"Retry-After": 0})]
    hub.faults[ONE] = [("hub", 503), ("store", 500)]
    done = run(1, prefix=IMPATIENT)
    assert done.returncode == 0, done.errors
    assert f"{VAL}: HTTP 429; again in 1 s" in done.errors and f"{ONE}: HTTP 503; again in 0 s" in done.errors
    assert [entry["hub_checksum"] for entry in whole(run, shards, (VAL, ONE))] == [False, False]


@pytest.mark.parametrize("env, parts, asked", [
    ({}, [ONE, "HTTP 500", "The same command"], 2),
    ({"HF_ENDPOINT": "http://127.0.0.1:1"}, ["no connection to http://127.0.0.1:1", "HTTPS_PROXY", "HF_ENDPOINT"], 0)])
def test_an_error_that_stays(hub, run, env, parts, asked):
    hub.faults[ONE] = [("store", 500)] * 9
    refused(run(1, "--retries", 1, prefix=IMPATIENT, **env), *parts, lines=2)
    assert len(hub.asked(server="store", name=ONE)) == asked
    assert asked or os.listdir(run.out) == [".lock"]


def test_by_way_of_a_proxy(hub, run, shards):
    done = run(1, HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=hub.url(), http_proxy=hub.url())
    assert done.returncode == 0 and "from http://hub.invalid" in done.output, done.errors
    whole(run, shards, (VAL, ONE))


def test_the_hubs_cache(hub, run, shards, tmp_path):
    """Filled by the client itself; then without network, told so (HF_HUB_OFFLINE) and not."""
    refused(run(1, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", VAL, "cache")
    fill = ("from huggingface_hub import hf_hub_download as get; import sys;"
            "[get('kjj0/fineweb10B-gpt2', name, repo_type='dataset') for name in sys.argv[2:4]]")
    assert run(VAL, ONE, prefix=("-c", fill), HF_HUB_DISABLE_XET="1").returncode == 0
    hub.requests.clear()
    done = run(1, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "from the hub's cache" in done.output, done.errors
    assert all(e["hub_checksum"] and e["commit"] == COMMIT for e in whole(run, shards, (VAL, ONE)))
    shutil.rmtree(run.out)
    assert run(1, HF_ENDPOINT="http://127.0.0.1:1", HF_HUB_ETAG_TIMEOUT="1").returncode == 0
    whole(run, shards, (VAL, ONE))
    shutil.rmtree(run.out)
    assert hub.requests == []
    blob = next(p for p in tmp_path.glob("home/hub/*/blobs/*") if p.stat().st_size == len(shards[ONE]))
    blob.write_bytes(b"x" + blob.read_bytes()[1:])  # a damaged cache
    refused(run(1, HF_HUB_OFFLINE="1"), ONE, "in the hub's cache is no shard", lines=9)
    done = run(1)
    assert done.returncode == 0 and len(hub.asked(server="store")) == 1, done.errors
    whole(run, shards, (VAL, ONE))


def test_a_full_disk_and_no_folder(hub, run, shards):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    run.out.write_text("a file, not a folder")
    refused(run(1), "cannot read or write", run.out, "--out")
    run.out.unlink()
    refused(run(1, limit=limit), "cannot read or write", run.out, "--out", lines=9)
    assert not (run.out / ONE).exists()
    assert run(1).returncode == 0
    whole(run, shards, (VAL, ONE))


def as_anybody():
    """In a child: root without its right to write anywhere is bound by permissions like everybody."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_no_permission_to_write(hub, run):
    run.out.mkdir(mode=0o555)
    if os.geteuid() == 0 and not sys.platform.startswith("linux"):
        pytest.skip("root may write anywhere")
    refused(run(1, limit=as_anybody), "cannot read or write", run.out, "Permission denied", "--out")
    assert hub.requests == [] and list(run.out.iterdir()) == []


def test_two_at_once(hub, start, run):
    hub.faults[VAL] = [("hang", 1000)]
    with start(1, until=lambda: list(run.out.glob(".*.part"))):
        refused(run(1), "another download into", run.out)


@pytest.mark.parametrize("old, new", ((r"(?s).*", "{"), (r'"sha256"', '"sha"'), (r'"shards"', '"files"')))
def test_a_damaged_manifest(hub, run, shards, old, new):
    assert run(2).returncode == 0
    manifest = run.out / "manifest.json"
    manifest.write_text(re.sub(old, new, manifest.read_text(), count=1))
    flip(run.out / ONE)
    done = run(2)
    assert done.returncode == 0 and "manifest.json is damaged: reading every shard" in done.errors, done.errors
    assert f"{ONE} is not the hub's (another sha256): fetching it again" in done.errors
    whole(run, shards)


def test_what_is_damaged_is_found_and_fetched_again(hub, run, shards):
    assert run(2).returncode == 0
    flip(run.out / VAL)
    os.truncate(run.out / ONE, 5000)
    os.remove(run.out / TWO)
    refused(run("--check"), "3 of 3 shards missing or damaged", "Without --check", lines=4)
    hub.requests.clear()
    done = run(2)
    assert done.returncode == 0, done.errors
    assert f"{VAL} is not what the manifest says: fetching it again" in done.errors, done.errors
    size = "1250000 tokens by its header, 1988 by its size"
    assert f"{ONE} is damaged: {size}: fetching it again" in done.errors, done.errors
    whole(run, shards)
    assert sorted(fetched(hub)) == [ONE, TWO, VAL]

    stat = (run.out / ONE).stat()  # a byte that changes while size and time do not: as on a failing disk
    flip(run.out / ONE)
    os.utime(run.out / ONE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    check = run("--check")
    assert f"{ONE} is damaged: sha256" in check.errors
    refused(check, "1 of 3 shards missing or damaged", "Without --check", lines=2)
    hub.requests.clear()
    assert "1 files fetched" in run(2).output and fetched(hub) == [ONE]
    whole(run, shards)
    assert run("--check", 2).returncode == 0


def test_shards_copied_by_hand(hub, run, shards):
    """Held against the hub's checksum when there is a hub, taken as they are when there is none."""
    run.out.mkdir()
    (run.out / VAL).write_bytes(shards[VAL])
    (run.out / ONE).write_bytes(flipped(shards[ONE]))
    check = run("--check")
    assert check.returncode == 0 and "2 not in manifest.json" in check.output
    assert not (run.out / "manifest.json").exists()
    (run.out / "manifest.json").write_text("{")
    done = run(1)
    assert done.returncode == 0 and "manifest.json is damaged: reading every shard" in done.errors, done.errors
    assert f"{ONE} is not the hub's (another sha256): fetching it again" in done.errors
    whole(run, shards, (VAL, ONE))
    assert set(fetched(hub)) == {ONE}
    (run.out / "manifest.json").unlink()
    hub.requests.clear()
    done = run(1, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and hub.requests == [], done.errors
    assert [entry["hub_checksum"] for entry in whole(run, shards, (VAL, ONE))] == [False, False]


@pytest.mark.parametrize("package", ("huggingface_hub", "numpy", "tqdm"))
def test_a_python_without_packages(run, package):
    code = (f"import runpy, sys; sys.modules[{package!r}] = None; sys.path[0] = {str(SCRIPT.parent)!r};"
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    refused(run(1, prefix=("-c", code)), f"{package} is missing", "pip install -r requirements.txt")
