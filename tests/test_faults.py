"""What can go wrong around a run: ranks that die, machines that differ, memory that ends, GPUs without bf16. Two
machines are two torchruns on this one, each with a checkout of its own or both with one."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_gpt2
from helpers import ROOT, environment, make_corpus, one_thread, only_record, run_here, run_script, tiny
from test_build import GXX, program
from test_run import losses


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data"), train=(700, 900, 1500))


# ----------------------------------------------------------------------------------------------------------------------
# Several machines, and ranks that end

def checkout(folder, script):
    """What a machine needs of the repository."""
    folder.mkdir()
    shutil.copy(ROOT / f"{script}.py", folder)
    shutil.copytree(ROOT / "cuda", folder / "cuda", ignore=shutil.ignore_patterns("build"))
    return folder


@contextlib.contextmanager
def cluster(folders, script, flags, processes=1, **env):
    """One torchrun a folder, each on "a machine" of its own, as processes; none is left behind."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    several = ["--nnodes", str(len(folders)), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *(several if len(folders) > 1 else ["--standalone"]),
         "--node_rank", str(i), "--nproc_per_node", str(processes), f"{script}.py", *flags], cwd=folder, text=True,
        env=environment(HOME="/dev/null/home", **env), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True) for i, folder in enumerate(folders)]
    try:
        yield nodes
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)


def ends(nodes):
    """[(status, stdout, stderr)]; none may take a minute."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        said = list(pool.map(lambda node: node.communicate(timeout=60), nodes))
    return [(node.returncode, *text) for node, text in zip(nodes, said)]


def said(text):
    """The scripts' own lines, without torchrun's."""
    return [line for line in text.splitlines() if line.startswith("train_")]


def ranks_of(mark):
    """{rank: pid} of the living processes that have MARK=mark in their environment; torchrun's own is None."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text, state = (folder / "environ").read_bytes(), (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # gone meanwhile
            continue
        variables = dict(pair.split("=", 1) for pair in text.decode(errors="replace").split("\0") if "=" in pair)
        if variables.get("MARK") == mark and state != "Z":
            found[int(variables["RANK"]) if "RANK" in variables else None] = int(folder.name)
    return found


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++")
@pytest.mark.parametrize("shared", (True, False), ids=("one checkout", "two checkouts"))
def test_two_machines(shared, data, tmp_path):
    """The losses of one process, and the kernel built once a machine, or once where they share the disk."""
    folders = [checkout(tmp_path / "a node", "train_rwkv7")]
    folders.append(folders[0] if shared else checkout(tmp_path / "b node", "train_rwkv7"))
    flags = tiny("train_rwkv7", data, tmp_path / "two", "--kernel", "cpu", "--name", "two")
    quick = program(tmp_path / "quick" / "c++", f'exec "{GXX}" "$@" -O0')
    with cluster(folders, "train_rwkv7", flags, CXX=str(quick)) as nodes:
        done = ends(nodes)
    assert [status for status, _, _ in done] == [0, 0], done
    builds = [len(re.findall("cpu built; .* ok$", err, re.M)) for _, _, err in done]
    assert sum(builds) == 1 if shared else builds == [1, 1], done
    assert all(len(list((folder / "cuda" / "build").glob("*.so"))) == 1 for folder in folders)
    run_here("train_rwkv7", *flags, "--records", tmp_path / "one")
    (train, val), (train_2, val_2) = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(val) == 4 and all(abs(a / b - 1) < 1e-5 for a, b in zip(val, val_2, strict=True)), (val, val_2)
    assert all(abs(float(a) - float(b)) < 1.01e-4 for a, b in zip(train, train_2, strict=True))
    assert only_record(tmp_path / "two")[2]["hardware"]["count"] == 2
    assert done[1][1] == "", "only rank 0 talks"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("victim", (0, 1))
@pytest.mark.parametrize("machines", (1, 2))
def test_kill_9_of_a_rank_ends_all(machines, victim, data, tmp_path):
    """By torchrun and gloo: within a minute every process has ended, and every torchrun says so by its status."""
    folder, mark = checkout(tmp_path / "checkout", "train_gpt2"), str(tmp_path)
    flags = tiny("train_gpt2", data, tmp_path / "records", "--steps", 100000, "--epochs", 9999, "--bsz", 8)
    with cluster([folder] * machines, "train_gpt2", flags, 2 // machines, MARK=mark) as nodes:
        deadline = time.monotonic() + 60
        while not any("\nstep:9/" in log.read_text() for log in tmp_path.glob("records/*/log.txt")):
            assert time.monotonic() < deadline and all(node.poll() is None for node in nodes), ends(nodes)
            time.sleep(0.1)
        killed = time.monotonic()
        os.kill(ranks_of(mark)[victim], signal.SIGKILL)
        done = ends(nodes)
        print(f"{machines} machines, rank {victim}: all ended after {time.monotonic() - killed:.1f} s")
        assert all(status != 0 for status, _, _ in done) and ranks_of(mark) == {}, done
    _, log, result = only_record(tmp_path / "records")
    assert result is None and "\nend: finished" not in log


def test_two_ranks_leave_cleanly(data, tmp_path):
    """At the end, and where all stop after the same step: nothing on stderr, no abort of a rank that is leaving."""
    for i, more in enumerate(((), (), ("--stop_after", 3))):
        done = run_script("train_gpt2", *tiny("train_gpt2", data, tmp_path / str(i), *more), ranks=2)
        assert done.returncode == 0 and done.stderr == "", done


def test_data_of_another_machine(data, tmp_path):
    """The same names and sizes, but made elsewhere: another hash in the second machine's manifest."""
    folders = [checkout(tmp_path / name, "train_gpt2") for name in "ab"]
    for folder in folders:
        shutil.copytree(data, folder / "text")
    shards = [dict(name=path.name, tokens=(path.stat().st_size - 1024) // 2) for path in data.glob("*.bin")
              if path.name != "token_bytes.bin"]
    for folder, digest in zip(folders, "01"):
        listed = [dict(shard, sha256=digest * 64 if "train_000001" in shard["name"] else "2" * 64) for shard in shards]
        (folder / "text" / "manifest.json").write_text(json.dumps(dict(shards=listed)))
    flags = tiny("train_gpt2", "text", tmp_path / "records", "--steps", 12)  # 12 * 4 * 32 tokens: more than one shard
    with cluster(folders, "train_gpt2", flags) as nodes:
        done = ends(nodes)
    here = os.uname().nodename
    for status, _, err in done:
        assert status == 1 and any(re.fullmatch(
            rf"train_gpt2.py: (rank 1: )?the shards of text differ between the ranks on {here} and on {here}. .*", line)
            for line in said(err)), err
    assert not (tmp_path / "records").exists(), "nothing is written before all have checked"


# ----------------------------------------------------------------------------------------------------------------------
# Memory and devices


@pytest.mark.parametrize("error", (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")))
def test_out_of_memory(error, data, tmp_path, monkeypatch, capfd):
    def train_step(*_):
        raise error
    monkeypatch.setattr(train_gpt2, "train_step", train_step)
    for device_bsz, way_out in ((4, "--device_bsz 2 (the same losses)"), (1, "a shorter --seq_len")):
        records = tmp_path / str(device_bsz)
        with pytest.raises(SystemExit) as ended:
            run_here("train_gpt2", *tiny("train_gpt2", data, records, "--device_bsz", device_bsz))
        line, = capfd.readouterr().err.splitlines()
        assert ended.value.code == 1 and line.startswith(f"train_gpt2.py: out of memory with {device_bsz} x 32 tokens")
        assert f"next to try: {way_out}" in line
        _, log, result = only_record(records)
        assert result is None and "\nend: failed: out of memory with" in log


def test_another_error_is_no_lack_of_memory(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here("train_gpt2", *tiny("train_gpt2", data, tmp_path))


@pytest.mark.parametrize("capability, dtype", (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")))
def test_what_a_gpu_trains_in(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    args = train_gpt2.parse(["--track=tiny"])
    train_gpt2.resolve(args)
    assert (args.device, args.dtype) == ("cuda", dtype)
    assert train_gpt2.has_bf16(torch.device("cuda", 0)) == (dtype == "bf16")


def test_a_record_never_follows_a_link(data, tmp_path, monkeypatch):
    """Whatever lies in records/ under the run's name before it starts: it takes the next name."""
    (tmp_path / "records").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(train_gpt2.time, "strftime", lambda *_: "2026")
    (tmp_path / "records" / "2026_train_gpt2_x").symlink_to(tmp_path / "elsewhere")
    run_here("train_gpt2", *tiny("train_gpt2", data, tmp_path / "records", "--name", "x"))
    assert (tmp_path / "records" / "2026_train_gpt2_x_2" / "result.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
