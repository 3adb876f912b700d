"""What a run leaves behind: log.txt and result.json of a finished run, of a killed one and of an interrupted one."""

import base64
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import time
import types

import numpy
import pytest
import torch
from safetensors.torch import load_file

from helpers import ROOT, SCRIPTS, command, environment, make_corpus, only_record, tiny

RULE = "=" * 100
STEP = re.compile(r"step:(\d+)/(\d+) train_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")
VAL = re.compile(r"step:(\d+)/(\d+) val_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")
NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ_(train_\w+?)_([\w.-]+)")
UNENDING = "--steps", 20000, "--epochs", 10**5, "--val_every", 10**6


def parse(log):
    """The parts of a log.txt: {key: JSON}, the sources as {name: (header, bytes)}, and all other lines in order."""
    head, *blocks, rest = log.split(f"\n{RULE}\n")
    facts, sources, others = {}, {}, []
    for block in blocks:
        header, text = block.split("\n", 1)
        header = json.loads(header.removeprefix("source: "))
        sources[header["name"]] = header, text.encode()
    for line in f"{head}\n{rest}".splitlines():
        key, _, value = line.partition(": ")
        if value.startswith("{") and key != "parameter":
            facts[key] = json.loads(value)
        else:
            others.append(line)
    return facts, sources, others


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, finished_run):
    """A finished run of each script: path, log, result, its parts, files (what its sources must be), and run.json."""
    script, folder = request.param, finished_run(request.param)
    files = [f"{script}.py"]
    if "rwkv" in script:
        operator = script.replace("train_r", "")  # wkv6, wkv7
        headers = ["cuda/wkv7/mix.h", "cuda/wkv7/heads.h"] if operator == "wkv7" else []
        files += ["cuda/build.py", f"cuda/{operator}/reference.py", f"cuda/{operator}/{operator}_cpu.cpp"]
        files += [*headers, "cuda/cpu.h"]
    path, log, result = only_record(folder / "records")
    facts, sources, rest = parse(log)
    groups = {"train_gpt2": ("wte", "head", "scalars"), "train_rwkv6": ("adam",)}
    return types.SimpleNamespace(**json.loads((folder / "run.json").read_text()), script=script, folder=folder,
                                 groups=groups.get(script, ("emb", "head", "vectors", "lambdas", "norm")),
                                 table="wte.weight" if script == "train_gpt2" else "emb.weight", data=folder / "data",
                                 files={name: (ROOT / name).read_bytes() for name in files}, path=path, log=log,
                                 result=result, facts=facts, sources=sources, rest=rest)


def test_folder(finished):
    assert NAME.fullmatch(finished.path.name).groups() == (finished.script, "first-run_1.0")
    assert sorted(path.name for path in finished.path.iterdir()) == ["log.txt", "result.json"]
    assert finished.result["run"] == finished.path.name and finished.stderr == ""
    stamp = time.strptime(finished.path.name[:20], "%Y-%m-%dT%H-%M-%SZ")
    assert abs(time.mktime(time.gmtime()) - time.mktime(stamp)) < 3600, "the stamp is not UTC"


def test_configuration_comes_first(finished):
    first, second = finished.log.split("\n")[:2]
    config = json.loads(first.removeprefix("config: "))
    hyperparameters = importlib.import_module(finished.script).parse(finished.flags)
    assert config == vars(hyperparameters) == finished.result["config"], "every field, resolved"
    assert shlex.split(second.removeprefix("command: ")) == [f"{finished.script}.py", *finished.flags]
    assert finished.result["command"] == second.removeprefix("command: ") and config["random_seed"] == 7


def test_sources_are_the_files(finished):
    assert finished.sources.keys() == finished.files.keys()
    for name, (header, text) in finished.sources.items():
        assert text == finished.files[name], f"{name} in the log is not the file"
        assert header["sha256"] == hashlib.sha256(finished.files[name]).hexdigest()
    assert finished.result["sources"] == [header for header, _ in finished.sources.values()]


def test_environment_and_hardware(finished):
    facts, git = finished.facts["facts"], finished.result["git"]
    assert facts["schema"] == 3 and all(facts[key] == finished.result[key] for key in facts)
    assert git["commit"] in finished.commits, "before and after the run: one and the same, as a rule"
    changed = subprocess.run(["git", "diff", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert git["changed"] == changed.split() or finished.commits[0] != finished.commits[1]
    environment, hardware = facts["environment"], facts["hardware"]
    assert (environment["python"], environment["torch"]) == (platform.python_version(), torch.__version__)
    assert environment["cuda"] == (torch.version.cuda or "none") and environment["instruction_set"]
    assert environment["threads"] == 1 and environment["variables"]["OMP_NUM_THREADS"] == "1"
    for key in ("platform", "compiler", "nvcc", "image"):
        assert isinstance(environment[key], str) and environment[key], key
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert hardware["name"].endswith(", 1 threads") and hardware["driver"]
    assert (hardware["count"], hardware["memory_bytes"]) == (1, memory)


def test_data(finished):
    data, manifest = finished.result["data"], json.loads((finished.data / "manifest.json").read_text())
    manifest.pop("shards")
    assert data["folder"] == str(finished.data) and data["manifest"] == manifest
    for split, number in (("train", 3), ("val", 1)):  # 6 steps of 128 tokens and a target reach into the third shard
        assert data[split] == [dict(name=path.name, tokens=(path.stat().st_size - 1024) // 2,
                                    sha256=hashlib.sha256(path.read_bytes()).hexdigest())
                               for path in sorted(finished.data.glob(f"*_{split}_*"))[:number]]


def test_model(finished):
    model = finished.result["model"]
    weights = load_file(finished.folder / "checkpoints" / f"{finished.path.name}_step000006.safetensors")
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    assert model["parameters"] == sum(sizes.values())
    table = {} if finished.script == "train_rwkv6" else {finished.table: [384, 384 * 32 * 4]}  # whose is the head too
    assert model["lookups"] == table, "257 ids padded to 384, 32 wide, 4 bytes"
    assert model["active"] == sum(sizes.values()) - (384 * 32 if table else 0)
    mixing = {"train_rwkv7": 27 * 16, "train_rwkv6": 15 * 16, "train_gpt2": 6 * 32}  # see flops_per_token
    mixing = mixing[finished.script] * 32 * 2
    assert model["flops_per_token"] == 6 * model["active"] + mixing


def test_a_line_a_parameter(finished):
    """... that says how it begins: recomputed from the seed."""
    script = importlib.import_module(finished.script)
    lines = [json.loads(line.partition(": ")[2]) for line in finished.rest if line.startswith("parameter: ")]
    torch.manual_seed(7)
    model = script.build_model(script.Hyperparameters(**finished.result["config"]))
    parameters = dict(model.named_parameters())
    assert sorted(line["name"] for line in lines) == sorted(parameters)
    for line in lines:
        p = parameters[line["name"]]
        assert line["shape"] == list(p.shape) and line["lr"] > 0 and line["group"] in ("muon", *finished.groups), line
        assert math.isclose(line["mean"], p.mean().item(), abs_tol=1e-6)
        assert math.isclose(line["sd"], p.std(correction=0).item(), rel_tol=1e-5, abs_tol=1e-6)


def test_step_lines(finished):
    steps = [STEP.fullmatch(line).groups() for line in finished.rest if "train_loss" in line]
    assert [(int(step), int(of)) for step, of, *_ in steps] == [(step, 6) for step in range(1, 7)]
    times = [int(ms) for _, _, _, ms, _ in steps]
    assert times == sorted(times) and times[0] >= 0 and all(0 < float(loss) < 20 for _, _, loss, _, _ in steps)
    for step, _, _, ms, average in steps:
        assert abs(float(average) * int(step) - int(ms)) <= 0.5 + 0.005 * int(step) + 1e-6, (step, ms, average)
    line, = [line for line in finished.rest if line.startswith("losses: ")]
    losses = numpy.frombuffer(base64.b64decode(line.removeprefix("losses: ")), "<f4")
    assert [f"{loss:.4f}" for loss in losses] == [loss for _, _, loss, _, _ in steps] and len(set(losses.tolist())) == 6


def test_val_lines_agree_with_the_result(finished):
    lines = [VAL.fullmatch(line).groups() for line in finished.rest if "val_loss" in line]
    curve = finished.result["curve"]
    assert [point["step"] for point in curve] == [0, 2, 4, 6]
    assert lines == [(str(point["step"]), "6", f"{point['val_loss']:.4f}", f"{point['train_ms']:.0f}",
                      f"{point['train_ms'] / max(1, point['step']):.2f}") for point in curve]
    assert [point["tokens"] for point in curve] == [128 * point["step"] for point in curve]
    order = [re.match(r"step:(\d+)/6 (\w+)_loss", line).groups() for line in finished.rest if "_loss:" in line]
    assert order == [(str(step), split) for step in range(7) for split in ("train", "val")
                     if (split == "val" and step % 2 == 0) or (split == "train" and step)]


def test_final_figures(finished):
    final, clock = finished.result["final"], finished.result["clock"]
    tokens = torch.frombuffer(bytearray((finished.data / "toy_val_000000.bin").read_bytes()[1024:]), dtype=torch.uint16)
    in_text = int((tokens[1:353].int() < 256).sum())
    memory = final.pop("peak_memory_bytes")
    assert final == dict(
        val_loss=finished.result["curve"][-1]["val_loss"], val_tokens=352, text_bytes=in_text, steps=6, tokens=6 * 128,
        train_seconds=clock["train"], devices=1)
    final["peak_memory_bytes"] = memory
    assert memory > 50 * 2**20
    assert math.isclose(final["train_seconds"] * 1e3, finished.result["curve"][-1]["train_ms"])
    assert finished.result["schema"] == 3 and finished.result["parts"] == []
    assert finished.result["script"] == f"{finished.script}.py"
    bits = final["val_loss"] * 352 / in_text / math.log(2)
    for part in (f"validation loss {final['val_loss']:.4f}", f"{bits:.4f} bits per byte", str(finished.path)):
        assert part in finished.stdout, part


def test_log_and_result_seal_each_other(finished):
    sha256 = lambda text: hashlib.sha256(text.encode()).hexdigest()
    rest = {key: value for key, value in finished.result.items() if key != "log_sha256"}
    assert finished.log.endswith(f"\nresult: {sha256(json.dumps(rest, sort_keys=True))}\nend: finished\n")
    assert finished.result["log_sha256"] == sha256(finished.log)


def test_clock_counts_every_second_once(finished):
    clock = finished.result["clock"]
    assert clock.keys() == {"warm-up", "train", "validation", "saving", "rest"}
    assert all(seconds > 0 for seconds in clock.values()), clock
    assert sum(clock.values()) < finished.seconds
    wall = finished.result["wall"]
    assert 0 < wall["ended"] - wall["began"] < finished.seconds
    assert abs(sum(clock.values()) - (wall["ended"] - wall["began"])) < 1
    warm_up = finished.facts["warm-up"]
    assert warm_up["before"] == warm_up["after"] and re.fullmatch("[0-9a-f]{64}", warm_up["before"])


def test_checkpoints(finished):
    path, = (finished.folder / "checkpoints").iterdir()
    assert path.name == f"{finished.path.name}_step000006.safetensors", "of a finished run the last one stays"
    script = importlib.import_module(finished.script)
    header, weights = script.header_of(path), load_file(path)
    assert all(header[key] == finished.result["data"]["manifest"][key] for key in ("tokenizer", "tokenizer_sha256"))
    assert finished.result["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    part, = header["parts"]
    end = finished.log.rindex("\nresult: ") + 1
    assert part == dict(run=finished.path.name, step=6, train_seconds=finished.result["clock"]["train"],
                        log_sha256=hashlib.sha256(finished.log[:end].encode()).hexdigest())
    assert header["config"] == finished.result["config"] and header["run"] == finished.path.name
    facts = [header[key] for key in ("schema", "finished", "script", "step")]
    assert facts == [3, True, f"{finished.script}.py", 6]
    model = script.build_model(script.Hyperparameters(**header["config"]))
    assert sorted(weights) == sorted(name for name, _ in model.named_parameters())
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    model.load_state_dict(weights)
    args = script.parse(finished.flags)
    stream = script.TokenStream(finished.data, "val", 353)
    loss = script.validate(model, script.validation_set(stream, args), args)
    assert math.isclose(loss, finished.result["final"]["val_loss"], rel_tol=1e-6), "not the model last validated"


def wait_for_step(process, records, step):
    end = time.time() + 120
    while time.time() < end and process.poll() is None:
        logs = list(records.glob("*/log.txt"))
        if logs and f"\nstep:{step}/" in logs[0].read_text(encoding="utf-8"):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in the log: {process.communicate()}")


def end_in_the_middle(script, folder, number, ranks=1):
    """Start a run of many steps, send it a signal at step 3. Returns exit status, stderr, log and record's folder."""
    flags = tiny(script, make_corpus(folder / "data"), folder / "records", *UNENDING)
    process = subprocess.Popen(command(script, *flags, ranks=ranks), env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(process, folder / "records", 3)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    path, log, result = only_record(folder / "records")
    assert result is None and [p.name for p in path.iterdir()] == ["log.txt"]
    return process.returncode, stderr, log, path


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGINT))
def test_a_run_that_is_ended_leaves_its_log(tmp_path, number):
    """... with every step so far; SIGINT also a checkpoint, the reason and one line of error (SIGTERM: test_resume)."""
    status, stderr, log, path = end_in_the_middle("train_gpt2", tmp_path, number)
    facts, sources, rest = parse(log)
    assert log.endswith("\n") and "train_gpt2.py" in sources and facts["config"]["steps"] == 20000
    steps = [int(STEP.fullmatch(line)[1]) for line in rest if "train_loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 3
    if number == signal.SIGKILL:
        assert status == -number and "end: " not in "\n".join(rest)
        return
    checkpoint, = (tmp_path / "checkpoints").iterdir()
    assert status == 128 + number and checkpoint.name == f"{path.name}_step{steps[-1]:06d}.safetensors"
    reason = f"after step {steps[-1]} of 20000, checkpoint {checkpoint}"
    assert stderr.strip() == f"train_gpt2.py: interrupted {reason}; the log: {path}/log.txt"
    assert log.endswith(f"\nend: interrupted by {number.name} {reason}\n")


def test_two_runs_of_a_name_in_one_second(tmp_path, monkeypatch):
    script = importlib.import_module("train_gpt2")
    monkeypatch.setattr(script.time, "strftime", lambda *_: "2026-01-02T03-04-05Z")
    args = script.Hyperparameters(records=str(tmp_path), name="a")
    names = [script.Record(args).path.name for _ in range(3)]
    assert names == [f"2026-01-02T03-04-05Z_train_gpt2_a{suffix}" for suffix in ("", "_2", "_3")]


def test_result_is_whole_or_not_there(tmp_path, monkeypatch):
    script = importlib.import_module("train_gpt2")
    record = script.Record(script.Hyperparameters(records=str(tmp_path)))
    moved = []
    monkeypatch.setattr(script.os, "replace", lambda part, to: moved.append((open(part).read(), os.path.exists(to))))
    record.finish({"final": 1.5})
    (text, existed), = moved
    log = (record.path / "log.txt").read_bytes()
    assert json.loads(text) == {"final": 1.5, "log_sha256": hashlib.sha256(log).hexdigest()} and not existed
    assert sorted(path.name for path in record.path.iterdir()) == ["log.txt", "result.json.part"]


def test_clock_with_a_watch_of_its_own(monkeypatch):
    script = importlib.import_module("train_gpt2")
    now = [100.0]
    monkeypatch.setattr(script.time, "perf_counter", lambda: now[0])
    clock = script.Clock()
    for phase, seconds in (("rest", 1.0), ("warm-up", 20.0), ("train", 3.0), ("validation", 5.0), ("train", 4.0),
                           ("saving", 0.5), ("train", 2.0), ("rest", 0.25)):
        clock.switch(phase)
        now[0] += seconds
        assert clock.train_ms() == 1e3 * (clock.seconds["train"] + (seconds if phase == "train" else 0))
    clock.switch("rest")
    assert clock.seconds == {"warm-up": 20.0, "train": 9.0, "validation": 5.0, "saving": 0.5, "rest": 1.25}
