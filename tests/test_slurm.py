"""Several machines by setup.sh and run_slurm.sh: what is launched where. SLURM's programs are stand-ins that do as its
manuals say: srun starts a task on each node, scontrol lists names, scancel --signal reaches the tasks only. To run:
./test.sh tests/test_slurm.py"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

import train_gpt2
from test_setup import PINS, ROOT, Box

SCRIPT = ROOT / "run_slurm.sh"


@pytest.fixture
def box(tmp_path):
    box = Box(tmp_path)
    shutil.copy(SCRIPT, box.repo)
    box.python(packages=PINS)
    return box


@pytest.fixture
def slurm(box, tmp_path):
    """A box in a job on two nodes. calls: what srun's tasks and the other programs were called with."""
    box.tools("sleep", "touch")
    box.stub("scontrol", f'printf "scontrol %s\\n" "$*" >>"{tmp_path}/log"',
             '[ "$1" != show ] || printf "node-a\\nnode-b\\n"')
    box.stub("scancel", f'printf "scancel %s\\n" "$*" >>"{tmp_path}/log"', f'touch "{tmp_path}/term"')
    box.stub("srun", f'printf "srun %s\\n" "$1" >>"{tmp_path}/log"', "shift", "pids=''",
             "for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do",
             f'    SLURM_NODEID=$i "$@" >"{tmp_path}/node$i" 2>&1 & pids="$pids $!"', "done",
             "status=0", "for pid in $pids; do wait $pid || status=$?; done",
             f'while [ -e "{tmp_path}/long" ] && [ ! -e "{tmp_path}/term" ]; do sleep 0.05; done',
             f'[ ! -e "{tmp_path}/term" ] || status=1', "exit $status")
    spool = tmp_path / "spool" / "slurm_script"  # where SLURM runs its copy of the script
    spool.parent.mkdir()
    shutil.copy(SCRIPT, spool)
    spool.chmod(0o755)
    box.gpus(8)
    box.env.update(SLURM_SUBMIT_DIR=str(box.repo), SLURM_JOB_ID="4711", SLURM_JOB_NUM_NODES="2",
                   SLURM_JOB_NODELIST="node-[a-b]")
    box.start = lambda *arguments, **env: subprocess.Popen(
        [str(spool), *arguments], cwd="/", env={**box.env, **env}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    return box


def log(box):
    path = box.repo.parent / "log"
    return path.read_text().splitlines() if path.exists() else []


def test_a_machine_of_several(box):
    box.gpus(8)
    there = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="node-a")
    assert box.launched("--x", "a b", **there)[0][1:] == [
        "--nnodes=2", "--node_rank=1", "--master_addr=node-a", "--master_port=29500", "--nproc_per_node=8",
        "train_rwkv7.py", "--x", "a b"]
    check = [call for call in box.calls() if "--check" in call]
    assert len(check) == 1, "flags, machine and data are checked on each machine before the start"
    assert box.launched(**there, MASTER_PORT="1234", NPROC="3")[0][4:6] == ["--master_port=1234", "--nproc_per_node=3"]
    (box.bin / "nvidia-smi").unlink()
    assert box.launched(**there)[0][5] == "--nproc_per_node=1"
    assert box.launched("--track", "tiny", **there)[0][1] == "--nnodes=2"
    assert box.launched(NNODES="1")[0] == ["train_rwkv7.py"]


def test_a_job(slurm):
    process = slurm.start("./run_gpt2.sh", "--adam_lr", "0.001", "--data", "a folder", "--name", "$HOME; `x`")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), (out, err)
    assert log(slurm) == ["scontrol show hostnames node-[a-b]", "srun --kill-on-bad-exit=1"]
    for node in (0, 1):
        there = json.loads((slurm.repo.parent / f"node{node}").read_text().splitlines()[-1])["argv"]
        assert there[1:] == [
            "--nnodes=2", f"--node_rank={node}", "--master_addr=node-a", "--master_port=24711", "--nproc_per_node=8",
            "train_gpt2.py", "--save_every", "125", "--checkpoints", "checkpoints/slurm_4711",
            "--resume", "auto", "--adam_lr", "0.001", "--data", "a folder", "--name", "$HOME; `x`"]
    flags = {f"--{field.name}" for field in dataclasses.fields(train_gpt2.Hyperparameters)}
    assert {word for word in there if word.startswith("--")} - set(there[1:6]) <= flags


def test_a_failed_run_fails_its_job_and_is_not_repeated(slurm):
    slurm.stub("python3", 'case "$*" in *torch.distributed.run*) exit 7;; esac', "exit 0")
    process = slurm.start("./run_gpt2.sh")
    assert process.wait(timeout=60) == 7 and "requeue" not in "".join(log(slurm))


@pytest.mark.parametrize("finished", (False, True))
def test_time_is_up(slurm, finished):
    """SLURM's signal goes to the shell; the tasks get SIGTERM, save, end; and the job queues again if it has to."""
    (slurm.repo.parent / "long").touch()
    if finished:
        slurm.stub("scancel", f'printf "scancel %s\\n" "$*" >>"{slurm.repo.parent}/log"',
                   f'rm "{slurm.repo.parent}/long"')
    process = slurm.start("./run_gpt2.sh")
    deadline = time.monotonic() + 60
    while not any(line.startswith("srun") for line in log(slurm)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert log(slurm)[2:] == ["scancel --signal=TERM 4711"] + ["scontrol requeue 4711"] * (not finished)


def test_where_it_is_submitted(slurm, tmp_path):
    for arguments, status, said in (
            (["./run_gpt2.sh"], 1, f"run_slurm.sh: submit it from the folder of the repository, not from {tmp_path}\n"),
            ([], 2, "usage: sbatch run_slurm.sh ./run_rwkv7.sh")):
        process = slurm.start(*arguments, SLURM_SUBMIT_DIR=str(tmp_path))
        assert process.communicate(timeout=60)[1].startswith(said) and process.returncode == status


def test_what_sbatch_reads():
    """Its directives end at the first command; the one that the trap needs is there."""
    lines = SCRIPT.read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert all(line.startswith("#") for line in lines[:lines.index(directives[-1])])
    assert {"#SBATCH --signal=B:USR1@180", "#SBATCH --requeue", "#SBATCH --ntasks-per-node=1"} <= set(directives)
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0 and os.access(SCRIPT, os.X_OK)
