"""The operators under cuda/ as cuda/bench.py and the tests see them: inputs, reference, kernels, peers, the errors that
a sound kernel stays below, traffic and arithmetic. To be imported; python cuda/bench.py --help lists them.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

CUDA = Path(__file__).resolve().parent
sys.path.append(str(CUDA.parent))
import train_rwkv6  # noqa: E402
import train_rwkv7  # noqa: E402


def load(path):
    """A file below cuda/ as a module. The folder is no package, since NVIDIA's packages have its name."""
    spec = importlib.util.spec_from_file_location("cuda_" + path.removesuffix(".py").replace("/", "_"), CUDA / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load("build.py")
KERNELS = build.KERNELS
REFERENCE = {operator: load(f"{operator}/reference.py") for operator in ("wkv7", "wkv6")}


@dataclass
class Kernel:
    """One implementation. call(*prepare(inputs)) -> y; `rounds`: what the operands of its products are rounded to."""
    call: Callable | None = None
    missing: str = ""  # why there is no call
    rounds: str = "fp32"
    prepare: Callable = lambda inputs: inputs
    head_sizes: tuple = ()  # any, if empty
    peer: bool = False


@dataclass
class Operator:
    """What is checked and timed. Inputs come in the order of the reference's arguments; sizes are for one B,T,H,N."""
    tensors: tuple  # names: y, then the gradients in the order of the inputs
    make: Callable  # family, B, T, H, N -> inputs, dy; fp32
    reference: Callable  # inputs -> y
    kernels: Callable  # device, peers -> {name: Kernel}; the first is the one that speed-ups are against
    gates: Callable  # rounds, dtype, family -> {tensor: relative L2 error}
    elements: Callable  # B, T, H, N -> numbers read or written at the least, both passes
    flops: Callable  # B, T, H, N -> of the recurrence, both passes
    head_sizes: tuple
    families: tuple  # of inputs; the first are plain
    shapes: dict  # device: shapes timed by default; none: not timed there


ANY_SIZE = (16, 32, 64, 96, 128, 192)  # of heads, that the torch forms are tried at


def why_not(script, kernel):
    """Load a kernel for a training script, built if need be. Returns "" or that it cannot be had; why is on stderr."""
    try:
        if kernel != "torch":
            script.load_kernel(kernel)
    except ValueError as error:
        return str(error)
    return ""


def own_kernels(operator, script, call, device):
    """The torch form and the kernels of an operator that run on a device, built if need be. call(kernel): y by it."""
    kernels = {"torch": Kernel(call("torch"), head_sizes=ANY_SIZE)}
    for (of, name), form in KERNELS.items():
        if of == operator and form.device == device and not form.fused:
            kernels[name] = Kernel(call(name), why_not(script, name), head_sizes=tuple(build.head_sizes(form)),
                                 rounds="fp32" if "fp32" in form.dtypes else "bf16")
    return kernels


def peer(package, module, name):
    """A function of another project and "", or None and why there is none."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None, f"{package} is not installed"
    try:
        return getattr(importlib.import_module(module), name), ""
    except Exception as error:  # what a package for other versions raises at import may be anything
        return None, f"{package} {version}: {first_line(error)}"


PLAIN = ("random", "zeros", "large", "tiny dy", "sparse dy")


def plain_family(family, tensors, k, v, dy):
    """The families PLAIN, which every operator has, made in place of random tensors (B, T, H, N). Raises ValueError."""
    T = dy.size(1)
    if family == "zeros":  # rows of padding, and a head that is zero throughout
        for x in (*tensors, dy):
            x[:, 1::3] = 0
            x[:, T // 2 :, -1] = 0
            x[:, :, 0] = 0
    elif family == "large":
        k *= 30
        v *= 30
    elif family == "tiny dy":
        dy *= 1e-6
    elif family == "sparse dy":
        dy[:, torch.arange(T) % 7 != 3] = 0
    elif family != "random":
        raise ValueError(f"no family of inputs is called {family!r}")


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:150]


# ----------------------------------------------------------------------------------------------------------------------
# WKV-7


def wkv7_inputs(family, B=2, T=100, H=3, N=64, seed=0):
    """Inputs r, w, k, v, a, b and dy of an input family, fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(B, T, H, N, generator=generator)

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    r, w, k, v, kappa, alpha, dy = (*(normal() for _ in range(4)), unit(normal()), torch.sigmoid(normal()), normal())
    if family == "slow":
        w = w.fill_(-5.0)  # d = 0.996
    elif family == "bound":
        w = w.fill_(20.0)  # d = 0.5452, the bound
    elif family == "correlated":  # cosine 0.9 between the keys, as where a text repeats itself
        one = unit(normal()[:, :1])
        kappa, alpha, w = unit(one * 0.9**0.5 + kappa * 0.1**0.5), torch.full_like(alpha, 0.9), w.fill_(-5.0)
        k = kappa * 8
    elif family == "identical":
        kappa, alpha, w = kappa[:, :1].expand_as(kappa).contiguous(), torch.ones_like(alpha), w.fill_(-12.0)
        k = kappa * 8
    else:
        plain_family(family, (r, w, k, v, kappa), k, v, dy)
    return (r, w, k, v, -kappa, kappa * alpha), dy


def wkv7_gates(rounds, dtype, family):
    """What the public kernels' errors and an emulation of the roundings leave to a sound kernel, by a margin."""
    if dtype == torch.float32:
        limits = KERNELS["wkv7", "cpu"].limits
    elif rounds == "fp32":  # rounding y or a gradient to bf16 alone is 1.7e-3
        limits = KERNELS["wkv7", "cuda"].limits
    elif family == "identical":
        limits = [2.5e-2, 2.5e-2, 2.5e-2, 2.5e-2, 2.5e-2, 3e-2, 3e-2]
    elif family == "correlated":
        limits = [1.2e-2, 1.2e-2, 1.2e-2, 5e-3, 1.2e-2, 1.6e-2, 1.6e-2]
    else:
        limits = KERNELS["wkv7", "fast"].limits
    return dict(zip(("y", "dr", "dw", "dk", "dv", "da", "db"), limits))


def wkv7_kernels(device, peers):
    kernels = own_kernels("wkv7", train_rwkv7, lambda name: functools.partial(train_rwkv7.wkv7, kernel=name), device)
    if peers:
        kernels.update({"fla": fla_wkv7(), "fla, more saved": fla_wkv7(disable_recompute=True)})
    return kernels


def fla_wkv7(**settings):
    """flash-linear-attention's operator with the settings of its own layer. It takes the logarithm of the decay, in
    the dtype of the rest; that activation and its gradient are not timed."""
    call, missing = peer("flash-linear-attention", "fla.ops.rwkv7", "chunk_rwkv7")
    if missing:
        return Kernel(missing=missing, peer=True)
    settings = dict(safe_gate=True, lower_bound=-REFERENCE["wkv7"].DECAY_BOUND, chunk_size=64, scale=1.0, **settings)
    settings = {name: value for name, value in settings.items() if name in inspect.signature(call).parameters}

    def log_decay(inputs):
        r, w, k, v, a, b = inputs
        return r, (-REFERENCE["wkv7"].DECAY_BOUND * torch.sigmoid(w.float())).to(w.dtype), k, v, a, b

    def y(r, w, k, v, a, b):
        return call(r=r, w=w, k=k, v=v, a=a, b=b, **settings)[0]
    return Kernel(y, rounds="bf16", prepare=log_decay, peer=True)


def wkv7():
    return Operator(
        tensors=("y", "dr", "dw", "dk", "dv", "da", "db"), make=wkv7_inputs, kernels=wkv7_kernels, gates=wkv7_gates,
        reference=lambda *inputs: REFERENCE["wkv7"].wkv7(*inputs)[0],
        elements=lambda B, T, H, N: (7 + 13) * B * T * H * N, flops=lambda B, T, H, N: (9 + 19) * B * T * H * N * N,
        head_sizes=ANY_SIZE, families=(*PLAIN, "slow", "bound", "correlated", "identical"),
        shapes={"cuda": [(64, 1024, 12, 64), (64, 1024, 6, 128), (8, 1024, 12, 64)],
                "cpu": [(16, 256, 4, 32), (8, 256, 4, 64), (1, 1024, 12, 64)]})


# ----------------------------------------------------------------------------------------------------------------------
# The time mixing around WKV-7, in one operator (--wind_cuda) or in steps

MIXED = ("out", "dr", "dw", "dk", "dv", "da", "dg", "dw0", "da0", "dk_k", "dk_a", "dr_k", "dln_w", "dln_b")


def time_mix_inputs(family, B, T, H, N):
    (r, w, k, v, a, _), dy = wkv7_inputs(family, B, T, H, N)
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    alpha, gate, spread = normal(B, T, H, N), normal(B, T, H, N), [0.5, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1]
    if family == "correlated":  # the keys, the decay and alpha 0.9 as they are there
        alpha, k, spread[:3] = torch.full_like(alpha, 2.2), -8 * a, [0, 0, 0]
    parameters = [mean + width * normal(H, N) for mean, width in zip((0, 0, 0.7, 1, 0, 1, 0), spread)]
    return (r, w, k, v, alpha, gate, *parameters), dy


def time_mix(*inputs, kernel="torch"):
    return train_rwkv7.time_mix(*inputs[:6], inputs[6:], kernel)


def time_mix_gates(rounds, dtype, family):
    """Emulated on a CPU, B,T,H 2,200,3: fused at most 7.8e-3, its r_k and ln_b, of sums in fp32, 1.4e-7; in steps, each
    rounded to bf16, 2.3e-2. Less of T, and a token whose y hardly varies can cost the norm all its digits."""
    if dtype == torch.float32:
        return dict.fromkeys(MIXED, 2e-6)
    if rounds == "steps":
        return dict.fromkeys(MIXED, 3e-2)
    return {**dict.fromkeys(MIXED, 1e-2), "dr_k": 1e-5, "dln_b": 1e-5}


def time_mix_kernels(device, peers):
    """In steps as a model takes them, compiled on a GPU, and fused."""
    def steps(name):
        call = functools.partial(time_mix, kernel=name)
        if device == "cuda" and name != "torch":  # as the scripts do: the torch form's loop would be unrolled
            call = torch.compile(call, fullgraph=True, dynamic=False)
        return Kernel(call, why_not(train_rwkv7, name), rounds="steps")
    if device == "cpu":
        return {"mix torch": steps("torch"), "mix cpu": steps("cpu")}
    wind = Kernel(functools.partial(time_mix, kernel="wind"), why_not(train_rwkv7, "wind"), rounds="bf16")
    return {"mix torch": steps("torch"), "mix fast": steps("fast"), "wind": wind}


def time_mixing():
    return Operator(
        tensors=MIXED, make=time_mix_inputs, kernels=time_mix_kernels, gates=time_mix_gates,
        reference=lambda *inputs: REFERENCE["wkv7"].time_mix(*inputs[:6], inputs[6:]),
        elements=wkv7().elements, flops=wkv7().flops, head_sizes=KERNELS["wkv7", "wind"].head_sizes,
        families=wkv7().families,
        shapes={"cuda": [(64, 1024, 12, 64)], "cpu": []})  # what it saves is traffic of a GPU's memory


# ----------------------------------------------------------------------------------------------------------------------
# WKV-6


def wkv6_inputs(family, B=2, T=100, H=3, N=64, seed=0):
    """Inputs r, k, v, w, u and dy of an input family, fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*(shape or (B, T, H, N)), generator=generator)

    r, k, v, w, dy, u = *(normal() for _ in range(5)), normal(H, N)
    if family == "hard":  # sums of 16 log-decays reach -124: their exp, or its reciprocal, leaves fp32
        w = 1 + 0.7 * w
    elif family == "correlated":  # cosine 0.9 between the keys, slow decay
        unit = functools.partial(torch.nn.functional.normalize, dim=-1)
        k, w = 8 * unit(unit(normal(B, 1, H, N)) * 0.9**0.5 + unit(k) * 0.1**0.5), w.fill_(-5.5)
    elif family == "slow":  # d = 0.996
        w = w.fill_(-5.5)
    elif family == "strong":  # d = 2e-9; the log-decays of the sequence sum to -2000
        w = w.fill_(3.0)
    elif family == "at the edge":  # d = 1e-35, just above what fp32 can hold
        w = w.fill_(4.4)
    elif family == "nothing stays":  # d = 0, even in fp64
        w = w.fill_(8.0)
    elif family == "drops":  # slow decay, and now and then a token that wipes a channel out: log d = -1e5
        w = torch.where(w > 1.5, 11.5 + 0.1 * w, -6 + 0.1 * w)
    elif family == "no bounds":
        w = torch.where(w > 1, 10 + 100 * (w - 1), torch.where(w < -1, 40 * w, w - 4))
        w[:, ::5, 1] = -1e30
        w[0, min(7, T - 1), -1] = 500.0
    else:
        plain_family(family, (r, k, v, w), k, v, dy)
        if family == "zeros":
            u[1] = 0
    return (r, k, v, w, u), dy


def wkv6_gates(rounds, dtype, family):
    """As for WKV-7; u and du are fp32."""
    limits = [5e-3, 5e-3, 5e-3, 5e-3, 5e-3, 1e-3]
    if dtype == torch.float32:
        limits = KERNELS["wkv6", "cpu"].limits
    elif rounds == "fp32":
        limits = [2.5e-3, 2.5e-3, 2.5e-3, 2.5e-3, 4e-3, 1e-3]
    gates = dict(zip(("y", "dr", "dk", "dv", "dw", "du"), limits))
    if family == "at the edge":  # of what fp32 can hold: cuda/README.md
        gates["dw"] = max(gates["dw"], 4e-6)
    return gates


def wkv6_kernels(device, peers):
    kernels = own_kernels("wkv6", train_rwkv6, lambda name: functools.partial(train_rwkv6.wkv6, kernel=name), device)
    return {**kernels, "fla": fla_wkv6()} if peers else kernels


def fla_wkv6():
    """flash-linear-attention's operator. It takes the logarithm of the decay, in the dtype of the rest; that activation
    and its gradient are not timed."""
    call, missing = peer("flash-linear-attention", "fla.ops.rwkv6", "chunk_rwkv6")
    if missing:
        return Kernel(missing=missing, peer=True)

    def log_decay(inputs):
        r, k, v, w, u = inputs
        return r, k, v, (-torch.exp(w.float())).to(w.dtype), u
    return Kernel(lambda r, k, v, w, u: call(r=r, k=k, v=v, w=w, u=u, scale=1.0)[0], rounds="bf16", prepare=log_decay,
                  peer=True)


def wkv6():
    return Operator(
        tensors=("y", "dr", "dk", "dv", "dw", "du"), make=wkv6_inputs, kernels=wkv6_kernels, gates=wkv6_gates,
        reference=lambda *inputs: REFERENCE["wkv6"].wkv6(*inputs)[0],
        elements=lambda B, T, H, N: (5 + 9) * B * T * H * N, flops=lambda B, T, H, N: (5 + 11) * B * T * H * N * N,
        head_sizes=ANY_SIZE, shapes=wkv7().shapes,
        families=(*PLAIN, "hard", "correlated", "slow", "strong", "at the edge", "nothing stays", "drops", "no bounds"))


def with_states(operator, name):
    """The operator from a state that is not zero to its final state, `name` being the reference's. y and that state are
    one vector, (B, T, H, N) and (B, H, N, N) flattened; the initial state, (B, H, N N) fp32, is the last input."""
    def join(y, state):
        return torch.cat([y.to(state.dtype).flatten(), state.flatten()])

    def make(family, B, T, H, N):
        inputs, dy = operator.make(family, B, T, H, N)
        generator = torch.Generator().manual_seed(2)
        state, dstate = (torch.randn(B, H, N * N, generator=generator) for _ in range(2))
        return (*inputs, state), join(dy, dstate)

    def start(x, like):
        return x.unflatten(-1, (like.size(-1), like.size(-1)))

    def kernels(device, peers):
        def call(form):
            return lambda *x: join(*form.call(*x[:-1], state=start(x[-1], x[0]), final=True))
        return {kernel: dataclasses.replace(form, call=call(form))
                for kernel, form in operator.kernels(device, False).items()
                if kernel == "torch" or KERNELS[name, kernel].states}

    def gates(rounds, dtype, family):
        limits = operator.gates(rounds, dtype, family)
        return {**limits, "y, sT": limits["y"], "ds0": max(limits.values())}
    return dataclasses.replace(
        operator, tensors=("y, sT", *operator.tensors[1:], "ds0"), make=make, kernels=kernels, gates=gates,
        reference=lambda *x: join(*getattr(REFERENCE[name], name)(*x[:-1], start(x[-1], x[0]))))


# Name on the command line: what is checked and timed under it. An operator with inputs of its own is one more in the
# tuple; its rows go into the same table.
OPERATORS = {"wkv7": (wkv7, time_mixing), "wkv6": (wkv6,)}
