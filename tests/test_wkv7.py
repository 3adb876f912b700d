"""WKV-7: every form against the float64 recurrence (forward, six gradients), and its limits."""

import functools
import math

import numpy
import pytest
import torch

import cases
import grading
import train_rwkv7
from cases import wkv7_inputs as make
from grading import (  # noqa: F401
    FORMS, Operator, check, cpu_kernel, test_bitwise_repeatable_on_any_number_of_threads, test_compile_in_one_graph,
    test_gradcheck_recurrence, test_gradcheck_torch_form, test_head_sizes, test_lengths, test_opcheck,
    test_recurrence_in_pieces, test_strided_inputs_and_dy, test_torch_form_in_float64)
from helpers import load_program
from train_rwkv7 import wkv7

recurrent = load_program("cuda/wkv7/reference.py").wkv7
NAMES = ("y", "dr", "dw", "dk", "dv", "da", "db")
run = functools.partial(grading.run, wkv7, recurrent, NAMES)  # (form, inputs, dy)


def test_recurrence_is_the_equation():
    """Against loops over single numbers, from a state that is not zero."""
    (r, w, k, v, a, b), _ = make("random", B=1, T=5, H=2, N=16)
    start = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    given = start.clone()
    y, end = recurrent(*(x.double() for x in (r, w, k, v, a, b)), start)
    assert torch.equal(start, given), "the state passed in was written to"
    r, w, k, v, a, b = (x.double().numpy() for x in (r, w, k, v, a, b))
    for h in range(2):
        S = given[0, h].numpy().copy()
        for t in range(5):
            new = numpy.full((16, 16), numpy.nan)
            for i in range(16):
                u = sum(S[i, j] * a[0, t, h, j] for j in range(16))
                for j in range(16):
                    decay = math.exp(-math.exp(-0.5) / (1 + math.exp(-w[0, t, h, j])))
                    new[i, j] = S[i, j] * decay + u * b[0, t, h, j] + v[0, t, h, i] * k[0, t, h, j]
                y_i = sum(new[i, j] * r[0, t, h, j] for j in range(16))
                assert abs(y[0, t, h, i].item() - y_i) < 1e-12
            S = new
        assert numpy.abs(end[0, h].numpy() - S).max() < 1e-12


# Relative error of fp32, measured at 2 (random) to 1.5 (the others) times below these gates. What sets the larger ones
# is d itself, rounded to fp32 and the same for every token.
FAMILIES = {"random": 7e-7, "bound": 1e-6, "zeros": 7e-7, "large": 7e-7, "tiny dy": 7e-7, "sparse dy": 7e-7,
            "slow": 1.5e-6, "correlated": 1.8e-6, "identical": 3e-6}


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_on_every_family(family):
    inputs, dy = make(family)
    reference = run("reference", inputs, dy)
    for form in FORMS:
        check(run(form, inputs, dy), reference, FAMILIES[family], f"{form}, {family}")


@pytest.mark.parametrize("T", (1, 16, 37))
def test_states_of_the_torch_form(T):
    """From a given state, with a gradient of the final one."""
    inputs, dy = make("random", T=T, N=32)
    torch.manual_seed(0)
    s0, dsT = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    results = []
    for form in (recurrent, lambda *x: wkv7(*x[:6], state=x[6], final=True)):
        leaves = [x.double().requires_grad_() for x in (*inputs, s0)]
        y, end = form(*leaves)
        results.append((y, end, *torch.autograd.grad((y, end), leaves, (dy.double(), dsT))))
    for name, exact, x in zip((*NAMES[:1], "sT", *NAMES[1:], "ds0"), *results):
        assert (x - exact).norm() <= 1e-13 * exact.norm(), name
    with pytest.raises(ValueError, match="--kernel cpu starts from the zero state"):
        wkv7(*inputs, kernel="cpu", final=True)


def test_bf16():
    """The result of fp32, rounded: 1.7e-3 is the error of rounding alone."""
    inputs, dy = make("random", N=32)
    inputs, dy = [x.bfloat16() for x in inputs], dy.bfloat16()
    reference = run("reference", inputs, dy)
    for form in FORMS:
        results = run(form, inputs, dy)
        assert {x.dtype for x in results.values()} == {torch.bfloat16}
        check(results, reference, 2e-3, f"{form}, bf16")


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_inf_are_not_hidden(form):
    inputs, dy = make("random", B=1, T=20, H=2, N=16)
    for at in range(6):
        for value in (math.nan, math.inf):
            if at == 1 and value == math.inf:  # a decay at its bound, nothing wrong with that
                continue
            broken = [x.clone() for x in inputs]
            broken[at][0, 3, 0, 5] = value
            y = wkv7(*broken, kernel=form)
            assert not torch.isfinite(y[0, 3:, 0]).all(), f"{value} in {'rwkvab'[at]}"
            assert torch.isfinite(y[0, :, 1]).all()


def test_refusals():
    inputs, _ = make("random", B=1, T=3, H=1, N=16)
    with pytest.raises(RuntimeError, match="differ in shape"):
        torch.ops.wkv7.cpu_forward(*inputs[:5], inputs[5][:, :2].contiguous())
    for parameters, words in ((torch.ones(6, 1, 16), "wrong shape"), (torch.ones(7, 1, 16).double(), "float32")):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.wkv7.mix_forward(*inputs, parameters)
    with pytest.raises(AttributeError, match="none_forward"):
        wkv7(*inputs, kernel="none")


# ----------------------------------------------------------------------------------------------------------------------
# The time mixing around it, which the cpu kernel does in the same operator


def mixed(form, inputs, dy):
    """[out and the 13 gradients] of time_mix by "cpu", or by the reference in float64."""
    exact = form == "reference"
    leaves = [(x.double() if exact else x).detach().clone().requires_grad_() for x in inputs]
    call = cases.REFERENCE["wkv7"].time_mix if exact else functools.partial(train_rwkv7.time_mix, kernel=form)
    out = call(*leaves[:6], leaves[6:])
    return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(out.dtype))]


def hold(inputs, dy, case, gate=2e-5):
    """2e-5: where a token's y hardly varies the norm costs digits, of the steps one by one as well."""
    for name, x, exact in zip(cases.MIXED, mixed("cpu", inputs, dy), mixed("reference", inputs, dy)):
        assert x.shape == exact.shape and (x - exact).norm() <= gate * exact.norm() + 1e-30, f"{case}: {name}"


@pytest.mark.parametrize("N", (16, 32, 64, 96, 128, 192))
def test_mixing_of_every_family(N):
    for family in cases.time_mixing().families:
        hold(*cases.time_mix_inputs(family, 2, 37, 3, N), f"{family}, N {N}")


def test_mixing_of_every_length():
    for T in (1, 2, 15, 16, 17, 64, 100):
        hold(*cases.time_mix_inputs("random", 2, T, 3, 64), f"T {T}")


def test_a_key_of_zeros_has_no_direction():
    """|k k_k| is held at 1e-12, where it has no gradient."""
    inputs, dy = cases.time_mix_inputs("random", 1, 20, 2, 32)
    inputs[2][0, 3] = 0
    hold(inputs, dy, "a key of zeros")


def test_mixing_repeats_bitwise_of_any_strides_on_any_number_of_threads():
    inputs, dy = cases.time_mix_inputs("random", 3, 40, 3, 32)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for x in inputs]
    assert not views[0].is_contiguous()
    results = []
    for count, given in ((1, inputs), (3, inputs), (2, views)):
        torch.set_num_threads(count)
        results.append(mixed("cpu", given, dy.transpose(1, 2).contiguous().transpose(1, 2)))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(other, results[0]))


def test_mixing_is_an_operator():
    inputs, dy = cases.time_mix_inputs("random", 1, 19, 2, 16)
    given = [*inputs[:6], torch.stack(inputs[6:])]
    forward, backward = torch.ops.wkv7.mix_forward.default, torch.ops.wkv7.mix_backward.default
    torch.library.opcheck(forward, tuple(x.clone().requires_grad_() for x in given))
    torch.library.opcheck(backward, (*given, forward(*given)[1], dy))


class Layer(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.kernel = torch.nn.Linear(32, 6 * 32), kernel

    def forward(self, x):  # (B, T, 2 * 16)
        r, w, k, v, a, b = (part.unflatten(2, (2, 16)) for part in self.project(x).chunk(6, dim=2))
        a = torch.nn.functional.normalize(a, dim=-1)
        return wkv7(r, w, k, v, a, -a * b.sigmoid(), self.kernel).flatten(2)


@pytest.fixture(scope="module")
def op():
    return Operator(script=train_rwkv7, call=wkv7, recurrent=recurrent, names=NAMES, tensors=6, make=make,
                    gate=7e-7, gate_of_sizes=1.2e-6, exact=("random",), layer=Layer)
