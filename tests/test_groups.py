"""Who trains what and where it starts: every parameter of each model at full size against a table made from the papers'
formulas, without a look at the scripts. Wrong groups and wrong starts fail silently, so nothing here is a tolerance for
the reader to trust: shapes, optimisers, rates and zeros exactly, vectors to 1e-6, random ones by bound, mean and sd.
"""

import importlib
import math

import numpy as np
import pytest
import torch

import train_gpt2
import train_rwkv6
import train_rwkv7
from helpers import SCRIPTS, make_corpus, run_here, tiny

V, C, L, N = 50304, 768, 12, 64  # 50257 ids padded to a multiple of 128; width; layers; RWKV-7's head size
HIDDEN = 2688  # 3.5 C

ZERO = ("zero",)
NORMAL = ("normal",)  # mean 0, sd 1


def values(array):
    return "values", np.asarray(array, dtype=np.float64)


def uniform(bound):
    return "uniform", bound


def orthogonal(rows, cols, gain):
    return "orthogonal", gain * math.sqrt(max(1, rows / cols))


def rwkv7_table(L=L, V=V, x070=False):
    """{name: (shape, optimiser, rate, start)} of RWKV-7, C = 768, N = 64."""
    i, root = np.arange(C), math.sqrt(C)
    lin = i / (C - 1) - 0.5
    z = (i % N - (N - 1) / 2) / ((N - 1) / 2)
    zig = z * np.abs(z)
    vector = lambda array: ((1, 1, C), "Adam", 0.0026, values(array))
    norm = lambda weight, bias: {weight: ((C,), "Adam", 0.009, values(np.ones(C))), bias: ((C,), "Adam", 0.009, ZERO)}
    matrix = lambda rows, cols, start: ((rows, cols), "Muon", 0.02, start)

    table = {"emb.weight": ((V, C), "Adam", 0.3, uniform(1e-4) if x070 else NORMAL)}
    for l in range(L):
        rho0, rho1 = l / (L - 1), 1 - l / L
        b = f"blocks.{l}."
        if x070 and l == 0:
            table |= norm(b + "ln0.weight", b + "ln0.bias")
        if not x070:
            table[b + "lambdas"] = (2,), "Adam", 0.02, values([1, 0])
        table |= norm(b + "ln1.weight", b + "ln1.bias") | norm(b + "ln2.weight", b + "ln2.bias")
        for name, power in dict(x_r=0.2, x_g=0.2, x_w=0.9, x_a=0.9, x_k=0.7, x_v=0.7).items():
            table[b + f"att.{name}"] = vector(1 - (i / C) ** (power * rho1))
        table[b + "att.w0"] = vector(-6 + 6 * (i / (C - 1)) ** (1 + rho0 ** 0.3) + 0.5 + 2.5 * zig)
        if x070:
            shape, optimiser, rate, start = table[b + "att.w0"]
            table[b + "att.w0"] = shape, optimiser, 2 * rate, start
        table[b + "att.a0"] = vector(-0.19 + 0.3 * zig + 0.4 * lin)
        table[b + "att.k_k"] = vector(0.71 - 0.1 * lin)
        table[b + "att.k_a"] = vector(np.full(C, 1.02))
        table[b + "att.r_k"] = (C // N, N), "Adam", 0.0026, values(np.full((C // N, N), -0.04))
        ranks = dict(w=64, a=64, g=128)
        if l > 0:  # block 0 gives the values that the others mix in: it has nothing to mix
            table[b + "att.v0"] = vector(0.73 - 0.4 * lin)
            ranks["v"] = 32
        for letter, rank in ranks.items():
            table[b + f"att.{letter}1"] = (C, rank), "Adam", 0.0026, ZERO
            table[b + f"att.{letter}2"] = (rank, C), "Adam", 0.0026, orthogonal(rank, C, 0.1)
        for name, start in dict(receptance=uniform(0.5 / root), key=uniform(0.05 / root), value=uniform(0.5 / root),
                                output=ZERO).items():
            table[b + f"att.{name}.weight"] = matrix(C, C, start)
        table |= norm(b + "att.ln_x.weight", b + "att.ln_x.bias")
        table[b + "att.ln_x.weight"] = (C,), "Adam", 0.009, values(np.full(C, ((1 + l) / L) ** 0.7))
        table[b + "ffn.x_k"] = vector(1 - (i / C) ** (rho1 ** 4))
        table[b + "ffn.key.weight"] = matrix(HIDDEN, C, uniform(0.5 / root))
        table[b + "ffn.value.weight"] = matrix(C, HIDDEN, ZERO)
    if x070:
        table |= norm("ln_out.weight", "ln_out.bias")
    table["head.weight"] = (V, C), "Adam", 0.002, ("orthogonal", 0.5 * math.sqrt(V / C)) if x070 else ZERO
    return table


def rwkv6_table(L=L, V=V):
    """The same of RWKV-6, whose Muon has a rate for updates of another size, and Adam one rate for all else."""
    i, root = np.arange(C), math.sqrt(C)
    adam = lambda shape, start: (shape, "Adam", 0.0022, start)
    vector = lambda array: adam((1, 1, C), values(array))
    muon = lambda rows, cols, start: ((rows, cols), "Muon", 0.00036, start)
    norm = lambda name: {f"{name}.weight": adam((C,), values(np.ones(C))), f"{name}.bias": adam((C,), ZERO)}

    table = {"emb.weight": adam((V, C), uniform(1 / root))} | norm("ln_out")
    for l in range(L):
        rho0, rho1 = l / (L - 1), 1 - l / L
        b = f"blocks.{l}."
        table |= norm(b + "ln1") | norm(b + "ln2") | norm(b + "att.ln_x")
        table[b + "att.x_x"] = vector(1 - (i / C) ** (0.6 * rho1 ** 0.9))
        table[b + "att.x_w"] = vector(1 - (i / C) ** (0.9 * rho1))
        table[b + "att.x_k"] = vector(1 - (i / C) ** (0.9 * rho1) - 0.4 * rho0)
        table[b + "att.x_v"] = vector(1 - (i / C) ** (0.4 * rho1) - 0.6 * rho0)
        table[b + "att.x_r"] = table[b + "att.x_g"] = vector(1 - (i / C) ** (0.2 * rho1))
        table[b + "att.A"], table[b + "att.B"] = adam((C, 160), ZERO), adam((5, 32, C), uniform(0.01))
        table[b + "att.w0"] = vector(-6 + 5.5 * (i / (C - 1)) ** (0.85 + math.sqrt(rho0)))
        table[b + "att.w1"], table[b + "att.w2"] = adam((C, 64), ZERO), adam((64, C), uniform(0.01))
        table[b + "att.g1"], table[b + "att.g2"] = adam((C, 160), uniform(0.01)), adam((160, C), uniform(0.01))
        wave = np.resize([0.0, 0.1, -0.1], C)  # (i + 1) mod 3 - 1, from i = 0
        table[b + "att.u"] = adam((C // N, N), values(rho0 * (2.5 - i / (C - 1)) + wave))
        for name, start in dict(receptance=uniform(0.5 / root), key=uniform(0.05 / root), value=uniform(0.5 / root),
                                output=ZERO).items():
            table[b + f"att.{name}.weight"] = muon(C, C, start)
        table[b + "ffn.key.weight"] = muon(HIDDEN, C, uniform(1 / root))
        table[b + "ffn.value.weight"] = muon(C, HIDDEN, ZERO)
    return table


def gpt2_table(L=L, V=V):
    """The same of the speedrun's GPT-2: hidden width 4 C, plain uniform starts of torch's linear layers."""
    bound = uniform(1 / math.sqrt(C))
    table = {"wte.weight": ((V, C), "Adam", 0.3, NORMAL), "head.weight": ((V, C), "Adam", 0.002, ZERO)}
    for l in range(L):
        b = f"blocks.{l}."
        table[b + "lambdas"] = (2,), "Adam", 0.02, values([1, 0])
        table[b + "att.mix"] = (), "Adam", 0.02, values(0.5)
        for name, start in dict(query=bound, key=bound, value=bound, output=ZERO).items():
            table[b + f"att.{name}.weight"] = (C, C), "Muon", 0.02, start
        table[b + "mlp.key.weight"] = (4 * C, C), "Muon", 0.02, bound
        table[b + "mlp.value.weight"] = (C, 4 * C), "Muon", 0.02, ZERO
    return table


CASES = {
    "rwkv7": (train_rwkv7, ["--kernel", "torch"], lambda **size: rwkv7_table(**size)),
    "rwkv7 x070": (train_rwkv7, ["--kernel", "torch", "--x070"], lambda **size: rwkv7_table(x070=True, **size)),
    "rwkv6": (train_rwkv6, ["--kernel", "torch"], lambda **size: rwkv6_table(**size)),
    "gpt2": (train_gpt2, [], lambda **size: gpt2_table(**size)),
}


def build(script, *flags):
    args = script.parse(["--track", "fineweb", "--device", "cpu", "--dtype", "fp32", *flags])
    torch.manual_seed(args.random_seed)
    return args, script.build_model(args)


def full_size(script, flags):
    """The model of track fineweb without its 500 MB: shapes on the meta device, then memory that nobody touches."""
    with torch.device("meta"):
        args, model = build(script, *flags)
    model.to_empty(device="cpu")
    return args, model


def trained_by(model, optimizers):
    """{name: (optimiser, rate)}; fails when a parameter has two or none."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found, f"{names[id(p)]} is trained twice"
                found[names[id(p)]] = type(optimizer).__name__, group["lr"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_optimisers_rates_and_counts(case):
    """Active are all but the embedding, of which a token uses one row (RWKV-6's is the head too: all): within the 124M
    of the rules, and not far below."""
    script, flags, table = CASES[case]
    args, model = full_size(script, flags)
    expected = table()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {name: row[0] for name, row in expected.items()}, sorted(shapes.keys() ^ expected.keys())
    assert not list(model.buffers()), "a buffer would be in the checkpoint and not in this table"
    adam, muon = optimizers = script.build_optimizers(model, args)
    assert trained_by(model, optimizers) == {name: row[1:3] for name, row in expected.items()}
    names = {p: name for name, p in model.named_parameters()}
    for group in adam.param_groups:
        name = names[group["params"][0]]
        eps = 1e-5 if name.endswith((".lambdas", ".mix")) else 1e-8
        assert (tuple(group["betas"]), group["eps"], group["fused"]) == ((0.9, 0.95), eps, True), name
    assert [group["scale"] for group in muon.param_groups] == ["rms" if case == "rwkv6" else "spectral"]
    lookups = () if case == "rwkv6" else ("emb.weight", "wte.weight")
    active = sum(math.prod(shape) for name, shape in shapes.items() if name not in lookups)
    assert active == sum(math.prod(shape) for name, shape in shapes.items() if name not in model.lookups)
    assert script.ACTIVE_LIMIT == 124_000_000
    assert 120_000_000 < active <= 124_000_000, f"{active:,}"


@pytest.mark.parametrize("case, rates", (
    ("rwkv7", dict(muon_lr=0.02, adam_lr=0.0026, ln_lr=0.009, emb_lr=0.3, head_lr=0.002, lambda_lr=0.02)),
    ("rwkv6", dict(muon_lr=0.00036, adam_lr=0.0022)),
    ("gpt2", dict(muon_lr=0.02, adam_lr=0.02, emb_lr=0.3, head_lr=0.002))))
def test_rates_come_from_the_flags(case, rates):
    """Muon and what Adam trains at the same default rate have flags of their own."""
    script, flags, table = CASES[case]
    given = {flag: 2.0**-i for i, flag in enumerate(rates)}
    scale = "spectral" if case == "rwkv6" else "rms"
    flags = [*flags, f"--muon_scale={scale}", *(f"--{flag}={lr}" for flag, lr in given.items())]
    args, model = full_size(script, flags)
    optimizers = script.build_optimizers(model, args)
    renamed = {rates[flag]: given[flag] for flag in rates if flag != "muon_lr"}
    assert trained_by(model, optimizers) == {
        name: (optimiser, given["muon_lr"] if optimiser == "Muon" else renamed[rate])
        for name, (_, optimiser, rate, _) in table().items()}
    assert optimizers[1].param_groups[0]["scale"] == scale


def check_start(name, p, start):
    kind, x = start[0], p.detach().double()
    if kind == "zero":
        assert not x.any(), f"{name} does not start at zero"
    elif kind == "values":
        error = np.abs(x.numpy().reshape(-1) - start[1].reshape(-1)).max()
        assert error <= 1e-6, f"{name}: {error:.1e} off"
    elif kind == "uniform":
        bound, n = start[1], x.numel()
        sd = bound / math.sqrt(3)
        assert all(0.999 * bound < end <= bound * (1 + 1e-6) for end in (x.max(), -x.min())), name
        assert abs(x.mean()) < 5 * sd / math.sqrt(n), f"{name}: mean {x.mean():.1e}"
        assert abs(x.std() / sd - 1) < 5 / math.sqrt(n), f"{name}: sd {x.std():.3e}, not {sd:.3e}"
    elif kind == "normal":
        n = x.numel()
        assert abs(x.mean()) < 5 / math.sqrt(n) and abs(x.std() - 1) < 5 / math.sqrt(2 * n), name
        assert 4 < x.abs().max() < 7, f"{name}: {x.abs().max()}"
    else:
        short = x @ x.mT if x.shape[0] <= x.shape[1] else x.mT @ x
        error = (short / start[1] ** 2 - torch.eye(len(short))).abs().max()
        assert kind == "orthogonal" and error < 1e-5, f"{name}: W W^T / gain^2 is {error:.1e} off the identity"


@pytest.mark.parametrize("case, layers", (("rwkv7", 4), ("rwkv7 x070", 3), ("rwkv6", 4), ("gpt2", 2)))
def test_starts(case, layers):
    """At full width; the vocabulary shrinks to 1000 ids, padded to 1024, and the depth, of which the formulas know."""
    script, flags, table = CASES[case]
    _, model = build(script, *flags, "--layers", str(layers), "--vocab_size", "1000")
    expected, parameters = table(L=layers, V=1024), dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, (shape, _, _, start) in expected.items():
        assert parameters[name].shape == shape, name
        check_start(name, parameters[name], start)
    second = build(script, *flags, "--layers", "2", "--vocab_size", "100")[1]
    again = build(script, *flags, "--layers", "2", "--vocab_size", "100")[1]
    other = build(script, *flags, "--layers", "2", "--vocab_size", "100", "--random_seed", "5")[1]
    for (name, a), b, c in zip(second.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a, b), f"{name}: the same seed gives another start"
        drawn = table(L=2, V=128)[name][3][0] in ("uniform", "normal", "orthogonal")
        assert torch.equal(a, c) != drawn, f"{name}: the seed matters where it must not, or not where it must"


def test_low_rank_sizes_of_other_widths():
    for width, w, v, g, g_of_rwkv6 in ((128, 32, 32, 64, 64), (2048, 128, 64, 224, 256)):
        flags = ["--kernel=torch", "--layers=2", f"--width={width}", "--vocab_size=100"]
        with torch.device("meta"):
            seven, six = (build(script, *flags)[1].blocks[1].att for script in (train_rwkv7, train_rwkv6))
        assert [tuple(p.shape) for p in (seven.w1, seven.a1, seven.v1, seven.g1)] == [(width, n) for n in (w, w, v, g)]
        assert [tuple(p.shape) for p in (six.A, six.w1, six.g1)] == [(width, n) for n in (160, w, g_of_rwkv6)]


@pytest.mark.parametrize("flag", ("x0_lambdas", "rms_norm", "zero_head"))
def test_each_addition_has_a_switch(flag):
    model = build(train_rwkv7, "--kernel=torch", "--layers=2", "--vocab_size=100", f"--no-{flag}")[1]
    plain, without = rwkv7_table(L=2, V=128), rwkv7_table(L=2, V=128, x070=True)
    gone = {name for name in plain if "lambdas" in name} if flag == "x0_lambdas" else set()
    come = {name for name in without if "ln0" in name or "ln_out" in name} if flag == "rms_norm" else set()
    assert dict(model.named_parameters()).keys() == (plain.keys() - gone) | come
    check_start("head.weight", model.head.weight, (without if flag == "zero_head" else plain)["head.weight"][3])
    check_start("emb.weight", model.emb.weight, (without if flag == "rms_norm" else plain)["emb.weight"][3])


def test_precision_of_the_parameters():
    """RWKV keeps all in fp32; of the GPT only the linear layers' weights, the rest is bf16 under --dtype bf16."""
    for script, halved in ((train_rwkv7, ()), (train_rwkv6, ()), (train_gpt2, ("wte", "lambdas", "mix"))):
        kernel = ["--kernel=torch"] if script is not train_gpt2 else []
        for dtype in ("mixed", "bf16"):
            model = build(script, *kernel, "--layers=2", "--vocab_size=100", "--dtype", dtype)[1]
            for name, p in model.named_parameters():
                half = dtype == "bf16" and any(part in halved for part in name.split("."))
                assert p.dtype == (torch.bfloat16 if half else torch.float32), f"{name} with --dtype {dtype}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_more_than_the_limit_is_refused(name, tmp_path, monkeypatch, capsys):
    """Exactly the limit runs, one less does not; on track tiny the rule does not hold."""
    script = importlib.import_module(name)
    data = make_corpus(tmp_path / "data")
    flags = tiny(name, data, tmp_path / "records", "--track", "fineweb", "--vocab_size", 300)
    args = script.parse(flags)
    model = script.build_model(args)
    active = sum(p.numel() for p in model.parameters()) - (0 if name == "train_rwkv6" else 384 * 32)
    monkeypatch.setattr(script, "ACTIVE_LIMIT", active)
    run_here(name, *flags, "--check")
    monkeypatch.setattr(script, "ACTIVE_LIMIT", active - 1)
    with pytest.raises(SystemExit) as ended:
        run_here(name, *flags)
    message = capsys.readouterr().err
    assert ended.value.code == 1 and message.count("\n") == 1, message
    for part in (f"{active:,} parameters are active", f"{active - 1:,}", "--width"):
        assert part in message, message
    assert not (tmp_path / "records").exists()
    run_here(name, *flags, "--track", "tiny", "--check")


def spoil(kind, optimizers, model):
    """Make a parameter's optimisers two or none; returns the parameter's name in the message."""
    key, output = model.blocks[0].att.key.weight, model.blocks[1].att.output.weight
    if kind == "left out":
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["params"] = [p for p in group["params"] if p is not key]
        return "blocks.0.att.key.weight"
    added = output if kind == "twice" else torch.nn.Parameter(torch.zeros(2))
    optimizers.append(torch.optim.SGD([added], lr=1.0))
    return "blocks.1.att.output.weight" if kind == "twice" else "strangers"


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("kind", ("twice", "left out", "a stranger", "unknown"))
def test_a_parameter_without_exactly_one_optimiser_is_named(name, kind, tmp_path, monkeypatch, capsys):
    """kind unknown: one that the model has and build_optimizers does not know."""
    script = importlib.import_module(name)
    make, named = script.build_optimizers, []

    def spoilt(model, args):
        if kind == "unknown":
            model.blocks[1].stray = torch.nn.Parameter(torch.zeros(3))
            named.append("parameter blocks.1.stray belongs to no optimiser")
        optimizers = make(model, args)
        named.append(f"in one optimiser, once: {spoil(kind, optimizers, model)}")
        return optimizers

    monkeypatch.setattr(script, "build_optimizers", spoilt)
    with pytest.raises(SystemExit) as end:
        run_here(name, *tiny(name, make_corpus(tmp_path / "data"), tmp_path / "records"))
    message = capsys.readouterr().err
    assert end.value.code == 1 and message.count("\n") == 1 and named[0] in message, message
    assert not (tmp_path / "records").exists()
