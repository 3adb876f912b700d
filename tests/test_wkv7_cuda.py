"""WKV-7's CUDA kernels, the .cu files themselves, on the CPU of tests/cuda_on_cpu: every input family and gate, states,
shapes, races, memory, registration; and what nvcc says of them. A kernel joins by its name in KERNELS and BUDGET."""

import subprocess
import sys

import pytest
import torch

import cuda_build
import train_rwkv7
from cuda_build import build_on_cpu, find_nvcc, nvcc_report, sanitized_environment
from helpers import environment
from test_wkv7 import NAMES, errors, make, run
from train_rwkv7 import wkv7, wkv7_recurrent

pytestmark = pytest.mark.skipif(bool(cuda_build.MISSING), reason=cuda_build.MISSING or "")
KERNELS = ("cuda", "fast")
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


def build(kernel, **how):
    files = [train_rwkv7.CUDA_FOLDER / "wkv7" / name for name in (f"wkv7_{kernel}.cu", "wkv7_binding.cpp")]
    return build_on_cpu(files, flags=[f"-DKERNEL={kernel}"], **how)


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request):
    """A kernel's name, loaded to run on the CPU while this module's tests run."""
    name, threads = request.param, torch.get_num_threads()
    about = train_rwkv7.KERNELS[name]
    torch.ops.load_library(build(name))
    about.device = "cpu"
    train_rwkv7.register_kernel(name)
    torch.set_num_threads(1)
    yield name
    torch.set_num_threads(threads)
    about.device = "cuda"
    train_rwkv7.LOADED_KERNELS.discard(name)


@pytest.fixture(autouse=True)
def poisoned():
    """Every tensor that is not given a value holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def bf16(family, **shape):
    inputs, dy = make(family, **shape)
    return [x.bfloat16() for x in inputs], dy.bfloat16()


def gates(kernel, family):
    own = GATES[kernel]
    y, dr, da, dw, state = own.get(family, own[""])
    dk = own[""][1] if family == "correlated" else dr
    return dict(y=y, dv=y, dr=dr, dk=dk, da=da, db=da, dw=dw, sT=state, ds0=state)


def check(found, gate, what):
    print(what, {name: f"{error:.1e}" for name, error in found.items()})
    over = {name: error for name, error in found.items()
            if not error <= gate[name.split()[0]] * (2 if "per head" in name else 1)}
    assert not over, f"{what}: relative errors too large: " + ", ".join(f"{n} {e:.1e}" for n, e in over.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(kernel, family):
    inputs, dy = bf16(family, B=1, T=128 if kernel == "fast" else 100)
    results = run(kernel, inputs, dy)
    assert {x.dtype for x in results.values()} == {torch.bfloat16}
    check(errors(results, run("reference", inputs, dy)), gates(kernel, family), f"{kernel}, {family}")


@pytest.mark.parametrize("T", (1, 15, 16, 17, 48, 64, 65, 208))
@pytest.mark.parametrize("B, H", ((1, 1), (2, 3)))
def test_lengths(kernel, B, T, H):
    inputs, dy = bf16("random", B=B, T=T, H=H, N=64, seed=T)
    found = errors(run(kernel, inputs, dy), run("reference", inputs, dy))
    if T == 1:  # a head's y is one number times v: it may be the small sum of large terms
        found = {name: error for name, error in found.items() if "per head" not in name}
    check(found, gates(kernel, "random"), f"{kernel}, T {T}")


@pytest.mark.parametrize("family", ("slow", "correlated"))
def test_a_long_sequence(kernel, family):
    inputs, dy = bf16(family, B=1, T=1024, H=1)
    check(errors(run(kernel, inputs, dy), run("reference", inputs, dy)), gates(kernel, family), f"{kernel}, {family}")


@pytest.mark.parametrize("N", (32, 64, 96, 128, 192))
@pytest.mark.parametrize("family", ("random", "identical"))
def test_head_sizes(kernel, N, family):
    if N not in train_rwkv7.KERNELS[kernel].head_sizes:
        with pytest.raises(ValueError, match=f"head size {N} is not one of"):
            wkv7(*bf16("random", T=16, N=N)[0], kernel=kernel)
        return
    inputs, dy = bf16(family, B=1, T=37, H=2, N=N)
    check(errors(run(kernel, inputs, dy), run("reference", inputs, dy)), gates(kernel, family), f"{kernel}, N {N}")


def test_fp32(kernel):
    """fp32 goes through --kernel cuda as it is, its error that of stepping the state back 8 tokens; others round it."""
    for family in ("random", "bound", "slow", "identical"):
        inputs, dy = make(family, B=1, T=100, H=2)
        results = run(kernel, inputs, dy)
        assert {x.dtype for x in results.values()} == {torch.float32}
        if kernel == "cuda":
            check(errors(results, run("reference", inputs, dy)), dict.fromkeys(NAMES, 6e-6), family)
        else:
            rounded = run(kernel, [x.bfloat16() for x in inputs], dy.bfloat16())
            assert all(torch.equal(results[name], rounded[name].float()) for name in NAMES)


def with_states(form, inputs, dy, s0, dsT):
    """run() from the state s0 on, with gradients of the final state too."""
    dtype = torch.float64 if form == "reference" else inputs[0].dtype
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    s0 = s0.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
    y, sT = wkv7_recurrent(*leaves, s0) if form == "reference" else wkv7(*leaves, form, s0, final=True)
    assert sT.dtype == s0.dtype
    grads = torch.autograd.grad((y, sT), (*leaves, s0), (dy.to(dtype), dsT.to(sT.dtype)))
    return dict(zip(NAMES, (y.detach(), *grads))), dict(sT=sT.detach(), ds0=grads[-1])


@pytest.mark.parametrize("T", (16, 50, 130))
@pytest.mark.parametrize("family", ("random", "slow", "correlated"))
def test_states(kernel, family, T):
    inputs, dy = bf16(family, B=2, T=T, H=2)
    torch.manual_seed(0)
    s0, dsT = torch.randn(2, 2, 2, 64, 64)
    (found, states), (exact, exact_states) = (with_states(form, inputs, dy, s0, dsT) for form in (kernel, "reference"))
    wrong = errors(found, exact)
    for name, x in states.items():
        wrong[name] = ((x - exact_states[name]).norm() / exact_states[name].norm()).item()
    check(wrong, gates(kernel, family), f"{kernel}, {family}, T {T}")


def test_a_sequence_in_two_pieces(kernel):
    """With the state handed on the pieces are the whole, bit for bit: 64 tokens end a chunk of every kernel."""
    inputs, dy = bf16("random", B=1, T=112, H=2)
    torch.manual_seed(0)
    s0, dsT = torch.randn(2, 1, 2, 64, 64)
    whole, ends = with_states(kernel, inputs, dy, s0, dsT)
    first, second = ([x[:, :64] for x in (*inputs, dy)], [x[:, 64:] for x in (*inputs, dy)])
    middle = wkv7(*first[:6], kernel, s0, final=True)[1]
    late, states = with_states(kernel, second[:6], second[6], middle, dsT)
    assert torch.equal(states["sT"], ends["sT"])
    early, states = with_states(kernel, first[:6], first[6], s0, states["ds0"])
    if kernel == "cuda":  # others keep states in bf16
        assert torch.equal(states["ds0"], ends["ds0"])
        assert all(torch.equal(torch.cat((early[name], late[name]), 1), whole[name]) for name in NAMES)


def test_only_the_final_state_is_used(kernel):
    inputs, dy = bf16("random", B=1, T=32, H=1)
    dsT = torch.randn(1, 1, 64, 64)
    leaves = [x.requires_grad_() for x in inputs]
    y, sT = wkv7(*leaves, kernel, final=True)
    grads = torch.autograd.grad(sT, leaves, dsT)
    exact = with_states("reference", inputs, torch.zeros_like(dy), torch.zeros(1, 1, 64, 64), dsT)[0]
    for name, x in zip(NAMES[2:], grads[1:]):
        assert (x.double() - exact[name]).norm() <= gates(kernel, "random")["da"] * exact[name].norm(), name
    assert not grads[0].any() and not torch.empty(0).numel()
    assert wkv7(*(x.detach() for x in leaves), kernel).grad_fn is None


def test_strided_inputs_and_dy(kernel):
    inputs, dy = bf16("random", B=2, T=20, H=2)
    expected = run(kernel, inputs, dy)
    wide = torch.stack(inputs, dim=-1)
    views = [wide[..., i].requires_grad_() for i in range(4)]
    views += [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs[4:]]
    assert not any(x.is_contiguous() for x in views)
    y = wkv7(*views, kernel=kernel)
    y.backward(dy.transpose(1, 2).contiguous().transpose(1, 2))
    for name, x in zip(NAMES, (y, *(x.grad for x in views))):
        assert torch.equal(x, expected[name]), name


def test_bitwise_repeatable(kernel):
    inputs, dy = bf16("random", B=2, T=64, H=3)
    first, second = (run(kernel, inputs, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_what_the_operators_refuse(kernel):
    forward, backward = (getattr(torch.ops.wkv7, f"{kernel}_{way}") for way in ("forward", "backward"))
    inputs, dy = bf16("random", B=1, T=32, H=2)
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
    for flawed, message in ((dict(state=state[:, :1]), r"the state must be \(1, 2, 64, 64\)"), (dict(), "computes in")):
        with pytest.raises(ValueError, match=message):
            wkv7(*([x.double() for x in inputs] if not flawed else inputs), kernel, **flawed)
    about = train_rwkv7.KERNELS[kernel]
    about.device = "cuda"
    try:
        with pytest.raises(ValueError, match="on cuda; got bfloat16 on cpu"):
            wkv7(*inputs, kernel)
    finally:
        about.device = "cpu"


def test_self_test(kernel, monkeypatch):
    """The one after a build: it passes what is right and not what is wrong."""
    found = train_rwkv7.self_test(kernel)
    assert list(found) == list(NAMES) and all(1e-4 < error <= limit for error, limit in found.values()), found
    monkeypatch.setattr(train_rwkv7, "DECAY_BOUND", 0.62)
    assert all(error > limit for error, limit in train_rwkv7.self_test(kernel).values())


@pytest.mark.parametrize("states", (False, True))
def test_opcheck(kernel, states):
    inputs, dy = bf16("random", B=1, T=16, H=1, N=64)
    s0, dsT = (torch.randn(1, 1, 64, 64).requires_grad_(), torch.randn(1, 1, 64, 64)) if states else (None, None)
    forward, backward = (getattr(torch.ops.wkv7, f"{kernel}_{way}").default for way in ("forward", "backward"))
    torch.library.opcheck(forward, (*(x.requires_grad_() for x in inputs), s0))
    inputs, s0 = [x.detach() for x in inputs], s0 if s0 is None else s0.detach()
    torch.library.opcheck(backward, (*inputs, s0, forward(*inputs, s0)[1], dy, dsT))


class Layer(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.kernel = torch.nn.Linear(64, 6 * 64, dtype=torch.bfloat16), kernel

    def forward(self, x, state):
        r, w, k, v, a, b = (part.unflatten(2, (1, 64)) for part in self.project(x).chunk(6, dim=2))
        a = torch.nn.functional.normalize(a, dim=-1)
        y, state = wkv7(r, w, k, v, a, -a * b.sigmoid(), self.kernel, state, final=True)
        return y.flatten(2), state


def test_compile_in_one_graph(kernel):
    x, state = torch.randn(2, 20, 64).bfloat16(), torch.randn(2, 1, 64, 64)
    results = []
    for compiled in (False, True):
        layer = Layer(kernel)
        s0 = state.clone().requires_grad_()
        y, sT = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(x, s0)
        (y.float().square().sum() + sT.square().sum()).backward()
        results.append((y.detach(), sT.detach(), s0.grad, layer.project.weight.grad))
    for eager, compiled in zip(*results):
        assert eager.isfinite().all() and eager.abs().max() > 0.1
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2)


# Without torch, in a process of its own: all orders in which threads may run, every access watched, sanitizers.

DIRECT = """
import ctypes, hashlib, itertools, sys
import numpy as np
library, kernel, shapes, orders = sys.argv[1], sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
library = ctypes.CDLL(library)
for B, T, H, N, kept_bytes in shapes:
    generator = np.random.default_rng(0)
    size = (B, T, H, N)
    def bf16(x): return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    r, w, k, v, dy = (bf16(generator.standard_normal(size)) for _ in range(5))
    kappa = generator.standard_normal(size); kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    a, b = bf16(-kappa), bf16(kappa * generator.random(size))
    s0, dsT = (generator.standard_normal((B, H, N, N)).astype(np.float32) for _ in range(2))
    seen = set()
    for order, seed, copies in orders:
        library.cuda_on_cpu_schedule(order, ctypes.c_uint64(seed), copies)
        y, dr, dw, dk, dv, da, db = (np.full(size, 0xffff, np.uint16) for _ in range(7))
        sT, ds0 = (np.full(s0.shape, np.nan, np.float32) for _ in range(2))
        kept = np.full(kept_bytes, 0xff, np.uint8)
        def call(way, *arrays):
            function = getattr(library, f"wkv7_{kernel}_{way}")
            function.restype = ctypes.c_char_p
            error = function(*map(ctypes.c_int64, (B, T, H, N)), *(x if x is None else ctypes.c_void_p(x.ctypes.data)
                             for x in (r, w, k, v, a, b, *arrays, None)))
            assert error is None, error
        assert not any(x.ctypes.data % 16 for x in (r, w, k, v, a, b, y, kept, dy, s0, dsT))
        call("forward", s0, y, kept, sT)
        call("backward", s0, kept, dy, dsT, dr, dw, dk, dv, da, db, ds0)
        assert np.isfinite(sT).all() and np.isfinite(ds0).all()
        for x in (y, dr, dw, dk, dv, da, db):
            assert ((x & 0x7f80) != 0x7f80).all(), "NaN"
        seen.add(hashlib.sha256(b"".join(x.tobytes() for x in (y, sT, dr, dw, dk, dv, da, db, ds0))).hexdigest())
    print(len(seen), "different results of", len(orders))
    assert len(seen) == 1
"""
ORDERS = [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 2), (2, 1, 0), (2, 2, 1), (2, 3, 2)]  # order, seed, when copies land


def direct(kernel, sizes, orders, env=(), flags=("-DHEAD_SIZES=64",), **how):
    like = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    shapes = [(*shape, train_rwkv7.kept_like(kernel, like(*shape)).nbytes) for shape in sizes]
    source = train_rwkv7.CUDA_FOLDER / "wkv7" / f"wkv7_{kernel}.cu"
    library = str(build_on_cpu([source], flags=flags, **how))
    done = subprocess.run([sys.executable, "-c", DIRECT, library, kernel, repr(shapes), repr(orders)],
                          env=environment(**dict(env)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"1 different results of {len(orders)}") == len(shapes), done.stdout


@pytest.mark.parametrize("name", KERNELS)
def test_the_order_of_threads_does_not_matter(name):
    direct(name, [(1, 80, 2, 64), (2, 16, 1, 128)], ORDERS, flags=[f"-DKERNEL={name}"])


@pytest.mark.parametrize("name", KERNELS)
def test_no_races(name):
    direct(name, [(1, 80, 1, 64)], [(0, 0, 0)], races=True)


@pytest.mark.parametrize("name", KERNELS)
def test_address_and_undefined_behaviour_sanitizers(name):
    env = sanitized_environment()
    if env is None:
        pytest.skip("the compiler has no sanitizers")
    direct(name, [(2, 80, 2, 64)], [(0, 0, 0)], env, sanitize=True)


@pytest.mark.skipif(not find_nvcc(), reason="no nvcc")
@pytest.mark.parametrize("arch", ("80", "90a", "100"))
@pytest.mark.parametrize("name", KERNELS)
def test_nvcc_report(name, arch):
    flags, budget = ((), dict(BUDGET[name])) if arch == "90a" or name != "cuda" else (["-DHEAD_SIZES=64"], {
        kernel: limit for kernel, limit in BUDGET[name].items() if kernel.endswith("<64")})
    if arch == "80" and name == "fast":  # whose 164 KB of shared memory hold 5 and 2 blocks
        budget["wkv7::forward<64>"], budget["wkv7::backward<64>"] = (96, 0), (255, 0)
    report = nvcc_report(train_rwkv7.CUDA_FOLDER / "wkv7" / f"wkv7_{name}.cu", arch, flags)
    assert {kernel.split(",")[0] for kernel in report} == set(budget), list(report)
    for kernel, used in report.items():
        registers, spill = budget[kernel.split(",")[0]]
        assert used["registers"] <= registers and used["shared"] == 0, (kernel, used)
        assert used["spill_stores"] + used["spill_loads"] <= spill, (kernel, used)
        assert spill or used["stack"] == 0, (kernel, used)
