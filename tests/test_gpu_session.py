"""dev/gpu.py, tried on the CPU: all of it with toy sizes, and what it does when a stage fails, hangs or has no time."""

import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from helpers import ROOT, tree

spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "dev" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


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
    assert all((tmp_path / f"{name}.txt").stat().st_size for name in stages)
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
    assert "| train_rwkv7 | cuda | NO | " in page and "wkv7 cuda not built: " in page


def test_the_tests_stage(tmp_path, monkeypatch):
    """It runs tests/test_gpu.py on the device it is told, and a failure is named."""
    arguments = []

    def call(command, limit, **env):
        arguments.append((command, env))
        return 1, "....\nFAILED tests/test_gpu.py::test_families[fast-64-random] - y 1e-1\n1 failed, 4 passed in 2s\n"
    monkeypatch.setattr(gpu, "call", call)
    facts, _ = gpu.tests(SimpleNamespace(device="cpu", out=tmp_path), 60)
    assert [env for _, env in arguments] == [dict(TEST_DEVICE="cpu", TEST_KERNELS=name) for name in ("torch", "cpu")]
    assert all(command[-1] == "tests/test_gpu.py" for command, _ in arguments)
    assert not facts["ok"] and facts["summary"] == "torch: 1 failed, 4 passed in 2s; cpu: 1 failed, 4 passed in 2s"
    monkeypatch.setattr(gpu, "call", lambda *command, **env: (0, "ssss\n219 skipped in 3.85s\n"))
    assert not gpu.tests(SimpleNamespace(device="cuda", out=tmp_path), 60)[0]["ok"], "nothing was tested"
    monkeypatch.setattr(gpu, "call", lambda *command, **env: (0, "..ss\n2 passed, 2 skipped in 3.85s\n"))
    assert gpu.tests(SimpleNamespace(device="cuda", out=tmp_path), 60)[0]["ok"]
    assert gpu.section("tests", facts)[1].startswith("- FAILED tests/test_gpu.py::test_families[fast-64-random]")


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


def test_training_runs_stop_with_the_time(tmp_path, monkeypatch):
    """One run fails, one takes the time of the others: all have their row."""
    monkeypatch.setattr(gpu, "runs", lambda device: [("train_rwkv7", [], n) for n in (64, 32, 16)])
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])

    def call(command, limit, **env):
        job = json.loads(command[-1])
        assert os.listdir(job["data"]) and limit == 100 - clock[0]
        if job["device_bsz"] == 64:
            return 1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory.\n"
        clock[0] += 100
        facts = dict(ms=1.0, tokens_per_second=2.0, mfu=0.5, peak_memory=2**30, wkv_share=0.25, ready_seconds=3.0)
        return 0, f"warning\n{json.dumps(facts)}\n"
    monkeypatch.setattr(gpu, "call", call)
    facts, _ = gpu.train(SimpleNamespace(device="cpu"), 100)
    assert [row.get("failed") for row in facts["rows"]] == [
        "status 1: torch.OutOfMemoryError: CUDA out of memory.", None, gpu.NO_TIME]
    assert not facts["ok"]
    page = "\n".join(gpu.section("train", facts))
    assert "| train_rwkv7 | - | 32 | 1.0 | 2 | 50.0% | 1.0 | 25.0% | 3 |" in page and "failed: status 1" in page


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


def test_share_of_the_operator_on_a_gpu():
    """From events as torch's profiler gives them: kernels apart from what launched them; autograd calls an operator
    from within itself; a range that somebody marked is no kernel."""
    def event(name, kind, own=0.0, below=0.0, parent=None, mark=False):
        fake = SimpleNamespace(name=name, device_type=kind, self_device_time_total=own, device_time_total=below,
                               self_cpu_time_total=7.0, cpu_time_total=7.0, cpu_parent=parent, is_user_annotation=mark)
        return fake
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    step = event("step", cpu, below=1000.0)
    outer = event("wkv7::fast_forward", cpu, below=20.0, parent=step)
    events = [step, outer, event("wkv7::fast_forward", cpu, below=20.0, parent=outer),
              event("wkv7::fast_backward", cpu, below=30.0), event("aten::mm", cpu, below=50.0, own=50.0),
              event("wkv7_fast_forward_kernel<64>", cuda, own=20.0), event("backward_kernel", cuda, own=30.0),
              event("gemm", cuda, own=25.0), event("gemm", cuda, own=25.0), event("step", cuda, own=900.0, mark=True)]
    found = gpu.operator_share(events, True)
    assert found["wkv_share"] == 0.5
    assert found["top"][0] == dict(name="gemm", share=0.5) and len(found["top"]) == 3
    assert gpu.operator_share([], True) == dict(wkv_share=None, top=[])


def test_share_of_the_operator_reads_what_torch_has():
    import train_rwkv7
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        x = [torch.rand(1, 40, 2, 16, requires_grad=True) for _ in range(6)]
        train_rwkv7.wkv7(*x).sum().backward()
    events = profiler.events()
    for name in ("device_type", "self_device_time_total", "device_time_total", "cpu_parent", "is_user_annotation"):
        assert all(hasattr(event, name) for event in events), name
    assert 0.5 < gpu.operator_share(events, False)["wkv_share"] <= 1, "it is all there is"


def test_steps_between_events(monkeypatch):
    """The clock of a GPU, faked: the work of a step takes 5 ms there, and is not waited for before the end."""
    clock, waited = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            assert not waited
            self.at = clock[0]

        def elapsed_time(self, end):
            assert waited, "read before the GPU was done"
            return end.at - self.at

    def step():
        clock[0] += 5.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    assert gpu.step_times(step, 4, True) == [5.0] * 4


def test_command_lines_of_a_gpu(tmp_path, monkeypatch):
    """Every run for a GPU is one its script understands, with tokens enough for all its steps."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(gpu.MICRO_BATCHES, "cuda", (1, 2))
    gpu.write_tokens(tmp_path, "cuda")
    monkeypatch.setitem(gpu.MICRO_BATCHES, "cuda", (16, 32, 64))
    jobs = gpu.runs("cuda")
    assert {(script, micro) for script, _, micro in jobs} >= {
        (script, micro) for script in ("train_rwkv7", "train_gpt2") for micro in (16, 32, 64)}
    assert ("train_rwkv7", ["--fast_cuda"], 64) in jobs[:3]
    for script, flags, micro in jobs:
        module = importlib.import_module(script)
        job = dict(device="cuda", device_bsz=micro, flags=flags, data=str(tmp_path))
        args = module.Hyperparameters.parse(gpu.run_flags(job))
        module.resolve(args, 1)
        assert (args.track, args.device, args.dtype, args.bsz, args.seq_len) == ("fineweb", "cuda", "bf16", micro, 1024)
        assert args.steps == 38
        args.bsz = args.device_bsz = 2  # for which there are tokens here
        train, val, _ = module.open_data(args, 1)
        assert len(train) == 38 * 2 * 1024 + 1 and len(val) >= 1025
