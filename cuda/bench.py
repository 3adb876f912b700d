#!/usr/bin/env python3
"""Time an operator's kernels, each checked first: python cuda/bench.py wkv7 --device cpu [--shape 16,256,4,32 ...]

Every kernel is held against the float64 recurrence, forward and all gradients, at the head size to be timed. One that
fails is not timed. The repeats of the kernels are interleaved, so that whatever else the machine does hits all alike.
GB/s counts the least possible traffic (forward 7 tensors of fp32, backward 13 more), GFLOP/s the arithmetic of the
recurrence itself (9 N^2 a token and head forward, 19 N^2 backward): the same yardstick for every form.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import train_rwkv7  # noqa: E402

SHAPES = ["16,256,4,32", "8,256,4,64", "1,1024,12,64"]
CHECK_SHAPE = 2, 50, 2  # B, T, H
GATE = 2e-6  # relative L2 error of any tensor, fp32; measured 2e-7 to 5e-7
WARM_UP = 3
COLUMNS = ("B,T,H,N", "kernel", "forward ms", "spread", "both ms", "spread", "GB/s", "GFLOP/s", "error", "speed-up")


def parse_shape(text):
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not B,T,H,N, four numbers above zero")
    shape = tuple(map(int, text.split(",")))
    if shape[3] not in train_rwkv7.HEAD_SIZES:
        raise argparse.ArgumentTypeError(f"head size {shape[3]} is not one of {train_rwkv7.HEAD_SIZES}")
    return shape


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", choices=["wkv7"], help="what to time")
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="where (default: cpu)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s, as torch")
    parser.add_argument("--shape", type=parse_shape, nargs="+", action="extend", metavar="B,T,H,N",
                        help=f"shapes to time (default: {' '.join(SHAPES)})")
    parser.add_argument("--repeats", type=int, default=30, help="timed repeats of each kernel (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--write", action="store_true", help="also write the table into cuda/README.md")
    arguments = parser.parse_args()
    if arguments.threads < 1 or arguments.repeats < 2:
        parser.error("--threads must be at least 1 and --repeats at least 2")
    return arguments


def make_inputs(B, T, H, N):
    torch.manual_seed(0)
    r, w, k, v, kappa, dy = (torch.randn(B, T, H, N) for _ in range(6))
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    return (r, w, k, v, -kappa, kappa * torch.rand(B, T, H, N)), dy


def run(function, inputs, dy, dtype):
    """y and the six gradients."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))


def kernel_error(kernel, N):
    """The largest relative L2 error of y and the gradients; NaN where one is not finite."""
    inputs, dy = make_inputs(*CHECK_SHAPE, N)
    reference = run(lambda *x: train_rwkv7.wkv7_recurrent(*x)[0], inputs, dy, torch.float64)
    results = run(lambda *x: train_rwkv7.wkv7(*x, kernel=kernel), inputs, dy, torch.float32)
    errors = [((x.double() - exact).norm() / exact.norm()).item() for x, exact in zip(results, reference)]
    return max(errors) if all(map(torch.isfinite, map(torch.tensor, errors))) else float("nan")


def time_kernels(kernels, shape, repeats):
    """Milliseconds of every repeat: {kernel: ([forward], [forward and backward])}."""
    inputs, dy = make_inputs(*shape)
    inputs = [x.requires_grad_() for x in inputs]
    times = {kernel: ([], []) for kernel in kernels}
    for repeat in range(-WARM_UP, repeats):
        for kernel in kernels:
            start = time.perf_counter()
            y = train_rwkv7.wkv7(*inputs, kernel=kernel)
            middle = time.perf_counter()
            gradients = torch.autograd.grad(y, inputs, dy)
            end = time.perf_counter()
            del y, gradients
            if repeat >= 0:
                times[kernel][0].append(1e3 * (middle - start))
                times[kernel][1].append(1e3 * (end - start))
    return times


def describe():
    cpu, versions = train_rwkv7.hardware(torch.device("cpu"))["name"], train_rwkv7.environment()
    return {"cpu": f"{cpu} ({torch.backends.cpu.get_cpu_capability()})", "cores": os.cpu_count(),
            "torch": versions["torch"], "compiler": versions["compiler"],
            "commit": versions["git_commit"][:7] + (" and changes" if versions["git_dirty"] else "")}


def quartiles(times):
    """Median and the distance between the quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


def measure(shape, kernels, repeats):
    """One row a kernel; `refused` says why it was not timed."""
    B, T, H, N = shape
    rows = {kernel: {"shape": shape, "kernel": kernel, "error": kernel_error(kernel, N)} for kernel in kernels}
    for row in rows.values():
        if not row["error"] <= GATE:
            row["refused"] = f"error {row['error']:.1e} above {GATE:.1e}"
    green = [kernel for kernel in kernels if "refused" not in rows[kernel]]
    for kernel, (forward, both) in time_kernels(green, shape, repeats).items():
        row = rows[kernel]
        row["forward_ms"], row["forward_spread_ms"] = quartiles(forward)
        row["both_ms"], row["both_spread_ms"] = quartiles(both)
        row["GB_s"] = 20 * 4 * B * T * H * N / row["both_ms"] / 1e6
        row["GFLOP_s"] = 28 * B * T * H * N * N / row["both_ms"] / 1e6
        if "both_ms" in rows["torch"]:
            row["speed_up"] = rows["torch"]["both_ms"] / row["both_ms"]
    return list(rows.values())


def cells(row):
    start = ",".join(map(str, row["shape"])), row["kernel"]
    if "refused" in row:
        return *start, *["not timed"] * 6, row["refused"], "-"  # a time without a correct result is none
    return (*start, *(f"{row[name]:.2f}" for name in ("forward_ms", "forward_spread_ms", "both_ms", "both_spread_ms")),
            f"{row['GB_s']:.1f}", f"{row['GFLOP_s']:.1f}", f"{row['error']:.1e}",
            f"{row['speed_up']:.1f}" if "speed_up" in row else "-")


def markdown(rows):
    return "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)))


def write_readme(header, rows):
    readme = ROOT / "cuda" / "README.md"
    begin, end = "<!-- bench wkv7 cpu: begin -->\n", "<!-- bench wkv7 cpu: end -->"
    before, found, rest = readme.read_text().partition(begin)
    inside, found_end, after = rest.partition(end)
    if not (found and found_end):
        sys.exit(f"{readme}: the markers {begin.strip()} and {end} are missing")
    readme.write_text(f"{before}{begin}{header}\n\n{markdown(rows)}\n{end}{after}")


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    kernels = ["torch"] + ([] if train_rwkv7.load_kernel("cpu") == "torch" else ["cpu"])
    machine = describe()
    header = ", ".join(f"{name} {value}" for name, value in machine.items()) + f"; median of {arguments.repeats}"
    print(header)
    print("  ".join(f"{title:>14}" for title in COLUMNS))
    rows = []
    for shape in arguments.shape or map(parse_shape, SHAPES):
        for row in measure(shape, kernels, arguments.repeats):
            rows.append(row)
            print("  ".join(f"{cell:>14}" for cell in cells(row)), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    complete = "cpu" in kernels and not any("refused" in row for row in rows)
    if not complete:
        sys.exit("bench: not every kernel could be built and passed its check")
    if arguments.write:
        write_readme(header, rows)


if __name__ == "__main__":
    main()
