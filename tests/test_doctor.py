"""cuda/doctor.py: on this machine, and on machines that lack a thing or two; each of those is faked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import ROOT, environment, load_program, write_shard

doctor = load_program("cuda/doctor.py")


def process(*flags, python=(), **env):
    command = [sys.executable, *python, ROOT / "cuda" / "doctor.py", *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100, env=environment(**env))


def program(folder, name, *lines):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
    (folder / name).chmod(0o755)


SMI = """case "$*" in *query*) echo "550.54, NVIDIA H100 80GB HBM3, 9.0, 81559, 81000" ;;
*) echo "| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4 |" ;; esac"""


def test_here(tmp_path):
    """A folder of the user's in HOME must not show, nor the repository's own path."""
    done = process(HOME="/data/somebody", CUDA_VISIBLE_DEVICES="")
    assert done.stderr == "" and done.stdout.count("\nnext ") == 1, done
    lines = dict(re.findall(r"^(\S+(?: \S+)?)\s{2,}(.*)$", done.stdout, re.M))
    import numpy
    import torch
    assert lines["python"] == "%d.%d.%d" % sys.version_info[:3] and lines["numpy"] == numpy.__version__
    assert lines["torch"].startswith(torch.__version__) and "sees 0 GPUs" in lines["torch"]
    assert {"system", "nvcc", "C++", "driver", "fineweb", "tiny", "cuda/build", "records"} <= set(lines)
    assert any(name.startswith("wkv7 ") for name in lines)
    assert str(ROOT) not in done.stdout


def test_json(capsys):
    doctor.main(["--json"])
    out = capsys.readouterr().out
    facts = json.loads(out)
    assert facts["next"] and facts["data"][0]["track"] == "fineweb" and facts["writable"]["records"] is True
    assert facts["data"][0]["need"] == 3200 * 512 * 1024 + 1 and facts["memory"]["total"] > 2**28
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


def test_without_a_tool(tmp_path, monkeypatch):
    """An empty PATH: nothing is found, nothing fails."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "NVCC_PLACES", ())
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.tools() == {"nvcc": {}, "C++": {}} and doctor.driver() == {}
    assert doctor.shell("git", "--version") == ""


def test_tools_are_found_where_they_are_said_to_be(tmp_path, monkeypatch):
    program(tmp_path / "path", "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    program(tmp_path / "path", "c++", "echo 'c++ (GCC) 9.1.0'; echo more")
    program(tmp_path / "path", "clang++-17", "echo 'clang version 17.0.1'")
    (tmp_path / "home" / "bin").mkdir(parents=True)
    program(tmp_path / "home" / "bin", "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.1'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/bin:/usr/bin")
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    found = doctor.tools()
    assert found["nvcc"] == dict(path=str(tmp_path / "path" / "nvcc"), version="11.8")
    assert found["C++"]["version"] == "c++ (GCC) 9.1.0"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", "clang++-17 -m64")
    assert doctor.tools()["nvcc"] == dict(path=str(tmp_path / "home" / "bin" / "nvcc"), version="12.4")
    assert doctor.tools()["C++"]["version"] == "clang version 17.0.1"


def test_driver_and_gpus_without_torch(tmp_path, monkeypatch):
    program(tmp_path, "nvidia-smi", SMI)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert doctor.driver() == dict(version="550.54", cuda="12.4", gpus=[dict(
        name="NVIDIA H100 80GB HBM3", sm="sm_90", total=81559 * 2**20, free=81000 * 2**20)])
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9")
    assert doctor.driver() == {}
    program(tmp_path, "nvidia-smi", "echo '550.54, GPU, [N/A], [N/A], [N/A]'")
    assert doctor.driver()["gpus"] == [dict(name="GPU", sm="sm_[N/A]", total=None, free=None)]


def test_a_gpu_that_a_torch_for_cpus_does_not_see(tmp_path):
    """The driver is there, torch is not for it: here the CPU build, or any that is told to see nothing."""
    program(tmp_path, "nvidia-smi", SMI)
    done = process(PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1, done.stdout
    assert "GPU 0            NVIDIA H100 80GB HBM3, sm_90, 79.6 GiB (79.1 GiB free)" in done.stdout
    assert "driver           550.54, for CUDA up to 12.4" in done.stdout
    assert "to mend          there is a GPU, but torch does not see it" in done.stdout


def test_what_torch_says():
    def no_driver():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore lines")
    cuda = SimpleNamespace(is_available=lambda: False, get_arch_list=lambda: ["sm_90"], init=no_driver)
    facts = doctor.torch_facts(SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0")))
    assert facts["sees"] == [] and facts["built_for"] == "CUDA 13.0" and facts["architectures"] == ["sm_90"]
    assert facts["obstacle"] == "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."
    cuda = SimpleNamespace(
        is_available=lambda: True, get_arch_list=lambda: ["sm_90"], device_count=lambda: 2,
        get_device_properties=lambda i: SimpleNamespace(name=f"GPU {i}", major=9, minor=i, total_memory=i))
    facts = doctor.torch_facts(SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0")))
    assert facts["sees"][1] == dict(name="GPU 1", sm="sm_91", total=1, free=None) and facts["obstacle"] == ""
    page = doctor.page(machine(driver={}, torch=facts))
    assert "GPU 1            GPU 1, sm_91, 0.0 GiB (? free)" in page and "built for CUDA 13.0, sees 2 GPUs" in page


GPU = dict(version="550.54", cuda="12.4", gpus=[dict(name="NVIDIA H100", sm="sm_90", total=80 * 2**30, free=2**30)])
FOLDER = dict(faults=[], enough=True, need=100, train=dict(shards=1, tokens=200), val=dict(shards=1, tokens=20),
              manifest="none")


def machine(**changes):
    """Facts of a machine on which all is well, with changes."""
    def kernel(name, why=""):
        flag = "--fast_cuda" if name == "fast" else f"--kernel {name}"
        why = [why, f"Mend {why}."] if why else []
        return dict(operator="wkv7", kernel=name, flag=flag, why=why, state="cannot be built" if why else "built")

    facts = dict(
        date="2026-01-02", commit="abc1234", platform="Linux", python="3.11.7", cores=16,
        memory=dict(total=2**35, free=None), disk=dict(total=2**40, free=2**39),
        packages={**dict.fromkeys(doctor.PACKAGES, "1.0"), "torch": "2.13.0"},
        tools=dict(nvcc=dict(path="/usr/local/cuda/bin/nvcc", version="12.4")), driver=GPU,
        torch=dict(built_for="CUDA 12.4", sees=GPU["gpus"], obstacle=""),
        kernels=[kernel("torch"), kernel("cuda"), kernel("fast")],
        data=[dict(FOLDER, track="fineweb", folder="data/fineweb10B", make="python data/cached_fineweb10B.py 17"),
              dict(FOLDER, track="tiny", folder="data/pydocs", make="python data/pydocs.py")],
        writable={"cuda/build": True, "records": True}, cuda_visible_devices=None)
    for name, value in changes.items():
        if name == "blocked":
            facts["kernels"] = [kernel("torch"), *(kernel(one, value) for one in ("cuda", "fast"))]
        elif name == "fast_blocked":
            facts["kernels"][2] = kernel("fast", value)
        elif name in ("fineweb", "tiny"):
            facts["data"][name == "tiny"].update(value)
        else:
            facts[name] = {**facts[name], **value} if isinstance(value, dict) and value else value
    return facts


BLIND = dict(sees=[])
ADVICE = {
    "all is well": (dict(), "", "./run_rwkv7.sh --fast_cuda"),
    "no fast kernel": (dict(fast_blocked="sm_80 needed"), "", "./run_rwkv7.sh --kernel cuda"),
    "no nvcc": (dict(blocked="no nvcc"), "wkv7 cuda: no nvcc",
                "Mend no nvcc. Or: ./run_rwkv7.sh --kernel torch"),
    "no GPU": (dict(driver={}, torch=BLIND), "", "./run_rwkv7.sh --track tiny"),
    "no GPU, nvcc missing too": (dict(driver={}, torch=BLIND, blocked="no nvcc"), "", "--track tiny"),
    "no GPU, damaged corpus": (dict(driver={}, torch=BLIND, tiny=dict(faults=["a.bin is damaged"])),
                               "data/pydocs: a.bin is damaged", "python data/pydocs.py"),
    "torch without CUDA": (dict(torch=dict(sees=[], built_for="CPUs only")), "torch 2.13.0 was built for CPUs only",
                           "pip install --force-reinstall torch"),
    "hidden": (dict(torch=BLIND, cuda_visible_devices=""), "CUDA_VISIBLE_DEVICES='' hides it",
               "unset CUDA_VISIBLE_DEVICES"),
    "old driver": (dict(torch=dict(sees=[], built_for="CUDA 13.0", obstacle="driver too old")), "driver too old",
                   "driver 550.54 serves CUDA up to 12.4, torch is built for CUDA 13.0"),
    "no shards": (dict(fineweb=dict(enough=False)), "data/fineweb10B has 200 of 100 train tokens",
                  "python data/cached_fineweb10B.py 17"),
    "damaged shards": (dict(fineweb=dict(faults=["x.bin is truncated"])), "x.bin is truncated", "cached_fineweb10B.py"),
    "records closed": (dict(writable={"records": False}), "records/ cannot be written", "--records"),
    "no numpy": (dict(packages={"numpy": "cannot be imported (x)"}), "this Python lacks numpy", "makes .venv"),
    "kernels unknown": (dict(kernels="cuda/build.py cannot tell (x)"), "", "--kernel torch"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice(case):
    changes, wrong, command = ADVICE[case]
    facts = machine(**changes)
    said = doctor.advice(facts)
    assert command in said[1], said
    assert wrong in said[0] and bool(wrong) == bool(said[0]), said
    page = doctor.page(facts)
    assert page.splitlines()[-1] == f"{'next':16} {said[1]}" and ("to mend" in page) == bool(wrong)
    json.dumps(facts)


def test_every_kernel_with_its_reason():
    rows = [dict(operator="wkv7", kernel="cpu", flag="--kernel cpu", state="built", why=[]),
            dict(operator="wkv7", kernel="cuda", flag="--kernel cuda", state="cannot be built", why=["no nvcc", "fix"])]
    page, blank = doctor.page(machine(kernels=rows)), " " * 17
    assert f"wkv7 cpu         built\nwkv7 cuda        cannot be built\n{blank}no nvcc\n{blank}fix\n" in page


def test_data(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    given = dict(data="data/fineweb10B", steps=10, bsz=4, seq_len=8, epochs=1)
    facts = doctor.data("fineweb", given)
    assert facts["train"] == dict(shards=0, tokens=0) and not facts["enough"] and facts["faults"] == []
    assert facts["make"] == "python data/cached_fineweb10B.py 1" and facts["need"] == 321
    folder = tmp_path / "data" / "fineweb10B"
    write_shard(folder / "f_train_000001.bin", range(200))
    write_shard(folder / "f_train_000002.bin", range(150))
    write_shard(folder / "f_val_000000.bin", range(30))
    (folder / "manifest.json").write_text(json.dumps(dict(shards=[
        dict(name="f_train_000001.bin", tokens=200), dict(name="f_train_000002.bin", tokens=150)])))
    facts = doctor.data("fineweb", given)
    assert facts["train"] == dict(shards=2, tokens=350) and facts["val"] == dict(shards=1, tokens=30)
    assert facts["enough"] and facts["faults"] == [] and facts["manifest"] == "lists 2 shards"
    os.truncate(folder / "f_train_000001.bin", 1100)
    write_shard(folder / "f_train_000002.bin", range(140))
    write_shard(folder / "f_val_000000.bin", range(30), magic=7)
    (folder / "f_val_000001.bin").write_bytes(b"short")
    faults = doctor.data("fineweb", given)["faults"]
    assert faults[0].startswith("f_train_000001.bin is damaged: 200 tokens by its header, 1100 bytes")
    assert faults[1:3] == ["f_val_000000.bin is no shard (magic 7, version 1)", "f_val_000001.bin is truncated"]
    assert any("f_train_000002.bin has 140 tokens, by the manifest 150" in fault for fault in faults)
    (folder / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in doctor.data("fineweb", given)["faults"][-1]


def test_defaults_are_those_of_the_script():
    import train_rwkv7
    for track, given in doctor.defaults().items():
        args = train_rwkv7.Hyperparameters(track=track)
        for name in ("data", "steps", "bsz", "seq_len", "epochs"):
            assert given[name] == getattr(args, name), (track, name)


def test_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (tmp_path / "records").write_text("a file, not a folder")
    assert doctor.writable("cuda/build") and not doctor.writable("records")
    assert [path.name for path in tmp_path.iterdir()] == ["records"], "something was left behind"


def test_nothing_says_who_or_where(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: "/data/people/ann")
    text = doctor.clean(f"{ROOT}/cuda/build /data/people/ann/cuda-12/bin/nvcc '/home/bob/x' /Users/eve/y /usr/bin/g++")
    assert text == "./cuda/build ~/cuda-12/bin/nvcc '~/x' ~/y /usr/bin/g++"
    assert doctor.cleaned(dict(a=[str(Path("/home/bob/z")), 3])) == dict(a=["~/z", 3])
