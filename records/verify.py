"""Checks records without a GPU: does each agree with itself, with the rules and with the code that it names?

    python records/verify.py RECORD...              a folder of a run, or one of many; exit status 0 or 1
    python records/verify.py --no-code RECORD...    runs nothing that the record brought along
    python records/verify.py --replay 50 RECORD     runs its first 50 steps again, with its own sources, and compares

Without --no-code the training script inside log.txt is run, in a process and a folder of its own but with your rights:
to parse the recorded command and to build the model without memory (torch's meta device). --replay trains with it.
Do neither with the record of someone you would not take a program from.

What it proves: the record is whole and unedited since its end, its figures follow from each other, and its sources make
that model. log.txt and result.json hold each other's sha256: that finds an edit, not a forger, since who edits can hash
anew; so compare log_sha256 with what others saw (a commit, a post). Only --replay shows that the sources make these
losses; no program can show who waited how long.

Replayed losses must be equal bit for bit where machine, versions and settings are the same; elsewhere within BAND over
the first BAND_STEPS. Measured on track tiny: other threads, kernels, dtypes and micro-batches stay within 0.0032 there,
Muon's rate 10 % higher is 0.03 off. Later steps drift apart by rounding alone: they are shown, not judged.
"""
import argparse
import base64
import contextlib
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
SCHEMA = 3  # of the records that this reads
RULE = "=" * 100
BAND, BAND_STEPS = 0.01, 20  # nats by which a replayed loss may be off on another machine, in its first steps
ACTIVE_LIMIT, FINEWEB_VAL = 124_000_000, 10_485_760  # the rules of track fineweb
STEP = re.compile(r"step:(\d+)/(\d+) (train|val)_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # environment variables that a replay does not pass on, and those
STEERING = ("OMP_", "GOMP_", "MALLOC_", "MKL_", "CUBLAS_", "NCCL_", "PYTORCH_", "NVIDIA_TF32_")  # only from the record
KEYS = {"schema", "run", "script", "config", "command", "environment", "hardware", "data", "model", "git", "sources",
        "curve", "final", "clock", "wall", "parts", "checkpoint_sha256", "log_sha256"}  # of result.json
FREE = ("device_bsz", "data", "records", "checkpoints", "name", "save_every", "resume", "stop_after",
        "check")  # flags that may differ between the parts of a resumed run, and in a replay
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
        parsed = vars(module.parse(command[1:])).copy()
        args, files = module.Hyperparameters(**config), ()
        if getattr(args, "kernel", "torch") != "torch":
            cuda = os.path.join(folder, "cuda")
            operator, = (name for name in os.listdir(cuda) if os.path.isdir(os.path.join(cuda, name)))
            files = runpy.run_path(os.path.join(cuda, "build.py"))["sources"](operator, args.kernel)
        args.__dict__.update({name: value for name, value in dict(kernel="torch", fast_cuda=False, wind_cuda=False,
                                                                 device="cpu").items() if hasattr(args, name)})
        with torch.device("meta"):
            model = module.build_model(args)
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        answers.append(dict(
            parsed=parsed, files=sorted(os.path.relpath(f, folder).replace(os.sep, "/") for f in files),
            model=module.size_of(model), shapes=shapes))
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


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Reading a record


class Log:
    """log.txt taken apart up to its last step: config, command, sources [(header, text)], facts, parameters, warm_up,
    resumed (None of a run in one part), steps [(line number, match)]. Raises Failed with the first wrong line."""

    def __init__(self, text):
        self.lines, self.at, self.sources, self.parameters, self.steps = text.split("\n"), 0, [], [], []
        need(self.lines.pop() == "", f"line {len(self.lines) + 1} is cut off: the log is truncated")
        self.config = self.fact("config")
        self.command = self.take("command: ")
        while self.peek() == RULE and self.peek(1).startswith("source: "):
            self.at += 1
            self.sources.append((self.fact("source"), self.source()))
        need(self.sources, f"line {self.at + 1}: no source is in the log")
        self.take(RULE)
        self.facts = self.fact("facts")
        while self.peek().startswith("parameter: "):
            self.parameters.append(self.fact("parameter"))
        self.warm_up = self.fact("warm-up")
        self.resumed = self.fact("resumed") if self.peek().startswith("resumed: ") else None
        while match := STEP.fullmatch(self.peek()):
            self.at += 1
            self.steps.append((self.at, match))

    def finish(self):
        """The lines after the last step in a finished run's log: the losses, float32; result.json's digest; the end."""
        last = f"step {self.steps[-1][1][1]}" if self.steps else "the warm-up"
        need(self.at < len(self.lines), f"the log ends after {last}: truncated, or of a run that was killed")
        self.read_losses()
        self.result = self.take("result: ")
        self.take("end: finished", whole=True)
        need(self.at == len(self.lines), f"line {self.at + 1} comes after the end")

    def read_losses(self):
        try:
            data = base64.b64decode(self.take("losses: "), validate=True)
            self.losses = list(struct.unpack(f"<{len(data) // 4}f", data))
        except (ValueError, struct.error) as error:
            raise Failed(f"line {self.at}: the line of all losses is damaged ({error})") from None

    def peek(self, more=0):
        return self.lines[self.at + more] if self.at + more < len(self.lines) else ""

    def take(self, start, whole=False):
        line = self.peek()
        self.at += 1
        actual = f"{line[:60]!r}" if self.at <= len(self.lines) else "the end of the log"
        need(line == start if whole else line.startswith(start),
             f"line {self.at} must be {start[:20].strip()!r}{'' if whole else ' ...'}, but there is {actual}")
        return line[len(start):]

    def fact(self, key):
        text = self.take(f"{key}: ")
        try:
            value = json.loads(text)
        except ValueError as error:
            raise Failed(f"line {self.at}: {key} is not JSON ({error})") from None
        need(isinstance(value, dict), f"line {self.at}: {key} is not a JSON object")
        return value

    def source(self):
        """The text up to the rule line before the next source or the facts; its own last line end is not the log's."""
        begin = self.at
        while not (self.peek() == RULE and self.peek(1).startswith(("source: {", "facts: {"))):
            self.at += 1
            need(self.at < len(self.lines), f"after line {begin}: no rule line ends the source")
        return "\n".join(self.lines[begin:self.at])


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
            self.result = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
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


def refuse(constant):
    raise ValueError(f"{constant} is no number")


def folders(paths):
    """The records that are meant: each a folder with log.txt or result.json, at or below the paths. What a race's own
    list says was interrupted or failed is none."""
    records = []
    for path in paths:
        inside = {file.parent for name in ("log.txt", "result.json") for file in Path(path).rglob(name)}
        for race_file in Path(path).rglob("race.json"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # said by the check of the race
                runs = json.loads(race_file.read_text(encoding="utf-8"))["runs"]
                inside -= {race_file.parent / str(run["folder"]) for run in runs if run["end"] != "finished"}
        records += sorted(inside) or [Path(path)]
    return list(dict.fromkeys(records))


# ----------------------------------------------------------------------------------------------------------------------
# Checks: each returns what it found in order, or raises Failed or NotChecked. A log that cannot be taken apart is said
# once, by `log`; `seal` needs only its bytes.


def log(record):
    need(not record.trouble, record.trouble)
    return f"{len(record.log.lines):,} lines, each known and in its place"


def seal(record):
    """log.txt and result.json hold each other's sha256."""
    value = record.result["log_sha256"]
    need(sha256(record.data) == value, "log.txt is not what the run wrote: its sha256 is not the one in result.json")
    rest = {key: value for key, value in record.result.items() if key != "log_sha256"}
    digest = re.search(rb"\nresult: (.*)\nend: finished\n\Z", record.data)
    need(digest and digest[1].decode() == sha256(text_of(rest).encode()),
         "result.json is not what the run wrote: its sha256 is not the one in log.txt")
    return f"sha256 {value}"


def agreement(record):
    """What log.txt and result.json both say is the same."""
    result, lines = record.result, record.log
    need(result.keys() == KEYS, f"in result.json these are missing or unknown: {sorted(result.keys() ^ KEYS)}")
    logged = dict(lines.facts, config=lines.config, command=lines.command, script=lines.sources[0][0]["name"],
                  sources=[header for header, _ in lines.sources])
    wrong = differences(logged, {key: result[key] for key in logged})
    need(not wrong, f"log.txt and result.json differ in {len(wrong)} places: " + "; ".join(wrong[:3]))
    need(result["run"] == record.folder.resolve().name, f"the run is {result['run']}, the folder is called otherwise")
    return "log.txt and result.json say the same"


def due(config):
    """The steps after which a run validates."""
    need(0 < config["steps"] <= 10**7, f"{config['steps']} steps")
    return [step for step in range(config["steps"] + 1) if step % config["val_every"] == 0 or step == config["steps"]]


def steps(record):
    """A line for each step and validation of this part, in order; times never fall, averages and losses fit."""
    config, lines = record.result["config"], record.log
    before = 1e3 * sum(part["train_seconds"] for part in record.result["parts"]) - 0.5
    curve = {point["step"]: point for point in record.result["curve"]}
    begin = lines.resumed["step"] if lines.resumed else 0
    validated, first = set(due(config)), lines.steps[0][1] if lines.steps else None
    if begin and first and first[3] == "train":
        validated.discard(begin)  # by the part before
    expected = [pair for step in range(begin, config["steps"] + 1)
                for pair in [(step, "train")] * (step > begin) + [(step, "val")] * (step in validated)]
    need(len(lines.losses) == config["steps"], f"{len(lines.losses)} losses at the end for {config['steps']} steps")
    for (step, split), (number, match) in zip(expected, lines.steps):
        what = f"line {number}: step {match[1]}"
        need((match[1], match[2], match[3]) == (str(step), str(config["steps"]), split),
             f"line {number} must be the {split}_loss of step {step} of {config['steps']}, but is "
             f"{match[0].split(' train_time')[0]!r}")
        ms, average = int(match[5]), float(match[6])
        need(ms >= before, f"{what}: the training time falls from {before:.0f} to {ms} ms")
        rounding = 0.5 + 0.0051 * max(1, step)
        need(abs(average * max(1, step) - ms) <= rounding, f"{what}: {ms} ms are not {average} ms a step")
        loss = lines.losses[step - 1] if split == "train" else curve[step]["val_loss"]
        need(f"{loss:.4f}" == match[4], f"{what}: its {split}_loss is {match[4]}, the exact one {loss}")
        if split == "val":
            exact = curve[step]["train_ms"]
            need(f"{exact:.0f}" == match[5] and f"{exact / max(1, step):.2f}" == match[6],
                 f"{what}: its times are not those of {exact} ms")
        before = ms
    need(len(lines.steps) == len(expected),
         f"{len(lines.steps)} lines of steps and validations where {len(expected)} are due")
    return f"{config['steps']:,} steps and {len(curve)} validations, times rising, losses as their exact values"


def schedule(record):
    """Validations when they are due; tokens = steps x sequences x length; the validation tokens that there are."""
    config, final, curve, data_facts = (record.result[key] for key in ("config", "final", "curve", "data"))
    need([point["step"] for point in curve] == due(config),
         f"validations at steps {[point['step'] for point in curve]}, due at {due(config)}")
    a_step = config["bsz"] * config["seq_len"]
    for point in curve:
        need(point["tokens"] == point["step"] * a_step, f"step {point['step']}: {point['tokens']} tokens, not "
                                                        f"{point['step']} x {a_step}")
    need((final["steps"], final["tokens"]) == (config["steps"], config["steps"] * a_step),
         f"final: {final['tokens']} tokens in {final['steps']} steps, not {config['steps']} x {a_step}")
    available = sum(shard["tokens"] for shard in data_facts["val"]) - 1
    tokens = min(config["val_tokens"], available) // config["seq_len"] * config["seq_len"]
    need(final["val_tokens"] == data_facts["val_tokens"] == tokens,
         f"{final['val_tokens']} validated tokens, not {tokens}")
    text, longest = final["text_bytes"], 1 if config["vocab_size"] == 257 else 255  # bytes of text a token
    need(text == data_facts["text_bytes"] and (text is None or 0 < text <= longest * tokens),
         f"{text} bytes of text in {tokens} tokens")
    need(config["stop_after"] in (0, config["steps"]), f"stopped after step {config['stop_after']}: no result")
    return f"{config['steps']:,} x {a_step:,} = {final['tokens']:,} tokens, {tokens:,} to validate"


def clock(record):
    """The loss is the last of the curve, the training time that of all parts; this part's phases add up to the time
    between its begin and end by the system's clock."""
    result = record.result
    phases, wall, final = result["clock"], result["wall"], result["final"]
    need(final["val_loss"] == result["curve"][-1]["val_loss"],
         f"final.val_loss is {final['val_loss']}, the curve ends with {result['curve'][-1]['val_loss']}")
    need(final["devices"] == result["hardware"]["count"] and final["peak_memory_bytes"] > 0,
         f"{final['devices']} devices, {final['peak_memory_bytes']} bytes of memory")
    need(phases.keys() == {"warm-up", "train", "validation", "saving", "rest"}, f"phases {sorted(phases)}")
    need(all(seconds >= 0 for seconds in phases.values()), f"a phase of negative length: {phases}")
    trained = sum(part["train_seconds"] for part in result["parts"]) + phases["train"]
    times = [point["train_ms"] for point in result["curve"]]
    need(near(trained, final["train_seconds"]) and near(1e3 * trained, times[-1]),
         f"{trained} s of training by the clock, {final['train_seconds']} s in final, {times[-1]} ms at the last "
         "validation")
    need(times == sorted(times) and times[0] == 0, f"training times of the validations: {times}")
    total, passed = sum(phases.values()), wall["ended"] - wall["began"]
    need(abs(total - passed) <= 1 + 1e-3 * passed,
         f"the phases add up to {total:.1f} s, but {passed:.1f} s passed by the system's clock (edited, or the machine "
         "slept, or its clock was set)")
    stamp = datetime.strptime(result["run"][:20], "%Y-%m-%dT%H-%M-%SZ").replace(tzinfo=timezone.utc).timestamp()
    need(wall["began"] - 1 <= stamp <= wall["ended"], f"the run's name says {result['run'][:20]}, its clock otherwise")
    return (f"loss {final['val_loss']:.4f} in {trained:.1f} s of training; {total:.1f} s in phases, {passed:.1f} s by "
            "the system's clock")


def near(a, b):
    return math.isclose(a, b, rel_tol=1e-9)


def earlier(record):
    """The logs of a resumed run's earlier parts up to their checkpoints, where they lie beside it. Raises NotChecked,
    Failed."""
    logs = []
    for part in record.result["parts"]:
        path = record.folder.resolve().parent / part["run"] / "log.txt"
        if not path.exists():
            raise NotChecked(f"resumed after step {part['step']} of {part['run']}, whose log does not lie beside it")
        data, digest, end = path.read_bytes(), hashlib.sha256(), 0
        for line in data.splitlines(keepends=True):
            digest.update(line)
            end += len(line)
            if digest.hexdigest() == part["log_sha256"]:
                break
        else:
            raise Failed(f"the log of {part['run']} is not the one that this run went on from")
        logs.append(Log(data[:end].decode()))
    return logs


def parts(record):
    """A resumed run goes on from the parts that it names: flags, sources, shards, losses, validations and times."""
    result, resumed, before, ms = record.result, record.log.resumed, 0, 0.0
    last = {key: result["parts"][-1][key] for key in ("run", "step", "log_sha256")} if result["parts"] else None
    need(last == resumed, f"resumed from {text_of(resumed)} by the log, from {text_of(last)} by result.json")
    fixed = lambda config: {key: value for key, value in config.items() if key not in FREE}
    curve, elsewhere = {point["step"]: f"{point['val_loss']:.4f}" for point in result["curve"]}, []
    for part, log in zip(result["parts"], earlier(record)):
        need(fixed(log.config) == fixed(result["config"]), f"{part['run']} had other flags")
        need([header for header, _ in log.sources] == result["sources"], f"{part['run']} had other sources")
        for split in ("train", "val"):
            pairs = zip(log.facts["data"][split], result["data"][split])
            need(all(one == other for one, other in pairs), f"{part['run']} read other {split} shards")
        done = [int(match[1]) for _, match in log.steps if match[3] == "train"]
        need(done == list(range(before + 1, part["step"] + 1)),
             f"{part['run']} lacks steps of {before + 1} to {part['step']}, or has others")
        ms += 1e3 * part["train_seconds"]
        need(all(int(match[5]) <= ms + 0.5 for _, match in log.steps), f"{part['run']} trained for longer than {ms} ms")
        devices = {key: result["hardware"][key] for key in ("name", "count")}
        if any(log.facts["hardware"][key] != value for key, value in devices.items()):
            elsewhere.append(f"{part['run']} ran on {log.facts['hardware']['count']} x {log.facts['hardware']['name']}")
        for _, match in log.steps:
            step = int(match[1])
            known = f"{record.log.losses[step - 1]:.4f}" if match[3] == "train" else curve[step]
            need(match[4] == known, f"{part['run']}, step {step}: {match[3]}_loss {match[4]}, here {known}")
        before = part["step"]
    if elsewhere:
        raise NotChecked(f"its time is of several machines: {'; '.join(elsewhere)}")
    return "".join(f"resumed after step {part['step']}, " for part in result["parts"]) + "nothing is missing"


def sources(record):
    """The sources in the log have the hashes that are named; the script is the first, kernels come with their files."""
    for header, text in record.log.sources:
        digest = sha256(text.encode())
        need(digest == header["sha256"], f"{header['name']} in the log has sha256 {digest[:12]}..., its header says "
                                         f"{str(header['sha256'])[:12]}...")
        need(SAFE.fullmatch(header["name"]), f"a source must not be called {header['name']!r}")
    names = [header["name"] for header, _ in record.log.sources]
    need(names[0] == record.result["script"], f"the first source is {names[0]}, the script {record.result['script']}")
    need(len(set(names)) == len(names), f"a source is there twice: {names}")
    missing = set(record.answer.get("files", ())) - set(names) if record.answer else ()
    need(not missing, f"missing, though this run's kernel is built from it: {', '.join(sorted(missing))}")
    return f"{len(names)}, with their hashes" + ("" if record.answer else "; not checked whether all are there")


def commit(record):
    """The sources are those of the commit that is named."""
    git = record.result["git"]
    need(isinstance(git["commit"], str) and isinstance(git["changed"], list), f"git says {git}")
    if not re.fullmatch("[0-9a-f]{40}", git["commit"]):
        raise NotChecked("the run was outside a git checkout")
    for header, text in record.log.sources:
        name = header["name"]
        try:
            done = subprocess.run(["git", "show", f"{git['commit']}:{name}"], cwd=ROOT, capture_output=True)
        except OSError:
            raise NotChecked("git is not there") from None
        if done.returncode:
            raise NotChecked(f"commit {git['commit'][:12]} with {name} is not in this checkout")
        if done.stdout != text.encode():
            if name in git["changed"]:
                raise NotChecked(f"{name} had uncommitted changes, as the record says")
            raise Failed(f"{name} is not that of commit {git['commit'][:12]}")
    return f"the sources are those of commit {git['commit'][:12]}"


def command(record):
    """The recorded command makes the recorded configuration, by the embedded script's own parser."""
    config, words = record.result["config"], shlex.split(record.result["command"])
    need(words[0] == record.result["script"], f"the command runs {words[0]}, the script is {record.result['script']}")
    parsed = ask_for(record, "parsed")
    free = {name for name in ("device", "dtype", "kernel") if parsed.get(name) == "auto"}  # the machine's choice
    free |= {"kernel"} if config.get("fast_cuda") or config.get("wind_cuda") else set()
    parsed, config = ({key: value for key, value in all.items() if key not in free} for all in (parsed, config))
    wrong = differences(parsed, config)
    need(not wrong, f"by its command the configuration is another: {'; '.join(wrong[:3])}")
    return f"makes the recorded configuration, seed {config['random_seed']}"


def model(record):
    """The parameters' lines add up to the recorded size, and the embedded source builds that model."""
    recorded, lines = record.result["model"], record.log.parameters
    total = sum(math.prod(line["shape"]) for line in lines)
    need(total == recorded["parameters"], f"the log lists {total:,} parameters, the model has {recorded['parameters']}")
    wrong = differences(recorded, ask_for(record, "model"))
    wrong += differences({line["name"]: line["shape"] for line in lines}, ask_for(record, "shapes"))
    need(not wrong, f"recorded and built model differ: {'; '.join(wrong[:3])}")
    return f"{recorded['active']:,} active parameters"


def ask_for(record, key):
    """What the record's own code says (probe). Raises NotChecked, Failed."""
    if not record.answer:
        raise NotChecked("--no-code")
    need("error" not in record.answer, record.answer.get("error"))
    return record.answer[key]


def data(record):
    """The shards are those of the manifest of that data set here."""
    facts = record.result["data"]
    shards = {shard["name"]: (shard["tokens"], shard["sha256"]) for shard in facts["train"] + facts["val"]}
    path = ROOT / facts["folder"] / "manifest.json"
    if all(digest is None for _, digest in shards.values()):
        raise NotChecked("the data had no manifest.json")
    need(all(re.fullmatch("[0-9a-f]{64}", digest) for _, digest in shards.values()), "a shard without a sha256")
    if not path.exists():
        raise NotChecked(f"there is no {facts['folder']}/manifest.json here to compare with")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    listed = {shard["name"]: (shard["tokens"], shard["sha256"]) for shard in manifest["shards"]}
    both = shards.keys() & listed.keys()
    wrong = sorted(name for name in both if listed[name] != shards[name])
    for key in ("dataset", "python", "builder"):  # pydocs is Python's own text, by one version of the program
        if (wrong or not both) and manifest.get(key) != facts["manifest"].get(key):
            raise NotChecked(f"{facts['folder']} here is of another {key} ({str(manifest.get(key))[:12]}, not "
                             f"{str(facts['manifest'].get(key))[:12]})")
    need(not wrong, f"{', '.join(wrong)}: tokens or sha256 are not those of {facts['folder']}/manifest.json here")
    return f"{len(both)} of {len(shards)} shards of {manifest.get('dataset')} as in {facts['folder']} here"


def tokens(record):
    """No training token is read twice unless --epochs says so, and no shard is train and val."""
    config, facts = record.result["config"], record.result["data"]
    names = [(shard["name"], shard["sha256"]) for shard in facts["train"] + facts["val"]]
    for column in map(list, zip(*names)):
        known = [value for value in column if value is not None]
        need(len(set(known)) == len(known), "a shard is there twice, or in train and in val")
    available = sum(shard["tokens"] for shard in facts["train"])
    read = config["steps"] * config["bsz"] * config["seq_len"]
    need(0 < available < 10**13, f"{available} training tokens")
    epochs, target = config["epochs"], 1  # the last target is no input
    if config["order"] == "shuffled":  # whole chunks after a phase
        available, target = (available - config["seq_len"]) // config["seq_len"] * config["seq_len"], 0
    need(read + target <= available * epochs,
         f"{read:,} tokens were read of {available:,}: more often than declared (--epochs {epochs})")
    if read + target <= available:
        return f"{read:,} of {available:,} read, each at most once"
    return f"{read:,} of {available:,} read, {read / available:.2f} times; --epochs {epochs} declares it"


def rules(record):
    """What the track asks for; the warm-up has left no trace."""
    config, digests = record.result["config"], record.log.warm_up
    need(re.fullmatch("[0-9a-f]{64}", digests["before"]) and digests["after"] == digests["before"],
         f"the warm-up changed the parameters: {digests}")
    need(config["track"] in ("fineweb", "tiny"), f"there is no track {config['track']!r}")
    if config["track"] == "fineweb":
        val_tokens, active = record.result["final"]["val_tokens"], record.result["model"]["active"]
        need(val_tokens == FINEWEB_VAL, f"{val_tokens:,} validation tokens; track fineweb has {FINEWEB_VAL:,}")
        need((config["epochs"], config["order"]) == (1, "sequential"), "track fineweb reads every token once, in order")
        need(active <= ACTIVE_LIMIT, f"{active:,} parameters are active; track fineweb allows {ACTIVE_LIMIT:,}")
    return f"of track {config['track']} are kept"


CHECKS = (log, seal, agreement, steps, schedule, clock, parts, sources, commit, command, model, data, tokens, rules)


def race(path, records):
    """The runs of a race are those of its plan: each contestant with each seed, its script and its flags."""
    plan, finished = json.loads(path.read_text(encoding="utf-8")), 0
    runs = {record.folder.name: record for record in records if record.folder.parent == path.parent}
    for one in plan["contestants"]:
        for seed in plan["seeds"]:
            names = [name for name in runs if name.endswith(f"_{one['label']}_seed{seed}")]
            failed = any((run["label"], run["seed"]) == (one["label"], seed) and run["end"].startswith("failed")
                         for run in plan["runs"])
            need(len(names) == 1 or not names and failed, f"{one['command']}, seed {seed}: {len(names)} finished runs")
            for result in (runs.pop(name).result for name in names):
                need(result["sources"][0]["sha256"] == one["sha256"], f"{names[0]} ran another {one['script']}")
                words = shlex.split(result["command"])[1:]
                need(words[:len(one["words"])] == one["words"] and result["config"]["random_seed"] == seed,
                     f"{names[0]} had other flags than the plan's {' '.join(one['words'])}, seed {seed}")
                finished += 1
    need(not runs, f"not in the plan: {', '.join(runs)}")
    return f"{finished} runs, of {len(plan['contestants'])} contestants and {len(plan['seeds'])} seeds, as planned"


def judge(check, *what):
    """(verdict, text) of one check of one record, or of a race and its records."""
    try:
        return "ok", check(*what)
    except Failed as error:
        return "FAILED", str(error)
    except NotChecked as why:
        return "not checked", str(why)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, OSError) as error:
        return "FAILED", f"a value is missing or of another kind ({type(error).__name__}: {error})"


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
        except (Failed, OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError, AttributeError) as error:
            answers = [dict(error=f"the embedded script does not run here: {error}")] * len(group)
        for record, answer in zip(group, answers):
            record.answer = answer


def ask(group):
    with tempfile.TemporaryDirectory() as folder:
        group[0].extract(folder)
        out, script = Path(folder) / "answer.json", group[0].log.sources[0][0]["name"]
        jobs = [[shlex.split(record.log.command), record.log.config] for record in group]
        done = subprocess.run([sys.executable, "-I", "-X", "utf8", "-c", PROBE, folder, script, str(out)], cwd=folder,
                              env=dict(PATH=os.environ.get("PATH", ""), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
                              input=json.dumps(jobs), capture_output=True, text=True, timeout=300)
        need(out.exists(), (done.stderr.strip().splitlines() or ["it said nothing"])[-1])
        return json.loads(out.read_text())


def replay(record, count, data_folder, devices):
    """(verdict, text): run the first `count` steps again, in a fresh folder, and compare loss by loss."""
    need(not record.trouble, record.trouble)
    config, facts = record.log.config, record.log.facts
    need(count <= config["steps"], f"--replay {count}: the run has {config['steps']} steps")
    folder = Path(tempfile.mkdtemp(prefix="replay-"))
    record.extract(folder)
    data_folder = Path(data_folder) if data_folder else next(
        (path for path in (Path(config["data"]), ROOT / config["data"]) if path.exists()), Path(config["data"]))
    devices = devices or facts["hardware"]["count"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"] if devices > 1 else []
    flags = dict(stop_after=count, data=data_folder.resolve(), records=folder / "records", name="replay", save_every=0,
                 device=config["device"], dtype=config["dtype"], checkpoints=folder / "checkpoints", resume="")
    line = [*launch, str(folder / record.result["script"]), *shlex.split(record.log.command)[1:],
            *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(STEERING)}
    env.update(facts["environment"]["variables"], OMP_NUM_THREADS=str(facts["environment"]["threads"]))
    print(f"  replay in {folder}: {shlex.join(['python', *line])}", flush=True)
    done = subprocess.run([sys.executable, *line], cwd=folder, env=env, stdout=sys.stderr)
    logs = list((folder / "records").glob("*/log.txt"))
    need(done.returncode == 0 and logs, f"the script ended with status {done.returncode}, see above"
                                        + (f" and {logs[0]}" if logs else ""))
    again = Log(logs[0].read_text(encoding="utf-8"))
    again.read_losses()
    return compare(record, again, count)


def settings(log):
    """What a run's losses depend on, bit for bit."""
    keys = dict(environment=("torch", "cuda", "nvcc", "compiler", "instruction_set", "threads"),
                hardware=("name", "count", "driver"))
    values = {f"{part}.{key}": log.facts[part][key] for part, names in keys.items() for key in names}
    return dict(values, **{f"config.{key}": value for key, value in log.config.items()
                          if key not in FREE or key == "device_bsz"})


def compare(record, again, count):
    """The verdict on a replayed log."""
    replayed, recorded_losses = again.losses[:count], record.log.losses[:count]
    for split in ("train", "val"):
        shards = again.facts["data"][split]
        pairs = list(zip(shards, record.log.facts["data"][split]))
        same = all(one == other or one["sha256"] is None and one["tokens"] == other["tokens"] for one, other in pairs)
        need(same and len(pairs) == len(shards), f"the {split} shards here are other ones: no losses to compare")
    need(len(replayed) == count == len(recorded_losses), f"{len(replayed)} losses of {count} steps")
    other, now = [], settings(again)
    try:
        for log in [*earlier(record), record.log]:
            other += [key for key, value in settings(log).items() if now.get(key) != value]
    except NotChecked as why:
        other = [str(why)]
    where = f"another machine or other versions ({', '.join(other)})" if other else "the same machine and versions"
    recorded = {point["step"]: f"{point['val_loss']:.4f}" for point in record.result["curve"] if point["step"] <= count}
    rows = [(i, f"step {i}", a, b) for i, (a, b) in enumerate(zip(recorded_losses, replayed), 1)]
    rows += [(int(match[1]), f"the validation of step {match[1]}", float(recorded[int(match[1])]), float(match[4]))
             for _, match in again.steps if match[3] == "val" and int(match[1]) in recorded]  # to the log's 4 digits
    apart = [row for row in rows if row[2] != row[3]]
    if not apart:
        return "ok", f"{count} steps and {len(rows) - count} validations are equal bit for bit, on {where}"
    say = lambda row: f"{row[1]}: recorded {row[2]!r}, here {row[3]!r}"
    first = f"the first that differs is {say(apart[0])}"
    if not other:
        return "FAILED", f"on {where} the losses must be equal bit for bit; {first}"
    beyond = [row for row in apart if row[0] <= BAND_STEPS and not abs(row[2] - row[3]) <= BAND]
    if beyond:
        return "FAILED", f"on {where} the first {BAND_STEPS} steps may be {BAND} off, but {say(beyond[0])}; {first}"
    most = max(abs(row[2] - row[3]) for row in rows if row[0] <= BAND_STEPS)
    steps = min(count, BAND_STEPS)
    return "ok", f"on {where} the first {steps} steps are within {most:.2g}, {BAND} is allowed; {first}"


# ----------------------------------------------------------------------------------------------------------------------
# Main


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="+", help="folder of a run, or one with such folders below it")
    parser.add_argument("--no-code", action="store_true", help="run nothing of the record's own: no model, no command")
    parser.add_argument("--replay", type=int, metavar="N", help="run the first N steps again and compare [none]")
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
    if not args.no_code:
        probe([record for record in records.values() if isinstance(record, Record)])
    for folder, record in records.items():
        print(folder)
        if not isinstance(record, Record):
            verdicts = [("files", "FAILED", str(record))]
        else:
            verdicts = [("files", "ok", f"log.txt and result.json, schema {SCHEMA}")]
            for check in CHECKS:
                readable = not record.trouble or check in (log, seal)
                verdict = judge(check, record) if readable else ("not checked", "the log cannot be taken apart")
                verdicts.append((check.__name__, *verdict))
        for name, verdict, text in verdicts:
            print(f"  {verdict:12} {name:10} {text}")
        if args.replay and isinstance(record, Record):
            try:
                verdicts.append(("replay", *replay(record, args.replay, args.data, args.devices)))
            except (Failed, OSError, KeyError, TypeError, ValueError) as error:
                verdicts.append(("replay", "FAILED", str(error)))
            print(f"  {verdicts[-1][1]:12} {'replay':10} {verdicts[-1][2]}")
        bad += any(verdict == "FAILED" for _, verdict, _ in verdicts)
    good = [record for record in records.values() if isinstance(record, Record)]
    races = [path for folder in args.record for path in sorted(Path(folder).rglob("race.json"))]
    for path in races:
        verdict, text = judge(race, path, good)
        print(f"{path.parent}\n  {verdict:12} race       {text}")
        bad += verdict == "FAILED"
    total = len(records) + len(races)
    print(f"{total - bad} of {total} records verified in {time.perf_counter() - start:.1f} s"
          + (f"; {bad} FAILED" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
