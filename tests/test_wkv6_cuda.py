"""WKV-6's CUDA kernels, the .cu files themselves, on the CPU of tests/cuda_on_cpu: every input family and gate, decays
without bounds, and by cuda_kernels.py states, shapes, races, memory, registration, what nvcc says of them."""

import pytest
import torch

import train_rwkv6
from cuda_kernels import *  # noqa: F403
from test_wkv6 import NAMES, make, nan_and_inf_are_not_hidden, recurrent
from train_rwkv6 import wkv6

FAMILIES = ("random", "hard", "slow", "fast", "strong", "at the edge", "nothing stays", "drops", "no bounds", "zeros",
            "large", "tiny dy", "sparse dy")
BUDGET = {"cuda": {**{f"scan<{N}": (168 if N in (32, 64, 192) else 255, 0) for N in (32, 64, 96, 128, 192)},
                   **{f"gradients<{N}": (255, 0) for N in (32, 64, 96, 128, 192)}},
          "fast": {"wkv6::forward<64>": (80, 0), "wkv6::forward<128>": (128, 0),  # 6, 2, 3 and 1 blocks
                   "wkv6::backward<64>": (168, 0), "wkv6::backward<128>": (255, 0)}}
SHARED = {"cuda": {64: (12320, 75904), 128: (24608, 129152)}, "fast": {64: (28032, 73728), 128: (55552, 228224)}}


def gates(kernel, family):
    """Relative errors against float64 on inputs rounded to bf16. Rounding the results to it alone costs 1.7e-3. du is
    in fp32; it sums products of inputs, which are exact."""
    state = dict.fromkeys(("sT", "ds0"), 2e-6) if kernel == "cuda" else dict.fromkeys(("sT", "ds0"), 4e-3)
    return dict.fromkeys(NAMES, 2.5e-3 if kernel == "cuda" else 5e-3) | dict(du=1e-6) | state


def inputs_of(family, **shape):
    if family == "fast":  # most states are forgotten within two tokens
        (r, k, v, w, u), dy = make("random", **shape)
        return (r, k, v, 2 + w, u), dy
    return make(family, **shape)


@pytest.fixture(scope="module")
def op():
    return Operator(
        name="wkv6", script=train_rwkv6, call=wkv6, recurrent=recurrent, names=NAMES, tensors=4, make=inputs_of,
        gates=gates, fp32_gate=1e-6, budget=BUDGET, shared=SHARED,
        families=dict(fp32=("random", "slow", "drops"), states=("random", "slow", "drops"), long=("slow", "drops"),
                      sizes=("random", "drops")),
        direct_inputs="r, k, v, w = bf16(normal()), bf16(normal()), bf16(normal()), bf16(3 * normal() - 1)\n"
                      "inputs = [r, k, v, w, generator.standard_normal((H, N)).astype(np.float32)]")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(op, kernel, family):
    inputs, dy = op.bf16(family, B=2 if family == "no bounds" else 1, T=100, H=3, N=64)
    op.check(kernel, family, inputs, dy)


def test_nan_and_inf_are_not_hidden(op, kernel):
    inputs, dy = op.bf16("random", B=1, T=20, H=2, N=64)
    limits = gates(kernel, "random")
    nan_and_inf_are_not_hidden(lambda form, *given: op.run(form, *given)[0], kernel, inputs, dy, limits)


def test_decays_of_single_tokens(op, kernel):
    """One key, seen by every later token through the decays between: pairs in every two places of a chunk, of two
    chunks, of two groups; each must lose exactly the decays that lie between and gain nothing back."""
    T, N = 80, 64
    generator = torch.Generator().manual_seed(0)
    for s in (0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 40, 63, 64):
        k, r, v, w = torch.zeros(1, T, 1, N), torch.ones(1, T, 1, N), torch.zeros(1, T, 1, N), torch.empty(1, T, 1, N)
        k[0, s], v[0, s] = 1, 1
        w.uniform_(-6, 2, generator=generator)
        w[0, (s + 5) % T, 0, ::2] = 30.0  # wiped out in every second channel
        inputs = [*(x.bfloat16() for x in (r, k, v, w)), torch.zeros(1, N)]
        y, exact = wkv6(*inputs, kernel), recurrent(*(x.double() for x in inputs))[0]
        assert not y[0, : s + 1].any() and (y[0, s + 1 :] >= 0).all()
        wrong = (y - exact)[0, s + 1 :].abs() / exact[0, s + 1 :].clamp(min=1e-30)
        assert wrong.max() < 2e-2, (s, wrong.max())


@pytest.mark.parametrize("change, message", (
    (torch.Tensor.bfloat16, "u must be fp32"), (lambda u: u[:1], "u has the wrong shape")))
def test_refused_u(op, kernel, change, message):
    (*inputs, u), _ = op.bf16("random", B=1, T=32, H=2, N=64)
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.wkv6, f"{kernel}_forward")(*inputs, change(u), None)
