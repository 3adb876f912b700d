"""What the records say: the leaderboard, the page of a run, and the curves that new runs are held against.

    python records/report.py                      prints the leaderboard: every finished run below records/
    python records/report.py --write              writes it into README.md between its markers, with every run and
                                                  the differences into records/README.md, and curves_<track>.png
    python records/report.py RECORD               report.md and report.html (curves; no server, no network) in RECORD
    python records/report.py RECORD RECORD --out DIR   the same of several runs, or of a race's folder, on one page
    python records/report.py --update-reference   records/reference/: mean and band of the runs with default flags
    python records/report.py --summary RECORD     a finished run in three lines, held against its reference

A run is finished when its folder holds result.json; races keep their runs one level deeper. Runs that differ in more
than seed and name are different rows, and so are different machines; a seed counts once (its first run). Rows are
ranked together only on one track, machine and validation set: by training time where the track has a target, and the
mean loss is at or below it with p < 0.01 (one-sided t-test); else by loss, at one number of tokens. Figures are
mean ± sd over the seeds. PNG and p need records/requirements.txt.
"""
import argparse
import base64
import hashlib
import json
import math
import os
import re
import shlex
import statistics
import struct
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import stats  # noqa: E402  (beside this file, which may be imported from elsewhere)

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "<!-- results: python records/report.py --write -->", "<!-- end of results -->"
OWN = ("name", "random_seed", "records", "data", "save_every", "val_every", "checkpoints", "resume")  # no other row
MACHINE = ("device", "dtype", "compile", "kernel", "fast_cuda", "wind_cuda", "device_bsz", "check")
TARGET = {"fineweb": 3.28}  # validation loss in nats a token
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "H800": 989e12, "A100": 312e12,
              "A800": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, from the makers' data sheets
POINTS = 200  # of a training curve on a page: averages over so many stretches
STEP = re.compile(r"^step:(\d+)/\d+ train_loss:(\S+) train_time:(\d+)ms ", re.M)
VALIDATION = re.compile(r"^step:(\d+)/\d+ val_loss:(\S+) train_time:(\d+)ms ", re.M)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a08000", "#56b4e9", "#e69f00", "#7f7f7f")  # as in page.html

# ----------------------------------------------------------------------------------------------------------------------
# Reading


def folders(parent):
    """Every run's folder below parent, oldest first: what holds a log.txt or a result.json, at depth one or two."""
    folders = {path.parent for name in ("log.txt", "result.json") for depth in ("*", "*/*")
             for path in Path(parent).glob(f"{depth}/{name}")}
    return sorted(folders, key=lambda path: (path.name, str(path)))


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it with git, or delete the folder") from None


def read_result(path):
    """result.json, and in "final" what follows from it: bits_per_byte, rates a second, mfu, target, seed."""
    result = read_json(path)
    try:
        final, config, hardware = (result[key] for key in ("final", "config", "hardware"))
        seconds, text = final["train_seconds"], final["text_bytes"]
        flops = result["model"]["flops_per_token"] * final["tokens"] / seconds
        peak = [value for name, value in PEAK_FLOPS.items() if name in hardware["name"] and config["dtype"] == "bf16"]
        final.update(
            bits_per_byte=final["val_loss"] * final["val_tokens"] / text / math.log(2) if text else None,
            tokens_per_second=final["tokens"] / seconds, flops_per_second=flops,
            mfu=flops / (final["devices"] * max(peak)) if peak else None, target=TARGET.get(config["track"]))
        return dict(result, seed=config["random_seed"], words=shlex.split(result["command"]))
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a result of this project: {reason}") from None


def finished(parent):
    """read_result of every finished run below parent, oldest first, with its "folder". ValueError if damaged."""
    return [dict(read_result(folder / "result.json"), folder=folder.relative_to(parent).as_posix())
            for folder in folders(parent) if (folder / "result.json").exists()]


def shards(result, *splits):
    """What identifies the shards of a run: their sha256, without one name and number of tokens."""
    return [shard["sha256"] or [shard["name"], shard["tokens"]]
            for split in splits or ("train", "val") for shard in result["data"][split]]


def unfinished(parent):
    """[(folder, how it ended)] of the runs without result.json, and of a race's runs that left no folder."""
    failed = []
    for folder in folders(parent):
        if not (folder / "result.json").exists():
            last = ((folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]
            end = last.removeprefix("end: ") if last.startswith("end: ") else "cut off"
            failed.append((folder.relative_to(parent).as_posix(), end))
    for path in sorted(Path(parent).glob("*/race.json")):
        failed += [(path.parent.name, f"{run['label']}, seed {run['seed']}: {run['end']}")
                  for run in read_json(path).get("runs", ()) if run["end"] != "finished" and not run["folder"]]
    return failed


def read_record(folder):
    """One run for a page: its result (None if it did not finish), configuration, curves and end. Raises ValueError."""
    folder = Path(folder)
    log, result = folder / "log.txt", folder / "result.json"
    if not log.exists():
        raise ValueError(f"{folder} is not a run's folder: it holds no log.txt"
                         + ("" if folder.is_dir() else " (it is not even a folder)"))
    text = log.read_text(encoding="utf-8", errors="replace")
    try:
        head = re.match(r"config: (\{.*\})\n", text)
        config = json.loads(head[1]) if head else {}
    except ValueError:
        config = {}
    if "track" not in config:
        raise ValueError(f"{log} is not a log of this project: its first line is no \"config: {{...}}\"")
    result = read_result(result) if result.exists() else None
    lines = text.rstrip("\n").splitlines()
    end = lines[-1].removeprefix("end: ") if lines[-1].startswith("end: ") else "cut off"
    train = [(int(step), float(loss), int(ms)) for step, loss, ms in STEP.findall(text)]
    begun = result["parts"][-1]["step"] if result and result["parts"] else 0  # of a resumed run: its last part's lines
    if result and (end != "finished" or begun + len(train) != result["final"]["steps"]):
        raise ValueError(f"{log} is truncated: {len(train)} step lines and the end {end!r}, but result.json says "
                         f"{result['final']['steps'] - begun} steps. Restore it with git.")
    a_step = config["bsz"] * config["seq_len"]
    if result:
        val = [(p["step"], p["tokens"], p["train_ms"] / 1e3, p["val_loss"]) for p in result["curve"]]
    else:
        val = [(int(step), int(step) * a_step, int(ms) / 1e3, float(loss))
               for step, loss, ms in VALIDATION.findall(text)]
    stretch = max(1, math.ceil(len(train) / POINTS))
    parts = [train[i:i + stretch] for i in range(0, len(train), stretch)]
    averaged = [(part[-1][0], part[-1][0] * a_step, part[-1][2] / 1e3, statistics.fmean(loss for _, loss, _ in part))
                for part in parts if all(math.isfinite(loss) for _, loss, _ in part)]
    return dict(folder=folder, result=result, config=config, end=end, val=val, train=averaged)


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def group(results):
    """{key: [runs with distinct seeds]}; a key is track, script and a hash of settings, sources, data and machine."""
    groups = {}
    for result in results:
        config = {name: value for name, value in result["config"].items() if name not in OWN}
        sources = [(source["name"], source["sha256"]) for source in result["sources"]]
        rest = config, sources, shards(result), machine(result), result["environment"]["torch"]
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        runs = groups.setdefault((config["track"], result["script"], digest), [])
        if result["seed"] not in [run["seed"] for run in runs]:
            runs.append(result)
    return groups


def flags(result):
    """The flags that make this run what it is, as given: the command without track, seed, name and folders."""
    kept, skip = [], False
    for word in result.get("words", [])[1:]:
        if word.startswith("--"):
            skip = word[2:].split("=")[0] in ("track", *OWN)
        if not skip:
            kept.append(word)
    return " ".join(kept)


def machine(result):
    return f"{result['hardware']['count']} × {result['hardware']['name']}"


def classes(results):
    """{class: rows}: a row is a group's runs; only rows of one class may be compared by rank."""
    by_class = {}
    for (track, _, _), runs in sorted(group(results).items()):
        target, tokens = runs[0]["final"]["target"], runs[0]["final"]["tokens"]
        key = track, machine(runs[0]), target, None if target else tokens, str(shards(runs[0], "val"))
        by_class.setdefault(key, []).append(runs)
    return {key: ranked(rows, key[2]) for key, rows in sorted(by_class.items(), key=lambda item: str(item[0]))}


def final(runs, key):
    return [run["final"][key] for run in runs]


def reaches(runs, target):
    """p that the mean is not below the target, and whether the row may be ranked by time."""
    p = stats.below(final(runs, "val_loss"), target)
    return p, p < stats.ALPHA


def ranked(rows, target):
    """[(rank or None, runs)], best first. With a target: by time, those who show that they reach it; else by loss."""
    loss = lambda runs: statistics.fmean(final(runs, "val_loss"))
    if not target:
        return list(enumerate(sorted(rows, key=loss), 1))
    reached = sorted((runs for runs in rows if reaches(runs, target)[1]),
                   key=lambda runs: statistics.fmean(final(runs, "train_seconds")))
    return [*enumerate(reached, 1), *((None, runs) for runs in sorted(rows, key=loss) if runs not in reached)]


def boards(results, prefix="", short=False):
    """The leaderboard in Markdown: one table a class. prefix: from the page to the folder of the records. short: the
    columns of the front page, with a link to a row's first folder."""
    parts = []
    for (track, where, target, tokens, _), rows in classes(results).items():
        rule = f"target {target}, ranked by time" if target else f"{tokens / 1e6:.2f}M tokens, ranked by loss"
        lines = []
        for rank, runs in rows:
            first, bits = runs[0], final(runs, "bits_per_byte")
            row = {
                "rank": str(rank or "–"), "run": name_of(runs),
                "nats/token": stats.spread(final(runs, "val_loss"), 4), "n": str(len(runs)),
                "p": f"{reaches(runs, target)[0]:.2g}" if target else "",
                "bits/byte": stats.spread(bits, 4) if None not in bits else "–",
                "training s": stats.spread(final(runs, "train_seconds"), 1),
                "tokens/s": f"{statistics.fmean(final(runs, 'tokens_per_second')):,.0f}",
                "active parameters": f"{first['model']['active']:,}", "steps": f"{first['config']['steps']:,}",
                "tokens": f"{first['final']['tokens'] / 1e6:.2f}M", "hardware": f"{where}, {first['config']['dtype']}",
                "date": max(run["run"] for run in runs)[:10],
                "seeds' folders": " ".join(f"[{run['seed']}]({prefix}{run['folder']})" for run in runs),
                "record": f"[{first['run'][:10]}]({prefix}{Path(first['folder']).parts[0]})"}
            left_out = ("steps", "tokens", "hardware", "date", "seeds' folders", "rank") if short else ("record",)
            if not target:
                left_out += ("p",)
            elif short:
                left_out += ("tokens/s",)
            row = {key: cell for key, cell in row.items() if key not in left_out}
            lines += [] if lines else [row, ["---"] * len(row)]
            lines.append(row.values())
        parts.append(f"**{track}** on {where}: {rule}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def name_of(runs):
    """A row's script and flags, as code in a table."""
    return f"`{' '.join([runs[0]['script'], flags(runs[0])]).strip()}`".replace("|", "\\|")


def front(results):
    """What README.md shows: the short leaderboard, and a picture for each track."""
    tracks = sorted({result["config"]["track"] for result in results})
    pictures = [f"![validation loss against steps and training time, track {track}](records/curves_{track}.png)"
                for track in tracks]
    return "\n\n".join([boards(results, "records/", short=True), *pictures])


def differences(results):
    """Each row against the first of its class, in Markdown: Welch's test and interval, in loss and in time."""
    lines = ["| against | run | nats/token | p | training s | p |", "| --- " * 6 + "|"]
    for rows in classes(results).values():
        for _, runs in rows[1:]:
            cells = []
            for key, digits in (("val_loss", 4), ("train_seconds", 1)):
                difference, p, low, high = stats.welch(final(runs, key), final(rows[0][1], key))
                interval = f" ({low:+.{digits}f} to {high:+.{digits}f})" if math.isfinite(low) else ""
                cells += [f"{difference:+.{digits}f}{interval}", "–" if math.isnan(p) else f"{p:.2g}"]
            lines.append(f"| {name_of(rows[0][1])} | {name_of(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def margins(results):
    """Every row of a track with a target, in Markdown: how far below it, how surely, and how many runs are missing."""
    lines = [f"| run | n | margin | p | margin · √n ≥ {stats.NEED} | runs missing for p < {stats.ALPHA} |",
             "| --- " * 6 + "|"]
    for (_, _, target, _, _), rows in classes(results).items():
        for _, runs in rows if target else ():
            losses = final(runs, "val_loss")
            score, enough = stats.fixed_sigma(losses, target)
            missing = stats.more_runs(losses, target)
            lines.append(f"| {name_of(runs)} | {len(runs)} | "
                         f"{target - statistics.fmean(losses):+.4f} | {reaches(runs, target)[0]:.2g} | {score:.4f}: "
                         f"{'yes' if enough else 'no'} | {'–' if missing is None else missing} |")
    return "\n".join(lines) if len(lines) > 2 else ""


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def replace(path, text):
    """Write a file atomically."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write(text, readme):
    """Put the table between the markers of a Markdown file, atomically. Raises ValueError when they are not there."""
    page = readme.read_text(encoding="utf-8")
    if page.count(MARKERS[0]) != 1 or page.count(MARKERS[1]) != 1:
        raise ValueError(f"{readme} needs the lines {MARKERS[0]} and {MARKERS[1]} once each")
    head, rest = page.split(MARKERS[0])
    replace(readme, f"{head}{MARKERS[0]}\n{text}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def png(curves, path, title):
    """Validation loss against steps and against training time. curves: [(label, [(step, tokens, s, loss)])]."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("matplotlib is missing: pip install -r records/requirements.txt") from None
    labels = list(dict.fromkeys(label for label, _ in curves))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), dpi=110, sharey=True)
    for axis, column, name in ((axes[0], 0, "steps"), (axes[1], 2, "seconds of training")):
        named = set()
        for label, points in curves:
            axis.plot([p[column] for p in points], [p[3] for p in points], marker="o", markersize=3, linewidth=1.3,
                      color=COLOURS[labels.index(label) % len(COLOURS)], label=None if label in named else label)
            named.add(label)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    settled = [p[3] for _, points in curves for p in points if p[0] > 0 and math.isfinite(p[3])]
    if settled:  # the start, at ln(vocabulary), would press the rest together
        room = 0.05 * (max(settled) - min(settled)) or 0.1
        axes[0].set_ylim(min(settled) - room, max(settled) + room)
    axes[0].set_ylabel("validation loss, nats per token")
    if labels:
        axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    temporary = path.with_suffix(".part")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    os.replace(temporary, path)


def points(result):
    return [(p["step"], p["tokens"], p["train_ms"] / 1e3, p["val_loss"]) for p in result.get("curve", ())]


def for_page(record):
    """What the page shows of a run, as plain JSON."""
    result, config = record["result"] or {}, record["config"]
    last = result.get("final", {})
    script = result.get("script") or re.sub(r"^[^_]*_(train_[a-z0-9]+)_.*", r"\1.py", record["folder"].name)
    facts = dict(config, **result.get("environment", {}), **result.get("git", {}))
    clean = lambda rows: [row for row in rows if all(math.isfinite(value) for value in row)]
    return dict(
        id=record["folder"].name, script=" ".join([script, flags(result)]).strip(), seed=config.get("random_seed"),
        status=record["end"], machine=machine(result) if result else "unfinished", loss=last.get("val_loss"),
        bits=last.get("bits_per_byte"), seconds=last.get("train_seconds"), steps=last.get("steps"),
        tokens=last.get("tokens"), rate=last.get("tokens_per_second"),
        memory=last["peak_memory_bytes"] / 1e6 if last else None,
        val=clean(record["val"]), train=clean(record["train"]),
        facts="\n".join(f"{key}: {value}" for key, value in facts.items()))


def markdown(records):
    """The page of some runs in Markdown: a table of the runs, and of their validations."""
    head = "run", "seed", "nats/token", "bits/byte", "training s", "steps", "tokens", "tokens/s", "end"
    lines = [f"# {records[0]['folder'].name if len(records) == 1 else f'{len(records)} runs'}", "",
             f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for run in map(for_page, records):
        digits = dict(loss=4, bits=4, seconds=1, steps=0, tokens=0, rate=0)
        cells = ["–" if run[key] is None else f"{run[key]:,.{n}f}" for key, n in digits.items()]
        lines.append(f"| `{run['script']}` | {run['seed']} | {' | '.join(cells)} | {run['status']} |")
    for record in records:
        run = for_page(record)
        lines += ["", f"## {run['id']}", "", f"{run['machine']}. Validation:", "",
                  "| step | tokens | training s | nats/token |", "| --- " * 4 + "|"]
        lines += [f"| {step:,} | {tokens:,} | {seconds:.1f} | {loss:.4f} |"
                  for step, tokens, seconds, loss in record["val"]]
    return "\n".join(lines) + "\n"


def html(records):
    runs = [for_page(record) for record in records]
    data = json.dumps(runs, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    page = (Path(__file__).resolve().parent / "page.html").read_text(encoding="utf-8")
    data = data.replace("<", "\\u003c")  # no "</script>" can come from a run's words
    return page.replace(">RUNS<", f">{data}<", 1)


def pages(paths, out=None):
    """report.md and report.html of the given runs or folders of runs. Returns where they are."""
    runs = []
    for path in map(Path, paths):
        below = folders(path) if path.is_dir() and not (path / "log.txt").exists() else []
        runs += below or [path]
    if out is None and len(paths) > 1:
        raise ValueError("several records make one page: say where with --out FOLDER")
    out = Path(out or paths[0])
    records = [read_record(path) for path in runs]
    texts = {"report.md": markdown(records), "report.html": html(records)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        replace(out / name, text)
    return [out / name for name in texts]


def overview(parent, results):
    """records/README.md."""
    counted = {run["folder"] for runs in group(results).values() for run in runs}
    resumed = lambda r: "".join(f", resumed after step {p['step']} of {p['run']}" for p in r["parts"])
    runs = [(r["folder"], r["script"], r["seed"], f"{r['final']['val_loss']:.4f}", f"{r['final']['train_seconds']:.1f}",
             ("counted" if r["folder"] in counted else "this seed has an earlier run") + resumed(r)) for r in results]
    runs += [(folder, "", "", "", "", end) for folder, end in unfinished(parent)]
    tracks = sorted({r["config"]["track"] for r in results if r.get("curve")})
    parts = ["# Records", "One folder a run, or a race with its runs inside. Made by `python records/report.py "
             "--write`; figures are mean ± sd\nover seeds. Only runs on one track, kind of machine and validation set "
             "are ranked together.", boards(results)]
    parts += [f"![validation loss, track {track}](curves_{track}.png)" for track in tracks]
    if table := margins(results):
        parts += ["## Targets", "One-sided t-test that the mean is below the target; the fixed-sigma rule of the "
                  "speedrun's optimisation\ntrack; runs to add if mean and sd stay as they are.", table]
    if table := differences(results):
        parts += ["## Differences", "Welch's t-test, not corrected for the number of rows, and its "
                  f"{stats.CONFIDENCE:.0%} interval.", table]
    lines = ["| folder | script | seed | nats/token | training s | |", "| --- " * 6 + "|"]
    lines += [f"| [{run[0]}]({run[0]}) | {' | '.join(map(str, run[1:]))} |" for run in sorted(runs)]
    parts += ["## Every run", "Unfinished and failed ones, too.", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write_all(parent, results):
    text = overview(parent, results)
    for track in sorted({r["config"]["track"] for r in results if r.get("curve")}):
        curves = [(" ".join([run["script"], flags(run)]).strip(), points(run))
                  for (where, _, _), runs in sorted(group(results).items()) if where == track for run in runs]
        png(curves, parent / f"curves_{track}.png", f"track {track}: validation loss of every run")
    replace(parent / "README.md", text)
    write(front(results), ROOT / "README.md")


def update_reference(parent, results):
    """records/reference/<track>_<script>.json from the runs with default flags: per step the mean and the band in
    which one more run falls (99 % for each validation). Seeds count once. Returns the files' paths."""
    best_rows = {}
    for (track, script, _), runs in group(results).items():
        if not flags(runs[0]) and len(runs) > 1 and all(run.get("curve") for run in runs):
            best = best_rows.setdefault((track, script), runs)
            if (len(runs), runs[0]["run"]) > (len(best), best[0]["run"]):
                best_rows[track, script] = runs
    written = []
    for (track, script), runs in sorted(best_rows.items()):
        at = {}
        for run in runs:
            for p in run["curve"]:
                at.setdefault(p["step"], []).append(p["val_loss"])
        curve = [dict(step=step, mean=round(statistics.fmean(losses), 6), band=round(stats.band(losses), 6))
                 for step, losses in sorted(at.items()) if len(losses) == len(runs)]
        reference = dict(
            track=track, script=script, runs=[run["run"] for run in runs],
            free=[*OWN, *MACHINE],  # flags that should not move the curve out of its band
            config={key: value for key, value in runs[0]["config"].items() if key not in (*OWN, *MACHINE)},
            shards=shards(runs[0]), curve=curve)
        path = Path(parent) / "reference" / f"{track}_{Path(script).stem}.json"
        path.parent.mkdir(exist_ok=True)
        replace(path, json.dumps(reference, indent=1) + "\n")
        written.append(path)
    if not written:
        raise ValueError("a reference needs at least two finished runs with default flags and distinct seeds")
    return written


def reference_of(result):
    """{step: (mean, band)} of the committed runs with this configuration and data, {} where there are none."""
    name = f"{result['config']['track']}_{Path(result['script']).stem}.json"
    try:  # whatever is wrong with the file: a run does without it
        known = read_json(ROOT / "records" / "reference" / name)
        config = {key: value for key, value in result["config"].items() if key not in known["free"]}
        if (config, shards(result)) != (known["config"], known["shards"]):
            return {}
        return {point["step"]: (float(point["mean"]), float(point["band"])) for point in known["curve"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def spikes(losses):
    """Steps whose loss is more than 6 sd and 0.5 nats above the mean of up to 100 before it (20 at least)."""
    steps = []
    for step in range(20, len(losses)):
        before = losses[max(0, step - 100):step]
        if losses[step] > statistics.fmean(before) + max(0.5, 6 * statistics.pstdev(before)):
            steps.append(step + 1)
    return steps


def summary(folder, usd_per_hour=None):
    """What came out of a finished run, whether it is what such runs come to, and what to try next."""
    result = read_result(Path(folder) / "result.json")
    final, config, reference = result["final"], result["config"], reference_of(result)
    loss = f"validation loss {final['val_loss']:.4f} nats per token"
    if final["bits_per_byte"]:
        loss += f" = {final['bits_per_byte']:.4f} bits per byte"
    loss += f" after {final['tokens'] / 1e6:.1f}M tokens"
    for point in result["curve"]:
        if point["step"] in reference:
            mean, band = reference[point["step"]]
            inside = abs(point["val_loss"] - mean) <= band + 5e-5  # half of the last digit shown
            held = f"; reference at step {point['step']}: {mean:.4f} ± {band:.4f}: {'inside' if inside else 'OUTSIDE'}"
            if not inside or point is result["curve"][-1]:
                loss += held
    speed = f"{final['train_seconds']:.1f} s of training, {final['tokens_per_second']:,.0f} tokens/s, "
    speed += f"{final['flops_per_second'] / 1e12:.3g} TFLOP/s"
    if final["mfu"]:
        speed += f", MFU {final['mfu']:.1%}"
    if usd_per_hour:
        speed += f", ${usd_per_hour * final['train_seconds'] / 3600:.2f}"
    log = (Path(folder) / "log.txt").read_text(encoding="utf-8")
    losses = base64.b64decode(re.search(r"^losses: (\S*)$", log, re.MULTILINE)[1])
    if spiked := spikes(struct.unpack(f"<{len(losses) // 4}f", losses)):
        speed += f", spikes of the loss at step {', '.join(map(str, spiked[:9]))}{', ...' if spiked[9:] else ''}"
    rival = "gpt2" if "rwkv" in result["script"] else "rwkv7"
    return (f"{loss}\n{speed}\nnext: ./run_{rival}.sh --track {config['track']} (its rival), --random_seed "
            f"{config['random_seed'] + 1} (the noise), python records/report.py (all runs), --help (all flags)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="*", help="folders of runs, or of races: their page instead of the leaderboard")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the page [the one RECORD]")
    parser.add_argument("--write", action="store_true", help="write the leaderboard into the README files")
    parser.add_argument("--update-reference", action="store_true", help="write records/reference/")
    parser.add_argument("--summary", metavar="RECORD", help="a finished run in three lines")
    parser.add_argument("--usd_per_hour", type=float, metavar="X",
                        help="price of the machine in dollars an hour, for --summary [none]")
    parser.add_argument("--records", default=ROOT / "records", type=Path, help="folder of the runs [records]")
    args = parser.parse_args(argv)
    try:
        if args.summary:
            print(summary(args.summary, args.usd_per_hour))
            return 0
        if args.record:
            print("\n".join(map(str, pages(args.record, args.out))))
            return 0
        results = finished(args.records)
        if not results:
            raise ValueError(f"no finished run in {args.records}: ./run_rwkv7.sh --track tiny makes one")
        if args.update_reference:
            print("\n".join(map(str, update_reference(args.records, results))))
        if args.write:
            write_all(args.records, results)
        elif not args.update_reference:
            print(boards(results))
    except KeyError as error:
        print(f"report.py: a result.json lacks {error}: not one of this project, or damaged", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
