"""Lets the tests import what lies in the repository's root, from whatever folder pytest is called, and holds what they
share: one finished run of a script, made once however many files and processes ask for it."""

import fcntl
import os
import pathlib
import signal
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path += [str(ROOT / "inference"), str(ROOT / "cuda"), str(ROOT / "data")]  # in this order: two have a bench.py

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = {  # left out by ./test.sh --fast: files, classes and tests that build, start launchers or take seconds
    "test_bad_input", "test_build", "test_cached_fineweb", "test_cuda_on_cpu", "test_docker", "test_doctor",
    "test_formats", "test_faults", "test_fineweb", "test_gpu_day", "test_public", "test_pydocs",
    "test_race", "test_ranks", "test_record", "test_resume", "test_run", "test_setup", "test_wkv6_cuda",
    "test_wkv7_cuda", "test_wkv7_wind",
    "TestMemory", "test_compile_in_one_graph", "test_replay", "test_tampering_is_found_with_the_records_code",
    "test_bad_replays", "test_committed_records", "test_forging_nothing_leaves_a_good_record",
    "test_no_value_ends_the_program", "test_importing_does_nothing", "test_ranks_agree",
    "test_the_package_computes_the_same",
    "test_the_limit_of_track_fineweb_without_a_gpu", "test_the_page_in_a_browser", "test_scripts_train_on_it"}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by ./test.sh --fast")


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW & {item.path.stem, item.originalname, getattr(item.cls, "__name__", "")}:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """finished_run(script): a finished run of six steps, with all on that a record can hold. Its folder has data/,
    records/, checkpoints/ and run.json: what was said, the seconds, git's HEAD before and after. Only to be read."""
    import helpers
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers

    def run(script):
        folder = shared / f"finished_{script}"
        with open(shared / f"finished_{script}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "run.json").exists():
                helpers.finish_a_run(script, folder)
        return folder
    return run
