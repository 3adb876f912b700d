"""The results table: every finished run in records/, one row for each script and configuration, seeds taken together.

    python records/report.py                 prints the table
    python records/report.py --write         writes it into README.md, between its markers

A run is finished when its folder holds result.json. Runs that differ in more than seed and name are different rows, and
so are different machines; a seed counts once (its first run). Figures are mean ± sd over the seeds.
"""
import argparse
import hashlib
import json
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "<!-- results: python records/report.py --write -->", "<!-- end of results -->"
OWN = ("name", "random_seed", "records", "usd_per_hour", "data", "save_every", "val_every")  # do not make another row


def finished(folder):
    """The result.json of every finished run below folder, oldest first. Raises ValueError for a damaged one."""
    results = []
    for path in sorted(Path(folder).glob("*/result.json")):
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): restore it with git, or delete the folder") from None
    return results


def group(results):
    """{key: [runs with distinct seeds]}; a key is track, script and a hash of settings, sources, data and machine."""
    groups = {}
    for result in results:
        config = {name: value for name, value in result["config"].items() if name not in OWN}
        shards = [shard["sha256"] for split in ("train", "val") for shard in result["data"][split]]
        rest = config, result["sources"], shards, result["hardware"], result["environment"]["torch"]
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        runs = groups.setdefault((config["track"], result["script"], digest), [])
        if result["seed"] not in [run["seed"] for run in runs]:
            runs.append(result)
    return groups


def spread(values, digits):
    """"mean ± sd", the sd only where there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(results):
    """The Markdown table, best loss first inside each track."""
    rows = []
    for (track, script, _), runs in group(results).items():
        first, final = runs[0], lambda key: [run["final"][key] for run in runs]
        machine = f"{first['hardware']['count']} × {first['hardware']['name']}, {first['config']['dtype']}"
        rows.append((track, statistics.mean(final("val_loss")), (
            track, script, f"{first['model']['active']:,}", f"{first['final']['tokens'] / 1e6:.2f}M", str(len(runs)),
            spread(final("val_loss"), 4), spread(final("bits_per_byte"), 4) if final("bits_per_byte")[0] else "–",
            spread(final("train_seconds"), 1), f"{statistics.mean(final('tokens_per_second')):,.0f}", machine,
            runs[-1]["run"][:10])))
    head = ("track", "script", "active parameters", "tokens", "seeds", "nats/token", "bits/byte", "training s",
            "tokens/s", "machine", "date")
    lines = [head, ["---"] * len(head), *(row for _, _, row in sorted(rows, key=lambda row: row[:2]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(text, readme):
    """Put the table between the markers of a Markdown file, atomically. Raises ValueError when they are not there."""
    page = readme.read_text(encoding="utf-8")
    if page.count(MARKERS[0]) != 1 or page.count(MARKERS[1]) != 1:
        raise ValueError(f"{readme} needs the lines {MARKERS[0]} and {MARKERS[1]} once each")
    head, rest = page.split(MARKERS[0])
    temporary = readme.with_suffix(".part")
    temporary.write_text(f"{head}{MARKERS[0]}\n{text}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}", encoding="utf-8")
    os.replace(temporary, readme)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into README.md instead of printing it")
    parser.add_argument("--records", default=ROOT / "records", type=Path, help="folder of the runs")
    args = parser.parse_args(argv)
    try:
        results = finished(args.records)
        if not results:
            raise ValueError(f"no finished run in {args.records}: ./run_rwkv7.sh --track tiny makes one")
        write(table(results), ROOT / "README.md") if args.write else print(table(results))
    except (OSError, ValueError, KeyError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
