#!/usr/bin/env python3
"""All that a GPU must tell of this project, dearest first, in eight minutes: python dev/gpu_day.py --out DIR

    machine   what there is (cuda/doctor.py), clocks
    build     every kernel, all at once, each judged against float64
    accuracy  every kernel, forward and all gradients, on every input family, outputs filled with NaN beforehand, twice:
              the same bits; full-sized too, and from state to state
    bench     every kernel beside the floor: GB/s, peak memory, and what the model of the kernels predicted
    train     30 compiled steps of each script at 32 sequences, or what the card has the memory for: tokens/s, MFU,
              memory, the update apart, GPU time by class of kernel
    text      where --data names a folder of real text: RWKV-7 and the GPT, 400 steps on the same tokens, with records

DIR gets result.jsonl, a row a line as soon as it is known; result.md, the same to read; log.txt, all that was printed;
two records of the last stage, of two files each. python dev/gpu_day.py --tables DIR writes the tables of cuda/README.md
and README.md from it. --device cpu tries all of this on a CPU, with toy sizes. Needs no git and writes nowhere else but
to cuda/build/, where that can be written. Exit status 1 if any row tells of a failure.
"""

import argparse
import dataclasses
import datetime
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# ms of both passes at B 64, T 1024, C 768 on an H200 at 1.755 GHz, counted from the machine code (dev/LOG.md)
PREDICTED = {("wkv7", "fast", 64): 1.40, ("wkv7", "fast", 128): 2.03, ("time_mixing", "wind", 64): 2.20,
             ("wkv7", "cuda", 64): 5.65, ("wkv6", "fast", 64): 0.88, ("wkv6", "fast", 128): 1.2}
WARM_UP, STEPS, APART = 4, 30, 3  # steps before, of the timing, and of each of three looks after it
TEXT_STEPS = {"cuda": 400, "cpu": 12}
LEAST = {"cuda": 80, "cpu": 1}  # s that a training run takes at least: to start, to trace, to compile
GB_A_SEQUENCE, GB_FIXED = 1.8, 3  # of RWKV-7, not compiled, with room to spare (dev/LOG.md)
TOY = "--track=tiny --device=cpu --dtype=fp32 --width=32 --headsz=16 --layers=2 --seq_len=32".split()
CLASSES = (  # of what the GPU runs, by its name; the first that fits
    ("WKV", r"wkv|exact::|scan<|gradients<"), ("attention", r"flash|fmha|attention"),
    ("products", r"gemm|gemv|cutlass|nvjet|xmma|cublas|::(mm|addmm|bmm)$"), ("compiled", r"triton"),
    ("copies", r"mem(cpy|set)|copy"), ("other", ""))


class Day:
    """The rows, on the disk as soon as they are known, and the time that is left."""

    def __init__(self, out, device, minutes, data):
        self.out, self.device, self.data = out, device, data
        self.began, self.seconds, self.rows, self.lock = time.monotonic(), 60 * minutes, [], threading.Lock()

    def left(self, share=1.0):
        """Seconds until the end, at most this share of all time."""
        return min(self.began + self.seconds - time.monotonic(), share * self.seconds)

    def add(self, stage, **row):
        row = dict(stage=stage, at=round(time.monotonic() - self.began, 1), **row)
        with self.lock:
            self.rows.append(row)
            with open(self.out / "result.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(line_of(row), flush=True)

    def log(self, text):
        with self.lock, open(self.out / "log.txt", "a", encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else text + "\n")


def lines(command, limit, **env):
    """The lines that a command prints, as they come; the last is its exit status, 124 if its time was up: it is killed
    with all that it started."""
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env={**os.environ, **env}, text=True,
                               errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    late = []

    def kill():
        late.append(True)
        os.killpg(process.pid, signal.SIGKILL)
    timer = threading.Timer(max(0.1, limit), kill)
    timer.start()
    try:
        yield from process.stdout
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # Ctrl-C: leave nothing running
            os.killpg(process.pid, signal.SIGKILL)
    yield 124 if late else status


def call(command, limit, **env):
    """(status, what the command printed)."""
    *printed, status = lines(command, limit, **env)
    return status, "".join(printed)


def work(day, stage, jobs, seconds, **env):
    """Do jobs one after the other in one process, this program with --worker; its rows are added as they come. A job
    that ends the process gets a row with the reason, and the rest another process."""
    end, jobs = time.monotonic() + seconds, list(jobs)
    while jobs:
        if end - time.monotonic() < 1:
            for job in jobs:
                day.add(stage, **job, skipped="no time left")
            return
        done, latest = 0, "no output"
        task = json.dumps(dict(stage=stage, device=day.device, jobs=jobs))
        for line in lines([sys.executable, Path(__file__).resolve(), "--worker", task], end - time.monotonic(), **env):
            if isinstance(line, int):
                status = line
            elif '{"row": ' in line:
                day.add(stage, **json.loads(line[line.index('{"row": '):])["row"])
            elif line.startswith("done"):
                done += 1
            else:
                day.log(line)
                latest = line.strip() or latest
        if done < len(jobs):
            why = "its time was up" if status == 124 else f"status {status}: {latest[:200]}"
            day.add(stage, **jobs[done], failed=why)
        jobs = jobs[done + 1:]


# ----------------------------------------------------------------------------------------------------------------------
# Stages


def machine(day):
    commit = call(["git", "rev-parse", "--short", "HEAD"], 10)[1].strip() if shutil.which("git") else ""
    gpu = nvidia_smi("name,clocks.max.sm,clocks.mem,power.limit,memory.total")
    day.add("machine", device=day.device, date=datetime.datetime.now().isoformat("T", "minutes"), gpu=gpu,
            commit=commit if re.fullmatch(r"\w+", commit) else "unknown", python=sys.version.split()[0],
            device_bsz=micro_batch(day.device), page=call([sys.executable, "cuda/doctor.py"], day.left(0.1))[1])


def build(day):
    def one(pair):
        started = time.monotonic()
        status, output = call([sys.executable, "cuda/build.py", *pair], limit)
        day.log(f"--- {pair}: status {status}\n{output}")
        verdicts = [line.strip() for line in output.splitlines() if " built; " in line or "cannot be had" in line]
        day.add("build", operator=pair[0], kernel=pair[1], seconds=round(time.monotonic() - started, 1),
                **{"verdict" if status == 0 else "failed": (verdicts or output.splitlines()[-1:] or ["no output"])[0]})
    limit = day.left(0.2)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, kernels(day.device)))


def accuracy(day):
    """A process a kernel, since a CUDA error spoils its process; on a CPU one for all."""
    forms, sizes = [("wkv7", "torch"), ("wkv6", "torch"), *kernels("cuda")], (64, 128)
    if day.device == "cpu":
        forms, sizes = kernels("cpu"), (16,)
    bad = failures(day, "build", "operator", "kernel")
    processes = [[dict(operator="time_mixing" if kernel == "wind" else operator, kernel=kernel, N=N) for N in sizes]
                 for operator, kernel in forms if (operator, kernel) not in bad]
    processes = processes if day.device == "cuda" else [sum(processes, [])]
    seconds = day.left(0.25)
    with ThreadPoolExecutor(8 if micro_batch(day.device) > 16 else 3) as pool:  # 5 GB a process
        list(pool.map(lambda jobs: work(day, "accuracy", jobs, seconds, OMP_NUM_THREADS="2"), processes))


def bench(day):
    """What was built and did not fail in its test, dearest first."""
    wrong = failures(day, "accuracy", "operator", "kernel", "N")
    for operator, kernel in failures(day, "build", "operator", "kernel"):
        for name in (kernel, f"mix {kernel}"):
            wrong |= {(of, name, N) for of in (operator, "time_mixing") for N in (64, 128)}
    wanted = [("wkv7", "fast", 64), ("time_mixing", "wind", 64), ("time_mixing", "mix fast", 64), ("wkv7", "cuda", 64),
              ("wkv6", "fast", 64), ("wkv7", "fast", 128), ("wkv6", "fast", 128), ("wkv6", "cuda", 64),
              ("wkv7", "cuda", 128), ("wkv6", "cuda", 128),
              *(((op, kernel, N) for N in (64, 128) for op in ("wkv7", "wkv6") for kernel in ("fla", "torch")))]
    B, T, C = 64, 1024, 768
    if day.device == "cpu":
        B, T, C = 1, 32, 32
        wanted = [("wkv7", "cpu", 32), ("wkv6", "torch", 32)]
    work(day, "bench", [dict(operator=operator, kernel=kernel, shape=(B, T, C // N, N))
                        for operator, kernel, N in wanted if (operator, kernel, N) not in wrong], day.left(0.3))


def train(day):
    """Two runs at a time where both fit, since a run is mostly its compilation; they take turns at what is timed."""
    micro, cuda = micro_batch(day.device), day.device == "cuda"
    runs = [("train_rwkv7", "--fast_cuda"), ("train_gpt2", ""), ("train_rwkv6", "--fast_cuda")]
    if cuda:
        runs += [("train_rwkv7", "--wind_cuda"), ("train_rwkv7", "--kernel=cuda")]

    def one(run):
        job = dict(script=run[0], flags=run[1].split() if cuda else [], device_bsz=micro)
        if day.left() < LEAST[day.device]:
            day.add("train", **job, skipped="no time left")
        else:
            work(day, "train", [dict(job, data=folder)], day.left())
    with tempfile.TemporaryDirectory(prefix="tokens.") as folder:
        write_tokens(Path(folder), day.device, micro)
        both = cuda and 2 * (GB_FIXED + micro * GB_A_SEQUENCE) < 0.9 * gigabytes()
        with ThreadPoolExecutor(2 if both else 1) as pool:
            list(pool.map(one, runs))


def text(day):
    """RWKV-7 and the GPT on the same tokens of real text, with records."""
    if not day.data:
        return
    micro, steps, cuda = micro_batch(day.device), TEXT_STEPS[day.device], day.device == "cuda"
    for script, flags in (("train_rwkv7", ["--fast_cuda"]), ("train_gpt2", [])):
        row = dict(script=script, flags=flags if cuda else [], device_bsz=micro, steps=steps)
        if day.left() < 2 * LEAST[day.device]:
            day.add("text", **row, skipped="no time left")
            continue
        with tempfile.TemporaryDirectory(prefix="run.") as folder:
            command = [sys.executable, f"{script}.py", *run_flags(dict(row, data=day.data), day.device, steps)]
            command += [f"--records={folder}/records", f"--checkpoints={folder}/checkpoints",
                        f"--val_every={max(1, steps // 4)}", f"--warmdown_steps={steps // 4}",
                        f"--val_tokens={2**20 if cuda else 2**10}"]
            status, output = call(command, day.left())
            day.log(output)
            for path in Path(folder).glob("records/*/result.json"):
                final = json.loads(path.read_text())["final"]
                row |= {name: final[name] for name in ("val_loss", "train_seconds", "tokens")}
                shutil.copytree(path.parent, day.out / f"record_{script}", dirs_exist_ok=True)
        latest = (output.strip().splitlines() or ["no output"])[-1]
        day.add("text", **row, **({} if status == 0 else dict(failed=f"status {status}: {latest[:200]}")))


# ----------------------------------------------------------------------------------------------------------------------
# What the stages ask for


def kernels(device):
    """[(operator, kernel)] of cuda/build.py for the device."""
    rows = json.loads(call([sys.executable, "cuda/build.py", "--json"], 60)[1].splitlines()[-1])
    return [(row["operator"], row["kernel"]) for row in rows if (row["kernel"] == "cpu") == (device == "cpu")]


def failures(day, stage, *names):
    """{values of a row's fields} of the rows of a stage that tell of a failure."""
    return {tuple(map(row.get, names)) for row in day.rows if row["stage"] == stage and "failed" in row}


def nvidia_smi(fields):
    """Its answer, a line a GPU; "" without it."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return call(command, 20)[1].strip() if shutil.which("nvidia-smi") else ""


@functools.cache
def micro_batch(device):
    """The largest of 8, 16, 32 sequences of 1024 tokens that this GPU has the memory for; 2 short ones on a CPU."""
    if device == "cpu":
        return 2
    return max([n for n in (8, 16, 32) if GB_FIXED + n * GB_A_SEQUENCE < 0.9 * gigabytes()], default=4)


def gigabytes():
    """Memory of the (largest) GPU in GB."""
    return max(map(int, re.findall(r"^\d+$", nvidia_smi("memory.total"), re.M)), default=40960) * 2**20 / 1e9


def write_tokens(folder, device, micro):
    """Shards of random tokens, frequent ones and rare ones as in text, so that a loss can fall."""
    import numpy
    count = 2**12 if device == "cpu" else all_steps() * micro * 1024 + 1
    kinds = 256 if device == "cpu" else 50257
    frequency = 1 / numpy.arange(1, kinds + 1)
    generator = numpy.random.default_rng(0)
    for name in ("random_train_000001.bin", "random_val_000000.bin"):
        header = numpy.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, count
        tokens = generator.choice(kinds, size=count, p=frequency / frequency.sum())
        (folder / name).write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def all_steps():
    return WARM_UP + STEPS + 3 * APART


def run_flags(job, device, steps):
    """The command line of a training run. bsz is device_bsz: a step is one micro-batch and one update."""
    return [*(TOY if device == "cpu" else ["--track=fineweb", "--device=cuda"]), *job["flags"], f"--data={job['data']}",
            f"--bsz={job['device_bsz']}", f"--device_bsz={job['device_bsz']}", f"--steps={steps}"]


# ----------------------------------------------------------------------------------------------------------------------
# Workers: a job in this process


def worker(task):
    """{stage, device, jobs}: prints rows and, after each job, that it is done."""
    sys.path[:0] = [str(ROOT / "cuda"), str(ROOT)]
    do = dict(accuracy=test_kernel, bench=time_kernel, train=time_steps)[task["stage"]]
    try:
        only_load({job.get("kernel") for job in task["jobs"]})
        for job in task["jobs"]:
            for row in do(job, task["device"]):
                print(f"\n{json.dumps(dict(row=row))}", flush=True)
            print("done", flush=True)
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])


def only_load(wanted):
    """Kernels that no job asks for are not looked for: one that cannot be built takes its time at every try."""
    import cases
    why_not = cases.why_not
    wanted |= {name.removeprefix("mix ") for name in wanted if name}
    cases.why_not = functools.cache(
        lambda script, kernel: why_not(script, kernel) if kernel in wanted else "no job of this process asks for it")


@functools.cache
def kernels_of(operator, device, states=False):
    """An operator of cuda/cases.py and its kernels, {name: Kernel}."""
    import cases
    chosen = getattr(cases, operator)()
    chosen = cases.with_states(chosen, operator) if states else chosen
    return chosen, chosen.kernels(device, True)


def test_kernel(job, device):
    """A row for every family, one full-sized, one from state to state."""
    import bench
    import cases
    import torch
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new tensors with NaN
    dtype, N = bench.DTYPES[device], job["N"]
    operator, known = kernels_of(job["operator"], device)
    tries = [(family, operator, known, (*bench.CHECK_SHAPE[device], N)) for family in operator.families]
    form = cases.KERNELS.get((job["operator"], job["kernel"]))
    if job["operator"] != "time_mixing" and (form is None or form.states):
        tries += [(family, *kernels_of(job["operator"], device, True), (*bench.CHECK_SHAPE[device], N))
                  for family in ("random", "correlated")]
    if device == "cuda":
        tries.append(("random", operator, known, (1, 1024, 2, N)))
    for family, operator, known, shape in tries:
        kernel = known[job["kernel"]]
        if kernel.missing or N not in (kernel.head_sizes or operator.head_sizes):
            yield dict(job, skipped=kernel.missing or f"no heads of {N} channels")
            return
        errors, wrong = bench.check_family(operator, kernel, family, shape, device, dtype)
        gates = operator.gates(kernel.rounds, dtype, family)
        row = dict(job, family=family, shape=shape, errors=errors,
                   of_gate=max(error / gates[name] for name, error in errors.items()))
        yield dict(row, failed="; ".join(wrong)) if wrong else row
    if device == "cuda":
        torch.cuda.empty_cache()
        inputs, dy = operator.make("random", 32, 1024, 768 // N, N)
        leaves = [x.to(device).requires_grad_() for x in bench.cast(inputs, dtype)]
        one, other = ((y, *torch.autograd.grad(y, leaves, dy.to(y))) for y in (kernel.call(*leaves) for _ in range(2)))
        same = all(map(torch.equal, one, other)) and all(x.isfinite().all() for x in one)
        del leaves, one, other
        torch.cuda.empty_cache()  # other processes use this GPU too
        yield dict(job, family="full grid", shape=(32, 1024, 768 // N, N),
                   **({} if same else dict(failed="two runs differ, or NaN")))


@functools.cache
def timing(device):
    """Timer, bytes a second of a large copy, what is known of the machine."""
    import bench
    timer = bench.Events() if device == "cuda" else bench.WallClock()
    speed = bench.copy_speed(timer, device)
    machine = bench.describe(device) | {"copy GB/s": round(speed / 1e9, 1), "repeats": 30, "timed by": timer.how}
    return timer, speed, machine


def time_kernel(job, device):
    import bench
    operator, known = kernels_of(job["operator"], device)
    shape, make = tuple(job["shape"]), operator.make
    kernel, (timer, speed, machine) = known.get(job["kernel"]), timing(device)
    if kernel is None or kernel.missing or shape[3] not in (kernel.head_sizes or operator.head_sizes):
        yield dict(job, skipped=kernel and kernel.missing or "none such here")
        return

    def tiled(family, B, *rest):  # 8 sequences, over and over: random numbers take their time
        tile = lambda x: x.repeat(B // 8, 1, 1, 1) if x.dim() == 4 and B > 8 else x
        inputs, dy = make(family, min(B, 8), *rest)
        return [tile(x) for x in inputs], tile(dy)
    operator = dataclasses.replace(operator, make=tiled)
    fresh = bench.check if kernel.peer or job["kernel"].startswith("mix") else lambda *_: ({}, "")
    repeats = 30 if job["kernel"] != "torch" else 10
    row, = bench.measure(operator, shape, {job["kernel"]: kernel}, timer, device, repeats, speed, fresh)
    clock = nvidia_smi("clocks.sm").split() if device == "cuda" else []
    row |= dict(operator=job["operator"], machine=machine, clock_mhz=clock[0] if clock else None)
    refused = row.pop("refused")
    if "CUDA error" in refused:  # which spoils what comes after: the rest in another process
        raise RuntimeError(refused)
    if refused:
        row["failed" if not kernel.peer else "skipped"] = refused
    else:
        row["bytes_per_second"] = 1e3 * row["bytes"] / row["both_ms"]
        row["predicted_ms"] = PREDICTED.get((job["operator"], job["kernel"], shape[3]))
    yield row


def time_steps(job, device):
    """One training run: steps of one micro-batch and one update, then micro-batches alone. No record, no validation."""
    import importlib
    import torch
    sys.path.append(str(ROOT / "records"))
    import report
    script, cuda = importlib.import_module(job["script"]), device == "cuda"
    args = script.parse([*run_flags(job, device, all_steps()), "--val_tokens=1024"])
    (stream, _, _), model, optimizers, _ = script.set_up(args)
    compiled = script.prepare(model, args)
    numbers, losses = iter(range(args.steps)), []
    wait = torch.cuda.synchronize if cuda else lambda: None

    def step(update=True):
        number = next(numbers)
        script.schedule(optimizers, number, args)
        tokens = script.batch(stream, number, args)
        losses.append(script.train_step(compiled, optimizers if update else [], *tokens, args)[0])
    started = time.perf_counter()
    step()
    wait()
    ready = time.perf_counter() - started
    for _ in range(WARM_UP - 1):
        step()
    turn = open(Path(job["data"]) / "turn", "w")  # closed, and so passed on, when this process ends
    fcntl.flock(turn, fcntl.LOCK_EX)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ms = step_times(step, STEPS, cuda)
    memory = torch.cuda.max_memory_allocated() if cuda else None
    alone = statistics.median(step_times(lambda: step(False), APART, cuda))
    rate = args.bsz * args.seq_len / statistics.median(ms) * 1e3
    flops = script.size_of(model)["flops_per_token"] * rate
    peak = [value for name, value in report.PEAK_FLOPS.items() if cuda and name in torch.cuda.get_device_name()]
    loss = torch.stack(losses)[:WARM_UP + STEPS].tolist()
    row = dict(job, kernel=getattr(args, "kernel", None), dtype=args.dtype, first_step_s=ready, steps=len(ms),
               loss=[loss[0], statistics.mean(loss[-5:])], ms=statistics.median(ms), ms_min=min(ms),
               ms_max=max(ms), micro_batch_ms=alone, tokens_per_second=rate, mfu=flops / max(peak) if peak else None,
               peak_memory=memory)
    row.pop("data")
    for name, update in (("profile", True), ("profile_micro_batch", False)):
        try:
            row[name] = profile(lambda: step(update), APART, wait, cuda)
        except Exception as error:  # the profiler's own troubles: what was measured counts
            row[name] = dict(classes={}, top=[[f"no profile: {error}", 0.0]])
    yield row if row["loss"][1] < row["loss"][0] else dict(row, failed=f"the loss does not fall: {row['loss']}")


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


def profile(step, count, wait, cuda):
    """ms a step {"classes": by class, "top": of the ten dearest kernels}, on a CPU of torch's operators."""
    import torch
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profiler:
        for _ in range(count):
            step()
        wait()
    spent, classes = {}, dict.fromkeys((name for name, _ in CLASSES), 0.0)
    for event in profiler.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu == cuda and not getattr(event, "is_user_annotation", False):
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[event.name] = spent.get(event.name, 0.0) + us / 1e3 / count
    for name, ms in spent.items():
        classes[next(title for title, pattern in CLASSES if re.search(pattern, name, re.I))] += ms
    return dict(classes=classes, top=[(name[:160], ms) for name, ms in sorted(spent.items(), key=lambda x: -x[1])[:10]])


# ----------------------------------------------------------------------------------------------------------------------
# Report

COLUMNS = {  # stage: titles, and a row's cells as far as it has them
    "build": ("kernel s verdict", lambda r: (f"{r['operator']} {r['kernel']}", r["seconds"], r["verdict"])),
    "accuracy": ("kernel N family B,T,H,N of_gate worst", lambda r: (
        f"{r['operator']} {r['kernel']}", r["N"], r["family"], tuple(r["shape"]), number(r.get("of_gate"), ".0%"),
        number(max(r.get("errors", {}).values(), default=None), ".1e"))),
    "bench": ("kernel B,T,H,N forward backward both model GB/s of_floor peak_GiB MHz", lambda r: (
        f"{r['operator']} {r['kernel']}", tuple(r["shape"]), *(f"{r[f'{name}_ms']:.3g} ms" for name in (
            "forward", "backward", "both")), number(r["predicted_ms"], ".3g"), f"{r['bytes_per_second'] / 1e9:.0f}",
        f"{r['of_floor']:.0%}", number(r["peak_bytes"], ".2f", 2**30), r["clock_mhz"] or "-")),
    "train": ("script flags device_bsz ms/step micro-batch tokens/s MFU peak_GiB WKV first_step loss", lambda r: (
        r["script"], " ".join(r["flags"]) or "-", r["device_bsz"], f"{r['ms']:.1f}", f"{r['micro_batch_ms']:.1f}",
        f"{r['tokens_per_second']:,.0f}", number(r["mfu"], ".1%"), number(r["peak_memory"], ".1f", 2**30),
        number(share_of(r["profile"]["classes"], "WKV"), ".0%"),
        f"{r['first_step_s']:.0f} s", f"{r['loss'][0]:.2f} to {r['loss'][1]:.2f}")),
    "text": ("script flags device_bsz steps tokens val_loss seconds", lambda r: (
        r["script"], " ".join(r["flags"]) or "-", r["device_bsz"], r["steps"], f"{r['tokens']:,}",
        f"{r['val_loss']:.4f}", f"{r['train_seconds']:.1f}"))}


def share_of(classes, name):
    return classes[name] / sum(classes.values()) if any(classes.values()) else None


def number(x, form, unit=1):
    return "-" if x is None else format(x / unit, form)


def line_of(row):
    """A row as a line of a table."""
    if row["stage"] == "machine" and "failed" not in row:
        return f"{row['date']}, commit {row['commit']}, {row['gpu'] or row['device']}, device_bsz {row['device_bsz']}"
    if why := row.get("failed") or row.get("skipped"):
        facts = [str(row[name]) for name in ("operator", "kernel", "N", "family", "shape", "script", "flags")
                 if name in row]
        cells = [" ".join(facts), f"{'FAILED' if 'failed' in row else 'not here'}: {why}"]
    else:
        cells = COLUMNS[row["stage"]][1](row)
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def table(rows, stage):
    titles = [title.replace("_", " ") for title in COLUMNS[stage][0].split()]
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles))] + [
        line_of(row) for row in rows if row["stage"] == stage]


def page(rows):
    """result.md."""
    parts = [f"# A GPU's day: {line_of(row)}\n\n```\n{row.get('page', '').strip()}\n```" for row in rows[:1]]
    parts += ["\n".join((f"## {stage}", "", *table(rows, stage))) for stage in COLUMNS]
    for row in rows:
        for name in ("profile", "profile_micro_batch"):
            if name in row:
                classes = ", ".join(f"{title} {ms:.2f}" for title, ms in row[name]["classes"].items())
                top = "\n".join(f"    {ms:8.3f} ms  {kernel}" for kernel, ms in row[name]["top"])
                parts.append(f"{name} of {row['script']} {' '.join(row['flags'])}, ms a step: {classes}\n\n{top}")
    return "\n\n".join(parts) + "\n"


def tables(folder, root=ROOT):
    """The GPU's rows of a result into the tables of cuda/README.md and README.md. Raises ValueError, OSError."""
    sys.path[:0] = [str(ROOT / "cuda"), str(ROOT)]
    import cases
    bench = cases.load("bench.py")
    rows = [json.loads(line) for line in (folder / "result.jsonl").read_text(encoding="utf-8").splitlines()]
    if not rows or rows[0]["device"] != "cuda":
        raise ValueError(f"{folder / 'result.jsonl'} is not of a GPU.")
    done = [row for row in rows if not row.keys() & {"failed", "skipped"}]
    timed = [row for row in done if row["stage"] == "bench"]
    for row in timed:
        judged = [one for one in done if one["stage"] == "accuracy" and one["N"] == row["shape"][3] and "errors" in one
                 and (one["operator"], one["kernel"]) == (row["operator"], row["kernel"])]
        row["errors"] = row["errors"] or {one["family"]: one["errors"] for one in reversed(judged)}
        base = [one for one in timed if one["shape"] == row["shape"] and one["kernel"] == "torch"
                and one["operator"] == row["operator"]]
        row |= dict(refused="", **({"speed_up": base[0]["both_ms"] / row["both_ms"]} if base else {}))
    for name in ("wkv7", "wkv6"):
        operator_rows = [row for row in timed if row["operator"].replace("time_mixing", "wkv7") == name]
        if operator_rows:
            machine = operator_rows[0]["machine"]
            facts = [f"{name} {value}" for name, value in machine.items() if name not in ("device", "date")]
            header = ", ".join((machine["device"], machine["date"], *facts))
            bench.write_readme(name, "cuda", machine, header, operator_rows, root / "cuda" / "README.md")
    readme = root / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition("<!-- gpu_day: begin -->\n")
    end = "<!-- gpu_day: end -->"
    if end not in rest:
        raise ValueError(f"{readme}: the markers {begin.strip() or '<!-- gpu_day: begin -->'} and {end} are missing")
    texts = table(done, "text") if any(row["stage"] == "text" for row in done) else []
    new = "\n".join([f"{line_of(rows[0])}: {STEPS} steps of one micro-batch and one update, compiled.", "",
                     *table(done, "train"), "", *texts])
    readme.write_text(f"{before}{begin}{new}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results, made if need be")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial with toy sizes [cuda]")
    parser.add_argument("--minutes", type=float, default=8.0, help="minutes for everything [%(default)s]")
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help="shards of real text, for the last stage [none: it is left out]")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these [all]")
    parser.add_argument("--tables", type=Path, metavar="DIR", help="write the READMEs' tables from DIR/result.jsonl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(json.loads(args.worker))
    if args.tables:
        try:
            return tables(args.tables)
        except (ValueError, OSError) as error:
            sys.exit(f"gpu_day: {error}")
    if args.out is None:
        parser.error("--out DIR: where shall the results go?")
    if args.device == "cuda" and not nvidia_smi("name"):
        parser.error("nvidia-smi shows no GPU (python cuda/doctor.py says why); --device cpu tries all of this here")
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.jsonl").unlink(missing_ok=True)
    day = Day(out, args.device, args.minutes, args.data and args.data.absolute())
    for name in ["machine", *(name for name in STAGES if name in args.stages)]:
        try:
            if day.left() > 1:
                globals()[name](day)
        except Exception as error:  # the next stage has its turn, whatever this one met
            day.add(name, failed=f"{type(error).__name__}: {error}")
        (out / "result.md").write_text(page(day.rows), encoding="utf-8")
    bad = sum("failed" in row for row in day.rows)
    print(f"\n{bad} of {len(day.rows)} rows failed; all of it: {out / 'result.md'}")
    return 1 if bad else 0


STAGES = ("build", "accuracy", "bench", "train", "text")

if __name__ == "__main__":
    sys.exit(main())
