"""What users get wrong: one or two lines that name the fault and the way out, an exit status that is not 0, no
traceback, no record begun and none of an earlier run touched.

Most cases call main() in this process, where any error but SystemExit fails the test; the rest are processes.
"""

import errno
import importlib
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import train_rwkv7
from helpers import ROOT, SCRIPTS, environment, make_corpus, only_record, run_here, run_script, tiny, tree, write_shard


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture
def records(tmp_path):
    """A folder of records with an earlier run in it, which must be the same afterwards and alone."""
    folder = tmp_path / "records"
    (folder / "earlier").mkdir(parents=True)
    (folder / "earlier" / "log.txt").write_text("an earlier run\n")
    yield folder
    assert tree(folder) == {"earlier/log.txt": b"an earlier run\n"}
    assert [path.name for path in folder.iterdir()] == ["earlier"]


def check_message(script, status, stderr, parts):
    assert status not in (0, None), "the exit status says that all is well"
    assert stderr.startswith(f"{script}.py: "), stderr
    assert 1 <= stderr.count("\n") <= 2 and stderr.endswith("\n"), f"not one or two lines:\n{stderr}"
    assert "Traceback" not in stderr
    for part in map(str, parts):
        assert part in stderr, f"{part!r} is not in: {stderr}"


@pytest.fixture
def refused(capfd):
    def call(script, flags, *parts):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_here(script, *flags)
        check_message(script, ended.value.code, capfd.readouterr().err, parts)
    return call


CASES = {  # what is wrong: (flags after those of a sound run, what the message must contain)
    "unknown flag": (["--adam_rl", 0.1], ["--adam_rl", "--help"]),
    "flag cut short": (["--step", 3], ["--step", "--help"]),
    "stray word": (["train"], ["train", "--help"]),
    "no value": (["--steps"], ["--steps", "--help"]),
    "word for a number": (["--steps", "many"], ["--steps", "many"]),
    "fraction for a whole number": (["--bsz", "1.5"], ["--bsz", "1.5"]),
    "no whole number": (["--steps", "nan"], ["--steps", "nan"]),
    "choice": (["--track", "fineweb11"], ["--track", "fineweb11", "tiny"]),
    "dtype": (["--dtype", "fp16"], ["--dtype", "fp16", "bf16"]),
    "head size that does not divide": (["--headsz", 24], ["--headsz 24", "32 is not a multiple"]),
    "head size 0": (["--headsz", 0], ["--headsz 0", "range from 1"]),
    "head size below 0": (["--headsz", -16], ["--headsz -16"]),
    "no steps": (["--steps", 0], ["--steps", "range from 1"]),
    "steps below 0": (["--steps", -5], ["--steps", "range from 1"]),
    "a stop past the end": (["--stop_after", 7], ["--stop_after 7 is more than --steps 6"]),
    "no sequences": (["--bsz", 0], ["--bsz", "range from 1"]),
    "no micro-batch": (["--device_bsz", 0], ["--device_bsz", "range from 1"]),
    "no tokens in a sequence": (["--seq_len", 0], ["--seq_len", "range from 1"]),
    "no validations": (["--val_every", 0], ["--val_every", "range from 1"]),
    "no validation tokens": (["--val_tokens", 0], ["--val_tokens"]),
    "validation tokens below a sequence": (["--val_tokens", 31], ["--val_tokens", "31", "32"]),
    "no epochs": (["--epochs", 0], ["--epochs"]),
    "name with folders": (["--name", "../x"], ["--name", "../x", "letters"]),
    "name with a blank": (["--name", "my run"], ["--name", "my run"]),
    "hidden name": (["--name", ".x"], ["--name", ".x"]),
    "name that no disk takes": (["--name", "x" * 300], ["File name too long"]),
    "small vocabulary": (["--vocab_size", 200], ["unknown tokenizer, 257 ids", "--vocab_size 200"]),
    "another order": (["--order", "shuffled", "--steps", 10**6], ["--steps 1000000", "--epochs 20"]),
    "another order in the race": (["--track", "fineweb", "--order", "shuffled"], ["--order shuffled", "in sequence"]),
    "too few tokens": (["--steps", 400], ["--steps 400", "51,201 train tokens", "--epochs 20"]),
    "CUDA where there is none": (["--device", "cuda"], ["--device cuda needs a CUDA device", "--device cpu"]),
}


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_flags(script, data, records, refused, no_cuda):
    for flags, parts in CASES.values():
        refused(script, tiny(script, data, records, *flags), *parts)
    refused(script, ["--data", data, "--records", records],
            "track fineweb on --device auto needs a CUDA device", "--track tiny --device cpu")
    for name, flag in (("train_gpt2", "--fast_cuda"), ("train_rwkv6", "--wind_cuda")):
        if name == script:
            refused(name, tiny(name, data, records, flag), flag, "--help")


def test_all_at_once_is_one_line(script, tmp_path):
    """As a process, from a folder where nothing is: what main() does in here, it does out there."""
    done = run_script(script, "--no-such", "--flag", cwd=tmp_path)
    check_message(script, done.returncode, done.stderr, ["--no-such"])
    assert done.stdout == "" and os.listdir(tmp_path) == []


def test_missing_shards(script, tmp_path, records, refused):
    for name, way_out in (("fineweb10B", "python data/cached_fineweb10B.py 1"), ("pydocs", "python data/pydocs.py"),
                          ("own", "data/README.md")):
        folder = tmp_path / name
        refused(script, tiny(script, folder, records), "no train shards", folder, way_out)
        write_shard(folder / "toy_train_000000.bin", range(200))
        refused(script, tiny(script, folder, records), "no val shards", folder, way_out)


def test_small_validation_set(script, tmp_path, records, refused):
    write_shard(tmp_path / "toy_train_000000.bin", range(250))
    write_shard(tmp_path / "toy_val_000000.bin", range(32))
    refused(script, tiny(script, tmp_path, records), "33 val tokens are needed", tmp_path, "32")
    write_shard(tmp_path / "toy_val_000000.bin", range(200))
    fineweb = ["--track", "fineweb", "--vocab_size", 300, "--steps", 1, "--val_tokens", 1000]
    refused(script, tiny(script, tmp_path, records, *fineweb), "1,001 val tokens are needed", tmp_path, "has 200")


def test_bad_shards(script, tmp_path, records, refused):
    flags = tiny(script, tmp_path, records)
    train = write_shard(tmp_path / "toy_train_000000.bin", range(250))
    val = write_shard(tmp_path / "toy_val_000000.bin", range(250))
    os.truncate(val, 1100)
    refused(script, flags, val, "250", "38", "again")
    write_shard(val, range(250))
    write_shard(train, range(250), magic=20240801)
    refused(script, flags, train, "no whole token shard", "data/README.md")
    write_shard(train, range(250))
    path = tmp_path / "manifest.json"
    for text, *parts in (("{ cut sho",), ("[]", "damaged"), ('{"shards": 7}', "damaged"),
                         ('{"shards": [{"title": "x"}]}', "damaged")):
        path.write_text(text)
        refused(script, flags, path, *parts)
    path.write_text('{"tokenizer": "gpt2", "vocab_size": 50257}')
    refused(script, flags, "tokens of gpt2", "--vocab_size 257", "--vocab_size 50257")


def test_records_is_a_file(script, data, tmp_path, refused):
    path = tmp_path / "records"
    path.write_text("a file, not a folder")
    nowhere = tmp_path / "nowhere"
    nowhere.symlink_to(tmp_path / "not mounted")
    for records in (path, path / "deeper", nowhere):
        refused(script, tiny(script, data, records), records, "--records")
    assert path.read_text() == "a file, not a folder"


def disk_of(size):
    """To be called in a child: no file of it may grow past so many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_while_logging(script, data, tmp_path):
    """The log's first part holds the script's own source: half of that is too little."""
    size = (ROOT / f"{script}.py").stat().st_size // 2
    done = run_script(script, *tiny(script, data, tmp_path / "records"), limit=disk_of(size))
    folder, = (tmp_path / "records").iterdir()
    check_message(script, done.returncode, done.stderr, ["File too large", folder, "--records"])
    assert [path.name for path in folder.iterdir()] == ["log.txt"], "a run that failed has no result"
    assert (folder / "log.txt").stat().st_size <= size


def test_full_disk_at_a_checkpoint(script, data, tmp_path):
    """Room for the log, not for two fp32 tables of 384 x 64."""
    size = (ROOT / f"{script}.py").stat().st_size + 60_000
    done = run_script(script, *tiny(script, data, tmp_path / "records", "--save_every", 3, "--width", 64),
                      limit=disk_of(size))
    folder, log, result = only_record(tmp_path / "records")
    check_message(script, done.returncode, done.stderr, [f"checkpoints/{folder.name}"])
    assert result is None
    assert re.search(r"\nstep:3/6 train_loss.*\nend: failed: .*checkpoints.*\n\Z", log), log[-300:]
    assert list((tmp_path / "checkpoints").iterdir()) == [], "half a checkpoint"


@pytest.mark.parametrize("moment", ("a step", "the result"))
def test_full_disk_later(moment, script, data, tmp_path, monkeypatch, capfd):
    """No room for a step's line or for result.json: one message that says where, and no end that claims success."""
    record = importlib.import_module(script).Record
    line, start = record.line, record.__init__

    def failing_line(self, text):
        if text.startswith("step:2/6 train_loss"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return line(self, text)

    def start_with_an_obstacle(self, *arguments):
        start(self, *arguments)
        (self.path / "result.json.part").mkdir()

    if moment == "a step":
        monkeypatch.setattr(record, "line", failing_line)
    else:
        monkeypatch.setattr(record, "__init__", start_with_an_obstacle)
    with pytest.raises(SystemExit) as ended:
        run_here(script, *tiny(script, data, tmp_path / "records"))
    folder, log, result = only_record(tmp_path / "records")
    check_message(script, ended.value.code, capfd.readouterr().err, [folder, "--records"])
    assert result is None and re.search(r"\nend: failed: .*\n\Z", log) and "\nend: finished" not in log, log[-300:]


# Kernels and the flags around them


@pytest.mark.parametrize("flags, part", [
    (dict(kernel="cuda", device="cpu"), "cuda cannot be had: it does not run on --device cpu.\nUse --device cuda.\n"),
    (dict(fast_cuda=True, device="cpu"), "wkv7 fast cannot be had: it does not run on --device cpu."),
    (dict(kernel="cpu"), "wkv7 cpu cannot be had: it does not run on --device cuda."),
    (dict(fast_cuda=True, headsz=32), "fast cannot be had: it has no heads of 32 channels here.\nUse --headsz 64 or "),
    (dict(kernel="cpu", device="cpu", headsz=8), "no heads of 8 channels here.\nUse --headsz 16 or 32 or 64"),
    (dict(kernel="cuda", headsz=16), "wkv7 cuda cannot be had: it has no heads of 16 channels here."),
    (dict(fast_cuda=True, dtype="fp32"), "it computes in bf16, not with --dtype fp32.\nUse another --dtype, or"),
    (dict(wind_cuda=True, headsz=128), "wind cannot be had: it has no heads of 128 channels here.\nUse --headsz 64."),
    (dict(wind_cuda=True, dtype="fp32"), "wkv7 wind cannot be had: it computes in bf16"),
    (dict(wind_cuda=True, fast_cuda=True), "--fast_cuda or --wind_cuda"),
    (dict(headsz=100), "--headsz 100: --width 128 is not a multiple of it"),
])
def test_flags_that_do_not_fit(flags, part, capfd):
    """What is no matter of the script alone, cuda/build.py says in three lines, before it builds anything."""
    sound = dict(train_rwkv7.TINY, device="cuda", width=128, headsz=64, dtype="bf16")
    args = train_rwkv7.Hyperparameters(**{**sound, **flags})
    with pytest.raises(ValueError) as refused:
        train_rwkv7.build_model(args)
    message, reason = capfd.readouterr().err, str(refused.value)
    assert part in message + reason and "\n" not in reason, message + reason
    assert message == "" or message.count("\n") == 3 and "\nOr go on without it: --kernel torch" in message
    assert message == "" or re.fullmatch(r"wkv7 has no kernel \w+ for this run: see above\.", reason)


def test_auto_takes_torch_where_a_kernel_does_not_fit(capfd):
    args = train_rwkv7.parse("--track tiny --device cpu --dtype fp32 --width 64 --headsz 8".split())
    train_rwkv7.build_model(args)
    lines = capfd.readouterr().err.splitlines()
    assert args.kernel == "torch" and len(lines) == 4 and "no heads of 8 channels" in lines[0]
    assert lines[3] == "train_rwkv7.py: wkv7 has no kernel cpu for this run: see above. Going on with --kernel torch."


@pytest.mark.parametrize("kernel", ("cpu", "auto"))
def test_a_kernel_that_cannot_be_had(kernel, data, tmp_path, monkeypatch):
    """Asked for, it ends the run; else the torch form trains, and a line says so."""
    (tmp_path / "cuda").mkdir()
    shutil.copy(ROOT / "train_rwkv7.py", tmp_path)
    for name in ("build.py", "cpu.h", "wkv7"):
        copy = shutil.copytree if name == "wkv7" else shutil.copy
        copy(ROOT / "cuda" / name, tmp_path / "cuda" / name)
    flags = tiny("train_rwkv7", data, tmp_path / "records", "--kernel", kernel)
    done = subprocess.run([sys.executable, tmp_path / "train_rwkv7.py", *flags], capture_output=True, text=True,
                          env=environment(CXX="/nonexistent/c++"), timeout=100)
    lines = done.stderr.splitlines()
    assert lines[0] == "wkv7 cpu cannot be had: no C++ compiler (/nonexistent/c++ not found)." and len(lines) == 4, done
    assert lines[3].startswith("train_rwkv7.py: wkv7 has no kernel cpu for this run: see above")
    if kernel == "cpu":
        assert done.returncode == 1 and not (tmp_path / "records").exists()
    else:
        assert done.returncode == 0 and lines[3].endswith("Going on with --kernel torch.")
        assert only_record(tmp_path / "records")[2]["config"]["kernel"] == "torch"
