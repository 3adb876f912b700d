"""What the tests share: shards to train on, runs of the scripts and what a run leaves behind."""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ("train_rwkv7", "train_rwkv6", "train_gpt2")


def load_program(path):
    """A program of the repository as a module, by its path from the root; its folder is no package."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """A shard as data/README.md describes it; the header can be made to lie."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def write_sparse_shard(path, count):
    """A shard of `count` zeros that takes next to no room on the disk."""
    write_shard(path, [], count=count)
    os.truncate(path, 1024 + 2 * count)
    return path


def make_corpus(folder, train=(1500, 700), val=(450,), vocab=257, text=None):
    """Shards of the given sizes in a new folder: random bytes, or `text` (bytes) over and over. Returns the folder."""
    generator = np.random.default_rng(0)
    for split, sizes in (("train", train), ("val", val)):
        for i, size in enumerate(sizes):
            tokens = np.resize(np.frombuffer(text, np.uint8), size) if text else generator.integers(vocab, size=size)
            write_shard(folder / f"toy_{split}_{i:06d}.bin", tokens)
    (folder / "token_bytes.bin").write_bytes(bytes([1] * 256 + [0] * (vocab - 256)))
    return folder


RATES = dict(train_gpt2=dict(muon_lr=0.01, emb_lr=0.1, head_lr=0.005, adam_lr=0.02),  # fixed, whatever tiny's are
             train_rwkv6=dict(muon_lr=0.0005, adam_lr=0.001),
             train_rwkv7=dict(muon_lr=0.01, emb_lr=0.02, head_lr=0.005, adam_lr=0.0026))


def tiny(script, data, records, *more):
    """Flags of a run of a few seconds; the later of two equal flags counts."""
    flags = dict(track="tiny", device="cpu", dtype="fp32", data=data, records=records,
                 checkpoints=pathlib.Path(records).parent / "checkpoints", width=32, layers=2, headsz=16,
                 bsz=4, device_bsz=4, seq_len=32, order="sequential", steps=6, warmdown_steps=3, muon_warmup=4,
                 muon_momentum=0.95, muon_beta2=0, adam_beta2=0.99, val_every=2, val_tokens=352, **RATES[script])
    if "rwkv" in script:
        flags["kernel"] = "torch"
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)] + list(map(str, more))


def command(script, *flags, ranks=1):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launch, str(ROOT / f"{script}.py"), *map(str, flags)]


def environment(**more):
    """This process's environment without what a launcher may have left in it; one thread unless said otherwise."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def run_script(script, *flags, ranks=1, cwd=ROOT, limit=None, **env):
    """Run a script to its end in processes of its own. limit: called in the child before it starts."""
    return subprocess.run(command(script, *flags, ranks=ranks), cwd=cwd, env=environment(**env), preexec_fn=limit,
                          capture_output=True, text=True, timeout=300)


def git_head():
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "none"


def finish_a_run(script, folder):
    """The run that the fixture finished_run shares, on data with a manifest."""
    data = make_corpus(folder / "data", train=(300, 400, 10**4))
    shards = [dict(name=path.name, tokens=(path.stat().st_size - 1024) // 2, bytes=path.stat().st_size,
                   sha256=hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(data.glob("toy_*.bin"))]
    manifest = dict(dataset="toy", tokenizer="bytes", tokenizer_sha256="0f" * 32, vocab_size=257, shards=shards)
    (data / "manifest.json").write_text(json.dumps(manifest))
    kernel = ["--kernel", "cpu"] if "rwkv" in script else []
    flags = tiny(script, data, folder / "records", "--name", "first-run_1.0", "--save_every", 4,
                 "--random_seed", 7, "--epochs", 1, *kernel)
    if kernel:  # built here, if at all: what the build says is not the run's
        importlib.import_module(script).load_kernel("cpu")
    begin, before = time.time(), git_head()
    done = run_script(script, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    facts = dict(flags=flags, stdout=done.stdout, stderr=done.stderr, seconds=time.time() - begin,
                 commits=[before, git_head()])
    (folder / "run.json").write_text(json.dumps(facts))


@contextlib.contextmanager
def one_thread():
    """Models this small are slower on two, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_here(script, *flags):
    """Run a script's main() in this process: spares the seconds that loading torch takes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with one_thread():
            return importlib.import_module(script).main([str(flag) for flag in flags])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def only_record(records):
    """The one run under `records`: its folder, the log's text and result.json (None if there is none)."""
    folder, = pathlib.Path(records).iterdir()
    log, result = (folder / "log.txt").read_text(encoding="utf-8"), folder / "result.json"
    return folder, log, json.loads(result.read_text()) if result.exists() else None


def tree(folder):
    """Every file under a folder with its bytes: equal before and after means untouched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
