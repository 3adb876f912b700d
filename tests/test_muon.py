"""Muon: Newton-Schulz against an SVD, steps against a plain loop, and the same parameters and momenta on 1, 2, 3 ranks.

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
from train_gpt2 import Muon, newton_schulz

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


@pytest.mark.parametrize("scale, beta2", (("spectral", 0), ("rms", 0), ("spectral", 0.9), ("rms", 0.5)))
def test_steps_against_a_plain_loop(scale, beta2, monkeypatch):
    """M <- mu M + G;  W <- W - lr s O, O = NS(G + mu M), with a rate and a momentum that change from step to step. With
    beta2, NorMuon: v <- beta2 v + (1 - beta2) mean_row(O^2), O <- O / sqrt(v) at the norm that O had."""
    monkeypatch.setattr(script, "has_bf16", lambda device: False)
    parameters = starts()
    optimizer = Muon(parameters, lr=0.1, scale=scale, beta2=beta2)
    W = [p.detach().double() for p in parameters]
    M = [torch.zeros_like(w) for w in W]
    v = [torch.zeros(len(w), 1, dtype=torch.float64) for w in W]
    for step in range(4):
        lr, mu = 0.1 / (1 + step), 0.85 + 0.03 * step
        optimizer.param_groups[0].update(lr=lr, momentum=mu)
        for i, (p, g) in enumerate(zip(parameters, gradients(step))):
            p.grad = g.clone()
            M[i] = mu * M[i] + g.double()
            rows, cols = p.shape
            s = max(1, rows / cols) ** 0.5 if scale == "spectral" else max(rows, cols) ** 0.5
            O = orthogonalise(g.double() + mu * M[i])
            if beta2:
                v[i] = beta2 * v[i] + (1 - beta2) * (O**2).sum(1, keepdim=True) / cols
                O = O / v[i].sqrt() * (O.norm() / (O / v[i].sqrt()).norm())
            W[i] = W[i] - lr * s * O
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


def train(rank, world, folder):
    """Four steps on one rank of `world`, with the gradients that all ranks have after they met."""
    torch.set_num_threads(1)
    script.has_bf16 = lambda device: False
    if world > 1:
        script.RANK, script.WORLD_SIZE = rank, world
        dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/meet{world}")
    parameters = starts()
    optimizer = Muon([dict(params=parameters[:8]), dict(params=parameters[8:], lr=0.05)], lr=0.02)
    for step in range(4):
        for p, g in zip(parameters, gradients(step)):
            p.grad = g
        optimizer.step()
    torch.save([(p.detach(), optimizer.state[p]["M"]) for p in parameters], f"{folder}/{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def work(folder):
    importlib.import_module("torch._dynamo")  # 2 s, which the first optimiser of each rank would take
    for world in (1, 2, 3):
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    train(rank, world, folder)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            sys.exit(f"a rank of {world} failed")


def test_ranks_agree(tmp_path):
    """Batches of 3, 3 and 5 matrices in slices of 1 to 3, the last padded: what one rank makes of them."""
    from helpers import environment
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment(), capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    load = lambda world, rank: torch.load(tmp_path / f"{world}_{rank}.pt", weights_only=True)
    single = load(1, 0)
    assert min((p - start).abs().max().item() for (p, _), start in zip(single, starts())) > 0.02, "nothing was trained"
    for world in (2, 3):
        for rank in range(world):
            for i, ((p, M), (first, _), (one, momentum)) in enumerate(zip(load(world, rank), load(world, 0), single)):
                assert torch.equal(p, first), f"rank {rank}, matrix {i} is not rank 0's"
                assert torch.equal(M, momentum), f"rank {rank}, matrix {i}: another momentum"
                error = (p - one).abs().max().item()
                assert error <= 2e-6, f"rank {rank} of {world}, matrix {i}: {error:.1e} from one rank's"


if __name__ == "__main__":
    work(sys.argv[1])
