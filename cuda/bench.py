#!/usr/bin/env python3
"""Check an operator's kernels, then time them: python cuda/bench.py wkv7 [--device cpu] [--peers] [--shape B,T,H,N]

Every kernel is first held against the float64 recurrence at the head size to be timed, y and all gradients, on random
inputs and on correlated keys (what text with repeats does), and must give the same bits twice. One that fails is not
timed. Then forward and backward, median over the repeats, spread between the quartiles, after warm-up repeats:
on a GPU between two events, launches enqueued ahead, the L2 cache overwritten before either pass; on a CPU by the wall
clock, kernels interleaved, so that whatever else the machine does hits all alike.

MB is the least possible traffic (WKV-7: 7 tensors forward and 13 backward; WKV-6: 5 and 9), "of floor" the time that
traffic takes at the speed of a large copy, measured in the same run, over the time taken. TFLOP/s counts the
recurrence's arithmetic (WKV-7: 9 N^2 a token and head forward, 19 N^2 backward; WKV-6: 5 N^2 and 11 N^2): one yardstick
for every form. memory is the peak of all that both passes allocate, results included, over the size of inputs and dy.
--peers: flash-linear-attention, if installed.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "cuda")]
import train_rwkv7  # noqa: E402
from cases import OPERATORS, first_line  # noqa: E402

FAMILIES = ("random", "correlated")
CHECK_SHAPE = {"cpu": (2, 50, 2), "cuda": (2, 200, 3)}  # B, T, H; no multiple of a chunk
REPEATS = {"cpu": 50, "cuda": 100}
WARM_UP = {"cpu": 3, "cuda": 10}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
PEER_SLACK = 4  # a peer is timed unless it is wrong: less accurate is not wrong, and its row shows the error
COLUMNS = ("device", "date", "B,T,H,N", "dtype", "kernel", "forward ms", "backward ms", "both ms", "spread", "MB",
           "of floor", "TFLOP/s", "memory", "error", "correlated", "speed-up")


# ----------------------------------------------------------------------------------------------------------------------
# Check


def cast(inputs, dtype):
    """What has tokens, (B, T, H, N), in the dtype; parameters stay in fp32, as a model keeps them."""
    return [x.to(dtype) if x.dim() == 4 else x for x in inputs]


def run(function, inputs, dy, device):
    """y and the gradients of the inputs, in float64 on the CPU."""
    leaves = [x.to(device, copy=True).requires_grad_() for x in inputs]
    y = function(*leaves)
    return [x.detach().cpu().double() for x in (y, *torch.autograd.grad(y, leaves, dy.to(y)))]


def check_family(operator, kernel, family, shape, device, dtype):
    """Two runs on inputs of a family, B,T,H,N, against the reference in float64 on the same device. Returns {tensor:
    relative L2 error} and a list of what is wrong."""
    inputs, dy = operator.make(family, *shape)
    inputs, dy = cast(inputs, dtype), dy.to(dtype)  # the rounding of the inputs is no kernel's fault
    reference = run(operator.reference, [x.double() for x in inputs], dy.double(), device)
    results, again = (run(lambda *x: kernel.call(*kernel.prepare(x)), inputs, dy, device) for _ in range(2))
    errors = {name: ((x - exact).norm() / (exact.norm() or 1)).item()  # all decays 0: dw is 0
              for name, x, exact in zip(operator.tensors, results, reference)}
    slack, gates = PEER_SLACK if kernel.peer else 1, operator.gates(kernel.rounds, dtype, family)
    wrong = [f"{family}: two runs differ"] * (not kernel.peer and not all(map(torch.equal, results, again)))
    return errors, wrong + [f"{family} {name} {error:.1e} above {slack * gates[name]:.1e}"
                            for name, error in errors.items() if not error <= slack * gates[name]]  # NaN is above


def check(operator, kernel, N, device, dtype):
    """{family: {tensor: relative L2 error}} and "" or why the kernel must not be timed."""
    results = {family: check_family(operator, kernel, family, (*CHECK_SHAPE[device], N), device, dtype)
             for family in FAMILIES}
    wrong = [text for _, some in results.values() for text in some]
    errors = {family: errors for family, (errors, _) in results.items()}
    return errors, ("wrong results: " if kernel.peer and wrong else "") + "; ".join(wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Time


class WallClock:
    """Times on the CPU. Caches keep what they have from the repeat before."""

    interleaved, how = True, "wall clock, warm caches"

    def forget(self):
        """Let go of what was timed."""

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

    def forget(self):
        self.enqueue.clear()  # its keys hold tensors

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
    """Bytes a second of a large copy at its best, read and written: the memory's speed in practice."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    work = lambda: target.copy_(source)
    ms = min([timer.time(work) for _ in range(23)][3:])
    timer.forget()
    return 2 * source.nbytes / 1e-3 / ms


def quartiles(times):
    """Median and the distance between the quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


def measure(operator, shape, kernels, timer, device, repeats, speed, check=check):
    """One row for each kernel of this head size; `refused` says why it was not timed."""
    dtype, rows, green = DTYPES[device], {}, {}
    for name, kernel in kernels.items():
        if shape[3] not in (kernel.head_sizes or operator.head_sizes):
            continue
        row = rows[name] = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "kernel": name,
                            "peer": kernel.peer, "refused": kernel.missing}
        if kernel.missing:
            continue
        try:
            row["errors"], row["refused"] = check(operator, kernel, shape[3], device, dtype)
        except Exception as error:  # a compiler in a peer can fail in any way
            row["refused"] = first_line(error)
        if not row["refused"]:
            green[name] = kernel
    inputs, dy = operator.make("random", *shape)
    inputs, dy = [x.to(device) for x in cast(inputs, dtype)], dy.to(device, dtype)
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
            timer.forget()
        for name in names:
            fill(rows[name], times[name], operator, inputs, dy, speed, peaks[name])
    first = next(iter(rows.values()), {})
    for row in rows.values():
        if "both_ms" in row and "both_ms" in first:
            row["speed_up"] = first["both_ms"] / row["both_ms"]
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
    versions, hardware, git = (train_rwkv7.machine(device)[key] for key in ("environment", "hardware", "git"))
    machine = {"device": re.sub(r", \d+ threads$", "", hardware["name"]), "date": datetime.date.today().isoformat()}
    if device == "cuda":
        machine |= {"driver": hardware["driver"], "CUDA": versions["cuda"], "compiler": versions["nvcc"]}
    else:
        machine |= {"capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(), "compiler": versions["compiler"]}
    return machine | {"torch": versions["torch"], "peers": peer_versions(),
                      "commit": git["commit"][:7] + (" and changes" if git["changed"] else "")}


def peer_versions():
    versions = {}
    for package in ("flash-linear-attention", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(f"{package} {version}" for package, version in versions.items()) or "none"


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
    before, marker, rest = page.partition(begin)
    inside, found_end, after = rest.partition(end)
    if not (marker and found_end):
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
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where to time [cuda where there is one, else cpu]")
    parser.add_argument("--peers", action="store_true", help="also flash-linear-attention, where it is installed")
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL", help="only these [all]")
    parser.add_argument("--shape", type=parse_shape, nargs="+", action="extend", metavar="B,T,H,N",
                        help="shapes to time [the operator's for the device]")
    parser.add_argument("--repeats", type=int, help="timed repeats of each kernel [100 on a GPU, 50 on a CPU]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="threads of a CPU [%(default)s, as torch]")
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
            for shape in operator.shapes[device] and arguments.shape or operator.shapes[device]]
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
