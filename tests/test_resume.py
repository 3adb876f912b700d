"""Interruptions: resumed runs and unbroken ones, signals, kill -9, damaged checkpoints, losses that are no numbers."""

import base64
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from helpers import ROOT, SCRIPTS, environment, load_program, make_corpus, one_thread, only_record, run_here, tiny
from test_record import UNENDING, end_in_the_middle
from test_verify import edit_log, forge, put, put_log_and_forge

GPT2 = "train_gpt2"
verify = load_program("records/verify.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data"), train=(700, 900, 1500))


@pytest.fixture
def go(data, tmp_path, monkeypatch):
    """go(*flags): a run of ten steps in this process. Returns (its folder, log, result.json or None)."""
    module = importlib.import_module(GPT2)
    with one_thread():  # as in run_here: a replay takes as many
        facts, count = module.machine("cpu"), iter(range(99))
    monkeypatch.setattr(module, "machine", lambda device: dict(facts))  # spares its time

    def run(*flags, script=GPT2, ends=None):
        records = tmp_path / f"records{next(count)}"
        flags = tiny(script, data, records, "--steps", 10, *flags)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])  # what the record gives as its command
        if ends is None:
            run_here(script, *flags)
        else:
            with pytest.raises(SystemExit) as ended:
                run_here(script, *flags)
            assert ended.value.code == ends
        return only_record(records) if records.exists() else None

    run.data = data
    return run


def losses(log):
    return re.search(r"^losses: (.*)$", log, re.M)[1]


def curve(result):
    return [(point["step"], point["val_loss"]) for point in result["curve"]]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The losses and validations of ten steps of GPT-2 that nothing interrupts."""
    records = tmp_path_factory.mktemp("unbroken") / "records"
    run_here(GPT2, *tiny(GPT2, data, records, "--steps", 10))
    _, log, result = only_record(records)
    return losses(log), curve(result)


def checkpoint(tmp_path, folder, step):
    return tmp_path / "checkpoints" / f"{folder.name}_step{step:06d}.safetensors"


def whole(tmp_path, run="*"):
    """{step: facts} of a run's checkpoints, all of whose tensors must be readable."""
    module, facts = importlib.import_module(GPT2), {}
    for path in sorted((tmp_path / "checkpoints").glob(f"{run}_step*.safetensors")):
        header, tensors = module.header_of(path), safetensors.torch.load_file(path)
        assert path.name == f"{header['run']}_step{header['step']:06d}.safetensors"
        kept = [name for name in tensors if ":" in name or name in ("losses", "random")]
        assert not kept if header["finished"] else len(kept) > 6
        facts[header["step"]] = header
    return facts


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_in_three_parts_is_the_unbroken_run(script, go, tmp_path, capfd):
    """Bitwise: losses, validations, the model. The record says so, counts all the time, is verified and replays."""
    order = "--order", "shuffled" if script == "train_rwkv6" else "sequential"
    whole_run, log, unbroken = go(*order, script=script)
    first, stopped, _ = go(*order, "--stop_after", 3, script=script)
    second, _, none = go(*order, "--stop_after", 8, "--resume", "auto", script=script)
    last, again, result = go(*order, "--resume", "auto", script=script)
    assert losses(again) == losses(log) and curve(result) == curve(unbroken) and none is None
    models = [safetensors.torch.load_file(checkpoint(tmp_path, run, 10)) for run in (whole_run, last)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(t, models[1][name]) for name, t in models[0].items())
    parts = result["parts"]
    assert [(part["run"], part["step"]) for part in parts] == [(first.name, 3), (second.name, 8)]
    assert stopped.endswith("\nend: stopped after step 3 of 10\n") and unbroken["parts"] == []
    resumed, = re.findall(r"^resumed: (.*)$", again, re.M)
    assert json.loads(resumed) == {key: parts[1][key] for key in ("run", "step", "log_sha256")}
    assert re.findall(r"^step:(\d+)/10 train", again, re.M) == ["9", "10"], "each part's log has its own steps"
    trained = [*(part["train_seconds"] for part in parts), result["clock"]["train"]]
    assert result["final"]["train_seconds"] == pytest.approx(sum(trained)) and min(trained) > 0
    assert result["config"]["resume"] == "auto" and result["run"] == last.name
    assert verify.main([str(last), "--no-code"]) == 0
    out = capfd.readouterr().out
    assert f"not checked  parts      resumed after step 3 of {first.name}, whose log does not lie beside it" in out, out
    for part in (first, second):
        shutil.copytree(part, last.parent / part.name)
    status = verify.main([str(last), *(("--replay", "6") if script == GPT2 else ("--no-code",))])
    out = capfd.readouterr().out
    assert status == 0 and "resumed after step 3, resumed after step 8, nothing is missing" in out, out
    report = load_program("records/report.py")
    page = report.read_record(last)
    assert page["end"] == "finished" and [point[0] for point in page["train"]] == [9, 10]
    assert script != GPT2 or "6 steps and 4 validations are equal bit for bit, on the same" in out, out


def test_what_a_resumed_record_says_is_checked(go, tmp_path, capsys):
    """Each thing changed and the digests made anew, also those of the earlier part's log."""
    first, *_ = go("--stop_after", 4)
    record, *_ = go("--resume", "auto")
    shutil.copytree(first, record.parent / first.name)

    def first_log(pattern, new):
        def change(folder):
            path = folder.parent / first.name / "log.txt"
            text = path.read_text()
            text = re.sub(pattern, new, text[:text.rindex("losses: ")], flags=re.M)
            path.write_text(text)
            digest = verify.sha256(text.encode())
            edit_log(r'^(resumed: .*"log_sha256": ")\w+', rf"\g<1>{digest}")(folder)
            forge(put(digest, "parts", 0, "log_sha256"))(folder)
        return change

    both = lambda key, old, new: put_log_and_forge(rf'^(resumed: .*"{key}": ){old}', rf"\g<1>{new}",
                                                   put(json.loads(new), "parts", 0, key))
    changes = {
        "nothing": (forge(lambda result: None), ""),
        "a step of the earlier part": (first_log(r"^(step:2/10 train_loss:)\d", r"\g<1>9"), "parts"),
        "a step's line removed from it": (first_log(r"^step:2/10 train.*\n", ""), "parts"),
        "its shards": (first_log(r'^(facts: .*"train": \[{"name": ")\w', r"\g<1>x"), "parts"),
        "its time": (first_log(r"^(step:4/10 train.*train_time:)\d+", r"\g<1>99999"), "parts"),
        "a validation of it": (first_log(r"^(step:2/10 val_loss:)\d", r"\g<1>9"), "parts"),
        "its flags": (first_log(r'^(config: .*"muon_lr": )[\d.]+', r"\g<1>9"), "parts"),
        "its sources": (first_log(r'^(source: .*"sha256": ")\w', r"\g<1>x"), "parts"),
        "its digest": (both("log_sha256", r'"\w+"', f'"{"0" * 64}"'), "parts"),
        "the step": (both("step", "4", "3"), "steps parts"),
        "its seconds": (forge(put(lambda s: s + 1, "parts", 0, "train_seconds")), "clock"),
        "its run": (forge(put("another", "parts", 0, "run")), "parts"),
        "a part forgotten": (forge(put([], "parts")), "parts")}
    for what, (change, names) in changes.items():
        folder = shutil.copytree(record.parent, tmp_path / what) / record.name
        change(folder)
        verify.main([str(folder), "--no-code"])
        out = capsys.readouterr().out
        failed = set(re.findall(r"^  FAILED +(\S+)", out, re.M))
        assert failed >= set(names.split()) and "seal" not in failed and bool(failed) == bool(names), (what, out)


def test_flags_that_may_change(go, tmp_path):
    """Another micro-batch, other folders, a copy of the data elsewhere, another name."""
    first, _, _ = go("--save_every", 3, "--stop_after", 7)
    assert list(whole(tmp_path)) == [6, 7]
    moved = shutil.copytree(go.data, tmp_path / "elsewhere")
    for step, *flags in ((6,), (7, "--device_bsz", 2, "--data", moved), (6, "--name", "other", "--save_every", 1)):
        folder, log, result = go("--resume", checkpoint(tmp_path, first, step), *flags)
        assert [part["step"] for part in result["parts"]] == [step]
        assert list(whole(tmp_path, folder.name)) == [10]
    assert list(whole(tmp_path, first.name)) == [6, 7], "another run's are not removed"


def test_auto_never_goes_on_with_a_finished_run(go, capsys):
    go("--stop_after", 4)
    go("--resume", "auto", "--stop_after", 6)
    for seed in (1337, 5):  # another seed, finished, in between: it is not mistaken for this run
        _, _, result = go("--resume", "auto", "--random_seed", seed)
        assert bool(result["parts"]) == (seed == 1337)
    capsys.readouterr()
    _, _, result = go("--resume", "auto")
    assert not result["parts"] and "from the beginning" in capsys.readouterr().out, "its parts are finished too"


def test_refusals(go, tmp_path, monkeypatch, capsys):
    """In one line: what is no checkpoint, or one of a run with other flags, sources or data, of another script, of a
    finished run; --resume auto passes over it."""
    def refused(path, *flags, says):
        capsys.readouterr()
        assert go("--resume", path, *flags, ends=1) is None, "a record was written"
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and says in message and path.name in message, message

    first, _, _ = go("--stop_after", 2)
    path = checkpoint(tmp_path, first, 2)
    refused(path, "--steps", 11, says="--steps was 10, is 11")
    refused(path, "--dtype", "mixed", says="--dtype was fp32, is mixed")
    for nothing in (tmp_path / "nowhere", path.parent, go.data / "toy_train_000000.bin"):
        refused(nothing, says="is no whole checkpoint")
    data = make_corpus(tmp_path / "other", train=(701, 900, 1500))
    module = importlib.import_module(GPT2)
    plain = module.read_sources
    other = lambda model: [(dict(source, sha256="0"), text) for source, text in plain(model)]
    for name, sources, flags, why in (("data", plain, ("--data", data), "other shards"),
                                      ("source", other, (), "train_gpt2.py has changed")):
        monkeypatch.setattr(module, "read_sources", sources)
        refused(path, *flags, says=why)
        go("--resume", "auto", "--stop_after", 1, "--name", name, *flags)
        out = capsys.readouterr().out
        assert re.search(r"none of \d checkpoints .* flags, sources and shards .*: from the beginning", out), out
    monkeypatch.setattr(module, "read_sources", plain)
    done, _, _ = go()
    refused(checkpoint(tmp_path, done, 10), says="its run is finished")
    export = tmp_path / "checkpoints" / "export_step000002.safetensors"
    assert load_program("inference/formats.py").main([str(path), "--to", "safetensors", "--out", str(export)]) == 0
    refused(export, says="is no whole checkpoint (an export)")
    go("--resume", "auto", "--random_seed", 7, "--stop_after", 1)
    assert f"{export} is no whole checkpoint (an export): passed over" in capsys.readouterr().out
    with one_thread(), pytest.raises(SystemExit):
        importlib.import_module("train_rwkv7").main(tiny("train_rwkv7", go.data, tmp_path / "r", "--resume", path))
    assert "it is of train_gpt2.py" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_auto_takes_the_furthest(go, tmp_path, capsys):
    """Whatever a file's time; what is cut short is passed over, with a line."""
    module = importlib.import_module(GPT2)
    first, _, _ = go("--save_every", 2, "--stop_after", 4)
    go("--stop_after", 3)
    args = module.parse(tiny(GPT2, go.data, tmp_path / "r", "--steps", 10, "--resume", "auto"))
    header = module.header_of(checkpoint(tmp_path, first, 4))
    find = lambda: module.find_checkpoint(args, header["sources"], header["data"])
    assert find()[0] == str(checkpoint(tmp_path, first, 4))
    os.truncate(checkpoint(tmp_path, first, 4), 9000)
    capsys.readouterr()
    assert find()[1]["step"] == 3
    line, = capsys.readouterr().out.strip().split("\n")
    assert "step000004.safetensors is no whole checkpoint" in line and "passed over" in line
    args.random_seed = 5
    assert find() is None and "from the beginning" in capsys.readouterr().out


def at(name, call, action, monkeypatch):
    """The action before the so-many-th call of a function of the script."""
    module, calls = importlib.import_module(GPT2), []
    plain = getattr(module, name)

    def counted(*arguments):
        calls.append(1)
        if len(calls) == call:
            action()
        return plain(*arguments)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
@pytest.mark.parametrize("moment", ("a step", "a validation", "the last step"))
def test_a_signal_ends_after_the_step(moment, number, go, unbroken, tmp_path, monkeypatch, capsys):
    """... with a checkpoint, a closed log and 128 + its number; the resumed run is the unbroken one."""
    name, call, step = {"a step": ("train_step", 5, 3), "a validation": ("validate", 4, 4),
                        "the last step": ("train_step", 12, 10)}[moment]  # the warm-up's are 2 steps and 1 validation
    at(name, call, lambda: signal.raise_signal(number), monkeypatch)
    folder, log, none = go(ends=128 + number)
    path = checkpoint(tmp_path, folder, step)
    reason = f"after step {step} of 10, checkpoint {path}"
    assert log.endswith(f"\nend: interrupted by {number.name} {reason}\n") and none is None
    assert f"interrupted {reason}; the log: {folder}/log.txt\n" in capsys.readouterr().err
    assert f"step:{step}/10 train_loss" in log and f"step:{step}/10 val_loss" not in log
    assert list(whole(tmp_path, folder.name)) == [step]
    _, log, again = go("--resume", "auto")
    assert (losses(log), curve(again)) == unbroken


def test_second_signals(go, tmp_path, monkeypatch):
    """One within a second is the same one; a later one ends at once, as does Ctrl-C before the first step."""
    module = importlib.import_module(GPT2)
    for first, second, apart, call, step in (
            (signal.SIGTERM, signal.SIGTERM, 0, 5, 3), (signal.SIGTERM, signal.SIGINT, 11, 5, None),
            (signal.SIGINT, signal.SIGINT, 0, 1, None)):
        def twice():
            signal.raise_signal(first)
            module.asked[0] = (first, module.asked[0][1] - apart)
            signal.raise_signal(second)

        with monkeypatch.context() as patch:
            at("train_step", call, twice, patch)
            folder, log, result = go(ends=128 + first)
        assert result is None and f"\nend: interrupted by {first.name}" in log
        assert (f"after step {step}" in log) == bool(step) == bool(whole(tmp_path, folder.name))


def test_ranks_agree_on_the_step(tmp_path):
    """SIGTERM to torchrun, which passes it on: one checkpoint, resumed by another number of ranks; losses to 1e-5."""
    _, _, log, folder = end_in_the_middle(GPT2, tmp_path, signal.SIGTERM, ranks=2)
    step, = whole(tmp_path)
    assert step >= 3 and f"\nend: interrupted by SIGTERM after step {step} of 20000, checkpoint" in log, log[-500:]
    ends = tiny(GPT2, tmp_path / "data", tmp_path / "records", *UNENDING, "--stop_after", step + 2)
    run_here(GPT2, *ends, "--records", tmp_path / "resumed", "--resume", "auto")
    run_here(GPT2, *ends, "--records", tmp_path / "unbroken")
    logs = [only_record(tmp_path / name)[1] for name in ("resumed", "unbroken")]
    resumed, unbroken = (np.frombuffer(base64.b64decode(losses(log)), "<f4") for log in logs)
    assert len(resumed) == len(unbroken) == step + 2
    assert resumed == pytest.approx(unbroken, rel=1e-5)


NURSERY = """
import glob, importlib, json, os, signal, sys, time
import torch._dynamo  # seconds, which the first optimiser would take in each child
script, root = sys.argv[1:]
sys.path.insert(0, root)
module = importlib.import_module(script)
module.torch.set_num_threads(1)
facts = module.machine("cpu")
module.machine = lambda device: dict(facts)
for line in sys.stdin:
    seconds, progress, argv = json.loads(line)
    before = set(glob.glob(progress))
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            module.main(argv)
            os._exit(0)
        except BaseException as error:
            os._exit(getattr(error, "code", 1) or 0)
    status = (0, 0)
    while not status[0] and progress and set(glob.glob(progress)) <= before:  # until something is new
        time.sleep(0.005)
        status = os.waitpid(child, os.WNOHANG)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not status[0]:
        time.sleep(0.002)
        status = os.waitpid(child, os.WNOHANG)
    if not status[0]:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)
    print(status[1], flush=True)
"""


def test_kill_9_at_random_moments(tmp_path):
    """Twenty times, all over a run that saves at every step: each time what is there is whole, the next run goes on
    from the newest, and what comes out is the unbroken run. Every fourth dies at any moment since its start, the others
    after their first checkpoint. The processes are forked from one that has torch loaded."""
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    data = make_corpus(tmp_path / "data", train=(9000,))
    flags = tiny(GPT2, data, tmp_path / "records", "--seq_len", 16, "--bsz", 2, "--steps", 20000, "--epochs", 10**4,
                 "--val_every", 10**6, "--val_tokens", 16, "--warmdown_steps", 20000)
    nursery = subprocess.Popen([sys.executable, "-c", NURSERY, GPT2, str(ROOT)], env=environment(), text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def child(seconds, progress, *more):
        nursery.stdin.write(json.dumps([seconds, progress, [*flags, *map(str, more)]]) + "\n")
        nursery.stdin.flush()
        return int(nursery.stdout.readline())

    saving, reached, parts = ("--save_every", 1, "--resume", "auto"), 0, 0
    try:
        for kill in range(20):
            ended = child(moments.uniform(0, 1.0), "", *saving) if kill % 4 == 0 else child(
                moments.uniform(0, 0.25), str(tmp_path / "checkpoints" / "*.safetensors"), *saving)
            assert ended == signal.SIGKILL, f"seed {seed}: before kill {kill} it ended with {ended}"
            now = max(whole(tmp_path), default=0)
            assert now >= reached, f"seed {seed}: the checkpoint of step {reached} is lost, after kill {kill}"
            names = [path.name for path in (tmp_path / "checkpoints").glob("*")]
            strangers = [name for name in names if not re.fullmatch(r".*_step\d{6}\.safetensors(\.part)?", name)]
            assert not strangers, f"seed {seed}: {strangers}"
            runs = [name[:-len("_step000000.safetensors")] for name in names if name.endswith(".safetensors")]
            assert max(map(runs.count, runs), default=0) <= 3, f"seed {seed}: {names}"
            parts, reached = parts + (now > reached), now
        assert child(60, "", "--resume", "auto", "--stop_after", reached + 2) == 0, f"seed {seed}: not resumable"
        resumed = max((tmp_path / "records").iterdir(), key=lambda run: (run / "log.txt").stat().st_mtime)
        assert child(60, "", "--stop_after", reached + 2, "--records", tmp_path / "unbroken") == 0
    finally:
        nursery.kill()
    log = (resumed / "log.txt").read_text()
    header = importlib.import_module(GPT2).header_of(checkpoint(tmp_path, resumed, reached + 2))
    assert parts >= 15 and len(header["parts"]) == parts + 1, f"seed {seed}"
    assert losses(log) == losses(only_record(tmp_path / "unbroken")[1]), f"seed {seed}"


def test_a_result_that_was_lost_is_made_again(go, tmp_path, monkeypatch):
    """No room for result.json: --resume auto goes on from the one before."""
    module = importlib.import_module(GPT2)

    def full(self, result):
        raise OSError(28, "No space left on device", "result.json")

    with monkeypatch.context() as patch:
        patch.setattr(module.Record, "finish", full)
        folder, _, none = go("--save_every", 4, ends=1)
    assert none is None and sorted(whole(tmp_path, folder.name)) == [4, 8]
    again, _, result = go("--resume", "auto")
    assert [part["step"] for part in result["parts"]] == [8] and list(whole(tmp_path, again.name)) == [10]
    assert go("--resume", "auto")[2]["parts"] == [], "now it is finished"


@pytest.mark.parametrize("step", (8, 10))
def test_full_disk_at_a_checkpoint(step, go, tmp_path, monkeypatch, capsys):
    """One line, status 1, nothing half. In between the run ends and can go on; at the last one its record is whole."""
    module = importlib.import_module(GPT2)
    plain = module.os.replace

    def full(source, target):
        if f"step{step:06d}" in str(target):
            raise OSError(28, "No space left on device")
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", full)
        folder, log, result = go("--save_every", 4, ends=1)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"step{step:06d}" in message and "No space left" in message, message
    assert list(whole(tmp_path)) == ([4] if step == 8 else [4, 8])
    assert not list((tmp_path / "checkpoints").glob("*.part"))
    if step == 10:
        assert log.endswith("\nend: finished\n")
        assert "the record is whole" in message and verify.main([str(folder), "--no-code"]) == 0
    else:
        assert result is None and re.search(r"\nend: failed: .*step000008.safetensors'\. Make room.*\n\Z", log)
        assert go("--resume", "auto")[2]["parts"]


@pytest.mark.parametrize("poison", ("the loss", "a weight"))
def test_no_numbers_stop_the_run(poison, go, tmp_path, monkeypatch, capsys):
    """... at that step, which is named with the last good checkpoint; nothing bad is saved."""
    module = importlib.import_module(GPT2)
    plain, calls, names = module.train_step, [], []

    def poisoned(model, *more):
        calls.append(1)
        if len(calls) != 2 + 6:  # the warm-up's are two
            return plain(model, *more)
        parameters = dict(model.named_parameters())
        names.extend(parameters)
        if poison == "the loss":
            parameters[names[0]].data.fill_(float("nan"))
        report = plain(model, *more)
        if poison == "a weight":
            parameters[names[3]].data.view(-1)[-1] = float("inf")
        return report

    monkeypatch.setattr(module, "train_step", poisoned)
    folder, log, result = go("--save_every", 2, "--val_every", 100, ends=1)
    message = capsys.readouterr().err
    last = checkpoint(tmp_path, folder, 4)
    what = {"the loss": "the train loss is nan", "a weight": f"{names[3]} is not finite"}[poison]
    assert message.count("\n") == 1 and "step 6 of 10: " in message and what in message, message
    assert f"Last good checkpoint: {last}" in message
    assert result is None and "\nend: failed: step 6 of 10: " in log and "step:7/" not in log
    assert list(whole(tmp_path)) == [2, 4]
