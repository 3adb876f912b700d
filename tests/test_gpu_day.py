"""dev/gpu_day.py, tried on the CPU: all of it with toy sizes, what it does when a job fails, hangs or has no time, and
the tables it writes."""

import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import ROOT, environment, load_program, tree

day = load_program("dev/gpu_day.py")
rows_of = lambda folder: [json.loads(line) for line in (folder / "result.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TEST_DEVICE"):
        monkeypatch.delenv(name, raising=False)


def test_whole_on_a_cpu(tmp_path, capsys):
    (tmp_path / "tokens").mkdir()
    day.write_tokens(tmp_path / "tokens", "cpu", 2)
    before, out = tree(ROOT / "records"), tmp_path / "out"
    assert day.main(["--device=cpu", f"--out={out}", f"--data={tmp_path / 'tokens'}"]) == 0, capsys.readouterr().out
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["log.txt", *(f"record_{script}/{name}" for script in ("train_gpt2", "train_rwkv7")
                                  for name in ("log.txt", "result.json")), "result.jsonl", "result.md"]
    rows, page = rows_of(out), (out / "result.md").read_text()
    by = lambda stage: [row for row in rows if row["stage"] == stage]
    assert rows[0]["stage"] == "machine" and rows[0]["page"].startswith("doctor ")
    assert len(by("build")) == 2 and len(by("accuracy")) == 9 + 13
    assert all(0 < row["of_gate"] < 1 for row in by("accuracy"))
    assert [row["kernel"] for row in by("bench")] == ["cpu", "torch"] and by("bench")[0]["both_ms"] > 0
    assert [row["script"] for row in by("train")] == ["train_rwkv7", "train_gpt2", "train_rwkv6"]
    for row in by("train"):
        assert row["steps"] == day.STEPS and row["tokens_per_second"] == pytest.approx(2 * 32 / row["ms"] * 1e3)
        assert (row["profile"]["classes"]["WKV"] > 0) == ("rwkv" in row["script"])
        assert row["loss"][1] < row["loss"][0] and f"| {row['script']} | " in page
    text = by("text")
    assert [row["script"] for row in text] == ["train_rwkv7", "train_gpt2"] and text[0]["tokens"] == text[1]["tokens"]
    assert tree(ROOT / "records") == before, "a trial run is no record"


def test_gpu_tests_on_a_cpu():
    """tests/test_gpu.py itself, of which a machine without a GPU sees nothing else."""
    keep = "test_full_size or test_alone or (test_families and identical) or (test_lengths and 17)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", keep]
    status, output = day.call(command, 200, TEST_DEVICE="cpu")
    assert status == 0 and " passed" in output and "failed" not in output, output


def test_jobs_that_fail_or_have_no_time(tmp_path, monkeypatch, capsys):
    """A job that kills its process costs a row, not the jobs after it; without time every job says so."""
    said = iter([['{"row": {"kernel": "a", "skipped": "x"}}\n', "done\n", "CUDA error: an illegal address\n", 1],
                 ['{"row": {"kernel": "c", "skipped": "x"}}\n', "done\n", 0], *2 * [["no end\n", 124]]])
    monkeypatch.setattr(day, "lines", lambda command, limit, **env: iter(next(said)))
    today = day.Day(tmp_path, "cuda", 1, None)
    jobs = [dict(kernel=name) for name in "abc"]
    day.work(today, "accuracy", jobs, 10)
    day.work(today, "bench", jobs[:2], 10)
    day.work(today, "train", jobs[:1], 0)
    assert [(row["kernel"], row.get("failed")) for row in rows_of(tmp_path)] == [
        ("a", None), ("b", "status 1: CUDA error: an illegal address"), ("c", None), ("a", "its time was up"),
        ("b", "its time was up"), ("a", None)]
    assert rows_of(tmp_path)[-1]["skipped"] == "no time left"
    asked = []
    monkeypatch.setattr(day, "work", lambda today, stage, jobs, seconds: asked.extend(jobs))
    today.rows = [dict(stage="build", operator="wkv7", kernel="fast", failed="x"),
                  dict(stage="accuracy", operator="wkv6", kernel="fast", N=128, failed="x")]
    day.bench(today)
    names = [(job["operator"], job["kernel"], job["shape"][3]) for job in asked]
    assert not {("wkv7", "fast"), ("time_mixing", "mix fast")} & {name[:2] for name in names}, "not built"
    assert ("wkv6", "fast", 64) in names and ("wkv6", "fast", 128) not in names and ("time_mixing", "wind", 64) in names
    with pytest.raises(SystemExit):
        monkeypatch.setattr(day, "nvidia_smi", lambda fields: "")
        day.main([f"--out={tmp_path / 'none'}"])
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "none").exists()
    monkeypatch.setattr(day, "nvidia_smi", lambda fields: "NVIDIA Test")
    monkeypatch.setattr(day, "machine", lambda today: 1 / 0)
    assert day.main([f"--out={tmp_path / 'new'}", "--stages", "text"]) == 1
    assert rows_of(tmp_path / "new")[0]["failed"].startswith("ZeroDivisionError")
    with pytest.raises(SystemExit):
        day.main(["--device=cpu"])


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path):
    mark = tmp_path / "pid"
    code = (f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
            f"open({str(mark)!r}, 'w').write(str(p.pid)); print('started', flush=True); p.wait()")
    assert day.call([sys.executable, "-c", code], 3) == (124, "started\n")
    for _ in range(100):  # the kernel buries a killed process in its own time
        stat = Path(f"/proc/{mark.read_text()}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {mark.read_text()} still runs")


@pytest.mark.parametrize("mib, micro", ((143771, 32), (81559, 32), (46068, 16), (40960, 16), (24576, 8), (9000, 4)))
def test_the_micro_batch_fits_the_card(mib, micro, monkeypatch):
    monkeypatch.setattr(day, "nvidia_smi", lambda fields: f"{mib}\n{mib}")
    assert day.micro_batch.__wrapped__("cuda") == micro


def test_command_lines_of_a_gpu(tmp_path, monkeypatch):
    """Every run for a GPU is one its script understands, with tokens enough for all its steps."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(day, "micro_batch", lambda device: 2)
    monkeypatch.setattr(day, "gigabytes", lambda: 5)  # one run at a time
    jobs, today = [], day.Day(tmp_path, "cuda", 8, None)
    monkeypatch.setattr(day, "work", lambda today, stage, some, seconds: jobs.extend(some))
    monkeypatch.setattr(day.tempfile, "TemporaryDirectory", lambda **_: __import__("contextlib").nullcontext(tmp_path))
    day.train(today)
    assert [(job["script"], job["flags"]) for job in jobs[:4]] == [
        ("train_rwkv7", ["--fast_cuda"]), ("train_gpt2", []), ("train_rwkv6", ["--fast_cuda"]),
        ("train_rwkv7", ["--wind_cuda"])]
    for job in jobs:
        script = importlib.import_module(job["script"])
        args = script.parse([*day.run_flags(job, "cuda", day.all_steps()), "--val_tokens=1024"])
        script.resolve(args)
        assert (args.track, args.device, args.dtype, args.bsz, args.seq_len) == ("fineweb", "cuda", "bf16", 2, 1024)
        assert len(script.open_data(args)[0]) == args.steps * 2 * 1024 + 1


def test_tables(tmp_path, capsys):
    """From a result as a GPU would leave it into copies of the READMEs; the CPU's own is none."""
    (tmp_path / "cuda").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path), shutil.copy(ROOT / "cuda" / "README.md", tmp_path / "cuda")
    timed = dict(stage="bench", operator="wkv7", shape=[64, 1024, 12, 64], dtype="bfloat16", peer=False, forward_ms=0.5,
                 backward_ms=1.5, both_ms=2.0, both_spread_ms=0.1, bytes=2013265920, of_floor=0.25, memory=1.5,
                 errors={}, flops_per_second=4e13, machine=dict(device="NVIDIA Test", date="2030-01-02", torch="2.11"))
    rows = [dict(stage="machine", device="cuda", date="2030-01-02", commit="abc", gpu="NVIDIA Test", device_bsz=32),
            dict(timed, kernel="fast"), dict(timed, kernel="torch", both_ms=20.0),
            dict(timed, kernel="cuda", failed="x"),
            *(dict(stage="accuracy", operator="wkv7", kernel=kernel, N=64, family=family, errors=dict(y=error))
              for kernel in ("fast", "torch") for family, error in (("random", 1e-3), ("correlated", 5e-3))),
            dict(stage="train", script="train_rwkv7", flags=["--fast_cuda"], device_bsz=32, ms=80.0, mfu=0.3,
                 micro_batch_ms=70.0, tokens_per_second=409600.0, peak_memory=2**35, first_step_s=30.0,
                 loss=[10.8, 7.5], profile=dict(classes=dict(WKV=8.0, other=72.0)))]
    (tmp_path / "result.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    day.tables(tmp_path, tmp_path)
    kernels, front = (tmp_path / "cuda" / "README.md").read_text(), (tmp_path / "README.md").read_text()
    inside = kernels.partition("<!-- bench wkv7 cuda: begin -->")[2].partition("<!-- bench wkv7 cuda: end -->")[0]
    assert "| NVIDIA Test | 2030-01-02 | 64,1024,12,64 | bfloat16 | fast | 0.5 | 1.5 | 2 | 0.1 | 2013 | 25% |" in inside
    assert "1.0e-03 | 5.0e-03 | 10.0 |" in inside and "| cuda |" not in inside and "No GPU" not in inside
    assert "| --fast_cuda | 32 | 80.0 | 70.0 | 409,600 | 30.0% | 32.0 | 10% | 30 s | 10.80 to 7.50 |" in front
    assert "No GPU has run any of this yet" not in front and front.count("gpu_day: begin") == 1
    (tmp_path / "result.jsonl").write_text(json.dumps(dict(stage="machine", device="cpu")) + "\n")
    program = [sys.executable, "dev/gpu_day.py", f"--tables={tmp_path}"]
    done = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"gpu_day: {tmp_path / 'result.jsonl'} is not of a GPU.\n"
