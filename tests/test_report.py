"""records/report.py: the leaderboard, the README files, a run's page in a real browser, references, bad records."""

import copy
import html
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, make_corpus, run_here, tiny, tree

sys.path.append(str(ROOT / "records"))
import report as module  # noqa: E402

COMMITTED = [Path(path).parent for path in subprocess.run(
    ["git", "ls-files", "records/*/result.json"], cwd=ROOT, capture_output=True, text=True).stdout.split()]
BUDGET = 1_000_000  # bytes of a committed run
RESULT = dict(
    run="2026-01-02T03-04-05Z_train_rwkv7_a", script="train_rwkv7.py", parts=[], curve=[], git={},
    config=dict(track="tiny", name="a", random_seed=1, steps=10, device="cpu", dtype="fp32", muon_lr=0.02),
    command="train_rwkv7.py --track tiny --random_seed=1 --name a",
    sources=[dict(name="train_rwkv7.py", sha256="00")], environment=dict(torch="2.13.0"),
    hardware=dict(name="a CPU", count=1), model=dict(active=123456, flops_per_token=10**6),
    data=dict(train=[dict(name="t", sha256="1")], val=[dict(name="v", sha256="2")]),
    final=dict(val_loss=1.5, val_tokens=1000, text_bytes=900, train_seconds=100.0, tokens=2_000_000, steps=10,
               devices=1, peak_memory_bytes=10**9))


def put(folder, run, seed, loss, seconds=100.0, hardware="a CPU", inside="", val="2", flags="", **config):
    result = copy.deepcopy(RESULT)
    result.update(run=f"2026-01-02T03-04-{run:02}Z_train")
    result["config"].update(random_seed=seed, **config)
    result["command"] += f" {flags}"
    result["final"].update(val_loss=loss, train_seconds=seconds)
    result["hardware"]["name"], result["data"]["val"][0]["sha256"] = hardware, val
    path = folder / inside / result["run"] / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    return path.parent


def report(*flags):
    command = [sys.executable, ROOT / "records" / "report.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def rows(folder):
    """The cells of the leaderboard's rows."""
    text = module.boards(module.finished(folder))
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| – ", "| 1 ", "| 2 "))]


def refused(*flags, message):
    """The program as a user starts it must end with status 1 and one line that has the message."""
    done = report(*flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done
    assert done.stderr.startswith("report.py: ") and message in done.stderr, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The leaderboard


def test_rows(tmp_path):
    """Seeds share a row and count once; configurations have their own, best first; track, seed, name describe none."""
    for run, seed, loss in ((1, 1, 1.50), (2, 2, 1.54), (3, 2, 9.99)):
        put(tmp_path, run, seed, loss)
    out = report("--records", tmp_path).stdout.splitlines()
    assert len(out) == 5, out
    assert "| 1.5200 ± 0.0283 | 2 |" in out[4], out[4]
    assert "123,456" in out[4] and "2.00M" in out[4] and "20,000" in out[4] and "03-04-03Z" not in out[4]
    assert "this seed has an earlier run" in module.overview(tmp_path, module.finished(tmp_path))
    put(tmp_path, 4, 1, 1.4, muon_lr=0.03, flags="--muon_lr 0.03")
    put(tmp_path, 5, 3, 1.52, name="other name, same run")
    first, second = rows(tmp_path)
    assert first[:3] == ["1", "`train_rwkv7.py --muon_lr 0.03`", "1.4000"]
    assert second[:4] == ["2", "`train_rwkv7.py`", "1.5200 ± 0.0200", "3"]


@pytest.mark.parametrize("other", (dict(hardware="another CPU"), dict(track="fineweb"), dict(val="other text")))
def test_what_cannot_be_compared_is_not_ranked_together(tmp_path, other):
    put(tmp_path, 1, 1, 1.6)
    put(tmp_path, 2, 1, 1.4, **other)
    second = "–" if "track" in other else "1"  # of one run no target is shown to be reached
    assert sorted(row[0] for row in rows(tmp_path)) == ["1", second]
    assert len(module.classes(module.finished(tmp_path))) == 2


def test_a_target_ranks_by_time_and_only_who_shows_to_reach_it(tmp_path):
    losses = {"a": (3.275, 3.2752, 3.2748), "b": (3.2761, 3.2759, 3.276), "c": (3.2799, 3.281, 3.277), "d": (3.27,)}
    for i, (name, (some, seconds)) in enumerate(zip(losses, zip(losses.values(), (90.0, 80.0, 10.0, 5.0)))):
        for seed, loss in enumerate(some):
            put(tmp_path, 10 * i + seed, seed, loss, seconds, track="fineweb", flags=f"--muon_lr {name}", muon_lr=name)
    got = [(row[0], row[1].split()[-1].strip("`"), row[4]) for row in rows(tmp_path)]
    assert [row[:2] for row in got] == [("1", "b"), ("2", "a"), ("–", "d"), ("–", "c")], got
    assert float(got[0][2]) < 0.01 < float(got[3][2]) and got[2][2] == "nan"


def test_what_did_not_finish_is_listed(tmp_path):
    put(tmp_path, 1, 1, 1.5)
    put(tmp_path, 3, 3, 1.6, inside="x_race_y")
    for name, text in (("failed", "config: {}\nend: failed: ValueError: x\n"), ("cut", "config: {}\nstep:1/2 tr")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text(text)
    lost = dict(label="a", seed=7, end="failed, exit status 1: no flag", folder=None)
    (tmp_path / "x_race_y" / "race.json").write_text(json.dumps(dict(runs=[lost])))
    text = module.overview(tmp_path, module.finished(tmp_path))
    assert "| failed: ValueError: x |" in text and "| cut off |" in text
    assert "a, seed 7: failed, exit status 1: no" in text
    row, = rows(tmp_path)
    assert row[3] == "2" and "(x_race_y/2026-01-02T03-04-03Z_train)" in row[-1], "a race's run counts"


def test_differences_are_welchs(tmp_path):
    a, b = (1.50, 1.51, 1.52), (1.40, 1.41, 1.43)
    for seed in range(3):
        put(tmp_path, seed, seed, a[seed], 100.0 + seed)
        put(tmp_path, 10 + seed, seed, b[seed], 90.0 + seed, muon_lr=0.1, flags="--muon_lr 0.1")
    line = module.differences(module.finished(tmp_path)).splitlines()[2]
    difference, p, low, high = module.stats.welch(a, b)
    assert f"| {difference:+.4f} ({low:+.4f} to {high:+.4f}) | {p:.2g} | +10.0 (" in line, line


def test_without_a_finished_run_and_with_a_bad_one(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "log.txt").write_text("config: {}\n")
    refused("--records", tmp_path, message="no finished run")
    refused("--summary", tmp_path / "unfinished", message="result.json")
    path = put(tmp_path, 1, 1, 1.5) / "result.json"
    put(tmp_path, 2, 2, 1.5, muon_lr=1.0, flags="--muon_lr 1.0")
    refused("--records", tmp_path, "--update-reference", message="at least two finished runs with default flags")
    for text, message in (("{", f"{path} is damaged"), ('{"loss": 1}', f"{path} is not a result of this project: it "
                                                                       "lacks 'final'")):
        path.write_text(text)
        refused("--records", tmp_path, message=message)


def test_the_readmes_show_the_committed_records():
    """The tables in README.md and records/README.md are what the program writes from the records that are committed."""
    assert COMMITTED, "no record is committed"
    results = [r for r in module.finished(ROOT / "records") if Path("records", r["folder"]) in COMMITTED]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{module.MARKERS[0]}\n{module.front(results)}\n{module.MARKERS[1]}" in page
    assert module.boards(results) in (ROOT / "records" / "README.md").read_text(encoding="utf-8")
    for folder in COMMITTED:
        assert sum(map(len, tree(ROOT / folder).values())) < BUDGET, folder


def test_write_replaces_only_what_is_between_the_markers(tmp_path, monkeypatch):
    shutil.copytree(ROOT / COMMITTED[0], tmp_path / "records" / COMMITTED[0].name)
    page = tmp_path / "README.md"
    page.write_text(f"before\n{module.MARKERS[0]}\nold\n{module.MARKERS[1]}\nafter\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.main(["--write", "--records", str(tmp_path / "records")]) == 0
    front = module.front(module.finished(tmp_path / "records"))
    assert f"(records/{COMMITTED[0].name})" in front and "](records/curves_tiny.png)" in front
    assert front.splitlines()[2].count("|") - 1 <= 8, "narrow enough for a front page"
    assert page.read_text() == f"before\n{module.MARKERS[0]}\n{front}\n{module.MARKERS[1]}\nafter\n"
    text = (tmp_path / "records" / "README.md").read_text()
    assert "](curves_tiny.png)" in text and f"[{COMMITTED[0].name}]({COMMITTED[0].name})" in text
    assert (tmp_path / "records" / "curves_tiny.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.part"))
    page.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        module.write("new", page)


# ----------------------------------------------------------------------------------------------------------------------
# A run's page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WATCH = """<script>window.failures = []; addEventListener("error", event => failures.push(event.message));</script>"""
CHECK = """<script>
const seen = {};
{
const all = (what, where = document) => [...where.querySelectorAll(what)];
const order = () => all("#table tbody tr").map(row => row.dataset.run);
const lines = kind => all(`#plot polyline.${kind}`).map(line => line.dataset.run);
const press = key => document.querySelector(`th[data-key=${key}] button`).click();
const far = () => Math.max(...all("#plot polyline.val").flatMap(l => [...l.points].map(point => point.x)));
const ticks = () => all("#plot text").map(text => text.textContent);
seen.runs = order(); seen.val = lines("val"); seen.train = lines("train");
seen.points = all("#plot polyline.val").map(line => line.points.length);
seen.inside = all("#plot polyline.val").every(line => [...line.points].every(p => isFinite(p.x) && isFinite(p.y)));
seen.length = all("#plot polyline.val").map(line => line.getTotalLength());
press("loss"); seen.up = order(); seen.sorted = document.querySelector("th[data-key=loss]").getAttribute("aria-sort");
press("loss"); seen.down = order();
seen.axes = {};
for (const axis of ["step", "tokens", "seconds"]) {
  document.querySelector(`input[value=${axis}]`).click();
  seen.axes[axis] = [ticks(), far()];
}
document.getElementById("train").click(); seen.untrained = lines("train");
const box = document.querySelector("#table tbody tr input"), hidden = box.closest("tr").dataset.run;
box.click(); seen.hidden = hidden; seen.left = lines("val");
document.querySelector(`tr[data-run="${hidden}"] input`).click(); seen.back = lines("val");
const area = document.getElementById("plot").getBoundingClientRect();
document.getElementById("plot").dispatchEvent(new MouseEvent("mousemove", {clientX: area.right, clientY: area.bottom}));
seen.near = document.getElementById("near").textContent;
}
</script><script>
document.body.append(Object.assign(document.createElement("pre"),
  {id: "checked", textContent: JSON.stringify({...(typeof seen === "object" ? seen : {}), failures})}));
</script>"""


def browse(text, folder):
    """Load the page in a headless browser with WATCH before and CHECK after it; returns what they saw."""
    page = folder / "page.html"
    page.write_text(text.replace("<meta charset", WATCH + "<meta charset", 1).replace("</html>", CHECK + "</html>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
               "--virtual-time-budget=5000", "--host-resolver-rules=MAP * ~NOTFOUND",
               f"--user-data-dir={folder / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    checked = re.search(r'<pre id="checked">(.*?)</pre>', done.stdout, re.S)
    assert checked, f"the page did not load: {done.stderr[-2000:]}"
    return json.loads(html.unescape(checked[1]))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    assert module.main([*(str(ROOT / path) for path in COMMITTED[:6]), "--out", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


def test_the_page_holds_everything_itself(page):
    assert not re.search(r"""<link|@import|url\(["']?http|(src|href)\s*=""", page)
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome here")
def test_the_page_in_a_browser(page, tmp_path):
    seen = browse(page, tmp_path)
    results = {path.name: json.loads((ROOT / path / "result.json").read_text()) for path in COMMITTED[:6]}
    names = list(results)
    assert seen["failures"] == []
    assert seen["runs"] == seen["val"] == seen["train"] == names
    assert seen["points"] == [len(results[name]["curve"]) for name in names] and seen["inside"]
    assert min(seen["length"]) > 500, "a curve goes across the page"
    by_loss = sorted(names, key=lambda name: results[name]["final"]["val_loss"])
    assert seen["up"] == by_loss and seen["down"] == by_loss[::-1] and seen["sorted"] == "ascending"
    assert all(abs(far - 985) < 0.1 for _, far in seen["axes"].values())
    for axis, *words in (("step", "500", "steps"), ("tokens", "1M", "tokens"),
                         ("seconds", "50", "seconds of training")):
        assert set(words) <= set(seen["axes"][axis][0]), (axis, seen["axes"])
    assert seen["untrained"] == []
    assert seen["hidden"] not in seen["left"] and len(seen["left"]) == 5
    assert sorted(seen["back"]) == sorted(names)
    assert re.match(r"train_\w+\.py, seed \d+: validation loss \d\.\d{4} at step 550, 1.13M tokens, ", seen["near"])


def test_the_page_of_an_unfinished_run_with_hostile_words(tmp_path):
    """A run's words cannot end the script that holds them, nor become markup."""
    run = tmp_path / "2026_train_x_run"
    run.mkdir()
    evil = "</script><script>failures.push('ran')</script><img src=x onerror=failures.push('ran')>"
    lines = [f"step:{i}/9 train_loss:{9 - i} train_time:{i}ms step_avg:1.00ms" for i in range(1, 4)]
    (run / "log.txt").write_text("\n".join([
        f"config: {json.dumps(dict(track='tiny', bsz=2, seq_len=4, name=evil, random_seed=3))}",
        "step:0/9 val_loss:9.0000 train_time:0ms step_avg:0.00ms", *lines,
        "step:3/9 val_loss:5.5000 train_time:3ms step_avg:1.00ms", f"end: failed: {evil}"]) + "\n")
    assert module.main([str(run)]) == 0
    assert "| 3 | 24 | 0.0 | 5.5000 |" in (run / "report.md").read_text()
    text = (run / "report.html").read_text(encoding="utf-8")
    runs, = re.findall(r'<script type="application/json" id="runs">([^<]*)</script>', text)
    assert json.loads(runs)[0]["status"] == f"failed: {evil}" and text.count("onerror") == 2 and "<img" not in text
    if BROWSER:
        seen = browse(text, tmp_path)
        assert seen["failures"] == [] and seen["runs"] == seen["val"] == [run.name] and seen["points"] == [2]


def test_the_page_in_markdown_and_of_a_damaged_record(tmp_path):
    shutil.copytree(ROOT / COMMITTED[0], run := tmp_path / COMMITTED[0].name)
    for name, kept, message in (("log.txt", 9, "not a log of this project"), ("log.txt", -60_000, "truncated"),
                                ("result.json", 1, "damaged")):
        text = (run / name).read_text()
        (run / name).write_text(text[:kept])
        before = tree(tmp_path)
        refused(run, message=message)
        assert tree(tmp_path) == before
        (run / name).write_text(text)
    done = report(run)
    assert done.stdout.split() == [str(run / "report.md"), str(run / "report.html")], done
    result, text = json.loads((run / "result.json").read_text()), (run / "report.md").read_text()
    assert f"| {result['final']['val_loss']:.4f} |" in text and "| 550 | 1,126,400 |" in text
    assert sum(map(len, tree(run).values())) < BUDGET, "with its page"
    refused(ROOT / COMMITTED[0], ROOT / COMMITTED[1], message="--out FOLDER")


# ----------------------------------------------------------------------------------------------------------------------
# Reference curves


def test_the_committed_references_are_of_the_committed_records(tmp_path):
    for path in COMMITTED:
        shutil.copytree(ROOT / path, tmp_path / path.relative_to("records"))
    made = module.update_reference(tmp_path, module.finished(tmp_path))
    assert made
    for path in made:
        committed = ROOT / "records" / "reference" / path.name
        assert path.read_text() == committed.read_text(), "python records/report.py --update-reference"


def test_runs_are_held_against_their_reference(tmp_path, monkeypatch, capsys):
    """A fourth seed against the reference of three toy runs of train_gpt2.py that stand as default runs."""
    def train(name, size, *flags):
        data = make_corpus(tmp_path / f"data{size}", train=(size,), val=(450,))
        run_here("train_gpt2", *tiny("train_gpt2", data, tmp_path / name, *flags))
        return tmp_path / name
    for seed in (1, 2, 3):
        train("records", 4000, "--random_seed", seed)
    results = [dict(result, words=["train_gpt2.py"]) for result in module.finished(tmp_path / "records")]
    path, = module.update_reference(tmp_path / "records", results)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    right, far = json.loads(path.read_text()), json.loads(path.read_text())
    for point in far["curve"]:
        point["mean"] += 1
    same = train("same", 4000, "--random_seed", 4)
    for run, reference, kept, held in (
            (same, right, None, "inside"), (same, far, None, "OUTSIDE"), (same, right, 300, None),
            (train("flag", 4000, "--random_seed", 4, "--muon_lr", 0.5), right, None, None),
            (train("data", 4001, "--random_seed", 4), right, None, None)):
        path.write_text(json.dumps(reference)[:kept])
        capsys.readouterr()
        folder, = run.iterdir()
        assert module.main(["--summary", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and lines[0].startswith("validation loss ") and "s of training" in lines[1]
        point = reference["curve"][-1]
        told = f"; reference at step {point['step']}: {point['mean']:.4f} ± {point['band']:.4f}: {held}"
        assert held is None or lines[0].endswith(told), lines
        assert lines[0].count("reference") == dict(inside=1, OUTSIDE=4).get(held, 0), lines


def test_what_follows_from_a_result(tmp_path):
    """Bits a byte, rates, MFU, target: computed by hand, and stored nowhere."""
    folder = put(tmp_path, 1, 7, 3.0, 50.0, hardware="NVIDIA H100 80GB HBM3", track="fineweb", dtype="bf16")
    final = module.read_result(folder / "result.json")["final"]
    assert math.isclose(final["bits_per_byte"], 3.0 * 1000 / 900 / 0.6931471805599453)
    assert final["tokens_per_second"] == 40_000 and final["flops_per_second"] == 4e10 and final["target"] == 3.28
    assert math.isclose(final["mfu"], 4e10 / 989e12)
    folder = put(tmp_path, 2, 7, 3.0, hardware="a GPU of next year")
    result = json.loads((folder / "result.json").read_text())
    result["final"]["text_bytes"] = None
    (folder / "result.json").write_text(json.dumps(result))
    final = module.read_result(folder / "result.json")["final"]
    assert (final["mfu"], final["bits_per_byte"], final["target"]) == (None, None, None)


def test_spikes():
    """More than 6 sd and 0.5 nats above the mean of the last hundred."""
    calm = [2.0, 2.1] * 60
    for loss, before, spikes in (
            (2.56, calm, True), (2.54, calm, False), (4.0, [1.0, 2.0] * 50, False), (4.6, [1.0, 2.0] * 50, True),
            (9.0, [], False), (9.0, calm[:19], False), (9.0, calm[:20], True), (9.0, [9.0] * 50 + [1.0] * 100, True)):
        assert module.spikes([*before, loss]) == [len(before) + 1] * spikes, (loss, before)
