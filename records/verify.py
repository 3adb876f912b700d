"""Checks records without a GPU: does each agree with itself, with the rules and with the code that it names?

    python records/verify.py RECORD...              a folder of a run, or one of many; exit status 0 or 1
    python records/verify.py --no-code RECORD...    runs nothing that the record brought along
    python records/verify.py --replay 50 RECORD     runs its first 50 steps again, with its own sources, and compares

Without --no-code the training script inside log.txt is run, in a process and a folder of its own but with your rights:
to parse the recorded command and to build the model without memory (torch's meta device). --replay trains with it.
Do neither with the record of someone you would not take a program from.

What it proves: the record is whole and unedited since its end, its figures follow from each other, and its sources make
that model. The digests find an edit, not a forger: who edits can hash anew, so compare log_sha256 with what others saw
(a commit, a post). Only --replay shows that the sources make these losses; no program can show who waited how long.

Replayed losses must be equal bit for bit where machine, versions and settings are the same; elsewhere within BAND over
the first BAND_STEPS. Measured on track tiny: other threads, kernels, dtypes and micro-batches stay within 0.0032 there,
Muon's rate 10 % higher is 0.03 off. Later steps drift apart by rounding alone: they are shown, not judged.
"""
import argparse
import base64
import binascii
import hashlib
import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 2  # of the records that this reads
RULE = "=" * 100
BAND, BAND_STEPS = 0.01, 20  # nats by which a replayed loss may be off on another machine, in its first steps
ACTIVE_LIMIT, TARGET, FINEWEB_VAL = 124_000_000, 3.28, 10_485_760  # the rules of track fineweb
NUMBER = r"(\d+\.\d{4}|nan|inf)"
STEP = re.compile(rf"step:(\d+)/(\d+) (train|val)_loss:{NUMBER} train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")
NOTE = re.compile(r"step:(\d+)/(\d+) (spike|grad_norm):(.*)")
TAIL = ("losses", "curve", "clock", "wall", "result")  # the log's last lines but two, each key: JSON
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # environment variables that a replay does not pass on, and those
STEERING = ("OMP_", "GOMP_", "MALLOC_", "MKL_", "CUBLAS_", "NCCL_", "PYTORCH_", "NVIDIA_TF32_")  # only from the record
FACTS = ("record", "environment", "hardware", "data", "model")
PART = ("config", "environment", "hardware", "data")  # what another part of a resumed run may have otherwise
SAFE = re.compile(r"(train_\w+\.py|cuda(/\w[\w-]*)*/\w[\w.-]*)", re.ASCII)  # sources go nowhere else

PROBE = """
import importlib.util, json, os, runpy, sys
folder, script, out = sys.argv[1:]
spec = importlib.util.spec_from_file_location(script[:-3], os.path.join(folder, script))
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
answers = []
for command, config in json.load(sys.stdin):
    try:
        parse = getattr(module, "parse", None) or module.Hyperparameters.parse  # the latter before 2026-12
        parsed = vars(parse(command[1:])).copy()
        args = module.Hyperparameters(**config)
        kernel, build = getattr(args, "kernel", "torch"), os.path.join(folder, "cuda", "build.py")
        if hasattr(module, "kernel_sources"):  # a record from before cuda/build.py
            files = module.kernel_sources(kernel)
        elif kernel == "torch":
            files = ()
        else:
            files = runpy.run_path(build)["sources"](script[7:-3].replace("r", "", 1), kernel)
        args.__dict__.update({name: value for name, value in dict(kernel="torch", fast_cuda=False, wind_cuda=False,
                                                                 device="cpu").items() if hasattr(args, name)})
        with torch.device("meta"):
            model = module.build_model(args)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        active = sum(size for name, size in sizes.items() if name not in model.lookups)
        answers.append(dict(
            parsed=parsed, files=sorted(os.path.relpath(f, folder).replace(os.sep, "/") for f in files),
            model=dict(parameters=sum(sizes.values()), active=active, flops_per_token=model.flops_per_token(active))))
    except (Exception, SystemExit) as error:
        answers.append(dict(error=f"{type(error).__name__}: {error}"))
with open(out, "w") as file:
    json.dump(answers, file)
"""


class Failed(Exception):
    """A check's verdict: what is wrong, and where."""


class NotChecked(Exception):
    """A check that cannot be made here, and why."""


def need(condition, message):
    if not condition:
        raise Failed(message)


def text_of(value):
    """One text for equal values, NaN included."""
    return json.dumps(value, sort_keys=True)


def differences(a, b, path=""):
    """The places at which two JSON values differ: ["final.val_loss: 1.5 and 1.4", ...]."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}.{key}".lstrip(".") + " is in one only" for key in sorted(a.keys() ^ b.keys())]
        return missing + [d for key in a if key in b for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    short = lambda value: text if len(text := text_of(value)) < 60 else text[:57] + "..."
    return [] if text_of(a) == text_of(b) else [f"{path.lstrip('.')}: {short(a)} and {short(b)}"]


def near(a, b, relative=1e-9):
    return a is b is None or None not in (a, b) and (a == b or math.isnan(a) and math.isnan(b)
                                                     or math.isclose(a, b, rel_tol=relative))


# ----------------------------------------------------------------------------------------------------------------------
# Reading a record


class Log:
    """log.txt taken apart: facts {key: JSON}, sources [(header, text)], steps [(line number, match)],
    warm_ups, command, page (of the hardware), digest. Raises Failed with the number of the first wrong line.

    A resumed run has parts: resumed holds the lines that begin the later ones, parts the facts of each; facts and
    command are of the last.
    """

    def __init__(self, text):
        self.lines, self.at, self.facts, self.sources, self.steps = text.split("\n"), 0, {}, [], []
        self.resumed, self.warm_ups, self.parts = [], [], []
        need(self.lines.pop() == "", f"line {len(self.lines) + 1} is cut off: the log is truncated")
        self.fact("config")
        self.command = self.take("command: ")
        while self.peek() == RULE and self.peek(1).startswith("source: "):
            self.at += 1
            self.source(self.fact("source", keep=False))
        need(self.sources, f"line {self.at + 1}: no source is in the log")
        self.take(RULE)
        for key in FACTS:
            self.fact(key)
        page = self.at
        while self.peek() != RULE:
            self.at += 1
            need(self.at < len(self.lines), f"after line {page}: no rule line ends the page on the hardware")
        self.page = self.lines[page:self.at]
        self.take(RULE)
        self.begin_part()
        while True:
            if match := STEP.fullmatch(self.peek()):
                self.at += 1
                self.steps.append((self.at, match))
            elif "norm_every" in self.facts["config"] and NOTE.fullmatch(self.peek()):  # before 2026-12
                self.at += 1
            elif self.peek().startswith("resumed: "):
                self.resume()
            else:
                break

    def finish(self):
        """The lines after the last step, in a finished run's log."""
        last = f"step {self.steps[-1][1][1]}" if self.steps else "the warm-up"
        need(self.at < len(self.lines), f"the log ends after {last}: truncated, or of a run that was killed")
        if self.peek().startswith("checkpoint: "):  # why the last one could not be saved
            self.at += 1
        for key in TAIL:
            self.fact(key)
        self.digest = self.take("sha256: ")
        self.take("end: finished")
        need(self.at == len(self.lines), f"line {self.at + 1} comes after the end")

    def begin_part(self):
        self.parts.append(dict(self.facts, command=self.command))
        self.warm_ups.append(self.take("warm-up: "))

    def resume(self):
        """The line that begins a later part of the run: it follows from the one before."""
        line, number = self.fact("resumed", keep=False), self.at
        done = [int(match[1]) for _, match in self.steps if match[3] == "train"]
        now = line.get("now")
        need(isinstance(now, dict) and {*PART, "run", "command"} <= now.keys() and isinstance(now["command"], list),
             f"line {number}: it does not say how the run was resumed")
        need(line.get("step") == (done or [0])[-1], f"line {number}: resumed after step {line.get('step')}, the steps "
                                                    f"before it end with {(done or [0])[-1]}")
        run = self.facts["record"].get("run")
        need(line.get("run") == run, f"line {number}: resumed from {line.get('run')}, the lines before are of {run}")
        self.facts.update({key: now[key] for key in PART}, record=dict(self.facts["record"], run=now["run"]))
        self.command = shlex.join(map(str, now["command"]))
        self.resumed.append(line)
        self.begin_part()

    def peek(self, more=0):
        return self.lines[self.at + more] if self.at + more < len(self.lines) else ""

    def take(self, start):
        line = self.peek()
        self.at += 1
        there = f"{line[:60]!r}" if self.at <= len(self.lines) else "the end of the log"
        whole = start == RULE or start.startswith("end: ")
        need(line == start if whole else line.startswith(start),
             f"line {self.at} must be {start[:20].strip()!r}{'' if whole else ' ...'}, but there is {there}")
        return line[len(start):]

    def fact(self, key, keep=True):
        text = self.take(f"{key}: ")
        try:
            value = json.loads(text)
        except ValueError as error:
            raise Failed(f"line {self.at}: {key} is not JSON ({error})") from None
        need(isinstance(value, dict), f"line {self.at}: {key} is not a JSON object")
        if keep:
            self.facts[key] = value
        return value

    def source(self, header):
        count = header.get("lines")
        left = len(self.lines) - self.at
        need(isinstance(count, int) and 0 < count <= left,
             f"line {self.at}: a source of {count} lines; {left} are left")
        self.sources.append((header, "\n".join(self.lines[self.at:self.at + count]) + "\n"))
        self.at += count
        need(self.peek() == RULE, f"line {self.at + 1}: {header.get('name')} must end here, after {count} lines")

    def losses(self):
        """The training losses as they were, float32."""
        try:
            data = base64.b64decode(self.facts["losses"]["float32"], validate=True)
            return list(struct.unpack(f"<{len(data) // 4}f", data))
        except (binascii.Error, struct.error, KeyError, TypeError) as error:
            raise Failed(f"the line of all losses is damaged ({error})") from None


class Record:
    """A run's folder. data: log.txt's bytes; log: it taken apart, or None with `trouble` saying why; result: JSON."""

    def __init__(self, folder):
        self.folder, self.log, self.trouble, self.answer = Path(folder), None, None, None
        path = self.folder / "log.txt"
        need(path.exists(), "there is no log.txt")
        self.data = path.read_bytes()
        lines = self.data.decode("utf-8", "replace").rstrip("\n").split("\n")
        need(lines[0].startswith("config: {"),
             f"log.txt is another program's: it begins with {lines[0][:50]!r}, not with 'config: {{'")
        path = self.folder / "result.json"
        need(path.exists(), f"there is no result.json: the run did not finish; its log ends with {lines[-1][:80]!r}")
        try:
            self.result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Failed(f"result.json is damaged ({error})") from None
        schema = self.result.get("schema") if isinstance(self.result, dict) else None
        need(schema == SCHEMA, f"result.json has schema {schema}; this program reads {SCHEMA}. Make the run anew, or "
                               "take the verify.py of its commit")
        try:
            self.log = Log(self.data.decode("utf-8"))
            self.log.finish()
        except UnicodeDecodeError as error:
            self.trouble = f"log.txt is not UTF-8 ({error})"
        except Failed as error:
            self.trouble = str(error)

    def extract(self, folder):
        """Write the sources below a folder, as they lay beside the training script."""
        for header, text in self.log.sources:
            need(SAFE.fullmatch(header["name"]), f"a source called {header['name']!r} is not written anywhere")
            path = Path(folder) / header["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())


def folders(paths):
    """The records that are meant: each a folder with log.txt or result.json, at or below the paths."""
    found = []
    for path in paths:
        inside = {file.parent for name in ("log.txt", "result.json") for file in Path(path).rglob(name)}
        found += sorted(inside) or [Path(path)]
    return list(dict.fromkeys(found))


# ----------------------------------------------------------------------------------------------------------------------
# Checks: each returns what it found in order, or raises Failed or NotChecked. A log that cannot be taken apart is said
# once, by `log`; `chain` needs only its bytes.


def log(record):
    need(not record.trouble, record.trouble)
    return f"{len(record.log.lines):,} lines, each known and in its place"


def chain(record):
    """sha256 of the lines up to every validation and to the end."""
    lines = record.data.split(b"\n")
    points = {point["step"]: point["log_sha256"] for point in record.result["curve"]}
    digest, good, at = hashlib.sha256(), 0, 0
    for number, line in enumerate(lines[:-3], 1):
        digest.update(line + b"\n")
        if match := re.match(rb"step:(\d+)/\d+ val_loss:", line):
            at = int(match[1])
            need(points.pop(at, None) == digest.hexdigest(),
                 f"lines {good + 1} to {number} (up to the validation of step {at}) are not what the run wrote")
            good = number
    ending = f"after line {good} (the validation of step {at})" if good else "before any validation"
    need(not points, f"{ending}: the validation of step {next(iter(points), None)} is missing")
    value = record.result["log_sha256"]
    need(digest.hexdigest() == value and lines[-3:] == [b"sha256: " + str(value).encode(), b"end: finished", b""],
         f"the lines {ending} are not what the run wrote")
    return f"sha256 {value}"


def agreement(record):
    """Every value in result.json is in the log, the same, and none is missing."""
    facts, result = record.log.facts, record.result
    logged = dict(
        facts["record"], config=facts["config"], sources=[header for header, _ in record.log.sources],
        **{key: facts[key] for key in ("environment", "hardware", "data", "model", "clock", "wall")},
        curve=facts["curve"]["points"], final=facts["result"], end="finished", log_sha256=record.log.digest,
        command=result["command"])
    if record.log.resumed:
        logged["resumed"] = [{key: line.get(key) for key in ("run", "step", "began", "saved")}
                             for line in record.log.resumed]
    found = differences(logged, result)
    if shlex.join(result["command"]) != record.log.command:
        found.append(f"command: {record.log.command[:60]!r} and {shlex.join(result['command'])[:60]!r}")
    need(not found, f"log.txt and result.json differ in {len(found)} places: " + "; ".join(found[:3]))
    need(result["run"] == record.folder.resolve().name, f"the run is {result['run']}, the folder is called otherwise")
    return "log.txt and result.json say the same, to the digit"


def due(config):
    """The steps after which a run validates."""
    need(0 < config["steps"] <= 10**7, f"{config['steps']} steps")
    return [step for step in range(config["steps"] + 1) if step % config["val_every"] == 0 or step == config["steps"]]


def steps(record):
    """A line for each step and validation, in order; times never fall, averages and losses fit."""
    config, losses = record.result["config"], record.log.losses()
    curve, before = {point["step"]: point for point in record.result["curve"]}, 0
    validated = set(due(config))
    expected = [pair for step in range(config["steps"] + 1)
                for pair in [(step, "train")] * (step > 0) + [(step, "val")] * (step in validated)]
    need(len(losses) == config["steps"], f"{len(losses)} training losses at the log's end for {config['steps']} steps")
    for (step, split), (number, match) in zip(expected, record.log.steps):
        what = f"line {number}: step {match[1]}"
        need((match[1], match[2], match[3]) == (str(step), str(config["steps"]), split),
             f"line {number} must be the {split}_loss of step {step} of {config['steps']}, but is "
             f"{match[0].split(' train_time')[0]!r}")
        ms, average = int(match[5]), float(match[6])
        need(ms >= before, f"{what}: the training time falls from {before} to {ms} ms")
        rounding = 0.5 + 0.0051 * max(1, step)
        need(abs(average * max(1, step) - ms) <= rounding, f"{what}: {ms} ms are not {average} ms a step")
        loss = losses[step - 1] if split == "train" else curve[step]["val_loss"]
        need(f"{loss:.4f}" == match[4], f"{what}: its {split}_loss is {match[4]}, the exact one {loss}")
        if split == "val":
            exact = curve[step]["train_ms"]
            need(f"{exact:.0f}" == match[5] and f"{exact / max(1, step):.2f}" == match[6],
                 f"{what}: its times are not those of {exact} ms")
        before = ms
    need(len(record.log.steps) == len(expected),
         f"{len(record.log.steps)} lines of steps and validations where {len(expected)} are due")
    parts = "".join(f", resumed after step {line['step']:,}" for line in record.log.resumed)
    return f"{config['steps']:,} steps and {len(curve)} validations, times rising, losses as their exact values{parts}"



def schedule(record):
    """Validations when they are due; tokens = steps x sequences x length; the validation tokens that there are."""
    config, final, curve = (record.result[key] for key in ("config", "final", "curve"))
    need([point["step"] for point in curve] == due(config),
         f"validations at steps {[point['step'] for point in curve]}, due at {due(config)}")
    a_step = config["bsz"] * config["seq_len"]
    for point in curve:
        need(point["tokens"] == point["step"] * a_step, f"step {point['step']}: {point['tokens']} tokens, not "
                                                        f"{point['step']} x {a_step}")
    need((final["steps"], final["tokens"]) == (config["steps"], config["steps"] * a_step),
         f"final: {final['tokens']} tokens in {final['steps']} steps, not {config['steps']} x {a_step}")
    there = sum(shard["tokens"] for shard in record.result["data"]["val"]) - 1
    tokens = min(config["val_tokens"], there) // config["seq_len"] * config["seq_len"]
    need(final["val_tokens"] == tokens, f"{final['val_tokens']} validation tokens, not {tokens}")
    need(config["stop_after"] in (0, config["steps"]), f"stopped after step {config['stop_after']}: no result")
    return f"{config['steps']:,} x {a_step:,} = {final['tokens']:,} tokens, {tokens:,} to validate"


def figures(record):
    """The final figures follow from the curve, the clock and the model."""
    result, final, config = record.result, record.result["final"], record.result["config"]
    seconds, tokens, losses = final["train_seconds"], final["tokens"], [p["val_loss"] for p in result["curve"]]
    text = final["text_bytes"]
    longest = 1 if config["vocab_size"] == 257 else 255  # bytes of text a token
    need(text is None or 0 < text <= longest * final["val_tokens"],
         f"{text} bytes of text in {final['val_tokens']} tokens")
    flops = result["model"]["flops_per_token"] * tokens / seconds
    target = TARGET if config["track"] == "fineweb" else None
    expected = dict(
        val_loss=losses[-1], step_avg_ms=1e3 * seconds / final["steps"], tokens_per_second=tokens / seconds,
        flops_per_second=flops, bits_per_byte=losses[-1] * final["val_tokens"] / text / math.log(2) if text else None,
        target=target, reached=losses[-1] <= target if target else None,
        epochs=tokens / sum(shard["tokens"] for shard in result["data"]["train"]))
    for key, value in expected.items():
        need(near(final[key], value), f"final.{key} is {final[key]}, by the rest of the record {value}")
    need(final["mfu"] is None or 0 < final["mfu"] < 1, f"final.mfu is {final['mfu']}")
    return f"loss {losses[-1]:.4f} in {seconds:.1f} s of training, {tokens / seconds:,.0f} tokens/s"


def clock(record):
    """The phases add up to the time between the run's begin and end by the system's clock."""
    result, parts, wall = record.result, record.result["clock"], record.result["wall"]
    need(parts.keys() == {"warm-up", "train", "validation", "saving", "rest"}, f"phases {sorted(parts)}")
    need(all(seconds >= 0 for seconds in parts.values()), f"a phase of negative length: {parts}")
    final, last = result["final"]["train_seconds"], result["curve"][-1]["train_ms"]
    need(parts["train"] == final and near(1e3 * final, last),
         f"{parts['train']} s of training by the clock, {final} s in final, {last} ms at the last validation")
    times = [point["train_ms"] for point in result["curve"]]
    need(times == sorted(times) and times[0] == 0, f"training times of the validations: {times}")
    earlier = record.result.get("resumed", [])
    times = [moment for part in earlier for moment in (part["began"], part["saved"])] + [wall["began"], wall["ended"]]
    need(times == sorted(times), f"the parts of the run begin and end at {times}")
    total, passed = sum(parts.values()), sum(times[1::2]) - sum(times[::2])
    need(abs(total - passed) <= 1 + len(earlier) + 1e-3 * passed,
         f"the phases add up to {total:.1f} s, but {passed:.1f} s passed by the system's clock (edited, or the machine "
         "slept, or its clock was set)")
    stamp = datetime.strptime(result["run"][:20], "%Y-%m-%dT%H-%M-%SZ").replace(tzinfo=timezone.utc).timestamp()
    need(wall["began"] - 1 <= stamp <= wall["ended"], f"the run's name says {result['run'][:20]}, its clock otherwise")
    warm_ups = [re.search(r" in (\d+\.\d) s; .*: [0-9a-f]{64}$", line) for line in record.log.warm_ups]
    need(all(warm_ups) and abs(sum(float(line[1]) for line in warm_ups) - parts["warm-up"]) < 0.0501 * len(warm_ups),
         f"the warm-up's line is not one of {parts['warm-up']:.1f} s with the hash of the parameters")
    return f"{total:.1f} s in phases, {passed:.1f} s by the system's clock, {parts['train']:.1f} s of them training"


def sources(record):
    """The sources in the log have the hashes that are named; the script is the first, kernels come with their files."""
    for header, text in record.log.sources:
        digest = hashlib.sha256(text.encode()).hexdigest()
        need(digest == header["sha256"], f"{header['name']} in the log has sha256 {digest[:12]}..., its header says "
                                         f"{str(header['sha256'])[:12]}...")
        need(SAFE.fullmatch(header["name"]), f"a source must not be called {header['name']!r}")
    names = [header["name"] for header, _ in record.log.sources]
    need(names[0] == record.result["script"], f"the first source is {names[0]}, the script {record.result['script']}")
    need(len(set(names)) == len(names), f"a source is there twice: {names}")
    missing = set(record.answer.get("files", ())) - set(names) if record.answer else ()
    need(not missing, f"missing, though this run's kernel is built from it: {', '.join(sorted(missing))}")
    unknown = "" if record.answer else "; not checked whether all are there (--no-code)"
    return f"{len(names)}, with their hashes{unknown}"


def commit(record):
    """The sources are those of the commit that is named."""
    about = record.result["environment"]
    need(isinstance(about["git_commit"], str), "no commit")
    if not re.fullmatch("[0-9a-f]{40}", about["git_commit"]):
        raise NotChecked("the run was outside a git checkout")
    for header, text in record.log.sources:
        try:
            done = subprocess.run(["git", "show", f"{about['git_commit']}:{header['name']}"], cwd=ROOT,
                                  capture_output=True)
        except OSError:
            raise NotChecked("git is not there") from None
        if done.returncode:
            raise NotChecked(f"commit {about['git_commit'][:12]} with {header['name']} is not in this checkout")
        if done.stdout != text.encode():
            if about["git_dirty"]:
                raise NotChecked(f"{header['name']} had uncommitted changes, as the record says")
            raise Failed(f"{header['name']} is not that of commit {about['git_commit'][:12]}")
    return f"the sources are those of commit {about['git_commit'][:12]}"


def command(record):
    """The recorded command makes the recorded configuration, by the embedded script's own parser."""
    config, words = record.result["config"], record.result["command"]
    need(words[0] == record.result["script"], f"the command runs {words[0]}, the script is {record.result['script']}")
    seed = config["random_seed"]
    need(record.result["seed"] == seed, f"the seed is {record.result['seed']}, in config {seed}")
    if not record.answer:
        raise NotChecked("--no-code")
    need("error" not in record.answer, record.answer.get("error"))
    parsed = record.answer["parsed"]
    free = {name for name in ("device", "dtype", "kernel") if parsed.get(name) == "auto"}  # the machine's choice
    free |= {"kernel"} if config.get("fast_cuda") or config.get("wind_cuda") else set()
    parsed, config = ({key: value for key, value in all.items() if key not in free} for all in (parsed, config))
    found = differences(parsed, config)
    need(not found, f"by its command the configuration is another: {'; '.join(found[:3])}")
    return f"makes the recorded configuration, seed {seed}"


def model(record):
    """The model that the embedded source builds has the recorded size, on track fineweb within the limit."""
    if not record.answer:
        raise NotChecked("--no-code")
    need("error" not in record.answer, record.answer.get("error"))
    found = differences(record.result["model"], record.answer["model"])
    need(not found, f"recorded and built model differ: {'; '.join(found)}")
    active = record.answer["model"]["active"]
    need(record.result["config"]["track"] != "fineweb" or active <= ACTIVE_LIMIT,
         f"{active:,} parameters are active; track fineweb allows {ACTIVE_LIMIT:,}")
    return f"{active:,} active parameters"


def data(record):
    """The shards are those of the manifest that lay beside them, and of the one of that data set here."""
    about = record.result["data"]
    shards = {shard["name"]: (shard["tokens"], shard["sha256"]) for split in ("train", "val") for shard in about[split]}
    need(all(re.fullmatch("[0-9a-f]{64}", digest) for _, digest in shards.values()), "a shard without a sha256")
    listed = lambda manifest: {s["name"]: (s["tokens"], s["sha256"]) for s in manifest.get("shards", ())}
    manifest = about["manifest"] or {}
    wrong = [name for name in shards if listed(manifest) and listed(manifest).get(name) != shards[name]]
    need(not wrong, f"{', '.join(wrong)}: tokens or sha256 are not those of the manifest in the record")
    path = ROOT / about["folder"] / "manifest.json"
    if not listed(manifest):
        raise NotChecked("the data had no manifest.json")
    if not path.exists():
        raise NotChecked(f"as its own manifest says; there is no {about['folder']}/manifest.json here to compare with")
    here = json.loads(path.read_text(encoding="utf-8"))
    for key in ("dataset", "python", "builder"):  # of pydocs: Python's own text, by one version of the builder
        if here.get(key) != manifest.get(key):
            raise NotChecked(f"as its own manifest says; {about['folder']} here is of another {key} "
                             f"({str(here.get(key))[:12]}, not {str(manifest.get(key))[:12]})")
    both = shards.keys() & listed(here).keys()
    if not both:
        raise NotChecked(f"as its own manifest says; none of its shards is in {about['folder']} here")
    wrong = sorted(name for name in both if listed(here)[name] != shards[name])
    need(not wrong, f"{', '.join(wrong)}: tokens or sha256 are not those of {about['folder']}/manifest.json here")
    rest = ", the others as in its own manifest" if len(both) < len(shards) else ""
    return f"{len(both)} of {len(shards)} shards of {manifest.get('dataset')} as in {about['folder']} here{rest}"


def tokens(record):
    """No training token is read twice unless --epochs says so, and no shard is train and val."""
    config, about = record.result["config"], record.result["data"]
    digests = [shard["sha256"] for split in ("train", "val") for shard in about[split]]
    need(len(set(digests)) == len(digests), "a shard is there twice, or in train and in val")
    there, read = sum(shard["tokens"] for shard in about["train"]), config["steps"] * config["bsz"] * config["seq_len"]
    need(0 < there < 10**13, f"{there} training tokens")
    epochs, target = config["epochs"], 1  # the last target is no input
    if config["order"] == "shuffled":  # whole chunks after a phase
        there, target = (there - config["seq_len"]) // config["seq_len"] * config["seq_len"], 0
    need(read + target <= there * epochs,
         f"{read:,} tokens were read of {there:,}: more often than declared (--epochs {epochs})")
    times = f"{read / there:.2f} times; --epochs {epochs} declares it" if read + target > there else "each at most once"
    return f"{read:,} of {there:,} read, {times}"


def rules(record):
    """What the track asks for."""
    config = record.result["config"]
    need(config["track"] in ("fineweb", "tiny"), f"there is no track {config['track']!r}")
    if config["track"] == "fineweb":
        val_tokens, active = record.result["final"]["val_tokens"], record.result["model"]["active"]
        need(val_tokens == FINEWEB_VAL, f"{val_tokens:,} validation tokens; track fineweb has {FINEWEB_VAL:,}")
        need((config["epochs"], config["order"]) == (1, "sequential"), "track fineweb reads every token once, in order")
        need(active <= ACTIVE_LIMIT, f"{active:,} active parameters; track fineweb allows {ACTIVE_LIMIT:,}")
    return f"of track {config['track']} are kept"


CHECKS = (log, chain, agreement, steps, schedule, figures, clock, sources, commit, command, model, data, tokens,
          rules)


def judge(check, record):
    """(verdict, text) of one check of one record."""
    if record.trouble and check not in (log, chain):
        return "not checked", "the log cannot be taken apart"
    try:
        return "ok", check(record)
    except Failed as error:
        return "FAILED", str(error)
    except NotChecked as why:
        return "not checked", str(why)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        return "FAILED", f"a value is missing or of another kind ({type(error).__name__}: {error})"


def same_sources(records):
    """{record: complaint} of those whose sources differ from another's, of the same commit without changes to it."""
    seen, found = {}, {}
    for record in (record for record in records if not record.trouble):
        about = record.log.facts["environment"]
        if re.fullmatch("[0-9a-f]{40}", str(about.get("git_commit"))) and not about.get("git_dirty"):
            for header, text in record.log.sources:
                key, digest = (about["git_commit"], header.get("name")), hashlib.sha256(text.encode()).hexdigest()
                first, other = seen.setdefault(key, (record, digest))
                if other != digest:
                    found[record] = f"{header['name']} is not the one of {first.folder.name}, of the same commit"
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Running a record's own code


def probe(records):
    """Fill record.answer from the embedded scripts: one process for all records with the same sources."""
    groups = {}
    for record in records:
        if not record.trouble:
            key = text_of([[header.get("name"), text] for header, text in record.log.sources])
            groups.setdefault(key, []).append(record)
    for group in groups.values():
        try:
            answers = ask(group)
        except (Failed, OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
            answers = [dict(error=f"the embedded script does not run here: {error}")] * len(group)
        for record, answer in zip(group, answers):
            record.answer = answer


def ask(group):
    with tempfile.TemporaryDirectory() as folder:
        group[0].extract(folder)
        out, script = Path(folder) / "answer.json", group[0].log.sources[0][0]["name"]
        jobs = [[record.result.get("command"), record.result.get("config")] for record in group]
        done = subprocess.run([sys.executable, "-I", "-X", "utf8", "-c", PROBE, folder, script, str(out)], cwd=folder,
                              env=dict(PATH=os.environ.get("PATH", ""), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
                              input=json.dumps(jobs), capture_output=True, text=True, timeout=300)
        need(out.exists(), (done.stderr.strip().splitlines() or ["it said nothing"])[-1])
        return json.loads(out.read_text())


def replay(record, count, data_folder, devices):
    """(verdict, text): run the first `count` steps again, in a fresh folder, and compare loss by loss."""
    need(not record.trouble, record.trouble)
    result, first = record.result, record.log.parts[0]  # of a resumed run: how it began
    config = first["config"]
    need(count <= config["steps"], f"--replay {count}: the run has {config['steps']} steps")
    folder = Path(tempfile.mkdtemp(prefix="replay-"))
    record.extract(folder)
    data_folder = Path(data_folder) if data_folder else next(
        (path for path in (Path(config["data"]), ROOT / config["data"]) if path.exists()), Path(config["data"]))
    devices = devices or first["hardware"]["count"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"] if devices > 1 else []
    flags = dict(stop_after=count, data=data_folder.resolve(), records=folder / "records", name="replay", save_every=0,
                 device=config["device"], dtype=config["dtype"])
    flags.update(dict(checkpoints=folder / "checkpoints", resume="") if "resume" in config else {})
    line = [*launch, str(folder / result["script"]), *shlex.split(first["command"])[1:],
            *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(STEERING)}
    env.update(first["environment"]["variables"], OMP_NUM_THREADS=str(first["environment"]["threads"]))
    print(f"  replay in {folder}: {shlex.join(['python', *line])}", flush=True)
    done = subprocess.run([sys.executable, *line], cwd=folder, env=env, stdout=sys.stderr)
    logs = list((folder / "records").glob("*/log.txt"))
    need(done.returncode == 0 and logs, f"the script ended with status {done.returncode}, see above"
                                        + (f" and {logs[0]}" if logs else ""))
    return compare(record, Log(logs[0].read_text(encoding="utf-8")), count)


def compare(record, again, count):
    """The verdict on a replayed log."""
    again.fact("losses")
    here, there = again.losses()[:count], record.log.losses()[:count]
    for split in ("train", "val"):
        shards = [[(s["name"], s["sha256"]) for s in facts["data"][split]] for facts in (again.facts, record.result)]
        need(shards[0] == shards[1][:len(shards[0])], f"the {split} shards here are other ones: no losses to compare")
    need(len(here) == count == len(there), f"{len(here)} losses of {count} steps")
    unlike = ("stop_after", "data", "records", "name", "save_every", "checkpoints", "resume")
    facts = lambda all: dict(
        {f"environment.{key}": all["environment"][key] for key in ("torch", "cuda", "driver", "nvcc", "compiler", "isa",
                                                                  "threads")},
        **{f"config.{key}": value for key, value in all["config"].items() if key not in unlike},
        **{f"hardware.{key}": all["hardware"][key] for key in ("name", "count")})
    begins = [0] + [line["step"] for line in record.log.resumed]
    parts = [part for part, begin in zip(record.log.parts, begins) if begin < count]
    other = [key for part in parts for key, value in facts(part).items() if facts(again.facts).get(key, None) != value]
    where = f"another machine or other versions ({', '.join(other)})" if other else "the same machine and versions"
    recorded = {point["step"]: point["val_loss"] for point in record.result["curve"] if point["step"] <= count}
    rows = [(i, f"step {i}", a, b) for i, (a, b) in enumerate(zip(there, here), 1)]
    rows += [(step, f"the validation of step {step}", float(f"{recorded[step]:.4f}"), float(match[4]))  # as in the log
             for _, match in again.steps if match[3] == "val" and (step := int(match[1])) in recorded]
    off = lambda row: 0.0 if row[2] == row[3] or math.isnan(row[2]) and math.isnan(row[3]) else abs(row[2] - row[3])
    say = lambda row: f"{row[1]}: recorded {row[2]!r}, here {row[3]!r}"
    apart = [row for row in rows if off(row) != 0]
    if not apart:
        return "ok", f"{count} steps and {len(rows) - count} validations are equal bit for bit, on {where}"
    first = f"the first that differs is {say(apart[0])}"
    if not other:
        return "FAILED", f"on {where} the losses must be equal bit for bit; {first}"
    beyond = [row for row in apart if row[0] <= BAND_STEPS and not off(row) <= BAND]
    if beyond:
        return "FAILED", f"on {where} the first {BAND_STEPS} steps may be {BAND} off, but {say(beyond[0])}; {first}"
    judged = min(count, BAND_STEPS)
    later = f", all {count} within {max(map(off, rows)):.2g}, of which those after are not judged" * (count > judged)
    most = max(off(row) for row in rows if row[0] <= judged)
    return "ok", f"on {where} the first {judged} steps are within {most:.2g}, {BAND} is allowed{later}; {first}"


# ----------------------------------------------------------------------------------------------------------------------
# Main


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="+", help="folder of a run, or one with such folders below it")
    parser.add_argument("--no-code", action="store_true", help="run nothing of the record's own: no model, no command")
    parser.add_argument("--replay", type=int, metavar="N", help="run the first N steps again and compare")
    parser.add_argument("--data", help="with --replay: folder of the shards [the recorded one, here]")
    parser.add_argument("--devices", type=int, help="with --replay: number of GPUs [the recorded one]")
    args = parser.parse_args(argv)
    if args.replay is not None and (args.replay < 1 or args.no_code):
        parser.error("--replay N runs the record's code, for at least one step")
    start, records, bad = time.perf_counter(), {}, 0
    for folder in folders(args.record):
        try:
            records[folder] = Record(folder)
        except (Failed, OSError) as error:
            records[folder] = error
    good = [record for record in records.values() if isinstance(record, Record)]
    if not args.no_code:
        probe(good)
    strangers = same_sources(good)
    for folder, record in records.items():
        print(folder)
        if not isinstance(record, Record):
            verdicts = [("files", "FAILED", str(record))]
        else:
            verdicts = [("files", "ok", f"log.txt and result.json, schema {SCHEMA}")]
            verdicts += [(check.__name__, *judge(check, record)) for check in CHECKS]
            if record in strangers:
                verdicts.append(("sources", "FAILED", strangers[record]))
        for name, verdict, text in verdicts:
            print(f"  {verdict:12} {name:10} {text}")
        if args.replay and isinstance(record, Record):
            try:
                verdicts.append(("replay", *replay(record, args.replay, args.data, args.devices)))
            except (Failed, OSError, KeyError, TypeError, ValueError) as error:
                verdicts.append(("replay", "FAILED", str(error)))
            print(f"  {verdicts[-1][1]:12} {'replay':10} {verdicts[-1][2]}")
        bad += any(verdict == "FAILED" for _, verdict, _ in verdicts)
    print(f"{len(records) - bad} of {len(records)} records verified in {time.perf_counter() - start:.1f} s"
          + (f"; {bad} FAILED" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
