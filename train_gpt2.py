"""Train the GPT-2 of the speedrun (124M parameters, Muon, rotary, value residual): 3.28 validation loss on FineWeb.

Track fineweb: 12 layers, 768 wide, at most 124M parameters active per token, 3242 steps of 524288 tokens, on GPUs.
Track tiny:    the same script on bytes of text, about 1M parameters, two minutes on a laptop's CPU; no GPU, no network.

    8 GPUs   ./run_gpt2.sh                               (torchrun --standalone --nproc_per_node=8 train_gpt2.py ...)
    1 GPU    ./run_gpt2.sh --device_bsz 32               (python train_gpt2.py ...; the same run, only longer)
    CPU      ./run_gpt2.sh --track tiny                  (python data/pydocs.py; python train_gpt2.py --track tiny)

Claims: on fineweb none yet (the public record of 2024-11-08 that it follows: 3.278 in 7.8 minutes on 8xH100); on tiny
the table of README.md, from the runs in records/. The file stands alone; records/report.py, if there, sums up.
"""

import argparse
import base64
import collections
import contextlib
import copy
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads ends the program quietly

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Hyperparameters


@dataclass
class Hyperparameters:
    """All that defines a run, with the values of track fineweb; TINY replaces some of them on track tiny."""
    # the run
    track: str = "fineweb"  # fineweb (124M parameters, GPT-2 tokens) or tiny (1M, bytes)
    data: str = "data/fineweb10B"  # folder of *_train_*.bin and *_val_*.bin shards
    name: str = ""  # name of the run in its record's folder; none: a short id
    random_seed: int = 1337  # seed of the starting weights
    records: str = "records"  # folder that receives the record
    checkpoints: str = "checkpoints"  # folder that receives the checkpoints
    # length and batch
    steps: int = 3242  # optimiser steps
    stop_after: int = 0  # end after so many steps, without a result: to compare beginnings; 0: never
    warmdown_steps: int = 926  # last steps, over which every learning rate falls linearly to 0
    warmup_steps: int = 0  # first steps, over which every learning rate rises linearly
    bsz: int = 512  # sequences a step, over all devices and micro-batches
    device_bsz: int = 64  # sequences a device takes at once
    seq_len: int = 1024  # tokens a sequence (T)
    epochs: int = 1  # how often the train shards may be read over
    order: str = "sequential"  # of the train tokens: sequential, or shuffled chunks of seq_len
    val_every: int = 125  # steps between validations
    val_tokens: int = 10485760  # validation tokens, the first there are; tiny: at most
    save_every: int = 0  # steps between checkpoints; 0: only after the last step
    resume: str = ""  # checkpoint to go on from: a file, or auto: the furthest unfinished run with these flags, if any
    # model
    vocab_size: int = 50257  # token ids in use; tables are padded to a multiple of 128
    layers: int = 12  # blocks (L)
    width: int = 768  # channels (C)
    headsz: int = 128  # channels a head (N)
    ffn_ratio: float = 4.0  # hidden width of the MLP / C
    softcap: float = 30.0  # logits become c tanh(z / c); 0 for none
    # learning rates
    muon_lr: float = 0.02  # Muon: matrices of the blocks
    muon_scale: str = "spectral"  # Muon's scale of an update: spectral or rms
    muon_warmup: int = 500  # steps over which Muon's momentum rises from 0.85 to 0.95
    adam_lr: float = 0.02  # Adam: scalars (lambdas and value mixes)
    emb_lr: float = 0.3  # Adam: embedding
    head_lr: float = 0.002  # Adam: head
    adam_beta2: float = 0.95  # Adam: decay of the mean square
    # machine
    device: str = "auto"  # where to train: auto, cuda or cpu
    dtype: str = "auto"  # bf16 (activations and products), mixed (products bf16, the rest fp32) or fp32
    compile: bool = True  # torch.compile the model on a GPU
    check: bool = False  # only check flags, machine and data, for WORLD_SIZE ranks, and stop


TINY = dict(
    track="tiny", data="data/pydocs", steps=4400, warmdown_steps=4400, bsz=2, device_bsz=16, seq_len=256, epochs=20,
    val_every=1100, val_tokens=262144, vocab_size=257, layers=2, width=192, headsz=64, ffn_ratio=4.333,
    muon_lr=0.01, emb_lr=0.1, head_lr=0.005, muon_warmup=100, adam_beta2=0.99)


# ----------------------------------------------------------------------------------------------------------------------
# Model
#
# B sequences, T tokens, C channels, H heads, N channels a head, L blocks. rms(x) is RMSNorm without parameters.
# Precision: the linear layers' weights fp32, their products bf16 (dtype bf16, mixed); with dtype bf16 the rest is bf16.


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """y = W x without bias, in `compute` dtype; W starts at zero if asked."""

    def __init__(self, rows_in, rows_out, compute, zero=False):
        super().__init__(rows_in, rows_out, bias=False)
        self.compute = compute
        if zero:
            nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.linear(x.to(self.compute), self.weight.to(self.compute))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(N)) v over the past, q and k normalised and rotated, v mixed with the first layer's v."""

    def __init__(self, args, compute):
        super().__init__()
        C = args.width
        self.N = args.headsz
        self.query, self.key, self.value = (Linear(C, C, compute) for _ in range(3))
        self.output = Linear(C, C, compute, zero=True)
        self.mix = nn.Parameter(torch.tensor(0.5))  # m: v becomes (1 - m) v + m v_first

    def forward(self, x, v_first, rotary):
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.N) for linear in (self.query, self.key, self.value))  # (B, T, H, N)
        v_first = v if v_first is None else v_first
        v = torch.lerp(v, v_first, self.mix.to(v.dtype))
        q, k = (self.rotate(rms(t), rotary) for t in (q, k))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)  # (B, H, T, N)
        return self.output(y.transpose(1, 2).reshape(B, T, C)), v_first

    @staticmethod
    def rotate(x, rotary):
        """Rotate the pairs (x_n, x_{n + N/2}) by the angle t 10000^(-2n/N) at token t."""
        cos, sin = (part.to(x.dtype) for part in rotary)  # (T, 1, N/2)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class MLP(nn.Module):
    """W_value relu(W_key x)^2."""

    def __init__(self, args, compute):
        super().__init__()
        hidden = round(args.ffn_ratio * args.width / 32) * 32
        self.key, self.value = Linear(args.width, hidden, compute), Linear(hidden, args.width, compute, zero=True)

    def forward(self, x):
        return self.value(torch.relu(self.key(x)).square())


class Block(nn.Module):
    """x = l0 x + l1 x0;  x += att(rms(x));  x += mlp(rms(x))."""

    def __init__(self, args, compute):
        super().__init__()
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.att, self.mlp = Attention(args, compute), MLP(args, compute)

    def forward(self, x, x0, v_first, rotary):
        x = (self.lambdas[0] * x + self.lambdas[1] * x0).to(x.dtype)
        y, v_first = self.att(rms(x), v_first, rotary)
        x = x + y
        return x + self.mlp(rms(x)), v_first


class GPT2(nn.Module):
    """loss = model(inputs, targets): mean cross-entropy in nats over the targets >= 0, all (B, T) int64."""

    lookups = ("wte.weight",)  # tables of which a token uses one row
    sources = ()  # files that run besides this one

    def __init__(self, args):
        super().__init__()
        C, V = args.width, -(-args.vocab_size // 128) * 128
        compute = torch.float32 if args.dtype == "fp32" else torch.bfloat16
        self.args = args
        self.wte = nn.Embedding(V, C)
        self.blocks = nn.ModuleList([Block(args, compute) for _ in range(args.layers)])
        self.head = Linear(C, V, compute, zero=True)
        if args.dtype == "bf16":
            self.bfloat16()
            for linear in self.modules():
                if isinstance(linear, Linear):
                    linear.float()

    def rotary(self, T, device):
        """cos and sin of the rotation, (T, 1, N/2) each; the angles in fp32."""
        n = torch.arange(0, self.args.headsz, 2, device=device, dtype=torch.float32)
        t = torch.arange(T, device=device, dtype=torch.float32)
        angle = torch.outer(t, 10000 ** (-n / self.args.headsz))[:, None]
        return angle.cos(), angle.sin()

    def logits(self, inputs):
        """(B, T) int64 -> (B, T, V) fp32."""
        rotary = self.rotary(inputs.size(1), inputs.device)
        x = x0 = rms(self.wte(inputs))  # (B, T, C)
        v_first = None
        for block in self.blocks:
            x, v_first = block(x, x0, v_first, rotary)
        z = self.head(rms(x)).float()
        return self.args.softcap * torch.tanh(z / self.args.softcap) if self.args.softcap else z

    def forward(self, inputs, targets):
        logits = self.logits(inputs)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    def flops_per_token(self, active):
        """Training FLOPs: 6 an active parameter, and 6 C T a block for causal attention (half of 12 C T)."""
        return 6 * active + 6 * self.args.width * self.args.seq_len * self.args.layers


def build_model(args):
    """The model on the default device, seeded by the caller. Raises ValueError when the flags do not fit together."""
    if args.headsz < 2 or args.headsz % 2 or args.width % args.headsz:
        fits = [n for n in (16, 32, 48, 64, 96, 128, 192, 256, 384) if args.width % n == 0]
        divides = args.headsz > 0 and args.width % args.headsz == 0
        why = "it must be even" if divides else f"{args.width} is not a multiple of {args.headsz}"
        raise ValueError(f"--headsz {args.headsz}: {why}. Allowed: {', '.join(map(str, fits))}.")
    return GPT2(args)


# ----------------------------------------------------------------------------------------------------------------------
# Parameter groups


def build_optimizers(model, args):
    """[Adam, Muon] over every parameter exactly once. Raises ValueError."""
    def group_of(name):
        if name in ("wte.weight", "head.weight"):
            return name.split(".")[0]
        leaf = f".{name}".split(".")[-2:]
        if leaf[0] in ("query", "key", "value", "output"):
            return "muon"
        if leaf[1] in ("lambdas", "mix"):
            return "scalars"
        raise ValueError(f"parameter {name} belongs to no optimiser group: name it in build_optimizers")

    rates = dict(wte=args.emb_lr, head=args.head_lr, scalars=args.adam_lr, muon=args.muon_lr)
    groups = {group: dict(params=[], lr=lr) for group, lr in rates.items()}
    for name, p in model.named_parameters():
        groups[group_of(name)]["params"].append(p)
    # Until the blocks' outputs, which start at 0, have grown, the gradient of these numbers is rounding alone. An eps
    # above it keeps Adam from making steps of that, which differ with the number of ranks.
    groups["scalars"]["eps"] = 1e-5
    muon = groups.pop("muon")
    adam = torch.optim.Adam(list(groups.values()), betas=(0.9, args.adam_beta2), fused=True)
    return [adam, Muon([muon], lr=args.muon_lr, scale=args.muon_scale, bf16=args.dtype != "fp32")]


# ----------------------------------------------------------------------------------------------------------------------
# Muon optimizer [shared]


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def newton_schulz(G, steps=5):
    """Replace the singular values of each matrix by values in about [0.7, 1.2]: a batch (n, rows, cols), rows <= cols.

    The quintic iteration of Keller Jordan's Muon (2024). Runs in the dtype of G: bf16 where the hardware has it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
    return X


def over_ranks(function, batch):
    """function(batch) (n, ...), of which each rank computes a slice; all of them get the whole."""
    world, rank = world_size(), int(os.environ.get("RANK", 0))
    if world == 1:
        return function(batch)
    each = -(-len(batch) // world)
    padding = batch[-1:].expand(each * world - len(batch), *batch.shape[1:])
    mine = function(torch.cat([batch, padding])[rank * each:(rank + 1) * each])
    whole = mine.new_empty(each * world, *batch.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 or 2.11
    gather(whole, mine.contiguous())
    return whole[:len(batch)]


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's look-ahead, orthogonalised by Newton-Schulz: W <- W - lr s NS(G + mu M), M <- mu M + G.

    params: matrices (rows, cols). scale: "spectral" s = sqrt(max(1, rows/cols)) or "rms" s = sqrt(max(rows, cols)).
    Matrices of equal shape (up to transposition) go through Newton-Schulz as one batch, a slice a rank. The momenta M
    are whole on every rank.
    """

    def __init__(self, params, lr, momentum=0.95, scale="spectral", bf16=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, scale=scale))
        bf16 = bf16 and has_bf16(self.param_groups[0]["params"][0].device)
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for matrices in by_shape.values():
                self.update(matrices, **group)

    def update(self, matrices, lr, momentum, scale, **_):
        for p in matrices:
            if "M" not in self.state[p]:
                self.state[p]["M"] = torch.zeros_like(p)
        G = [p.grad for p in matrices]
        M = [self.state[p]["M"] for p in matrices]
        torch._foreach_mul_(M, momentum)
        torch._foreach_add_(M, G)
        G = torch._foreach_add(G, M, alpha=momentum)
        wide = [g if g.shape[0] <= g.shape[1] else g.mT for g in G]
        updates = over_ranks(newton_schulz, torch.stack(wide).to(self.dtype))
        for p, O in zip(matrices, updates):
            rows, cols = p.shape
            s = max(1, rows / cols) ** 0.5 if scale == "spectral" else max(rows, cols) ** 0.5
            O = O if O.shape == p.shape else O.mT
            p.add_(O.to(p.dtype), alpha=-lr * s)


# ----------------------------------------------------------------------------------------------------------------------
# Data loader [shared]

SHARD_MAGIC, SHARD_VERSION = 20240520, 1  # header of 256 int32: magic, version, number of tokens; then uint16 tokens


def open_shard(path):
    """Memory-map the tokens of a shard, uint16. Raises ValueError with the way out when it is not a whole shard."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", count=256).tolist()
    if size < 1024 or header[:2] != [SHARD_MAGIC, SHARD_VERSION]:
        raise ValueError(f"{path} is no token shard of version {SHARD_VERSION}. Format and tools: data/README.md.")
    if header[2] < 1 or size != 1024 + 2 * header[2]:
        raise ValueError(f"{path} is damaged: its header counts {header[2]} tokens, the file holds "
                         f"{(size - 1024) / 2:.12g}. Fetch or make it again.")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


class TokenStream:
    """The tokens of the sorted shards folder/*_<split>_*.bin as one stream, to be read over and over: position p is
    token p mod their number. Opens only the first, with `need` tokens. Raises ValueError with the way out."""

    def __init__(self, folder, split, need=math.inf):
        self.paths, self.shards, total = [], [], 0
        for path in sorted(Path(folder).glob(f"*_{split}_*.bin")):
            if path.name.startswith("."):
                tqdm.write(f"{path} is no shard and passed over")  # what other systems leave beside a copied file
            elif total < need:
                self.paths.append(path)
                self.shards.append(open_shard(path))
                total += len(self.shards[-1])
        if not self.shards:
            raise ValueError(f"no {split} shards (*_{split}_*.bin) in {folder}. {where_from(folder, need)}")
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self):
        return int(self.starts[-1])

    def read(self, position, count):
        """Tokens [position, position + count) of the stream as int64 (count,)."""
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            at = (position + done) % len(self)
            i = int(np.searchsorted(self.starts, at, side="right")) - 1
            part = self.shards[i][at - self.starts[i]:][:count - done]
            out[done:done + len(part)] = part
            done += len(part)
        return out

    def fingerprint(self, vocab_size, known=()):
        """[{name, tokens, sha256}] of the shards. ValueError for an id beyond the vocabulary.

        known: the manifest's entries. A shard whose size and time are still those of its entry is not read, which would
        take long for billions of tokens: its hash and highest id come from there, and hash_from says so.
        """
        known = {entry["name"]: entry for entry in known if "mtime_ns" in entry}

        def scan(path, shard):
            entry, now, facts = known.get(path.name, {}), path.stat(), dict(name=path.name, tokens=len(shard))
            if entry and (entry["bytes"], entry["mtime_ns"]) == (now.st_size, now.st_mtime_ns):
                top, facts["sha256"], facts["hash_from"] = entry["top_id"], entry["sha256"], "manifest.json"
            else:
                digest, top = hashlib.sha256(np.fromfile(path, np.uint8, 1024)), 0
                for i in range(0, len(shard), 1 << 22):
                    part = np.ascontiguousarray(shard[i:i + (1 << 22)])
                    digest.update(part)
                    top = max(top, int(part.max()))
                facts["sha256"] = digest.hexdigest()
            if top >= vocab_size:
                raise ValueError(f"{path} holds token id {top}, beyond the vocabulary of {vocab_size}. "
                                 "Wrong tokenizer for this track?")
            return facts
        with ThreadPoolExecutor() as pool:  # hashing and max() run without the interpreter's lock
            return list(pool.map(scan, self.paths, self.shards))


def where_from(folder, need):
    """How to get the missing shards of a folder."""
    name = Path(folder).name
    if name.startswith("fineweb"):
        return f"python data/cached_{name}.py {math.ceil(min(need, 1e11) / 1e8)}"
    return "python data/pydocs.py" if name == "pydocs" else "Format and tools: data/README.md."


@functools.lru_cache(maxsize=2)
def shuffled(chunks, T, epoch):
    """Where the chunks of T tokens begin that an epoch reads: in random order, after a random phase. RandomState's
    numbers are the same in every numpy."""
    random = np.random.RandomState(epoch)
    return random.randint(T) + T * random.permutation(chunks)


def chunks(tokens, args):
    """How many sequences an epoch holds in the shuffled order, whatever its phase."""
    return (tokens - args.seq_len) // args.seq_len


def share(count, rank):
    """The sequences [first, last) of `count` that are this rank's: as evenly as it goes, none if there are too few."""
    return count * rank // world_size(), count * (rank + 1) // world_size()


def sequences(stream, first, last, T):
    """Inputs and targets of the stream's sequences [first, last), both int64 (last - first, T)."""
    tokens = torch.from_numpy(stream.read(first * T, (last - first) * T + 1))
    return tokens[:-1].view(-1, T), tokens[1:].view(-1, T)


def batch(stream, step, args, rank):
    """This rank's inputs and targets of a step, both int64 (n, T), on the device. Whatever the ranks and micro-batches,
    step s takes sequences [s bsz, (s + 1) bsz) of the run."""
    T, (first, last) = args.seq_len, share(args.bsz, rank)
    first, last = step * args.bsz + first, step * args.bsz + last
    if args.order == "sequential":
        inputs, targets = sequences(stream, first, last, T)
    else:
        rows, count = [], chunks(len(stream), args)
        for k in range(first, last):
            start = shuffled(count, T, k // count)[k % count]
            rows.append(stream.read(start, T + 1))
        tokens = torch.from_numpy(np.array(rows, np.int64).reshape(-1, T + 1))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if args.device == "cuda":
        inputs, targets = (t.pin_memory().to(args.device, non_blocking=True) for t in (inputs, targets))
    return inputs, targets


# ----------------------------------------------------------------------------------------------------------------------
# Record [shared]

SCHEMA = 2  # of result.json
IMAGE = Path("/etc/rwkv-speedrun-image")  # written by the Dockerfile


def shell(*command):
    """Standard output of a command, stripped; "" when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True,
                              cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def hardware(device):
    """The machine of this run: {name, count of devices, text}, text being nvidia-smi's page or the CPU's facts."""
    if device.type == "cuda":
        return dict(name=torch.cuda.get_device_name(device), count=world_size(), text=shell("nvidia-smi"))
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    model = re.search(r"^model name\s*: (.*)|\Z", info, re.M)[1] or shell("sysctl", "-n", "machdep.cpu.brand_string")
    name = f"{model or platform.machine()}, {torch.get_num_threads()} threads"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return dict(name=name, count=world_size(), text=f"{name} of {os.cpu_count()} cores, {memory:.1f} GiB of memory")


def environment():
    """Versions, what steers the numerics and git state: what is needed to repeat a run."""
    first_line = lambda text: text.splitlines()[0] if text else "none"
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    steering = ("OMP_", "GOMP_", "MALLOC_", "MKL_", "CUBLAS_", "NCCL_", "PYTORCH_", "NVIDIA_TF32_")
    return dict(
        threads=torch.get_num_threads(), isa=torch.backends.cpu.get_cpu_capability(),
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith(steering)},
        image=IMAGE.read_text(encoding="utf-8").strip() if IMAGE.exists() else "none",
        python=platform.python_version(), platform=platform.platform(), torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        nvcc=(shell("nvcc", "--version").splitlines() or ["none"])[-1],
        driver=first_line(shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")),
        compiler=first_line(shell(os.environ.get("CXX", "c++"), "--version")),
        git_commit=shell("git", "rev-parse", "HEAD") or "none",
        git_dirty=bool(shell("git", "status", "--porcelain", "--untracked-files=no")), packages=packages)


def read_sources(paths):
    """[({name, lines, sha256}, text)] of the files that make a run."""
    name = lambda path: Path(os.path.relpath(path, Path(__file__).parent)).as_posix()
    texts = [(name(path), path.read_text(encoding="utf-8")) for path in paths]
    return [(dict(name=name, lines=text.count("\n"), sha256=sha256(text.encode())), text) for name, text in texts]


class Record:
    """The run's folder: log.txt, line by line as things happen, and result.json, written last. Only rank 0 writes.
    A folder without result.json belongs to a run that did not finish. log: what a resumed run's log begins with, bytes.
    checkpoint: the file of the last one. Raises OSError.
    chain: sha256 over the lines so far. result.json, the log's last line but one and each point of the curve hold its
    value there, so that records/verify.py finds an edited, lost, added or moved line and about where. It proves no
    honesty: who edits can hash anew. It holds a record to the digests that others saw, in a commit for instance."""

    def __init__(self, args, rank, log=b""):
        self.path, self.log, self.file, self.checkpoint, self.chain = None, None, None, None, hashlib.sha256(log)
        if rank == 0:
            stamp = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
            name, number = f"{stamp}_{Path(__file__).stem}_{args.name or os.urandom(3).hex()}", 1
            while not self.path:  # never an old folder: nothing is overwritten
                path = Path(args.records) / (name if number == 1 else f"{name}_{number}")
                try:
                    path.mkdir(parents=True)
                    self.path = path
                except FileExistsError:  # a run of this name began in the same second
                    if not path.is_dir():
                        raise
                    number += 1
            self.log = self.path / "log.txt"
            self.file = open(self.log, "x", encoding="utf-8", buffering=1, newline="\n")
            self.file.write(log.decode())

    def line(self, text):
        if self.file:
            self.chain.update(f"{text}\n".encode())
            self.file.write(text + "\n")

    def header(self, facts, sources):
        """The log up to the first step: configuration, sources, facts as JSON; of a resumed run one line of JSON."""
        page = facts["hardware"].pop("text")
        if "resumed" in facts:
            known = ("run", "command", "config", "environment", "hardware", "data")
            self.line(f"resumed: {json.dumps(dict(facts['resumed'][-1], page=page, now={k: facts[k] for k in known}))}")
            return
        self.line(f"config: {json.dumps(facts['config'])}\ncommand: {shlex.join(facts['command'])}")
        for about, text in sources:
            self.line(f"{'=' * 100}\nsource: {json.dumps(about)}\n{text.rstrip(chr(10))}")
        self.line("=" * 100)
        self.line(f"record: {json.dumps({key: facts[key] for key in ('schema', 'run', 'script', 'seed')})}")
        for key in ("environment", "hardware", "data", "model"):
            self.line(f"{key}: {json.dumps(facts[key])}")
        self.line(f"{page}\n{'=' * 100}")

    def close(self, reason):
        """The chain and the reason of the end, the log's last lines. Returns its path. A full disk is no error here."""
        with contextlib.suppress(OSError):
            self.line(f"sha256: {self.chain.hexdigest()}\nend: {reason}")
        with contextlib.suppress(OSError):
            self.file and self.file.close()
        self.file = None
        return self.log

    def finish(self, result):
        """Close the log and write result.json atomically: the last act of a finished run."""
        temporary = self.path / "result.json.part"
        text = json.dumps(dict(result, log_sha256=self.chain.hexdigest()), indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
        self.close("finished")
        os.replace(temporary, self.path / "result.json")


class Clock:
    """Wall time in seconds, each moment in one phase. Switching waits for the device: a phase holds its own work."""

    def __init__(self):
        self.device, self.phase, self.since = torch.device("cpu"), "rest", time.perf_counter()
        self.began = time.time()  # by the system's clock, which can be set: for comparison only
        self.seconds = {phase: 0.0 for phase in ("warm-up", "train", "validation", "saving", "rest")}

    def switch(self, phase):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def train_ms(self):
        """Training time so far in ms; inside the train phase without waiting for the device."""
        running = time.perf_counter() - self.since if self.phase == "train" else 0.0
        return 1e3 * (self.seconds["train"] + running)


class Diverged(ArithmeticError):
    """A loss or parameter is no number any more."""


class StepLines:
    """The log's line of each step. What a step reports (see train_step) stays on the device until its copy has arrived;
    the host runs one step ahead there. stopping: a rank was asked to stop, which all so learn after the same step.
    Raises Diverged."""

    def __init__(self, record, args, losses=()):
        self.record, self.args, self.pending = record, args, collections.deque()
        self.last, self.stopping = math.nan, False
        self.losses = list(losses)  # as they are, for the line of all of them that ends the log: bitwise comparison

    def add(self, step, report, train_ms):
        event = torch.cuda.Event() if report.is_cuda else None
        if event:
            report = torch.empty_like(report, device="cpu", pin_memory=True).copy_(report, non_blocking=True)
            event.record()
        self.pending.append((step, report, event, train_ms))
        self.flush(ahead=1 if event else 0)

    def flush(self, ahead=0):
        """Write the lines of all steps but the last `ahead`."""
        while len(self.pending) > ahead:
            step, report, event, train_ms = self.pending.popleft()
            if event:
                event.synchronize()
            self.last, asked = report.tolist()
            self.stopping |= asked > 0
            self.record.line(f"step:{step}/{self.args.steps} train_loss:{self.last:.4f} {timing(train_ms, step)}")
            if not math.isfinite(self.last):
                self.fail(step, f"the loss is {self.last}")
            self.losses.append(self.last)

    def fail(self, step, what):
        raise Diverged(f"step {step} of {self.args.steps}: {what}. Last good checkpoint: "
                       f"{self.record.checkpoint or 'none (--save_every)'}")


def timing(train_ms, step):
    return f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(1, step):.2f}ms"


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint [shared]

# checkpoints/<run>_step000100.safetensors: the model's tensors by name, as trained; while the run is unfinished also
# the optimisers' as <name>:<key>, the losses, torch's random state and the log. The facts are JSON in its header.
FREE = ("device_bsz", "data", "records", "checkpoints", "name", "save_every", "resume", "stop_after",
        "check")  # flags that a resumed run may change


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def checkpoints_of(run, folder):
    """{step: file} of a run's checkpoints."""
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        if match := re.fullmatch(rf"{re.escape(run)}_step(\d+)", path.stem):
            found[int(match[1])] = path
    return found


def save(args, record, model, optimizers, about, losses):
    """Write a checkpoint beside its place and rename it; of the run's older ones the newest stays until the run has
    finished. losses: of all steps so far, None when all is over. Rank 0 calls it. Returns None or an OSError."""
    tensors = dict(model.state_dict())
    if losses is not None:
        log = torch.frombuffer(bytearray(record.log.read_bytes()), dtype=torch.uint8)
        tensors.update(losses=torch.tensor(losses), log=log, random=torch.get_rng_state())
        if args.device == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        names = {p: name for name, p in model.named_parameters()}
        for optimizer in optimizers:
            for p, state in optimizer.state.items():
                tensors.update({f"{names[p]}:{key}": t for key, t in state.items()})
    data = safetensors.torch.save({name: t.cpu().contiguous() for name, t in tensors.items()},
                                  metadata=dict(checkpoint=json.dumps(about)))
    folder = Path(args.checkpoints)
    path = folder / f"{record.path.name}_step{about['step']:06d}.safetensors"
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        return OSError(error.errno, f"{error.strerror} (saving a checkpoint)", str(path))
    record.checkpoint = path
    all_steps = checkpoints_of(record.path.name, folder)
    for step in sorted(all_steps)[:-1 if losses is None else -2]:
        all_steps[step].unlink()


def facts_of(path):
    """The facts in a checkpoint's header. Raises ValueError."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["checkpoint"])
        if about["format"] != 2 or "resumed" not in about:
            raise ValueError("an export")
        return about
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is no whole checkpoint ({error})") from error


def another_run(about, args):
    """In words what makes a checkpoint one of another run than this; "" when nothing does."""
    if about["script"] != Path(__file__).name:
        return f"it is of {about['script']}"
    return "; ".join(f"--{key} was {value}, is {getattr(args, key, None)}" for key, value in about["config"].items()
                     if key not in FREE and value != getattr(args, key, None))


def changed(about, sources, data, args):
    """In words why a run cannot go on with these sources and shards; "" when it can."""
    other = [source["name"] for source in about["sources"] + sources
             if (source in about["sources"]) != (source in sources)]
    if other:
        return f"{other[0]} has changed since"
    for split in ("train", "val"):
        before = [shard["sha256"] for shard in about["data"][split]]
        now = [shard["sha256"] for shard in data[split]]
        count = max(len(before), len(now)) if args.order == "shuffled" else min(len(before), len(now))
        if before[:count] != now[:count]:  # in sequence a run opens as many as it needs
            return f"it was trained on other shards than those in {args.data}"
    return ""


def find_checkpoint(args, sources, data):
    """(path, facts) that --resume means: a file, or of the unfinished runs with these flags the one that got furthest.
    None where there is none. Raises ValueError."""
    if args.resume != "auto":
        about = facts_of(args.resume)
        why = another_run(about, args) or about["finished"] and "its run is finished"
        if why := why or changed(about, sources, data, args):
            raise ValueError(f"--resume {args.resume} cannot go on: {why}.")
        return Path(args.resume), about
    found, over = [], set()
    for path in sorted(Path(args.checkpoints).glob("*_step*.safetensors")):
        try:
            about = facts_of(path)
        except ValueError as error:
            tqdm.write(f"--resume auto: {error}: passed over")
            continue
        if about["finished"]:
            over.update([about["run"], *(part["run"] for part in about["resumed"])])
        elif another_run(about, args):
            continue
        elif why := changed(about, sources, data, args):
            tqdm.write(f"--resume auto: {path}: {why}: passed over")
        else:
            found.append((path, about))
    found = [(path, about) for path, about in found if about["run"] not in over]
    if not found:
        tqdm.write(f"--resume auto: no unfinished run with these flags in {args.checkpoints}: from the beginning")
    return max(found, key=lambda pair: pair[1]["step"], default=None)


def resume_point(args, rank, model, data):
    """find_checkpoint's answer, as rank 0 sees it, on every rank."""
    answer = [None]
    if args.resume and rank == 0:
        sources = [about for about, _ in read_sources([Path(__file__), *model.sources])]
        answer = [find_checkpoint(args, sources, data)]
    if args.resume and world_size() > 1:
        dist.broadcast_object_list(answer, device=torch.device(args.device))
    return answer[0]


def restore(path, args, model, optimizers):
    """Bring model, optimisers and random state to those of a checkpoint. Returns its losses."""
    tensors = safetensors.torch.load_file(path)
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    torch.set_rng_state(tensors["random"])
    if args.device == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"])
    owners = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            owners.update(dict.fromkeys(group["params"], optimizer))
    parameters = dict(model.named_parameters())
    for name in tensors:
        if ":" in name:
            p = parameters[name.split(":")[0]]
            owners[p].state[p][name.split(":")[1]] = tensors[name].to(args.device)
    return tensors["losses"].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Learning rate [shared]


def rate(step, args):
    """Factor on every learning rate at a step: linear rise, constant, then linear to 0 over the last warmdown_steps."""
    rise = (step + 1) / (args.warmup_steps + 1) if step < args.warmup_steps else 1.0
    fall = (args.steps - step) / min(args.steps, max(1, args.warmdown_steps))
    return min(rise, fall, 1.0)


def momentum(step, args):
    """Muon's momentum: from 0.85 to 0.95 over the first muon_warmup steps."""
    return 0.85 + 0.10 * min(1.0, step / max(1, args.muon_warmup))


def schedule(optimizers, step, args):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate(step, args)
            if isinstance(optimizer, Muon):
                group["momentum"] = momentum(step, args)


# ----------------------------------------------------------------------------------------------------------------------
# Command line [shared]

CHOICES = dict(
    track=("fineweb", "tiny"), order=("sequential", "shuffled"), muon_scale=("spectral", "rms"),
    device=("auto", "cuda", "cpu"), dtype=("auto", "bf16", "mixed", "fp32"), kernel=("auto", "torch", "cpu", "cuda"))
RANGES = {  # every other number: 0 to 2^31
    (1, 2**31): "steps bsz device_bsz seq_len epochs val_every val_tokens vocab_size layers width headsz",
    (0, 10): "muon_lr adam_lr ln_lr emb_lr head_lr lambda_lr", (0, 1 - 1e-9): "adam_beta2", (0.1, 2**31): "ffn_ratio",
    (0, 2**63 - 1): "random_seed"}


def parse(argv=None):
    """Hyperparameters from the command line, a flag a field. A bad one ends the program: one line, status 2."""
    parser = argparse.ArgumentParser(prog=Path(__file__).name, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (all flags: --help)\n")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(Hyperparameters), re.MULTILINE))
    for f in fields(Hyperparameters):
        tiny = f", tiny {TINY[f.name]}" if f.name in TINY else ""
        text = f"{comments[f.name]} [{f.default or 'none' if f.type is str else f.default}{tiny}]".replace("%", "%%")
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        else:
            how = dict(type=f.type, choices=CHOICES.get(f.name), metavar=f.type.__name__.upper())
        parser.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(argv))
    args = Hyperparameters(**{**(TINY if given.get("track") == "tiny" else {}), **given})
    limits = {}
    for pair, names in RANGES.items():
        limits.update(dict.fromkeys(names.split(), pair))
    for f in fields(args):
        value, (least, most) = getattr(args, f.name), limits.get(f.name, (0, 2**31))
        if f.type in (int, float) and not least <= value <= most:  # nor is nan
            parser.error(f"--{f.name} {value} is not in the range from {least} to {most:.10g}")
    return args


def stop(message):
    """End the program: a line on stderr, exit status 1, no traceback."""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)  # if rank 0 says the same, the launcher ends this rank meanwhile
    print(f"{Path(__file__).name}: {f'rank {rank}: ' if rank > 0 else ''}{message}", file=sys.stderr)
    raise SystemExit(1)


def has_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware (on a CPU: AVX512-BF16 or AMX)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve(args):
    """Fix what "auto" means on this machine. Raises ValueError with the way out."""
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise ValueError("--device cuda: torch sees no CUDA device. Use --track tiny --device cpu.")
    if args.device == "auto" and args.track == "fineweb" and not cuda:
        raise ValueError("track fineweb needs a CUDA device and torch sees none. "
                         "On this machine run --track tiny (or insist with --device cpu: months, not minutes).")
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"
    if args.dtype == "auto":
        args.dtype = ("bf16" if args.device == "cuda" else "mixed") if has_bf16(args.device) else "fp32"
    if args.order == "shuffled" and args.track == "fineweb":
        raise ValueError("--order shuffled is for --track tiny; track fineweb reads every token once, in sequence.")
    if args.stop_after > args.steps:
        raise ValueError(f"--stop_after {args.stop_after} is more than --steps {args.steps}.")


# ----------------------------------------------------------------------------------------------------------------------
# Main [shared]

ACTIVE_LIMIT = 124_000_000  # parameters a token may use on track fineweb
TARGET = {"fineweb": 3.28}  # validation loss in nats a token
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "H800": 989e12, "A100": 312e12,
              "A800": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, from the makers' data sheets


class Signals:
    """SIGINT and SIGTERM: in the training loop the first asks for an end after the step; else the run ends at once.
    What comes within ten seconds counts once, since a launcher passes on what the ranks have got already."""

    def __init__(self):
        self.number, self.since, self.patient = 0, 0.0, False

    def __call__(self, number, frame):
        if self.number and time.monotonic() - self.since < 10:  # a handler waits while Python waits for the device
            return
        first, self.number, self.since = not self.number, self.number or number, time.monotonic()
        if not (first and self.patient):
            raise KeyboardInterrupt


signals = Signals()


def all_sum(tensor):
    """Sum over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def train_step(model, optimizers, inputs, targets, args):
    """One optimiser step on this rank's share (n, T), n >= 1. Returns, on the device, the mean loss of the global
    batch and the number of ranks asked to stop (2,)."""
    total = torch.zeros((), device=inputs.device)
    parts = -(-len(inputs) // args.device_bsz)  # micro-batches, as equal as it goes: few shapes to compile
    for i, (x, y) in enumerate(zip(inputs.tensor_split(parts), targets.tensor_split(parts))):
        if world_size() > 1:  # the ranks' gradients meet once, with the last micro-batch
            model.require_backward_grad_sync = i == parts - 1
        loss = model(x, y) * (len(x) / args.bsz)
        (loss * world_size()).backward()  # DistributedDataParallel takes the mean over the ranks
        total += loss.detach()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    asked = torch.full_like(total, float(signals.number > 0))
    return all_sum(torch.stack([total, asked]))


def validation_set(stream, args, rank):
    """This rank's validation (inputs, targets) on the device, padded to whole micro-batches with targets -100."""
    first, last = share(min(args.val_tokens, len(stream) - 1) // args.seq_len, rank)
    inputs, targets = sequences(stream, first, last, args.seq_len)
    pad = (0, 0, 0, -(last - first) % args.device_bsz)
    return F.pad(inputs, pad).to(args.device), F.pad(targets, pad, value=-100).to(args.device)


@torch.no_grad()
def validate(model, val, args):
    """Mean loss in nats a token over the validation sequences of all ranks; None when a rank was asked to stop."""
    total = torch.zeros(3, dtype=torch.float64, device=args.device)  # sum of losses, number of targets, ranks asked
    for x, y in zip(*(t.split(args.device_bsz) for t in val)) if len(val[0]) else ():  # more ranks than sequences
        if signals.number:
            break
        count = (y >= 0).sum()
        total[:2] += torch.stack([model(x, y).double() * count, count.double()])
    total[2] = float(signals.number > 0)
    loss, count, asked = all_sum(total).tolist()
    return None if asked else loss / count


def state_hash(model):
    """sha256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def warm_up(model, compiled, optimizers, val, count, args):
    """Compile and allocate with `count` random sequences a step, then restore parameters, buffers, optimisers and
    random state. Returns the state's hash; raises RuntimeError when it is not the one from before."""
    before = state_hash(model)
    saved = {name: t.detach().clone() for name, t in model.state_dict().items()}
    saved_optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(args.random_seed)
    with torch.random.fork_rng([torch.cuda.current_device()] if args.device == "cuda" else []):
        validate(compiled, [torch.zeros_like(t[:args.device_bsz]) for t in val], args)
        for step in range(2):
            schedule(optimizers, step, args)
            tokens = torch.randint(args.vocab_size, (count, args.seq_len + 1), generator=generator).to(args.device)
            train_step(compiled, optimizers, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), args)
    model.load_state_dict(saved)
    for optimizer, state in zip(optimizers, saved_optimizers):
        optimizer.load_state_dict(state)
    if state_hash(model) != before or any(optimizer.state for optimizer in optimizers):
        raise RuntimeError("the warm-up left a trace in the model or its optimisers; a run must not start from it")
    return before


def check_cover(model, optimizers):
    """Every parameter in exactly one optimiser, or ValueError with its name."""
    count = collections.Counter()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            count.update(map(id, group["params"]))
    wrong = [f"{name} by {count[id(p)]}" for name, p in model.named_parameters() if count[id(p)] != 1]
    if wrong or sum(count.values()) != len(list(model.parameters())):
        raise ValueError(f"every parameter must be in exactly one optimiser; not so: {', '.join(wrong) or 'strangers'}")


def open_data(args, rank):
    """(train stream, val stream, their facts for the record: {} but for local rank 0, which checks every token on its
    machine). Raises ValueError."""
    steps, T = args.stop_after or args.steps, args.seq_len
    need = steps * args.bsz * T + 1
    train = TokenStream(args.data, "train", need if args.order == "sequential" else math.inf)
    val = TokenStream(args.data, "val", args.val_tokens + 1)
    there = len(train) if args.order == "sequential" else chunks(len(train), args) * T + 1
    if need > there * args.epochs - (args.epochs - 1) * (args.order == "shuffled"):
        raise ValueError(f"{steps} steps need {need:,} train tokens; {args.data} has {there:,} for --order "
                         f"{args.order}, at --epochs {args.epochs}. Fewer --steps, more --epochs or more text: "
                         f"{where_from(args.data, need)}")
    if args.track == "fineweb" and len(val) <= args.val_tokens:
        raise ValueError(f"{args.val_tokens:,} validation tokens need one more; {args.data} has {len(val):,}. "
                         f"{where_from(args.data, need)}")
    if min(args.val_tokens, len(val) - 1) < T:
        raise ValueError(f"--val_tokens {args.val_tokens} of the {len(val)} in the val shards of {args.data} make no "
                         f"sequence of {T}. Give more text, a larger --val_tokens or a smaller --seq_len.")
    manifest = Path(args.data) / "manifest.json"
    try:
        about = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
        vocab, listed = about.get("vocab_size"), {shard["name"]: shard["sha256"] for shard in about.get("shards", ())}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} is damaged ({error}). Make the data again, or delete this file.") from error
    if vocab not in (None, args.vocab_size):
        raise ValueError(f"{args.data} holds tokens of {about.get('tokenizer')}, {vocab} ids; the model has "
                         f"--vocab_size {args.vocab_size}. Use --vocab_size {vocab}, or data of another tokenizer.")
    if int(os.environ.get("LOCAL_RANK", rank)) != 0 or args.check:
        return train, val, {}
    shards = [stream.fingerprint(args.vocab_size, about.get("shards", ())) for stream in (train, val)]
    for shard in (s for s in shards[0] + shards[1] if listed and listed.get(s["name"]) != s["sha256"]):
        raise ValueError(f"{Path(args.data) / shard['name']} is not what manifest.json lists: damaged, or of another "
                         "tokenizer? Make the data again, or delete manifest.json if you vouch for every shard.")
    return train, val, dict(folder=str(args.data), train=shards[0], val=shards[1], manifest=about or None)


def text_bytes(args, tokens):
    """Bytes of text that tokens stand for, by token_bytes.bin in the data folder (a uint8 a token id), or None."""
    path = Path(args.data) / "token_bytes.bin"
    if not path.exists():
        return None
    lengths = np.fromfile(path, np.uint8)
    return int(lengths[tokens[tokens < len(lengths)]].sum(dtype=np.int64))


def same_shards(described, args):
    """Raise ValueError where the shards of a machine are not those of rank 0. described: {} but for local ranks 0."""
    shards = {shard["name"]: shard["sha256"] for shard in described.get("train", []) + described.get("val", [])}
    machines = [None] * world_size()
    dist.all_gather_object(machines, (platform.node(), shards))
    for node, theirs in machines:
        if theirs and theirs != machines[0][1]:
            name = min(name for name, _ in theirs.items() ^ machines[0][1].items())
            raise ValueError(f"{Path(args.data) / name} on {node} is not that of rank 0: damaged, or made elsewhere? "
                             "Fetch or copy it again.")


def out_of_memory(error, args):
    """A line with the next smaller --device_bsz if it is memory that ran out, else None."""
    if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error))):
        return None
    now = min(args.device_bsz, -(-args.bsz // world_size()))
    way_out = f"--device_bsz {now // 2} (the same losses)" if now > 1 else "a shorter --seq_len or a smaller model"
    return f"out of memory with {now} x {args.seq_len} tokens at a time on a device; next to try: {way_out}"


def set_up(args, rank):
    """Device, data, model and optimisers, checked before anything is written or timed. Raises ValueError, OSError."""
    local_rank, alone = int(os.environ.get("LOCAL_RANK", 0)), world_size() == 1 or args.check
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*|", args.name):
        raise ValueError(f"--name {args.name!r}: letters, digits, '-', '_' and '.' only; it becomes a folder's name.")
    resolve(args)
    device = torch.device(args.device, local_rank) if args.device == "cuda" else torch.device(args.device)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    if args.bsz < world_size():
        raise ValueError(f"--bsz {args.bsz} leaves some of {world_size()} processes without a sequence: start fewer, "
                         "NPROC=1 for one, or give a larger --bsz.")
    if not alone:
        on_gpu = dict(backend="nccl", device_id=device) if args.device == "cuda" else dict(backend="gloo")
        dist.init_process_group(**on_gpu)
    data = open_data(args, rank)
    if not alone:
        same_shards(data[2], args)  # nothing is written before every machine has checked its own
    torch.manual_seed(args.random_seed)
    model = build_model(args)
    model.to(device)
    optimizers = build_optimizers(model, args)
    check_cover(model, optimizers)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    active = sum(size for name, size in sizes.items() if name not in model.lookups)
    if args.track == "fineweb" and active > ACTIVE_LIMIT:
        raise ValueError(f"{active:,} parameters are active per token; track fineweb allows {ACTIVE_LIMIT:,}. "
                         "Make --width, --layers or --ffn_ratio smaller.")
    return device, data, model, optimizers, dict(parameters=sum(sizes.values()), active=active)


def begin(args, record, device, described, model, counts, start):
    """Write the record's header. Returns the facts of the run that its result repeats."""
    sources = read_sources([Path(__file__), *model.sources])
    facts = dict(
        schema=SCHEMA, run=record.path.name, script=Path(__file__).name, seed=args.random_seed, config=asdict(args),
        command=[Path(__file__).name, *sys.argv[1:]], environment=environment(),
        hardware=hardware(device), data=described,
        model=dict(counts, flops_per_token=model.flops_per_token(counts["active"])),
        sources=[about for about, _ in sources])
    if start:
        part = {key: start[1][key] for key in ("run", "step", "began", "saved")}
        facts["resumed"] = [*start[1]["resumed"], part]
    record.header(facts, sources)
    return facts


def prepare(model, args):
    """The model compiled on a GPU, and its gradients averaged over the ranks where there are several."""
    if args.compile and args.device == "cuda" and getattr(args, "kernel", "") != "torch":  # its unrolled loop: minutes
        model = torch.compile(model, fullgraph=True, dynamic=False)
    if world_size() > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def run(args, rank, record, clock, data, model, optimizers, counts, start=None):
    """Warm-up, training and validation, and the record of it. start: resume_point's answer."""
    (train, val, described), tokens_a_step, (first, end) = data, args.bsz * args.seq_len, share(args.bsz, rank)
    say = tqdm.write if rank == 0 else lambda text: None
    done, curve, losses = 0, [], []
    facts = begin(args, record, clock.device, described, model, counts, start) if rank == 0 else None
    say(f"{counts['parameters']:,} parameters, {counts['active']:,} active per token; {args.steps} steps of "
        f"{tokens_a_step:,} tokens on {world_size()} x {args.device} in {args.dtype}")

    clock.switch("warm-up")
    val_batches = validation_set(val, args, rank)
    compiled = prepare(model, args)
    digest = warm_up(model, compiled, optimizers, val_batches, end - first, args)
    if start:
        done, curve, record.checkpoint = start[1]["step"], start[1]["curve"], start[0]
        losses = restore(start[0], args, model, optimizers)
        say(f"resumed from {start[0]}: after step {done} of {args.steps}")
    gc.collect()
    clock.switch("rest")
    record.line(f"warm-up: 2 steps and a validation batch of random tokens in {clock.seconds['warm-up']:.1f} s; model, "
                f"optimisers and random state restored; sha256 of the parameters before and after: {digest}")
    say(f"ready after {clock.seconds['rest'] + clock.seconds['warm-up']:.1f} s, none of them counted as training")

    for phase, seconds in start[1]["clock"].items() if start else ():
        clock.seconds[phase] += seconds
    lines = StepLines(record, args, losses)
    stopping, failure, signals.patient = False, None, True
    bar = tqdm(total=args.steps, initial=done, unit="step", file=sys.stdout, disable=rank != 0, dynamic_ncols=True,
               mininterval=0.2 if sys.stdout.isatty() else 10)
    for step in range(done, args.steps + 1):
        due = (step % args.val_every == 0 or step == args.steps) and not (curve and curve[-1]["step"] == step)
        if due and not stopping:
            clock.switch("validation")
            lines.flush()
            loss = validate(compiled, val_batches, args)
            stopping = loss is None
        if due and not stopping:
            record.line(f"step:{step}/{args.steps} val_loss:{loss:.4f} {timing(clock.train_ms(), step)}")
            curve.append(dict(step=step, val_loss=loss, train_ms=clock.train_ms(), tokens=step * tokens_a_step,
                              log_sha256=record.chain.hexdigest()))
            say(f"step {step}/{args.steps}  validation loss {loss:.4f}  {clock.train_ms() / 1e3:.1f} s of training")
        last = stopping or step >= (args.stop_after or args.steps)
        finished = step == args.steps and not stopping
        if finished or step > done and (last or args.save_every and step % args.save_every == 0):
            clock.switch("saving")
            lines.flush()
            if bad := [name for name, t in model.state_dict().items() if not t.isfinite().all()]:
                lines.fail(step, f"{bad[0]} is not finite")
            if rank == 0:
                about = checkpoint_facts(facts, step, finished, clock, curve, record)
                failure = save(args, record, model, optimizers, about, None if finished else lines.losses)
            failed = all_sum(torch.tensor(float(failure is not None), device=args.device)).item()
            if failed and not finished:
                raise failure or OSError("rank 0 could not save a checkpoint")
        if last:
            break
        if clock.phase != "train":
            clock.switch("train")
        schedule(optimizers, step, args)
        lines.add(step + 1, train_step(compiled, optimizers, *batch(train, step, args, rank), args), clock.train_ms())
        stopping = lines.stopping
        bar.set_postfix_str(f"loss {lines.last:.3f}", refresh=False)
        bar.update()
    bar.close()
    clock.switch("rest")
    signals.patient = False
    if failure:
        record.line(f"checkpoint: {failure}")
    losses = base64.b64encode(np.array(lines.losses, "<f4").tobytes()).decode()
    record.line(f"losses: {json.dumps(dict(float32=losses))}")

    if stopping:
        raise KeyboardInterrupt(f" after step {step} of {args.steps}, checkpoint {record.checkpoint or 'none'}")
    if step < args.steps:
        log = record.close(f"stopped after step {step} of {args.steps}")
        say(f"stopped after step {step} of {args.steps}: a beginning to compare with, not a result; the log: {log}")
    elif rank == 0:
        conclude(record, report(facts, clock, curve, val, len(train), args))
        if failure:
            leave_together()
            stop(f"the record is whole, but there is no checkpoint of the last step: {failure}")


def conclude(record, result):
    """Write the end of the record, and say what came out."""
    record.line(f"curve: {json.dumps(dict(points=result['curve']))}")
    record.line(f"clock: {json.dumps(result['clock'])}\nwall: {json.dumps(result['wall'])}")
    record.line(f"result: {json.dumps(result['final'])}")
    record.finish(result)
    tqdm.write(f"record: {record.path}/")
    summary = Path(__file__).parent / "records" / "report.py"
    if summary.exists():
        subprocess.run([sys.executable, summary, "--summary", record.path])


def checkpoint_facts(facts, step, finished, clock, curve, record):
    """What a checkpoint's header says."""
    tokenizer = {key: (facts["data"]["manifest"] or {}).get(key) for key in ("tokenizer", "tokenizer_sha256")}
    about = {key: facts[key] for key in ("script", "run", "config", "sources", "data")}
    return dict(about, format=2, step=step, finished=finished, **tokenizer, began=clock.began, saved=time.time(),
                clock=clock.seconds, curve=curve, log_sha256=record.chain.hexdigest(),
                resumed=facts.get("resumed", []))


def report(facts, clock, curve, val, train_tokens, args):
    """result.json: the facts of the run and its final figures. Times in s, memory in bytes, rates per second."""
    wall = dict(began=clock.began, ended=time.time())
    seconds, tokens = clock.seconds["train"], args.steps * args.bsz * args.seq_len
    loss = curve[-1]["val_loss"]
    flops = facts["model"]["flops_per_token"] * tokens / seconds
    peak = [value for name, value in PEAK_FLOPS.items() if name in facts["hardware"]["name"] and args.dtype == "bf16"]
    if args.device == "cuda":
        memory = dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        memory = dict(resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    targets = val.read(1, min(args.val_tokens, len(val) - 1) // args.seq_len * args.seq_len)
    text = text_bytes(args, targets)
    final = dict(
        val_loss=loss, bits_per_byte=loss * len(targets) / text / math.log(2) if text else None,
        val_tokens=len(targets), text_bytes=text or None, steps=args.steps, tokens=tokens,
        epochs=tokens / train_tokens, train_seconds=seconds,
        step_avg_ms=1e3 * seconds / args.steps, tokens_per_second=tokens / seconds, flops_per_second=flops,
        mfu=flops / (world_size() * max(peak)) if peak else None, peak_memory=memory,
        target=TARGET.get(args.track), reached=loss <= TARGET[args.track] if args.track in TARGET else None)
    return dict(facts, clock=dict(clock.seconds), wall=wall, curve=curve, final=final, end="finished")


def main(argv=None):
    """A run. What is foreseen to go wrong ends in a line on stderr and in the log, anything else in a traceback."""
    signals.__init__()
    signal.signal(signal.SIGINT, signals)
    signal.signal(signal.SIGTERM, signals)
    clock, args, record = Clock(), parse(argv), None
    rank = int(os.environ.get("RANK", 0))
    try:
        clock.device, data, model, optimizers, counts = set_up(args, rank)
        if args.check:
            return
        start, log = resume_point(args, rank, model, data[2]), b""
        if start and rank == 0:
            with safetensors.safe_open(start[0], "pt") as file:
                log = file.get_tensor("log").numpy().tobytes()
        record = Record(args, rank, log)
        run(args, rank, record, clock, data, model, optimizers, counts, start)
        leave_together()
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(signals.number or signal.SIGTERM)  # the rank that the signal did not reach follows
        log = record.close(f"interrupted by {number.name}{interrupt}") if record else None
        if rank == 0:
            print(f"\n{Path(__file__).name}: interrupted{interrupt}; the log: {log or 'not begun'}", file=sys.stderr)
        if interrupt.args:  # all ranks ended after the same step
            leave_together()
        raise SystemExit(128 + number)
    except Exception as error:
        memory = out_of_memory(error, args)
        foreseen = memory or isinstance(error, (OSError, Diverged)) or isinstance(error, ValueError) and not record
        short = memory or (str(error).removesuffix(".") if foreseen else f"{type(error).__name__}: {error}")
        if isinstance(error, OSError):
            short += ". Make room, set permissions or choose --records FOLDER or --checkpoints FOLDER"
        log = record.close(f"failed: {short}") if record else None
        if foreseen:
            stop(f"{short}{f'; the log: {log}' if log else ''}.")
        raise


def leave_together():
    """The ranks have all come to their end: none closes its connections while another still needs them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if world_size() > 1:  # all is written; a thread of the process group can abort the interpreter's shutdown
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
