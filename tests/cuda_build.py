"""Builds the kernels of cuda/ for tests: for a CPU, to run on the machine of tests/cuda_on_cpu; by nvcc, to read its
report of registers and memory and to count instructions. What was built is kept in cuda/build/."""

import collections
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD, STAND_IN = ROOT / "cuda" / "build", ROOT / "tests" / "cuda_on_cpu"
SANITIZERS = ("asan", "ubsan")


def compiler():
    """$CXX if that is GCC, else g++: what clang does with copies of structs, no race is found in."""
    for command in (shlex.split(os.environ.get("CXX", "")), ["g++"]):
        if command and shutil.which(command[0]) and "Free Software Foundation" in run([*command, "--version"]):
            return command


def run(command, **how):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **how)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


MISSING = "" if sys.platform == "linux" and compiler() else "needs Linux and g++"


def cached(name, suffix, inputs, make):
    """cuda/build/<name>_<hash of inputs><suffix>: if it is not there, make(path) makes it elsewhere first."""
    key = repr([(path.name, path.read_bytes()) if isinstance(path, pathlib.Path) else path for path in inputs])
    target = BUILD / f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}{suffix}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = pathlib.Path(folder) / f"made{suffix}"
            make(made)
            os.replace(made, target)
    return target


def headers_of(source):
    return sorted({*ROOT.glob("cuda/**/*.cuh"), *ROOT.glob("cuda/**/*.h"), *source.parent.glob("*.cuh")})


def build_on_cpu(sources, sanitize=False, races=False, flags=()):
    """A library of .cu files and of .cpp files with their torch operators (-DCUDA_ON_CPU: registered for the CPU), for
    torch.ops.load_library or ctypes. sanitize: with AddressSanitizer and UBSan; see sanitized_environment. races: every
    access to memory is watched, races make the launch fail (tests/cuda_on_cpu/races.h); several times slower."""
    sources = [pathlib.Path(source) for source in sources]
    headers = [header for source in sources for header in headers_of(source)] + sorted(STAND_IN.glob("*.h"))
    options = ["-std=c++20", "-O1" if sanitize else "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-DCUDA_ON_CPU", *flags]
    if sanitize:
        options += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    if races:
        options += ["-DCUDA_ON_CPU_RACES"]
    version = run([*compiler(), "--version"]) + platform.machine()
    objects, libraries = [], []
    for source in [*sources, STAND_IN / "cuda_on_cpu.cpp"]:
        more, used = ["-fsanitize=thread"] if races and source.suffix == ".cu" else [], headers
        if re.search(r"#include.*(torch/|binding\.h)", source.read_text()):
            import torch
            more, used = ["-isystem", pathlib.Path(torch.__file__).parent / "include"], [*headers, torch.__version__]
            libraries = ["-L", pathlib.Path(torch.__file__).parent / "lib", "-ltorch_cpu"]
        command = [*compiler(), *options, *more, "-I", STAND_IN, "-I", ROOT / "cuda", "-c", "-x", "c++", source, "-o"]
        key = [source, *used, version, list(map(str, command))]
        objects.append(cached(source.stem, ".o", key, lambda made: run([*command, made])))
    command = [*compiler(), *options, "-shared", *objects, *libraries, "-o"]
    return cached(sources[0].stem, ".so", [version, list(map(str, command))], lambda made: run([*command, made]))


def sanitized_environment():
    """What a process needs in its environment to load a library built with sanitize=True; None if there is no such."""
    libraries = [run([*compiler(), f"-print-file-name=lib{name}.so"]).strip() for name in SANITIZERS]
    if not all(os.path.isabs(path) and pathlib.Path(path).read_bytes()[:4] == b"\x7fELF" for path in libraries):
        return None
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def find_nvcc():
    """nvcc's path, or None."""
    found = [shutil.which("nvcc")]
    found += [os.path.join(os.environ.get(name, ""), "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH")]
    return next((path for path in [*found, "/usr/local/cuda/bin/nvcc"] if path and os.path.exists(path)), None)


@functools.cache
def nvcc_version():
    return run([find_nvcc(), "--version"])


def nvcc_report(source, arch, flags=()):
    """What nvcc says of the kernels of a .cu file, warnings being errors: {kernel: {"registers", "barriers", "stack",
    "spill_stores", "spill_loads", "shared"}}, in bytes, and where cuobjdump is, how often its machine code has each
    instruction: "counts". arch: "80", "90a", "100". kernel: as in the source, with its template arguments,
    forward<64>. shared: what is declared, not what a launch asks for."""
    nvcc, source = find_nvcc(), pathlib.Path(source)
    command = [nvcc, "-std=c++17", "-O3", "-I", ROOT / "cuda", f"-gencode=arch=compute_{arch},code=sm_{arch}",
               "-Xptxas", "-v", "-Werror", "all-warnings", *flags, "-cubin", source, "-o"]

    def make(made):
        cubin = made.with_suffix(".cubin")
        said = run([*command, cubin])
        made.write_text(json.dumps([said, count_instructions(cubin)]))
    tools = [str(tool) for tool in (cuobjdump(),) if tool]
    key = [source, *headers_of(source), nvcc_version(), list(map(str, command)), tools, "IMAD.MOV"]
    said, counts = json.loads(cached(source.stem, ".ptxas", key, make).read_text())
    return parse_ptxas(said, counts)


def cuobjdump():
    """Its path in the environment of this Python, or None."""
    found = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(folder) for folder in found.submodule_search_locations] if found else []
    return next((path for folder in folders for path in folder.glob("*/bin/cuobjdump")), None)


def count_instructions(cubin):
    """{mangled name: {instruction without its modifiers: how often}} of a .cubin; {} without cuobjdump."""
    if not (tool := cuobjdump()):
        return {}
    env = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}  # where nvdisasm is
    text, found = run([tool, "-sass", cubin], env=env), {}
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            counts = found[name[1]] = collections.Counter()
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(IMAD.MOV|\w+)", line):
            counts[instruction[1].replace("IMAD.MOV", "MOV")] += 1
    return found


def hold_counts(source, arch, report):
    """A kernel costs what it cost when tests/cuda_counts.json was written: COUNTS=write ./test.sh tests/test_wkv*_*.py
    -k nvcc_report writes it. Another nvcc may need 3 % more."""
    if not cuobjdump():
        return
    path = ROOT / "tests" / "cuda_counts.json"
    release = re.search(r"release (\S+),", nvcc_version())[1]
    table = json.loads(path.read_text())
    for name, used in report.items():
        counts = used["counts"]
        row = dict(instructions=sum(counts.values()) - counts.get("NOP", 0), registers=used["registers"],
                   spilled=used["spill_stores"] + used["spill_loads"])
        row |= {kind: counts.get(kind, 0) for kind in ("HMMA", "LDSM", "MOV", "MUFU", "SHFL", "BAR")}
        key = f"{source.name} sm_{arch} {name}"
        if os.environ.get("COUNTS") == "write":
            table |= {"nvcc": release, key: row}
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items())]
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        slack = 1 if table["nvcc"] == release else 1.03
        over = [f"{kind} {n}, was {table[key][kind]}" for kind, n in row.items() if n > slack * table[key][kind]]
        assert not over, f"{key}: {', '.join(over)}"


def parse_ptxas(text, counts):
    report = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        def number(pattern):
            found = re.search(pattern, part)
            return int(found[1]) if found else 0
        symbol = part[: part.index("'")]
        report[symbol] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]), "barriers": number(r"used (\d+) barriers"),
            "stack": number(r"(\d+) bytes stack frame"), "spill_stores": number(r"(\d+) bytes spill stores"),
            "spill_loads": number(r"(\d+) bytes spill loads"), "shared": number(r"(\d+) bytes smem"),
            "counts": counts.get(symbol)}
    names = demangle(list(report))
    return {name: report[symbol] for name, symbol in zip(names, report)}


def demangle(symbols):
    """Mangled names, each as it is in the source, with template arguments but no parameters: scan<64>."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt") or os.path.join(os.path.dirname(find_nvcc()), "cu++filt")
    lines = run([tool, *symbols]).splitlines() if symbols else []
    names = [re.sub(r"\(int\)|\(anonymous namespace\)::|^void ", "", line) for line in lines]
    return [re.sub(r"\(.*", "", name) for name in names]
