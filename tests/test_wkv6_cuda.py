"""WKV-6's CUDA kernels, the .cu files themselves, on the CPU of tests/cuda_on_cpu: every input family and gate, decays
without bounds, and by cuda_kernels.py states, shapes, races, memory, registration, what nvcc says of them."""

import math

import pytest
import torch

import train_rwkv6
from cuda_kernels import (  # noqa: F401
    Operator, kernel, poisoned, pytestmark, test_a_long_sequence, test_a_sequence_in_two_pieces,
    test_address_and_undefined_behaviour_sanitizers, test_bitwise_repeatable, test_compile_in_one_graph, test_fp32,
    test_head_sizes, test_lengths, test_no_races, test_nvcc_report, test_only_the_final_state_is_used, test_opcheck,
    test_judge, test_shared_memory, test_states, test_strided_inputs_and_dy,
    test_the_order_of_threads_does_not_matter)
from grading import errors
from test_wkv6 import NAMES, make, recurrent
from train_rwkv6 import wkv6

FAMILIES = ("random", "hard", "slow", "fast", "strong", "at the edge", "nothing stays", "drops", "no bounds", "zeros",
            "large", "tiny dy", "sparse dy")
# What nvcc may use: {kernel of the .cu file: (registers, bytes of spill)}. An SM has 65536 registers.
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


def budget(kernel, arch):
    limits = dict(BUDGET[kernel])
    if arch == "80" and kernel == "fast":  # whose 164 KB of shared memory hold 5 and 2 blocks
        limits["wkv6::forward<64>"], limits["wkv6::backward<64>"] = (96, 0), (255, 0)
    return limits


class Layer(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.project, self.kernel = torch.nn.Linear(64, 4 * 64, dtype=torch.bfloat16), kernel
        self.u = torch.nn.Parameter(torch.randn(1, 64))

    def forward(self, x, state):
        r, k, v, w = (part.unflatten(2, (1, 64)) for part in self.project(x).chunk(4, dim=2))
        y, state = wkv6(r, k, v, w, self.u, self.kernel, state, final=True)
        return y.flatten(2), state


@pytest.fixture(scope="module")
def op():
    return Operator(
        name="wkv6", script=train_rwkv6, call=wkv6, recurrent=recurrent, names=NAMES, tensors=4, make=inputs_of,
        errors=errors, gates=gates, fp32_gate=1e-6, layer=Layer, budget=budget, shared=SHARED,
        families=dict(fp32=("random", "slow", "drops"), states=("random", "slow", "drops"), long=("slow", "drops"),
                      sizes=("random", "drops")),
        direct_inputs="r, k, v, w = bf16(normal()), bf16(normal()), bf16(normal()), bf16(3 * normal() - 1)\n"
                      "inputs = [r, k, v, w, generator.standard_normal((H, N)).astype(np.float32)]")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(op, kernel, family):
    inputs, dy = op.bf16(family, B=2 if family == "no bounds" else 1, T=100, H=3, N=64)
    results = op.run(kernel, inputs, dy)[0]
    assert [x.dtype for x in results.values()] == [torch.bfloat16] * 5 + [torch.float32]
    op.check(kernel, family, inputs, dy)


def test_nan_and_inf_are_not_hidden(op, kernel):
    """w of plus infinity is a decay of 0 and of minus infinity one of 1: nothing wrong with either."""
    inputs, dy = op.bf16("random", B=1, T=20, H=2, N=64)
    for at in range(5):
        for value in (math.nan, math.inf, -math.inf):
            broken = [x.clone() for x in inputs]
            broken[at][(0, 3, 0, 5) if at < 4 else (0, 5)] = value
            if at == 3 and math.isinf(value):
                results = op.run(kernel, broken, dy)[0]
                broken[at][0, 3, 0, 5] = math.copysign(80, value)
                found = op.errors(results, op.run("reference", broken, dy)[0])
                assert all(error <= 2 * op.gates(kernel, "random")[name.split()[0]] for name, error in found.items())
                continue
            y = op.run(kernel, broken, dy)[0]["y"]
            assert not torch.isfinite(y[0, 3:, 0]).all(), f"{value} in {'rkvwu'[at]}"
            assert torch.isfinite(y[0, :, 1]).all()


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


def test_what_the_operators_refuse(op, kernel):
    forward, backward = (getattr(torch.ops.wkv6, f"{kernel}_{way}") for way in ("forward", "backward"))
    (*inputs, u), dy = op.bf16("random", B=1, T=32, H=2, N=64)
    state = torch.zeros(1, 2, 64, 64)
    kept = forward(*inputs, u, None)[1]
    for call, message in (
            (lambda: forward(*(x[:, :20].contiguous() for x in inputs), u, None), "T 20 is not a multiple of 16"),
            (lambda: forward(*(x.half() for x in inputs), u, None), "takes bf16"),
            (lambda: forward(*inputs[:3], inputs[3].float(), u, None), "w is of another type"),
            (lambda: forward(*inputs[:3], inputs[3][:, :16].contiguous(), u, None), "w has the wrong shape"),
            (lambda: forward(*inputs[:3], inputs[3].transpose(1, 2).contiguous().transpose(1, 2), u, None),
             "w must be contiguous"),
            (lambda: forward(*inputs, u.bfloat16(), None), "u must be fp32"),
            (lambda: forward(*inputs, u[:1], None), "u has the wrong shape"),
            (lambda: forward(*inputs, u, state.double()), "s0 must be fp32"),
            (lambda: forward(*inputs, u, state[:, :1]), "s0 has the wrong shape"),
            (lambda: forward(*(x[..., :48].contiguous() for x in inputs), u[:, :48].contiguous(), None),
             "not one of this kernel's head sizes"),
            (lambda: forward(*(x[:0] for x in inputs), u, None), "none of them 0"),
            (lambda: backward(*inputs, u, None, kept[:, :, :-1].contiguous(), dy, None), "kept has the wrong shape"),
            (lambda: backward(*inputs, u, None, kept, dy, state[:0]), "dsT has the wrong shape")):
        with pytest.raises(RuntimeError, match=message):
            call()
