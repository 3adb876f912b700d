"""dev/gpu.py, tried on the CPU: all of it with toy sizes, and what it does when a stage fails, hangs or has no time."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT, load_program, tree

gpu = load_program("dev/gpu.py")


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TEST_DEVICE"):
        monkeypatch.delenv(name, raising=False)


def test_whole_on_a_cpu(tmp_path, capsys, monkeypatch):
    """Every stage but the tests of test_gpu.py, which another test runs in the same way and takes its seconds from."""
    before = tree(ROOT / "records")
    assert gpu.main(["--device=cpu", f"--out={tmp_path}", "--stages", "doctor", "build", "bench", "train"]) == 0
    results, page = json.loads((tmp_path / "results.json").read_text()), (tmp_path / "results.md").read_text()
    stages = results["stages"]
    assert {name: stage["end"] for name, stage in stages.items()} == dict.fromkeys(
        ("doctor", "build", "bench", "train"), "done")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.json", "results.md", "rows.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    timed = sum(len(found["rows"]) for found in stages["bench"]["facts"]["operators"].values())
    assert [line["stage"] for line in lines] == ["build"] * 2 + ["bench"] * timed + ["train"] * 3 and timed >= 4
    assert stages["doctor"]["facts"]["page"].startswith("doctor ")
    assert {(k["script"], k["kernel"], k["ok"]) for k in stages["build"]["facts"]["kernels"]} >= {
        ("train_rwkv7", "cpu", True)}
    rows = stages["bench"]["facts"]["operators"]["wkv7"]["rows"]
    assert [row["kernel"] for row in rows][:2] == ["torch", "cpu"] and rows[1]["both_ms"] > 0
    rows = stages["train"]["facts"]["rows"]
    assert [row["script"] for row in rows] == gpu.scripts()
    for row in rows:
        assert "failed" not in row and row["steps"] == gpu.STEPS["cpu"] and 0 < row["ms_min"] <= row["ms"], row
        assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["ms"] * 1e3) and row["peak_memory"] > 2**20
        assert (0 < row["wkv_share"] < 1) == ("rwkv" in row["script"]) and row["wkv_share"] >= 0
        assert 4 < row["loss"] < 8 and len(row["top"]) == 5
        assert f"| {row['script']} | " in page
    assert tree(ROOT / "records") == before, "a trial run is no record"
    assert str(tmp_path / "results.md") in capsys.readouterr().out


def test_a_kernel_that_cannot_be_built(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu, "scripts", lambda: ["train_rwkv7"])
    monkeypatch.setattr(gpu, "kernels", lambda script, device: ["cuda"])
    facts, output = gpu.build(SimpleNamespace(device="cuda", out=tmp_path), 100)
    assert not facts["ok"] and "Traceback" not in output
    page = "\n".join(gpu.section("build", facts))
    assert "| train_rwkv7 | cuda | NO | " in page and "wkv7 cuda cannot be had: " in page


def test_gpu_tests_on_a_cpu():
    """tests/test_gpu.py itself, of which a machine without a GPU sees nothing else."""
    keep = "test_full_size or test_alone or (test_families and identical) or (test_lengths and 17)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", keep]
    status, output = gpu.call(command, 200, TEST_DEVICE="cpu")
    assert status == 0 and " passed" in output and "failed" not in output, output


def test_a_stage_that_fails_and_one_without_time(tmp_path, monkeypatch):
    def broken(args, seconds):
        raise RuntimeError("no such GPU")
    monkeypatch.setattr(gpu, "doctor", broken)
    monkeypatch.setattr(gpu, "bench", lambda args, seconds: (dict(ok=True, operators={}), "bench was here"))
    assert gpu.main(["--device=cpu", f"--out={tmp_path / 'new' / 'folder'}", "--stages", "bench", "doctor"]) == 1
    stages = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())["stages"]
    assert stages["doctor"]["end"] == "failed: RuntimeError: no such GPU" and stages["bench"]["end"] == "done"
    assert list(stages) == ["doctor", "bench"], "in their own order"
    assert gpu.main(["--device=cpu", f"--out={tmp_path / 'b'}", "--minutes=0", "--stages", "bench"]) == 1
    stages = json.loads((tmp_path / "b" / "results.json").read_text())["stages"]
    assert stages["bench"]["end"] == gpu.NO_TIME
    with pytest.raises(SystemExit):
        gpu.main(["--device=cpu"])


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path):
    mark = tmp_path / "pid"
    code = (f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
            f"open({str(mark)!r}, 'w').write(str(p.pid)); print('started', flush=True); p.wait()")
    status, output = gpu.call([sys.executable, "-c", code], 3)
    assert status == 124 and output.startswith("started") and "stopped after 3 s" in output
    pid, state = int(mark.read_text()), "R"
    for _ in range(100):  # the kernel buries a killed process in its own time
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "gone"
        if state in ("Z", "gone"):
            break
        time.sleep(0.05)
    assert state in ("Z", "gone"), f"process {pid} still runs"


@pytest.mark.parametrize("mib, micro", ((143771, 32), (81559, 32), (46068, 16), (40960, 16), (24576, 8), (9000, 4)))
def test_the_micro_batch_fits_the_card(mib, micro, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "call", lambda command, limit: (0, f"{mib}\n{mib}\n"))
    assert gpu.micro_batch("cuda") == micro


def test_command_lines_of_a_gpu(tmp_path, monkeypatch):
    """Every run for a GPU is one its script understands, with tokens enough for all its steps."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    gpu.write_tokens(tmp_path, "cuda", 2)
    jobs = gpu.runs("cuda", 32)
    assert [(script, flags) for script, flags, _ in jobs[:3]] == [
        ("train_rwkv7", ["--fast_cuda"]), ("train_gpt2", []), ("train_rwkv7", ["--wind_cuda"])]
    for script, flags, micro in jobs:
        module = importlib.import_module(script)
        job = dict(device="cuda", device_bsz=micro, flags=flags, data=str(tmp_path))
        args = module.Hyperparameters.parse(gpu.run_flags(job))
        module.resolve(args)
        assert (args.track, args.device, args.dtype, args.bsz, args.seq_len) == ("fineweb", "cuda", "bf16", micro, 1024)
        assert args.steps == 38
        args.bsz = args.device_bsz = 2  # for which there are tokens here
        train, val, _ = module.open_data(args, 1)
        assert len(train) == 38 * 2 * 1024 + 1 and len(val) >= 1025
