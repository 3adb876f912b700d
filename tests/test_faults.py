"""What can go wrong around a run: ranks that die, machines that differ, memory that ends, devices without bf16, folders
of others. Two machines are two torchruns on this one, each with a checkout of its own or both with one."""

import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt2
import train_rwkv7
from helpers import ROOT, SCRIPTS, environment, make_corpus, one_thread, only_record, run_here, tiny
from test_build import GXX, program
from test_run import losses

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX users and signals")


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data"), train=(700, 900, 1500))


# ----------------------------------------------------------------------------------------------------------------------
# Several machines, and ranks that end

DIES = """
import os, signal, {script}
step, seen = {script}.train_step, []
def train_step(*inputs):
    seen.append(0)
    if os.environ["RANK"] == os.environ.get("VICTIM") and len(seen) == 4:  # two are the warm-up's
        if os.environ["HOW"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("a pipe burst")
    return step(*inputs)
{script}.train_step = train_step
if __name__ == "__main__":
    {script}.main()
"""


def checkout(folder, script):
    """What a machine needs of the repository; start.py is the script with a rank that can be made to die."""
    folder.mkdir()
    shutil.copy(ROOT / f"{script}.py", folder)
    shutil.copytree(ROOT / "cuda", folder / "cuda", ignore=shutil.ignore_patterns("build"))
    (folder / "start.py").write_text(DIES.format(script=script))
    return folder


def cluster(folders, flags, processes=1, **env):
    """One torchrun a folder, each on "a machine" of its own. -> [(status, stdout, stderr)]; none may take a minute."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    several = ["--nnodes", str(len(folders)), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *(several if len(folders) > 1 else ["--standalone"]),
         "--node_rank", str(i), "--nproc_per_node", str(processes), "start.py", *flags], cwd=folder, text=True,
        env=environment(HOME="/dev/null/home", **env), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True) for i, folder in enumerate(folders)]
    try:
        return [(node.wait() if said is None else node.returncode, *said) for node, said in
                ((node, node.communicate(timeout=60)) for node in nodes)]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)


def said(text):
    """The scripts' own lines, without torchrun's."""
    return [line for line in text.splitlines() if line.startswith("train_")]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++")
@pytest.mark.parametrize("shared", (True, False), ids=("one checkout", "two checkouts"))
def test_two_machines(shared, data, tmp_path):
    """The losses of one process, and the kernel built once a machine, or once where they share the disk."""
    folders = [checkout(tmp_path / "a node", "train_rwkv7")]
    folders.append(folders[0] if shared else checkout(tmp_path / "b node", "train_rwkv7"))
    flags = tiny("train_rwkv7", data, tmp_path / "two", "--kernel", "cpu", "--name", "two")
    quick = program(tmp_path / "quick" / "c++", f'exec "{GXX}" "$@" -O0')
    done = cluster(folders, flags, CXX=str(quick))
    assert [status for status, _, _ in done] == [0, 0], done
    builds = [len(re.findall("cpu built; .* ok$", err, re.M)) for _, _, err in done]
    assert sum(builds) == 1 if shared else builds == [1, 1], done
    assert all(len(list((folder / "cuda" / "build").glob("*.so"))) == 1 for folder in folders)
    run_here("train_rwkv7", *flags, "--records", tmp_path / "one")
    (train, val), (train_2, val_2) = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(val) == 4 and all(abs(a / b - 1) < 1e-5 for a, b in zip(val, val_2, strict=True)), (val, val_2)
    assert all(abs(float(a) - float(b)) < 1.01e-4 for a, b in zip(train, train_2, strict=True))
    assert only_record(tmp_path / "two")[2]["hardware"]["count"] == 2
    assert done[1][1] == "", "only rank 0 talks"


@posix
@pytest.mark.parametrize("victim, how", ((1, "kill"), (0, "kill"), (1, "raise")))
def test_a_rank_that_ends_in_the_middle_of_a_step(victim, how, data, tmp_path):
    """... ends all within a minute, with its name, once; the log says it, too, but where rank 0 could not write it."""
    folder = checkout(tmp_path / "checkout", "train_gpt2")
    machines = 2 if how == "raise" else 1
    flags = tiny("train_gpt2", data, tmp_path / "records", "--steps", 60, "--bsz", 8)
    done = cluster([folder] * machines, flags, 2 // machines, VICTIM=str(victim), HOW=how)
    assert all(status == 1 for status, _, _ in done), done
    name = "rank 0" if victim == 0 else f"rank 1 on {os.uname().nodename}"
    what = {"kill": "died without a word", "raise": "RuntimeError: a pipe burst"}[how]
    for _, _, err in done:
        line, = said(err)
        assert re.match(rf"train_gpt2\.py: {name}:? {what}", line), err
    _, log, result = only_record(tmp_path / "records")
    assert result is None and log.count("\nstep:1/60 train_loss") == 1 and "step:3/60" not in log
    assert bool(re.search(rf"\nend: failed: {name}:? {what}.*\n\Z", log)) == (victim != 0), log[-300:]


@posix
def test_data_of_another_machine(data, tmp_path):
    """The same names and sizes, one byte changed on the second machine."""
    folders = [checkout(tmp_path / name, "train_gpt2") for name in "ab"]
    for folder in folders:
        shutil.copytree(data, folder / "text")
    shard = folders[1] / "text" / "toy_train_000001.bin"
    with open(shard, "r+b") as file:
        file.seek(1024)
        file.write(b"\7")
    flags = tiny("train_gpt2", "text", tmp_path / "records", "--steps", 12)  # 12 * 4 * 32 tokens: more than one shard
    done = cluster(folders, flags)
    here = os.uname().nodename
    for status, _, err in done:
        line, = said(err)
        assert status == 1 and re.fullmatch(
            rf"train_gpt2.py: rank 1 on {here}: text/toy_train_000001.bin on {here} is not rank 0's: "
            r"sha256 [0-9a-f]{12}, there [0-9a-f]{12}\. Damaged, .*", line), err
    assert not (tmp_path / "records").exists(), "nothing is written before all have checked"


def test_strangers_do_not_end_a_run():
    """What else connects to rank 0's port and goes is no rank that died: this process would end with it."""
    peers = train_gpt2.Peers(0, alone=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b'"x"\n', b"{}\n", b"\xff\n", b"x" * 5000):
            with socket.create_connection(server.getsockname()) as stranger:
                link, _ = server.accept()
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
                peers._listen(link)
                link.close()
    assert peers.links == [] and not peers.over.is_set()


# ----------------------------------------------------------------------------------------------------------------------
# Memory


class Living(TorchDispatchMode):
    """The most bytes of tensors that were alive at once: of those made inside, and of those given."""

    def __init__(self, given):
        super().__init__()
        self.seen = {t.untyped_storage()._cdata for t in given}
        self.now = self.peak = sum(t.nbytes for t in given)

    def gone(self, key, size):
        self.now -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", (("--dtype=mixed",), ("--dtype=fp32", "--vocab_size=3000"), ("--dtype=bf16",)))
def test_the_estimate_of_memory(script, flags, data, tmp_path):
    """Against the tensors alive at the peak of the second step, at its second micro-batch: the gradients of the first
    and the optimisers' states are there."""
    module = importlib.import_module(script)
    args = module.Hyperparameters.parse(tiny(script, data, tmp_path, "--width", 64, "--device_bsz", 2, *flags))
    _, _, model, optimizers, counts = module.set_up(args, 0)
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    module.train_step(model, optimizers, tokens, tokens, args)
    states = [t for t in tree_leaves([o.state_dict()["state"] for o in optimizers]) if isinstance(t, torch.Tensor)]
    with Living([*model.parameters(), *states]) as living:
        module.train_step(model, optimizers, tokens, tokens, args)
    print(script, flags, f"{counts['memory']['estimate'] / living.peak:.3f} of the peak")
    assert counts["memory"]["estimate"] == pytest.approx(living.peak, rel=0.05)


def test_the_line_of_the_estimate(data, tmp_path, capfd):
    run_here("train_gpt2", *tiny("train_gpt2", data, tmp_path))
    _, _, result = only_record(tmp_path)
    memory = result["hardware"]["memory_needed"]
    assert memory["estimate"] == memory["fixed"] + 4 * memory["sequence"]
    line, = re.findall(r"^memory: about (\S+) GB a process: .*, 4 x (\S+) for .*; \S+ GB are free$",
                       capfd.readouterr().out, re.M)
    assert [float(x) for x in line] == pytest.approx([memory["estimate"] / 1e9, memory["sequence"] / 1e9], rel=0.01)


@pytest.mark.parametrize("error, way_out", (
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--device_bsz 2 .*--device_bsz auto"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "--device_bsz 2 "),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "--device_bsz 2 "),
    (MemoryError(), "--device_bsz 2 ")))
def test_out_of_memory(error, way_out, data, tmp_path, monkeypatch, capfd):
    def train_step(*_):
        raise error
    monkeypatch.setattr(train_gpt2, "train_step", train_step)
    with pytest.raises(SystemExit) as ended:
        run_here("train_gpt2", *tiny("train_gpt2", data, tmp_path))
    assert ended.value.code == 1
    assert re.fullmatch(rf"train_gpt2.py: out of memory on cpu with 4 sequence\(s\) of 32 tokens .*{way_out}.*\n",
                        capfd.readouterr().err)
    _, log, result = only_record(tmp_path)
    assert result is None and "\nend: failed: out of memory on cpu" in log
    with pytest.raises(SystemExit):
        run_here("train_gpt2", *tiny("train_gpt2", data, tmp_path / "1", "--device_bsz", 1))
    assert "1 sequence(s) of 32 tokens" in (said := capfd.readouterr().err) and "--seq_len" in said, said


def test_another_error_is_no_lack_of_memory(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here("train_gpt2", *tiny("train_gpt2", data, tmp_path))


@pytest.mark.parametrize("script", SCRIPTS)
def test_auto_takes_what_fits(script, data, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    flags = tiny(script, data, tmp_path, "--bsz", 6, "--device_bsz", "auto", "--steps", 1)
    args = module.Hyperparameters.parse(flags)
    assert args.device_bsz == "auto"
    _, _, _, _, counts = module.set_up(args, 0)
    assert args.device_bsz == 6, "this machine has room for six short sequences"
    fixed, each = counts["memory"]["fixed"], counts["memory"]["sequence"]
    for room, expected in ((5, 3), (3, 3), (2.9, 2), (1, 1), (0, 1)):  # sequences for which there is room
        monkeypatch.setattr(module, "memory_free", lambda device: fixed + room * each)
        args = module.Hyperparameters.parse(flags)
        module.set_up(args, 0)
        assert (type(args.device_bsz), args.device_bsz) == (int, expected), room
    monkeypatch.setattr(module, "memory_free", lambda device: fixed + 3 * each)
    run_here(script, *flags)
    assert only_record(tmp_path)[2]["config"]["device_bsz"] == 3


def test_auto_tries_on_a_gpu(monkeypatch):
    """On a stand-in that has room for so many sequences; what is allocated beside them is the optimisers' room."""
    tried, room = [], []
    parameter = torch.nn.Parameter(torch.zeros(10, device="meta"))
    empty = torch.empty

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = parameter

        def forward(self, x, y):
            assert x.shape == y.shape == (len(x), 32) and self.p.grad is None
            tried.append(len(x))
            if len(x) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return self.p.sum()
    monkeypatch.setattr(torch, "empty", lambda *n, **more: room.append(n) or empty(*n, **more))
    args = train_gpt2.Hyperparameters(track="tiny", bsz=51, device_bsz="auto", seq_len=32, device="cpu")
    for limit, tries in ((100, [51]), (51, [51]), (26, [51, 26]), (20, [51, 26, 13]), (2, [51, 26, 13, 7, 4, 2]),
                         (1, [51, 26, 13, 7, 4, 2])):  # one is the least there is, and not tried
        tried.clear()
        found = train_gpt2.largest_device_bsz(Model(), args, torch.device("meta"), 1080, 99)
        assert found == (1 if limit == 1 else tries[-1])
        assert tried == tries and parameter.grad is None
    assert (1080 - 2 * 40,) in room


def test_auto_is_a_word_and_numbers_are_numbers(capsys):
    for text in ("autos", "4.5", ""):
        with pytest.raises(SystemExit) as ended:
            train_gpt2.Hyperparameters.parse(["--device_bsz", text])
        assert ended.value.code == 2 and "--device_bsz" in capsys.readouterr().err
    assert train_gpt2.Hyperparameters.parse(["--device_bsz", "7"]).device_bsz == 7


# ----------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.fixture
def gpu(monkeypatch):
    def make(capability, hip=None, name="Tesla T4"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.version, "hip", hip)
    return make


@pytest.mark.parametrize("capability, dtype", (((9, 0), "bf16"), ((8, 0), "bf16"), ((8, 6), "bf16"), ((12, 0), "bf16"),
                                               ((7, 5), "fp32"), ((7, 0), "fp32"), ((6, 1), "fp32")))
def test_cuda(capability, dtype, gpu):
    gpu(capability)
    args = train_gpt2.Hyperparameters(track="tiny")
    train_gpt2.resolve(args, 1)
    assert (args.device, args.dtype) == ("cuda", dtype)
    said = train_gpt2.banner(args, torch.device("cuda", 0))
    assert said is None if dtype == "bf16" else (
        f"Tesla T4 (sm_{capability[0]}{capability[1]}) has no bf16" in said and "training in fp32" in said)


def test_mps(monkeypatch):
    here = lambda yes: monkeypatch.setattr(torch.backends.mps, "is_available", lambda: yes)
    args = lambda **more: train_rwkv7.Hyperparameters(track="tiny", width=64, headsz=32, **more)
    here(False)
    with pytest.raises(ValueError, match="--device mps: .*--device cpu"):
        train_rwkv7.resolve(args(device="mps"), 1)
    here(True)
    with pytest.raises(ValueError, match="--device mps: one process"):
        train_rwkv7.resolve(args(device="mps"), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mine = args(device="mps")
    train_rwkv7.resolve(mine, 1)
    train_rwkv7.build_model(mine)
    assert (mine.device, mine.dtype, mine.kernel) == ("mps", "fp32", "torch")
    assert train_rwkv7.banner(mine, torch.device("mps")).startswith("MPS: UNTESTED")
    other = args()
    train_rwkv7.resolve(other, 1)
    assert other.device == "cpu", "auto does not choose what nobody has tried"


# ----------------------------------------------------------------------------------------------------------------------
# Folders for what is built


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(train_rwkv7.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp" / f"rwkv-speedrun-{os.getuid()}"


@posix
def test_the_cache_of_compiled_models(scratch, data, tmp_path, monkeypatch, gpu):
    gpu((9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for given, expected in ((None, str(scratch / "inductor")), ("/mine", "/mine")):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if given:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        args = train_gpt2.Hyperparameters.parse(tiny("train_gpt2", data, tmp_path, "--device", "cuda"))
        with pytest.raises((AssertionError, RuntimeError), match="CUDA"):  # there is none to take the model
            train_gpt2.set_up(args, 0)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == expected


def test_a_record_never_follows_a_link(data, tmp_path, monkeypatch, capfd):
    """Whatever lies in records/ under the run's name before it starts."""
    (tmp_path / "records").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(train_gpt2.time, "strftime", lambda *_: "2026")
    (tmp_path / "records" / "2026_train_gpt2_x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        run_here("train_gpt2", *tiny("train_gpt2", data, tmp_path / "records", "--name", "x"))
    assert ended.value.code == 1 and "File exists" in capfd.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())
