"""race.py with tests/contestant.py, which takes milliseconds: order, interruption, failures, verdict, bad input."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from helpers import ROOT, environment, make_corpus, only_record, run_here, tiny, tree

sys.path.append(str(ROOT / "records"))
import race  # noqa: E402
import report  # noqa: E402

STUB = "tests/contestant.py"


@pytest.fixture(autouse=True)
def signals_as_before():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(records, *arguments):
    return race.main([*arguments, "--records", records])


def only_race(records):
    folder, = (path for path in records.iterdir() if path.is_dir())
    return folder, json.loads((folder / "race.json").read_text())


def test_a_race_from_start_to_end(tmp_path, capsys):
    assert run(tmp_path, f"{STUB} --level 1.2", f"{STUB} --level 1.5", "--seeds", "3") == 0
    folder, plan = only_race(tmp_path)
    assert folder.name.endswith("_race_contestant_contestant") and plan["state"] == "finished"
    assert plan["seeds"] == [1337, 1338, 1339]
    assert [(r["label"], r["seed"]) for r in plan["runs"]] == [(*each,) for each in plan["order"]]
    assert "".join(label for label, _ in plan["order"]) == "abbaab"
    results = [json.loads((folder / r["folder"] / "result.json").read_text()) for r in plan["runs"]]
    assert [(r["config"]["random_seed"], r["config"]["level"]) for r in results] == [
        (1337, 1.2), (1337, 1.5), (1338, 1.5), (1338, 1.2), (1339, 1.2), (1339, 1.5)]
    out = capsys.readouterr().out
    assert "[6/6]" in out and "race ends in" in out
    page = (folder / "README.md").read_text()
    assert f"`{STUB} --level 1.2` is ahead of `{STUB} --level 1.5` (its final loss: +0." in page and "p = " in page
    losses = [r["final"]["val_loss"] for r in results if r["config"]["level"] == 1.2]
    assert race.stats.spread(losses, 4) in page and race.stats.spread(losses, 4) in out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and (folder / "report.html").exists()
    assert sum(map(len, tree(folder).values())) < 1_000_000
    assert str(ROOT) not in (folder / "race.json").read_text(), "a machine's own paths"
    assert len(report.finished(tmp_path)) == 6, "report.py finds the runs of a race"


def test_interrupted_gone_on_with_and_a_script_that_dies(tmp_path, capsys):
    """The same command goes on after Ctrl-C; a run that dies is reported and only --retry repeats it."""
    mark, records = tmp_path / "hangs", tmp_path / "records"
    arguments = STUB, f"{STUB} --level 1.4 --hang {mark} --die 1338", "--seeds", "3"
    start = lambda *words: subprocess.Popen([sys.executable, ROOT / "race.py", *words, "--records", records], text=True,
                                            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process, latest = start(*arguments), time.monotonic() + 60
    while not mark.exists():
        assert time.monotonic() < latest and process.poll() is None, "the second run did not begin within a minute"
        time.sleep(0.05)
    folder, plan = only_race(records)
    assert plan["seeds"] == [1337, 1338, 1339] and plan["order"], "the plan lies there before the runs"
    second = start(STUB, STUB)
    assert second.wait(60) == 1 and "is going on" in second.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err, err
    plan = only_race(records)[1]
    assert [r["end"] for r in plan["runs"]] == ["finished", "interrupted"]
    assert report.unfinished(records) == [(f"{folder.name}/{plan['runs'][1]['folder']}", "interrupted")]
    before = tree(folder / plan["runs"][0]["folder"])
    assert run(records, *arguments) == 1
    assert only_race(records)[0] == folder
    plan, failed = only_race(records)[1], "failed, exit status 1: contestant.py: out of luck"
    assert [(r["label"], r["seed"], r["end"]) for r in plan["runs"]] == [
        ("a", 1337, "finished"), ("b", 1337, "interrupted"), ("b", 1337, "finished"), ("b", 1338, failed),
        ("a", 1338, "finished"), ("a", 1339, "finished"), ("b", 1339, "finished")]
    assert tree(folder / plan["runs"][0]["folder"]) == before, "a finished run was repeated"
    assert "half way" in (folder / "failed_b_seed1338.txt").read_text()
    page = (folder / "README.md").read_text()
    assert "interrupted" in page and "seed 1338: failed" in page and "| 2 of 3 |" in page and "Verdict" in page
    assert "2 of 3" in capsys.readouterr().out
    assert run(records, *arguments, "--retry") == 1
    assert [(r["label"], r["seed"], r["end"]) for r in only_race(records)[1]["runs"][7:]] == [("b", 1338, failed)]


def test_what_the_same_command_does_after_a_kill_and_after_the_end(tmp_path):
    """It finds the run that outlived a killed race; after the end it begins another. No shell reads a contestant."""
    trap, records = tmp_path / "trap", tmp_path / "records"
    arguments = STUB, f"{STUB} --val '$(touch {trap});touch {trap}'", "--seeds", "1"
    assert run(records, *arguments) == 0
    folder, plan = only_race(records)
    assert not trap.exists()
    assert "not validated on the same data" in (folder / "README.md").read_text()
    plan.update(state="running", runs=plan["runs"][:1])  # as if the second run had ended after the race's death
    (folder / "race.json").write_text(json.dumps(plan))
    assert run(records, *arguments) == 0
    assert len(only_race(records)[1]["runs"]) == 1 and len(report.finished(records)) == 2
    folder.rename(records / "2026-01-01T00-00-00Z_race_contestant_contestant")  # folders are named by the second
    assert run(records, *arguments) == 0
    assert len(list(records.glob("*_race_*"))) == 2


def test_a_script_changed_during_the_race_stops_it(tmp_path):
    script = shutil.copy(ROOT / STUB, tmp_path / "train_copy.py")
    arguments = argparse.Namespace(contestants=[str(script), STUB], seeds=2, first_seed=1, track=None, flags=[],
                                   nproc=None, target=None, records=tmp_path, new=False, retry=False)
    folder, plan = race.open_race(race.make_plan(arguments), arguments)
    script.write_text(script.read_text() + "# changed\n")
    with pytest.raises(ValueError, match="has changed since the race began"):
        race.run_all(folder, plan, arguments, None)
    assert not report.finished(tmp_path)


@pytest.mark.parametrize("arguments, message", (
    ([], "two contestants or more"), ([STUB], "two contestants or more"),
    ([STUB, "train_nothing.py"], "no such script"), ([STUB, ""], "no such script"),
    ([STUB, f"{STUB} --val 'open"], "No closing quotation"),
    ([STUB, f"{STUB} --random_seed 3"], "--random_seed is set by the race"),
    ([STUB, f"{STUB} --name=x"], "--name is set by the race"),
    ([STUB, f"{STUB} --track tiny", "--track", "tiny"], "the track is the race's"),
    ([STUB, STUB, "--seeds", "0"], "--seeds 0"), ([STUB, STUB, "--target", "nan"], "no loss"),
    ([STUB, STUB, "--retry"], "no race of these contestants"),
    ([STUB, f"{STUB} --level 0"], "does not start: contestant.py: --level must be positive"),
    ([STUB, f"{STUB} --levle 1"], "does not start: contestant.py: error: unrecognized")))
def test_bad_input_is_one_line_and_nothing_begins(tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("race.py: ") and err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_python_without_the_packages_gives_way_to_the_environments(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "NEEDS", ("torch", "no_such_package"))
    monkeypatch.setattr(race, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="lacks no_such_package: .*pip install -r requirements.txt -r records/requ"):
        race.right_python([])
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    calls = []

    def execv(*call):
        calls.append(call)
        raise InterruptedError
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(InterruptedError):
        race.right_python(["a b", "--seeds", "2"])
    assert calls[0][0] == tmp_path / ".venv/bin/python" and calls[0][1][2:] == ["a b", "--seeds", "2"]


# ----------------------------------------------------------------------------------------------------------------------
# The verdict


def made(rng, level=1.4, noise=0.005, seconds=100.0, target=None, **more):
    loss, ms = level + rng.gauss(0, noise), 1e3 * seconds * (1 + rng.gauss(0, 0.01))
    final = dict(val_loss=loss, train_seconds=ms / 1e3, tokens=1000, target=target)
    curve = [dict(step=step, val_loss=loss + 1 - step / 10, train_ms=ms * step / 10) for step in (0, 5, 10)]
    return dict(dict(config=dict(track="tiny"), data=dict(val=[dict(sha256="v")]), final=final, curve=curve), **more)


def alarms(races, n, field, **of):
    rng = random.Random(0)
    return sum(any(p < race.stats.ALPHA for p in race.verdict(
        {name: [made(rng, **of.get(name, {})) for _ in range(n)] for name in field})[1].values()) for _ in range(races))


def test_identical_contestants_are_no_difference():
    """20 races, and as many more as it takes to see that the stated rate, at most 1 in 100, is kept but not missed by
    far: Welch's test itself stays below it with few runs (0.5 % with 3 against 3, 0.8 % with 5, 0.9 % with 10)."""
    assert alarms(20, 3, "ab") <= 2  # more than two of 20 have a chance of 0.001
    assert 3 <= alarms(2000, 10, "ab") <= 36  # 18 expected, sd 4.2
    assert alarms(500, 4, "abc") <= 14  # 5 or fewer expected, sd 2.2


def test_a_difference_is_found():
    assert alarms(20, 3, "ab", b=dict(level=1.45)) == 20
    sentence, ps = race.verdict({"a": [made(random.Random(i)) for i in range(3)],
                                 "b": [made(random.Random(9 + i), level=1.5) for i in range(3)]})
    assert sentence.startswith("`a` is ahead of `b` (its final loss: +0.0872, 99% interval +0.0688 to +0.1056, p =")
    assert list(ps) == [("a", "b")]


def test_a_target_set_beforehand_is_decided_by_time():
    rng = random.Random(1)
    field = {"slow": [made(rng, level=1.3, seconds=100) for _ in range(4)],
             "fast": [made(rng, level=1.4, seconds=50) for _ in range(4)]}
    assert race.verdict(field)[0].startswith("`slow` is ahead of `fast` (its final loss")
    assert race.verdict(field, 1.5)[0].startswith("`fast` is ahead of `slow` (its training time to 1.5: +34.8 s, 99%")
    assert "final loss" in race.verdict(field, 1.35)[0], "who does not reach the target has no time"


def test_no_difference_and_no_verdict():
    one, *rest = same = [made(random.Random(i)) for i in range(3)]
    sentence, ps = race.verdict({"a": same, "b": same})
    assert sentence.startswith("No difference is shown between") and list(ps.values()) == [1.0]
    other = made(random.Random(2), data=dict(val=[dict(sha256="w")]))
    for b, message in (([], "No verdict: fewer"), ([other], "same data"), (rest[:1], "No verdict: a test takes two")):
        assert message in race.verdict({"a": [one], "b": b})[0]


def test_crossing():
    result = made(random.Random(0), level=1.0, noise=0)
    ms = result["curve"][-1]["train_ms"]
    step, seconds = race.crossing(result, 1.75)  # 2.0 at step 0, 1.5 at step 5, 1.0 at step 10
    assert abs(step - 2.5) < 1e-9 and abs(seconds - ms / 4e3) < 1e-9
    assert race.crossing(result, 1.0)[0] == 10 and race.crossing(result, 0.99) is None
    assert race.crossing(result, 2.5) == (0, 0)


def test_runs_get_the_environment_that_the_launcher_gives():
    """Freed memory and OpenMP's spinning are a fifth of a step on a CPU: both ways to start a run set the same."""
    done = subprocess.run(["bash", "-euc", ". ./setup.sh; cpu_environment; env"], cwd=ROOT, text=True,
                          capture_output=True, env={"PATH": os.environ["PATH"], "GOMP_SPINCOUNT": "7"})
    given = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {name: given.get(name) for name in race.CPU_ENVIRONMENT} == {**race.CPU_ENVIRONMENT, "GOMP_SPINCOUNT": "7"}


@pytest.mark.skipif(bool(race.count_gpus()), reason="for machines without a GPU")
def test_the_record_names_them(tmp_path, monkeypatch):
    """What a run is given is in its record, from which verify.py --replay takes it."""
    for name, value in race.CPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    run_here("train_gpt2", *tiny("train_gpt2", make_corpus(tmp_path / "data"), tmp_path / "records", "--steps", 2))
    variables = only_record(tmp_path / "records")[2]["environment"]["variables"]
    assert race.CPU_ENVIRONMENT.items() <= variables.items(), variables
