#!/usr/bin/env python3
"""What this machine has, what it lacks and what to do next: python cuda/doctor.py [--json]

Works without a GPU, without nvcc and without torch; builds nothing and leaves nothing behind. The output can be pasted
into an issue: the repository's path becomes ".", a home folder "~". Exit status 1 when something has to be mended for
this machine to train as well as it could, else 0.
"""

import argparse
import ast
import datetime
import importlib
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import build  # beside this file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "tqdm", "safetensors", "huggingface_hub")


def shell(*command):
    """What a command prints, stripped; "" when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def clean(text):
    """Without the paths that say who or where somebody is."""
    text = str(text).replace(str(ROOT), ".")
    home = os.path.expanduser("~")
    text = text.replace(home, "~") if len(home) > 1 else text
    return re.sub(r"/(?:home|Users)/[^/\s:'\"]+", "~", text)


def cleaned(x):
    if isinstance(x, dict):
        return {key: cleaned(value) for key, value in x.items()}
    return [cleaned(value) for value in x] if isinstance(x, list) else clean(x) if isinstance(x, str) else x


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def tools():
    """{name: {path, version} or {}} of the compilers that cuda/build.py would take."""
    nvcc, cxx = build.nvcc(), build.cxx()
    return {"nvcc": dict(path=nvcc, version=build.release(nvcc)) if nvcc else {},
            "C++": dict(path=cxx[0], version=build.output(*cxx, "--version").partition("\n")[0]) if cxx else {}}


def packages():
    """{name: version, or why it cannot be imported}, and the modules that could."""
    versions, modules = {}, {}
    for name in PACKAGES:
        try:
            modules[name] = importlib.import_module(name)
            versions[name] = getattr(modules[name], "__version__", "version unknown")
        except Exception as error:  # a broken installation raises whatever it likes
            versions[name] = f"cannot be imported ({first_line(error)})"
    return versions, modules


def memory():
    """Bytes of memory: {total, free}."""
    try:
        lines = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M))
        return dict(total=int(lines["MemTotal"]) * 1024, free=int(lines["MemAvailable"]) * 1024)
    except (OSError, KeyError):
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()) else 0
        return dict(total=pages * os.sysconf("SC_PAGE_SIZE") if pages else None, free=None)


def driver():
    """What the NVIDIA driver says, without torch: {version, cuda, gpus: [{name, sm, total, free}]}, or {}."""
    listed = shell("nvidia-smi", "--query-gpu=driver_version,name,compute_cap,memory.total,memory.free",
                 "--format=csv,noheader,nounits")
    rows = [row for row in (line.split(", ") for line in listed.splitlines()) if len(row) == 5]
    if not rows:
        return {}
    newest = re.search(r"CUDA Version: ([\d.]+)", shell("nvidia-smi"))
    number = lambda text: int(float(text) * 2**20) if re.fullmatch(r"[\d.]+", text) else None
    return dict(version=rows[0][0], cuda=newest[1] if newest else "unknown", gpus=[
        dict(name=name, sm=f"sm_{sm.replace('.', '')}", total=number(total), free=number(free))
        for _, name, sm, total, free in rows])


def torch_facts(torch):
    """What torch was built for and what it sees."""
    hip = getattr(torch.version, "hip", None)
    built_for = f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    facts = dict(built_for=built_for, sees=[], obstacle="")
    try:
        if torch.cuda.is_available():
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
                sm = f"sm_{gpu.major}{gpu.minor}"
                facts["sees"].append(dict(name=gpu.name, sm=sm, total=gpu.total_memory, free=None))
        if torch.version.cuda:
            facts["architectures"] = torch.cuda.get_arch_list()
            if not facts["sees"]:
                torch.cuda.init()
    except Exception as error:  # a driver too old, a GPU in a bad state: torch's own words are the best
        facts["obstacle"] = first_line(error)
    return facts


# ----------------------------------------------------------------------------------------------------------------------
# The kernels


def kernels():
    """[{operator, kernel, flag, state, why}] by cuda/build.py, or in a line why it cannot tell. state: built, can be
    built, cannot be built; why: cause and way out, where it cannot."""
    try:
        rows = build.listing(["wkv7", "wkv6"])
    except build.KernelError as error:
        return f"cuda/build.py cannot tell ({error.args[0]})"
    for row in rows:
        row["flag"] = f"--{row['kernel']}_cuda" if row["kernel"] in ("fast", "wind") else f"--kernel {row['kernel']}"
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Data and room


def defaults():
    """{track: {field: default}} of train_rwkv7.py's Hyperparameters, read from its source: no import, no torch."""
    tree = ast.parse((ROOT / "train_rwkv7.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if getattr(node, "name", "") == "Hyperparameters")
    tiny = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "TINY")
    fineweb = {node.target.id: node.value.value for node in body if isinstance(node, ast.AnnAssign)}
    return {"fineweb": fineweb, "tiny": {**fineweb, **{x.arg: x.value.value for x in tiny.keywords}}}


def shard(path):
    """(tokens, "") of a shard, or (0, what is wrong with it). Reads the header only."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        header = f.read(12)
    if size < 1024 or len(header) < 12:
        return 0, "truncated"
    magic, version, tokens = struct.unpack("<3i", header)
    if (magic, version) != (20240520, 1):
        return 0, f"no shard (magic {magic}, version {version})"
    return (tokens, "") if size == 1024 + 2 * tokens else (0, f"damaged: {tokens} tokens by its header, {size} bytes")


def data(track, given):
    """A track's folder: shards and tokens of each split, what its manifest says, what is wrong, tokens needed."""
    folder, need = ROOT / given["data"], given["steps"] * given["bsz"] * given["seq_len"] + 1
    facts = dict(track=track, folder=given["data"], need=-(-need // given["epochs"]), faults=[], manifest="none")
    counts = {}
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"*_{split}_*.bin"))
        for path in paths:
            counts[path.name], fault = shard(path)
            facts["faults"] += [f"{path.name} is {fault}"] if fault else []
        facts[split] = dict(shards=len(paths), tokens=sum(counts[path.name] for path in paths))
    try:
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        listed = {entry["name"]: entry["tokens"] for entry in json.loads(text)["shards"]}
        facts["manifest"] = f"lists {len(listed)} shards"
        facts["faults"] += [f"{name} has {tokens} tokens, by the manifest {listed[name]}"
                            for name, tokens in counts.items() if listed.get(name, tokens) != tokens]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        facts["manifest"] = "damaged"
        facts["faults"].append(f"manifest.json is damaged ({first_line(error)})")
    facts["enough"] = facts["train"]["tokens"] >= facts["need"] and facts["val"]["tokens"] > given["seq_len"]
    facts["make"] = "python data/pydocs.py" if track == "tiny" else (
        f"python data/cached_{folder.name}.py {-(-need // 10**8)}")
    return facts


def writable(folder):
    """Whether files can be made in a folder of the repository, or the folder itself. Nothing is left behind."""
    at = ROOT / folder
    while not at.exists():
        at = at.parent
    try:
        with tempfile.TemporaryFile(dir=at):
            return True
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Report


def examine():
    """All facts as one dict that json can hold."""
    versions, modules = packages()
    usage = shutil.disk_usage(ROOT)
    return cleaned(dict(
        date=datetime.date.today().isoformat(), commit=shell("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        platform=platform.platform(), python=platform.python_version(), cores=os.cpu_count(), memory=memory(),
        disk=dict(total=usage.total, free=usage.free), packages=versions, tools=tools(), driver=driver(),
        torch=torch_facts(modules["torch"]) if "torch" in modules else None, kernels=kernels(),
        data=[data(track, given) for track, given in defaults().items()],
        writable={folder: writable(folder) for folder in ("cuda/build", "records")},
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES")))


def advice(facts):
    """(what is wrong or "", the command to go on with)."""
    lacking = [name for name in PACKAGES if facts["packages"][name].startswith("cannot")]
    if lacking:
        return (f"this Python lacks {', '.join(lacking)}",
                "./run_rwkv7.sh --track tiny     (makes .venv with all that is needed, then trains); or "
                "PYTHON=/path/to/another/python")
    closed = [folder for folder, can in facts["writable"].items() if not can]
    if "records" in closed:
        return "records/ cannot be written", "./run_rwkv7.sh --records /a/folder/of/yours     (or mend the permissions)"
    tiny, fineweb = (next(d for d in facts["data"] if d["track"] == track) for track in ("tiny", "fineweb"))
    gpus, torch = facts["driver"].get("gpus", []), facts["torch"]
    if not gpus and not torch["sees"]:
        if tiny["faults"]:
            return f"{tiny['folder']}: {tiny['faults'][0]}", tiny["make"]
        return "", "./run_rwkv7.sh --track tiny     (no GPU here: the race for a CPU)"
    if not torch["sees"]:
        return unseen(facts)
    if fineweb["faults"]:
        return f"{fineweb['folder']}: {fineweb['faults'][0]}", fineweb["make"]
    if not fineweb["enough"]:
        return (f"{fineweb['folder']} has {fineweb['train']['tokens']:,} of {fineweb['need']:,} train tokens",
                f"{fineweb['make']}     (or now: ./run_rwkv7.sh --track tiny)")
    rows = facts["kernels"] if isinstance(facts["kernels"], list) else []
    known = {row["kernel"]: row for row in rows if row["operator"] == "wkv7"}
    wanted = [known[kernel] for kernel in ("fast", "cuda") if kernel in known]  # the fastest first
    for row in wanted:
        if not row["why"]:
            return "", f"./run_rwkv7.sh {row['flag']}"
    around = "./run_rwkv7.sh --kernel torch     (slower, the same maths)"
    if not wanted:
        return "", around
    cause, fix = wanted[-1]["why"]
    return f"{wanted[-1]['operator']} {wanted[-1]['kernel']}: {cause}", f"{fix} Or: {around}"


def unseen(facts):
    """The advice where there is a GPU, but torch does not see it."""
    torch, hidden = facts["torch"], facts["cuda_visible_devices"]
    if torch["built_for"] == "CPUs only":
        why = f"torch {facts['packages']['torch']} was built for CPUs only"
        mend = "pip install --force-reinstall torch     (without PIP_EXTRA_INDEX_URL, if that names CPU wheels)"
    elif hidden in ("", "-1"):
        why, mend = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it", "unset CUDA_VISIBLE_DEVICES"
    else:
        why = torch["obstacle"] or "torch.cuda.is_available() says no"
        mend = (f"nvidia-smi     (driver {facts['driver']['version']} serves CUDA up to {facts['driver']['cuda']}, "
                f"torch is built for {torch['built_for']}: a newer driver or an older torch)")
    return f"there is a GPU, but torch does not see it: {why}", mend


def gigabytes(count):
    return "?" if count is None else f"{count / 2**30:.1f} GiB"


def page(facts):
    lines = []
    say = lambda name, text: lines.append(f"{name:16} {text}")
    say("doctor", f"{facts['date']}, commit {facts['commit'] or 'unknown'}")
    say("system", f"{facts['platform']}, {facts['cores']} cores, memory {gigabytes(facts['memory']['total'])} "
                  f"({gigabytes(facts['memory']['free'])} free), disk {gigabytes(facts['disk']['free'])} free")
    say("python", facts["python"])
    for name, version in facts["packages"].items():
        say(name, version + (f", built for {facts['torch']['built_for']}, sees {len(facts['torch']['sees'])} GPUs"
                             if name == "torch" and facts["torch"] else ""))
    for name, tool in facts["tools"].items():
        say(name, f"{tool['version']} ({tool['path']})" if tool else "not found")
    say("driver", f"{facts['driver']['version']}, for CUDA up to {facts['driver']['cuda']}" if facts["driver"] else
        "none (nvidia-smi is not there or fails)")
    for i, gpu in enumerate(facts["driver"].get("gpus", facts["torch"]["sees"] if facts["torch"] else [])):
        say(f"GPU {i}", f"{gpu['name']}, {gpu['sm']}, {gigabytes(gpu['total'])} ({gigabytes(gpu['free'])} free)")
    if facts["torch"] and facts["torch"]["obstacle"]:
        say("torch says", facts["torch"]["obstacle"])
    if isinstance(facts["kernels"], str):
        say("kernels", facts["kernels"])
    else:
        for row in facts["kernels"]:
            say(f"{row['operator']} {row['kernel']}", row["state"])
            for why in row["why"]:
                say("", why)
    for d in facts["data"]:
        counted = ", ".join(f"{d[split]['shards']} {split} shards of {d[split]['tokens']:,} tokens"
                            for split in ("train", "val"))
        say(d["track"], f"{d['folder']}: {counted} (a run needs {d['need']:,}), manifest {d['manifest']}")
        for fault in d["faults"]:
            say("", fault)
    for folder, can in facts["writable"].items():
        say(folder, "can be written" if can else "cannot be written")
    wrong, command = advice(facts)
    lines += ["", f"{'to mend':16} {wrong}"] if wrong else [""]
    say("next", command)
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the facts as JSON")
    arguments = parser.parse_args(argv)
    facts = examine()
    facts["wrong"], facts["next"] = advice(facts)
    print(json.dumps(facts, indent=1) if arguments.json else page(facts))
    return 1 if facts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
