"""WKV-7's kernels on a GPU: every input family and size in bf16, full size, the same bits twice, other streams, long
offsets. Skipped where torch sees no GPU; TEST_DEVICE=cpu tries this file itself, with the CPU's kernels, small sizes;
TEST_KERNELS=fast,wind tests those alone.
"""

import functools
import os
import sys

import pytest
import torch

from helpers import ROOT
from grading import errors
from test_wkv7 import FAMILIES, NAMES, make, recurrent as reference, run
import test_wkv7_wind as mixing
from train_rwkv7 import load_kernel, wkv7

sys.path.append(str(ROOT / "cuda"))
import cases  # noqa: E402
import recurrent  # noqa: E402
import test_recurrent as models  # noqa: E402

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no GPU")
GPU = DEVICE == "cuda"
FORMS = {name: form for (operator, name), form in cases.KERNELS.items()
         if operator == "wkv7" and form.device == DEVICE and not form.fused}
WANTED = os.environ.get("TEST_KERNELS", ",".join(["torch", *FORMS])).split(",")  # a CUDA error spoils its process
KERNELS = [name for name in ("torch", *FORMS) if name in WANTED]
ROUNDS = {name: "fp32" if name == "torch" or "fp32" in FORMS[name].dtypes else "bf16" for name in KERNELS}
SIZES = {name: (64, 128) if name == "torch" else cases.build.head_sizes(FORMS[name]) for name in KERNELS}
CASES = [(kernel, N) for kernel in KERNELS for N in (SIZES[kernel] if GPU else (32,))]
FULL = ((16, 1024, 12, 64), (16, 1024, 6, 128), (16, 4096, 2, 64)) if GPU else ((3, 64, 2, 32),)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    for kernel in KERNELS:
        if kernel != "torch":
            load_kernel(kernel)


def bf16(family, **sizes):
    inputs, dy = make(family, **sizes)
    return [x.to(DEVICE, torch.bfloat16) for x in inputs], dy.to(DEVICE, torch.bfloat16)


def check(kernel, family, results, reference, heads=True):
    """Every tensor within its gate, and every head of every sequence within twice that."""
    found = errors(results, reference)
    gates = cases.wkv7_gates(ROUNDS[kernel], torch.bfloat16, family)
    print(kernel, family, {name: f"{error:.1e}" for name, error in found.items()})
    over = [f"{name} {error:.1e}" for name, error in found.items()
            if not error <= gates[name.split()[0]] * (2 if "per head" in name else 1) and (heads or " " not in name)]
    assert not over, f"{kernel}, {family}: relative errors above the gates {gates}: {', '.join(over)}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel, N", CASES)
def test_families(kernel, N, family):
    inputs, dy = bf16(family, T=208 if GPU else 40, N=N)
    check(kernel, family, run(kernel, inputs, dy), run("reference", inputs, dy))


@pytest.mark.parametrize("T", (1, 15, 16, 17, 32, 48, 63, 64, 65, 1024, 4096) if GPU else (1, 17, 48))
@pytest.mark.parametrize("kernel, N", CASES)
def test_lengths(kernel, N, T):
    inputs, dy = bf16("random", B=1, T=T, H=2, N=N, seed=T)
    exact = run("torch" if T > 1000 else "reference", [x.double() for x in inputs], dy.double())
    check(kernel, "random", run(kernel, inputs, dy), exact, heads=T > 1)  # else y is one number, maybe small, times v


@pytest.mark.parametrize("kernel, N", [(kernel, N) for kernel, N in CASES if kernel == "torch" or FORMS[kernel].states])
def test_states(kernel, N):
    """From a state that is not zero to the final one, with gradients of both; the states are fp32."""
    inputs, dy = bf16("random", T=80, N=N)
    generator = torch.Generator().manual_seed(2)
    s0, dsT = (torch.randn(2, 3, N, N, generator=generator).to(DEVICE) for _ in range(2))

    def both(function, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        start = s0.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        y, sT = function(leaves, start)
        gradients = torch.autograd.grad((y, sT), (*leaves, start), (dy.to(y.dtype), dsT.to(sT.dtype)))
        return dict(zip((*NAMES, "ds0", "sT"), (y.detach(), *gradients, sT.detach())))

    exact = both(lambda x, s: reference(*x, s), torch.float64)
    results = both(lambda x, s: wkv7(*x, kernel=kernel, state=s, final=True), torch.bfloat16)
    check(kernel, "random", results, exact)
    gate = 1e-3 if ROUNDS[kernel] == "fp32" else 4e-3
    for name in ("sT", "ds0"):
        error = ((results[name].double() - exact[name]).norm() / exact[name].norm()).item()
        assert results[name].dtype == torch.float32 and error <= gate, f"{name} {error:.1e}"


@functools.lru_cache(maxsize=1)
def full_inputs(B, T, H, N):
    return bf16("random", B=B, T=T, H=H, N=N)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", FULL)
def test_full_size(shape, kernel):
    """Against the chunked form in float64, itself within 1e-14 of the recurrence; and the same bits twice."""
    B, T, H, N = shape
    inputs, dy = full_inputs(*shape)
    results, again = run(kernel, inputs, dy), run(kernel, inputs, dy)
    for name in NAMES:
        assert torch.equal(results[name], again[name]), f"{name} differs between two runs"
    for some in torch.arange(B).split(8):
        exact = run("torch", [x[some].double() for x in inputs], dy[some].double())
        check(kernel, "random", {name: x[some] for name, x in results.items()}, exact)


@pytest.mark.parametrize("kernel, N", CASES)
def test_alone_and_in_a_batch(kernel, N):
    """A sequence's results do not depend on its neighbours, nor on which streaming multiprocessor it lands."""
    B = 16 if GPU else 2
    inputs, dy = bf16("random", B=B, T=48, H=3, N=N)
    whole = run(kernel, inputs, dy)
    for i in (0, B - 1):
        alone = run(kernel, [x[i:i + 1] for x in inputs], dy[i:i + 1])
        for name in NAMES:
            if kernel == "torch":  # library products choose their order by size
                assert (whole[name][i] - alone[name][0]).norm() <= 4e-3 * alone[name].norm(), name
            else:
                assert torch.equal(whole[name][i], alone[name][0]), name


@pytest.mark.skipif(not GPU, reason="a CPU has no streams")
@pytest.mark.parametrize("kernel, N", [case for case in CASES if case[0] != "torch"])
def test_on_another_stream(kernel, N):
    """Launched on the current stream: there it sees inputs that are made there, late."""
    inputs, dy = bf16("random", T=64, N=N)
    expected, stream = run(kernel, inputs, dy), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = [torch.full_like(x, torch.nan) for x in inputs]
        torch.cuda._sleep(100_000_000)
        for x, value in zip(late, inputs):
            x.copy_(value)
        results = run(kernel, late, dy)
    torch.cuda.synchronize()
    for name in NAMES:
        assert torch.equal(results[name], expected[name]), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_compile(kernel):
    inputs, dy = bf16("random", B=1, T=32, H=2, N=SIZES[kernel][-1])
    kernel_input = [x.requires_grad_() for x in inputs]
    layer = lambda *x: wkv7(*x, kernel=kernel)
    y = layer(*kernel_input)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if GPU else "aot_eager")(*kernel_input)
    assert torch.equal(y, compiled)
    for one, other in zip(torch.autograd.grad(y, kernel_input, dy), torch.autograd.grad(compiled, kernel_input, dy)):
        assert torch.equal(one, other)


@pytest.mark.skipif(not GPU, reason="tens of GB, and minutes on a CPU")
@pytest.mark.parametrize("kernel, units", [case for case in (("fast", 9), ("cuda", 18)) if case[0] in KERNELS])
def test_more_elements_than_an_int_counts(kernel, units):
    """The last of 2^31 elements and more come out as they do alone: offsets are 64 bits wide."""
    B, T, H, N = 2049, 1024, 16, 64
    free, need = torch.cuda.mem_get_info()[0], units * 2 * B * T * H * N  # tensors of the input's size, states included
    if free < need:
        pytest.skip(f"needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    inputs, _ = bf16("random", B=1, T=T, H=H, N=N)
    with torch.no_grad():
        y = wkv7(*(x.expand(B, T, H, N).contiguous() for x in inputs), kernel=kernel)
        alone = wkv7(*inputs, kernel=kernel)
    assert torch.equal(y[-1], alone[0]) and torch.equal(y[B // 2], alone[0])


@pytest.mark.skipif(not GPU or "wind" not in WANTED, reason="on a CPU tests/test_wkv7_wind.py does it")
@pytest.mark.parametrize("B, T, H", ((4, 208, 3), (64, 1024, 12)))
@pytest.mark.parametrize("family", ("random", "slow", "bound", "correlated", "identical", "zeros", "large", "tiny dy"))
def test_time_mixing(family, B, T, H):
    """--wind_cuda is no worse than its steps around --fast_cuda, for every gradient, and gives the same bits twice."""
    load_kernel("wind")
    inputs, parameters, dout = mixing.sample(family, B=B, T=T, H=H)
    arguments = [x.to(DEVICE) for x in inputs], [x.to(DEVICE) for x in parameters], dout.to(DEVICE)
    reference, apart, fused, again = (mixing.run(form, *arguments) for form in ("reference", "fast", "wind", "wind"))
    assert all(torch.equal(fused[name], again[name]) for name in fused)
    fused, apart = mixing.errors(fused, reference), mixing.errors(apart, reference)
    print(family, {name: f"{error:.1e} ({apart[name]:.1e})" for name, error in fused.items()})
    over = {name: error for name, error in fused.items() if not error <= max(apart[name], mixing.GATE[name])}
    assert not over, f"worse than unfused: {over}"


@pytest.mark.parametrize("case", models.CASES)
def test_the_recurrent_forms(case):
    """Token by token and in pieces the logits are those of the training script's module, in fp32."""
    script, config, weights = models.scattered(case)
    model = recurrent.FAMILIES[script.__name__](config, weights, "fp32", DEVICE, dict(step=1), script)
    tokens = models.tokens(2, 100).to(DEVICE)
    with torch.no_grad():
        whole = model.parallel().logits(tokens)
    one, pieces = model.new_state(2), model.new_state(2)
    assert models.difference(torch.cat([model(part, one) for part in tokens.split(1, 1)], 1), whole) < 1e-4
    assert models.difference(torch.cat([model(part, pieces) for part in tokens.split(33, 1)], 1), whole) < 1e-4
