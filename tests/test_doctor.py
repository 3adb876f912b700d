"""cuda/doctor.py: on this machine, in a Python without torch, on damaged data; what it advises where a thing lacks."""

import json
import os
import re
import subprocess
import sys

import numpy
import pytest
import torch

import train_rwkv7
from helpers import ROOT, environment, load_program, write_shard
from test_build import program

doctor = load_program("cuda/doctor.py")


def process(python=(), **env):
    command = [sys.executable, *python, str(ROOT / "cuda" / "doctor.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment(**env))


def test_it_runs_here(tmp_path):
    """With a driver that torch is not for. A folder of the user's in HOME must not show, nor the repository's path."""
    program(tmp_path / "nvidia-smi", """case "$*" in
        *query*) echo "550.54, NVIDIA H100 80GB HBM3, 9.0, 81559, 81000"; echo "550.54, GPU, [N/A], [N/A], [N/A]" ;;
        *) echo "| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4 |" ;; esac""")
    done = process(HOME="/data/somebody", PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and done.stderr == "" and done.stdout.count("\nnext ") == 1, done
    lines = dict(re.findall(r"^(\S+(?: \S+)?)\s{2,}(.*)$", done.stdout, re.M))
    assert lines["python"] == "%d.%d.%d" % sys.version_info[:3] and lines["numpy"] == numpy.__version__
    assert lines["torch"].startswith(torch.__version__) and "sees 0 GPUs" in lines["torch"]
    assert {"system", "nvcc", "C++", "fineweb", "tiny", "cuda/build", "records"} <= set(lines)
    assert any(name.startswith("wkv7 ") for name in lines)
    assert lines["GPU 0"] == "NVIDIA H100 80GB HBM3, sm_90, 79.6 GiB (79.1 GiB free)"
    assert lines["GPU 1"] == "GPU, sm_[N/A], ? (? free)"
    assert lines["driver"] == "550.54, for CUDA up to 12.4"
    assert lines["to mend"].startswith("there is a GPU, but torch does not see it")
    assert str(ROOT) not in done.stdout


def test_its_facts_as_json(capsys):
    doctor.main(["--json"])
    out = capsys.readouterr().out
    facts = json.loads(out)
    assert facts["next"] and facts["writable"]["records"] is True and facts["memory"]["total"] > 2**28
    assert facts["data"][0]["need"] == 3200 * 512 * 1024 + 1
    for track, row in zip(("fineweb", "tiny"), facts["data"]):
        args = train_rwkv7.parse([f"--track={track}"])
        need = args.steps * args.bsz * args.seq_len + 1
        assert (row["track"], row["folder"], row["need"]) == (track, args.data, -(-need // args.epochs))
    assert str(ROOT) not in out
    for row in facts["kernels"]:
        assert row["state"] in ("built", "can be built", "cannot be built") and row["flag"], row
        assert bool(row["why"]) == (row["state"] == "cannot be built"), row


def test_without_torch_or_any_package():
    """A bare Python: what the system's own would be."""
    done = process(python=("-S", "-E"))
    assert done.returncode == 1 and done.stderr == "", done.stderr
    assert "cannot be imported (ModuleNotFoundError: No module named 'torch')" in done.stdout
    assert "to mend          this Python lacks torch, numpy, tqdm" in done.stdout
    assert re.search(r"^next +\./run_rwkv7\.sh --track tiny .*makes \.venv", done.stdout, re.M)
    assert re.search(r"^kernels +cuda/build.py cannot tell \(.* has no torch\.\)$", done.stdout, re.M)


def test_nvcc_is_found_where_it_is_said_to_be_and_nothing_fails_without(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    which = doctor.build.shutil.which  # this machine's own nvcc is found whatever PATH says
    monkeypatch.setattr(doctor.build.shutil, "which", lambda name: None if name.startswith("/usr/") else which(name))
    for name in ("CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.tools() == {"nvcc": {}, "C++": {}} and doctor.driver() == {}
    program(tmp_path / "path" / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    program(tmp_path / "path" / "c++", "echo 'c++ (GCC) 9.1.0'; echo more")
    program(tmp_path / "home" / "bin" / "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.1'")
    assert doctor.tools()["nvcc"]["version"] == "11.8" and doctor.tools()["C++"]["version"] == "c++ (GCC) 9.1.0"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert doctor.tools()["nvcc"] == dict(path=str(tmp_path / "home" / "bin" / "nvcc"), version="12.4")


def machine(gpu=True, built_for="CUDA 12.4", why=(), **fineweb):
    """Facts of a machine on which all is well, but for what is said."""
    gpus = [dict(name="NVIDIA H100", sm="sm_90", total=80 * 2**30, free=2**30)] if gpu else []
    data = dict(faults=[], enough=True, need=100, train=dict(shards=1, tokens=200), val=dict(shards=1, tokens=20),
                manifest="none", make="python data/pydocs.py")
    kernel = dict(operator="wkv7", why=list(why), state="cannot be built" if why else "built")
    return dict(
        date="2026-01-02", commit="abc1234", platform="Linux", python="3.11.7", cores=16,
        memory=dict(total=2**35, free=None), disk=dict(total=2**40, free=2**39),
        packages={**dict.fromkeys(doctor.PACKAGES, "1.0"), "torch": "2.13.0"}, tools={},
        driver=dict(version="550.54", cuda="12.4", gpus=gpus) if gpu else {},
        torch=dict(built_for=built_for, sees=gpus if built_for != "CPUs only" else [], obstacle=""),
        kernels=[dict(kernel, kernel="cuda", flag="--kernel cuda"), dict(kernel, kernel="fast", flag="--fast_cuda")],
        data=[{**data, "track": "fineweb", "folder": "data/fineweb10B", "make": "make it", **fineweb},
              dict(data, track="tiny", folder="data/pydocs")],
        writable={"cuda/build": True, "records": True}, cuda_visible_devices=None)


@pytest.mark.parametrize("lacking, wrong, command", (
    (dict(), "", "./run_rwkv7.sh --fast_cuda"),
    (dict(gpu=False), "", "./run_rwkv7.sh --track tiny"),
    (dict(built_for="CPUs only"), "torch 2.13.0 was built for CPUs only", "pip install --force-reinstall torch"),
    (dict(why=["no nvcc", "Mend it."]), "wkv7 cuda: no nvcc", "Mend it. Or: ./run_rwkv7.sh --kernel torch"),
    (dict(enough=False), "data/fineweb10B has 200 of 100 train tokens", "make it     (or now: ./run_rwkv7.sh"),
    (dict(faults=["x.bin is truncated"]), "data/fineweb10B: x.bin is truncated", "make it")))
def test_advice(lacking, wrong, command):
    facts = machine(**lacking)
    said = doctor.advice(facts)
    assert command in said[1], said
    assert wrong in said[0] and bool(wrong) == bool(said[0]), said
    page = doctor.page(facts)
    assert page.splitlines()[-1] == f"{'next':16} {said[1]}" and ("to mend" in page) == bool(wrong)


def test_damaged_shards_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    given = dict(data="data/fineweb10B", steps=10, bsz=4, seq_len=8, epochs=1)
    facts = doctor.data("fineweb", given)
    assert facts["train"] == dict(shards=0, tokens=0) and not facts["enough"] and facts["faults"] == []
    assert facts["make"] == "python data/cached_fineweb10B.py 1" and facts["need"] == 321
    folder = tmp_path / "data" / "fineweb10B"
    write_shard(folder / "f_train_000001.bin", range(200))
    write_shard(folder / "f_train_000002.bin", range(150))
    write_shard(folder / "f_val_000000.bin", range(30))
    (folder / "manifest.json").write_text(json.dumps(dict(shards=[dict(name="f_train_000002.bin", tokens=150)])))
    facts = doctor.data("fineweb", given)
    assert facts["train"] == dict(shards=2, tokens=350) and facts["enough"] and facts["faults"] == []
    os.truncate(folder / "f_train_000001.bin", 1100)
    write_shard(folder / "f_train_000002.bin", range(140))
    write_shard(folder / "f_val_000000.bin", range(30), magic=7)
    faults = doctor.data("fineweb", given)["faults"]
    assert faults[0].startswith("f_train_000001.bin is damaged: 200 tokens by its header, 1100 bytes")
    assert faults[1] == "f_val_000000.bin is no shard (magic 7, version 1)"
    assert any("f_train_000002.bin has 140 tokens, by the manifest 150" in fault for fault in faults)


def test_nothing_says_who_or_where(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: "/data/people/ann")
    said = f"{ROOT}/cuda/build /data/people/ann/cuda-12/bin/nvcc '/home/bob/x' /Users/eve/y /usr/bin/g++"
    assert doctor.cleaned(dict(a=[said, 3])) == dict(a=["./cuda/build ~/cuda-12/bin/nvcc '~/x' ~/y /usr/bin/g++", 3])
