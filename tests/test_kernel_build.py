"""Building kernels: every message for what can be missing or wrong, locks, ranks, and what is kept of a build."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_rwkv7
from cuda_build import STAND_IN, find_nvcc
from helpers import ROOT, environment
from train_rwkv7 import KERNELS, Kernel, kernel_library, kernel_sources, load_kernel, obstacle, toolchain

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++")
GXX = shutil.which("g++")


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# What toolchain() finds on faked machines, and what obstacle() says to it. A program that is not named is not there.


@pytest.fixture
def machine(tmp_path, monkeypatch):
    def make(gpus=(("NVIDIA H200", (9, 0)),), torch_cuda="13.0", nvcc="13.0", archs=(75, 80, 90, 100), gxx="12.2.0",
             kind="c++ (Debian 12.2.0-14)", refuses="", home=None):
        for old in (tmp_path / "bin").glob("*"):
            old.unlink()
        if gxx:
            program(tmp_path / "bin" / "c++", f'echo "{kind} {gxx}"')
        if nvcc:
            lines = " ".join(f"sm_{arch}" for arch in archs)
            program(tmp_path / "bin" / "nvcc", f"""case "$*" in
                *--version*) echo "Cuda compilation tools, release {nvcc}, V{nvcc}.88";;
                *--list-gpu-code*) for arch in {lines}; do echo $arch; done;;
                *-E*) echo '{refuses}' >&2; exit 1;;
            esac""")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.delenv("CUDA_HOME", raising=False)
        if home:
            monkeypatch.setenv("CUDA_HOME", str(home))
        monkeypatch.setattr(shutil, "which", lambda name, which=shutil.which: None if (
            name.startswith("/usr/local/cuda")) else which(name))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpus[i][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i][1])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "compute_90"])
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
        return toolchain()
    return make


GCC_10 = "#error -- unsupported GNU version! gcc versions later than 10 are not supported! The nvcc flag"
MESSAGES = {
    "no nvcc": (dict(nvcc=None), ["no nvcc (looked in $CUDA_HOME: not set, PATH,", "torch 2.13.0+cu130", "CUDA 13.0",
                                  "CUDA_HOME", "Dockerfile"]),
    "no nvcc in CUDA_HOME": (dict(nvcc=None, home="/nowhere"), ["no nvcc (looked in $CUDA_HOME: /nowhere, PATH, "]),
    "other major version": (dict(nvcc="11.8", torch_cuda="12.4"), ["nvcc is of CUDA 11.8", "wants 12.x", "CUDA_HOME"]),
    "torch without CUDA": (dict(torch_cuda=None), ["torch 2.13.0+cu130 was built without CUDA", "NVIDIA GPU"]),
    "gcc too new": (dict(gxx="11.4.0", nvcc="11.5", torch_cuda="11.8", refuses=GCC_10, archs=(80, 90)),
                    ["nvcc 11.5 supports gcc <= 10, found gcc 11", "CC=gcc-10 CXX=g++-10"]),
    "clang nvcc refuses": (dict(kind="Debian clang version", gxx="25.0.1", refuses="#error -- unsupported clang"),
                           ["nvcc 13.0: unsupported clang", "CXX"]),
    "gcc too old": (dict(gxx="9.4.0", kind="g++ (Ubuntu 9.4.0-1)"), ["9.4.0 knows no C++20", "gcc 10 or newer"]),
    "no compiler": (dict(gxx=None), ["no C++ compiler (c++ not found)", "g++"]),
    "GPU too old": (dict(gpus=[("Tesla T4", (7, 5))]), ["Tesla T4 (sm_75) has no bf16", "sm_80", "--dtype fp32"]),
    "second GPU too old": (dict(gpus=[("H200", (9, 0)), ("Tesla T4", (7, 5))]), ["Tesla T4", "CUDA_VISIBLE_DEVICES"]),
    "GPU too new": (dict(gpus=[("RTX 5090", (12, 0))]), ["RTX 5090 is sm_120; nvcc 13.0 stops at sm_100",
                                                        "yours is for sm_80, sm_90"]),
    "no GPU": (dict(gpus=()), ["torch sees no CUDA device", "nvidia-smi"]),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(machine, case):
    changes, parts = MESSAGES[case]
    lines = obstacle(machine(**changes), "cuda").splitlines()
    assert len(lines) == 3 and lines[0].startswith("wkv7 cuda not built: ") and "--kernel torch" in lines[2], lines
    assert all(part in " ".join(lines[:2]) for part in parts), lines
    assert all(len(line) < 160 for line in lines)


def test_nothing_in_the_way(machine):
    facts = machine()
    assert obstacle(facts, "cuda") is None and obstacle(facts, "cpu") is None
    assert facts["nvcc"].endswith("bin/nvcc") and (facts["cuda"], facts["gcc"]) == ("13.0", 12)
    assert facts["devices"] == [dict(name="NVIDIA H200", arch=90)] and facts["nvcc_archs"] == [75, 80, 90, 100]
    assert machine(home="/nowhere")["nvcc"] == facts["nvcc"]
    assert obstacle(machine(nvcc="13.2", torch_cuda="13.0"), "cuda") is None, "minor differences are fine"
    assert obstacle(machine(gpus=(), nvcc=None, torch_cuda=None), "cpu") is None, "the CPU kernel needs none of it"
    assert "no C++ compiler" in obstacle(machine(gxx=None), "cpu")
    assert "c++ not found" in obstacle(machine(gxx=None), "cpu")


def test_a_missing_file(machine, monkeypatch):
    monkeypatch.setitem(KERNELS, "gone", Kernel(("wkv7/wkv7_gone.cu",), "cuda", "--gone", (64,)))
    message = obstacle(machine(), "gone")
    assert "wkv7_gone.cu is missing" in message and "git checkout" in message
    with pytest.raises(ValueError, match="wkv7_gone.cu is missing"):
        load_kernel("gone", required=True)


@pytest.mark.parametrize("flags, parts", [
    (dict(kernel="cuda", device="cpu"), ["--kernel cuda runs on a GPU only", "--device cuda", "--kernel torch"]),
    (dict(fast_cuda=True, device="cpu"), ["--fast_cuda runs on a GPU only"]),
    (dict(kernel="cpu"), ["--kernel cpu runs on a CPU only", "--kernel torch"]),
    (dict(fast_cuda=True, headsz=32), ["--headsz 32: --fast_cuda has no kernel for it. Allowed: 64, 128."]),
    (dict(fast_cuda=True, headsz=100), ["--headsz 100: 128 is not a multiple of 100. Allowed: 64, 128."]),
    (dict(fast_cuda=True, headsz=16, width=96), ["Allowed: 64, 128, of which --width is a multiple."]),
    (dict(kernel="cuda", headsz=16), ["--headsz 16: --kernel cuda has no kernel for it", "Allowed: 32, 64, 128."]),
    (dict(fast_cuda=True, dtype="fp32"), ["--fast_cuda computes in bf16", "--kernel cuda"]),
    (dict(wind_cuda=True, headsz=128), ["--headsz 128: --wind_cuda has no kernel for it. Allowed: 64."]),
    (dict(wind_cuda=True, dtype="fp32"), ["--wind_cuda computes in bf16"]),
    (dict(wind_cuda=True, fast_cuda=True), ["--fast_cuda and --wind_cuda exclude each other"]),
])
def test_flags_that_do_not_fit(flags, parts):
    sound = dict(track="tiny", device="cuda", width=128, headsz=64, dtype="bf16")
    args = train_rwkv7.Hyperparameters(**{**sound, **flags})
    with pytest.raises(ValueError) as refused:
        train_rwkv7.build_model(args)
    said = str(refused.value)
    assert "\n" not in said and all(part in said for part in parts), said


# What a library depends on


def test_libraries_are_told_apart(tmp_path, monkeypatch, machine):
    shutil.copytree(ROOT / "cuda", tmp_path / "cuda", ignore=shutil.ignore_patterns("build"))
    monkeypatch.setattr(train_rwkv7, "CUDA_FOLDER", tmp_path / "cuda")
    machine()
    seen = [kernel_library("cuda")]
    assert seen == [kernel_library("cuda")] and seen[0].parent == tmp_path / "cuda" / "build"
    sources = kernel_sources("cuda")
    for source in sources:
        with source.open("a") as file:
            file.write("// changed\n")
        seen.append(kernel_library("cuda"))
    a100, h200 = ("A100", (8, 0)), ("H200", (9, 0))
    for change in (dict(gpus=[a100]), dict(gpus=[a100, h200]), dict(torch_cuda="12.8")):
        machine(**change)
        seen.append(kernel_library("cuda"))
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    seen.append(kernel_library("cuda"))
    assert len(set(seen)) == len(seen) == 1 + len(sources) + 3 + 1
    assert {"primitives.cuh", "wkv7.h", "wkv7_binding.cpp"} < {source.name for source in sources}
    machine(nvcc=None, gxx=None)
    assert kernel_library("cuda") == seen[len(sources)], "what compilers there are does not matter to what is built"


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_included_file_is_named(kernel):
    """The list of a kernel's files is what its library depends on and what a record keeps: no more, no less."""
    named = {path.resolve() for path in kernel_sources(kernel)}
    included = {(path.parent / name).resolve() for path in named
                for name in re.findall(r'^#include "(.*)"', path.read_text(), re.M)}
    assert included == {path for path in named if path.suffix in (".h", ".cuh")}


# Builds, of a copy of the script in a folder whose name has spaces; so has torch's.


@pytest.fixture
def copy(tmp_path):
    root = tmp_path / "a path with spaces"
    for source in {Path(train_rwkv7.__file__).absolute(), *kernel_sources("cpu"), *kernel_sources("cuda")}:
        target = root / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    (tmp_path / "site packages").mkdir()
    (tmp_path / "site packages" / "torch").symlink_to(Path(torch.__file__).parent)
    program(tmp_path / "quick" / "c++", f'exec "{GXX}" "$@" -O0')
    program(tmp_path / "quick" / "ninja", "touch ninja_was_called; exit 1")
    return root


LOAD = """
import os, pathlib, sys, torch, train_rwkv7
before = os.path.exists("cuda/build")
kernel = train_rwkv7.load_kernel("cpu")
y = train_rwkv7.wkv7(*(torch.ones(1, 2, 1, 16) for _ in range(6)), kernel=kernel)
assert "torch.utils.cpp_extension" not in sys.modules
print(kernel, train_rwkv7.load_kernel("cpu"), before, y[0, 0, 0, 0].item())
"""
SELF_TEST = r"wkv7 cpu self-test: y \d\.\de-7, dr .*, dw .*, dk .*, dv .*, da .*, db \d\.\de-7 \(limit 2.0e-6\) ok\n"


def start(root, code=LOAD, **more):
    path = os.pathsep.join((str(root), str(root.parent / "site packages")))
    quick = f"{root.parent / 'quick'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, text=True, start_new_session=True,
                            env=environment(PYTHONDONTWRITEBYTECODE="1", **{"PYTHONPATH": path, "PATH": quick, **more}),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, err
    return out.split(), err


def wait_for(what, process):
    deadline = time.monotonic() + 60
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def slow_compiler(copy):
    """A c++ that waits for the file `go`."""
    program(copy.parent / "quick" / "c++", f"""case "$*" in *--version*) exec "{GXX}" "$@";; esac
        touch "{copy.parent}/called"; while [ ! -e "{copy.parent}/go" ]; do sleep 0.05; done; exec "{GXX}" "$@" -O0""")
    return lambda: (copy.parent / "called").exists()


def test_a_build_and_what_a_killed_one_leaves(copy):
    build, called = copy / "cuda" / "build", slow_compiler(copy)
    first = start(copy)
    wait_for(called, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (lock,), (work,) = build.glob("*.lock"), [path for path in build.iterdir() if path.is_dir()]
    old = time.time() - 41 * 60
    os.utime(lock, (old, old))
    (copy.parent / "go").touch()

    out, err = finish(start(copy))
    assert out == ["cpu", "cpu", "True", "16.0"]
    assert re.fullmatch(rf"wkv7: a killed build left {re.escape(str(lock))} \(age 41 min, process {first.pid} on "
                        rf"{re.escape(platform.node())} not running\). Removing it.\n{SELF_TEST}", err), err
    (library,) = build.iterdir()
    assert library.suffix == ".so" and not (copy / "ninja_was_called").exists()
    # And now it is built, no compiler is needed.
    assert finish(start(copy, CXX="/nonexistent")) == (["cpu", "cpu", "True", "16.0"], "")
    assert list(build.iterdir()) == [library]


def test_two_runs_at_once(copy):
    called = slow_compiler(copy)
    first = start(copy)
    wait_for(called, first)
    second = start(copy)
    line = second.stderr.readline()
    assert line.startswith("wkv7: waiting for another process that builds the kernel"), line
    (copy.parent / "go").touch()
    (out, err), (out_2, err_2) = finish(first), finish(second)
    assert out[0] == out_2[0] == "cpu" and out[3] == out_2[3] == "16.0"
    assert re.fullmatch(SELF_TEST, err) and err_2 == ""
    assert [path.suffix for path in (copy / "cuda" / "build").iterdir()] == [".so"]


RANKS = """
import os, sys, torch.distributed as dist, train_rwkv7
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + os.path.abspath("meet" + sys.argv[1]), rank=rank, world_size=2)
print(train_rwkv7.load_kernel("cpu"))
dist.destroy_process_group()
"""


def test_ranks(copy):
    def ranks(run, **more):
        code = RANKS.replace("sys.argv[1]", repr(run))
        both = [start(copy, code, RANK=str(i), LOCAL_RANK=str(i), **more) for i in range(2)]
        return [finish(process) for process in both]
    waiting = "rank 1: waiting for rank 0 to build wkv7 (usually 40-90 s)\n"
    (out, err), (out_1, err_1) = ranks("a", CXX="/nonexistent")
    assert out == out_1 == ["torch"] and "no C++ compiler (/nonexistent not found)" in err and err_1 == waiting
    (out, err), (out_1, err_1) = ranks("b")
    assert out == out_1 == ["cpu"] and re.fullmatch(SELF_TEST, err) and err_1 == waiting
    assert ranks("c", CXX="/nonexistent") == [(["cpu"], "")] * 2, "nothing to build, nothing to wait for"


def test_no_compiler_or_a_broken_one_gives_the_torch_form(copy):
    code = """
import os, torch, train_rwkv7
def load(): print(train_rwkv7.load_kernel("cpu"), flush=True)
path = os.environ["PATH"]
os.environ["CXX"] = "/nonexistent/c++"; load()
del os.environ["CXX"]; os.environ["PATH"] = ""; load()
os.environ["PATH"] = path
with open("cuda/wkv7/wkv7_cpu.cpp", "a") as source: source.write("this is no C++;")
load()
try: train_rwkv7.load_kernel("cpu", required=True)
except ValueError as error: print(len(str(error).splitlines()))
print(train_rwkv7.wkv7(*(torch.ones(1, 2, 1, 16) for _ in range(6)))[0, 0, 0, 0].item())
"""
    out, err = finish(start(copy, code))
    assert out == ["torch", "torch", "torch", "5", "16.0"]
    lines = err.splitlines()
    assert len(lines) == 4 + 4 + 6, err
    assert lines[0] == "wkv7 cpu not built: no C++ compiler (/nonexistent/c++ not found)." and "CXX" in lines[1]
    assert "no C++ compiler (c++ not found)" in lines[4]
    assert lines[8] == "wkv7 cpu not built: the compiler failed." and "doctor.py" in lines[9]
    assert "error: " in lines[11] and "this" in lines[11]
    assert [line for line in lines if line == "wkv7: going on with --kernel torch"] == lines[3::4][:2] + lines[-1:]
    log = Path(re.fullmatch("full log: (.*)", lines[12])[1])
    assert "this is no C++" in log.read_text()
    assert list((copy / "cuda" / "build").iterdir()) == [log]


def test_a_kernel_that_computes_something_else_is_refused(copy):
    source = copy / "cuda" / "wkv7" / "wkv7_cpu.cpp"
    text = source.read_text()
    assert text.count("0.60653065971263342f") == 1
    source.write_text(text.replace("0.60653065971263342f", "0.6065f"))
    out, err = finish(start(copy))
    assert out[0] == "torch", (out, err)
    assert re.match(r"wkv7 cpu self-test: y .* \(limit 2.0e-6\): .*dw.* wrong, the kernel is refused.\n", err), err
    assert not list((copy / "cuda" / "build").glob("*"))


def test_a_checkout_that_cannot_be_written(copy):
    (copy / "cuda" / "build").write_text("a file where the folder should be")
    scratch = copy.parent / "tmp"
    scratch.mkdir()
    out, err = finish(start(copy, TMPDIR=str(scratch)))
    assert out == ["cpu", "cpu", "True", "16.0"] and re.fullmatch(SELF_TEST, err)
    assert finish(start(copy, TMPDIR=str(scratch), CXX="/nonexistent")) == (["cpu", "cpu", "True", "16.0"], "")
    (folder,) = scratch.glob("*/kernels")
    assert [path.suffix for path in folder.iterdir()] == [".so"] and folder.parent.stat().st_mode & 0o777 == 0o700


GPU = """
import torch, train_rwkv7
torch.version.cuda = "13.0"
torch.cuda.device_count, torch.cuda.get_device_name = lambda: 2, lambda i: "H200"
torch.cuda.get_device_capability = lambda i: ((9, 0), (8, 0))[i]
about, test = train_rwkv7.KERNELS["cuda"], train_rwkv7.self_test
about.head_sizes = (64,)
def self_test(kernel):
    about.device = "cpu"
    try: return test(kernel)
    finally: about.device = "cuda"
train_rwkv7.self_test = self_test
print(train_rwkv7.load_kernel("cuda", required=True))
about.device = "cpu"
print(train_rwkv7.wkv7(*(torch.ones(1, 2, 1, 64) for _ in range(6)), kernel="cuda")[0, 0, 0, 0].item())
"""


def test_a_cuda_kernel_with_an_nvcc_for_cpus(copy):
    """The whole way of a CUDA kernel: what stands in for nvcc compiles it for tests/cuda_on_cpu."""
    program(copy.parent / "quick" / "nvcc", f"""
        torch="-L{Path(torch.__file__).parent / 'lib'}"
        case "$*" in
            *--version*) echo "Cuda compilation tools, release 13.1, V13.1.0"; exit;;
            *--list-gpu-code*) echo sm_80; echo sm_90; exit;;
            *" -E "*) exit;;
            *-shared*) echo "$*" >> calls; o=""
                for x in "$@"; do case "$x" in *.o) o="$o${{o:+|}}$x";; esac; out="$x"; done
                IFS="|"; exec "{GXX}" -std=c++20 -fPIC -shared -I "{STAND_IN}" $o "{STAND_IN}/cuda_on_cpu.cpp" \\
                    "$torch" -ltorch_cpu -o "$out";;
        esac
        echo "$*" >> calls
        while [ $# -gt 0 ]; do case "$1" in -c) in="$2";; -o) out="$2";; esac; shift; done
        exec "{GXX}" -std=c++20 -O0 -fPIC -DCUDA_ON_CPU -DHEAD_SIZES=64 -I "{STAND_IN}" -c -x c++ "$in" -o "$out"
        """)
    program(copy.parent / "quick" / "c++", f'exec "{GXX}" -DCUDA_ON_CPU -I "{STAND_IN}" "$@" -O0')
    out, err = finish(start(copy, GPU))
    assert out == ["cuda", "64.0"]
    assert re.fullmatch(r"wkv7 cuda self-test: y \d\.\de-3, .*, db \d\.\de-3 \(limit 2.5e-3 to 4.0e-3\) ok\n", err), err
    calls = (copy / "calls").read_text()
    assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a" in calls and "-shared" in calls
    (library,) = (copy / "cuda" / "build").iterdir()
    program(copy.parent / "quick" / "nvcc", "exit 1")
    assert finish(start(copy, GPU)) == (["cuda", "64.0"], ""), "built once"


@pytest.mark.skipif(not find_nvcc(), reason="no nvcc")
def test_nvcc_compiles_and_links_below_a_path_with_spaces(tmp_path, monkeypatch):
    """For a GPU that is not here; with a torch without CUDA, too."""
    monkeypatch.setattr(train_rwkv7, "kernel_flags", lambda kernel: (["-O1", "-DHEAD_SIZES=32"], [90]))
    root = tmp_path / "with spaces"
    shutil.copytree(ROOT / "cuda", root / "cuda", ignore=shutil.ignore_patterns("build"))
    monkeypatch.setattr(train_rwkv7, "CUDA_FOLDER", root / "cuda")
    facts = toolchain()
    made = train_rwkv7.compile_kernel("cuda", facts, [90], root).read_bytes()
    assert made.startswith(b"\x7fELF") and b"cuda_forward(Tensor r" in made and b"sm_90a" in made
    (root / "cuda" / "wkv7" / "wkv7_cuda.cu").write_text("void f() { this is no CUDA; }\n")
    with pytest.raises(train_rwkv7.KernelError, match=r"wkv7_cuda.cu\(1\): error: "):
        train_rwkv7.compile_kernel("cuda", facts, [90], root)
