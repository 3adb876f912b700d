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
    """The parts of a log.txt: {key: JSON} of the lines before the first source and after the last, the sources as
    {name: (facts, bytes)}, and all other lines in order. Sources are cut out by the line counts in their headers."""
    lines, facts, sources, rest, i = log.split("\n"), {}, {}, [], 0
    while i < len(lines):
        key, _, value = lines[i].partition(": ")
        if key == "source":
            assert lines[i - 1] == RULE
            header = json.loads(value)
            body = lines[i + 1:i + 1 + header["lines"]]
            sources[header["name"]] = header, "".join(line + "\n" for line in body).encode()
            i += header["lines"]
        elif value.startswith("{"):
            facts[key] = json.loads(value)
        elif lines[i] != RULE:
            rest.append(lines[i])
        i += 1
    return facts, sources, rest


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, finished_run):
    """A finished run of each script: path, log, result, its parts, files (what its sources must be), and run.json."""
    script, folder = request.param, finished_run(request.param)
    files = [f"{script}.py"]
    if "rwkv" in script:
        operator = script.replace("train_r", "")  # wkv6, wkv7
        files += ["cuda/build.py", f"cuda/{operator}/reference.py", f"cuda/{operator}/{operator}_cpu.cpp", "cuda/cpu.h"]
    path, log, result = only_record(folder / "records")
    facts, sources, rest = parse(log)
    return types.SimpleNamespace(**json.loads((folder / "run.json").read_text()), script=script, folder=folder,
                                 data=folder / "data", files={name: (ROOT / name).read_bytes() for name in files},
                                 path=path, log=log, result=result, facts=facts, sources=sources, rest=rest)


def test_folder(finished):
    assert NAME.fullmatch(finished.path.name).groups() == (finished.script, "first-run_1.0")
    assert sorted(path.name for path in finished.path.iterdir()) == ["log.txt", "result.json"]
    assert finished.result["run"] == finished.path.name
    stamp = time.strptime(finished.path.name[:20], "%Y-%m-%dT%H-%M-%SZ")
    assert abs(time.mktime(time.gmtime()) - time.mktime(stamp)) < 3600, "the stamp is not UTC"


def test_configuration_comes_first(finished):
    first, second = finished.log.split("\n")[:2]
    config = json.loads(first.removeprefix("config: "))
    hyperparameters = importlib.import_module(finished.script).parse(finished.flags)
    assert config == vars(hyperparameters) == finished.result["config"], "every field, resolved"
    assert shlex.split(second.removeprefix("command: ")) == [f"{finished.script}.py", *finished.flags]
    assert finished.result["command"] == [f"{finished.script}.py", *finished.flags]
    assert finished.result["seed"] == config["random_seed"] == 7


def test_sources_are_the_files(finished):
    assert finished.sources.keys() == finished.files.keys()
    for name, (header, text) in finished.sources.items():
        assert text == finished.files[name], f"{name} in the log is not the file"
        assert header["sha256"] == hashlib.sha256(finished.files[name]).hexdigest()
    assert finished.result["sources"] == [header for header, _ in finished.sources.values()]


def test_environment_and_hardware(finished):
    environment, hardware = finished.facts["environment"], finished.facts["hardware"]
    assert environment == finished.result["environment"] and hardware == finished.result["hardware"]
    assert environment["git_commit"] in finished.commits, "before and after the run: one and the same, as a rule"
    assert isinstance(environment["git_dirty"], bool)
    assert (environment["python"], environment["torch"]) == (platform.python_version(), torch.__version__)
    assert environment["cuda"] == (torch.version.cuda or "none")
    assert environment["threads"] == 1 and environment["variables"]["OMP_NUM_THREADS"] == "1" and environment["isa"]
    for key in ("platform", "driver", "compiler", "nvcc"):
        assert isinstance(environment[key], str) and environment[key], key
    assert environment["packages"]["numpy"] == numpy.__version__
    assert hardware["count"] == 1 and hardware["name"]
    text, = [line for line in finished.rest if line.startswith(hardware["name"])]
    assert f"{os.cpu_count()} cores" in text and "1 threads" in text, text


def test_data(finished):
    data = finished.facts["data"]
    assert data == finished.result["data"]
    assert data["folder"] == str(finished.data)
    assert data["manifest"] == json.loads((finished.data / "manifest.json").read_text())
    for split, number in (("train", 3), ("val", 1)):  # 6 steps of 128 tokens and a target reach into the third shard
        assert data[split] == [dict(name=path.name, tokens=(path.stat().st_size - 1024) // 2,
                                    sha256=hashlib.sha256(path.read_bytes()).hexdigest())
                               for path in sorted(finished.data.glob(f"*_{split}_*"))[:number]]


def test_model(finished):
    model = finished.facts["model"]
    assert model == finished.result["model"]
    weights = load_file(finished.folder / "checkpoints" / f"{finished.path.name}_step000006.safetensors")
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    assert model["parameters"] == sum(sizes.values())
    looked_up = 0 if finished.script == "train_rwkv6" else 384 * 32  # whose embedding is the head too
    assert model["active"] == sum(sizes.values()) - looked_up, "all but the embedding: 257 ids padded to 384, 32 wide"
    mixing = {"train_rwkv7": 27 * 16, "train_rwkv6": 15 * 16, "train_gpt2": 6 * 32}  # see flops_per_token
    mixing = mixing[finished.script] * 32 * 2
    assert model["flops_per_token"] == 6 * model["active"] + mixing


def test_step_lines(finished):
    steps = [STEP.fullmatch(line).groups() for line in finished.rest if "train_loss" in line]
    assert [(int(step), int(of)) for step, of, *_ in steps] == [(step, 6) for step in range(1, 7)]
    times = [int(ms) for _, _, _, ms, _ in steps]
    assert times == sorted(times) and times[0] >= 0 and all(0 < float(loss) < 20 for _, _, loss, _, _ in steps)
    for step, _, _, ms, average in steps:
        assert abs(float(average) * int(step) - int(ms)) <= 0.5 + 0.005 * int(step) + 1e-6, (step, ms, average)
    losses = numpy.frombuffer(base64.b64decode(finished.facts["losses"]["float32"]), "<f4")
    assert [f"{loss:.4f}" for loss in losses] == [loss for _, _, loss, _, _ in steps] and len(set(losses.tolist())) == 6


def test_val_lines_agree_with_the_result(finished):
    lines = [VAL.fullmatch(line).groups() for line in finished.rest if "val_loss" in line]
    curve = finished.result["curve"]
    assert [point["step"] for point in curve] == [0, 2, 4, 6]
    assert lines == [(str(point["step"]), "6", f"{point['val_loss']:.4f}", f"{point['train_ms']:.0f}",
                      f"{point['train_ms'] / max(1, point['step']):.2f}") for point in curve]
    assert finished.facts["curve"]["points"] == curve
    assert [point["tokens"] for point in curve] == [128 * point["step"] for point in curve]
    order = [re.match(r"step:(\d+)/6 (\w+)_loss", line).groups() for line in finished.rest if "_loss:" in line]
    assert order == [(str(step), split) for step in range(7) for split in ("train", "val")
                     if (split == "val" and step % 2 == 0) or (split == "train" and step)]


def test_final_figures(finished):
    final, clock = finished.result["final"], finished.result["clock"]
    assert finished.facts["result"] == final and finished.facts["clock"] == clock
    assert final["val_loss"] == finished.result["curve"][-1]["val_loss"]
    assert (final["steps"], final["tokens"], final["val_tokens"]) == (6, 6 * 128, 352)
    assert final["epochs"] == 6 * 128 / 10700
    assert final["train_seconds"] == clock["train"] > 0
    assert math.isclose(final["train_seconds"] * 1e3, finished.result["curve"][-1]["train_ms"])
    assert math.isclose(final["step_avg_ms"], 1e3 * clock["train"] / 6)
    assert math.isclose(final["tokens_per_second"], 768 / clock["train"])
    assert math.isclose(final["flops_per_second"], finished.facts["model"]["flops_per_token"] * 768 / clock["train"])
    assert final["peak_memory"]["resident"] > 50 * 2**20 and final["mfu"] is None
    tokens = torch.frombuffer(bytearray((finished.data / "toy_val_000000.bin").read_bytes()[1024:]), dtype=torch.uint16)
    in_text = int((tokens[1:353].int() < 256).sum())
    assert final["text_bytes"] == in_text
    assert math.isclose(final["bits_per_byte"], final["val_loss"] * 352 / in_text / math.log(2))
    assert (final["target"], final["reached"]) == (None, None), "track tiny has no target"
    assert finished.result["schema"] == 2 and finished.result["end"] == "finished"
    assert finished.result["script"] == f"{finished.script}.py"
    assert finished.log.endswith("\nend: finished\n")


def test_the_chain_is_the_hash_of_the_lines_so_far(finished):
    sha256 = lambda text: hashlib.sha256(text.encode()).hexdigest()
    head, end = finished.log.rsplit("\nsha256: ", 1)
    assert end == f"{sha256(head + chr(10))}\nend: finished\n"
    assert finished.result["log_sha256"] == sha256(head + "\n")
    for point in finished.result["curve"]:
        line, = re.findall(rf"^step:{point['step']}/6 val_loss:.*\n", finished.log, re.M)
        assert point["log_sha256"] == sha256(finished.log[:finished.log.index(line) + len(line)])


def test_clock_counts_every_second_once(finished):
    clock = finished.result["clock"]
    assert clock.keys() == {"warm-up", "train", "validation", "saving", "rest"}
    assert all(seconds > 0 for seconds in clock.values()), clock
    assert sum(clock.values()) < finished.seconds
    wall = finished.result["wall"]
    assert finished.facts["wall"] == wall and 0 < wall["ended"] - wall["began"] < finished.seconds
    line, = [line for line in finished.rest if line.startswith("warm-up: ")]
    assert re.search(r"\b[0-9a-f]{64}$", line) and "restored" in line and f"{clock['warm-up']:.1f} s" in line
    assert finished.rest.index(line) < min(i for i, text in enumerate(finished.rest) if text.startswith("step:"))


def test_checkpoints(finished):
    path, = (finished.folder / "checkpoints").iterdir()
    assert path.name == f"{finished.path.name}_step000006.safetensors", "of a finished run the last one stays"
    script = importlib.import_module(finished.script)
    about, weights = script.facts_of(path), load_file(path)
    assert all(about[key] == finished.facts["data"]["manifest"][key] for key in ("tokenizer", "tokenizer_sha256"))
    assert about["config"] == finished.result["config"] and about["run"] == finished.path.name
    assert (about["format"], about["finished"], about["script"], about["step"]) == (2, True, f"{finished.script}.py", 6)
    model = script.build_model(script.Hyperparameters(**about["config"]))
    assert sorted(weights) == sorted(name for name, _ in model.named_parameters())
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    model.load_state_dict(weights)
    args = script.parse(finished.flags)
    stream = script.TokenStream(finished.data, "val", 353)
    loss = script.validate(model, script.validation_set(stream, args, 0), args)
    assert math.isclose(loss, finished.result["final"]["val_loss"], rel_tol=1e-6), "not the model last validated"


def test_console(finished):
    final = finished.result["final"]
    assert finished.stderr == ""
    for part in (f"validation loss {final['val_loss']:.4f}", f"{final['bits_per_byte']:.4f} bits per byte",
                 str(finished.path)):
        assert part in finished.stdout, part


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


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
def test_a_run_that_is_ended_leaves_its_log(tmp_path, number):
    """... with every step so far; SIGINT and SIGTERM also a checkpoint, the reason of the end and one line of error."""
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
    names = [script.Record(args, 0).path.name for _ in range(3)]
    assert names == [f"2026-01-02T03-04-05Z_train_gpt2_a{suffix}" for suffix in ("", "_2", "_3")]


def test_result_is_whole_or_not_there(tmp_path, monkeypatch):
    script = importlib.import_module("train_gpt2")
    record = script.Record(script.Hyperparameters(records=str(tmp_path)), 0)
    moved = []
    monkeypatch.setattr(script.os, "replace", lambda part, to: moved.append((open(part).read(), os.path.exists(to))))
    record.finish({"final": 1.5})
    (text, there), = moved
    assert json.loads(text) == {"final": 1.5, "log_sha256": hashlib.sha256(b"").hexdigest()} and not there
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
