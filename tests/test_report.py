"""records/report.py: rows, seeds, the README's markers, and what it says of bad records."""
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULT = dict(
    run="2026-01-02T03-04-05Z_train_rwkv7_a", script="train_rwkv7.py", seed=1,
    config=dict(track="tiny", name="a", random_seed=1, steps=10, device="cpu", dtype="fp32", muon_lr=0.02),
    sources=[dict(name="train_rwkv7.py", sha256="00")], environment=dict(torch="2.13.0"),
    hardware=dict(name="a CPU", count=1), model=dict(active=123456),
    data=dict(train=[dict(name="t", sha256="1")], val=[dict(name="v", sha256="2")]),
    final=dict(val_loss=1.5, bits_per_byte=2.25, train_seconds=100.0, tokens=2_000_000, tokens_per_second=20_000.0))


def put(folder, run, seed, loss, **config):
    result = copy.deepcopy(RESULT)
    result.update(run=f"2026-01-02T03-04-0{run}Z_train", seed=seed)
    result["config"].update(random_seed=seed, **config)
    result["final"]["val_loss"] = loss
    path = folder / result["run"] / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))


def report(*flags):
    command = [sys.executable, ROOT / "records" / "report.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def test_seeds_share_a_row_and_count_once(tmp_path):
    for run, seed, loss in ((1, 1, 1.50), (2, 2, 1.54), (3, 2, 9.99)):
        put(tmp_path, run, seed, loss)
    out = report("--records", tmp_path).stdout.splitlines()
    assert len(out) == 3, out
    assert "| 2 | 1.5200 ± 0.0283 |" in out[2], out[2]
    assert "123,456" in out[2] and "2.00M" in out[2] and "20,000" in out[2]


def test_configurations_and_hardware_are_rows_of_their_own_best_first(tmp_path):
    put(tmp_path, 1, 1, 1.6)
    put(tmp_path, 2, 1, 1.4, muon_lr=0.03)
    put(tmp_path, 3, 2, 1.5, name="other name, same run")
    rows = report("--records", tmp_path).stdout.splitlines()[2:]
    assert len(rows) == 2
    assert "1.4000" in rows[0] and "1.5500 ± 0.0707" in rows[1], rows


def test_a_folder_without_result_is_not_a_run(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "log.txt").write_text("config: {}\n")
    result = report("--records", tmp_path)
    assert result.returncode == 1 and "no finished run" in result.stderr and "Traceback" not in result.stderr


def test_a_damaged_result_is_named(tmp_path):
    put(tmp_path, 1, 1, 1.5)
    path = next(tmp_path.glob("*/result.json"))
    path.write_text(path.read_text()[:100])
    result = report("--records", tmp_path)
    assert result.returncode == 1 and str(path) in result.stderr and "Traceback" not in result.stderr


def test_readme_shows_the_committed_records():
    """The table in README.md is what the program writes from the records that are committed."""
    sys.path.append(str(ROOT / "records"))
    import report as module
    listed = subprocess.run(["git", "ls-files", "records/*/result.json"], cwd=ROOT, capture_output=True, text=True)
    results = [json.loads((ROOT / path).read_text()) for path in sorted(listed.stdout.split())]
    assert results, "no record is committed"
    page = (ROOT / "README.md").read_text()
    assert f"{module.MARKERS[0]}\n{module.table(results)}\n{module.MARKERS[1]}" in page


def test_write_replaces_only_what_is_between_the_markers(tmp_path):
    sys.path.append(str(ROOT / "records"))
    import report as module
    page = tmp_path / "README.md"
    page.write_text(f"before\n{module.MARKERS[0]}\nold\n{module.MARKERS[1]}\nafter\n")
    module.write("new", page)
    assert page.read_text() == f"before\n{module.MARKERS[0]}\nnew\n{module.MARKERS[1]}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        module.write("new", page)
