"""Train RWKV-7 "Goose" (arXiv 2503.14456), an RNN that trains like a transformer: a race to 3.28 on FineWeb.

Track fineweb: 12 layers, 768 wide, at most 124M parameters active per token, 3200 steps of 524288 tokens, on GPUs.
Track tiny:    the same script on bytes of text, about 1M parameters, two minutes on a laptop's CPU; no GPU, no network.

    8 GPUs   ./run_rwkv7.sh --adam_lr 0.0026 --fast_cuda (torchrun --standalone --nproc_per_node=8 train_rwkv7.py ...)
    1 GPU    ./run_rwkv7.sh --device_bsz 32              (python train_rwkv7.py ...; the same run, only longer)
    CPU      ./run_rwkv7.sh --track tiny                 (python data/pydocs.py; python train_rwkv7.py --track tiny)

Claims: on fineweb none yet (the public 3.2756 after 3200 steps, of 2024-11-09, is an earlier RWKV-7's, before x070); on
tiny the table of README.md, from the runs in records/. Stands alone but for its kernels; records/report.py sums up.
"""

import argparse
import base64
import collections
import contextlib
import functools
import gc
import hashlib
import inspect
import itertools
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
from dataclasses import dataclass, fields
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: a quiet end

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
    steps: int = 3200  # optimiser steps
    stop_after: int = 0  # end after so many steps, to compare beginnings, without a result; 0: no
    warmdown_steps: int = 914  # last steps, over which every learning rate falls linearly to 0
    warmup_steps: int = 0  # first steps, over which every learning rate rises linearly
    bsz: int = 512  # sequences a step, over all devices and micro-batches
    device_bsz: int = 32  # sequences a device takes at once
    seq_len: int = 1024  # tokens a sequence (T)
    epochs: int = 1  # how often the train shards may be read over
    order: str = "sequential"  # of the train tokens: sequential, or shuffled chunks of seq_len
    val_every: int = 125  # steps between validations
    val_tokens: int = 10485760  # validation tokens, the first there are; tiny: at most
    save_every: int = 0  # steps between checkpoints; 0: only after the last step
    resume: str = ""  # checkpoint to go on from: a file, or auto: that of this run if any
    # model
    vocab_size: int = 50257  # token ids in use; tables are padded to a multiple of 128
    layers: int = 12  # blocks (L)
    width: int = 768  # channels (C)
    headsz: int = 64  # channels a head (N)
    ffn_ratio: float = 3.5  # hidden width of channel mixing / C
    x070: bool = False  # plain RWKV-7 x070: turns off the next four additions of the speedrun
    x0_lambdas: bool = True  # each block starts from l0 x + l1 x0, x0 the embedding, l learned
    rms_norm: bool = True  # RMSNorm after the embedding and before the head in place of LN_0 and LN_out
    softcap: float = 30.0  # logits become c tanh(z / c); 0 for none
    zero_head: bool = True  # the head starts at zero
    # learning rates
    muon_lr: float = 0.02  # Muon: matrices of the blocks
    muon_scale: str = "spectral"  # Muon's scale of an update: spectral or rms
    muon_momentum: float = 0.95  # Muon: decay of the momentum; 0.85 at first
    muon_warmup: int = 500  # Muon: steps over which the momentum rises from there
    muon_beta2: float = 0.0  # Muon: decay of the mean square that divides each row (NorMuon); 0: off
    adam_lr: float = 0.0026  # Adam: low-rank pairs and vectors
    ln_lr: float = 0.0090  # Adam: weights and biases of LayerNorm and GroupNorm
    emb_lr: float = 0.3  # Adam: embedding
    head_lr: float = 0.002  # Adam: head
    lambda_lr: float = 0.02  # Adam: lambdas
    adam_beta2: float = 0.95  # Adam: decay of the mean square
    # machine
    device: str = "auto"  # where to train: auto, cuda or cpu
    dtype: str = "auto"  # bf16 (activations, products), mixed (products bf16, the rest fp32), fp32
    compile: bool = True  # torch.compile the model on a GPU
    kernel: str = "auto"  # WKV-7: torch (anywhere), cpu (C++), cuda (exact) or auto (the device's, else torch)
    fast_cuda: bool = False  # WKV-7 on tensor cores, heads of 64 or 128
    wind_cuda: bool = False  # WKV-7 fused with the time mixing around it, on tensor cores, heads of 64
    check: bool = False  # only check flags, machine and data, for WORLD_SIZE ranks, and stop

    def __post_init__(self):
        if self.x070:
            self.x0_lambdas = self.rms_norm = self.zero_head = False
            self.softcap = 0.0


TINY = dict(
    track="tiny", data="data/pydocs", steps=550, warmdown_steps=550, bsz=8, device_bsz=16, seq_len=256, epochs=20,
    order="shuffled", val_every=110, val_tokens=262144, vocab_size=257, layers=2, width=192, headsz=32,
    muon_lr=0.03, muon_momentum=0.85, muon_beta2=0.95, adam_lr=0.005, emb_lr=0.05, head_lr=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# WKV-7 operator
# Per sequence and head, state S (row = value, column = key), S_0 = 0, decay d = exp(-e^{-1/2} sigmoid(w)) > 0.545:
#     u_t = S_{t-1} a_t      S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T      y_t = S_t r_t
# r, w, k, v, a, b, y and the gradients are (B, T, H, N). w is the decay before its activation, since d is too close to
# 1 for bf16; the state and every sum are fp32 whatever the dtype of the inputs.

DECAY_BOUND = 0.6065306597126334  # e^{-1/2}
BUILD = Path(__file__).absolute().parent / "cuda" / "build.py"
CHUNK = 16  # tokens; where keys repeat, small chunks are the accurate ones


def to_chunks(x, value=0.0):
    """(B, T, H, N) -> (chunks, B, H, CHUNK, N), fp32 or fp64; the last chunk is padded."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = F.pad(x, (0, 0, 0, 0, 0, -x.size(1) % CHUNK), value=value)
    return x.unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4).contiguous()


def wkv7_chunked(r, w, k, v, a, b, S=None):
    """y like r and the state after the last token, in fp32 or fp64, from the state S (B, H, N, N) or zero; any T.

    In the letters of cuda/wkv7/chunk.cuh, P_t being the product of a chunk's decays up to its token t:
        A = a P_{t-1}   R = r P_t   B = b / P_t   K = k / P_t   M = (1 - AB)^{-1}, AB = A B^T below the diagonal
        U = M (A S^T + AK V)   Y = R S^T + RB U + RK V   S <- S P_end + U^T B P_end + V^T K P_end
    The part of U that depends on the chunk's first state S is W S^T, so that S <- S step + add.
    """
    R, K, V, A, B = map(to_chunks, (r, k, v, a, b))
    # Padding: d = 1 and the rest 0 keep S. The sigmoid by its logarithm: its gradient is not 0 where 1 - sigmoid is.
    log_d = -DECAY_BOUND * F.logsigmoid(to_chunks(w, -torch.inf)).exp()
    log_P = log_d.cumsum(-2)
    P_end = log_P[..., -1:, :].exp()
    A = A * (log_P - log_d).exp()
    R = R * log_P.exp()
    B = B * (-log_P).exp()
    K = K * (-log_P).exp()
    eye = torch.eye(CHUNK, dtype=V.dtype, device=V.device)
    M = torch.linalg.solve_triangular(eye - (A @ B.mT).tril(-1), eye, upper=False, unitriangular=True)
    W = M @ A
    U = M @ ((A @ K.mT).tril(-1) @ V)
    step = torch.diag_embed(P_end.squeeze(-2)) + W.mT @ (B * P_end)
    add = U.mT @ (B * P_end) + V.mT @ (K * P_end)
    S = torch.zeros_like(add[0]) if S is None else S.to(add.dtype)
    first = []  # states at the chunks' beginnings
    for step_c, add_c in zip(step, add):
        first.append(S)
        S = S @ step_c + add_c
    first = torch.stack(first).mT
    U = U + W @ first
    Y = R @ first + (R @ B.mT).tril() @ U + (R @ K.mT).tril() @ V
    return Y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :r.size(1)].to(r.dtype), S


def empty(what, r):
    """An empty tensor like a state, or like what the forward of a kernel keeps for its backward, at inputs like r."""
    (B, T, H, N), acc_dtype = r.shape, torch.promote_types(r.dtype, torch.float32)
    shape, dtype = dict(state=((B, H, N, N), acc_dtype), none=((0,), acc_dtype),
                        cpu=(r.shape, r.dtype), mix=((2, B * H, T, N), r.dtype),
                        cuda=((B, H, -(-T // 16), N + 16, N), torch.float32),
                        fast=((B, H, -(-T // 64), N, N), torch.bfloat16),
                        wind=((B, H, -(-T // 64), N, N), torch.bfloat16))[what]
    return r.new_empty(shape, dtype=dtype)


@functools.cache
def register(kernel):
    """Make wkv7::<kernel>_forward(r, w, k, v, a, b, s0) -> (y, kept, sT) known to torch.compile, and <kernel>_backward
    as its gradient. cpu takes and gives no states; nor do wind and mix, whose inputs are r w k v a g parameters."""
    forward, backward = (getattr(torch.ops.wkv7, f"{kernel}_{way}").default for way in ("forward", "backward"))
    states, fused = kernel not in ("cpu", "mix", "wind"), kernel in ("mix", "wind")
    n = 7 if fused else 6

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.set_materialize_grads(False)

    def backward_of(ctx, dy, _, dsT=None):  # what is kept for the backward has no gradient of its own
        *inputs, kept = ctx.saved_tensors
        dy = torch.zeros_like(inputs[0]) if dy is None else dy.contiguous()
        grads = list(backward(*inputs, kept, dy, *[None if dsT is None else dsT.contiguous()] * states))
        if fused:
            grads[6] = grads[6].sum(0).transpose(0, 1)  # of parameters: a part for each sequence
        return *grads[:n], *[grads[-1] if inputs[-1] is not None else None] * states

    def fake_forward(r, *_):
        return r.new_empty(r.shape), empty(kernel, r), *[empty("state", r)] * states

    def fake_backward(*inputs):
        r = inputs[0]
        B, T, H, N = r.shape
        grads = [x.new_empty(x.shape) for x in inputs[:n]]
        if fused:
            grads[6] = inputs[6].new_empty(B, H, 7, N)
        return *grads, *[empty("none" if inputs[n] is None else "state", r)] * states

    torch.library.register_fake(forward, fake_forward)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, backward_of, setup_context=setup_context)


@functools.cache
def load_kernel(kernel, *needs):
    """Load the kernel, built by cuda/build.py if need be. needs: flags of build.py that say what it must fit. Returns
    its source files. Raises ValueError; build.py has then said why, once a machine."""
    stderr = None if os.environ.get("LOCAL_RANK", "0") == "0" else subprocess.DEVNULL
    command = [sys.executable, BUILD, "wkv7", kernel, "--json", *needs]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    if done.returncode:
        raise ValueError(f"wkv7 has no kernel {kernel} for this run: see above.")
    facts = json.loads(done.stdout)
    torch.ops.load_library(facts["library"])
    for name in ("cpu", "mix") if kernel == "cpu" else (kernel,):
        register(name)
    return [BUILD.parent.parent / name for name in facts["sources"]]


def choose_kernel(args):
    """(kernel, its source files); "auto": the device's own, else torch. ValueError where the one asked for is not."""
    asked = "wind" if args.wind_cuda else "fast" if args.fast_cuda else args.kernel
    kernel = asked if asked != "auto" else "cpu" if args.device == "cpu" else "cuda"
    if kernel == "torch":
        return kernel, []
    try:
        return kernel, load_kernel(kernel, "--device", args.device, "--headsz", str(args.headsz), "--dtype", args.dtype)
    except ValueError as error:
        if asked != "auto":
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(__file__).name}: {error} Going on with --kernel torch.", file=sys.stderr)
        return "torch", []


def wkv7(r, w, k, v, a, b, kernel="torch", state=None, final=False):
    """y (B, T, H, N) in the dtype of r, by "torch" or a kernel that is loaded, from the state given, (B, H, N, N), or
    zero; with `final` also the state after the last token, fp32. Differentiable in all inputs. Any T, any strides. The
    cpu kernel computes in fp32 and has no states; fast rounds to bf16; cuda takes bf16 and fp32 as they are."""
    if kernel == "torch":
        y, state = wkv7_chunked(r, w, k, v, a, b, state)
        return (y, state) if final else y
    T, dtype = r.size(1), dict(cpu=torch.float32, fast=torch.bfloat16).get(kernel, r.dtype)
    inputs = [x.to(dtype).contiguous() for x in (r, w, k, v, a, b)]
    forward = getattr(torch.ops.wkv7, f"{kernel}_forward")
    if kernel == "cpu":
        if final or state is not None:
            raise ValueError("wkv7: --kernel cpu starts from the zero state and gives no final one; use torch")
        return forward(*inputs)[0].to(r.dtype)
    if T % 16:  # padding: d = 1 and the rest 0 leave the state as it is
        inputs = [F.pad(x, (0, 0, 0, 0, 0, -T % 16), value=-torch.inf if i == 1 else 0) for i, x in enumerate(inputs)]
    if state is not None:
        state = state.to(torch.promote_types(dtype, torch.float32)).contiguous()
    y, _, sT = forward(*inputs, state)
    y = y[:, :T].to(r.dtype)
    return (y, sT) if final else y


def time_mix(r, w, k, v, a, g, parameters, kernel="torch"):
    """WKV-7 and what is around it in a head: r w k v a g and the result (B, T, H, N); parameters w0 a0 k_k k_a r_k and
    the norm's weight and bias (H, N) each. a is the logit of the in-context learning rate, g the gate.
        alpha = sigmoid(a + a0)   kappa = k k_k / |k k_k|   k' = k (1 + (alpha - 1) k_a)
        ((LN(wkv7(r, w + w0, k', v, -kappa, kappa alpha)) ln_w + ln_b) + (sum_n r k' r_k) v) g
    The cpu kernel does it in one operator, in fp32; so does --wind_cuda, between bf16 inputs and results."""
    B, T, H, N = r.shape
    if kernel in ("cpu", "wind"):
        name, dtype = ("mix", torch.float32) if kernel == "cpu" else (kernel, torch.bfloat16)
        inputs = [x.to(dtype).contiguous() for x in (r, w, k, v, a, g)]
        if T % 16 and kernel == "wind":  # padding: d = 1 and the rest 0
            pad = (0, 0, 0, 0, 0, -T % 16)
            inputs = [F.pad(x, pad, value=-torch.inf if i == 1 else 0) for i, x in enumerate(inputs)]
        forward = getattr(torch.ops.wkv7, f"{name}_forward")
        return forward(*inputs, torch.stack(parameters).float())[0][:, :T].to(r.dtype)
    w0, a0, k_k, k_a, r_k, ln_w, ln_b = (p.to(r.dtype) for p in parameters)
    alpha = torch.sigmoid(a0 + a)
    acc_dtype = torch.promote_types(r.dtype, torch.float32)
    kappa = F.normalize((k * k_k).to(acc_dtype), dim=-1, eps=1e-12).to(r.dtype)
    k = k * (1 + (alpha - 1) * k_a)
    y = wkv7(r, w0 + w, k, v, -kappa, kappa * alpha, kernel)
    y = F.group_norm(y.reshape(B * T, H * N), H, ln_w.flatten(), ln_b.flatten(), eps=64e-5).view(B, T, H, N)
    return (y + (r * k * r_k).sum(-1, keepdim=True) * v) * g


# ----------------------------------------------------------------------------------------------------------------------
# Model
#
# B sequences, T tokens, C channels, H heads, N channels a head, L blocks; l counts blocks from 0. Names are x070's.
# Precision: parameters fp32; matrix products in bf16 (dtype bf16, mixed); activations bf16 (dtype bf16) or fp32.


def shift(x):
    """shift(x)_t = x_{t-1}, shift(x)_0 = 0, for x (B, T, C)."""
    return F.pad(x, (0, 0, 1, -1))


class Linear(nn.Linear):
    """y = W x without bias, in `compute` dtype."""

    def __init__(self, rows_in, rows_out, compute):
        super().__init__(rows_in, rows_out, bias=False)
        self.compute = compute

    def forward(self, x):
        return F.linear(x.to(self.compute), self.weight.to(self.compute))


class TimeMixing(nn.Module):
    """att(x): S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T, y_t = S_t r_t, then norm, gate, W_o."""

    def __init__(self, args, l, compute, kernel):
        super().__init__()
        C, L, N = args.width, args.layers, args.headsz
        H = C // N
        self.N, self.l, self.compute, self.kernel = N, l, compute, kernel
        rho0, rho1 = l / max(1, L - 1), 1 - l / L
        i = torch.arange(C)
        lin, position = i / (C - 1) - 0.5, i / C
        z = (i % N - (N - 1) / 2) / ((N - 1) / 2)
        zig = z * z.abs()

        def vector(values):
            return nn.Parameter(values.float().expand(1, 1, C).clone())

        def mu(power):
            return vector(1 - position ** (power * rho1))

        def low_rank(factor):  # C = 768: factor 2.5 is rank 64, 1.7 is 32, 5 is 128
            size = max(32, round(factor * C ** 0.5 / 32) * 32)
            second = torch.empty(size, C)
            nn.init.orthogonal_(second, gain=0.1 * max(1, size / C) ** 0.5)
            return nn.Parameter(torch.zeros(C, size)), nn.Parameter(second)

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = map(mu, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2))
        self.w0 = vector(-6 + 6 * (i / (C - 1)) ** (1 + rho0 ** 0.3) + 0.5 + 2.5 * zig)
        self.w1, self.w2 = low_rank(2.5)
        self.a0 = vector(-0.19 + 0.3 * zig + 0.4 * lin)
        self.a1, self.a2 = low_rank(2.5)
        if l > 0:  # layer 0 defines v_first and mixes nothing in
            self.v0 = vector(0.73 - 0.4 * lin)
            self.v1, self.v2 = low_rank(1.7)
        self.g1, self.g2 = low_rank(5)
        self.k_k = vector(0.71 - 0.1 * lin)
        self.k_a = vector(torch.tensor(1.02))
        self.r_k = nn.Parameter(torch.full((H, N), -0.04))

        self.receptance, self.key, self.value, self.output = (Linear(C, C, compute) for _ in range(4))
        for linear, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            nn.init.uniform_(linear.weight, -bound / C ** 0.5, bound / C ** 0.5)
        nn.init.zeros_(self.output.weight)
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5)
        nn.init.constant_(self.ln_x.weight, ((1 + l) / L) ** 0.7)

    def forward(self, x, v_first):
        B, T, C = x.shape

        def cast(p):
            return p.to(x.dtype)

        def product(t, W):
            return cast(t.to(self.compute) @ W.to(self.compute))

        xx = shift(x) - x
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, xx, cast(mu)) for mu in
                                  (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g))  # (B, T, C) each
        r, k, v = (linear(t).to(x.dtype) for linear, t in ((self.receptance, xr), (self.key, xk), (self.value, xv)))
        w = product(torch.tanh(product(xw, self.w1)), self.w2)  # pre-activation of the decay, without w0
        a = product(product(xa, self.a1), self.a2)
        g = product(torch.sigmoid(product(xg, self.g1)), self.g2)
        if self.l == 0:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(cast(self.v0) + product(product(xv, self.v1), self.v2)))
        parameters = self.w0, self.a0, self.k_k, self.k_a, self.r_k, self.ln_x.weight, self.ln_x.bias
        inputs = [t.view(B, T, -1, self.N) for t in (r, w, k, v, a, g)]  # (B, T, H, N) each
        y = time_mix(*inputs, [p.view(-1, self.N) for p in parameters], self.kernel)
        return self.output(y.reshape(B, T, C)), v_first


class ChannelMixing(nn.Module):
    """ffn(x) = W_value relu(W_key (x + (shift(x) - x) x_k))^2."""

    def __init__(self, args, l, compute):
        super().__init__()
        C, hidden = args.width, round(args.ffn_ratio * args.width / 32) * 32
        self.x_k = nn.Parameter((1 - (torch.arange(C) / C) ** ((1 - l / args.layers) ** 4)).view(1, 1, C))
        self.key, self.value = Linear(C, hidden, compute), Linear(hidden, C, compute)
        nn.init.uniform_(self.key.weight, -0.5 / C ** 0.5, 0.5 / C ** 0.5)
        nn.init.zeros_(self.value.weight)

    def forward(self, x):
        x = torch.addcmul(x, shift(x) - x, self.x_k.to(x.dtype))
        return self.value(torch.relu(self.key(x)).square())


class LayerNorm(nn.LayerNorm):
    """LayerNorm with fp32 parameters, in x's dtype."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """x = l0 x + l1 x0;  x += att(LN_1(x));  x += ffn(LN_2(x))."""

    def __init__(self, args, l, compute, kernel):
        super().__init__()
        if l == 0 and not args.rms_norm:
            self.ln0 = LayerNorm(args.width)
        if args.x0_lambdas:
            self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.ln1, self.ln2 = LayerNorm(args.width), LayerNorm(args.width)
        self.att = TimeMixing(args, l, compute, kernel)
        self.ffn = ChannelMixing(args, l, compute)

    def forward(self, x, x0, v_first):
        if hasattr(self, "lambdas"):
            x = (self.lambdas[0] * x + self.lambdas[1] * x0).to(x.dtype)
        y, v_first = self.att(self.ln1(x), v_first)
        x = x + y
        return x + self.ffn(self.ln2(x)), v_first


class RWKV7(nn.Module):
    """loss = model(inputs, targets): mean cross-entropy in nats over the targets >= 0, all (B, T) int64."""

    lookups = ("emb.weight",)  # tables of which a token uses one row

    def __init__(self, args, kernel):
        super().__init__()
        C, V = args.width, -(-args.vocab_size // 128) * 128
        compute = torch.float32 if args.dtype == "fp32" else torch.bfloat16
        self.activations = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        self.args = args
        self.emb = nn.Embedding(V, C)  # starts N(0, 1): only its direction counts after the RMSNorm
        self.blocks = nn.ModuleList([Block(args, l, compute, kernel) for l in range(args.layers)])
        if not args.rms_norm:
            nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
            self.ln_out = LayerNorm(C)
        self.head = Linear(C, V, compute)
        if args.zero_head:
            nn.init.zeros_(self.head.weight)
        else:
            nn.init.orthogonal_(self.head.weight, gain=0.5 * (V / C) ** 0.5)

    def logits(self, inputs):
        """(B, T) int64 -> (B, T, V) fp32."""
        def rms(x):
            return F.rms_norm(x, (x.size(-1),))

        x = self.emb(inputs).to(self.activations)  # (B, T, C)
        x = x0 = rms(x) if self.args.rms_norm else self.blocks[0].ln0(x)
        v_first = None
        for block in self.blocks:
            x, v_first = block(x, x0, v_first)
        z = self.head(rms(x) if self.args.rms_norm else self.ln_out(x)).float()
        return self.args.softcap * torch.tanh(z / self.args.softcap) if self.args.softcap else z

    def forward(self, inputs, targets):
        logits = self.logits(inputs)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    def flops_per_token(self, active):
        """Training FLOPs: 6 an active parameter; the mixing 9 N forward and 18 N backward a channel and block."""
        return 6 * active + 27 * self.args.headsz * self.args.width * self.args.layers


def build_model(args):
    """The model on the default device, seeded by the caller. Raises ValueError when the flags do not fit together."""
    if args.fast_cuda and args.wind_cuda:
        raise ValueError("--fast_cuda or --wind_cuda, the larger fusion, but not both.")
    if args.headsz < 1 or args.width % args.headsz:
        raise ValueError(f"--headsz {args.headsz}: --width {args.width} is not a multiple of it.")
    args.kernel, sources = choose_kernel(args)
    model = RWKV7(args, args.kernel)
    model.sources = sources
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Parameter groups


def build_optimizers(model, args):
    """[Adam, Muon] over every parameter exactly once. Raises ValueError."""
    def group_of(name):
        leaf = f".{name}".split(".")[-2:]
        if name in ("emb.weight", "head.weight"):
            return name.split(".")[0]
        if leaf[0] in ("receptance", "key", "value", "output"):
            return "muon"
        if leaf[0] in ("ln0", "ln1", "ln2", "ln_x", "ln_out"):
            return "norm"
        if leaf[1] == "lambdas":
            return "lambdas"
        if leaf[1] in ("r_k", "k_k", "k_a", "v0", "v1", "v2", "w0", "w1", "w2", "a0", "a1", "a2", "g1", "g2") or (
                leaf[1].startswith("x_")):
            return "w0" if args.x070 and leaf[1] == "w0" else "vectors"  # x070 trains w0 at twice the rate
        raise ValueError(f"parameter {name} belongs to no optimiser group: see build_optimizers")

    rates = dict(emb=args.emb_lr, head=args.head_lr, vectors=args.adam_lr, w0=2 * args.adam_lr, norm=args.ln_lr,
                 lambdas=args.lambda_lr, muon=args.muon_lr)
    groups = {group: dict(name=group, params=[], lr=lr) for group, lr in rates.items()}
    for name, p in model.named_parameters():
        groups[group_of(name)]["params"].append(p)
    # Until the blocks' outputs, which start at 0, have grown, the gradient of these numbers is rounding alone. An eps
    # above it keeps Adam from making steps of that, which differ with the number of ranks.
    groups["lambdas"]["eps"] = 1e-5
    muon = groups.pop("muon")
    adam = [group for group in groups.values() if group["params"]]
    adam = torch.optim.Adam(adam, betas=(0.9, args.adam_beta2), fused=True)
    return [adam, Muon([muon], lr=args.muon_lr, scale=args.muon_scale, beta2=args.muon_beta2,
                       bf16=args.dtype != "fp32")]


# ----------------------------------------------------------------------------------------------------------------------
# Muon optimizer [shared]

RANK = int(os.environ.get("RANK", 0))  # of this process, as torchrun counts
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def newton_schulz(G, steps=5):
    """Replace the singular values of each matrix by values in about [0.7, 1.2], by the quintic iteration of Keller
    Jordan's Muon (2024): a batch (n, rows, cols), rows <= cols, in the dtype of G."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
    return X


def over_ranks(function, batch):
    """function(batch) (n, ...), of which each rank computes a slice; all of them get the whole."""
    if WORLD_SIZE == 1:
        return function(batch)
    n = -(-len(batch) // WORLD_SIZE)
    padding = batch[-1:].expand(n * WORLD_SIZE - len(batch), *batch.shape[1:])
    part = function(torch.cat([batch, padding])[RANK * n:(RANK + 1) * n])
    result = part.new_empty(n * WORLD_SIZE, *batch.shape[1:])
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 or 2.11
    all_gather(result, part.contiguous())
    return result[:len(batch)]


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's look-ahead, orthogonalised by Newton-Schulz: W <- W - lr s NS(G + mu M), M <- mu M + G.

    params: matrices (rows, cols). scale: "spectral" s = sqrt(max(1, rows/cols)) or "rms" s = sqrt(max(rows, cols)).
    Matrices of equal shape (up to transposition) go through Newton-Schulz as one batch, a slice a rank. The momenta M
    are whole on every rank. beta2 > 0: each row of the update is divided by the root of its mean square v, averaged
    over the steps, and the whole brought back to its norm (NorMuon, arXiv 2510.05491).
    """

    def __init__(self, params, lr, momentum=0.95, scale="spectral", beta2=0.0, bf16=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, scale=scale, beta2=beta2))
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

    def update(self, matrices, lr, momentum, scale, beta2, **_):
        for p in matrices:
            if "M" not in self.state[p]:
                self.state[p]["M"] = torch.zeros_like(p)
                if beta2:
                    self.state[p]["v"] = p.new_zeros(len(p), 1)
        G = [p.grad for p in matrices]
        M = [self.state[p]["M"] for p in matrices]
        torch._foreach_mul_(M, momentum)
        torch._foreach_add_(M, G)
        G = torch._foreach_add(G, M, alpha=momentum)
        G = torch.stack([g if g.shape[0] <= g.shape[1] else g.mT for g in G])
        updates = over_ranks(newton_schulz, G.to(self.dtype))
        for p, O in zip(matrices, updates):
            rows, cols = p.shape
            s = max(1, rows / cols) ** 0.5 if scale == "spectral" else max(rows, cols) ** 0.5
            O = (O if O.shape == p.shape else O.mT).to(p.dtype)
            if beta2:
                v = self.state[p]["v"].lerp_(O.square().mean(dim=1, keepdim=True), 1 - beta2)
                divided = O / (v.sqrt() + 1e-10)
                O = divided * (O.norm() / (divided.norm() + 1e-10))
            p.add_(O, alpha=-lr * s)


# ----------------------------------------------------------------------------------------------------------------------
# Data loader [shared]

SHARD_MAGIC, SHARD_VERSION = 20240520, 1  # header of 256 int32: magic, version, number of tokens; then uint16 tokens
WHERE_FROM = ("Fetch or make them: python data/cached_fineweb10B.py 18, python data/pydocs.py for track tiny, or see "
              "data/README.md.")


def open_shard(path):
    """Memory-map the tokens of a shard, uint16. Raises ValueError with the way out when it is not a whole shard."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", count=256).tolist()
    magic, version, tokens = header[:3] if len(header) == 256 else (0, 0, 0)
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or tokens < 1 or size != 1024 + 2 * tokens:
        raise ValueError(f"{path} is no whole token shard of version {SHARD_VERSION}: {tokens} tokens by its header, "
                         f"{(size - 1024) / 2:.12g} by its size. Fetch or make it again; format: data/README.md.")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


class TokenStream:
    """The tokens of the sorted shards folder/*_<split>_*.bin as one stream, to be read over and over: position p is
    token p mod their number. Opens only the first, with `need` tokens. Raises ValueError with the way out."""

    def __init__(self, folder, split, need=math.inf):
        self.paths, self.shards, total = [], [], 0
        for path in sorted(Path(folder).glob(f"[!.]*_{split}_*.bin")):
            if total < need:
                self.paths.append(path)
                self.shards.append(open_shard(path))
                total += len(self.shards[-1])
        if not self.shards:
            raise ValueError(f"no {split} shards (*_{split}_*.bin) in {folder}. {WHERE_FROM}")
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self):
        return int(self.starts[-1])

    def read(self, position, count):
        """Tokens [position, position + count) of the stream as int64 (count,)."""
        parts = []
        while count > 0:
            position %= len(self)
            i = int(np.searchsorted(self.starts, position, side="right")) - 1
            parts.append(self.shards[i][position - self.starts[i]:][:count])
            position += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts).astype(np.int64)


@functools.lru_cache(maxsize=2)
def shuffled(tokens, T, epoch):
    """Where the sequences of T tokens begin that an epoch reads of a stream of so many tokens: in random order, after a
    random phase, as many whatever the phase. RandomState's numbers are the same in every numpy."""
    random = np.random.RandomState(epoch)
    return random.randint(T) + T * random.permutation((tokens - T) // T)


def share(count):
    """The sequences [first, last) of `count` that are this rank's: as evenly as it goes, none if there are too few."""
    return count * RANK // WORLD_SIZE, count * (RANK + 1) // WORLD_SIZE


def sequences(stream, starts, T):
    """Inputs and targets of the stream's sequences that begin at these positions, both int64 (len(starts), T)."""
    tokens = torch.empty(len(starts), T + 1, dtype=torch.int64)
    for row, start in zip(tokens, starts):
        row.copy_(torch.from_numpy(stream.read(start, T + 1)))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def batch(stream, step, args):
    """This rank's inputs and targets of a step, both int64 (n, T), on the device. Whatever the ranks and micro-batches,
    step s takes sequences [s bsz, (s + 1) bsz) of the run."""
    T, (first, last) = args.seq_len, share(args.bsz)
    numbers = range(step * args.bsz + first, step * args.bsz + last)
    starts = [k * T for k in numbers]
    if args.order == "shuffled":
        count = (len(stream) - T) // T
        starts = [shuffled(len(stream), T, k // count)[k % count] for k in numbers]
    inputs, targets = sequences(stream, starts, T)
    if args.device == "cuda":
        inputs, targets = (t.pin_memory().to(args.device, non_blocking=True) for t in (inputs, targets))
    return inputs, targets


def open_data(args):
    """(train stream, val stream, their facts for the record). Raises ValueError with the way out."""
    T, steps, shuffle = args.seq_len, args.stop_after or args.steps, args.order == "shuffled"
    need = steps * args.bsz * T + 1
    train = TokenStream(args.data, "train", math.inf if shuffle else need)
    val = TokenStream(args.data, "val", args.val_tokens + 1)
    readable = (len(train) - T) // T * T * args.epochs + 1 if shuffle else len(train) * args.epochs
    val_need = args.val_tokens if args.track == "fineweb" else T
    for split, needed, count in (("train", need, readable), ("val", val_need + 1, len(val))):
        if needed > count:
            raise ValueError(f"{needed:,} {split} tokens are needed (--steps {steps}, --val_tokens {args.val_tokens}); "
                             f"{args.data} has {count:,} at --epochs {args.epochs}. {WHERE_FROM}")
    path = Path(args.data) / "manifest.json"  # what the data programs say of the folder
    try:
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        listed = {shard["name"]: shard for shard in manifest.pop("shards", ())}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Make the data again, or delete this file.") from error
    vocab = manifest.get("vocab_size") or 1 + max(int(tokens.max()) for tokens in train.shards + val.shards)
    if vocab > args.vocab_size or manifest.get("vocab_size", args.vocab_size) != args.vocab_size:
        tokenizer = manifest.get("tokenizer", "an unknown tokenizer")
        raise ValueError(f"{args.data} holds tokens of {tokenizer}, {vocab} ids; the model has --vocab_size "
                         f"{args.vocab_size}. Use --vocab_size {vocab} or other data.")
    facts = dict(folder=args.data, manifest=manifest)
    for split, stream in (("train", train), ("val", val)):
        facts[split] = []
        for path, tokens in zip(stream.paths, stream.shards):
            shard = listed.get(path.name, {})
            if listed and shard.get("tokens") != len(tokens) or shard.get("mtime_ns") == 0:  # --check: damaged
                raise ValueError(f"{path} is not what manifest.json lists: damaged, or of another tokenizer? "
                                 "Make the data again, or delete manifest.json if you vouch for every shard.")
            facts[split].append(dict(name=path.name, tokens=len(tokens), sha256=shard.get("sha256")))
    targets = val.read(1, min(args.val_tokens, len(val) - 1) // T * T)
    path = Path(args.data) / "token_bytes.bin"  # the bytes of text that an id stands for, a uint8 each
    lengths = np.fromfile(path, np.uint8) if path.exists() else np.zeros(0, np.uint8)
    text_bytes = int(lengths[targets[targets < len(lengths)]].sum(dtype=np.int64))
    return train, val, dict(facts, val_tokens=len(targets), text_bytes=text_bytes or None)


# ----------------------------------------------------------------------------------------------------------------------
# Record [shared]

SCHEMA = 3  # of records and checkpoints
RULE = "=" * 100
IMAGE = "/etc/rwkv-speedrun-image"  # written by the Dockerfile


def shell(*command):
    """Standard output of a command, stripped; "" when it is not there, fails, or hangs."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True,
                              cwd=Path(__file__).parent).stdout.strip()
    return ""


def machine(device):
    """What is needed to repeat a run: versions and what steers arithmetic and memory; the devices; the commit and the
    tracked files that differ from it."""
    steering = ("OMP_", "GOMP_", "MALLOC_", "MKL_", "CUBLAS_", "NCCL_", "PYTORCH_", "NVIDIA_TF32_")
    environment = dict(
        python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda or "none",
        nvcc=shell("nvcc", "--version").split("\n")[-1] or "none",
        compiler=shell(os.environ.get("CXX") or "c++", "--version").split("\n")[0] or "none",
        platform=platform.platform(), threads=torch.get_num_threads(),
        instruction_set=torch.backends.cpu.get_cpu_capability(), image=shell("cat", IMAGE) or "none",
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith(steering)})
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, memory = gpu.name, gpu.total_memory
    else:
        cpu = re.search(r"model name\s*: (.*)", shell("cat", "/proc/cpuinfo"))
        name = f"{cpu[1] if cpu else platform.machine()}, {torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    driver = shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "none"
    return dict(environment=environment, hardware=dict(name=name, count=WORLD_SIZE, memory_bytes=memory, driver=driver),
                git=dict(commit=shell("git", "rev-parse", "HEAD") or "none",
                         changed=shell("git", "diff", "--name-only", "HEAD").splitlines()))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def read_sources(model):
    """[({name, sha256}, text)] of the files that make a run."""
    sources = []
    for path in (Path(__file__), *model.sources):
        data = path.read_bytes()
        name = Path(os.path.relpath(path, Path(__file__).parent)).as_posix()
        sources.append((dict(name=name, sha256=sha256(data)), data.decode()))
    return sources


def write_whole(path, data, ready=None):
    """Write bytes beside their place, call ready(), rename: a whole file or none. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        if ready:
            ready()
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


class Record:
    """What happens in a run: log.txt, line by line, and result.json, written last. Only rank 0 writes. A folder without
    result.json belongs to a run that did not finish. Raises OSError, FloatingPointError when a loss is no number.
    losses: of all steps, as they were. curve: the validations. stopping: a rank was asked to stop, which all learn
    after the same step. checkpoint: the newest."""

    def __init__(self, args):
        self.args, self.losses, self.curve = args, [], []
        self.pending, self.stopping = collections.deque(), False
        self.path = self.file = self.checkpoint = None
        if RANK > 0:
            return
        stamp = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
        name = f"{stamp}_{Path(__file__).stem}_{args.name or os.urandom(3).hex()}"
        Path(args.records).mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):  # never an old folder: nothing is overwritten
            self.path = Path(args.records) / (name if n == 1 else f"{name}_{n}")
            with contextlib.suppress(FileExistsError):  # a run of this name began in the same second
                self.path.mkdir()
                break
        self.file = open(self.path / "log.txt", "x", encoding="utf-8", buffering=1, newline="\n")

    def line(self, text):
        if self.file:
            self.file.write(text + "\n")

    def step(self, step, report, train_ms):
        """What a step reports (see train_step) stays on the device until its copy has arrived: the host runs ahead."""
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
            loss, asked = report.tolist()
            self.stopping |= asked > 0
            self.loss_line(step, "train", loss, train_ms)
            self.losses.append(loss)

    def validation(self, step, loss, train_ms):
        self.loss_line(step, "val", loss, train_ms)
        tokens = step * self.args.bsz * self.args.seq_len
        self.curve.append(dict(step=step, tokens=tokens, val_loss=loss, train_ms=train_ms))

    def loss_line(self, step, split, loss, train_ms):
        self.line(f"step:{step}/{self.args.steps} {split}_loss:{loss:.4f} train_time:{train_ms:.0f}ms "
                  f"step_avg:{train_ms / max(1, step):.2f}ms")
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step} of {self.args.steps}: the {split} loss is {loss}")

    def digest(self, more=""):
        """sha256 of the log so far, and of a text after it."""
        return sha256((self.path / "log.txt").read_bytes() + more.encode())

    def close(self, reason):
        """The reason of the end is the log's last line."""
        with contextlib.suppress(OSError):  # a full disk is no error here
            self.line(f"end: {reason}")
        self.file = None

    def finish(self, result):
        """Close the log and write result.json, the last act of a finished run. Each holds the other's sha256, so that
        records/verify.py finds an edit in either. It proves no honesty: who edits can hash anew."""
        self.line(f"result: {sha256(json.dumps(result, sort_keys=True).encode())}")
        result = dict(result, log_sha256=self.digest("end: finished\n"))
        data = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_whole(self.path / "result.json", data.encode(), ready=functools.partial(self.line, "end: finished"))
        self.file = None


class Clock:
    """Wall time in seconds, each moment in one phase. Switching waits for the device: a phase holds its own work."""

    def __init__(self):
        self.phase, self.since = "rest", time.perf_counter()
        self.began = time.time()  # by the system's clock, which can be set: for comparison only
        self.seconds = {phase: 0.0 for phase in ("warm-up", "train", "validation", "saving", "rest")}
        self.earlier = 0.0  # seconds of training in the earlier parts of a resumed run

    def switch(self, phase):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def train_ms(self):
        """Training time of the run so far in ms; inside the train phase without waiting for the device."""
        running = time.perf_counter() - self.since if self.phase == "train" else 0.0
        return 1e3 * (self.earlier + self.seconds["train"] + running)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint [shared]

# checkpoints/<run>_step000100.safetensors: the model's tensors by name, as trained; while the run is unfinished also
# the optimisers' as <name>:<key>, the losses and torch's random state. The facts are JSON in its header.
FREE = ("device_bsz", "data", "records", "checkpoints", "name", "save_every", "resume", "stop_after",
        "check")  # flags that a resumed run may change


def pack(args, record, model, optimizers, facts, train_seconds, step, finished):
    """The bytes of a checkpoint. Raises FloatingPointError when a weight is not finite."""
    part = dict(run=record.path.name, step=step, log_sha256=record.digest(), train_seconds=train_seconds)
    header = {key: facts[key] for key in ("schema", "script", "run", "config", "sources", "data")}
    header.update(step=step, finished=finished, curve=record.curve, parts=[*facts["parts"], part])
    header.update({key: facts["data"]["manifest"].get(key) for key in ("tokenizer", "tokenizer_sha256")})
    tensors = dict(model.state_dict())
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise FloatingPointError(f"step {step} of {args.steps}: {name} is not finite")
    if not finished:
        tensors.update(losses=torch.tensor(record.losses), random=torch.get_rng_state())
        if args.device == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        names = {p: name for name, p in model.named_parameters()}
        for optimizer in optimizers:
            for p, state in optimizer.state.items():
                tensors.update({f"{names[p]}:{key}": t for key, t in state.items()})
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    return safetensors.torch.save(tensors, metadata=dict(checkpoint=json.dumps(header)))


def write(args, record, step, data, keep):
    """Write a checkpoint; of this run's older ones keep - 1 stay. Raises OSError."""
    path = Path(args.checkpoints) / f"{record.path.name}_step{step:06d}.safetensors"
    write_whole(path, data)
    record.checkpoint = path
    older = sorted(path.parent.glob(f"{record.path.name}_step*.safetensors"), key=lambda path: (len(path.name), path))
    for path in older[:-keep]:
        path.unlink()


def save(args, record, model, optimizers, facts, clock, step):
    """A checkpoint of an unfinished run. All ranks call it. Raises OSError, FloatingPointError."""
    clock.switch("saving")
    record.flush()
    failure = None
    if RANK == 0:
        try:
            data = pack(args, record, model, optimizers, facts, clock.seconds["train"], step, finished=False)
            write(args, record, step, data, keep=2)
        except (OSError, FloatingPointError) as error:
            failure = error
    if all_sum(torch.tensor(float(failure is not None), device=args.device)).item():
        raise failure or OSError("rank 0 could not save a checkpoint")


def header_of(path):
    """The facts in a checkpoint's header. Raises ValueError."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["checkpoint"])
        if header["schema"] != SCHEMA or "parts" not in header:
            raise ValueError("an export" if header["schema"] == SCHEMA else f"schema {header['schema']}")
        return header
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is no whole checkpoint ({error})") from error


def obstacle(header, sources, data, args):
    """In words why this run cannot go on from a checkpoint; "" when it can."""
    if header["script"] != Path(__file__).name:
        return f"it is of {header['script']}"
    if header["finished"]:
        return "its run is finished"
    for key, value in header["config"].items():
        if key not in FREE and value != getattr(args, key, None):
            return f"--{key} was {value}, is {getattr(args, key, None)}"
    for split in ("train", "val"):
        before, now = header["data"][split], data[split]
        count = max(len(before), len(now)) if args.order == "shuffled" else min(len(before), len(now))
        if before[:count] != now[:count]:  # in sequence a run opens as many as it needs
            return f"it was trained on other shards than those in {args.data}"
    changed = [source["name"] for source in sources if source not in header["sources"]]
    return f"{changed[0]} has changed since" if changed else ""


def find_checkpoint(args, sources, data):
    """(path, header) that --resume means: a file, or of the unfinished runs with these flags, sources and shards the
    one that got furthest; None where there is none. Raises ValueError."""
    if args.resume != "auto":
        header = header_of(args.resume)
        if why := obstacle(header, sources, data, args):
            raise ValueError(f"--resume {args.resume} cannot go on: {why}.")
        return args.resume, header
    headers, over = {}, set()
    for path in sorted(Path(args.checkpoints).glob("*_step*.safetensors")):
        try:
            headers[str(path)] = header_of(path)
        except ValueError as error:
            say(f"--resume auto: {error}: passed over")
    for header in headers.values():
        if header["finished"]:
            over.update(part["run"] for part in header["parts"])
    fit = [(header["step"], path) for path, header in headers.items()
           if header["run"] not in over and not obstacle(header, sources, data, args)]
    if not fit:
        say(f"--resume auto: none of {len(headers)} checkpoints in {args.checkpoints} is of an unfinished run with "
            "these flags, sources and shards (--resume FILE says why): from the beginning")
        return None
    path = max(fit)[1]
    return path, headers[path]


def restore(path, args, model, optimizers):
    """Bring model, optimisers and random state to those of a checkpoint. Returns its losses."""
    tensors = safetensors.torch.load_file(path)
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    torch.set_rng_state(tensors["random"])
    if args.device == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"])
    parameters, owner = dict(model.named_parameters()), {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            owner.update(dict.fromkeys(group["params"], optimizer))
    for name, t in tensors.items():
        name, _, key = name.partition(":")
        if key:
            p = parameters[name]
            owner[p].state[p][key] = t.to(args.device)
    return tensors["losses"].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Learning rate [shared]


def rate(step, args):
    """Factor on every learning rate at a step: linear rise, constant, then linear to 0 over the last warmdown_steps."""
    rise = (step + 1) / (args.warmup_steps + 1) if step < args.warmup_steps else 1.0
    fall = (args.steps - step) / min(args.steps, max(1, args.warmdown_steps))
    return min(rise, fall, 1.0)


def groups_of(optimizers):
    return itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers)


def schedule(optimizers, step, args):
    """Set the rates of a step, and Muon's momentum: from 0.85 to muon_momentum over the first muon_warmup steps."""
    for group in groups_of(optimizers):
        group["lr"] = group["initial_lr"] * rate(step, args)
        if "scale" in group:
            risen = min(1.0, step / max(1, args.muon_warmup))
            group["momentum"] = 0.85 + (args.muon_momentum - 0.85) * risen


# ----------------------------------------------------------------------------------------------------------------------
# Command line [shared]

CHOICES = dict(
    track=("fineweb", "tiny"), order=("sequential", "shuffled"), muon_scale=("spectral", "rms"),
    device=("auto", "cuda", "cpu"), dtype=("auto", "bf16", "mixed", "fp32"), kernel=("auto", "torch", "cpu", "cuda"))
POSITIVE = "steps bsz device_bsz seq_len epochs val_every val_tokens vocab_size layers width headsz".split()
RATES = "muon_lr adam_lr ln_lr emb_lr head_lr lambda_lr".split()
RANGES = dict(**dict.fromkeys(POSITIVE, (1, 2**31)), **dict.fromkeys(RATES, (0, 10)),  # all others: 0 to 2^31
              **dict.fromkeys(("adam_beta2", "muon_beta2", "muon_momentum"), (0, 1 - 1e-9)),
              ffn_ratio=(0.1, 2**31), random_seed=(0, 2**63 - 1))


def parse(argv=None):
    """Hyperparameters from the command line, a flag a field. A bad one ends the program: one line, status 2."""
    tiny = " ".join(f"--{name} {value}" for name, value in TINY.items())
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__}\nA flag a field:\n\n{inspect.getsource(Hyperparameters)}\nTrack tiny: {tiny}")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (all flags: --help)\n")
    for f in fields(Hyperparameters):
        how = dict(type=f.type, choices=CHOICES.get(f.name))
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(argv))
    args = Hyperparameters(**{**(TINY if given.get("track") == "tiny" else {}), **given})
    for f in fields(args):
        value, (least, most) = getattr(args, f.name), RANGES.get(f.name, (0, 2**31))
        if f.type in (int, float) and not least <= value <= most:  # nor is nan
            parser.error(f"--{f.name} {value} is not in the range from {least} to {most:.10g}")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*|", args.name):
        parser.error(f"--name {args.name!r}: letters, digits, '-', '_', '.' only; it names a folder")
    return args


def has_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware (on a CPU: AVX512-BF16 or AMX)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve(args):
    """Fix what "auto" means on this machine. Raises ValueError with the way out."""
    cuda = torch.cuda.is_available()
    if not cuda and (args.device == "cuda" or args.device == "auto" and args.track == "fineweb"):
        raise ValueError(f"track {args.track} on --device {args.device} needs a CUDA device, and torch sees "
                         "none. Try --track tiny --device cpu.")
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"
    if args.dtype == "auto":
        args.dtype = ("bf16" if args.device == "cuda" else "mixed") if has_bf16(args.device) else "fp32"
    if args.order == "shuffled" and args.track == "fineweb":
        raise ValueError("--order shuffled: track fineweb reads every token once, in sequence.")
    if args.stop_after > args.steps:
        raise ValueError(f"--stop_after {args.stop_after} is more than --steps {args.steps}.")
    if args.val_tokens < args.seq_len:
        raise ValueError(f"--val_tokens {args.val_tokens} holds no sequence of --seq_len {args.seq_len}.")
    if args.bsz < WORLD_SIZE:
        raise ValueError(f"--bsz {args.bsz} leaves some of {WORLD_SIZE} processes without a sequence: start fewer, "
                         "NPROC=1 for one, or give a larger --bsz.")


# ----------------------------------------------------------------------------------------------------------------------
# Main [shared]

ACTIVE_LIMIT = 124_000_000  # parameters a token may use on track fineweb
asked = []  # (signal, time) of what asked this rank to end its training
undying = []  # DDP models: to free one, torch holds Python's lock and waits for gloo's threads, which may wait for it


def ask(number, frame):
    """SIGINT or SIGTERM in the loop: the first asks for an end after the step, one that comes more than ten seconds
    after it ends the run at once. What comes between is a launcher that passes on what the ranks have got already."""
    asked.append((number, time.monotonic()))
    if time.monotonic() - asked[0][1] > 10:
        raise KeyboardInterrupt


def all_sum(tensor):
    """Sum over the ranks, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def say(text):
    if RANK == 0:
        tqdm.write(text)


def gather(value):
    """The values of all ranks, [that of rank 0, ...]."""
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def train_step(model, optimizers, inputs, targets, args):
    """One optimiser step on this rank's share (n, T), n >= 1. Returns, on the device, the mean loss of the global
    batch and the number of ranks asked to stop (2,)."""
    total = torch.zeros((), device=inputs.device)
    parts = -(-len(inputs) // args.device_bsz)  # micro-batches, as equal as it goes: few shapes to compile
    for i, (x, y) in enumerate(zip(inputs.tensor_split(parts), targets.tensor_split(parts))):
        if WORLD_SIZE > 1:  # the ranks' gradients meet once, with the last micro-batch
            model.require_backward_grad_sync = i == parts - 1
        loss = model(x, y) * (len(x) / args.bsz)
        (loss * WORLD_SIZE).backward()  # DistributedDataParallel takes the mean over the ranks
        total += loss.detach()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return all_sum(torch.stack([total, torch.full_like(total, len(asked) > 0)]))


def validation_set(stream, args):
    """This rank's validation (inputs, targets) on the device, padded to whole micro-batches with targets -100."""
    T = args.seq_len
    first, last = share(min(args.val_tokens, len(stream) - 1) // T)
    inputs, targets = sequences(stream, range(first * T, last * T, T), T)
    pad = (0, 0, 0, -(last - first) % args.device_bsz)
    return F.pad(inputs, pad).to(args.device), F.pad(targets, pad, value=-100).to(args.device)


@torch.no_grad()
def validate(model, val, args):
    """Mean loss in nats a token over the validation sequences of all ranks; None when a rank was asked to stop."""
    total = torch.zeros(3, dtype=torch.float64, device=args.device)  # losses, targets, ranks asked to stop
    for x, y in zip(*(t.split(args.device_bsz) for t in val)) if len(val[0]) else ():  # more ranks than sequences
        if asked:
            break
        count = (y >= 0).sum()
        total[:2] += torch.stack([model(x, y).double() * count, count.double()])
    total[2] = len(asked) > 0
    loss, count, stopping = all_sum(total).tolist()
    return None if stopping else loss / count


def state_hash(model):
    """sha256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def warm_up(model, compiled, optimizers, val, args):
    """Compile and allocate with random sequences, as many a step as this rank will have, then restore parameters,
    buffers, optimisers and random state. Returns the state's hash before and after; they are equal, or RuntimeError."""
    first, last = share(args.bsz)
    before = state_hash(model)
    saved = {name: t.detach().clone() for name, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(args.random_seed)
    with torch.random.fork_rng([torch.cuda.current_device()] if args.device == "cuda" else []):
        validate(compiled, [torch.zeros_like(t[:args.device_bsz]) for t in val], args)
        for step in range(2):
            schedule(optimizers, step, args)
            tokens = torch.randint(args.vocab_size, (last - first, args.seq_len + 1), generator=generator)
            inputs, targets = (t.contiguous().to(args.device) for t in (tokens[:, :-1], tokens[:, 1:]))
            train_step(compiled, optimizers, inputs, targets, args)
    model.load_state_dict(saved)
    for optimizer in optimizers:
        optimizer.state.clear()  # as it was: the rates are set anew each step
    after = state_hash(model)
    if after != before:
        raise RuntimeError("the warm-up left a trace in the model; a run must not start from it")
    return dict(before=before, after=after)


def size_of(model):
    """What the record says of the model. active: the parameters that a token may use, of look-up tables none."""
    total = sum(p.numel() for p in model.parameters())
    tables = {name: model.get_parameter(name) for name in model.lookups}
    active = total - sum(table.numel() for table in tables.values())
    return dict(parameters=total, active=active, flops_per_token=model.flops_per_token(active),
                lookups={name: [len(table), table.nbytes] for name, table in tables.items()})


def set_up(args):
    """Data, model, optimisers on the device and the checkpoint to go on from, if any; checked before anything is
    written or timed. Raises ValueError."""
    resolve(args)
    several = WORLD_SIZE > 1 and not args.check
    backend = dict(backend="gloo")
    if args.device == "cuda":
        backend = dict(backend="nccl", device_id=torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
        torch.cuda.set_device(backend["device_id"])
    if several:
        dist.init_process_group(**backend)
    data = open_data(args)
    torch.manual_seed(args.random_seed)
    model = build_model(args).to(args.device)
    optimizers = build_optimizers(model, args)
    count = collections.Counter()
    for group in groups_of(optimizers):
        group["initial_lr"] = group["lr"]
        count.update(group["params"])
    wrong = [name for name, p in model.named_parameters() if count.pop(p, 0) != 1]
    if wrong or count:
        raise ValueError(f"every parameter must be in one optimiser, once: {', '.join(wrong) or 'strangers'}")
    active = size_of(model)["active"]
    if args.track == "fineweb" and active > ACTIVE_LIMIT:
        raise ValueError(f"{active:,} parameters are active per token; track fineweb allows {ACTIVE_LIMIT:,}. "
                         "Make --width, --layers or --ffn_ratio smaller.")
    sources = [source for source, _ in read_sources(model)]
    start = find_checkpoint(args, sources, data[2]) if args.resume else None
    same = {f"the shards of {args.data}": data[2], "sources and kernel": sources, f"--resume {args.resume}": start}
    for node, theirs in gather((platform.node(), same)) if several else ():
        for what, value in same.items():
            if theirs[what] != value:
                raise ValueError(f"{what} differ between the ranks on {node} and on {platform.node()}. Copy them anew, "
                                 "or name one --kernel.")
    return data, model, optimizers, start


def prepare(model, args):
    """The model compiled on a GPU, and its gradients averaged over the ranks where there are several."""
    if args.compile and args.device == "cuda" and getattr(args, "kernel", "") != "torch":  # its unrolled loop: minutes
        model = torch.compile(model, fullgraph=True, dynamic=False)
    if WORLD_SIZE > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        undying.append(model)
    return model


def begin(args, record, data, model, optimizers):
    """Write the head of the log. Returns the facts of the run that its result repeats."""
    sources, command = read_sources(model), shlex.join([Path(__file__).name, *sys.argv[1:]])
    record.line(f"config: {json.dumps(vars(args))}\ncommand: {command}")
    facts = dict(machine(args.device), schema=SCHEMA, data=data, model=size_of(model))
    for source, text in sources:
        record.line(f"{RULE}\nsource: {json.dumps(source)}\n{text}")
    record.line(f"{RULE}\nfacts: {json.dumps(facts)}")
    names = {p: name for name, p in model.named_parameters()}
    for group in groups_of(optimizers):
        for p in group["params"]:
            sd, mean = torch.std_mean(p.detach().float(), correction=0)
            line = dict(name=names[p], shape=list(p.shape), group=group["name"], lr=group["initial_lr"],
                        mean=mean.item(), sd=sd.item())
            record.line(f"parameter: {json.dumps(line)}")
    return dict(facts, run=record.path.name, script=Path(__file__).name, config=vars(args), command=command,
                sources=[source for source, _ in sources], parts=[])


def run(args, record, clock, data, model, optimizers, start):
    """Warm-up, training and validation, and the record of it, from what set_up returns."""
    (train, val, data_facts), facts = data, {}
    if RANK == 0:
        facts = begin(args, record, data_facts, model, optimizers)
    say(f"{size_of(model)['active']:,} parameters active per token; {args.steps} steps of "
        f"{args.bsz * args.seq_len:,} tokens on {WORLD_SIZE} x {args.device} in {args.dtype}")
    clock.switch("warm-up")
    val_batches = validation_set(val, args)
    compiled = prepare(model, args)
    record.line(f"warm-up: {json.dumps(warm_up(model, compiled, optimizers, val_batches, args))}")
    done = 0
    if start:
        record.checkpoint, header = start
        done, record.curve, facts["parts"] = header["step"], header["curve"], header["parts"]
        record.losses = restore(record.checkpoint, args, model, optimizers)
        clock.earlier = sum(part["train_seconds"] for part in header["parts"])
        last = {key: header["parts"][-1][key] for key in ("run", "step", "log_sha256")}
        record.line(f"resumed: {json.dumps(last)}")
        say(f"resumed from {record.checkpoint}: after step {done} of {args.steps}")
    gc.collect()
    clock.switch("rest")
    say(f"ready after {clock.seconds['rest'] + clock.seconds['warm-up']:.1f} s, none of them counted as training")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    bar = tqdm(total=args.steps, initial=done, unit="step", file=sys.stdout, disable=RANK > 0, dynamic_ncols=True,
               mininterval=0.2 if sys.stdout.isatty() else 10)
    for step in range(done, args.steps + 1):
        # the clock of the training stands: validation, checkpoint, end
        validated = record.curve and record.curve[-1]["step"] == step  # before the run was interrupted
        if not record.stopping and not validated and (step % args.val_every == 0 or step == args.steps):
            clock.switch("validation")
            record.flush()
            loss = validate(compiled, val_batches, args)
            if loss is None:
                record.stopping = True
            else:
                record.validation(step, loss, clock.train_ms())
                say(f"step {step}/{args.steps}  validation loss {loss:.4f}  {clock.train_ms() / 1e3:.1f} s of training")
        last = record.stopping or step >= (args.stop_after or args.steps)
        finished = step == args.steps and not record.stopping
        if step > done and not finished and (last or args.save_every and step % args.save_every == 0):
            save(args, record, model, optimizers, facts, clock, step)
        if last:
            break
        # training
        if clock.phase != "train":
            clock.switch("train")
        schedule(optimizers, step, args)
        inputs, targets = batch(train, step, args)
        record.step(step + 1, train_step(compiled, optimizers, inputs, targets, args), clock.train_ms())
        if record.losses:
            bar.set_postfix_str(f"loss {record.losses[-1]:.3f}", refresh=False)
        bar.update()
    bar.close()
    clock.switch("rest")
    record.line(f"losses: {base64.b64encode(np.array(record.losses, '<f4').tobytes()).decode()}")
    if record.stopping:
        raise KeyboardInterrupt(f" after step {step} of {args.steps}, checkpoint {record.checkpoint or 'none'}")
    if not finished:
        record.close(f"stopped after step {step} of {args.steps}")
        say(f"stopped after step {step} of {args.steps}: a beginning to compare with, not a result: {record.path}/")
    elif RANK == 0:
        export = conclude(args, record, model, clock, facts)
    leave_together()
    if finished and RANK == 0:
        try:
            write(args, record, step, export, keep=1)
        except OSError as error:
            stop(f"the record is whole, but there is no checkpoint of the last step: {error}")


def conclude(args, record, model, clock, facts):
    """Write result.json, times in s, memory in bytes, and say what came out. Returns the last checkpoint's bytes."""
    clock.switch("saving")
    export = pack(args, record, model, [], facts, clock.seconds["train"], args.steps, finished=True)
    if args.device == "cuda":
        memory = torch.cuda.max_memory_reserved()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    final = dict(
        val_loss=record.curve[-1]["val_loss"], val_tokens=facts["data"]["val_tokens"],
        text_bytes=facts["data"]["text_bytes"], steps=args.steps, tokens=record.curve[-1]["tokens"],
        train_seconds=clock.earlier + clock.seconds["train"], peak_memory_bytes=memory, devices=WORLD_SIZE)
    clock.switch("rest")
    record.finish(dict(facts, curve=record.curve, final=final, clock=clock.seconds, checkpoint_sha256=sha256(export),
                       wall=dict(began=clock.began, ended=time.time())))
    say(f"record: {record.path}/")
    summary = Path(__file__).parent / "records" / "report.py"
    if summary.exists():
        subprocess.run([sys.executable, summary, "--summary", record.path])
    return export


def main(argv=None):
    """A run. What is foreseen to go wrong ends in a line on stderr and in the log, anything else in a traceback."""
    clock, args, record = Clock(), parse(argv), None
    asked.clear()
    try:
        setup = set_up(args)
        if not args.check:
            record = Record(args)
            run(args, record, clock, *setup)
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(asked[0][0] if asked else signal.SIGINT)
        if record:
            record.close(f"interrupted by {number.name}{interrupt}")
        if RANK == 0:
            where = f"{record.path}/log.txt" if record else "not begun"
            print(f"\n{Path(__file__).name}: interrupted{interrupt}; the log: {where}", file=sys.stderr)
        if interrupt.args:  # all ranks ended after the same step
            leave_together()
        end(128 + number)
    except Exception as error:
        why = explain(error, args, record)
        if record:
            record.close(f"failed: {why or repr(error)}")
        if why:
            stop(f"{why}{f'; the log: {record.path}/log.txt' if record and record.path else ''}.")
        raise


def explain(error, args, record):
    """An error that was foreseen in one line, with the way out; "" for any other."""
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        n = min(args.device_bsz, -(-args.bsz // WORLD_SIZE))
        way_out = f"--device_bsz {n // 2} (the same losses)" if n > 1 else "a shorter --seq_len or a smaller model"
        return f"out of memory with {n} x {args.seq_len} tokens at a time on a device; next to try: {way_out}"
    if isinstance(error, FloatingPointError):
        return f"{error}. Last good checkpoint: {record.checkpoint or 'none (--save_every)'}"
    if isinstance(error, OSError):
        return f"{error}. Make room, set permissions or choose --records FOLDER or --checkpoints FOLDER"
    return str(error).removesuffix(".") if isinstance(error, ValueError) and not record else ""


def stop(message):
    """End the program: a line on stderr, exit status 1, no traceback."""
    if RANK > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)  # if rank 0 says the same, the launcher ends this rank meanwhile
    print(f"{Path(__file__).name}: {f'rank {RANK}: ' if RANK > 0 else ''}{message}", file=sys.stderr)
    end(1)


def end(status):
    """Leave with all written. Of several ranks at once: a thread of theirs can abort the interpreter's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    if WORLD_SIZE > 1 and __name__ == "__main__":
        os._exit(status)
    sys.exit(status)


def leave_together():
    """The ranks have all come to their end: none closes its connections while another still needs them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end(0)
