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
from grading import errors
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
    gates: Callable  # kernel, family -> {name, "sT", "ds0": limit}
    fp32_gate: float  # of --kernel cuda on fp32
    families: dict  # "fp32", "states", "long", "sizes": families tried there
    budget: dict  # kernel: {kernel of the .cu file: (registers, bytes of spill)}; an SM has 65536 registers
    shared: dict  # kernel: {N: bytes of shared memory a block of the forward, of the backward's last launch}
    direct_inputs: str  # Python: from `normal()`, (B, T, H, N), `bf16`, `generator` and `np` the list `inputs`

    def bf16(self, family, **shape):
        inputs, dy = self.make(family, **shape)
        return [x.bfloat16() if i < self.tensors else x for i, x in enumerate(inputs)], dy.bfloat16()

    def run(self, form, inputs, dy, s0=None, dsT=None):
        """{y and the gradients}, {sT, ds0} if states are given; form: a kernel, or "reference" for float64."""
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
        results = self.run(kernel, inputs, dy)[0]
        assert [x.dtype for x in results.values()] == [dy.dtype, *(x.dtype for x in inputs)]
        found = errors(results, self.run("reference", inputs, dy)[0])
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


@pytest.mark.parametrize("N", (32, 48, 64, 96, 128, 192))
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
        if kernel == "cuda":
            op.check(kernel, family, inputs, dy, gates=dict.fromkeys(op.names, op.fp32_gate))
            continue
        results, rounded = op.run(kernel, inputs, dy)[0], op.run(kernel, *op.bf16(family, B=1, T=100, H=2, N=64))[0]
        for name in op.names:
            assert results[name].dtype == torch.float32 and torch.equal(results[name], rounded[name].float()), name


@pytest.mark.parametrize("T", (16, 50, 130))
def test_states(op, kernel, T):
    torch.manual_seed(0)
    s0, dsT = torch.randn(2, 2, 2, 64, 64)
    for family in op.families["states"]:
        inputs, dy = op.bf16(family, B=2, T=T, H=2, N=64)
        (found, states), (exact, exact_states) = (op.run(form, inputs, dy, s0, dsT) for form in (kernel, "reference"))
        wrong = errors(found, exact)
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


def test_bitwise_repeatable_and_strided(op, kernel):
    inputs, dy = op.bf16("random", B=2, T=64, H=3, N=64)
    first, second = (op.run(kernel, inputs, dy)[0] for _ in range(2))
    wide = torch.stack(inputs[:op.tensors], dim=-1)
    views = [*wide[..., :2].unbind(-1), *(x.mT.contiguous().mT for x in inputs[2:])]
    assert not any(x.is_contiguous() for x in views)
    leaves = [x.requires_grad_() for x in views]
    y = op.call(*leaves, kernel)
    y.backward(dy.transpose(1, 2).contiguous().transpose(1, 2))
    for name, x in zip(op.names, (y, *(x.grad for x in leaves))):
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], x), name


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
    """With what is a view of one tensor for its inputs, as in a model."""
    def layer(packed, state, *rest):
        y, sT = op.call(*packed.unbind(-1), *rest, kernel, state, True)
        return y.float().square().flatten(2), sT.sin()

    inputs, _ = op.bf16("random", B=2, T=20, H=1, N=64)
    given = [torch.stack(inputs[:op.tensors], -1), torch.randn(2, 1, 64, 64), *inputs[op.tensors:]]
    results = []
    for form in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in given]
        ends = form(*leaves)
        results.append((*ends, *torch.autograd.grad([x.sum() for x in ends], leaves)))
    for eager, compiled in zip(*results):
        assert eager.isfinite().all() and eager.abs().max() > 0.1
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2)


def test_what_the_operators_refuse(op, kernel):
    forward, backward = (getattr(getattr(torch.ops, op.name), f"{kernel}_{way}") for way in ("forward", "backward"))
    inputs, dy = op.bf16("random", B=1, T=32, H=2, N=64)
    tokens, rest, state = inputs[:op.tensors], inputs[op.tensors:], torch.zeros(1, 2, 64, 64)
    (*most, last), name = tokens, op.names[op.tensors][1:]
    for message, given, s0 in (
            ("T 20 is not a multiple of 16", [x[:, :20].contiguous() for x in tokens], None),
            ("takes bf16", [x.half() for x in tokens], None),
            (f"{name} is of another type", [*most, last.float()], None),
            (f"{name} has the wrong shape", [*most, last[:, :16].contiguous()], None),
            (f"{name} must be contiguous", [*most, last.transpose(1, 2).contiguous().transpose(1, 2)], None),
            ("r must lie at a multiple of 16 bytes",
             [torch.zeros(4097).bfloat16()[1:].view(1, 32, 2, 64), *tokens[1:]], None),
            ("s0 must be fp32", tokens, state.double()),
            ("s0 has the wrong shape", tokens, state[:, :1]),
            ("none of them 0", [x[:0] for x in tokens], None)):
        with pytest.raises(RuntimeError, match=message):
            forward(*given, *rest, s0)
    kept = forward(*inputs, None)[1]
    for message, given, dsT in (("kept has the wrong shape", kept[:, :, :-1].contiguous(), None),
                                ("dsT has the wrong shape", kept, state[:0])):
        with pytest.raises(RuntimeError, match=message):
            backward(*inputs, None, given, dy, dsT)


# Without torch, in a process of its own: all orders in which threads may run, every access watched, sanitizers.

DIRECT = """
import ctypes, hashlib, sys
import numpy as np
library, operator, kernel = ctypes.CDLL(sys.argv[1]), *sys.argv[2:4]
shapes, orders, states = map(eval, sys.argv[4:])
def bf16(x): return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
def call(way, *arrays):
    function = getattr(library, f"{operator}_{kernel}_{way}")
    function.restype = ctypes.c_char_p
    assert not any(x.ctypes.data % 16 for x in arrays)
    error = function(*map(ctypes.c_int64, (B, T, H, N)), *(ctypes.c_void_p(x.ctypes.data) for x in arrays), None)
    assert error is None, error
for B, T, H, N, kept_bytes in shapes:
    generator = np.random.default_rng(0)
    size = (B, T, H, N)
    def normal(): return generator.standard_normal(size)
    INPUTS
    dy = bf16(normal())
    s0, dsT = ([generator.standard_normal((B, H, N, N)).astype(np.float32)] * states for _ in range(2))
    seen = set()
    for order, seed, copies in orders:
        library.cuda_on_cpu_schedule(order, ctypes.c_uint64(seed), copies)
        y, kept = np.full(size, 0xffff, np.uint16), np.full(kept_bytes, 0xff, np.uint8)
        grads = [np.full(size, 0xffff, np.uint16) if x.shape == size else
                 np.full((B, H, *x.shape[:-2], N), np.nan, np.float32) for x in inputs]
        sT, ds0 = ([np.full((B, H, N, N), np.nan, np.float32)] * states for _ in range(2))
        call("forward", *inputs, *s0, y, kept, *sT)
        call("backward", *inputs, *s0, kept, dy, *dsT, *grads, *ds0)
        results = (y, *sT, *grads, *ds0)
        for x in results:
            assert ((x & 0x7f80) != 0x7f80).all() if x.dtype == np.uint16 else np.isfinite(x).all(), "NaN"
        seen.add(hashlib.sha256(b"".join(x.tobytes() for x in results)).hexdigest())
    print(len(seen), "different results of", len(orders))
    assert len(seen) == 1
"""
WAYS = ("orders", "races", "sanitize")


def direct(source, operator, kernel, shapes, inputs, way, states=True, flags=()):
    """A kernel called by ctypes: in every order of threads the same bits, or watched for races, or by sanitizers.
    shapes: (B, T, H, N, bytes of what the forward keeps). inputs: see Operator.direct_inputs."""
    env = sanitized_environment() if way == "sanitize" else {}
    if env is None:
        pytest.skip("the compiler has no sanitizers")
    orders = ORDERS if way == "orders" else ORDERS[:1]
    library = build_on_cpu([source], flags=flags, sanitize=way == "sanitize", races=way == "races")
    code = DIRECT.replace("INPUTS", inputs.strip().replace("\n", "\n    "))
    given = [str(library), operator, kernel, repr(shapes), repr(orders), repr(int(states))]
    done = subprocess.run([sys.executable, "-c", code, *given], env=environment(**env), capture_output=True, text=True,
                          timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"1 different results of {len(orders)}") == len(shapes), done.stdout


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KERNELS)
def test_orders_of_threads_races_and_sanitizers(op, name, way):
    shapes = dict(orders=[(1, 80, 2, 64), (2, 16, 1, 128)], races=[(1, 80, 1, 64)], sanitize=[(2, 80, 2, 64)])[way]
    kept = [op.script.empty(name, torch.empty(shape, dtype=torch.bfloat16, device="meta")).nbytes for shape in shapes]
    direct(files(op, name)[0], op.name, name, [(*shape, n) for shape, n in zip(shapes, kept)], op.direct_inputs, way,
           flags=[f"-DKERNEL={name}" if way == "orders" else "-DHEAD_SIZES=64"])


@pytest.mark.skipif(not find_nvcc(), reason="no nvcc")
@pytest.mark.parametrize("arch", ("80", "90a", "100"))
@pytest.mark.parametrize("name", KERNELS)
def test_nvcc_report(op, name, arch):
    """Registers and spills within what lets the blocks a multiprocessor that the kernel claims fit."""
    budget = dict(op.budget[name])
    if arch == "80" and name == "fast":  # whose 164 KB of shared memory hold 5 and 2 blocks
        budget |= {f"{op.name}::forward<64>": (96, 0), f"{op.name}::backward<64>": (255, 0)}
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
