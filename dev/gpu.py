#!/usr/bin/env python3
"""The day a GPU is at hand, in one go and eight minutes: python dev/gpu.py --out results/

    doctor    what the machine has (cuda/doctor.py)
    build     every kernel, all at once, held against its reference in float64
    tests     tests/test_gpu.py, all kernels at once: accuracy on every input family and size, the same bits twice
    bench     cuda/bench.py with peers, for every operator
    train     steps of the training scripts on random tokens: ms, tokens/s, memory, and what share of the GPU's time
              goes to the WKV operator; at a micro-batch of 32 sequences, or what the card has the memory for

Every stage has a share of the time and survives the failure of the one before. DIR gets five files at most: rows.jsonl,
a line for every kernel, test run, timing and training run as soon as it is known; log.txt, all that was printed;
results.json and results.md, written anew after each stage. --stages train gives one stage all the time. --device cpu
tries everything on a CPU, with toy sizes. Nothing is written outside DIR but built kernels in cuda/build/; no record is
made. Exit status 1 if any stage met a failure.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARES = dict(doctor=0.05, build=0.20, tests=0.20, bench=0.25, train=1.0)  # of all the time, at most; train: the rest
WARM_UP, STEPS, PROFILED = {"cuda": 5, "cpu": 1}, {"cuda": 30, "cpu": 3}, {"cuda": 3, "cpu": 1}
GB_A_SEQUENCE, GB_FIXED = 1.8, 3  # of RWKV-7, not compiled, with room to spare (dev/LOG.md)
TOY = ["--track=tiny", "--device=cpu", "--dtype=fp32", "--width=32", "--headsz=16", "--layers=2", "--seq_len=32"]
NO_TIME = "no time left"
LEAST = {"cuda": 40, "cpu": 1}  # s that a training run takes at least: compilation, most of all


class Budget:
    """Wall time in s, from now on."""

    def __init__(self, seconds):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def left(self):
        return self.end - time.monotonic()

    def share(self, fraction):
        return max(1.0, min(self.left(), fraction * self.seconds))


def call(command, limit, **env):
    """Run a command to its end or time limit, with all it started. Returns (status, output); status 124: too late."""
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env={**os.environ, **env}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return 124, f"{output}\n[stopped after {limit:.0f} s]\n"
    except BaseException:  # Ctrl-C: leave nothing running
        os.killpg(process.pid, signal.SIGKILL)
        raise


def append(args, stage, row):
    """A row is on the disk as soon as it is known, whatever ends this program."""
    with open(args.out / "rows.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(stage=stage, **row)) + "\n")


def micro_batch(device):
    """The largest of 8, 16, 32 sequences of 1024 tokens that this GPU has the memory for; 2 short ones on a CPU."""
    if device == "cpu":
        return 2
    said = call(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], 20)[1]
    room = max([int(mib) for mib in re.findall(r"^\d+$", said, re.M)], default=40960) * 2**20 / 1e9
    return max([n for n in (8, 16, 32) if GB_FIXED + n * GB_A_SEQUENCE < 0.9 * room], default=4)


def last_json(output):
    """The last line that is a JSON object, or None."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def last_line(output):
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")


# ----------------------------------------------------------------------------------------------------------------------
# Stages: each takes the arguments and its time in s, and returns (facts with "ok", output for its text file)


def doctor(args, seconds):
    status, output = call([sys.executable, "cuda/doctor.py"], seconds)
    return dict(ok=status == 0, page=output), output


def build(args, seconds):
    """Every kernel in a process of its own, all at once."""
    def one(job):
        script, kernel = job
        started = time.monotonic()
        status, output = call([sys.executable, "cuda/build.py", script.replace("train_r", ""), kernel], seconds)
        said = [line for line in output.splitlines() if " built; " in line or "cannot be had" in line]
        row = dict(script=script, kernel=kernel, ok=status == 0, seconds=round(time.monotonic() - started, 1),
                   said=(said or [last_line(output)])[0])
        append(args, "build", row)
        return row, f"--- {script} {kernel}: status {status}\n{output}\n"

    jobs = [(script, kernel) for script in scripts() if "rwkv" in script for kernel in kernels(script, args.device)]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(one, jobs))
    facts = [facts for facts, _ in results]
    return dict(ok=all(kernel["ok"] for kernel in facts), kernels=facts), "".join(output for _, output in results)


def tests(args, seconds):
    """One process a kernel: a CUDA error spoils what its process does later."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "tests/test_gpu.py"]

    def one(kernel):
        status, output = call(command, seconds, TEST_DEVICE=args.device, TEST_KERNELS=kernel)
        failed = [line for line in output.splitlines() if line.startswith("FAILED")]
        ok = status == 0 and " passed" in last_line(output)  # not: all skipped
        row = dict(kernel=kernel, ok=ok, summary=last_line(output), failed=failed)
        append(args, "tests", row)
        return row, output
    with ThreadPoolExecutor() as pool:
        rows, outputs = zip(*pool.map(one, ["torch", *kernels("train_rwkv7", args.device)]))
    summary = "; ".join(f"{row['kernel']}: {row['summary']}" for row in rows)
    failed = [line for row in rows for line in row["failed"]]
    return dict(ok=all(row["ok"] for row in rows), summary=summary, failed=failed), "\n".join(outputs)


def bench(args, seconds):
    """Every operator; what was measured before a time-out counts."""
    found, outputs, ok = {}, [], True
    operators = [name for name, script in (("wkv7", "train_rwkv7"), ("wkv6", "train_rwkv6")) if script in scripts()]
    B = micro_batch(args.device)
    sizes = ["1,32,1,32"] if args.device == "cpu" else [f"{B},1024,12,64", f"{B},1024,6,128"]
    more = ["--shape", *sizes, "--repeats", 3 if args.device == "cpu" else 30]
    for operator in operators:
        path = args.out / f"bench_{operator}.part"
        path.unlink(missing_ok=True)
        command = [sys.executable, "cuda/bench.py", operator, "--device", args.device, "--peers", "--json", path, *more]
        status, output = call(command, seconds / len(operators))
        outputs.append(output)
        measured = json.loads(path.read_text()) if path.exists() else dict(rows=[])
        path.unlink(missing_ok=True)
        for row in measured["rows"]:
            append(args, "bench", dict(row, operator=operator, machine=measured["machine"]))
        table = [line for line in output.splitlines() if line.startswith("| ")]
        found[operator] = dict(table=table, said="" if status == 0 else last_line(output), **measured)
        ok = ok and status == 0
    return dict(ok=ok, operators=found), "".join(outputs)


def train(args, seconds):
    """Runs in order of interest, until the time is up."""
    end, rows, outputs, jobs = time.monotonic() + seconds, [], [], runs(args.device, micro_batch(args.device))
    with tempfile.TemporaryDirectory(prefix="tokens.") as folder:
        write_tokens(Path(folder), args.device, max(micro for *_, micro in jobs))
        for script, flags, micro in jobs:
            row = dict(script=script, flags=flags, device_bsz=micro)
            rows.append(row)
            if end - time.monotonic() < LEAST[args.device]:
                row["failed"] = NO_TIME
                continue
            job = json.dumps(dict(script=script, flags=flags, device_bsz=micro, device=args.device, data=folder))
            status, output = call([sys.executable, Path(__file__).resolve(), "--worker", job], end - time.monotonic())
            outputs.append(f"--- {script} {' '.join(flags)} --device_bsz {micro}: status {status}\n{output}\n")
            facts = last_json(output) if status == 0 else None
            row.update(facts or dict(failed=f"status {status}: {last_line(output)[:200]}"))
            append(args, "train", row)
    return dict(ok=all(row.get("failed", NO_TIME) == NO_TIME for row in rows), rows=rows), "".join(outputs)


# ----------------------------------------------------------------------------------------------------------------------
# Training runs


def scripts():
    return [name for name in ("train_rwkv7", "train_gpt2", "train_rwkv6") if (ROOT / f"{name}.py").exists()]


def kernels(script, device):
    return ["cpu"] if device == "cpu" else ["cuda", "fast", "wind"] if script == "train_rwkv7" else ["cuda", "fast"]


def runs(device, micro):
    """(script, flags, device_bsz): the race's two sides first."""
    flag = {"train_gpt2": []} if device == "cpu" else {"train_gpt2": [], "train_rwkv7": ["--fast_cuda"],
                                                       "train_rwkv6": ["--fast_cuda"]}
    jobs = [(script, flag.get(script, ["--kernel=cpu"]), micro) for script in scripts()]
    if device == "cuda":
        jobs[2:2] = [("train_rwkv7", ["--wind_cuda"], micro)]
        jobs += [("train_rwkv7", ["--kernel=cuda"], micro), ("train_rwkv7", ["--fast_cuda"], micro // 2),
                 ("train_rwkv7", ["--kernel=torch"], micro // 2)]
    return jobs


def write_tokens(folder, device, micro):
    """Shards of random tokens, enough for the longest run."""
    import numpy
    count = 2**12 if device == "cpu" else all_steps(device) * micro * 1024 + 1
    generator = numpy.random.default_rng(0)
    for name in ("random_train_000001.bin", "random_val_000000.bin"):
        header = numpy.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, count
        tokens = generator.integers(256 if device == "cpu" else 50257, size=count, dtype="uint16")
        (folder / name).write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def run_flags(job):
    """The command line of a training run. bsz is device_bsz: a step is one micro-batch and one update."""
    device, micro = job["device"], job["device_bsz"]
    return [*(TOY if device == "cpu" else ["--track=fineweb", "--device=cuda"]), *job["flags"], f"--data={job['data']}",
            f"--bsz={micro}", f"--device_bsz={micro}", f"--steps={all_steps(device)}", "--val_tokens=1024"]


def all_steps(device):
    return WARM_UP[device] + STEPS[device] + PROFILED[device]


def worker(job):
    """One training run in this process: prints its facts as one line of JSON. No record, no validation."""
    sys.path.insert(0, str(ROOT))
    import importlib
    import torch
    script, device, micro = importlib.import_module(job["script"]), job["device"], job["device_bsz"]
    cuda = device == "cuda"
    args = script.Hyperparameters.parse(run_flags(job))
    _, (train_stream, _, _), model, optimizers, counts = script.set_up(args, 0)
    compiled = torch.compile(model, fullgraph=True, dynamic=False) if cuda and args.compile else model
    loader, started = script.DataLoader(train_stream, args, 0, micro), time.perf_counter()
    numbers = iter(range(args.steps))

    def step():
        script.schedule(optimizers, next(numbers), args)
        return script.train_step(compiled, optimizers, *loader.next(), args)[0]

    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(WARM_UP[device]):
        loss = step()
    wait()
    ready = time.perf_counter() - started
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ms = step_times(step, STEPS[device], cuda)
    memory = torch.cuda.max_memory_allocated() if cuda else resident()
    rate = micro * args.seq_len / statistics.median(ms) * 1e3
    flops = model.flops_per_token(counts["active"]) * rate
    peak = [value for name, value in script.PEAK_FLOPS.items() if cuda and name in torch.cuda.get_device_name()]
    activities = [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *activities]) as profiler:
        for _ in range(PROFILED[device]):
            loss = step()
        wait()
    about = dict(kernel=getattr(args, "kernel", None), dtype=args.dtype, ready_seconds=ready, loss=loss.item(),
                 steps=len(ms), ms=statistics.median(ms), ms_min=min(ms), ms_max=max(ms), tokens_per_second=rate,
                 flops_per_second=flops, mfu=flops / max(peak) if peak else None, peak_memory=memory,
                 **operator_share(profiler.events(), cuda))
    print(json.dumps(about))


def step_times(step, count, cuda):
    """Milliseconds of each step, back to back: on a GPU between events, without waiting for it."""
    import torch
    if not cuda:
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:])]


def resident():
    """Peak of this process's memory in bytes, where that can be told."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def operator_share(events, cuda):
    """From a profile's events: {wkv_share: time below the wkv operators over all time, top: the five dearest names}.

    On a GPU, time of its kernels: an operator's event holds that of all it launched, a kernel's event its own.
    """
    from torch.autograd import DeviceType
    spent, below = {}, 0.0
    for event in events:
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu == cuda and not getattr(event, "is_user_annotation", False):
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[event.name] = spent.get(event.name, 0.0) + us
        if not on_gpu and is_operator(event) and not any(map(is_operator, ancestors(event))):  # autograd calls it again
            below += event.device_time_total if cuda else event.cpu_time_total
    total = sum(spent.values())
    top = sorted(spent.items(), key=lambda pair: -pair[1])[:5]
    return dict(wkv_share=below / total if total else None,
                top=[dict(name=name[:80], share=us / total) for name, us in top] if total else [])


def is_operator(event):
    return re.match(r"wkv\d::", event.name) is not None


def ancestors(event):
    while event := event.cpu_parent:
        yield event


# ----------------------------------------------------------------------------------------------------------------------
# Report


def markdown(results):
    lines = [f"# GPU session of {results['date']}, commit {results['commit']}, {results['device']}", ""]
    for name in SHARES:
        stage = results["stages"].get(name)
        if stage:
            lines += [f"## {name}: {stage['end']}, {stage['seconds']:.0f} s", "", *section(name, stage["facts"]), ""]
    return "\n".join(lines)


def section(name, facts):
    if not facts:
        return []
    if name == "doctor":
        return ["```", facts["page"].rstrip(), "```"]
    if name == "build":
        return table(("script", "kernel", "built", "s", "said"),
                     [(k["script"], k["kernel"], "yes" if k["ok"] else "NO", k["seconds"], k["said"])
                      for k in facts["kernels"]])
    if name == "tests":
        return [facts["summary"], *(f"- {line}" for line in facts["failed"])]
    if name == "bench":
        return [line for about in facts["operators"].values() for line in (*about["table"], "", about["said"], "")]
    return table(("script", "flags", "device_bsz", "ms/step", "tokens/s", "MFU", "peak GiB", "WKV", "ready s"), [
        (row["script"], " ".join(row["flags"]) or "-", row["device_bsz"], *(
            (f"failed: {row['failed']}", *["-"] * 5) if "failed" in row else (
                f"{row['ms']:.1f}", f"{row['tokens_per_second']:,.0f}", percent(row["mfu"]),
                f"{row['peak_memory'] / 2**30:.1f}" if row["peak_memory"] else "-", percent(row["wkv_share"]),
                f"{row['ready_seconds']:.0f}"))) for row in facts["rows"]])


def percent(x):
    return "-" if x is None else f"{x:.1%}"


def table(titles, rows):
    clean = lambda cell: str(cell).replace("|", "/")
    return [f"| {' | '.join(map(clean, row))} |" for row in (titles, ["---"] * len(titles), *rows)]


def write(out, results):
    for name, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("results.md", markdown(results))):
        (out / f"{name}.part").write_text(text, encoding="utf-8")
        os.replace(out / f"{name}.part", out / name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results, made if need be")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial with toy sizes")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=SHARES, default=list(SHARES), help="only these (default: all)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(json.loads(args.worker))
    if args.out is None:
        parser.error("--out DIR: where shall the results go?")
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    budget, stages = Budget(60 * args.minutes), {}
    commit = call(["git", "rev-parse", "--short", "HEAD"], 10)[1].strip() if shutil.which("git") else "unknown"
    date = datetime.datetime.now().isoformat("T", "minutes")
    results = dict(date=date, commit=commit, device=args.device, stages=stages)
    for name in [name for name in SHARES if name in args.stages]:
        seconds, started, facts, output = budget.share(SHARES[name]), time.monotonic(), None, ""
        if budget.left() < 1:
            end = NO_TIME
        else:
            try:
                facts, output = globals()[name](args, seconds)
                end = "done"
            except Exception as error:  # the next stage has its turn, whatever this one met
                end = f"failed: {type(error).__name__}: {error}"
        stages[name] = dict(end=end, seconds=time.monotonic() - started, facts=facts)
        with open(args.out / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"===== {name}\n{output}\n")
        write(args.out, results)
        print(f"\n## {name}: {end}, {stages[name]['seconds']:.0f} s\n" + "\n".join(section(name, facts)), flush=True)
    print(f"\nall of it: {args.out / 'results.md'}")
    return 0 if all(stage["facts"] and stage["facts"]["ok"] for stage in stages.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
