#!/usr/bin/env python3
"""Builds the kernels under cuda/, holds each against its float64 reference, and says where its library is.

    python cuda/build.py                        every kernel: built, can be built, or why not; builds nothing
    python cuda/build.py wkv7                   those of one operator
    python cuda/build.py wkv7 fast              builds it if need be and prints the library's path
    python cuda/build.py wkv7 fast --json       prints {"library", "sources": what a record embeds, "built_with"}
    python cuda/build.py wkv7 fast --device cuda --headsz 64 --dtype bf16     only if it fits a run with these flags

What it has to say besides goes to stderr. Exit status 1 with three lines there: the cause, the way out, the way around.

A library's name holds a hash of its sources (this file and the reference too), torch's version and the processor or
the GPUs: a change of any of them makes another library, so nothing stale is ever loaded. Where the library is there,
neither a compiler nor torch is needed. A file lock lets ranks, runs and containers with one cuda/build/ build it once.
Environment: CXX (the C++ compiler, c++ if unset), CUDA_HOME (where bin/nvcc is; else PATH, then /usr/local/cuda).
"""

import argparse
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).resolve().parent
ROOT = CUDA.parent
AROUND = "Or go on without it: --kernel torch (any device, no compiler; slower, the same maths)."

# ----------------------------------------------------------------------------------------------------------------------
# The kernels


@dataclass(frozen=True)
class Kernel:
    """What a kernel is built from and what it takes."""
    units: tuple  # files below cuda/ that are compiled
    device: str
    head_sizes: tuple
    dtypes: tuple  # of its inputs; the first is the one it is judged in
    limits: tuple  # relative L2 errors allowed of y and of the gradients of its inputs, in their order
    large: tuple = ()  # head sizes that need 227 KB of shared memory a block: Hopper, data-centre Blackwell
    states: bool = True  # takes an initial state and gives the final one
    fused: bool = False  # the time mixing around the operator, not the operator alone
    mix: tuple = ()  # limits of the fused form that lies in the library besides, mix_forward and mix_backward


CPU_SIZES, EXACT_SIZES = (16, 32, 64, 96, 128, 192), (32, 64, 96, 128, 192)
WKV7, WKV6 = "wkv7/wkv7_binding.cpp", "wkv6/wkv6_binding.cpp"
KERNELS = {  # limits: y dr dw dk dv da db; of wind out dr dw dk dv da dg, its norm costs digits where y is small
    ("wkv7", "cpu"): Kernel(("wkv7/wkv7_cpu.cpp",), "cpu", CPU_SIZES, ("fp32",), (2e-6,) * 7, states=False,
                            mix=(2e-6, 2e-5, 2e-6, 2e-5, 2e-6, 2e-5, 2e-6)),  # as with wind
    ("wkv7", "cuda"): Kernel((WKV7, "wkv7/wkv7_cuda.cu"), "cuda", EXACT_SIZES, ("bf16", "fp32"),
                             (2.5e-3, 2.5e-3, 4e-3, 2.5e-3, 2.5e-3, 3e-3, 3e-3), (192,)),
    ("wkv7", "fast"): Kernel((WKV7, "wkv7/wkv7_fast.cu"), "cuda", (64, 128), ("bf16",),
                             (5e-3, 5e-3, 6e-3, 5e-3, 5e-3, 7e-3, 7e-3), (128,)),
    ("wkv7", "wind"): Kernel(("wkv7/wkv7_wind_binding.cpp", "wkv7/wkv7_wind.cu"), "cuda", (64,), ("bf16",),
                             (5e-3, 2e-2, 2e-2, 2e-2, 5e-3, 2e-2, 5e-3), states=False, fused=True),
    # y dr dk dv dw du
    ("wkv6", "cpu"): Kernel(("wkv6/wkv6_cpu.cpp",), "cpu", CPU_SIZES, ("fp32",), (2e-6,) * 6, states=False),
    ("wkv6", "cuda"): Kernel((WKV6, "wkv6/wkv6_cuda.cu"), "cuda", EXACT_SIZES, ("bf16", "fp32"),
                             (2.5e-3,) * 5 + (1e-5,), (192,)),
    ("wkv6", "fast"): Kernel((WKV6, "wkv6/wkv6_fast.cu"), "cuda", (64, 128), ("bf16",), (5e-3,) * 5 + (1e-5,), (128,)),
}
TENSORS = {"wkv7": ("y", "dr", "dw", "dk", "dv", "da", "db"), "wkv6": ("y", "dr", "dk", "dv", "dw", "du"),
           "fused": ("out", "dr", "dw", "dk", "dv", "da", "dg")}


class KernelError(Exception):
    """A kernel cannot be had. Its arguments: the cause and the way out, a line each."""


def sources(operator, kernel):
    """What makes the library, as paths: this file, the reference, the units and every header that they include."""
    files = [CUDA / unit for unit in KERNELS[operator, kernel].units]
    for path in files:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for name in re.findall(r'^#include "(.*)"', text, re.MULTILINE):
            header = (path.parent / name).resolve()
            if header not in files:
                files.append(header)
    return [CUDA / "build.py", CUDA / operator / "reference.py", *files]


# ----------------------------------------------------------------------------------------------------------------------
# This machine, without importing torch, which takes seconds


def output(*command):
    """What a command prints on stdout and stderr; "" where there is no such program."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
    except OSError:
        return ""
    return done.stdout + done.stderr


@functools.cache
def torch_facts():
    """torch's {folder, version, cuda}, read from its files. Raises KernelError where there is none."""
    spec = importlib.util.find_spec("torch")
    if not spec or not spec.origin:
        raise KernelError(f"{sys.executable} has no torch.", "Take the Python that setup.sh makes: .venv/bin/python")
    folder = Path(spec.origin).parent
    version = runpy.run_path(str(folder / "version.py"))
    return dict(folder=folder, version=version["__version__"], cuda=version["cuda"])


@functools.cache
def gpus():
    """[(name, architecture as a number: 90 for sm_90)] of the NVIDIA GPUs here, by nvidia-smi."""
    listed = output("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
    rows = re.findall(r"^(.+), (\d+)\.(\d+)$", listed, re.MULTILINE)
    return [(name, 10 * int(major) + int(minor)) for name, major, minor in rows]


def processor():
    """What tells processors apart that -march=native compiles for differently."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else platform.processor()
    return sorted(set(re.findall(r"^(?:model name|flags|Features|CPU part).*", text, re.MULTILINE))) or text


def cxx():
    """The C++ compiler as the start of a command line, or None."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    path = shutil.which(command[0])
    return [path, *command[1:]] if path else None


def nvcc():
    """nvcc's path, or None."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else []
    return next(filter(None, map(shutil.which, [*places, "nvcc", "/usr/local/cuda/bin/nvcc"])), None)


def release(path):
    """nvcc's version as text, "13.0"."""
    version = re.search(r"release (\d+\.\d+)", output(path, "--version"))
    return version[1] if version else "unknown"


def head_sizes(form):
    """The head sizes of a kernel that the GPUs here have the shared memory for."""
    archs = [arch for _, arch in gpus()] if form.large else []
    small = any(not 90 <= arch < 120 for arch in archs)
    return [N for N in form.head_sizes if not (small and N in form.large)]


# ----------------------------------------------------------------------------------------------------------------------
# What can be in the way


def misfit(form, device=None, headsz=None, dtype=None):
    """None, or (cause, way out) of why the kernel is none for a run with these flags."""
    sizes = head_sizes(form)
    if device not in (None, form.device):
        return f"it does not run on --device {device}.", f"Use --device {form.device}."
    if headsz is not None and headsz not in sizes:
        return f"it has no heads of {headsz} channels here.", f"Use --headsz {' or '.join(map(str, sizes))}."
    if dtype == "fp32" and "fp32" not in form.dtypes:
        return "it computes in bf16, not with --dtype fp32.", "Use another --dtype, or --kernel cuda."
    return None


def obstacle(operator, kernel):
    """None, or (cause, way out) of what is missing here to build the kernel."""
    missing = [path for path in sources(operator, kernel) if not path.exists()]
    if missing:
        return f"{missing[0]} is missing.", "Restore it: git checkout -- cuda"
    if KERNELS[operator, kernel].device == "cuda" and (problem := gpu_obstacle()):
        return problem
    if not cxx():
        return f"no C++ compiler ({os.environ.get('CXX') or 'c++'} not found).", "Install g++ 10 or newer or set CXX."
    return None


def gpu_obstacle():
    torch, cards, path = torch_facts(), gpus(), nvcc()
    if not torch["cuda"]:
        return f"torch {torch['version']} was built without CUDA.", "For an NVIDIA GPU install one that was."
    if not cards:
        return "nvidia-smi shows no GPU.", "Run it where there is one."
    name, arch = min(cards, key=lambda gpu: gpu[1])
    if arch < 80:
        return (f"{name} (sm_{arch}) has no bf16; the kernel needs sm_80 or newer.",
                "Take another machine, or train here with --kernel torch --dtype fp32 (slow).")
    major = torch["cuda"].split(".")[0]
    if not path:
        looked = f"$CUDA_HOME: {os.environ.get('CUDA_HOME') or 'not set'}, PATH, /usr/local/cuda"
        return (f"no nvcc (looked in {looked}).",
                f"Install CUDA {major}.x (of torch {torch['version']}) and set CUDA_HOME, or use the Dockerfile.")
    version = release(path)
    if version.split(".")[0] != major:
        return (f"nvcc is of CUDA {version}, but torch {torch['version']} wants {major}.x.",
                f"Set CUDA_HOME to a toolkit {major}.x (any minor version), or install a torch for {version}.")
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Build


def flags(form):
    if form.device == "cuda":
        return ["-O3"]
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return ["-O3", native, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


def architectures(form):
    return sorted({arch for _, arch in gpus()}) if form.device == "cuda" else []


def library_name(operator, kernel):
    torch = torch_facts()
    machine = gpus() if KERNELS[operator, kernel].device == "cuda" else processor()
    texts = [path.read_bytes() for path in sources(operator, kernel) if path.exists()]
    key = repr((torch["version"], torch["cuda"], machine, texts))
    return f"{operator}_{kernel}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def private_folder():
    """Where libraries go if cuda/build/ cannot be written. Nobody else may write there, as we run what is in it."""
    folder = Path(tempfile.gettempdir()) / f"rwkv-speedrun-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owned = folder.lstat()
    if not stat.S_ISDIR(owned.st_mode) or owned.st_uid != os.getuid() or owned.st_mode & 0o022:
        raise KernelError(f"cuda/build/ cannot be written, and {folder} is not a folder that only you can write.",
                          "Set TMPDIR to a folder of your own.")
    return folder


def place(name):
    """The path of a library: where it is, or else where it can be made."""
    folder = CUDA / "build"
    if (folder / name).exists():
        return folder / name
    try:
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = private_folder()
    return folder / name


def call(command):
    subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=True)


def compile_kernel(operator, kernel, archs, work):
    """Compile the units side by side and link them to work/kernel.so. Raises CalledProcessError."""
    form, torch = KERNELS[operator, kernel], torch_facts()["folder"]
    options = [*flags(form), "-I", CUDA]
    host = [*cxx(), "-std=c++20", "-fPIC", f"-DKERNEL={kernel}", "-isystem", torch / "include"]
    chips = [f"{arch}a" if arch == 90 else arch for arch in archs]  # 90a: TMA and wgmma
    device = [nvcc(), "-ccbin", cxx()[-1], "-Xcompiler", "-fPIC"]
    gencode = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    commands, objects = [], []
    for unit in form.units:
        compiler = [*device, "-std=c++17", *gencode] if unit.endswith(".cu") else host
        objects.append(work / f"{Path(unit).name}.o")
        commands.append([*compiler, *options, "-c", CUDA / unit, "-o", objects[-1]])
    with ThreadPoolExecutor() as pool:
        list(pool.map(call, commands))
    libraries = [name for name in ("torch_cpu", "torch_cuda") if list((torch / "lib").glob(f"*{name}.*"))]
    linker = device if form.device == "cuda" else cxx()
    library = work / "kernel.so"
    call([*linker, "-shared", *objects, "-L", torch / "lib", *(f"-l{name}" for name in libraries), "-o", library])
    return library


def build(operator, kernel, library):
    """Build the kernel, judge it, and only then give the library its name. Raises KernelError."""
    form, name = KERNELS[operator, kernel], f"{operator}_{kernel}"
    if problem := obstacle(operator, kernel):
        raise KernelError(*problem)
    work, log = library.with_name(f"{name}.work"), library.with_name(f"{name}.log")
    with open(library.with_name(f"{name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{operator} {kernel}: waiting for another process that builds it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: at worst two build the same
            pass
        if library.exists():  # made by the process waited for
            return
        shutil.rmtree(work, ignore_errors=True)  # left by a build that was killed: who holds the lock is alone in it
        work.mkdir()
        try:
            made = compile_kernel(operator, kernel, architectures(form), work)
            errors = judge(operator, kernel, made)
            built_with = dict(torch=torch_facts()["version"], compiler=output(*cxx(), "--version").partition("\n")[0],
                              nvcc=release(nvcc()) if form.device == "cuda" else None, errors=errors,
                              architectures=architectures(form))
            library.with_suffix(".json").write_text(json.dumps(built_with), encoding="utf-8")
            os.replace(made, library)
            log.unlink(missing_ok=True)
        except subprocess.CalledProcessError as error:
            messages = error.stdout + error.stderr
            log.write_text(f"{shlex.join(error.cmd)}\n{messages}", encoding="utf-8")
            first = re.search(r".*(?:\berror\b|\bfatal\b|undefined reference|cannot find).*", messages)
            first = first[0].strip() if first else f"the compiler failed with status {error.returncode}"
            raise KernelError(first, f"Mend that; all that was said: {log}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# Judge


def random_inputs(operator, fused, N):
    """Inputs in the order of the operator's arguments and the gradient of its result, fp32: (1, 80, 2, N), but for
    WKV-6's u (2, N) and the parameters (7, 2, N) of what is fused."""
    import torch
    generator = torch.Generator().manual_seed(0)
    r, w, k, v, kappa, alpha, dy = (torch.randn(1, 80, 2, N, generator=generator) for _ in range(7))
    if operator == "wkv6":
        return [r, k, v, w, torch.randn(2, N, generator=generator)], dy
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    if not fused:
        return [r, w, k, v, -kappa, kappa * alpha.sigmoid()], dy
    center = torch.tensor([0, 0, 0.7, 1, 0, 1, 0]).view(7, 1, 1)
    return [r, w, k, v, alpha, kappa * N ** 0.5, center + 0.1 * torch.randn(7, 2, N, generator=generator)], dy


def judge(operator, kernel, library, device=None):
    """Load the library and hold y and every gradient against the reference in float64. Returns {tensor: relative L2
    error}; raises KernelError where one is above its limit or the kernel fails."""
    import torch
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN: what is not written is seen
    torch.ops.load_library(library)
    form = KERNELS[operator, kernel]
    errors, verdict = judge_form(operator, kernel, form, form.fused, form.limits, device)
    if form.mix:
        judge_form(operator, "mix", form, True, form.mix, device)
    print(f"{operator} {kernel} built; {verdict} ok", file=sys.stderr)
    return errors


def judge_form(operator, name, form, fused, limits, device):
    """(errors, their words) of the operators <name>_forward and <name>_backward of a library that is loaded."""
    import torch
    reference = runpy.run_path(str(CUDA / operator / "reference.py"))
    report = "Please report this line with what python cuda/doctor.py prints."
    forward, backward = (getattr(getattr(torch.ops, operator), f"{name}_{way}") for way in ("forward", "backward"))
    state = [None] * form.states
    names = TENSORS["fused" if fused else operator]
    wrong, size = torch.zeros(len(names)), torch.zeros(len(names))
    for N in {32, 64, 128}.intersection(head_sizes(form)):
        inputs, dy = random_inputs(operator, fused, N)
        dtype = dict(bf16=torch.bfloat16, fp32=torch.float32)[form.dtypes[0]]
        inputs, dy = [x.to(dtype) if x.shape == dy.shape else x for x in inputs], dy.to(dtype)
        leaves = [x.double().requires_grad_() for x in inputs]
        exact = reference["time_mix"](*leaves) if fused else reference[operator](*leaves)[0]
        right = [exact, *torch.autograd.grad(exact, leaves, dy.double())]
        try:
            on_device = [x.to(device or form.device) for x in inputs]
            y, kept, *_ = forward(*on_device, *state)
            results = [y, *backward(*on_device, *state, kept, dy.to(y.device), *state)]
            results = [x.double().cpu() for x in results]
        except RuntimeError as error:  # a launch that failed, or CUDA
            raise KernelError(f"it failed: {str(error).splitlines()[0]}", report) from error
        for i in range(len(names)):
            wrong[i] += (results[i] - right[i].detach()).square().sum()
            size[i] += right[i].detach().square().sum()
    errors = dict(zip(names, (wrong / size).sqrt().tolist()))
    over = [name for (name, error), limit in zip(errors.items(), limits) if not error <= limit]
    verdict = "against float64 " + ", ".join(f"{name} {x:.1e}" for name, x in errors.items())
    verdict = f"{verdict} (limits {min(limits):.1e} to {max(limits):.1e})".replace("e-0", "e-")
    if over:
        raise KernelError(f"{verdict}: {', '.join(over)} wrong, it is refused.", report)
    return errors, verdict


# ----------------------------------------------------------------------------------------------------------------------
# Program


def describe(operator, kernel, library):
    """What --json prints of a kernel that is built."""
    known = library.with_suffix(".json")
    return dict(library=str(library), sources=[path.relative_to(ROOT).as_posix() for path in sources(operator, kernel)],
                built_with=json.loads(known.read_text(encoding="utf-8")) if known.exists() else None)


def listing(operators):
    """[{operator, kernel, state, why}]; state: built, can be built, or cannot be built: why, its cause and way out."""
    rows = []
    for operator, kernel in KERNELS:
        if operator in operators:
            built = (CUDA / "build" / library_name(operator, kernel)).exists()
            why = (None if built else obstacle(operator, kernel)) or ()
            state = "built" if built else "cannot be built" if why else "can be built"
            rows.append(dict(operator=operator, kernel=kernel, state=state, why=why))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", nargs="?", choices=("wkv7", "wkv6"), help="the operator [all]")
    parser.add_argument("kernel", nargs="?", help="cpu, cuda, fast or, for wkv7, wind [list them all]")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="device of the run [the kernel's]")
    parser.add_argument("--headsz", type=int, help="channels a head of the run [any that fits]")
    parser.add_argument("--dtype", choices=("bf16", "mixed", "fp32"), help="dtype of the run [any that fits]")
    args = parser.parse_args(argv)
    operator, kernel = args.operator, args.kernel
    if kernel and (operator, kernel) not in KERNELS:
        names = ", ".join(name for of, name in KERNELS if of == operator)
        parser.error(f"{operator} has no kernel {kernel!r}; there are {names}")
    title = f"{operator} {kernel} cannot be had: " if kernel else ""
    try:
        if not kernel:
            rows = listing([operator] if operator else ["wkv7", "wkv6"])
            if args.json:
                print(json.dumps(rows))
                return 0
            for row in rows:
                why = f": {' '.join(row['why'])}" if row["why"] else ""
                print(f"{row['operator']} {row['kernel']:5} {row['state']}{why}")
            return 0
        if problem := misfit(KERNELS[operator, kernel], args.device, args.headsz, args.dtype):
            raise KernelError(*problem)
        library = place(library_name(operator, kernel))
        if not library.exists():
            build(operator, kernel, library)
        print(json.dumps(describe(operator, kernel, library)) if args.json else library)
        return 0
    except KernelError as error:
        cause, way_out = error.args
    except OSError as error:
        cause, way_out = error, "Make room, or set permissions."
    print(f"{title}{cause}\n{way_out}\n{AROUND}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
