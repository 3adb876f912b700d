"""The same run on any number of ranks and with any micro-batch: each script's losses over 20 steps, to 1e-5.

Run as a program (`python tests/test_ranks.py FOLDER`) it is the worker: it forks the ranks itself.

At the default rates, in fp32.
"""

import importlib
import itertools
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest
import torch

from helpers import SCRIPTS, environment, make_corpus, run_script, tiny

SPLITS = list(itertools.product((1, 2, 3), (7, 3)))  # ranks, device_bsz: of 7 sequences


def runs():
    """(name, script, ranks, flags of its own)."""
    for script, (ranks, device_bsz) in itertools.product(SCRIPTS, SPLITS):
        yield (f"{script}-{ranks}-{device_bsz}", script, ranks,
               ["--bsz", 7, "--device_bsz", device_bsz, "--steps", 20, "--val_every", 10, "--epochs", 9])
    for script, ranks in itertools.product(SCRIPTS, (1, 3)):
        yield (f"{script}-shuffled-{ranks}", script, ranks, ["--bsz", 3, "--steps", 9, "--order", "shuffled"])


def train(script, flags, rank, ranks, port):
    module = importlib.import_module(script)
    module.RANK, module.WORLD_SIZE = rank, ranks
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    module.main([str(flag) for flag in flags])


def work(folder):
    torch.set_num_threads(1)
    for script in SCRIPTS:
        importlib.import_module(script)
    importlib.import_module("torch._dynamo")  # 2 s, which the first optimiser of each rank would take
    data = make_corpus(folder / "data", train=(3000, 1500), text=bytes(range(97, 123)) * 3 + b"the quick brown fox. ")
    for name, script, ranks, flags in runs():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    train(script, tiny(script, data, folder / name, *flags), rank, ranks, port)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            sys.exit(f"a rank of {name} failed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{run: (train losses, validation losses)}."""
    from helpers import only_record
    from test_verify import verify
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment(), capture_output=True, text=True,
                          timeout=500)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # no warning of torch's either
    for name, *_ in runs():
        path, log, result = only_record(folder / name)
        record = verify.Record(path)
        assert record.trouble is None, record.trouble
        found[name] = record.log.losses, [p["val_loss"] for p in result["curve"]]
    return found


def apart(one, other):
    """The largest relative difference of two runs' losses."""
    return max(abs(a / b - 1) for k in (0, 1) for a, b in zip(one[k], other[k], strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_ranks_and_micro_batches_do_not_matter(results, script):
    whole = results[f"{script}-1-7"]
    assert len(whole[0]) == 20 and len(whole[1]) == 3 and whole[0][-1] < whole[0][0] - 0.5, "nothing was learnt"
    far = {split: apart(results[f"{script}-{split[0]}-{split[1]}"], whole) for split in SPLITS}
    print(script, {split: f"{error:.1e}" for split, error in far.items()})
    assert max(far.values()) < 1e-5, far


@pytest.mark.parametrize("script", SCRIPTS)
def test_shuffled(results, script):
    assert apart(results[f"{script}-shuffled-3"], results[f"{script}-shuffled-1"]) < 1e-5


@pytest.mark.parametrize("script", SCRIPTS)
def test_more_ranks_than_sequences(script, tmp_path):
    flags = tiny(script, make_corpus(tmp_path / "data"), tmp_path / "records", "--bsz", 2, "--check")
    done = run_script(script, *flags, WORLD_SIZE="3")
    assert done.returncode == 1 and done.stderr == (
        f"{script}.py: --bsz 2 leaves some of 3 processes without a sequence: start fewer, NPROC=1 for one, or give a "
        "larger --bsz.\n")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
