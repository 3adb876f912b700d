"""cuda/build.py: what it builds, says and leaves behind, on machines whose compilers and GPUs are programs on PATH."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cuda_build import STAND_IN, find_nvcc
from helpers import ROOT, environment, load_program

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++")
GXX = shutil.which("g++")
TORCH = Path(torch.__file__).parent
build = load_program("cuda/build.py")
JUDGED = r"wkv7 cpu built; against float64 y \d\.\de-7, dr .*, dw .*, db \d\.\de-7 \(limits 2.0e-6 to 2.0e-6\) ok\n"


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


class Machine:
    """A checkout with build.py's sources alone, in a folder with a space in its name; a bin/ in front of PATH; if asked
    to, a torch that says what CUDA it was built for."""

    def __init__(self, folder):
        self.root, self.bin, self.packages = folder / "a checkout", folder / "bin", folder / "site packages"
        for operator, kernel in build.KERNELS:
            for path in build.sources(operator, kernel):
                target = self.root / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        self.build = self.root / "cuda" / "build"
        program(self.bin / "c++", f'exec "{GXX}" "$@" -O0')

    def torch(self, cuda):
        folder = self.packages / "torch"
        if not folder.exists():
            folder.mkdir(parents=True)
            for path in TORCH.iterdir():
                (folder / path.name).symlink_to(path)
            (folder / "version.py").unlink()
        (folder / "version.py").write_text(f"__version__ = '2.13.0+fake'\ncuda = {cuda!r}\nhip = xpu = rocm = None\n"
                                           "debug = False\ngit_version = ''\n")

    def gpus(self, *lines):
        program(self.bin / "nvidia-smi", "\n".join(f"echo '{line}'" for line in lines))

    def nvcc(self, release="13.0"):
        program(self.bin / "nvcc", f'echo "Cuda compilation tools, release {release}, V{release}.88"')

    def start(self, *arguments, code=None, alone=False, **more):
        """alone: nothing but bin/ on PATH."""
        path = f"{self.bin}" if alone else f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, *(["-c", code] if code else ["cuda/build.py"]), *arguments]
        env = environment(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(self.packages), PATH=path)
        env = {name: value for name, value in env.items() if name not in ("CXX", "CUDA_HOME")}
        return subprocess.Popen(command, cwd=self.root, text=True, start_new_session=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env={**env, **more})

    def run(self, *arguments, **more):
        """(status, stdout, stderr)."""
        return finish(self.start(*arguments, **more))

    def built(self, folder=None):
        return sorted(path.name for path in (folder or self.build).iterdir() if path.suffix not in (".lock", ".json"))


def finish(process):
    try:
        out, err = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_cold_then_warm_then_a_changed_source(machine):
    status, out, err = machine.run("wkv7", "cpu")
    assert status == 0 and re.fullmatch(JUDGED, err), err
    library = Path(out.strip())
    assert library.parent == machine.build and machine.built() == [library.name]
    # Now that it is built, neither a compiler nor torch is needed.
    status, again, err = machine.run("wkv7", "cpu", alone=True, PYTHONPROFILEIMPORTTIME="1")
    assert status == 0 and again == out and " argparse\n" in err and not re.search(r"\| +torch\n", err), err
    status, said, err = machine.run("wkv7", "cpu", "--json", alone=True)
    facts = json.loads(said)
    assert status == 0 and err == "" and said.count("\n") == 1 and Path(facts["library"]) == library
    assert facts["sources"] == ["cuda/build.py", "cuda/wkv7/reference.py", "cuda/wkv7/wkv7_cpu.cpp",
                                "cuda/wkv7/mix.h", "cuda/wkv7/heads.h", "cuda/cpu.h"]
    assert facts["built_with"]["torch"] == torch.__version__ and max(facts["built_with"]["errors"].values()) < 2e-6
    for file in facts["sources"]:
        source = machine.root / file
        before = source.read_text()
        source.write_text(before + "\n")
        assert "wkv7 cpu   can be built\n" in machine.run("wkv7")[1], file
        source.write_text(before)
    assert machine.run("wkv7", "cpu") == (0, out, ""), "and the first one is still there"


# What can be in the way: three lines, and status 1.

H200, OLD = "NVIDIA H200, 9.0", "Tesla T4, 7.5"
MESSAGES = {
    "no C++ compiler": (lambda m: (m.bin / "c++").unlink(), ["no C++ compiler (c++ not found)", "Install g++"]),
    "nvcc without a host compiler": (lambda m: (m.bin / "c++").unlink(), ["no C++ compiler (c++ not found)"]),
    "no nvcc": (lambda m: (m.bin / "nvcc").unlink(),
                ["no nvcc (looked in $CUDA_HOME: not set, PATH, ", "Install CUDA 13.x", "Dockerfile"]),
    "another CUDA": (lambda m: m.nvcc("12.4"), ["nvcc is of CUDA 12.4", "wants 13.x", "CUDA_HOME"]),
    "torch without CUDA": (lambda m: m.torch(None), ["torch 2.13.0+fake was built without CUDA."]),
    "no GPU": (lambda m: program(m.bin / "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9"), ["shows no GPU"]),
    "GPU too old": (lambda m: m.gpus(H200, OLD), ["Tesla T4 (sm_75) has no bf16", "sm_80", "--dtype fp32"]),
    "a missing file": (lambda m: (m.root / "cuda" / "exact.cuh").unlink(), ["exact.cuh is missing", "git checkout"]),
}
HIDE_NVCC = """
import sys
sys.path.insert(0, "cuda")
import build
which = build.shutil.which
build.shutil.which = lambda name: None if name.startswith("/usr/local/") else which(name)
sys.exit(build.main())
"""  # this machine's own, which is found whatever PATH says


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(machine, case):
    change, parts = MESSAGES[case]
    kernel = "cpu" if case == "no C++ compiler" else "cuda"
    machine.torch("13.0"), machine.gpus(H200), machine.nvcc()
    change(machine)
    status, out, err = machine.run("wkv7", kernel, code=HIDE_NVCC, alone=True)
    lines = err.splitlines()
    assert status == 1 and out == "" and len(lines) == 3, (out, err)
    assert lines[0].startswith(f"wkv7 {kernel} cannot be had: ") and "--kernel torch" in lines[2]
    assert all(part in " ".join(lines[:2]) for part in parts), lines
    assert machine.built() == []
    row, = [row for row in json.loads(machine.run("wkv7", "--json", code=HIDE_NVCC, alone=True)[1])
            if row["kernel"] == kernel]
    assert row["state"] == "cannot be built" and all(part in " ".join(row["why"]) for part in parts)


def test_a_python_without_torch(machine):
    done = subprocess.run([sys.executable, "-S", "-E", "cuda/build.py", "wkv7", "cpu"], cwd=machine.root, text=True,
                          capture_output=True)
    assert done.returncode == 1 and "has no torch.\n" in done.stderr and done.stderr.count("\n") == 3


@pytest.mark.parametrize("broken", ("compiler", "source"))
def test_a_compiler_that_fails(machine, broken):
    if broken == "compiler":
        program(machine.bin / "c++", "echo 'cc1plus: fatal error: no room left' >&2; exit 1")
        first = "fatal error: no room left"
    else:
        with (machine.root / "cuda" / "cpu.h").open("a") as file:
            file.write("this is no C++;\n")
        first = "error: "
    status, out, err = machine.run("wkv7", "cpu")
    lines = err.splitlines()
    assert status == 1 and out == "" and len(lines) == 3 and "--kernel torch" in lines[2], err
    assert lines[0].startswith("wkv7 cpu cannot be had: ") and first in lines[0]
    assert Path(lines[1].split("said: ")[1]) == machine.build / "wkv7_cpu.log"
    assert first in (machine.build / "wkv7_cpu.log").read_text() and machine.built() == ["wkv7_cpu.log"]


@pytest.mark.parametrize("name, number, other, wrong", [
    ("heads.h", "0.60653065971263342f", "0.6065f", "y .*\\): .*dw"), ("mix.h", "64e-5f", "63e-5f", "out .*\\): .*dr")])
def test_a_kernel_that_computes_something_else(name, number, other, wrong, machine):
    source = machine.root / "cuda" / "wkv7" / name
    text = source.read_text()
    assert text.count(number) == 1
    source.write_text(text.replace(number, other))
    status, out, err = machine.run("wkv7", "cpu")
    assert status == 1 and out == "" and err.count("\n") == 3, err
    assert re.match(f"wkv7 cpu cannot be had: against float64 {wrong}.* wrong, it is refused.\nPlease ", err), err
    assert machine.built() == []


def wait_for(what, process):
    deadline = time.monotonic() + 60
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_three_at_once_the_first_killed_in_a_read_only_checkout(machine):
    """One of the two that waited builds, over what was left; both get its library, in a folder of the user's own."""
    machine.build.write_text("a file where the folder should be: also root cannot write there")
    scratch = machine.bin.parent
    folder = scratch / f"rwkv-speedrun-{os.getuid()}"
    program(machine.bin / "c++", f"""case "$*" in *--version*) exec "{GXX}" "$@";; esac
        touch "{scratch}/called"; while [ ! -e "{scratch}/go" ]; do sleep 0.05; done; exec "{GXX}" "$@" -O0""")
    first = machine.start("wkv7", "cpu", TMPDIR=str(scratch))
    wait_for((scratch / "called").exists, first)
    others = [machine.start("wkv7", "cpu", TMPDIR=str(scratch)) for _ in range(2)]
    for other in others:
        assert other.stderr.readline() == "wkv7 cpu: waiting for another process that builds it\n"
    assert machine.built(folder) == ["wkv7_cpu.work"]
    (folder / "wkv7_cpu.work" / "left").touch()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (scratch / "go").touch()
    (status, out, err), (status_2, out_2, err_2) = map(finish, others)
    assert status == status_2 == 0 and out == out_2 and re.fullmatch(JUDGED, err + err_2), (err, err_2)
    assert Path(out.strip()).parent == folder and machine.built(folder) == [Path(out.strip()).name]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert machine.run("wkv7", "cpu", alone=True, TMPDIR=str(scratch)) == (0, out, "")


def test_the_private_folder_is_private(tmp_path, monkeypatch):
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"rwkv-speedrun-{os.getuid()}"
    assert build.private_folder() == build.private_folder() == folder and folder.stat().st_mode & 0o777 == 0o700

    def refused():
        with pytest.raises(build.KernelError, match="not a folder that only you can write"):
            build.private_folder()
    for mode in (0o777, 0o770, 0o707):
        folder.chmod(mode)
        refused()
    folder.chmod(0o700)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    refused()
    monkeypatch.setattr(os, "getuid", lambda: 4321)  # to whom it does not belong
    (tmp_path / "rwkv-speedrun-4321").mkdir(mode=0o700)
    refused()


# Kernels for GPUs

ON_CPU = """
import dataclasses, functools, sys
sys.path.insert(0, "cuda")
import build
build.KERNELS["wkv7", "cuda"] = dataclasses.replace(build.KERNELS["wkv7", "cuda"], head_sizes=(64,))
build.judge = functools.partial(build.judge, device="cpu")
sys.exit(build.main(["wkv7", "cuda"]))
"""


def test_a_cuda_kernel_with_an_nvcc_for_cpus(machine):
    """The whole way of a CUDA kernel: what stands in for nvcc compiles it for tests/cuda_on_cpu."""
    machine.torch("13.0"), machine.gpus("NVIDIA A100-SXM4-40GB, 8.0", H200, H200)
    program(machine.bin / "nvcc", f"""
        case "$*" in
            *--version*) echo "Cuda compilation tools, release 13.1, V13.1.0"; exit;;
            *-shared*) echo "$*" >> calls; o=""
                for x in "$@"; do case "$x" in *.o) o="$o${{o:+|}}$x";; esac; out="$x"; done
                IFS="|"; exec "{GXX}" -std=c++20 -fPIC -shared -I "{STAND_IN}" $o "{STAND_IN}/cuda_on_cpu.cpp" \\
                    "-L{TORCH / 'lib'}" -ltorch_cpu -o "$out";;
        esac
        echo "$*" >> calls
        while [ $# -gt 0 ]; do case "$1" in -c) in="$2";; -o) out="$2";; esac; shift; done
        exec "{GXX}" -std=c++20 -O0 -fPIC -DCUDA_ON_CPU -DHEAD_SIZES=64 -I "{STAND_IN}" -c -x c++ "$in" -o "$out"
        """)
    program(machine.bin / "c++", f'exec "{GXX}" -DCUDA_ON_CPU -I "{STAND_IN}" "$@" -O0')
    status, out, err = machine.run(code=ON_CPU)
    assert status == 0, err
    assert re.search(r"^wkv7 cuda built; .* y \d\.\de-3, .*, db \d\.\de-3 \(limits 2.5e-3 to 4.0e-3\) ok$", err, re.M)
    calls = (machine.root / "calls").read_text()
    assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a" in calls and "-shared" in calls
    program(machine.bin / "nvcc", "exit 1")
    assert machine.run(code=ON_CPU) == (0, out, ""), "built once"
    machine.gpus(H200)
    assert machine.run(code=ON_CPU)[0] == 1, "other GPUs, another library"


def test_head_sizes_that_a_gpu_has_no_room_for(machine, monkeypatch):
    form = build.KERNELS["wkv7", "fast"]
    for arch, sizes in ((80, [64]), (89, [64]), (90, [64, 128]), (100, [64, 128]), (120, [64])):
        monkeypatch.setattr(build, "gpus", lambda: [("GPU", 90), ("GPU", arch)])
        assert build.head_sizes(form) == sizes, arch


@pytest.mark.skipif(not find_nvcc(), reason="no nvcc")
def test_nvcc_compiles_and_links(machine, monkeypatch):
    """For a GPU that is not here; with a torch without CUDA, too."""
    monkeypatch.setattr(build, "flags", lambda form: ["-O1", "-DHEAD_SIZES=32"])
    monkeypatch.setattr(build, "CUDA", machine.root / "cuda")
    made = build.compile_kernel("wkv7", "cuda", [90], machine.root).read_bytes()
    assert made.startswith(b"\x7fELF") and b"cuda_forward(Tensor r" in made and b"sm_90a" in made
    (machine.root / "cuda" / "wkv7" / "wkv7_cuda.cu").write_text("void f() { this is no CUDA; }\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build.compile_kernel("wkv7", "cuda", [90], machine.root)
    assert re.search(r"wkv7_cuda.cu\(1\): error: ", failed.value.stdout + failed.value.stderr)


def test_the_list_and_usage(machine):
    status, out, err = machine.run(alone=True)
    assert status == 0 and err == "" and len(out.splitlines()) == len(build.KERNELS)
    assert "wkv7 cpu   can be built\n" in out and not machine.build.exists(), "a list builds nothing"
    assert machine.run("wkv6", alone=True)[1].count("\n") == 3
    status, out, err = machine.run("wkv6", "wind")
    assert status == 2 and "wkv6 has no kernel 'wind'; there are cpu, cuda, fast" in err
