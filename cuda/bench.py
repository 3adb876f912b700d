#!/usr/bin/env python3
"""Check an operator's kernels, then time them: python cuda/bench.py wkv7 [--device cpu] [--peers] [--shape B,T,H,N]

Every kernel is first held against the float64 recurrence at the head size to be timed, y and all gradients, on random
inputs and on correlated keys (what text with repeats does), and must give the same bits twice. One that fails is not
timed. Then forward and backward, median over the repeats, spread between the quartiles, after warm-up repeats:
on a GPU between two events, launches enqueued ahead, the L2 cache overwritten before either pass; on a CPU by the wall
clock, kernels interleaved, so that whatever else the machine does hits all alike.

MB is the least possible traffic (WKV-7: 7 tensors forward and 13 backward), "of floor" the time that traffic takes at
the speed of a large copy, measured in the same run, over the time taken. TFLOP/s counts the recurrence's arithmetic
(WKV-7: 9 N^2 a token and head forward, 19 N^2 backward): one yardstick for every form. memory is the peak of all that
both passes allocate, results included, over the size of inputs and dy. --peers: flash-linear-attention, if installed.
"""

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import train_rwkv7  # noqa: E402

FAMILIES = ("random", "correlated")
CHECK_SHAPE = {"cpu": (2, 50, 2), "cuda": (2, 200, 3)}  # B, T, H; no multiple of a chunk
REPEATS = {"cpu": 30, "cuda": 100}
WARM_UP = {"cpu": 3, "cuda": 10}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
PEER_SLACK = 4  # a peer is timed unless it is wrong: less accurate is not wrong, and its row shows the error
COLUMNS = ("device", "date", "B,T,H,N", "dtype", "kernel", "forward ms", "backward ms", "both ms", "spread", "MB",
           "of floor", "TFLOP/s", "memory", "error", "correlated", "speed-up")


@dataclass
class Kernel:
    """One implementation. call(*prepare(inputs)) -> y; `rounds`: what the operands of its products are rounded to."""
    call: Callable | None = None
    missing: str = ""  # why there is no call
    rounds: str = "fp32"
    prepare: Callable = lambda inputs: inputs
    head_sizes: tuple = ()  # any, if empty
    peer: bool = False


@dataclass
class Operator:
    """What is checked and timed. Inputs come in the order of the recurrence's arguments; sizes are for one B,T,H,N."""
    tensors: tuple  # names: y, then the gradients in the order of the inputs
    make: Callable  # family, B, T, H, N -> inputs, dy; fp32
    recurrence: Callable  # inputs -> y
    kernels: Callable  # device, peers -> {name: Kernel}, "torch" first
    gates: Callable  # rounds, dtype, family -> {tensor: relative L2 error}
    elements: Callable  # B, T, H, N -> numbers read or written at the least, both passes
    flops: Callable  # B, T, H, N -> of the recurrence, both passes
    head_sizes: tuple
    shapes: dict  # device: shapes timed by default


# ----------------------------------------------------------------------------------------------------------------------
# WKV-7


def wkv7_inputs(family, B, T, H, N):
    generator = torch.Generator().manual_seed(0)
    normal = lambda T=T: torch.randn(B, T, H, N, generator=generator)
    unit = functools.partial(torch.nn.functional.normalize, dim=-1)
    r, w, k, v, dy, kappa, alpha = *(normal() for _ in range(5)), unit(normal()), torch.sigmoid(normal())
    if family == "correlated":  # cosine 0.9 between keys, slow decay
        kappa = unit(unit(normal(1)) * 0.9**0.5 + kappa * 0.1**0.5)
        k, w, alpha = 8 * kappa, torch.full_like(w, -5.0), torch.full_like(alpha, 0.9)
    return (r, w, k, v, -kappa, kappa * alpha), dy


def wkv7_gates(rounds, dtype, family):
    """What the public kernels' errors and an emulation of the roundings leave to a sound kernel, by a margin."""
    if dtype == torch.float32:
        return dict.fromkeys(("y", "dr", "dw", "dk", "dv", "da", "db"), 2e-6)  # measured 2e-7 to 1.2e-6
    if rounds == "fp32":  # rounding y or a gradient to bf16 alone is 1.7e-3
        return dict(y=2.5e-3, dr=2.5e-3, dw=4e-3, dk=2.5e-3, dv=2.5e-3, da=3e-3, db=3e-3)
    if family == "identical":
        return dict(y=2.5e-2, dr=2.5e-2, dw=2.5e-2, dk=2.5e-2, dv=2.5e-2, da=3e-2, db=3e-2)
    if family == "correlated":
        return dict(y=1.2e-2, dr=1.2e-2, dw=1.2e-2, dk=5e-3, dv=1.2e-2, da=1.6e-2, db=1.6e-2)
    return dict(y=5e-3, dr=5e-3, dw=6e-3, dk=5e-3, dv=5e-3, da=7e-3, db=7e-3)


def wkv7_kernels(device, peers):
    found = {"torch": Kernel(functools.partial(train_rwkv7.wkv7, kernel="torch"))}
    own = {"cpu": {"cpu": {}}, "cuda": {"cuda": dict(head_sizes=(32, 64, 96, 128, 192)),
                                        "fast": dict(rounds="bf16", head_sizes=(64, 128))}}[device]
    for name, about in own.items():
        found[name] = Kernel(functools.partial(train_rwkv7.wkv7, kernel=name), why_not(train_rwkv7, name), **about)
    if peers:
        found.update({"fla": fla_wkv7(), "fla, more saved": fla_wkv7(disable_recompute=True)})
    return found


def fla_wkv7(**settings):
    """flash-linear-attention's operator with the settings of its own layer. It takes the logarithm of the decay, in
    the dtype of the rest; that activation and its gradient are not timed."""
    call, missing = peer("flash-linear-attention", "fla.ops.rwkv7", "chunk_rwkv7")
    if missing:
        return Kernel(missing=missing, peer=True)
    settings = dict(safe_gate=True, lower_bound=-train_rwkv7.DECAY_BOUND, chunk_size=64, scale=1.0, **settings)
    settings = {name: value for name, value in settings.items() if name in inspect.signature(call).parameters}

    def log_decay(inputs):
        r, w, k, v, a, b = inputs
        return r, (-train_rwkv7.DECAY_BOUND * torch.sigmoid(w.float())).to(w.dtype), k, v, a, b

    def y(r, w, k, v, a, b):
        return call(r=r, w=w, k=k, v=v, a=a, b=b, **settings)[0]
    return Kernel(y, rounds="bf16", prepare=log_decay, peer=True)


def wkv7():
    return Operator(
        tensors=("y", "dr", "dw", "dk", "dv", "da", "db"), make=wkv7_inputs, kernels=wkv7_kernels, gates=wkv7_gates,
        recurrence=lambda *inputs: train_rwkv7.wkv7_recurrent(*inputs)[0],
        elements=lambda B, T, H, N: (7 + 13) * B * T * H * N, flops=lambda B, T, H, N: (9 + 19) * B * T * H * N * N,
        head_sizes=train_rwkv7.HEAD_SIZES,
        shapes={"cuda": [(64, 1024, 12, 64), (64, 1024, 6, 128), (8, 1024, 12, 64)],
                "cpu": [(16, 256, 4, 32), (8, 256, 4, 64), (1, 1024, 12, 64)]})


# Name on the command line: what is checked and timed under it. An operator with inputs of its own, as one that fuses
# the recurrence with its surroundings has them, is one more in the tuple; its rows go into the same table.
OPERATORS = {"wkv7": (wkv7,)}


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


def why_not(script, kernel):
    """Load a kernel of a training script, built if need be. Returns "" or what is in the way."""
    return "" if script.load_kernel(kernel) == kernel else "not built (python cuda/doctor.py says why)"


def peer(package, module, name):
    """A function of another project and "", or None and why there is none."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None, f"{package} is not installed"
    try:
        return getattr(importlib.import_module(module), name), ""
    except Exception as error:  # what a package for other versions raises at import may be anything
        return None, f"{package} {version}: {first_line(error)}"


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:150]


# ----------------------------------------------------------------------------------------------------------------------
# Check


def run(function, inputs, dy, dtype, device):
    """y and the gradients of the inputs, in float64 on the CPU."""
    leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
    y = function(*leaves)
    return [x.detach().cpu().double() for x in (y, *torch.autograd.grad(y, leaves, dy.to(y)))]


def check(operator, kernel, N, device, dtype):
    """{family: {tensor: relative L2 error}} and "" or why the kernel must not be timed."""
    errors, wrong = {}, []
    for family in FAMILIES:
        inputs, dy = operator.make(family, *CHECK_SHAPE[device], N)
        inputs, dy = [x.to(dtype) for x in inputs], dy.to(dtype)  # the rounding of the inputs is no kernel's fault
        reference = run(operator.recurrence, inputs, dy, torch.float64, "cpu")
        results, again = (run(lambda *x: kernel.call(*kernel.prepare(x)), inputs, dy, dtype, device) for _ in range(2))
        errors[family] = {name: ((x - exact).norm() / exact.norm()).item()
                          for name, x, exact in zip(operator.tensors, results, reference)}
        if not kernel.peer and not all(map(torch.equal, results, again)):
            wrong.append(f"{family}: two runs differ")
        slack, gates = PEER_SLACK if kernel.peer else 1, operator.gates(kernel.rounds, dtype, family)
        wrong += [f"{family} {name} {error:.1e} above {slack * gates[name]:.1e}"
                  for name, error in errors[family].items() if not error <= slack * gates[name]]  # NaN is above
    return errors, "; ".join(wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Time


class WallClock:
    """Times on the CPU. Caches keep what they have from the repeat before."""

    interleaved, how = True, "wall clock, warm caches"

    def time(self, work):
        """Milliseconds of work()."""
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def peak(self, work):
        """Bytes allocated at most by work() beyond what there was; None if that cannot be told."""
        return None


class Events:
    """Times on the GPU, where launches wait for the GPU and not the GPU for launches: it is put to sleep for twice as
    long as the same work took to enqueue the last time. cuda: torch.cuda, or what stands in for it in a test."""

    interleaved, how = False, "events, L2 overwritten"
    CYCLES, LONGEST = 2e9, 0.02  # a second (no GPU's clock is faster); s, as a full queue of launches would block

    def __init__(self, cuda=torch.cuda, device="cuda"):
        self.cuda, self.enqueue = cuda, {}
        cache = getattr(cuda.get_device_properties(device), "L2_cache_size", 0) or 2**27
        self.flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def time(self, work):
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        self.cuda._sleep(int(self.CYCLES * min(self.LONGEST, 2 * self.enqueue.get(work, 0.0))))
        self.flush.zero_()
        start.record()
        began = time.perf_counter()
        work()
        self.enqueue[work] = time.perf_counter() - began
        end.record()
        self.cuda.synchronize()
        return start.elapsed_time(end)

    def peak(self, work):
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        work()
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated() - before


class Passes:
    """The forward and backward pass of a kernel on one set of inputs."""

    def __init__(self, kernel, inputs, dy):
        self.kernel, self.dy = kernel, dy
        self.leaves = [x.detach().requires_grad_() for x in kernel.prepare(inputs)]

    def forward(self):
        self.y = self.kernel.call(*self.leaves)

    def backward(self):
        self.gradients = torch.autograd.grad(self.y, self.leaves, self.dy)

    def both(self):
        self.forward()
        self.backward()

    def drop(self):
        self.y = self.gradients = None


def time_passes(timer, passes, repeats, warm_up):
    """Milliseconds of every repeat, {name: ([forward], [backward])}, for passes of {name: Passes}."""
    times = {name: ([], []) for name in passes}
    for repeat in range(-warm_up, repeats):
        for name, one in passes.items():
            pair = timer.time(one.forward), timer.time(one.backward)
            one.drop()
            if repeat >= 0:
                for column, ms in zip(times[name], pair):
                    column.append(ms)
    return times


def copy_speed(timer, device):
    """Bytes a second of a large copy, read and written: the memory's speed in practice."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    work = lambda: target.copy_(source)
    return 2 * source.nbytes / 1e-3 / statistics.median([timer.time(work) for _ in range(23)][3:])


def quartiles(times):
    """Median and the distance between the quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


def measure(operator, shape, kernels, timer, device, repeats, speed):
    """One row a kernel; `refused` says why it was not timed."""
    dtype, rows, green = DTYPES[device], {}, {}
    for name, kernel in kernels.items():
        row = rows[name] = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "kernel": name,
                            "peer": kernel.peer, "refused": kernel.missing}
        if kernel.missing:
            continue
        if kernel.head_sizes and shape[3] not in kernel.head_sizes:
            row["refused"] = f"head size {shape[3]} is not one of {kernel.head_sizes}"
        else:
            try:
                row["errors"], row["refused"] = check(operator, kernel, shape[3], device, dtype)
            except Exception as error:  # a compiler in a peer can fail in any way
                row["refused"] = first_line(error)
        if not row["refused"]:
            green[name] = kernel
    inputs, dy = operator.make("random", *shape)
    inputs, dy = [x.to(device, dtype) for x in inputs], dy.to(device, dtype)
    for names in [list(green)] if timer.interleaved else [[name] for name in green]:
        try:
            passes = {name: Passes(green[name], inputs, dy) for name in names}
            times = time_passes(timer, passes, repeats, WARM_UP[device])
            peaks = {name: timer.peak(one.both) for name, one in passes.items()}
        except Exception as error:  # out of memory, say: the other kernels still have their turn
            if timer.interleaved:
                raise
            rows[names[0]]["refused"] = first_line(error)
            continue
        finally:
            passes = None
        for name in names:
            fill(rows[name], times[name], operator, inputs, dy, speed, peaks[name])
    for row in rows.values():
        if "both_ms" in row and "both_ms" in rows.get("torch", {}):
            row["speed_up"] = rows["torch"]["both_ms"] / row["both_ms"]
    return list(rows.values())


def fill(row, times, operator, inputs, dy, speed, peak):
    """The figures of a row from the milliseconds of its repeats."""
    for name, ms in zip(("forward", "backward", "both"), (*times, list(map(sum, zip(*times))))):
        row[f"{name}_ms"], row[f"{name}_spread_ms"] = quartiles(ms)
    row["bytes"] = operator.elements(*row["shape"]) * dy.element_size()
    row["floor_ms"] = 1e3 * row["bytes"] / speed
    row["of_floor"] = row["floor_ms"] / row["both_ms"]
    row["flops_per_second"] = operator.flops(*row["shape"]) / row["both_ms"] * 1e3
    row["peak_bytes"] = peak
    row["memory"] = None if peak is None else peak / sum(x.nbytes for x in (*inputs, dy))


# ----------------------------------------------------------------------------------------------------------------------
# Report


def describe(device):
    """The machine, the versions and the day."""
    versions, name = train_rwkv7.environment(), train_rwkv7.hardware(torch.device(device))["name"]
    machine = {"device": re.sub(r", \d+ threads$", "", name), "date": datetime.date.today().isoformat()}
    if device == "cuda":
        machine |= {"driver": versions["driver"], "CUDA": versions["cuda"], "compiler": versions["nvcc"]}
    else:
        machine |= {"capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(), "compiler": versions["compiler"]}
    return machine | {"torch": versions["torch"], "peers": peer_versions(),
                      "commit": versions["git_commit"][:7] + (" and changes" if versions["git_dirty"] else "")}


def peer_versions():
    found = {}
    for package in ("flash-linear-attention", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(f"{package} {version}" for package, version in found.items()) or "none"


def cells(row, machine):
    start = machine["device"], machine["date"], ",".join(map(str, row["shape"])), row["dtype"], row["kernel"]
    errors = [f"{max(row['errors'][family].values()):.1e}" if "errors" in row else "-" for family in FAMILIES]
    if row["refused"]:  # a time without a correct result is none
        return *start, f"not timed: {row['refused'].replace('|', '/')}", *["-"] * 7, *errors, "-"
    return (*start, *(f"{row[name]:.3g}" for name in ("forward_ms", "backward_ms", "both_ms", "both_spread_ms")),
            f"{row['bytes'] / 1e6:.0f}", f"{row['of_floor']:.0%}", f"{row['flops_per_second'] / 1e12:.3g}",
            "-" if row["memory"] is None else f"{row['memory']:.2f}", *errors,
            f"{row['speed_up']:.1f}" if "speed_up" in row else "-")


def line(cells):
    return f"| {' | '.join(cells)} |\n"


def write_readme(operator, device, machine, header, rows, readme):
    """The rows of this device in place of its older ones, between the markers; those of other devices stay."""
    begin, end = f"<!-- bench {operator} {device}: begin -->\n", f"<!-- bench {operator} {device}: end -->"
    page = readme.read_text(encoding="utf-8")
    before, found, rest = page.partition(begin)
    inside, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{readme}: the markers {begin.strip()} and {end} are missing")
    others = [old for old in inside.splitlines(True)
              if not old.startswith((f"| {machine['device']} |", f"- {machine['device']},"))]
    kept = [old for old in others if old.startswith("| ") and not old.startswith(("| device |", "| --- |"))]
    facts = [old for old in others if old.startswith("- ")]
    table = "".join((line(COLUMNS), line(["---"] * len(COLUMNS)), *kept, *(line(cells(row, machine)) for row in rows)))
    readme.write_text(f"{before}{begin}{table}\n{''.join(facts)}- {header}\n{end}{after}", encoding="utf-8")


def parse_shape(text):
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not B,T,H,N, four numbers above zero")
    return tuple(map(int, text.split(",")))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", choices=OPERATORS, help="what to time")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where (default: cuda where there is one, else cpu)")
    parser.add_argument("--peers", action="store_true", help="also flash-linear-attention, where it is installed")
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL", help="only these (default: all)")
    parser.add_argument("--shape", type=parse_shape, nargs="+", action="extend", metavar="B,T,H,N",
                        help="shapes to time (default: the operator's for the device)")
    parser.add_argument("--repeats", type=int, help=f"timed repeats of each kernel (default: {REPEATS})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s, as torch")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--write", action="store_true", help="also write the table into cuda/README.md")
    arguments = parser.parse_args(argv)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.repeats = REPEATS[arguments.device] if arguments.repeats is None else arguments.repeats
    if arguments.threads < 1 or arguments.repeats < 2:
        parser.error("--threads must be at least 1 and --repeats at least 2")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device (python cuda/doctor.py says why); --device cpu works")
    sizes = OPERATORS[arguments.operator][0]().head_sizes
    for shape in arguments.shape or ():
        if shape[3] not in sizes:
            parser.error(f"--shape {','.join(map(str, shape))}: head size {shape[3]} is not one of {sizes}")
    return arguments


def bench(arguments, readme=ROOT / "cuda" / "README.md"):
    """Print and write as told. Returns (machine, rows). Raises ValueError, OSError."""
    operators, device = [make() for make in OPERATORS[arguments.operator]], arguments.device
    torch.set_num_threads(arguments.threads)
    kernels = [operator.kernels(device, arguments.peers) for operator in operators]
    if arguments.kernels:
        known = [name for some in kernels for name in some]
        if strange := [name for name in arguments.kernels if name not in known]:
            raise ValueError(f"--kernels {strange[0]}: not one of {', '.join(known)}")
        kernels = [{name: some[name] for name in some if name in arguments.kernels} for some in kernels]
    timer, machine = Events() if device == "cuda" else WallClock(), describe(device)
    speed = copy_speed(timer, device)
    machine |= {"copy GB/s": round(speed / 1e9, 1), "repeats": arguments.repeats, "warm-up": WARM_UP[device],
                "timed by": timer.how}
    header = ", ".join([machine["device"], machine["date"], *(f"{k} {v}" for k, v in list(machine.items())[2:])])
    print(header)
    print(line(COLUMNS) + line(["---"] * len(COLUMNS)), end="")
    rows = []
    jobs = [(operator, some, shape) for operator, some in zip(operators, kernels)
            for shape in arguments.shape or operator.shapes[device]]
    for operator, some, shape in jobs:
        for row in measure(operator, shape, some, timer, device, arguments.repeats, speed):
            rows.append(row)
            print(line(cells(row, machine)), end="", flush=True)
        if arguments.json:  # after every shape: what was measured is kept, whatever happens to the next
            Path(arguments.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    if bad := [f"{row['kernel']} at {row['shape']}" for row in rows if row["refused"] and not row["peer"]]:
        raise ValueError(f"not every kernel could be built and passed its check: {', '.join(bad)}")
    if arguments.write:
        write_readme(arguments.operator, device, machine, header, rows, readme)
    return machine, rows


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        bench(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
