"""WKV-7's CUDA kernels, the .cu files themselves, on the CPU of tests/cuda_on_cpu: every input family and gate, and by
cuda_kernels.py states, shapes, races, memory, registration, what nvcc says of them."""

import pytest

import train_rwkv7
from cuda_kernels import *  # noqa: F403
from test_wkv7 import NAMES, make, recurrent
from train_rwkv7 import wkv7

FAMILIES = ("random", "slow", "bound", "correlated", "identical", "zeros", "large", "tiny dy", "sparse dy")
# Relative errors against float64 on inputs rounded to bf16: y dv | dr dk | da db | dw | final state and ds0. "": any
# family but those named. Rounding the results to bf16 alone costs 1.7e-3.
EXACT = (2.5e-3, 2.5e-3, 3e-3, 4e-3, 3e-6)
GATES = {"cuda": {"": EXACT},
         "fast": {"": (5e-3, 5e-3, 7e-3, 6e-3, 4e-3), "correlated": (1.2e-2, 1.2e-2, 1.6e-2, 1.2e-2, 1e-2),
                  "identical": (2.5e-2, 2.5e-2, 3e-2, 2.5e-2, 2e-2)}}
# Only N = 192 may spill; of N = 64, 6 blocks of the forward and 3 of the backward fit.
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


@pytest.fixture(scope="module")
def op():
    return Operator(
        name="wkv7", script=train_rwkv7, call=wkv7, recurrent=recurrent, names=NAMES, tensors=6, make=make,
        gates=gates, fp32_gate=6e-6,  # the error of 8 steps back
        budget=BUDGET, shared=SHARED,
        families=dict(fp32=("random", "bound", "slow", "identical"), states=("random", "slow", "correlated"),
                      long=("slow", "correlated"), sizes=("random", "identical")),
        direct_inputs="kappa = normal(); kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)\n"
                      "inputs = [*(bf16(normal()) for _ in range(4)), bf16(-kappa), "
                      "bf16(kappa * generator.random(size))]")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(op, kernel, family):
    op.check(kernel, family, *op.bf16(family, B=1, T=128 if kernel == "fast" else 100))
