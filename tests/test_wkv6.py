"""WKV-6: every form against the float64 recurrence (forward, five gradients), decays without bounds, its limits."""

import functools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

import grading
import train_rwkv6
from cases import wkv6_inputs as make
from grading import (  # noqa: F401
    FORMS, Operator, check, cpu_kernel, test_bitwise_repeatable_on_any_number_of_threads, test_compile_in_one_graph,
    test_gradcheck_recurrence, test_gradcheck_torch_form, test_head_sizes, test_lengths, test_opcheck,
    test_recurrence_in_pieces, test_strided_inputs_and_dy, test_torch_form_in_float64)
from helpers import load_program
from train_rwkv6 import wkv6

recurrent = load_program("cuda/wkv6/reference.py").wkv6
NAMES = ("y", "dr", "dk", "dv", "dw", "du")
run = functools.partial(grading.run, wkv6, recurrent, NAMES)  # (form, inputs, dy)


def test_recurrence_is_the_equation():
    """Against loops over single numbers, from a state that is not zero."""
    inputs, _ = make("random", B=1, T=5, H=2, N=16)
    start = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    given = start.clone()
    y, end = recurrent(*(x.double() for x in inputs), start)
    assert torch.equal(start, given), "the state passed in was written to"
    r, k, v, w, u = (x.double().numpy() for x in inputs)
    for h in range(2):
        S = given[0, h].numpy().copy()
        for t in range(5):
            bonus = sum(r[0, t, h, n] * u[h, n] * k[0, t, h, n] for n in range(16))
            new = numpy.full((16, 16), numpy.nan)
            for i in range(16):
                y_i = sum(S[i, j] * r[0, t, h, j] for j in range(16)) + bonus * v[0, t, h, i]
                assert abs(y[0, t, h, i].item() - y_i) < 1e-12
                for j in range(16):
                    new[i, j] = S[i, j] * math.exp(-math.exp(w[0, t, h, j])) + v[0, t, h, i] * k[0, t, h, j]
            S = new
        assert numpy.abs(end[0, h].numpy() - S).max() < 1e-12


def test_states_in_and_out():
    """y, the final state and every gradient, the first state's among them, from both of them; in pieces as in one."""
    inputs, dy = make("drops", T=37, N=16)
    generator = torch.Generator().manual_seed(1)
    start, d_end = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    results = []
    for form, dtype in ((recurrent, torch.float64), (functools.partial(wkv6, final=True), torch.float32)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (*inputs, start)]
        y, end = form(*leaves[:5], **{"S" if form is recurrent else "state": leaves[5]})
        torch.autograd.backward((y, end), (dy.to(dtype), d_end.to(dtype)))
        results.append([y.detach(), end.detach(), *(x.grad for x in leaves)])
    for name, right, x in zip(("y", "sT", *NAMES[1:], "ds0"), *results):
        error = ((x - right).norm() / right.norm()).item()
        assert error < 5e-7, f"{name} {error:.1e}"
    state, pieces = start, []
    for begin, stop in ((0, 16), (16, 17), (17, 37)):
        y, state = wkv6(*(x[:, begin:stop] for x in inputs[:4]), inputs[4], state=state, final=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, results[1][1], rtol=1e-5, atol=1e-5)
    alone = wkv6(*inputs, state=start, final=True)[1]
    leaf = start.clone().requires_grad_()
    wkv6(*inputs, state=leaf, final=True)[1].sum().backward()
    assert torch.equal(alone, results[1][1]) and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
    for wrong in (dict(state=start), dict(final=True)):
        with pytest.raises(ValueError, match="--kernel cpu starts from the zero state"):
            wkv6(*inputs, kernel="cpu", **wrong)


# Relative error of fp32, measured 1.5 to 2.5 times below these gates. What sets the larger ones: where decay is slow, d
# itself, rounded to fp32 and the same for every token; at the edge e^w = 81, whose last digit d = exp(-e^w) magnifies.
FAMILIES = dict.fromkeys(("random", "hard", "strong", "at the edge", "nothing stays", "drops", "no bounds", "zeros",
                          "large", "tiny dy", "sparse dy"), 5e-7) | {"slow": 1.5e-6}
GATES_OF_DW = {"at the edge": 4e-6}


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_on_every_family(family):
    inputs, dy = make(family)
    reference = run("reference", inputs, dy)
    gate = FAMILIES[family]
    for form in FORMS:
        check(run(form, inputs, dy), reference, gate, f"{form}, {family}", dw=GATES_OF_DW.get(family, gate))


def test_what_the_usual_factorisations_do():
    """... to these inputs: pairs of r and k as (r P)(k / P)^T, P the product of decays since the chunk's start or its
    middle, and by exp of differences of sums. Were these any good, the families would prove nothing."""
    def wrong(family, pairs):
        (r, k, v, w, _), _ = make(family, T=96)
        r, k, v, w = (x.unflatten(1, (6, 16)).transpose(2, 3).flatten(0, 2) for x in (r, k, v, w))  # (chunks, 16, N)
        exact, _ = recurrent(*(x.double()[:, :, None] for x in (r, k, v, w)), torch.zeros(1, 64))
        sums = -w.exp().cumsum(1)
        before = F.pad(sums, (0, 0, 1, -1))
        return ((pairs(r, k, before, sums).tril(-1) @ v - exact[:, :, 0]).norm() / exact.norm()).item()

    def since_the_start(r, k, before, sums, origin=0):
        return (r * (before - origin).exp()) @ (k * (origin - sums).exp()).mT

    def since_the_middle(r, k, before, sums):
        return since_the_start(r, k, before, sums, sums[:, 7:8])

    def differences(r, k, before, sums):
        exponents = before[:, :, None] - sums[:, None]
        return torch.einsum("cin,cjn,cijn->cij", r, k, exponents.clamp(max=0).exp())

    assert max(wrong("slow", form) for form in (since_the_start, since_the_middle, differences)) < 1e-6
    assert all(math.isnan(wrong(family, since_the_start)) for family in ("hard", "strong", "drops", "no bounds"))
    assert all(math.isnan(wrong(family, since_the_middle)) for family in ("strong", "drops", "no bounds"))
    assert wrong("drops", differences) > 1e-3
    assert math.isnan(wrong("no bounds", differences))


@pytest.mark.parametrize("family", ("random", "hard"))
def test_bf16(family):
    """The result of fp32, rounded: 1.7e-3 is the error of rounding alone. u is a parameter and stays in fp32."""
    (*inputs, u), dy = make(family, N=32)
    inputs, dy = [x.bfloat16() for x in inputs], dy.bfloat16()
    reference = run("reference", (*inputs, u), dy)
    for form in FORMS:
        leaves = [x.clone().requires_grad_() for x in (*inputs, u)]
        y = wkv6(*leaves, kernel=form)
        y.backward(dy)
        results = dict(zip(NAMES, (y.detach(), *(x.grad for x in leaves))))
        assert [x.dtype for x in results.values()] == [torch.bfloat16] * 5 + [torch.float32]
        check(results, reference, 2e-3, f"{form}, bf16", du=5e-7)
        assert run(form, (*inputs, u.bfloat16()), dy)["du"].dtype == torch.bfloat16


def nan_and_inf_are_not_hidden(run, form, inputs, dy, gates):
    """w of plus infinity is a decay of 0 and of minus infinity one of 1: nothing wrong with either."""
    for at in range(5):
        for value in (math.nan, math.inf, -math.inf):
            broken = [x.clone() for x in inputs]
            broken[at][(0, 3, 0, 5) if at < 4 else (0, 5)] = value
            results = run(form, broken, dy)
            if at == 3 and math.isinf(value):
                broken[at][0, 3, 0, 5] = math.copysign(80, value)
                check(results, run("reference", broken, dy), 0, **gates)
                continue
            assert not torch.isfinite(results["y"][0, 3:, 0]).all(), f"{value} in {'rkvwu'[at]}"
            assert torch.isfinite(results["y"][0, :, 1]).all()


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_inf_are_not_hidden(form):
    inputs, dy = make("random", B=1, T=20, H=2, N=16)
    nan_and_inf_are_not_hidden(run, form, inputs, dy, dict.fromkeys(NAMES, 5e-7))


def test_refusals():
    (*inputs, u), _ = make("random", B=1, T=3, H=1, N=16)
    with pytest.raises(AttributeError, match="none_forward"):
        wkv6(*inputs, u, kernel="none")
    with pytest.raises(RuntimeError, match="differ in shape"):
        torch.ops.wkv6.cpu_forward(*inputs[:3], inputs[3][:, :2].contiguous(), u)
    for wrong in (u[0], torch.zeros(2, 16), torch.zeros(1, 32)):
        with pytest.raises(RuntimeError, match="u of shape"):
            torch.ops.wkv6.cpu_forward(*inputs, wrong)


class Layer(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.u, self.kernel = torch.nn.Linear(32, 4 * 32), torch.nn.Parameter(torch.randn(2, 16)), kernel

    def forward(self, x):  # (B, T, 2 * 16)
        r, k, v, w = (part.unflatten(2, (2, 16)) for part in self.project(x).chunk(4, dim=2))
        return wkv6(r, k, v, w, self.u, self.kernel).flatten(2)


@pytest.fixture(scope="module")
def op():
    return Operator(script=train_rwkv6, call=wkv6, recurrent=recurrent, names=NAMES, tensors=4, make=make,
                    gate=5e-7, gate_of_sizes=5e-7, exact=("random", "hard", "drops", "no bounds"), layer=Layer)
