"""WKV-7's CUDA kernels, the .cu files themselves, on the CPU of tests/cuda_on_cpu: every input family and gate, and by
cuda_kernels.py states, shapes, races, memory, registration, what nvcc says of them."""

import pytest
import torch

import train_rwkv7
from cuda_kernels import (  # noqa: F401
    Operator, kernel, poisoned, pytestmark, test_a_long_sequence, test_a_sequence_in_two_pieces,
    test_address_and_undefined_behaviour_sanitizers, test_bitwise_repeatable, test_compile_in_one_graph, test_fp32,
    test_head_sizes, test_lengths, test_no_races, test_nvcc_report, test_only_the_final_state_is_used, test_opcheck,
    test_judge, test_shared_memory, test_states, test_strided_inputs_and_dy,
    test_the_order_of_threads_does_not_matter)
from grading import errors
from test_wkv7 import NAMES, make, recurrent
from train_rwkv7 import wkv7

FAMILIES = ("random", "slow", "bound", "correlated", "identical", "zeros", "large", "tiny dy", "sparse dy")
# Relative errors against float64 on inputs rounded to bf16: y dv | dr dk | da db | dw | final state and ds0. "": any
# family but those named. Rounding the results to bf16 alone costs 1.7e-3.
EXACT = (2.5e-3, 2.5e-3, 3e-3, 4e-3, 3e-6)
GATES = {"cuda": {"": EXACT},
         "fast": {"": (5e-3, 5e-3, 7e-3, 6e-3, 4e-3), "correlated": (1.2e-2, 1.2e-2, 1.6e-2, 1.2e-2, 1e-2),
                  "identical": (2.5e-2, 2.5e-2, 3e-2, 2.5e-2, 2e-2)}}
# What nvcc may use: {kernel of the .cu file: (registers, bytes of spill)}. Only N = 192 may spill; of N = 64, 6 blocks
# of the forward and 3 of the backward fit into an SM's 65536 registers.
BUDGET = {"cuda": {"forward<32": (128, 0), "forward<64": (168, 0), "forward<96": (255, 0), "forward<128": (255, 0),
                   "forward<192": (255, 200), "backward<32": (168, 0), "backward<64": (168, 0), "backward<96": (255, 0),
                   "backward<128": (255, 0), "backward<192": (255, 3000)},
          "fast": {"wkv7::forward<64>": (80, 0), "wkv7::forward<128>": (128, 0),  # 6, 2, 3 and 1 blocks
                   "wkv7::backward<64>": (168, 0), "wkv7::backward<128>": (255, 0)}}
SHARED = {"cuda": {64: (18432, 39936), 128: (36864, 100352)}, "fast": {64: (28416, 76544), 128: (53248, 232448)}}


def gates(kernel, family):
    own = GATES[kernel]
    y, dr, da, dw, state = own.get(family, own[""])
    dk = own[""][1] if family == "correlated" else dr
    return dict(y=y, dv=y, dr=dr, dk=dk, da=da, db=da, dw=dw, sT=state, ds0=state)


def budget(kernel, arch):
    limits = dict(BUDGET[kernel])
    if arch == "80" and kernel == "fast":  # whose 164 KB of shared memory hold 5 and 2 blocks
        limits["wkv7::forward<64>"], limits["wkv7::backward<64>"] = (96, 0), (255, 0)
    return limits


class Layer(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.project, self.kernel = torch.nn.Linear(64, 6 * 64, dtype=torch.bfloat16), kernel

    def forward(self, x, state):
        r, w, k, v, a, b = (part.unflatten(2, (1, 64)) for part in self.project(x).chunk(6, dim=2))
        a = torch.nn.functional.normalize(a, dim=-1)
        y, state = wkv7(r, w, k, v, a, -a * b.sigmoid(), self.kernel, state, final=True)
        return y.flatten(2), state


@pytest.fixture(scope="module")
def op():
    return Operator(
        name="wkv7", script=train_rwkv7, call=wkv7, recurrent=recurrent, names=NAMES, tensors=6, make=make,
        errors=errors, gates=gates, fp32_gate=6e-6,  # the error of 8 steps back
        layer=Layer, budget=budget, shared=SHARED,
        families=dict(fp32=("random", "bound", "slow", "identical"), states=("random", "slow", "correlated"),
                      long=("slow", "correlated"), sizes=("random", "identical")),
        direct_inputs="kappa = normal(); kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)\n"
                      "inputs = [*(bf16(normal()) for _ in range(4)), bf16(-kappa), "
                      "bf16(kappa * generator.random(size))]")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(op, kernel, family):
    inputs, dy = op.bf16(family, B=1, T=128 if kernel == "fast" else 100)
    assert {x.dtype for x in op.run(kernel, inputs, dy)[0].values()} == {torch.bfloat16}
    op.check(kernel, family, inputs, dy)


def test_what_the_operators_refuse(op, kernel):
    forward, backward = (getattr(torch.ops.wkv7, f"{kernel}_{way}") for way in ("forward", "backward"))
    inputs, dy = op.bf16("random", B=1, T=32, H=2, N=64)
    state = torch.zeros(1, 2, 64, 64)
    kept = forward(*inputs, None)[1]
    wrong = [x.half() for x in inputs]
    for call, message in (
            (lambda: forward(*(x[:, :20].contiguous() for x in inputs), None), "T 20 is not a multiple of 16"),
            (lambda: forward(*wrong, None), "takes bf16"),
            (lambda: forward(*inputs[:5], inputs[5].float(), None), "b is of another type"),
            (lambda: forward(*inputs[:5], inputs[5][:, :16].contiguous(), None), "b has the wrong shape"),
            (lambda: forward(*inputs[:5], inputs[5].transpose(1, 2).contiguous().transpose(1, 2), None),
             "b must be contiguous"),
            (lambda: forward(torch.zeros(4097).bfloat16()[1:].view(1, 32, 2, 64), *inputs[1:], None),
             "r must lie at a multiple of 16 bytes"),
            (lambda: forward(*inputs, state.double()), "s0 must be fp32"),
            (lambda: forward(*inputs, state[:, :1]), "s0 has the wrong shape"),
            (lambda: forward(*(x[..., :48].contiguous() for x in inputs), None), "not one of this kernel's head sizes"),
            (lambda: forward(*(x[:0] for x in inputs), None), "none of them 0"),
            (lambda: backward(*inputs, None, kept[:, :, :-1].contiguous(), dy, None), "kept has the wrong shape"),
            (lambda: backward(*inputs, None, kept, dy, state[:0]), "dsT has the wrong shape")):
        with pytest.raises(RuntimeError, match=message):
            call()
