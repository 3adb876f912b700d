"""The machine on which the CUDA kernels are tested without a GPU (tests/cuda_on_cpu): every primitive against a
definition of its own, and kernels with planted faults, each of which must be found."""

import ctypes
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import cuda_build
from cuda_build import build_on_cpu, find_nvcc, nvcc_report, sanitized_environment

pytestmark = pytest.mark.skipif(bool(cuda_build.MISSING), reason=cuda_build.MISSING or "")
SOURCE = cuda_build.STAND_IN / "primitives.cu"
FORWARDS, BACKWARDS, RANDOM = range(3)
LATE, AT_ONCE, ANY_TIME = range(3)
SCHEDULES = [*itertools.product((FORWARDS, BACKWARDS), (0,), (LATE, AT_ONCE, ANY_TIME)),
             *itertools.product((RANDOM,), range(4), (LATE, AT_ONCE, ANY_TIME))]


class Machine:
    def __init__(self, **how):
        self.library = ctypes.CDLL(str(build_on_cpu([SOURCE], **how)))
        self.library.run.restype = ctypes.c_char_p

    def error(self, kernel, blocks=1, threads=32, shared=0, allow=-1, given=None, out=None, n=0, schedule=(0, 0, 0)):
        """What went wrong, or None."""
        pointers = [None if x is None else ctypes.c_void_p(x.ctypes.data) for x in (given, out)]
        assert not any(pointer and pointer.value % 16 for pointer in pointers)
        order, seed, copies = schedule
        self.library.cuda_on_cpu_schedule(order, ctypes.c_uint64(seed), copies)
        message = self.library.run(kernel.encode(), blocks, threads, shared, allow, *pointers, n)
        return message and message.decode()

    def run(self, kernel, given, shape, dtype=np.float32, **how):
        """`out`, filled with 0xff beforehand."""
        out = np.frombuffer(b"\xff" * (int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape).copy()
        message = self.error(kernel, given=given, out=out, **how)
        assert message is None, message
        return out


@pytest.fixture(scope="module")
def machine():
    return Machine()


@pytest.fixture(scope="module")
def watched():
    return Machine(races=True)


def floats(x):
    return np.ascontiguousarray(x, np.uint32).view(np.float32)


def bf16(x):
    """Float32 to the bits of bf16, by torch."""
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def pairs(halves):
    """Elements 0 and 1 of the last axis in one register, 2 and 3 in the next."""
    return halves[..., ::2].astype(np.uint32) | halves[..., 1::2].astype(np.uint32) << 16


# The primitives. Layouts are written from the tables of the PTX manual, not from primitives.cuh.


def test_pack_bf16(machine):
    """Every number of bf16, what lies a little above it, at the tie and around: subnormals, Inf and NaN among them."""
    halves = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = floats((np.arange(65536, dtype=np.uint32)[:, None] << 16 | halves).ravel())
    x = np.stack((x, np.random.default_rng(0).permutation(x)), -1)
    out = machine.run("pack", x, (len(x), 4), np.uint32, blocks=len(x) // 1024, threads=1024)
    expected = bf16(x).reshape(x.shape)
    expected[np.isnan(x)] = 0x7FFF
    assert (out[:, :2] == pairs(expected)).all()
    assert (out[:, 2:] == expected.astype(np.uint32) << 16).all()


def test_exponential_and_reciprocal(machine):
    x = np.concatenate((np.random.default_rng(0).uniform(-130, 130, 4000), np.linspace(-3, 3, 61), [-126, -127, 127],
                        [0, -0.0, np.inf, -np.inf, np.nan, 1e38, -1e-38, 3e38])).astype(np.float32)
    x = x[: len(x) // 8 * 8]
    out = machine.run("approximate", x, (len(x), 2), blocks=len(x) // 8, threads=8)
    with np.errstate(all="ignore"):
        for found, exact in zip(out.T, (2 ** x.astype(np.float64), 1 / x.astype(np.float64))):
            exact = np.where(np.abs(exact) < 2.0**-126, 0 * exact, exact)
            expected = exact.astype(np.float32)
            same = (found == expected) | (np.isnan(found) & np.isnan(expected))
            assert (same | (np.abs(found - exact) <= 2 * np.spacing(np.abs(expected)))).all()
            assert (np.signbit(found) == np.signbit(expected))[~np.isnan(expected)].all()


def fragments(tile, kind):
    """A tile as lanes hold it, (32, elements): PTX manual, "Matrix Fragments for mma.m16n8k16", .bf16 and .f32."""
    lane, i = np.ogrid[:32, :4 if kind != "A" else 8]
    group, pair = lane >> 2, lane % 4 * 2 + (i & 1)
    if kind == "A":
        return tile[np.where((i < 2) | (4 <= i) & (i < 6), group, group + 8), pair + np.where(i < 4, 0, 8)]
    if kind == "B":
        return tile[pair + np.where(i < 2, 0, 8), group]
    return tile[np.where(i < 2, group, group + 8), pair]


@pytest.mark.parametrize("numbers", ("integers", "normal", "large and small"))
def test_multiply_add(machine, numbers):
    generator = np.random.default_rng(0)
    A, B, C = (generator.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    if numbers == "integers":
        A, B, C = (np.round(8 * x) for x in (A, B, C))
    elif numbers != "normal":
        A, C = A * 2.0 ** generator.integers(-30, 30, A.shape), (C * 1e-3).astype(np.float32)
    A, B = bf16(A), bf16(B)
    given = np.concatenate((pairs(fragments(A, "A")), pairs(fragments(B, "B")), np.zeros((32, 2), np.uint32),
                            fragments(C, "C").view(np.uint32)), -1)
    out = machine.run("multiply", given, (32, 4))
    a, b = (floats(x.astype(np.uint32) << 16).astype(np.float64) for x in (A, B))
    exact, size = C + a @ b, np.abs(C) + np.abs(a) @ np.abs(b)
    assert (np.abs(out - fragments(exact, "C")) <= fragments(size, "C") * 16 * 2.0**-24).all()
    if numbers == "integers":
        assert (out == fragments(exact, "C")).all()
    in_order = C.astype(np.float32)
    for k in range(16):
        in_order += (a[:, k : k + 1] * b[k : k + 1]).astype(np.float32)
    assert (out == fragments(in_order, "C")).all()


def test_load_tiles(machine):
    """PTX manual, ldmatrix: lanes 8j to 8j+7 address the rows of matrix j; lane i gets elements 2 (i % 4) and the next
    of row i / 4, with .trans of column i / 4."""
    generator = np.random.default_rng(0)
    memory = generator.integers(0, 65536, 1024).astype(np.uint16)
    offsets = generator.permutation(128)[:32].astype(np.int32) * 16
    offsets[5] = offsets[20]
    given = np.concatenate((offsets.view(np.uint32), memory.view(np.uint32)))
    out = machine.run("tiles", given, (32, 2, 4), np.uint32, shared=2048)
    matrices = np.stack([memory[at // 2 : at // 2 + 8] for at in offsets]).reshape(4, 8, 8)
    for which, m in enumerate((matrices, matrices.swapaxes(1, 2))):
        assert (out[:, which] == pairs(m).reshape(4, 32).T).all()


def test_shuffles(machine):
    generator = np.random.default_rng(0)
    x = generator.standard_normal(64).astype(np.float32)
    for step in range(32):
        given = np.stack((x, 0 * x + step, 0 * x + step, generator.integers(0, 32, 64).astype(np.float32)), 1)
        out = machine.run("shuffles", given, (64, 4), threads=64, schedule=(RANDOM, step, 0))
        for i in range(64):
            warp, lane = x[i // 32 * 32 :][:32], i % 32
            expected = (warp[lane ^ step], warp[lane - step if lane >= step else lane],
                        warp[lane + step if lane + step < 32 else lane], warp[int(given[i, 3])])
            assert tuple(out[i]) == expected
    given[:, 2] = 32
    assert re.search(r"thread \d+: shuffle_up: 32 is not in 0 .. 31", machine.error("shuffles", given=given, out=out))


def test_groups_of_copies(machine):
    """What is there: as little as the rules promise, everything, or something in between in the groups' order."""
    given = np.arange(20, dtype=np.int32)
    promised = np.array([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])

    def found(order, seed, copies):
        return machine.run("groups", given, (5, 5), np.int32, threads=1, shared=80, schedule=(order, seed, copies))

    assert (found(FORWARDS, 0, LATE) == promised).all()
    assert (found(FORWARDS, 0, AT_ONCE) == 1).all()
    seen = [found(FORWARDS, seed, ANY_TIME) for seed in range(40)]
    for there in seen:
        assert set(there.ravel()) <= {0, 1} and (there >= promised).all() and (np.diff(there, axis=0) >= 0).all()
        assert (there[:, :2].min(1) >= there[:, 2]).all() and (np.diff(there[:, 2:], axis=1) <= 0).all()
    assert len({there.tobytes() for there in seen}) > 10
    assert any((there[:, 0] < there[:, 1]).any() for there in seen), "within a group any order"


def test_where_threads_are_in_what_order_and_what_they_find(machine):
    out = machine.run("where", None, (3, 40, 4), np.int32, blocks=3, threads=40)
    assert (out[..., 0] == np.arange(40)).all() and (out[..., 1] == np.arange(3)[:, None]).all()
    assert (out[..., 2:] == (40, 3)).all()
    out = machine.run("first_bytes", None, 75, np.uint32, shared=300, n=300)
    assert np.isnan(floats(out)).all(), "shared memory is NaN at first"

    def order(*schedule):
        out = np.zeros(1 + 192, np.int32)
        assert machine.error("order", blocks=2, threads=96, out=out, schedule=schedule) is None
        return list(out[1:])

    assert order(FORWARDS, 0, LATE) == list(range(192)) == order(BACKWARDS, 0, LATE)[::-1]
    ways = [order(RANDOM, seed, LATE) for seed in range(8)]
    assert all(sorted(way) == list(range(192)) for way in ways) and order(RANDOM, 3, LATE) == ways[3]
    assert len({tuple(way) for way in ways}) == 8 and len({way[0] // 96 for way in ways}) == 2


# A kernel without a race, and what is found when it gets one.

STEPS, BLOCKS = 7, 3
MATRICES = bf16(np.random.default_rng(0).standard_normal((BLOCKS, STEPS, 16, 16)))


def chain(machine, missing="NOTHING", schedule=(0, 0, 0)):
    out = np.full((BLOCKS, 4, 16, 16), 0xFFFF, np.uint16)
    return machine.error(f"chain<{missing}>", BLOCKS, 128, 3 * 512 + 4 * 512, given=MATRICES, out=out, n=STEPS,
                         schedule=schedule), out


def numbers(halves):
    return torch.from_numpy(halves.view(np.int16)).view(torch.bfloat16).double()


@pytest.mark.parametrize("flags", ((), ("-DCUDA_ON_CPU_UCONTEXT",)))  # for other processors than x86-64
def test_same_bits_in_every_schedule(flags):
    machine = Machine(flags=flags)
    message, out = chain(machine)
    assert message is None
    own = torch.eye(16, dtype=torch.float64).repeat(BLOCKS, 1, 1)
    for given in numbers(MATRICES).unbind(1):
        own = own @ given
        own = (own / own.abs().sum((1, 2), keepdim=True)).bfloat16().double()
    assert (numbers(out) - own[:, None]).abs().max() < 0.02 * own.abs().max()
    for schedule in SCHEDULES:
        message, other = chain(machine, schedule=schedule)
        assert message is None and (other == out).all(), schedule
    assert "wait for others" in machine.error("some_skip_barrier", n=5)
    assert machine.error("some_skip_barrier", n=32) is None


EXCHANGES = {  # kernel: what the watching build says, None where nothing is wrong
    "neighbour<0>": "thread 1 writes byte 4 of shared memory .* that thread 0 read .* with no barrier in between",
    "neighbour<1>": "thread 32 writes byte 128 .* that warp 0 read .* with no barrier",
    "neighbour<2>": None,
    "other_warp": "thread 32 reads byte 0 .* that thread 0 wrote .* with no barrier",
    "overwrite": "thread 31 reads byte 0 of shared memory .* that thread 0 wrote .* with no barrier in between",
    "others_copy<false>": "thread 1 writes byte 16 of shared memory .* that thread 0 read .* with no barrier",
    "others_copy<true>": None,
    "early_read": "thread 0 reads byte 0 of shared memory .* that thread 0 fills .* copy that was not waited for",
}


def test_races_differ_between_schedules(machine):
    given = np.random.default_rng(0).standard_normal(4 * 64).astype(np.float32)
    for kernel, said in EXCHANGES.items():
        results = {machine.run(kernel, given, 4 * 64, threads=64, shared=1024, schedule=schedule).tobytes()
                   for schedule in SCHEDULES}
        assert (len(results) > 1) == (said is not None), kernel
    for missing in ("WAIT", "BARRIER", "LAST_BARRIER"):
        assert len({chain(machine, missing, schedule)[1].tobytes() for schedule in SCHEDULES}) > 1, missing


@pytest.mark.parametrize("schedule", [(FORWARDS, 0, LATE), (BACKWARDS, 0, LATE), (RANDOM, 1, ANY_TIME)])
def test_races_are_named(watched, schedule):
    """Whatever the schedule; the lines of the source, too, and where no schedule of fibers shows a difference."""
    def error(kernel, **how):
        given, out = np.zeros((2, 4 * 64), np.float32)
        return watched.error(kernel, given=given, out=out, schedule=schedule, **{"threads": 64, "shared": 1024, **how})

    for kernel, expected in EXCHANGES.items():
        message = error(kernel)
        assert (message is None) == (expected is None), message
        if schedule[0] == FORWARDS and expected:
            assert re.search(expected, message), message
    source, message = SOURCE.read_text(), error("neighbour<0>")
    for text in ("s[thread()] = as<float>(in)[thread()];", "= s[(threadIdx.x + 1) % blockDim.x];"):
        line = 1 + source[:source.index(text)].count("\n")
        assert f"primitives.cu:{line}" in re.findall(r"primitives.cu:\d+", message), message
    assert "with no barrier in between" in error("shuffle_for_barrier")
    assert "global memory" in error("one_place", n=1) and "global memory" in error("one_place", blocks=2)
    for kernel in ("one_place", "tell_blocks"):
        assert error(kernel) is None and "another block" in error(kernel, blocks=2)
    assert chain(watched, schedule=schedule)[0] is None
    for missing, text in dict(WAIT="not waited for", BARRIER="", LAST_BARRIER="", WARP_BARRIER="no barrier").items():
        message, _ = chain(watched, missing, schedule)
        assert message and text in message, missing


# Errors: each names the block and the threads, nothing hangs, and the launch that follows works.


STUCK = "^block 0: some threads wait for others that never come: "
SHARED = "of shared memory was written, which has 1024$"
ERRORS = (  # kernel, n, what is said as a pattern, threads
    ("some_skip_barrier", 64, None, 64), ("tiles_at", 1024 - 16, None, 64), ("barrier_or_collective", 32, None, 33),
    ("some_skip_barrier", 40, STUCK + "threads 0-39 wait at sync_block; threads 40-63 have ended$", 64),
    ("some_skip_collective", 33, STUCK + "threads 32, 34-63 wait in shuffle; threads 0-31, 33 have ended$", 64),
    ("barrier_or_collective", 8,
     STUCK + "threads 0-7, 32-39 wait at sync_block; threads 8-31, 40-63 wait in sync_warp$", 64),
    ("barrier_or_collective", 0, "wait in sync_warp", 48),  # half a warp
    ("write_at", 1024, f"^block 0: byte 1024 {SHARED}", 64), ("write_at", -1, f"^block 0: byte -1 {SHARED}", 64),
    ("different_collectives", 3,
     r"^block 0: thread \d+: in shuffle_\w+, while other lanes of its warp are in shuffle_\w+$", 64),
    ("unawaited", 0, r"thread \d+: ended with 1 copies that it did not wait for", 64),
    ("copy_at", 8, r"copy_async: the address in shared memory \(byte 8\) is not a multiple of 16", 64),
    ("copy_source_at", 4, "copy_async: the address in global memory is not a multiple of 16", 64),
    ("copy_source_at", -1, "copy_async: the source is in shared memory", 64),
    ("copy_at", 1024, "copy_async: byte 1024 of shared memory, which has 1024", 64),
    ("tiles_at", 2, r"load_tiles: the address in shared memory \(byte 2\) is not a multiple of 16", 64),
    ("tiles_at", -16, "load_tiles: byte -16 of shared memory, which has 1024", 64))


@pytest.mark.parametrize("order", (FORWARDS, BACKWARDS, RANDOM))
def test_errors(machine, order):
    given, out = np.zeros((2, 1024), np.float32)
    how = dict(given=given, out=out, shared=1024)
    for kernel, n, said, threads in ERRORS:
        message = machine.error(kernel, n=n, threads=threads, schedule=(order, 1, LATE), **how)
        assert re.search(said, message) if said else message is None, (kernel, n, message)
        assert machine.error("neighbour<2>", threads=64, **how) is None


def test_refused_launches(machine):
    too_much = "102400 bytes of shared memory, more than cudaFuncSetAttribute allowed"
    for how, said in ((dict(blocks=0), "invalid configuration argument"), (dict(threads=0), "invalid configuration"),
                      (dict(threads=1025), "invalid configuration argument"), (dict(shared=100 << 10), too_much),
                      (dict(allow=(227 << 10) + 1), "invalid argument: 232449 bytes"), (dict(shared=48 << 10), None),
                      (dict(threads=1024), None), (dict(shared=100 << 10, allow=100 << 10), None),
                      (dict(shared=100 << 10), None)):  # by what the one before it allowed
        message = machine.error("first_bytes", out=np.zeros(16, np.uint8), n=16, **{"shared": 16, **how})
        assert said in message if said else message is None, how


# Sanitizers, in processes of their own.

SANITIZED = """
import ctypes, sys, numpy
path, kernel, shared, n = sys.argv[1:]
library = ctypes.CDLL(path)
library.run.restype = ctypes.c_char_p
given, out = numpy.zeros(4096, "u2"), numpy.zeros(4096, "u2")
pointers = [ctypes.c_void_p(x.ctypes.data) for x in (given, out)]
for order in (0, 1, 2):
    library.cuda_on_cpu_schedule(order, ctypes.c_uint64(0), order)
    print(library.run(kernel.encode(), 2, 128, int(shared), -1, *pointers, int(n)), flush=True)
"""


@pytest.fixture(scope="module")
def sanitized():
    if not sanitized_environment():
        pytest.skip("the compiler has no AddressSanitizer or UBSan")
    return str(build_on_cpu([SOURCE], sanitize=True))


@pytest.mark.parametrize("kernel, shared, n, expected", [
    ("chain<NOTHING>", 3584, 7, None),
    ("some_skip_barrier", 0, 5, None),
    ("chain<NOTHING>", 3584, 20, "heap-buffer-overflow"),  # the source of a copy, after 16 of 20 matrices
    ("write_at", 1000, 1000, "heap-buffer-overflow"),
    ("read_at", 1000, 1000, "heap-buffer-overflow"),
    ("read_at", 1000, -1, "heap-buffer-overflow"),
    ("wide_read_at", 0, 4, "misaligned address"),
    ("wide_read_at", 0, 8192, "heap-buffer-overflow"),
])
def test_sanitizers(sanitized, kernel, shared, n, expected):
    done = subprocess.run([sys.executable, "-c", SANITIZED, sanitized, kernel, str(shared), str(n)],
                          env={**os.environ, **sanitized_environment()}, capture_output=True, text=True, timeout=100)
    if expected:
        assert done.returncode != 0 and expected in done.stderr and "primitives.cu:" in done.stderr, done.stderr
    else:
        assert done.returncode == 0 and not done.stderr, done.stderr
        expected = "None" if "chain" in kernel else "threads 0-4 wait at sync_block; threads 5-127 have ended"
        assert done.stdout.count(expected) == 3, done.stdout


# nvcc


@pytest.mark.skipif(not find_nvcc(), reason="no nvcc")
@pytest.mark.parametrize("arch", ("80", "90a", "100"))
def test_nvcc_takes_the_same_sources(arch):
    report = nvcc_report(SOURCE, arch)
    assert {"pack", "chain<0>", "chain<4>", "wide_read_at"} <= set(report)
    assert len(report) == SOURCE.read_text().count("KERNEL(") - 1
    over = {name: kernel for name, kernel in report.items()
            if not 2 <= kernel["registers"] <= 64 or kernel["stack"] or kernel["spill_stores"] or kernel["shared"]}
    assert not over, over
    assert report["neighbour<2>"]["barriers"] == 1 and report["neighbour<1>"]["barriers"] == 0


@pytest.mark.skipif(not find_nvcc(), reason="no nvcc")
def test_nvcc_report_and_warnings(tmp_path):
    source = tmp_path / "kernels.cu"
    text = """
namespace { template <int N, bool B> __global__ void big(float* x) {
  __shared__ float s[100];
  s[threadIdx.x] = x[0];
  __syncthreads();
  float y[N];
  for (int i = 0; i < N; ++i) y[i] = x[i] * s[i];
  for (int i = 0; i < N; ++i) for (int j = 0; j < N; ++j) x[i * N + j] = B ? y[i] * y[j] : 0;
} }
void launch(float* x) { big<48, true><<<1, 32>>>(x); }
"""
    source.write_text(text)
    (name, kernel), = nvcc_report(source, "90a", flags=["-maxrregcount=24"]).items()
    assert name == "big<48, true>" and kernel["registers"] <= 24 and kernel["shared"] == 400
    assert kernel["stack"] > 0 and kernel["spill_stores"] > 0 and kernel["spill_loads"] > 0
    source.write_text(text + "void unused() { int nobody = 1; }\n")
    with pytest.raises(RuntimeError, match="nobody"):
        nvcc_report(source, "90a")
