"""Muon and Adam: Newton-Schulz against an SVD, steps against a plain loop and torch's Adam, and the same parameters,
states on 1, 2 and 3 ranks, also where a state of 2 ranks goes on.

Run as a program (`python tests/test_muon.py FOLDER`) it is the worker of the last: it forks the ranks itself.
"""

import importlib
import os
import subprocess
import sys
import traceback

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest
import torch
import torch.distributed as dist

import train_gpt2 as script  # the section is shared, byte for byte (test_sections.py)
from train_gpt2 import Adam, Muon, newton_schulz

BAND = 0.65, 1.25  # where a singular value must end whose share of the Frobenius norm was at least REACH
REACH = 0.0025  # below, five steps (each at most times 3.4445) do not lift it into the band
SHAPES = [(64, 24), (24, 64), (32, 32), (24, 64), (32, 32), (24, 64), (64, 24), (32, 32), (16, 48), (32, 32), (32, 32)]


def quintic(x, steps=5):
    """What one singular value becomes: all of Newton-Schulz, in one dimension."""
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def matrix(rows, cols, singular, seed=0):
    """U diag(singular) V^T, (rows, cols) in float64, and U (rows, n) and V (cols, n)."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, cols)
    U = torch.linalg.qr(torch.randn(rows, n, dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(cols, n, dtype=torch.float64, generator=generator))[0]
    return U * singular @ V.mT, U, V


def test_the_band_is_what_the_iteration_gives():
    x = torch.linspace(REACH, 1, 400_000, dtype=torch.float64)
    y = quintic(x)
    assert BAND[0] < y.min() < 0.70 and 1.19 < y.max() < BAND[1], (y.min(), y.max())
    assert quintic(torch.tensor(REACH / 2, dtype=torch.float64)) < BAND[0], "a smaller share reaches the band as well"


@pytest.mark.parametrize("dtype, error", ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.1)))
@pytest.mark.parametrize("rows, cols", ((48, 48), (24, 96), (1, 40), (128, 448)))
def test_against_an_svd(rows, cols, dtype, error):
    """Well-conditioned, ill-conditioned over six decades, and of half the rank; sizes from 1e-6 to 1e6."""
    n = min(rows, cols)
    half = torch.arange(n) <= n // 2
    spectra = (torch.linspace(1, 0.2, n), torch.logspace(0, -6, n), half)
    for seed, (spectrum, size) in enumerate(zip(spectra, (1.0, 1e-6, 1e6))):
        spectrum = spectrum.double()
        G, U, V = matrix(rows, cols, spectrum * size, seed)
        O = newton_schulz(G.to(dtype)[None])[0]
        assert O.dtype == dtype and O.shape == (rows, cols)
        core = U.mT @ O.double() @ V  # diagonal where the singular vectors are G's
        share = spectrum * size / (spectrum.norm() * size + 1e-7)
        assert (core - quintic(share).diag()).abs().max() < error, f"spectrum {seed}, {dtype}"
        reached = share >= REACH
        assert reached.sum() >= n / 3
        got = core.diagonal()[reached]
        assert BAND[0] < got.min() and got.max() < BAND[1], f"spectrum {seed}, {dtype}"


def test_random_matrices_of_training():
    generator = torch.Generator().manual_seed(1)
    for rows, cols in ((128, 448), (64, 256), (96, 96)):
        G = torch.randn(3, rows, cols, generator=generator)
        share = torch.linalg.svdvals(G.double()) / G.double().norm(dim=(1, 2))[:, None]
        for dtype in (torch.float32, torch.bfloat16):
            S = torch.linalg.svdvals(newton_schulz(G.to(dtype)).double())
            assert S.max() < BAND[1]
            assert S[:, :(share >= 2 * REACH).sum(1).min()].min() > BAND[0], "the large ones stay the large ones"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_batch_is_each_of_its_matrices(dtype):
    G = torch.randn(5, 40, 72, generator=torch.Generator().manual_seed(2)).to(dtype)
    G[3] = 0
    O = newton_schulz(G)
    assert torch.equal(O[3], torch.zeros_like(O[3])), "no gradient, no update"
    for i in range(5):
        single = newton_schulz(G[i:i + 1])[0]
        assert torch.allclose(O[i], single, rtol=0, atol=1e-6 if dtype == torch.float32 else 2**-7), i


def orthogonalise(G):
    """Newton-Schulz once more, in float64, for one matrix and from the side with fewer rows."""
    if G.shape[0] > G.shape[1]:
        return orthogonalise(G.mT).mT
    X = G / (G.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def gradients(step, shapes=SHAPES):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * 10.0 ** (i % 3 - 1) for i, shape in enumerate(shapes)]


def starts(shapes=SHAPES):
    generator = torch.Generator().manual_seed(7)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("scale", ("spectral", "rms"))
def test_steps_against_a_plain_loop(scale, monkeypatch):
    """M <- mu M + G;  W <- W - lr s NS(G + mu M), with a rate and a momentum that change from step to step."""
    monkeypatch.setattr(script, "has_bf16", lambda device: False)
    parameters = starts()
    optimizer = Muon(parameters, lr=0.1, scale=scale)
    W = [p.detach().double() for p in parameters]
    M = [torch.zeros_like(w) for w in W]
    for step in range(4):
        lr, mu = 0.1 / (1 + step), 0.85 + 0.03 * step
        optimizer.param_groups[0].update(lr=lr, momentum=mu)
        for i, (p, g) in enumerate(zip(parameters, gradients(step))):
            p.grad = g.clone()
            M[i] = mu * M[i] + g.double()
            rows, cols = p.shape
            s = max(1, rows / cols) ** 0.5 if scale == "spectral" else max(rows, cols) ** 0.5
            W[i] = W[i] - lr * s * orthogonalise(g.double() + mu * M[i])
        optimizer.step()
        for i, (p, g) in enumerate(zip(parameters, gradients(step))):
            error = (p.detach().double() - W[i]).abs().max().item()
            assert error < 1e-6, f"step {step}, matrix {i} {tuple(p.shape)}: {error:.1e}"
            assert torch.equal(p.grad, g), "the gradient was written to"
            assert (optimizer.state[p]["M"].view_as(p) - M[i]).abs().max() < 5e-7 * M[i].abs().max()


def test_bf16_where_the_hardware_has_it(monkeypatch):
    """Products in bf16 must not turn the momentum or the parameters to bf16; the update stays near the fp32 one."""
    results = []
    for bf16 in (False, True):
        monkeypatch.setattr(script, "has_bf16", lambda device: bf16)
        parameters = starts()
        optimizer = Muon(parameters, lr=1.0, scale="spectral")
        for p, g in zip(parameters, gradients(0)):
            p.grad = g
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        assert all(p.dtype == optimizer.state[p]["M"].dtype == torch.float32 for p in parameters)
        results.append([p.detach() - b for p, b in zip(parameters, before)])
    for single, half in zip(*results):
        angle = (single * half).sum() / single.norm() / half.norm()
        assert angle > 0.99 and not torch.equal(single, half), f"cosine {angle:.4f}"


def test_adam_is_torchs(monkeypatch):
    """Bit by bit, with rates that change; the number of steps comes from outside, like the rate."""
    shapes, runs = [(30, 40), (7,), (), (5, 3)], []
    for make in (Adam, lambda groups, betas: torch.optim.Adam(groups, betas=betas, fused=True)):
        parameters = starts(shapes)
        optimizer = make([dict(params=parameters[:2], lr=0.1), dict(params=parameters[2:], lr=0.02)], betas=(0.9, 0.95))
        for step in range(4):
            for group in optimizer.param_groups:
                group.update(lr=group["lr"] * 0.9, **dict(step=step) if make is Adam else {})
            for p, g in zip(parameters, gradients(step, shapes)):
                p.grad = g.clone()
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients(step, shapes)))
        runs.append(parameters)
    for ours, theirs, start in zip(*runs, starts(shapes)):
        assert torch.equal(ours, theirs) and not torch.equal(ours, start)


STEPS, TAKEN_OVER = 6, 3  # steps in all; after which the state is handed on
VECTORS = [(40, 24), (7,), (), (300, 5), (9, 3), (64,)]  # Adam's; (300, 5) is larger than a bucket
MIXED = [SHAPES[0], VECTORS[0], *SHAPES[1:5], *VECTORS[1:4], *SHAPES[5:], *VECTORS[4:]]  # a model's order


def train(rank, world, folder, state=None):
    """STEPS steps on one rank of `world`; a world of 1 runs without a process group. state: go on from there.

    Each rank adds another part of the gradient, through a real backward; the last of three has no sequence.
    """
    torch.set_num_threads(1)
    script.BUCKET, script.has_bf16, sent = 1400, lambda device: False, []
    send = script.Bucket.send
    script.Bucket.send = lambda bucket: sent.append(bucket.params[0].shape) or send(bucket)
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/meet{world}{state}")
        os.environ["WORLD_SIZE"] = str(world)
    model = torch.nn.ParameterList(starts(MIXED))
    names = {p: name for name, p in model.named_parameters()}
    group = lambda kind, at: dict(params=[p for p in model if (p.shape in map(torch.Size, SHAPES)) == kind][at])
    groups = [[dict(group(True, slice(8))), dict(group(True, slice(8, None)), lr=0.05)],
              [dict(group(False, slice(2)), lr=0.1), dict(group(False, slice(2, None)), lr=0.02)]]
    for g in groups[0] + groups[1]:
        g["names"] = [names[p] for p in g["params"]]
    optimizers = [Adam(groups[1], betas=(0.9, 0.95)), Muon(groups[0], lr=0.02)]
    if state:
        before = torch.load(f"{folder}/{state}_0.pt", weights_only=True)["taken"]
        model.load_state_dict(before["model"])
        for optimizer, tensors in zip(optimizers, before["states"]):
            optimizer.load_full_state(tensors if rank == 0 else {})
    parts = {1: [1.0], 2: [0.75, 0.25], 3: [0.5, 0.5, 0]}[world]
    result = dict(early=[])
    for step in range(TAKEN_OVER if state else 0, STEPS):
        if step == TAKEN_OVER:
            states = [optimizer.full_state() for optimizer in optimizers]
            result["taken"] = dict(model={k: v.clone() for k, v in model.state_dict().items()}, states=states)
        sent.clear()
        with script.averaging(model, optimizers):
            if parts[rank]:
                sum((p * g * parts[rank]).sum() for p, g in zip(model, gradients(step, MIXED))).backward()
            result["early"].append(len(sent))
        for g in optimizers[0].param_groups:
            g["step"] = step
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    result.update(model=[p.detach() for p in model], sent=sent, kept=sum(
        t.numel() for optimizer in optimizers for tensors in optimizer.state.values() for t in tensors.values()),
        owned=[i for i, p in enumerate(model) if "M" in optimizers[1].state.get(p, {})])
    torch.save(result, f"{folder}/{f'{state}to' if state else ''}{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def work(folder):
    importlib.import_module("torch._dynamo")  # 2 s, which the first optimiser of each rank would take
    for world, state in ((1, None), (2, None), (3, None), (1, "2"), (3, "2"), (2, "3")):
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    train(rank, world, folder, state)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            sys.exit(f"a rank of {world} failed")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """{"1", "2", "3", "2to3", ...: [what each rank left behind]}."""
    from helpers import environment
    folder = tmp_path_factory.mktemp("muon")
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment(), capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return {world: [torch.load(folder / f"{world}_{rank}.pt", weights_only=True) for rank in range(int(world[-1]))]
            for world in ("1", "2", "3", "2to1", "2to3", "3to2")}


@pytest.mark.parametrize("world", ("2", "3", "2to1", "2to3", "3to2"))
def test_ranks_agree(worlds, world):
    """With one rank, and where the state of 2 ranks goes on with 1 or 3."""
    single = worlds["1"][0]["model"]
    moved = [(a - b).abs().max().item() for a, b in zip(single, starts(MIXED))]
    assert min(moved) > 0.02, "nothing was trained"
    for rank, result in enumerate(worlds[world]):
        for i, (a, b) in enumerate(zip(single, result["model"])):
            assert torch.equal(b, worlds[world][0]["model"][i]), f"rank {rank}, tensor {i} is not rank 0's"
            error = (a - b).abs().max().item()
            assert error <= 2e-6, f"rank {rank} of {world}, tensor {i} {tuple(a.shape)}: {error:.1e} from one rank's"


@pytest.mark.parametrize("world", ("1", "2", "3"))
def test_states_are_whole_and_owned_once(worlds, world):
    results, elements = worlds[world], sum(torch.Size(shape).numel() for shape in MIXED)
    assert sum(result["kept"] for result in results) == elements + sum(torch.Size(shape).numel() for shape in VECTORS)
    owned = [result["owned"] for result in results]
    assert sorted(sum(owned, [])) == [i for i, shape in enumerate(MIXED) if shape in SHAPES], owned
    cost = lambda i: min(MIXED[i]) ** 2 * (2 * max(MIXED[i]) + min(MIXED[i]))
    loads = [sum(map(cost, own)) for own in owned]
    assert max(loads) - min(loads) <= max(map(cost, owned[0])), f"the work is not shared out: {loads}"
    assert [result["taken"]["states"] for result in results[1:]] == [[{}, {}]] * (len(results) - 1)
    for mine, one in zip(results[0]["taken"]["states"], worlds["1"][0]["taken"]["states"]):
        assert mine.keys() == one.keys()
        for name in one:
            assert mine[name].shape == one[name].shape == MIXED[int(name.split(".")[0])], name
            assert torch.allclose(mine[name], one[name], rtol=1e-5, atol=1e-6) and (one[name] != 0).all(), name


@pytest.mark.parametrize("world", ("2", "3"))
def test_gradients_leave_during_the_backward_in_one_order(worlds, world):
    results = worlds[world]
    buckets = len(results[0]["sent"])
    assert buckets > 6 and all(result["sent"] == results[0]["sent"] for result in results)
    for rank, result in enumerate(results):
        idle = world == "3" and rank == 2
        assert result["early"] == [0 if idle else buckets] * STEPS, f"rank {rank}: {result['early']} of {buckets}"


if __name__ == "__main__":
    work(sys.argv[1])
