"""The tests that every operator's CUDA kernels must pass, the .cu files themselves running on the CPU of
tests/cuda_on_cpu. tests/test_<operator>_cuda.py says what is an operator's own, in a fixture `op`, and imports them."""

import ctypes
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Callable

import pytest
import torch

import cuda_build
from cuda_build import build_on_cpu, find_nvcc, hold_counts, nvcc_report, sanitized_environment
from helpers import ROOT, environment, load_program, one_thread

pytestmark = pytest.mark.skipif(bool(cuda_build.MISSING), reason=cuda_build.MISSING or "")
build = load_program("cuda/build.py")
KERNELS = ("cuda", "fast")
ORDERS = [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 2), (2, 1, 0), (2, 2, 1), (2, 3, 2)]  # order, seed, when copies land


@dataclass
class Operator:
    """What the tests must know of an operator. Its inputs are `tensors` (B, T, H, N), then what is not, in fp32."""
    name: str
    script: ModuleType
    call: Callable  # inputs, kernel, state, final -> y or (y, sT)
    recurrent: Callable
    names: tuple  # y, then the gradients in the order of the inputs
    tensors: int
    make: Callable  # family, B, T, H, N, seed -> inputs, dy
    errors: Callable  # results, reference -> {name, name + " per head": relative error}
    gates: Callable  # kernel, family -> {name, "sT", "ds0": limit}
    fp32_gate: float  # of --kernel cuda on fp32
    families: dict  # "fp32", "states", "long", "sizes": families tried there
    layer: Callable  # kernel -> module, x (2, 20, 64) and state (2, 1, 64, 64) -> y, sT
    budget: Callable  # kernel, arch -> {kernel of the .cu file: (registers, bytes of spill)}
    shared: dict  # kernel: {N: bytes of shared memory a block of the forward, of the backward's last launch}
    direct_inputs: str  # Python: from `normal()`, (B, T, H, N), `bf16`, `generator` and `np` the list `inputs`

    def bf16(self, family, **shape):
        inputs, dy = self.make(family, **shape)
        return [x.bfloat16() if i < self.tensors else x for i, x in enumerate(inputs)], dy.bfloat16()

    def run(self, form, inputs, dy, s0=None, dsT=None):
        """{y and the gradients}, {sT, ds0}; form: a kernel, or "reference" for the recurrence in float64. With states
        where they are given."""
        exact, states = form == "reference", s0 is not None
        leaves = [x.detach().to(torch.float64 if exact else x.dtype, copy=True).requires_grad_() for x in inputs]
        dtype = torch.promote_types(leaves[0].dtype, torch.float32)
        start = s0.to(dtype, copy=True).requires_grad_() if states else None
        if exact:
            y, sT = self.recurrent(*leaves, start)
        else:
            y, sT = self.call(*leaves, form, start, True) if states else (self.call(*leaves, form), None)
        assert not states or sT.dtype == start.dtype
        ends = ((y, sT), (dy.to(y.dtype), dsT.to(dtype))) if states else ((y,), (dy.to(y.dtype),))
        given = (*leaves, start) if states else leaves
        grads = torch.autograd.grad(ends[0], given, ends[1], allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(given, grads)]
        found = dict(zip(self.names, (y.detach(), *grads)))
        return found, dict(sT=sT.detach(), ds0=grads[-1]) if states else {}

    def check(self, kernel, family, inputs, dy, per_head=True, gates=None):
        found = self.errors(self.run(kernel, inputs, dy)[0], self.run("reference", inputs, dy)[0])
        check({name: x for name, x in found.items() if per_head or "per head" not in name},
              gates or self.gates(kernel, family), f"{self.name} {kernel}, {family}, {tuple(dy.shape)}")


def check(found, gate, what):
    print(what, {name: f"{error:.1e}" for name, error in found.items()})
    over = {name: error for name, error in found.items()
            if not error <= gate[name.split()[0]] * (2 if "per head" in name else 1)}
    assert not over, f"{what}: relative errors too large: " + ", ".join(f"{n} {e:.1e}" for n, e in over.items())


def files(op, kernel):
    folder = ROOT / "cuda" / op.name
    return [folder / f"{op.name}_{kernel}.cu", folder / f"{op.name}_binding.cpp"]


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request, op):
    """A kernel's name, loaded to run on the CPU while the module's tests run."""
    name = request.param
    torch.ops.load_library(build_on_cpu(files(op, name), flags=[f"-DKERNEL={name}"]))
    op.script.register(name)
    with one_thread():
        yield name


@pytest.fixture(autouse=True)
def poisoned():
    """Every tensor that is not given a value holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("T", (1, 15, 16, 17, 48, 64, 65, 208))
@pytest.mark.parametrize("B, H", ((1, 1), (2, 3)))
def test_lengths(op, kernel, B, T, H):
    """With T = 1 a head's y is one number times v: it may be the small sum of large terms."""
    op.check(kernel, "random", *op.bf16("random", B=B, T=T, H=H, N=64, seed=T), per_head=T > 1)


def test_a_long_sequence(op, kernel):
    for family in op.families["long"]:
        op.check(kernel, family, *op.bf16(family, B=1, T=1024, H=1, N=64))


@pytest.mark.parametrize("N", (32, 64, 96, 128, 192))
def test_head_sizes(op, kernel, N):
    if N not in build.KERNELS[op.name, kernel].head_sizes:
        with pytest.raises(RuntimeError, match="not one of this kernel's head sizes"):
            op.call(*op.bf16("random", T=16, N=N)[0], kernel)
        return
    for family in op.families["sizes"]:
        op.check(kernel, family, *op.bf16(family, B=1, T=37, H=2, N=N))


def test_fp32(op, kernel):
    """fp32 goes through --kernel cuda as it is; others round it."""
    for family in op.families["fp32"]:
        inputs, dy = op.make(family, B=1, T=100, H=2, N=64)
        results = op.run(kernel, inputs, dy)[0]
        assert {x.dtype for x in results.values()} == {torch.float32}
        if kernel == "cuda":
            op.check(kernel, family, inputs, dy, gates=dict.fromkeys(op.names, op.fp32_gate))
        else:
            rounded = op.run(kernel, *op.bf16(family, B=1, T=100, H=2, N=64))[0]
            assert all(torch.equal(results[name], rounded[name].float()) for name in op.names)


@pytest.mark.parametrize("T", (16, 50, 130))
def test_states(op, kernel, T):
    torch.manual_seed(0)
    s0, dsT = torch.randn(2, 2, 2, 64, 64)
    for family in op.families["states"]:
        inputs, dy = op.bf16(family, B=2, T=T, H=2, N=64)
        (found, states), (exact, exact_states) = (op.run(form, inputs, dy, s0, dsT) for form in (kernel, "reference"))
        wrong = op.errors(found, exact)
        for name, x in states.items():
            wrong[name] = ((x - exact_states[name]).norm() / exact_states[name].norm()).item()
        check(wrong, op.gates(kernel, family), f"{kernel}, {family}, T {T}")


def test_a_sequence_in_two_pieces(op, kernel):
    """With the state handed on the pieces are the whole, bit for bit: 64 tokens end a chunk of every kernel."""
    inputs, dy = op.bf16("random", B=1, T=112, H=2, N=64)
    cut = lambda piece: [x[:, piece] if i < op.tensors else x for i, x in enumerate(inputs)]
    first, second = cut(slice(64)), cut(slice(64, None))
    torch.manual_seed(0)
    s0, dsT = torch.randn(2, 1, 2, 64, 64)
    whole, ends = op.run(kernel, inputs, dy, s0, dsT)
    middle = op.call(*first, kernel, s0, True)[1]
    late, states = op.run(kernel, second, dy[:, 64:], middle, dsT)
    assert torch.equal(states["sT"], ends["sT"])
    early, states = op.run(kernel, first, dy[:, :64], s0, states["ds0"])
    if kernel == "cuda":  # others keep states in bf16
        assert torch.equal(states["ds0"], ends["ds0"])
        for name in op.names[:1 + op.tensors]:
            assert torch.equal(torch.cat((early[name], late[name]), 1), whole[name]), name


def test_only_the_final_state_is_used(op, kernel):
    inputs, dy = op.bf16("random", B=1, T=32, H=1, N=64)
    dsT = torch.randn(1, 1, 64, 64)
    leaves = [x.requires_grad_() for x in inputs]
    y, sT = op.call(*leaves, kernel, None, True)
    grads = torch.autograd.grad(sT, leaves, dsT)
    exact = op.run("reference", inputs, torch.zeros_like(dy), torch.zeros(1, 1, 64, 64), dsT)[0]
    for name, x in zip(op.names[1:], grads):
        size = exact[name].norm()
        assert (x.double() - exact[name]).norm() <= op.gates(kernel, "random")[name] * size, name
    assert not grads[0].any() and sum(bool(x.any()) for x in grads) >= 3  # dr is none of them
    assert op.call(*(x.detach() for x in leaves), kernel).grad_fn is None


def test_strided_inputs_and_dy(op, kernel):
    inputs, dy = op.bf16("random", B=2, T=20, H=2, N=64)
    expected = op.run(kernel, inputs, dy)[0]
    tokens, rest = inputs[:op.tensors], inputs[op.tensors:]
    wide = torch.stack(tokens, dim=-1)
    views = [wide[..., i].requires_grad_() for i in range(2)]
    views += [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tokens[2:]]
    views += [x.T.contiguous().T.requires_grad_() for x in rest]
    assert not any(x.is_contiguous() for x in views)
    y = op.call(*views, kernel)
    y.backward(dy.transpose(1, 2).contiguous().transpose(1, 2))
    for name, x in zip(op.names, (y, *(x.grad for x in views))):
        assert torch.equal(x, expected[name]), name


def test_bitwise_repeatable(op, kernel):
    inputs, dy = op.bf16("random", B=2, T=64, H=3, N=64)
    first, second = (op.run(kernel, inputs, dy)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in op.names)


def judge(operator, kernel, library, monkeypatch):
    """What cuda/build.py asks of a library before it is used: it passes what is right, and nothing that is 5 % off."""
    errors = build.judge(operator, kernel, library, device="cpu")
    assert sum(error > 1e-4 for error in errors.values()) >= 5, errors  # those rounded to bf16
    right = build.runpy.run_path
    off = lambda result: (1.05 * result[0], result[1]) if isinstance(result, tuple) else 1.05 * result
    monkeypatch.setattr(build.runpy, "run_path", lambda path: {
        name: lambda *inputs, form=form: off(form(*inputs)) for name, form in right(path).items() if callable(form)})
    with pytest.raises(build.KernelError) as refused:
        build.judge(operator, kernel, library, device="cpu")
    assert f": {', '.join(errors)} wrong, it is refused." in refused.value.args[0]


def test_judge(op, kernel, monkeypatch):
    judge(op.name, kernel, build_on_cpu(files(op, kernel), flags=[f"-DKERNEL={kernel}"]), monkeypatch)


@pytest.mark.parametrize("states", (False, True))
def test_opcheck(op, kernel, states):
    inputs, dy = op.bf16("random", B=1, T=16, H=1, N=64)
    s0, dsT = (torch.randn(1, 1, 64, 64).requires_grad_(), torch.randn(1, 1, 64, 64)) if states else (None, None)
    library = getattr(torch.ops, op.name)
    forward, backward = (getattr(library, f"{kernel}_{way}").default for way in ("forward", "backward"))
    torch.library.opcheck(forward, (*(x.requires_grad_() for x in inputs), s0))
    inputs, s0 = [x.detach() for x in inputs], s0 if s0 is None else s0.detach()
    torch.library.opcheck(backward, (*inputs, s0, forward(*inputs, s0)[1], dy, dsT))


def test_compile_in_one_graph(op, kernel):
    x, state = torch.randn(2, 20, 64).bfloat16(), torch.randn(2, 1, 64, 64)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = op.layer(kernel)
        s0 = state.clone().requires_grad_()
        y, sT = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(x, s0)
        (y.float().square().sum() + sT.square().sum()).backward()
        results.append((y.detach(), sT.detach(), s0.grad, *(p.grad for p in layer.parameters())))
    for eager, compiled in zip(*results):
        assert eager.isfinite().all() and eager.abs().max() > 0.1
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2)


# Without torch, in a process of its own: all orders in which threads may run, every access watched, sanitizers.

DIRECT = """
import ctypes, hashlib, sys
import numpy as np
library, operator, kernel, shapes, orders = ctypes.CDLL(sys.argv[1]), *sys.argv[2:4], *map(eval, sys.argv[4:6])
def bf16(x): return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
def call(way, *arrays):
    function = getattr(library, f"{operator}_{kernel}_{way}")
    function.restype = ctypes.c_char_p
    error = function(*map(ctypes.c_int64, (B, T, H, N)), *(ctypes.c_void_p(x.ctypes.data) for x in arrays), None)
    assert error is None, error
for B, T, H, N, kept_bytes in shapes:
    generator = np.random.default_rng(0)
    size = (B, T, H, N)
    def normal(): return generator.standard_normal(size)
    INPUTS
    dy, (s0, dsT) = bf16(normal()), (generator.standard_normal((B, H, N, N)).astype(np.float32) for _ in range(2))
    seen = set()
    for order, seed, copies in orders:
        library.cuda_on_cpu_schedule(order, ctypes.c_uint64(seed), copies)
        y = np.full(size, 0xffff, np.uint16)
        grads = [np.full(size, 0xffff, np.uint16) if x.shape == size else np.full((B, H, N), np.nan, np.float32)
                 for x in inputs]
        sT, ds0 = (np.full(s0.shape, np.nan, np.float32) for _ in range(2))
        kept = np.full(kept_bytes, 0xff, np.uint8)
        assert not any(x.ctypes.data % 16 for x in (*inputs, y, kept, dy, s0, dsT))
        call("forward", *inputs, s0, y, kept, sT)
        call("backward", *inputs, s0, kept, dy, dsT, *grads, ds0)
        for x in (y, sT, *grads, ds0):
            assert ((x & 0x7f80) != 0x7f80).all() if x.dtype == np.uint16 else np.isfinite(x).all(), "NaN"
        seen.add(hashlib.sha256(b"".join(x.tobytes() for x in (y, sT, *grads, ds0))).hexdigest())
    print(len(seen), "different results of", len(orders))
    assert len(seen) == 1
"""


def direct(op, kernel, sizes, orders, env=(), flags=("-DHEAD_SIZES=64",), **how):
    like = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    shapes = [(*shape, op.script.empty(kernel, like(*shape)).nbytes) for shape in sizes]
    library = str(build_on_cpu(files(op, kernel)[:1], flags=flags, **how))
    code = DIRECT.replace("INPUTS", op.direct_inputs.strip().replace("\n", "\n    "))
    done = subprocess.run([sys.executable, "-c", code, library, op.name, kernel, repr(shapes), repr(orders)],
                          env=environment(**dict(env)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"1 different results of {len(orders)}") == len(shapes), done.stdout


@pytest.mark.parametrize("name", KERNELS)
def test_the_order_of_threads_does_not_matter(op, name):
    direct(op, name, [(1, 80, 2, 64), (2, 16, 1, 128)], ORDERS, flags=[f"-DKERNEL={name}"])


@pytest.mark.parametrize("name", KERNELS)
def test_no_races(op, name):
    direct(op, name, [(1, 80, 1, 64)], [(0, 0, 0)], races=True)


@pytest.mark.parametrize("name", KERNELS)
def test_address_and_undefined_behaviour_sanitizers(op, name):
    env = sanitized_environment()
    if env is None:
        pytest.skip("the compiler has no sanitizers")
    direct(op, name, [(2, 80, 2, 64)], [(0, 0, 0)], env, sanitize=True)


@pytest.mark.skipif(not find_nvcc(), reason="no nvcc")
@pytest.mark.parametrize("arch", ("80", "90a", "100"))
@pytest.mark.parametrize("name", KERNELS)
def test_nvcc_report(op, name, arch):
    """Registers and spills within what lets the blocks a multiprocessor that the kernel claims fit."""
    budget = op.budget(name, arch)
    flags = () if arch == "90a" or name != "cuda" else ["-DHEAD_SIZES=64"]
    if flags:
        budget = {kernel: limit for kernel, limit in budget.items() if kernel.endswith("<64")}
    report = nvcc_report(files(op, name)[0], arch, flags)
    assert {kernel.split(",")[0] for kernel in report} == set(budget), list(report)
    for kernel, used in report.items():
        registers, spill = budget[kernel.split(",")[0]]
        assert used["registers"] <= registers and used["shared"] == 0, (kernel, used)
        assert used["spill_stores"] + used["spill_loads"] <= spill, (kernel, used)
        assert spill or used["stack"] == 0, (kernel, used)
    hold_counts(files(op, name)[0], arch, report)


def test_shared_memory(op, kernel):
    """Bytes a block asks for: of the fast kernels at N 64 an SM's 227 KB hold 6 forward and 3 backward."""
    library = ctypes.CDLL(str(build_on_cpu(files(op, kernel), flags=[f"-DKERNEL={kernel}"])))
    found = {}
    for N in (64, 128):
        inputs, dy = op.bf16("random", B=1, T=16, H=1, N=N)
        y = op.call(*(x.requires_grad_() for x in inputs), kernel)
        forward = library.cuda_on_cpu_shared()
        y.backward(dy)
        found[N] = forward, library.cuda_on_cpu_shared()
    assert found == op.shared[kernel]
