"""WKV-7: every form against the float64 recurrence (forward, six gradients), and its limits."""

import functools
import math

import numpy
import pytest
import torch

import grading
from grading import check
from train_rwkv7 import HEAD_SIZES, load_kernel, wkv7, wkv7_recurrent

NAMES = ("y", "dr", "dw", "dk", "dv", "da", "db")
FORMS = ("torch", "cpu")
SLOW, FAST = -5.0, 20.0  # decay before its activation: d = 0.996 and d = 0.5452, the bound


@pytest.fixture(scope="module", autouse=True)
def cpu_kernel():
    assert load_kernel("cpu") == "cpu", "the C++ kernel does not build here; its message is on stderr"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are no faster on more
    yield
    torch.set_num_threads(threads)


def make(family, B=2, T=100, H=3, N=64, seed=0):
    """Inputs r, w, k, v, a, b and dy of an input family, fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(B, T, H, N, generator=generator)

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    r, w, k, v, kappa, alpha, dy = (*(normal() for _ in range(4)), unit(normal()), torch.sigmoid(normal()), normal())
    if family == "slow":
        w = w.fill_(SLOW)
    elif family == "bound":
        w = w.fill_(FAST)
    elif family == "correlated":  # cosine 0.9 between the keys, as where a text repeats itself
        one = unit(normal()[:, :1])
        kappa, alpha, w = unit(one * 0.9**0.5 + kappa * 0.1**0.5), torch.full_like(alpha, 0.9), w.fill_(SLOW)
        k = kappa * 8
    elif family == "identical":
        kappa, alpha, w = kappa[:, :1].expand_as(kappa).contiguous(), torch.ones_like(alpha), w.fill_(-12.0)
        k = kappa * 8
    elif family == "zeros":  # rows of padding, and a head that is zero throughout
        for x in (r, w, k, v, kappa, dy):
            x[:, 1::3] = 0
            x[:, T // 2 :, -1] = 0
            x[:, :, 0] = 0
    elif family == "large":
        k, v = k * 30, v * 30
    elif family == "tiny dy":
        dy = dy * 1e-6
    elif family == "sparse dy":
        dy[:, torch.arange(T) % 7 != 3] = 0
    else:
        assert family == "random"
    return (r, w, k, v, -kappa, kappa * alpha), dy


run = functools.partial(grading.run, wkv7, wkv7_recurrent, NAMES)  # (form, inputs, dy)


def test_recurrence_is_the_equation():
    """Against loops over single numbers, from a state that is not zero."""
    (r, w, k, v, a, b), _ = make("random", B=1, T=5, H=2, N=16)
    start = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    given = start.clone()
    y, end = wkv7_recurrent(*(x.double() for x in (r, w, k, v, a, b)), start)
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


def test_recurrence_in_pieces():
    inputs, _ = make("random", T=23, N=16)
    inputs = [x.double() for x in inputs]
    whole, end = wkv7_recurrent(*inputs)
    state, pieces = None, []
    for begin, stop in ((0, 1), (1, 8), (8, 9), (9, 23)):
        y, state = wkv7_recurrent(*(x[:, begin:stop] for x in inputs), state)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state, end)


def test_gradcheck_recurrence():
    inputs, _ = make("random", B=1, T=3, H=2, N=16)
    leaves = [x[..., :4].double().requires_grad_() for x in inputs]
    state = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(wkv7_recurrent, (*leaves, state))


def test_gradcheck_torch_form():
    inputs, _ = make("random", B=1, T=18, H=1, N=16)
    leaves = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(wkv7, leaves, fast_mode=True)


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


def test_torch_form_in_float64():
    inputs, dy = make("random", T=37)
    inputs = [x.double() for x in inputs]
    check(run("torch", inputs, dy), run("reference", inputs, dy), 1e-14)


@pytest.mark.parametrize("T", (1, 16, 37))
def test_states_of_the_torch_form(T):
    """From a given state, with a gradient of the final one."""
    inputs, dy = make("random", T=T, N=32)
    torch.manual_seed(0)
    s0, dsT = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    results = []
    for form in (lambda *x: wkv7_recurrent(*x), lambda *x: wkv7(*x[:6], state=x[6], final=True)):
        leaves = [x.double().requires_grad_() for x in (*inputs, s0)]
        y, end = form(*leaves)
        results.append((y, end, *torch.autograd.grad((y, end), leaves, (dy.double(), dsT))))
    for name, exact, x in zip((*NAMES[:1], "sT", *NAMES[1:], "ds0"), *results):
        assert (x - exact).norm() <= 1e-13 * exact.norm(), name
    with pytest.raises(ValueError, match="--kernel cpu starts from the zero state"):
        wkv7(*inputs, kernel="cpu", final=True)


@pytest.mark.parametrize("T", (1, 15, 16, 17, 31, 64, 100))
@pytest.mark.parametrize("H", (1, 3))
def test_lengths(T, H):
    inputs, dy = make("random", T=T, H=H, N=32, seed=T)
    reference = run("reference", inputs, dy)
    for form in FORMS:
        check(run(form, inputs, dy), reference, 7e-7, f"{form}, T {T}, H {H}")


@pytest.mark.parametrize("N", HEAD_SIZES)
def test_head_sizes(N):
    inputs, dy = make("random", B=1, T=37, H=2, N=N)
    reference = run("reference", inputs, dy)
    for form in FORMS:
        check(run(form, inputs, dy), reference, 1.2e-6, f"{form}, N {N}")


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
def test_strided_inputs_and_dy(form):
    inputs, dy = make("random", T=20, N=16)
    expected = run(form, inputs, dy)
    wide = torch.stack(inputs, dim=-1)  # what is a view of one tensor of all six
    views = [wide[..., i].requires_grad_() for i in range(4)]
    views += [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs[4:]]
    assert not any(x.is_contiguous() for x in views)
    y = wkv7(*views, kernel=form)
    y.backward(dy.transpose(1, 2).contiguous().transpose(1, 2))
    for name, x in zip(NAMES, (y, *(x.grad for x in views))):
        assert torch.equal(x, expected[name]), name
    ones = run(form, inputs, torch.ones_like(dy))
    leaves = [x.clone().requires_grad_() for x in inputs]
    wkv7(*leaves, kernel=form).sum().backward()  # dy is one number, expanded
    for name, x in zip(NAMES[1:], leaves):
        assert torch.equal(x.grad, ones[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_bitwise_repeatable_on_any_number_of_threads(form):
    inputs, dy = make("random", T=50, H=3)
    results = []
    for count in (2, 3, 1, 1):
        torch.set_num_threads(count)
        results.append(run(form, inputs, dy))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in NAMES)


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
    with pytest.raises(ValueError, match="head size 48 is not one of 16, 32, 64, 96, 128, 192"):
        wkv7(*(torch.zeros(1, 3, 1, 48) for _ in range(6)))
    with pytest.raises(ValueError, match=r"must be \(B, T, H, N\).*\(1, 2, 1, 16\)"):
        wkv7(*inputs[:5], inputs[5][:, :2])
    with pytest.raises(ValueError, match="one floating dtype.*bfloat16"):
        wkv7(inputs[0].bfloat16(), *inputs[1:])
    with pytest.raises(ValueError, match="not empty"):
        wkv7(*(x[:, :0] for x in inputs))
    with pytest.raises(ValueError, match="'fast' is not loaded .loaded: cpu, torch"):
        wkv7(*inputs, kernel="fast")
    with pytest.raises(ValueError, match="cpu computes in float32 on cpu; got float64"):
        wkv7(*(x.double() for x in inputs), kernel="cpu")
    with pytest.raises(RuntimeError, match="differ in shape"):
        torch.ops.wkv7.cpu_forward(*inputs[:5], inputs[5][:, :2].contiguous())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", (16, 19))
def test_opcheck(form, T):
    inputs, dy = make("random", B=1, T=T, H=1, N=16)
    inputs = [x.requires_grad_() for x in inputs]
    forward, backward = (getattr(torch.ops.wkv7, f"{form}_{way}").default for way in ("forward", "backward"))
    for states in ((), (None,), (torch.randn(1, 1, 16, 16),))[form == "torch" :][: 2 if form == "torch" else 1]:
        torch.library.opcheck(forward, (*inputs, *states))
        given = (*(x.detach() for x in inputs), *states)
        torch.library.opcheck(backward, (*given, forward(*given)[1], dy, *states))


class Layer(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.kernel = torch.nn.Linear(32, 6 * 32), kernel

    def forward(self, x):  # (B, T, 2 * 16)
        r, w, k, v, a, b = (part.unflatten(2, (2, 16)) for part in self.project(x).chunk(6, dim=2))
        a = torch.nn.functional.normalize(a, dim=-1)
        return wkv7(r, w, k, v, a, -a * b.sigmoid(), self.kernel).flatten(2)


@pytest.mark.parametrize("form, backend", [("torch", "aot_eager"), ("cpu", "aot_eager"), ("cpu", "inductor")])
def test_compile_in_one_graph(form, backend):
    if backend == "inductor" and " " in torch.__file__:
        pytest.skip("torch's inductor compiles nothing for the CPU where torch lies below a path with spaces")
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for compiled in (False, True):
        layer = Layer(form)
        y = (torch.compile(layer, fullgraph=True, backend=backend) if compiled else layer)(x)
        (y * y).sum().backward()
        results.append((y.detach(), layer.project.weight.grad))
    for eager, compiled in zip(*results):
        assert eager.abs().max() > 0.1
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
