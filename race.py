"""Races training scripts against each other: interleaved, with seeds fixed beforehand, ended by a verdict with its p.

    python race.py --track tiny "train_gpt2.py" "train_rwkv6.py" "train_rwkv7.py" --seeds 3
    python race.py --track tiny "train_rwkv7.py" "train_rwkv7.py --muon_lr 0.03" --seeds 5
    python race.py "train_gpt2.py" "train_rwkv7.py --adam_lr 0.0026 --fast_cuda" --seeds 4     (track fineweb, all GPUs)

A contestant is a script with its flags, in quotes. The runs go A B B A A B ..., one at a time, so that a machine that
slows down slows all of them. Everything lies in records/<date>_race_<names>/: race.json (the plan, written before the
first run, then every attempt and how it ended), the runs' own folders, and at the end README.md, curves.png and
report.html. The same command after an interruption goes on with the unfinished race; finished runs are not repeated. A
script that dies is reported and the race goes on. Needs requirements.txt and records/requirements.txt.
"""
import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "records"))
import report  # noqa: E402
import stats  # noqa: E402

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NEEDS = ("torch", "scipy", "matplotlib")
RACE_OWN = ("--random_seed", "--name", "--records", "--resume", "--check")  # the race sets these
PLAN = ("contestants", "seeds", "track", "flags", "nproc", "target")  # what makes two races the same race

# ----------------------------------------------------------------------------------------------------------------------
# The plan


def short(path):
    """A path as runs and records name it: from this folder where it is below it. Runs start in this folder."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def has(words, flag):
    return any(word == flag or word.startswith(flag + "=") for word in words)


def contestant(label, text, args):
    """{label, command, words, script, sha256} of a quoted script with its flags. Raises ValueError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"contestant {text!r}: {error}") from None
    path = next((path for path in (Path(words[0]), ROOT / words[0]) if path.is_file()), None) if words else None
    if path is None:
        scripts = ", ".join(sorted(path.name for path in ROOT.glob("train_*.py")))
        raise ValueError(f"contestant {text!r}: no such script. A contestant is a script with its flags in quotes; "
                         f"here are {scripts}")
    words = [*words[1:], *args.flags]
    for own in RACE_OWN:
        if has(words, own):
            raise ValueError(f"contestant {text!r}: {own} is set by the race itself")
    if args.track and has(words, "--track"):
        raise ValueError(f"contestant {text!r}: the track is the race's, --track {args.track}")
    words += ["--track", args.track] if args.track else []
    return dict(label=label, command=" ".join(text.split()), script=short(path), words=words,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest())


CPU_ENVIRONMENT = dict(MALLOC_TRIM_THRESHOLD_="2147483647", MALLOC_TOP_PAD_="67108864", MALLOC_MMAP_MAX_="0",
                       GOMP_SPINCOUNT="2000")  # as setup.sh's cpu_environment sets it; why is said there


def is_tiny(words):
    return "--track=tiny" in words or any(pair == ("--track", "tiny") for pair in zip(words, words[1:]))


def count_gpus():
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(re.findall(r"^GPU \d", listed, re.M))


def make_plan(args):
    """The race, before anything runs. Raises ValueError."""
    if len(args.contestants) < 2:
        raise ValueError('a race takes two contestants or more: python race.py --track tiny "train_gpt2.py" '
                         '"train_rwkv7.py" --seeds 3')
    if len(args.contestants) > 26:
        raise ValueError("at most 26 contestants")
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: at least 1 (and 2 or more for a verdict)")
    if args.target is not None and not math.isfinite(args.target):
        raise ValueError(f"--target {args.target} is no loss")
    field = [contestant(label, text, args) for label, text in zip(string.ascii_lowercase, args.contestants)]
    nproc = args.nproc or (1 if any(is_tiny(c["words"]) for c in field) else max(1, count_gpus()))
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    labels = [c["label"] for c in field]
    order = [[label, seed] for i, seed in enumerate(seeds) for label in (labels if i % 2 == 0 else labels[::-1])]
    return dict(contestants=field, seeds=seeds, track=args.track, flags=args.flags, nproc=nproc, target=args.target,
                n=args.seeds, test="Welch, Holm", alpha=stats.ALPHA, order=order, state="running", runs=[])


def same_race(plan, old):
    """The same contestants, by script and flags; a script that has changed since is noticed before it runs."""
    bare = lambda p: [[{k: c[k] for k in ("label", "script", "words")} for c in p["contestants"]],
                      *(p.get(key) for key in PLAN[1:])]
    return bare(plan) == bare(old)


def open_race(plan, args):
    """(folder, race): the latest race of this plan if it is to go on, else a new one, its race.json already written."""
    for path in sorted(Path(args.records).glob("*_race_*/race.json"), reverse=True):
        race = report.read_json(path)
        if not args.new and same_race(plan, race) and (race["state"] != "finished" or args.retry):
            return path.parent, race
    if args.retry:
        raise ValueError("--retry: no race of these contestants and seeds to go on with")
    names = "_".join(Path(c["script"]).stem.removeprefix("train_") for c in plan["contestants"])
    folder = Path(args.records) / f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}_race_{names[:60]}"
    folder.mkdir(parents=True)
    keep(folder, plan)
    return folder, plan


def keep(folder, race):
    report.replace(folder / "race.json", json.dumps(race, indent=1) + "\n")


def lock(records):
    """One race at a time on these records; a run left over from a killed race holds it, too. Raises ValueError."""
    if fcntl is None:
        return None
    Path(records).mkdir(parents=True, exist_ok=True)
    file = open(Path(records) / ".race.tmp", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"a race, or a run left over from one, is going on in {records}: wait for its end") from None
    return file


# ----------------------------------------------------------------------------------------------------------------------
# The runs


def launch(c, plan, *more):
    """The command of a run as a list of words: no shell reads it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={plan['nproc']}"]
    return [sys.executable, *(torchrun if plan["nproc"] > 1 else []), c["script"], *c["words"], *map(str, more)]


def check(plan):
    """Make the tiny corpus if it is missing, and let every contestant check its flags and data. Raises ValueError."""
    if any(is_tiny(c["words"]) and not has(c["words"], "--data") for c in plan["contestants"]):
        if subprocess.run([sys.executable, str(ROOT / "data" / "pydocs.py")], cwd=ROOT).returncode:
            raise ValueError("the tiny corpus could not be made (above)")
    for c in plan["contestants"]:
        done = subprocess.run(launch(c, dict(nproc=1), "--check"), cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "WORLD_SIZE": str(plan["nproc"])})
        if done.returncode:
            messages = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            raise ValueError(f"contestant {c['command']!r} does not start: {messages[-1]}")


def run_folders(folder, label, seed):
    return set(folder.glob(f"*_{label}_seed{seed}"))


def finished_run(folder, label, seed):
    return next((path for path in sorted(run_folders(folder, label, seed)) if (path / "result.json").exists()), None)


def progress(folder):
    """(step, steps) by the last step line of a running log, or None."""
    try:
        with open(folder / "log.txt", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            steps = re.findall(rb"^step:(\d+)/(\d+) ", file.read(), re.M)
    except OSError:
        return None
    return (int(steps[-1][0]), int(steps[-1][1])) if steps else None


def minutes(seconds):
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min" if seconds >= 3600 else (
        f"{seconds // 60:.0f} min {seconds % 60:02.0f} s")


def remaining(race, label, elapsed, fraction, todo):
    """Seconds to the end of the race, by what finished runs took; None while nothing is known."""
    took = lambda which: [r["seconds"] for r in race["runs"] if r["end"] == "finished" and r["label"] in which]
    projected = elapsed / fraction if fraction and fraction > 0.02 else None
    guess = lambda one: statistics.fmean(took(one) or took(string.ascii_lowercase) or [projected or math.nan])
    left = max(0.0, (projected or guess(label)) - elapsed) + sum(guess(other) for other, _ in todo)
    return None if math.isnan(left) else left


def one_run(race, folder, c, seed, todo, held, place):
    """One run to its end. Returns {label, seed, end, folder, seconds}; end is "finished" or why not."""
    env = {**({} if count_gpus() else CPU_ENVIRONMENT), **os.environ}
    before, start, shown, at = run_folders(folder, c["label"], seed), time.monotonic(), 0.0, None
    tty, interrupted = sys.stdout.isatty(), False
    if before:  # a repetition: folders are named by the second
        time.sleep(1.1)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as console:
        words = launch(c, race, "--random_seed", seed, "--name", f"{c['label']}_seed{seed}", "--records", short(folder))
        process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                                   env=env, start_new_session=True, pass_fds=[held.fileno()] if held else ())
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    pass
                elapsed = time.monotonic() - start
                if process.returncode is None and elapsed - shown >= (1 if tty else 30):
                    shown, new = elapsed, run_folders(folder, c["label"], seed) - before
                    at = progress(max(new)) or at if new else None
                    left = remaining(race, c["label"], elapsed, at and at[0] / at[1], todo)
                    text = (f"{place} {c['command']}, seed {seed}: {f'step {at[0]}/{at[1]}' if at else 'setting up'}, "
                            f"{minutes(elapsed)}{f'; race ends in {minutes(left)}' if left is not None else ''}")
                    print(f"\r\033[K{text[:os.get_terminal_size().columns - 1]}" if tty else text,
                          end="" if tty else "\n", flush=True)
        except KeyboardInterrupt:
            interrupted = True
            stop(process)
        console.seek(0)
        printed = [line for line in re.split(r"[\r\n]+", console.read()) if line.strip()]
    print("\r\033[K" if tty else "", end="")
    new = sorted(run_folders(folder, c["label"], seed) - before)
    code = process.returncode
    if new and (new[-1] / "result.json").exists():
        end = "finished"
    elif interrupted:
        end = "interrupted"
    else:
        why = f"killed by signal {-code}" if code < 0 else f"exit status {code}" if code else "no result.json"
        end = f"failed, {why}: {printed[-1][:300] if printed else 'it printed nothing'}"
        text = "\n".join(printed[-60:])[-20_000:] + "\n"
        (folder / f"failed_{c['label']}_seed{seed}.txt").write_text(text, encoding="utf-8")
    return dict(label=c["label"], seed=seed, end=end, folder=new[-1].name if new else None,
                seconds=round(time.monotonic() - start, 3))


def stop(process):
    """Ask a run to end (it closes its log), then insist. Its session is its own: nobody else is hit."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(folder, race, args, held):
    """Every run of the plan that has not finished. Raises ValueError when a script was changed, KeyboardInterrupt."""
    by_label = {c["label"]: c for c in race["contestants"]}
    failed = {(r["label"], r["seed"]) for r in race["runs"] if r["end"].startswith("failed")}
    todo = [(label, seed) for label, seed in race["order"] if not finished_run(folder, label, seed)
            and (args.retry or (label, seed) not in failed)]
    total = len(race["order"])
    while todo:
        (label, seed), *todo = todo
        c = by_label[label]
        if hashlib.sha256((ROOT / c["script"]).read_bytes()).hexdigest() != c["sha256"]:
            raise ValueError(f"{c['script']} has changed since the race began: put it back and start again to go on, "
                             "or begin another race with --new")
        place = f"[{total - len(todo)}/{total}]"
        done = one_run(race, folder, c, seed, todo, held, place)
        race["runs"].append(done)
        keep(folder, race)
        if done["end"] == "interrupted":
            raise KeyboardInterrupt
        loss = ""
        if done["end"] == "finished":
            final = report.read_json(folder / done["folder"] / "result.json")["final"]
            loss = f": loss {final['val_loss']:.4f}, {final['train_seconds']:.1f} s of training"
        left = remaining(race, label, 0.0, None, todo[1:]) if todo else None
        eta = f"; race ends in {minutes(left)}" if left else ""
        print(f"{place} {c['command']}, seed {seed} {done['end']}{loss} ({minutes(done['seconds'])}){eta}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The verdict


def crossing(result, target):
    """(steps, seconds of training) at which the validation loss first is at the target, linear between validations."""
    last = None
    for p in result["curve"]:
        if p["val_loss"] <= target:
            if last is None:
                return p["step"], p["train_ms"] / 1e3
            part = (last["val_loss"] - target) / (last["val_loss"] - p["val_loss"])
            step, ms = (last[key] + part * (p[key] - last[key]) for key in ("step", "train_ms"))
            return step, ms / 1e3
        last = p
    return None


def targets(field, wanted=None):
    """(loss to reach, whether it was set beforehand): the wanted one, the track's, or the worst final loss here."""
    results = [result for runs in field.values() for result in runs]
    own = {result["final"]["target"] for result in results}
    if wanted is not None or (len(own) == 1 and None not in own):
        return wanted if wanted is not None else own.pop(), True
    return max(result["final"]["val_loss"] for result in results), False


def table(field, target, planned):
    """The race's table in Markdown. field: {contestant's name: finished runs}; planned: runs each was to have."""
    head = ["contestant", "runs", f"steps to {target:.4f}", f"training s to {target:.4f}", "final nats/token",
            "training s", "tokens/s", "peak memory, MB"]
    lines = [head, ["---"] * len(head)]
    for name, runs in field.items():
        reached = [at for at in (crossing(run, target) for run in runs) if at]
        some = f" ({len(reached)} of {len(runs)} runs)" if len(reached) < len(runs) else ""
        memory = [run["final"]["peak_memory_bytes"] / 1e6 for run in runs]
        final = lambda key: report.final(runs, key)
        count = f"{len(runs)}" + (f" of {planned}" if len(runs) < planned else "")
        lines.append([f"`{name}`".replace("|", "\\|"), count] + ([
            stats.spread([steps for steps, _ in reached], 0) + some if reached else "not reached",
            stats.spread([seconds for _, seconds in reached], 1) + some if reached else "not reached",
            stats.spread(final("val_loss"), 4), stats.spread(final("train_seconds"), 1),
            stats.spread(final("tokens_per_second"), 0),
            stats.spread(memory, 0)] if runs else ["–"] * 6))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(field, target=None):
    """(sentence, {(ahead, behind): corrected p}): the best against each rival by Welch's t-test.

    Decided by the training time to a target that was set beforehand, if every run reached it, else by final loss. p is
    corrected for the number of pairs: where all contestants are equal, at most 1 race of 100 is a false alarm.
    """
    runs = {name: runs for name, runs in field.items() if runs}
    if len(runs) < 2:
        return "No verdict: fewer than two contestants have finished runs.", {}
    results = [result for some in runs.values() for result in some]
    if len({str([report.shards(result, "val"), result["config"]["track"]]) for result in results}) > 1:
        return "No verdict: the runs were not validated on the same data and track.", {}
    goal, given = targets(runs, target)
    reached = {name: [crossing(run, goal) for run in some] for name, some in runs.items()}
    by_time = given and all(at for some in reached.values() for at in some)
    if by_time:
        values = {name: [seconds for _, seconds in some] for name, some in reached.items()}
        what, digits, unit = f"training time to {goal}", 1, " s"
    else:
        values = {name: report.final(some, "val_loss") for name, some in runs.items()}
        what, digits, unit = "final loss", 4, ""
    best = min(values, key=lambda name: statistics.fmean(values[name]))
    seconds = {name: report.final(some, "train_seconds") for name, some in runs.items()}
    pairs = list(itertools.combinations(runs, 2))
    ps, qs = ({frozenset(pair): p for pair, p in stats.holm(raw).items()} for raw in (
        {pair: stats.welch(figures[pair[0]], figures[pair[1]])[1] for pair in pairs} for figures in (values, seconds)))
    ahead, level, tests = [], [], {}
    for name in (name for name in runs if name != best):
        difference, _, low, high = stats.welch(values[name], values[best])
        tests[best, name] = p = ps[frozenset((best, name))]
        interval = f", {stats.CONFIDENCE:.0%} interval {low:+.{digits}f} to {high:+.{digits}f}"
        interval = interval if math.isfinite(low) else ""
        text = f"`{name}` (its {what}: {difference:+.{digits}f}{unit}{interval}, {stats.p_text(p)}"
        if not by_time:
            share = statistics.fmean(seconds[name]) / statistics.fmean(seconds[best]) - 1
            text += f"; its training time: {share:+.1%}, {stats.p_text(qs[frozenset((best, name))])}"
        (ahead if p < stats.ALPHA else level).append(text + ")")
    if all(math.isnan(p) for p in tests.values()):
        return "No verdict: a test takes two finished runs or more of each contestant (--seeds).", tests
    parts = [f"`{best}` is ahead of {' and of '.join(ahead)}"] if ahead else []
    parts += [f"{'no difference is shown from' if ahead else f'No difference is shown between `{best}` and'} "
             f"{' and '.join(level)}"] if level else []
    counts = " and ".join(str(len(some)) for some in runs.values())
    correction = f", p corrected for {len(pairs)} pairs (Holm)" if len(pairs) > 1 else ""
    tokens = len({result["final"]["tokens"] for result in results}) > 1 and not by_time
    return (f"{'; '.join(parts)}; Welch's t-test on {counts} runs{correction}, a difference is p < {stats.ALPHA}"
            f"{'; the contestants read different numbers of tokens' if tokens else ''}."), tests


def named(race):
    """{label: the contestant's command}, with its label where two are the same."""
    commands = [c["command"] for c in race["contestants"]]
    return {c["label"]: c["command"] + (f" ({c['label']})" if commands.count(c["command"]) > 1 else "")
            for c in race["contestants"]}


def conclude(folder, race):
    """README.md, curves.png, report.md and report.html in the race's folder; prints the table. Returns the verdict."""
    names, field, curves, notes = named(race), {}, [], []
    for label, name in names.items():
        paths = [finished_run(folder, label, seed) for seed in race["seeds"]]
        field[name] = [report.read_result(path / "result.json") for path in paths if path]
        curves += [(name, report.points(result)) for result in field[name]]
        if len({str([(source["name"], source["sha256"]) for source in run["sources"]]) for run in field[name]}) > 1:
            notes.append(f"`{name}`: its sources changed between runs")
    notes += [f"`{names[r['label']]}`, seed {r['seed']}: {r['end']}" for r in race["runs"] if r["end"] != "finished"]
    machines = sorted({report.machine(result) for runs in field.values() for result in runs})
    if len(machines) > 1:
        notes.append(f"the runs are of different machines ({'; '.join(machines)}): their times cannot be compared")
    sentence, _ = verdict(field, race["target"])
    parts = [f"# Race: {', '.join(f'`{name}`' for name in field)}",
             f"{len(race['seeds'])} seeds ({', '.join(map(str, race['seeds']))}), fixed beforehand; runs interleaved: "
             f"{' '.join(label.upper() for label, _ in race['order'])}; on {'; '.join(machines) or 'no machine'}."]
    lines = ""
    if any(field.values()):
        goal, given = targets({name: runs for name, runs in field.items() if runs}, race["target"])
        lines = table(field, goal, len(race["seeds"]))
        every = sorted({result["config"]["val_every"] for runs in field.values() for result in runs})
        parts += [lines, f"{goal:.4f} is {'the target' if given else 'the highest final loss of these runs'}; when it "
                  f"was reached is interpolated between validations, every {' or '.join(map(str, every))} steps. "
                  "Mean ± sd."]
        report.png(curves, folder / "curves.png", f"{', '.join(names.values())}: validation loss")
    parts += [f"**Verdict.** {sentence}"]
    parts += ["Not finished, or to be known:", "\n".join(f"- {note}" for note in notes)] if notes else []
    if lines:
        report.pages([folder], folder)
        parts += ["![validation loss](curves.png)", "report.html: the runs' curves against steps, tokens and time."]
    report.replace(folder / "README.md", "\n\n".join(parts) + "\n")
    print("\n" + "\n\n".join(filter(None, (lines, "\n".join(notes), sentence, f"{short(folder)}/"))))
    return sentence


def right_python(argv):
    """Go on with .venv's Python where this one lacks packages. Raises ValueError where that lacks them, too."""
    lacks = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if not lacks:
        return
    venv = ROOT / ".venv" / "bin" / "python"
    if venv.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        os.execv(venv, [str(venv), str(Path(__file__).resolve()), *argv])
    raise ValueError(f"{sys.executable} lacks {', '.join(lacks)}: "
                     f"{sys.executable} -m pip install -r requirements.txt -r records/requirements.txt")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="*", metavar="CONTESTANT", help="a script with its flags, in quotes")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds each contestant runs with [3]")
    parser.add_argument("--first_seed", type=int, default=1337, metavar="S", help="the seeds are S, S + 1, ... [1337]")
    parser.add_argument("--track", choices=("fineweb", "tiny"), help="track of all contestants [the scripts' own]")
    parser.add_argument("--flags", default="", help="flags for all of them, in quotes: --flags=\"--steps 2000\" [none]")
    parser.add_argument("--target", type=float, help="loss to reach [the track's; else the worst final loss]")
    parser.add_argument("--nproc", type=int, help="processes a run [one a GPU; tiny: one]")
    parser.add_argument("--records", default=ROOT / "records", type=Path,
                        help="folder that receives the race's [records]")
    parser.add_argument("--new", action="store_true", help="begin another race even if this one is unfinished")
    parser.add_argument("--retry", action="store_true", help="go on with the latest such race and repeat what failed")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = None
    try:
        right_python(argv)
        args.flags = shlex.split(args.flags)
        plan = make_plan(args)
        held = lock(args.records)
        check(plan)
        folder, race = open_race(plan, args)
        race["state"] = "running"
        keep(folder, race)
        earlier = sum(finished_run(folder, label, seed) is not None for label, seed in race["order"])
        print(f"{len(race['order'])} runs in {short(folder)}/, {earlier} of them finished earlier", flush=True)
        run_all(folder, race, args, held)
        race["state"] = "finished"
        conclude(folder, race)
        keep(folder, race)
        return 0 if all(finished_run(folder, label, seed) for label, seed in race["order"]) else 1
    except KeyboardInterrupt:
        where = f"; {short(folder)}/ is kept, the same command goes on with it" if folder else ""
        print(f"\nrace.py: interrupted{where}", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"race.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
