"""records/verify.py: what it finds in records that were tampered with, a replay, and the committed records."""

import base64
import hashlib
import itertools
import json
import math
import re
import shlex
import shutil
import struct
import subprocess
import sys
import types

import pytest

from helpers import ROOT, environment, load_program

verify = load_program("records/verify.py")

RULE = "=" * 100
BUDGET = 10**6  # bytes of a committed record


@pytest.fixture(scope="module")
def original(finished_run):
    """A finished run of six steps of RWKV-7 with its C++ kernel, on data with a manifest."""
    return next((finished_run("train_rwkv7") / "records").iterdir())


@pytest.fixture
def record(original, tmp_path):
    """A copy of it, to be tampered with."""
    return shutil.copytree(original, tmp_path / original.name)


def log_of(record):
    return (record / "log.txt").read_text(encoding="utf-8")


def write_log(record, text):
    (record / "log.txt").write_text(text, encoding="utf-8", newline="")


def edit_log(pattern, new, all=False):
    """Change the first place in the log that the pattern finds (all: every place)."""
    def tamper(record):
        text = log_of(record)
        changed = re.sub(pattern, new, text, count=0 if all else 1, flags=re.M)
        assert changed != text, f"{pattern} is not in the log"
        write_log(record, changed)
    return tamper


def edit_lines(change):
    """change(lines, i of the line of step 3) in place."""
    def tamper(record):
        lines = log_of(record).split("\n")
        change(lines, next(i for i, line in enumerate(lines) if line.startswith("step:3/6 train")))
        write_log(record, "\n".join(lines))
    return tamper


def edit_result(change):
    """change(result) in place, in result.json only."""
    def tamper(record):
        path = record / "result.json"
        result = json.loads(path.read_text())
        change(result)
        path.write_text(json.dumps(result))
    return tamper


def seal(record):
    """Both digests made anew, by the rules."""
    path = record / "result.json"
    result = json.loads(path.read_text())
    result.pop("log_sha256", None)
    digest = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
    write_log(record, re.sub(r"^result: .*$", f"result: {digest}", log_of(record), flags=re.M))
    result["log_sha256"] = hashlib.sha256((record / "log.txt").read_bytes()).hexdigest()
    path.write_text(json.dumps(result))


def forge(change, sealed=True):
    """change(result) in result.json and in the log's JSON lines; sealed: with the digests made anew."""
    def tamper(record):
        edit_result(change)(record)
        result, text = json.loads((record / "result.json").read_text()), log_of(record)
        facts = json.loads(re.search(r"^facts: (.*)$", text, re.M)[1])
        facts = {key: result.get(key) for key in facts}
        for key, value in (("config", json.dumps(result.get("config"))), ("command", result.get("command")),
                           ("facts", json.dumps(facts))):
            text = re.sub(rf"^{key}: .*$", lambda _: f"{key}: {value}", text, count=1, flags=re.M)
        write_log(record, text)
        if sealed:
            seal(record)
    return tamper


def put(value, *path):
    """A change that sets result[path[0]][path[1]]... to a value, or to value(old) of a function."""
    def change(result):
        for key in path[:-1]:
            result = result[key]
        result[path[-1]] = value(result[path[-1]]) if callable(value) else value
    return change


def put_log_and_forge(pattern, new, *changes, all=False):
    """Lines and values changed consistently, the digests made anew."""
    def tamper(record):
        if pattern:
            edit_log(pattern, new, all)(record)
        forge(lambda result: [change(result) for change in changes])(record)
    return tamper


def other_source(old, new):
    """The training script in the log changed, its hash made right, the digests made anew."""
    def tamper(record):
        text = log_of(record)
        changed = text.replace(old, new, 1)
        assert changed != text
        begin = changed.index("\n", changed.index("source: ")) + 1
        source = changed[begin:changed.index(f"\n{RULE}\nsource: ", begin)]
        digest = hashlib.sha256(source.encode()).hexdigest()
        was = json.loads((record / "result.json").read_text())["sources"][0]["sha256"]
        write_log(record, changed.replace(was, digest))
        forge(put(digest, "sources", 0, "sha256"))(record)
    return tamper


def without_source(record):
    """cuda/cpu.h taken out, the digests made anew."""
    text = log_of(record)
    begin = text.index(f'{RULE}\nsource: {{"name": "cuda/cpu.h"')
    write_log(record, text[:begin] + text[text.index(RULE, begin + 100):])
    forge(lambda result: result["sources"].pop())(record)


def without_any_source(record):
    text = log_of(record)
    write_log(record, text[:text.index(RULE)] + text[text.index(f"{RULE}\nfacts: "):])


def twice_as_fast(record):
    """Every training time halved, everywhere, the digests made anew."""
    def halve(match):
        step, ms = int(match[1]), int(match[3]) // 2
        return f"step:{step}/6 {match[2]} train_time:{ms}ms step_avg:{ms / max(1, step):.2f}ms"
    text = re.sub(r"^step:(\d+)/6 (train_loss:\S+) train_time:(\d+)ms .*$", halve, log_of(record), flags=re.M)
    result = json.loads((record / "result.json").read_text())
    for point in result["curve"]:
        ms, step = point["train_ms"] / 2, point["step"]
        text = re.sub(rf"^(step:{step}/6 val_loss:\S+) .*$",
                      rf"\1 train_time:{ms:.0f}ms step_avg:{ms / max(1, step):.2f}ms", text, flags=re.M)
    write_log(record, text)

    def change(result):
        for point in result["curve"]:
            point["train_ms"] /= 2
        result["clock"]["train"] /= 2
        result["clock"]["rest"] += 100  # more than rounding, whatever the machine
        result["final"]["train_seconds"] /= 2
    forge(change)(record)


def wrong_loss(record):
    """The exact loss of step 3 made 0.001 smaller, in its line and in the line of all, the digests made anew."""
    def change(match):
        losses = list(struct.unpack("<6f", base64.b64decode(match[1])))
        losses[2] -= 1e-3
        return f"losses: {base64.b64encode(struct.pack('<6f', *losses)).decode()}"
    edit_log(r"^losses: (\S+)$", change)(record)
    edit_log(r"^(step:3/6 train_loss:)(\S+)", lambda match: f"{match[1]}{float(match[2]) - 1e-3:.4f}")(record)
    seal(record)


def swap(lines, i):
    lines[i], lines[i + 1] = lines[i + 1], lines[i]


digit = lambda match: match[1] + str((int(match[2]) + 1) % 10)
val_loss = lambda result: (put(1.25, "final", "val_loss")(result), put(1.25, "curve", -1, "val_loss")(result))
in_both = lambda key, value: lambda result: [result[part].update({key: value}) for part in ("final", "data")]
TAMPERED = {  # what was done: (how, checks that must say FAILED)
    "a digit in a step's loss": (edit_log(r"^(step:3/6 train_loss:\d\.\d\d\d)(\d)", digit), "seal steps"),
    "a digit in a step's time": (edit_log(r"^(step:3/6 train.*step_avg:\d+\.\d)(\d)", digit), "seal"),
    "a digit in a validation loss": (edit_log(r"^(step:4/6 val_loss:\d\.\d\d\d)(\d)", digit), "seal steps"),
    "a step's line removed": (edit_lines(lambda lines, i: lines.pop(i)), "seal steps"),
    "a validation removed": (edit_log(r"^step:4/6 val.*\n", ""), "seal steps"),
    "two steps swapped": (edit_lines(swap), "seal steps"),
    "a step's line twice": (edit_lines(lambda lines, i: lines.insert(i, lines[i])), "seal steps"),
    "a line added": (edit_lines(lambda lines, i: lines.insert(i, "all is well")), "seal log"),
    "a line after the end": (edit_log(r"\Z", "and on\n"), "seal log"),
    "a line of the source edited": (edit_log(r"^ACTIVE_LIMIT = .*$", "ACTIVE_LIMIT = 1e9"), "seal sources"),
    "a line of the source removed": (edit_log(r"^ACTIVE_LIMIT = .*\n", ""), "seal sources"),
    "the seed in the log only": (edit_log(r'"random_seed": 7', '"random_seed": 1'), "seal agreement"),
    "the machine in the log only": (edit_log(r'"memory_bytes": \d', '"memory_bytes": 9'), "seal agreement"),
    "a parameter's line edited": (edit_log(r'^(parameter: .*"mean": )', r"\g<1>1"), "seal"),
    "losses that are no letters": (edit_log(r"^losses: \w", "losses: é"), "seal log"),
    "cut off in a line": (lambda record: write_log(record, log_of(record)[:-30]), "seal log"),
    "cut off after step 3": (edit_log(r"^step:4/6 train(.*\n)*", ""), "seal log"),
    "no end": (edit_log(r"^end: finished\n", ""), "seal log"),
    "line ends of Windows": (lambda record: write_log(record, log_of(record).replace("\n", "\r\n")), "seal log"),
    "another program's log": (lambda record: write_log(record, "import torch\nstep:1/3 val_loss:3.2\n"), "files"),
    "an empty log": (lambda record: write_log(record, ""), "files"),
    "no log": (lambda record: (record / "log.txt").unlink(), "files"),
    "no result.json": (lambda record: (record / "result.json").unlink(), "files"),
    "half a result.json": (lambda record: (record / "result.json").write_text("{\n"), "files"),
    "a loss that is no number": (edit_result(put(math.nan, "final", "val_loss")), "files"),
    "result.json of another schema": (edit_result(put(1, "schema")), "files"),
    "the loss in result.json": (edit_result(put(1.25, "final", "val_loss")), "seal clock"),
    "the seed in result.json": (edit_result(put(8, "config", "random_seed")), "seal agreement"),
    "the last digit of a loss in result.json": (
        edit_result(put(lambda loss: math.nextafter(loss, 0), "curve", 1, "val_loss")), "seal"),
    "a value taken from result.json": (edit_result(lambda result: result["final"].pop("tokens")), "seal schedule"),
    "a value of another kind": (edit_result(put("many", "final", "tokens")), "seal schedule"),
    "a value added to result.json": (edit_result(lambda result: result.update(official=True)), "seal agreement"),
    "another folder's name": (lambda record: record.rename(record.parent / "2026_best"), "agreement"),
    "the final loss in both files, digests as they were": (forge(val_loss, sealed=False), "seal steps"),
    "the seed in both files, digests as they were": (forge(put(8, "config", "random_seed"), sealed=False), "seal"),
    # below, the digests were made anew
    "the final loss": (forge(val_loss), "steps"),
    "the final loss but not the curve": (forge(put(1.25, "final", "val_loss")), "clock"),
    "a training loss": (put_log_and_forge(r"^(step:3/6 train_loss:\d\.\d\d\d)(\d)", digit), "steps"),
    "falling times": (
        put_log_and_forge(r"^(step:3/6 train.*train_time:)\d+ms step_avg:.*$", r"\g<1>0ms step_avg:0.00ms"), "steps"),
    "fewer validations": (put_log_and_forge(r"^step:4/6 val.*\n", "", lambda result: result["curve"].pop(2)),
                          "steps schedule"),
    "more tokens": (forge(put(10**6, "final", "tokens")), "schedule"),
    "tokens of a validation": (forge(put(1, "curve", 1, "tokens")), "schedule"),
    "fewer validation tokens": (forge(put(320, "final", "val_tokens")), "schedule"),
    "fewer validation tokens, everywhere": (forge(in_both("val_tokens", 320)), "schedule"),
    "more steps": (forge(put(7, "config", "steps")), "steps schedule"),
    "bytes of text": (forge(put(1000, "final", "text_bytes")), "schedule"),
    "more bytes of text than tokens": (forge(in_both("text_bytes", 353)), "schedule"),
    "more devices": (forge(put(8, "final", "devices")), "clock"),
    "the time of training": (forge(put(lambda s: s / 2, "final", "train_seconds")), "clock"),
    "a phase of the clock": (forge(put(lambda s: s + 5, "clock", "validation")), "clock"),
    "all training times, for half of them": (twice_as_fast, "clock"),
    "the day": (forge(put(0.0, "wall", "began")), "clock"),
    "an earlier part": (forge(put([dict(run="x", step=3, log_sha256="0", train_seconds=0.0)], "parts")), "parts"),
    "a shard's hash": (forge(put("0" * 64, "data", "train", 1, "sha256")), "data"),
    "a shard's tokens": (forge(put(40, "data", "train", 2, "tokens")), "data tokens"),
    "a shard read twice": (forge(lambda r: r["data"]["train"].append(r["data"]["train"][0])), "tokens"),
    "train on val": (forge(lambda r: r["data"]["train"].append(r["data"]["val"][0])), "tokens"),
    "track fineweb": (forge(put("fineweb", "config", "track")), "rules"),
    "a warm-up that trained": (put_log_and_forge(r'^(warm-up: .*"after": ")\w', r"\1x"), "rules"),
    "the number of parameters": (forge(put(lambda n: n - 1000, "model", "parameters")), "model"),
    "a source of any path": (put_log_and_forge("cuda/cpu.h", "../../cpu.h", put("../../cpu.h", "sources", 2, "name"),
                                               all=True), "sources"),
    "no source": (without_any_source, "seal log"),
}
WITH_CODE = {  # the same, found with the record's own code
    "the seed": (forge(put(8, "config", "random_seed")), "command"),
    "a learning rate": (forge(put(0.5, "config", "muon_lr")), "command"),
    "the number of active parameters": (forge(put(lambda n: n - 1000, "model", "active")), "model"),
    "a parameter's shape": (put_log_and_forge(r'^(parameter: .*"shape": )\[32, 32\]', r"\g<1>[64, 16]"), "model"),
    "a kernel's file left out": (without_source, "sources"),
    "a source with another default": (other_source('ffn_ratio: float = 3.5', 'ffn_ratio: float = 4.5'), "command"),
    "a source with another model": (other_source("self.head = Linear(C, V,", "self.head = Linear(C, 2 * V,"), "model"),
    "a source that does not run": (other_source("import argparse\n", "import argparze\n"), "command model"),
}


def verdicts(folder, capsys, *flags):
    """{check: (verdict, text)} of one record; exit status and verdicts must agree, and nothing may be a traceback."""
    capsys.readouterr()
    status = verify.main([str(folder), *flags])
    out, _ = capsys.readouterr()
    found = {}
    for verdict, name, text in re.findall(r"^  (ok|FAILED|not checked) +(\S+) +(\S.*)$", out, re.M):
        if found.get(name, ("ok",))[0] != "FAILED":
            found[name] = verdict, text
    assert "Traceback" not in out and status == any(verdict == "FAILED" for verdict, _ in found.values()), out
    assert found and ("1 FAILED" in out) == bool(status), out
    return found


def check_failures(found, names):
    failed = {name for name, (verdict, _) in found.items() if verdict == "FAILED"}
    assert failed >= set(names.split()), f"not found by {set(names.split()) - failed}, but by {failed}: {found}"
    return failed


def test_a_record_as_it_was_written(original, capsys):
    found = verdicts(original, capsys)
    others = {name: answer for name, answer in found.items() if answer[0] != "ok"}
    assert set(others) <= {"commit"}, others  # a checkout with changes, or none
    assert list(found) == ["files"] + [check.__name__ for check in verify.CHECKS]
    found = verdicts(original, capsys, "--no-code")
    unchecked = {name for name, (verdict, _) in found.items() if verdict == "not checked"}
    assert unchecked - {"commit"} == {"command", "model"}


def test_a_contestant_of_ones_own_name(record, capsys):
    """A copy of a script under another name, as one is made to try an idea."""
    edit_log(r'^source: {"name": "train_rwkv7.py"', 'source: {"name": "train_mine.py"')(record)
    forge(lambda result: (put("train_mine.py", "script")(result), put("train_mine.py", "sources", 0, "name")(result),
                          put(lambda words: words.replace("train_rwkv7", "train_mine", 1), "command")(result)))(record)
    assert {name for name, (verdict, _) in verdicts(record, capsys).items() if verdict != "ok"} <= {"commit"}


def test_forging_nothing_leaves_a_good_record(record, capsys):
    """The tools of this file make no trouble of their own: what the tables below find is what was changed."""
    forge(lambda result: None)(record)
    assert {name for name, (verdict, _) in verdicts(record, capsys).items() if verdict != "ok"} <= {"commit"}
    source = "MIT licence"
    other_source('"""Train RWKV-7', f'"""{source}. Train RWKV-7')(record)
    found = verdicts(record, capsys, "--no-code")
    assert {name for name, (verdict, _) in found.items() if verdict == "FAILED"} <= {"commit"}, found


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_found(what, record, capsys):
    tamper, names = TAMPERED[what]
    tamper(record)
    folder, = record.parent.iterdir()
    failed = check_failures(verdicts(folder, capsys, "--no-code"), names)
    if list(TAMPERED).index(what) >= list(TAMPERED).index("the final loss") and "log" not in names:
        assert "seal" not in failed, "the digests were made anew"


def test_tampering_is_found_with_the_records_code(original, tmp_path, capsys):
    """All at once: one process for each set of sources."""
    for what, (tamper, _) in WITH_CODE.items():
        tamper(shutil.copytree(original, tmp_path / what / original.name))
    assert verify.main([str(tmp_path)]) == 1
    pages = re.split(rf"^{re.escape(str(tmp_path))}/(.+)/{original.name}$", capsys.readouterr().out, flags=re.M)
    assert pages[-1].endswith(f"; {len(WITH_CODE)} FAILED\n"), pages[-1]
    found = {what: set(re.findall(r"^  FAILED +(\S+)", page, re.M)) for what, page in zip(pages[1::2], pages[2::2])}
    assert found.keys() == WITH_CODE.keys()
    for what, (_, names) in WITH_CODE.items():
        assert found[what] >= set(names.split()), (what, found[what])
        assert not found[what] & {"log", "seal", "agreement"}, (what, found[what])


def test_no_value_ends_the_program(record, capsys):
    """Each value of the record replaced by one of another kind, digests and all: verdicts, never a traceback."""
    result = json.loads((record / "result.json").read_text())
    inner = [(key, k) for key in result if isinstance(result[key], dict) for k in result[key]]
    others, before = itertools.cycle((None, "x", -1, 10**15, [], {}, 0.5)), log_of(record)
    for path in [(key,) for key in result] * 3 + inner:
        value = next(others)
        forge(put(value, *path))(record)
        verdicts(record, capsys, "--no-code")
        write_log(record, before)
        (record / "result.json").write_text(json.dumps(result))


def test_every_line_is_sealed(original):
    """Each line edited, removed, doubled or moved."""
    lines, result = log_of(original).split("\n"), verify.Record(original)
    assert verify.seal(result) == f"sha256 {result.result['log_sha256']}"
    steps = next(i for i, line in enumerate(lines) if line.startswith("warm-up: "))
    for i in [*range(0, steps, 101), *range(steps, len(lines) - 1)]:
        for changed in ([*lines[:i], lines[i] + " ", *lines[i + 1:]], lines[:i] + lines[i + 1:],
                        lines[:i + 1] + lines[i:], [*lines[:i], lines[i + 1], lines[i], *lines[i + 2:]]):
            if changed != lines:
                result.data = "\n".join(changed).encode()
                with pytest.raises(verify.Failed, match="is not what the run wrote"):
                    verify.seal(result)


def test_the_limit_of_track_fineweb_without_a_gpu():
    """The full-size models of a GPU's record are built without memory; one that is too wide is refused."""
    import train_rwkv7
    records = []
    for flags in (["--fast_cuda"], ["--fast_cuda", "--width", "832"]):
        config = dict(vars(train_rwkv7.parse(flags)), device="cuda", dtype="bf16", kernel="fast")
        record = verify.Record.__new__(verify.Record)
        files = [ROOT / "train_rwkv7.py", *load_program("cuda/build.py").sources("wkv7", "fast")]
        record.log = types.SimpleNamespace(config=config, command=shlex.join(["train_rwkv7.py", *flags]), sources=[
            (dict(name=path.relative_to(ROOT).as_posix()), path.read_text(encoding="utf-8")) for path in files])
        record.result, record.trouble = dict(command=record.log.command, config=config), None
        records.append(record)
    verify.probe(records)
    for record in records:
        record.result.update(model=record.answer["model"], script="train_rwkv7.py", final=dict(val_tokens=10_485_760))
        record.log.parameters = [dict(name=name, shape=shape) for name, shape in record.answer["shapes"].items()]
        record.log.warm_up = dict(before="0" * 64, after="0" * 64)
        assert "makes the recorded configuration" in verify.command(record)
        assert "cuda/wkv7/wkv7_fast.cu" in record.answer["files"]
        assert re.fullmatch(r"1[1-4]\d,\d{3},\d{3} active parameters", verify.model(record))
    assert verify.rules(records[0]) == "of track fineweb are kept"
    with pytest.raises(verify.Failed, match="parameters are active; track fineweb allows 124,000,000"):
        verify.rules(records[1])


@pytest.mark.parametrize("steps, epochs, order, expected", (
    (9, 1, "sequential", "90 of 91 read, each at most once"), (18, 2, "sequential", "1.98 times; --epochs 2 declares"),
    (10, 1, "sequential", None), (19, 2, "sequential", None), (8, 1, "shuffled", "80 of 80 read, each at most once"),
    (16, 2, "shuffled", "160 of 80 read, 2.00 times; --epochs 2"), (17, 2, "shuffled", None)))
def test_how_often_tokens_are_read(steps, epochs, order, expected):
    """91 tokens, ten a step; shuffled eight chunks of ten, whatever the phase."""
    config = dict(steps=steps, epochs=epochs, order=order, bsz=1, seq_len=10)
    shards = [dict(name=name, tokens=tokens, sha256=None) for name, tokens in (("a", 40), ("b", 51), ("c", 9))]
    data = dict(train=shards[:2], val=shards[2:])
    record = types.SimpleNamespace(result=dict(config=config, data=data))
    if expected:
        assert expected in verify.tokens(record)
    else:
        with pytest.raises(verify.Failed, match="more often than declared"):
            verify.tokens(record)


def test_sources_are_those_of_the_commit(record, capsys):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("no git checkout")
    forge(put(dict(commit=head, changed=["README.md"]), "git"))(record)
    other_source('"""Train RWKV-7', '"""Train, train RWKV-7')(record)
    found = verdicts(record, capsys, "--no-code")
    assert found["commit"] == ("FAILED", f"train_rwkv7.py is not that of commit {head[:12]}")
    forge(put(["train_rwkv7.py"], "git", "changed"))(record)
    assert verdicts(record, capsys, "--no-code")["commit"][0] == "not checked"


def test_other_data_here_is_said(original, record, capsys):
    """Equal shards are right whoever made them. Others, of another Python: not checked. Of this one: FAILED."""
    folder = record.parent / "data"
    manifest = json.loads((original.parent.parent / "data" / "manifest.json").read_text())
    forge(lambda r: (put(str(folder), "data", "folder")(r), r["data"]["manifest"].update(python="3.1.4")))(record)
    assert "there is no" in verdicts(record, capsys, "--no-code")["data"][1]
    folder.mkdir()
    for digest, python, expected, words in (
            (manifest["shards"][0]["sha256"], "3.9.9", "ok", "shards of toy as in"),
            ("f" * 64, "3.9.9", "not checked", "another python (3.9.9, not 3.1.4)"),
            ("f" * 64, "3.1.4", "FAILED", manifest["shards"][0]["name"])):
        manifest["shards"][0]["sha256"] = digest
        (folder / "manifest.json").write_text(json.dumps(dict(manifest, python=python)))
        verdict, why = verdicts(record, capsys, "--no-code")["data"]
        assert verdict == expected and words in why, why


RUNS = {"a_seed1": ("1", "train_a.py --muon_lr 1 --random_seed 1"), "b_seed1": ("2", "train_b.py --random_seed 1")}


@pytest.mark.parametrize("what, change, said", (
    ("nothing", None, "2 runs, of 2 contestants and 1 seeds, as planned"),
    ("another script", lambda plan, runs: plan["contestants"][0].update(sha256="3"), "another train_a.py"),
    ("other flags", lambda plan, runs: plan["contestants"][0].update(words=["--muon_lr", "2"]), "other flags"),
    ("another seed", lambda plan, runs: runs["a_seed1"].result["config"].update(random_seed=2), "other flags"),
    ("a run left out", lambda plan, runs: runs.pop("b_seed1"), "seed 1: 0 finished runs"),
    ("one that failed", lambda plan, runs: runs.pop("b_seed1") and plan["runs"].append(
        dict(label="b", seed=1, end="failed, exit status 1")), "1 runs, of 2 contestants"),
    ("one that finished left out", lambda plan, runs: runs.pop("b_seed1") and plan["runs"].append(
        dict(label="b", seed=1, end="finished")), "seed 1: 0 finished runs"),
    ("a run of no plan", lambda plan, runs: runs.update(c=types.SimpleNamespace()), "not in the plan: 2026_c")))
def test_a_race_is_held_against_its_plan(what, change, said, tmp_path):
    runs = {}
    for name, (digest, command) in RUNS.items():
        result = dict(sources=[dict(sha256=digest)], command=command, config=dict(random_seed=1))
        runs[name] = types.SimpleNamespace(result=result)
    plan = dict(seeds=[1], runs=[], contestants=[
        dict(label="a", command="A", script="train_a.py", sha256="1", words=["--muon_lr", "1"]),
        dict(label="b", command="B", script="train_b.py", sha256="2", words=[])])
    if change:
        change(plan, runs)
    for name, run in runs.items():
        run.folder = tmp_path / f"2026_{name}"
    (tmp_path / "race.json").write_text(json.dumps(plan))
    assert said in verify.judge(verify.race, tmp_path / "race.json", runs.values())[1]


def run_verify(*arguments, **env):
    return subprocess.run([sys.executable, ROOT / "records" / "verify.py", *map(str, arguments)],
                          env=environment(**env), capture_output=True, text=True, timeout=200)


def test_replay(original, record, tmp_path):
    """Four of six steps, the kernel built from the log: bit for bit. A forged loss of step 3 is named."""
    done = run_verify("--replay", 4, original, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 steps and 3 validations are equal bit for bit, on the same machine and versions" in done.stdout
    replayed, = tmp_path.glob("replay-*")
    for source in ("train_rwkv7.py", "cuda/build.py", "cuda/wkv7/reference.py", "cuda/cpu.h", "cuda/wkv7/wkv7_cpu.cpp"):
        assert (replayed / source).read_bytes() == (ROOT / source).read_bytes()
    assert list((replayed / "cuda" / "build").glob("*.so")), "another kernel ran"
    log, = replayed.glob("records/*/log.txt")
    wrong_loss(record)
    again = verify.Log(log.read_text())
    again.read_losses()
    verdict, text = verify.compare(verify.Record(record), again, 4)
    assert verdict == "FAILED" and "must be equal bit for bit; the first that differs is step 3: recorded" in text, text


def test_only_a_replay_finds_a_forged_loss(record, capsys):
    wrong_loss(record)
    assert not [name for name, (verdict, _) in verdicts(record, capsys, "--no-code").items() if verdict == "FAILED"]


def test_replay_elsewhere_has_a_band(original, record):
    """Compared with itself as if it came from another torch: equal, within the band, beyond it."""
    def again():
        log = verify.Log(log_of(original))
        log.finish()
        return log

    there = verify.Record(record)
    assert verify.compare(there, again(), 6)[1].endswith("on the same machine and versions")
    wrong_loss(record)
    there = verify.Record(record)
    assert verify.compare(there, again(), 2)[0] == "ok", "of two steps neither was changed"
    assert verify.compare(there, again(), 6)[0] == "FAILED"
    forge(put("1.0", "environment", "torch"))(record)
    verdict, text = verify.compare(verify.Record(record), again(), 6)
    assert verdict == "ok" and "(environment.torch)" in text and "within 0.001, 0.01 is allowed" in text, text
    assert "the first that differs is step 3" in text
    for _ in range(10):
        wrong_loss(record)
    verdict, text = verify.compare(verify.Record(record), again(), 6)
    assert verdict == "FAILED" and "the first 20 steps may be 0.01 off, but step 3" in text, text
    forge(put("0" * 64, "data", "train", 0, "sha256"))(record)
    with pytest.raises(verify.Failed, match="the train shards here are other ones"):
        verify.compare(verify.Record(record), again(), 6)


def test_bad_replays(original, tmp_path, monkeypatch):
    for flags, message in ((["--replay", 0], "at least one step"),
                           (["--replay", 2, "--no-code"], "runs the record's code")):
        done = run_verify(original, *flags)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done
    record = verify.Record(original)
    with pytest.raises(verify.Failed, match="--replay 7: the run has 6 steps"):
        verify.replay(record, 7, None, None)
    monkeypatch.setattr(verify.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(verify.Failed, match="the script ended with status 1, see above"):
        verify.replay(record, 2, tmp_path / "nowhere", None)


def test_no_record(tmp_path):
    done = run_verify(tmp_path / "nothing")
    assert done.returncode == 1 and "there is no log.txt" in done.stdout and done.stderr == "", done


def test_committed_records():
    """Every committed run keeps to its budget and is verified; one without result.json says why it ended."""
    listed = subprocess.run(["git", "ls-files", "records"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    runs = sorted({(ROOT / path).parent for path in listed if path.endswith(("/log.txt", "/result.json"))})
    assert runs, "no record is committed"
    sizes = {run.name: sum(path.stat().st_size for path in run.iterdir()) for run in runs}
    assert max(sizes.values()) <= BUDGET, sizes
    unfinished = [run for run in runs if not (run / "result.json").exists()]
    for run in unfinished:
        assert re.search(r"\nend: (?!finished).+\n\Z", log_of(run)), f"{run} does not say why it has no result"
    races = {run.parent for run in runs if (run.parent / "race.json").exists()}
    done = run_verify(*races, *(run for run in runs if run not in unfinished and run.parent not in races))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("  ok           race ") == len(races) > 0
