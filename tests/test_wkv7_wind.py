"""The fused time mixing (--wind_cuda): the .cu file itself on the CPU of tests/cuda_on_cpu, against time_mix in float64
and against the unfused time_mix in bf16, every gradient, parameters' too; shapes, races, memory, registration, nvcc."""

import pytest
import torch

import cuda_build
import train_rwkv7
from cuda_build import build_on_cpu, find_nvcc, hold_counts, nvcc_report
from cuda_kernels import WAYS, direct, judge
from helpers import ROOT, one_thread
from test_wkv7 import make
from train_rwkv7 import time_mix

pytestmark = pytest.mark.skipif(bool(cuda_build.MISSING), reason=cuda_build.MISSING or "")
FOLDER = ROOT / "cuda" / "wkv7"
TENSORS = ("out", "dr", "dw", "dk", "dv", "da", "dg")
PARAMETERS = ("w0", "a0", "k_k", "k_a", "r_k", "ln_w", "ln_b")
GATE = dict(dict.fromkeys(TENSORS + PARAMETERS, 8e-3), out=5e-3, dv=5e-3, dg=5e-3, r_k=1e-5, ln_b=1e-5)


def library(name, binding):
    return build_on_cpu([FOLDER / f"wkv7_{name}.cu", FOLDER / binding], flags=[f"-DKERNEL={name}"])


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The fused kernel and the unfused fast one, loaded to run on the CPU while this module's tests run."""
    for name, binding in (("wind", "wkv7_wind_binding.cpp"), ("fast", "wkv7_binding.cpp")):
        torch.ops.load_library(library(name, binding))
        train_rwkv7.register(name)
    with one_thread():
        yield


def sample(family, B=1, T=80, H=2, seed=0):
    """r w k v a g, the parameters and dout: bf16, (H, 64) fp32, bf16."""
    (r, w, k, v, a, _), dout = make(family, B=B, T=T, H=H, N=64, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    alpha, gate = normal(B, T, H, 64), normal(B, T, H, 64)
    about, spread = (0, 0, 0.7, 1, 0, 1, 0), [0.5, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1]
    if family in ("slow", "bound", "correlated", "identical"):  # which say what w and alpha are
        spread[0] = 0
    if family in ("correlated", "identical"):
        spread[1:3], k = (0, 0), -8 * a
        alpha.fill_(2.2 if family == "correlated" else 20)
    parameters = [mean + width * normal(H, 64) for mean, width in zip(about, spread)]
    return [x.bfloat16() for x in (r, w, k, v, alpha, gate)], parameters, dout.bfloat16()


def run(form, inputs, parameters, dout):
    """{name: result or gradient}; form is a kernel or "reference" for the torch form in float64."""
    exact = form == "reference"
    leaves = [(x.double() if exact else x).detach().clone().requires_grad_() for x in (*inputs, *parameters)]
    out = time_mix(*leaves[:6], leaves[6:], "torch" if exact else form)
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return dict(zip(TENSORS + PARAMETERS, (out.detach(), *gradients)))


def errors(found, reference):
    for name, x in found.items():
        assert x.shape == reference[name].shape and torch.isfinite(x).all(), name
    return {name: ((x.double() - reference[name]).norm() / reference[name].norm()).item() for name, x in found.items()}


@pytest.mark.parametrize("family", ("random", "slow", "bound", "correlated", "identical", "zeros", "large", "tiny dy",
                                    "sparse dy"))
def test_every_family(family):
    """Never worse than the steps apart, in bf16 around the fast kernel (mostly twice as good); and gates."""
    arguments = sample(family, B=2)
    reference = run("reference", *arguments)
    fused, apart = (errors(run(form, *arguments), reference) for form in ("wind", "fast"))
    print(family, {name: f"{error:.1e} ({apart[name]:.1e})" for name, error in fused.items()})
    gates = GATE if family in ("random", "slow", "tiny dy", "sparse dy") else apart
    over = {name: error for name, error in fused.items() if not error <= min(apart[name], gates[name])}
    assert not over, f"worse than unfused, or above their gates: {over}"


@pytest.mark.parametrize("T", (1, 16, 17, 64, 65, 150))
@pytest.mark.parametrize("B, H", ((1, 1), (2, 3)))
def test_lengths(T, B, H):
    arguments = sample("random", B=B, T=T, H=H, seed=T)
    found = errors({name: x for name, x in run("wind", *arguments).items() if T > 1 or name not in ("dw", "w0", "k_k")},
                   run("reference", *arguments))  # the first token has no state for its decay and its kappa to act on
    apart = errors(run("fast", *arguments), run("reference", *arguments))  # tokens of all but constant y cost digits
    over = {name: error for name, error in found.items() if not error <= max(GATE[name], 2 * apart[name])}
    assert not over, f"T {T}, B {B}, H {H}: {over}"


def test_bitwise_repeatable_and_strided():
    inputs, parameters, dout = sample("random", B=2)
    first, second = (run("wind", inputs, parameters, dout) for _ in range(2))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not views[0].is_contiguous()
    third = run("wind", views, parameters, dout.transpose(1, 2).contiguous().transpose(1, 2))
    for name in TENSORS + PARAMETERS:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]), name


def test_refusals():
    inputs, parameters, dout = sample("random", T=32)
    stacked = torch.stack(parameters)
    forward, backward = torch.ops.wkv7.wind_forward, torch.ops.wkv7.wind_backward
    for call, message in (
            (lambda: forward(*(x[:, :20].contiguous() for x in inputs), stacked), "T 20 is not a multiple of 16"),
            (lambda: forward(*(x.float() for x in inputs), stacked), "takes bf16"),
            (lambda: forward(*inputs, stacked.double()), "parameters must be fp32"),
            (lambda: forward(*inputs, stacked[:6]), "parameters has the wrong shape"),
            (lambda: backward(*inputs, stacked, torch.zeros(1, 2, 2, 64, 64).bfloat16(), dout), "kept has the wrong")):
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(RuntimeError, match="head size"):
        time_mix(*(x.view(1, 32, 4, 32) for x in inputs), [p.view(4, 32) for p in parameters], "wind")


def test_judge(monkeypatch):
    judge("wkv7", "wind", library("wind", "wkv7_wind_binding.cpp"), monkeypatch)


def test_opcheck():
    inputs, parameters, dout = sample("random", T=16, H=1)
    inputs.append(torch.stack(parameters))
    forward, backward = torch.ops.wkv7.wind_forward.default, torch.ops.wkv7.wind_backward.default
    torch.library.opcheck(forward, tuple(x.requires_grad_() for x in inputs))
    inputs = [x.detach() for x in inputs]
    torch.library.opcheck(backward, (*inputs, forward(*inputs)[1], dout))


def test_model_in_one_graph():
    """The model with the fused operator, compiled as a whole, is the model with the unfused one."""
    flags = dict(train_rwkv7.TINY, width=128, headsz=64, layers=2, dtype="mixed", device="cpu", zero_head=False)
    args = train_rwkv7.Hyperparameters(**flags)
    results, tokens = [], torch.randint(256, (2, 41), generator=torch.Generator().manual_seed(0))
    for kernel in ("fast", "wind"):
        torch.manual_seed(0)
        model = train_rwkv7.RWKV7(args, kernel)
        for p in model.parameters():  # none of those that start at zero stays there
            torch.nn.init.normal_(p, mean=p.mean().item(), std=0.02) if p.std() == 0 else None
        form = torch.compile(model, fullgraph=True, backend="aot_eager") if kernel == "wind" else model
        loss = form(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (apart, grads_apart), (fused, grads_fused) = results
    assert abs(fused - apart) < 2e-3 * apart
    for name, g in grads_apart.items():
        assert g.norm() > 0 and (grads_fused[name] - g).norm() < 0.05 * g.norm(), name


@pytest.mark.parametrize("way", WAYS)
def test_orders_of_threads_races_and_sanitizers(way):
    direct(FOLDER / "wkv7_wind.cu", "wkv7", "wind", [(2, 80, 2, 64, 2 * 2 * 2 * 64 * 64 * 2)],
           "inputs = [*(bf16(normal()) for _ in range(6)), generator.standard_normal((7, H, N)).astype(np.float32)]",
           way, states=False)


@pytest.mark.skipif(not find_nvcc(), reason="no nvcc")
@pytest.mark.parametrize("arch", ("80", "90a", "100"))
def test_nvcc_report(arch):
    """4 blocks of the forward and 2 of the backward on a multiprocessor, no spill, no stack frame."""
    report = nvcc_report(FOLDER / "wkv7_wind.cu", arch)
    assert set(report) == {"wkv7::forward", "wkv7::backward"}, list(report)
    for name, used in report.items():
        assert used["registers"] <= (128 if name.endswith("forward") else 255), (name, used)
        assert used["stack"] == used["spill_stores"] == used["spill_loads"] == used["shared"] == 0, (name, used)
    hold_counts(FOLDER / "wkv7_wind.cu", arch, report)
