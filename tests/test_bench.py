"""cuda/bench.py on the CPU: no time without a green check, what the rows say, a peer, the table in cuda/README.md."""

import json
import sys
import types

import pytest
import torch

import train_rwkv7
from helpers import ROOT, load_program, one_thread

sys.path.append(str(ROOT / "cuda"))
import cases  # noqa: E402

bench = load_program("cuda/bench.py")
SHAPE = (2, 20, 2, 16)


@pytest.fixture(autouse=True)
def on_one_thread():
    with one_thread():
        yield


def call(operator, *flags, page):
    """What the program does with these flags and its table in `page`."""
    page.write_text(f"above\n<!-- bench {operator} cpu: begin -->\n<!-- bench {operator} cpu: end -->\nbelow\n")
    arguments = [operator, "--device=cpu", "--repeats=3", "--threads=1", "--write", *map(str, flags)]
    return bench.bench(bench.parse_arguments(arguments), readme=page)


def rows_of(kernels, shape=SHAPE, operator=None):
    """measure() of these kernels, beside WKV-7's torch form where no operator is named; rows by name."""
    kernels = kernels if operator else {"torch": cases.Kernel(train_rwkv7.wkv7), **kernels}
    rows = bench.measure(operator or cases.wkv7(), shape, kernels, bench.WallClock(), "cpu", 3, 1e9)
    return {row["kernel"]: row for row in rows}


@pytest.mark.parametrize("operator, moved, sums, tensors", (
    ("wkv7", 20, 28, {"y", "dr", "dw", "dk", "dv", "da", "db"}), ("wkv6", 14, 16, {"y", "dr", "dk", "dv", "dw", "du"})))
def test_whole_on_the_cpu(operator, moved, sums, tensors, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 2**20)
    page, written = tmp_path / "README.md", tmp_path / "rows.json"
    machine, rows = call(operator, "--shape", "2,20,2,16", "1,33,1,32", "--json", written, page=page)
    assert [(row["shape"], row["kernel"]) for row in rows] == [
        (shape, kernel) for shape in (SHAPE, (1, 33, 1, 32)) for kernel in ("torch", "cpu")]
    printed, text = capsys.readouterr().out, page.read_text()
    for row in rows:
        assert row["refused"] == "" and row["forward_ms"] > 0 and row["backward_ms"] > 0
        assert row["both_ms"] > max(row["forward_ms"], row["backward_ms"])
        B, T, H, N = row["shape"]
        assert row["bytes"] == moved * 4 * B * T * H * N
        assert row["flops_per_second"] == pytest.approx(sums * B * T * H * N * N / (row["both_ms"] / 1e3))
        assert row["of_floor"] == pytest.approx(row["bytes"] / row["both_ms"] * 1e-6 / machine["copy GB/s"], rel=0.2)
        assert set(row["errors"]) == {"random", "correlated"}
        for errors in row["errors"].values():
            assert set(errors) == tensors and 0 < max(errors.values()) < 2e-6
        assert bench.line(bench.cells(row, machine)) in text and bench.line(bench.cells(row, machine)) in printed
    assert rows[0]["speed_up"] == 1
    written = json.loads(written.read_text())
    assert written["machine"] == machine and len(written["rows"]) == 4
    assert text.startswith("above\n") and text.endswith("below\n")
    assert machine["device"] in text and machine["date"] in text and machine["commit"] in text


def spoilt(name, spoil):
    """WKV-7 with one of y and the gradients spoilt."""
    where = cases.wkv7().tensors.index(name)

    def kernel(*inputs):
        inputs = [x * 1 for x in inputs]
        if where:
            inputs[where - 1].register_hook(spoil)
        y = train_rwkv7.wkv7(*inputs)
        return y if where else y + (spoil(y) - y).detach()
    return kernel


def test_wrong_kernels_are_refused_and_not_timed(monkeypatch):
    """Each of y and the gradients a little off or with one NaN; a kernel that does not repeat itself."""
    timed, count = [], iter(range(100))

    class Watched(bench.Passes):
        def __init__(self, kernel, *rest):
            timed.append(kernel.call)
            super().__init__(kernel, *rest)

    def nan_at_7(x):
        return x.masked_fill(torch.arange(x.numel()).view(x.shape) == 7, torch.nan)
    monkeypatch.setattr(bench, "Passes", Watched)
    wrong = {f"{name} {i}": cases.Kernel(spoilt(name, spoil)) for name in cases.wkv7().tensors
             for i, spoil in enumerate((lambda x: x * 1.00001, nan_at_7))}
    restless = cases.Kernel(lambda *x: train_rwkv7.wkv7(*x) * (1 + (next(count) % 2) * 1.2e-7))
    rows = rows_of({**wrong, "restless": restless})
    assert rows["restless"]["refused"] == "random: two runs differ; correlated: two runs differ"
    assert rows.pop("torch")["refused"] == "" and timed == [train_rwkv7.wkv7] and len(rows) == 15
    for name, row in rows.items():
        cells = bench.cells(row, dict(device="d", date="today"))
        assert cells[5].startswith("not timed: random") and set(cells[6:13]) == {"-"}
        assert not [key for key in row if key.endswith("_ms")]
        if name != "restless":
            assert f"random {name[:-2]} " in row["refused"] and "above 2.0e-06" in row["refused"], row


def test_wrong_only_on_correlated_keys():
    """What the Neumann product in low precision does: no random test shows it."""
    def forgetful(r, w, k, v, a, b):
        repeats = (a[:, 1:2] * a[:, :1]).sum(-1, keepdim=True).mean() > 0.5
        return train_rwkv7.wkv7(r, w, k, v, a, b * (1.001 if repeats else 1))
    row = rows_of({"forgetful": cases.Kernel(forgetful)}, shape=(2, 20, 2, 64))["forgetful"]
    assert row["refused"].startswith("correlated y ") and "random" not in row["refused"]


def test_gates_in_bf16(monkeypatch):
    """Tensors in bf16, fp32 inside: within the narrow gates, and an error of a wide gate's size is over them."""
    monkeypatch.setitem(bench.DTYPES, "cpu", torch.bfloat16)
    def noisy(*inputs):
        y = train_rwkv7.wkv7(*inputs)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return (y + 3e-3 * y.float().std().detach() * noise).to(y.dtype)
    rows = rows_of({"worse": cases.Kernel(noisy), "tensor cores": cases.Kernel(noisy, rounds="bf16")})
    assert rows["torch"]["refused"] == "" and rows["torch"]["dtype"] == "bfloat16"
    assert rows["torch"]["bytes"] == 20 * 2 * 2 * 20 * 2 * 16
    assert "random y " in rows["worse"]["refused"] and rows["tensor cores"]["refused"] == ""


def test_the_time_mixing(monkeypatch):
    """Its steps on the CPU pass its gates; an error in the gradient of a parameter is seen."""
    monkeypatch.setitem(bench.CHECK_SHAPE, "cpu", bench.CHECK_SHAPE["cuda"])
    operator = cases.time_mixing()
    kernels = operator.kernels("cpu", False)
    kernels["wrong"] = cases.Kernel(lambda *x: cases.time_mix(*x[:-1], x[-1] * 2 - x[-1].detach()))
    rows = rows_of(kernels, (1, 32, 1, 64), operator)
    assert list(rows) == ["mix torch", "mix cpu", "wrong"]
    assert set(rows["mix cpu"]["errors"]["random"]) == set(cases.MIXED)
    for name in ("mix torch", "mix cpu"):
        assert rows[name]["refused"] == "" and rows[name]["both_ms"] > 0, rows[name]
    assert rows["wrong"]["refused"].startswith("random dln_b 1.0e+00 above 2.0e-06")


def test_a_peer_is_called_by_its_own_formula(monkeypatch):
    """A stand-in with the peer's interface: log decay, another scale unless told; y and a state."""
    seen = []

    def chunk_rwkv7(r, w, k, v, a, b, scale=2.0, chunk_size=None, disable_recompute=False):
        seen.append((scale, chunk_size, disable_recompute))
        gate = -w / train_rwkv7.DECAY_BOUND
        return cases.REFERENCE["wkv7"].wkv7(r, torch.log(gate / (1 - gate)), k, v, a, b)

    def missing(package):
        raise cases.importlib.metadata.PackageNotFoundError(package)
    fla = types.SimpleNamespace(chunk_rwkv7=chunk_rwkv7)
    for name in ("fla", "fla.ops", "fla.ops.rwkv7"):
        monkeypatch.setitem(sys.modules, name, fla)
    monkeypatch.setattr(cases.importlib.metadata, "version", lambda package: "9.9")
    row = rows_of({"fla": cases.wkv7_kernels("cpu", True)["fla"]})["fla"]
    assert row["refused"] == "" and row["both_ms"] > 0 and row["peer"] and set(seen) == {(1.0, 64, False)}
    fla.chunk_rwkv7 = lambda r, w, k, v, a, b: cases.REFERENCE["wkv7"].wkv7(r, w, k, v, a, b)  # takes w as ours is
    row = rows_of({"fla": cases.wkv7_kernels("cpu", True)["fla"]})["fla"]
    assert row["refused"].startswith("wrong results: random y ") and "both_ms" not in row
    monkeypatch.setattr(cases.importlib.metadata, "version", missing)
    assert cases.wkv7_kernels("cpu", True)["fla"].missing == "flash-linear-attention is not installed"


def test_write_keeps_the_rows_of_other_devices(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- bench wkv7 cuda: begin -->\n<!-- bench wkv7 cuda: end -->\nb\n")
    row = dict(shape=SHAPE, dtype="bfloat16", kernel="fast", refused="head size | 16", peer=False)

    def write(device, date):
        machine = dict(device=device, date=date)
        bench.write_readme("wkv7", "cuda", machine, f"{device}, {date}, driver 1", [row, row], page)
    for device, date in (("NVIDIA H100", "2026-01-01"), ("NVIDIA H200", "2026-01-02"), ("NVIDIA H100", "2026-01-03")):
        write(device, date)
    lines = page.read_text().splitlines()
    rows = [line.split(" | ")[:2] for line in lines if line.startswith("| NVIDIA")]
    assert rows == [["| NVIDIA H200", "2026-01-02"]] * 2 + [["| NVIDIA H100", "2026-01-03"]] * 2
    assert [line for line in lines if line.startswith("- ")] == [
        "- NVIDIA H200, 2026-01-02, driver 1", "- NVIDIA H100, 2026-01-03, driver 1"]
    assert sum(line.startswith("| device |") for line in lines) == 1 and (lines[0], lines[-1]) == ("a", "b")
    assert {line.count("|") for line in lines if line.startswith("|")} == {len(bench.COLUMNS) + 1}
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        write("NVIDIA H100", "2026-01-03")
    assert page.read_text() == "no markers"


@pytest.mark.parametrize("flags, parts", (
    (["wkv9"], ["wkv9", "wkv7"]), (["wkv7", "--shape", "1,2,3"], ["B,T,H,N"]),
    (["wkv7", "--device", "cuda"], ["no CUDA device", "doctor.py", "--device cpu"]),
    (["wkv7", "--device", "cpu", "--kernels", "quick"], ["--kernels quick", "torch, cpu"])))
def test_bad_input(flags, parts, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        bench.main(flags)
    message = capsys.readouterr().err + str(ended.value.code)
    assert ended.value.code and all(part in message for part in parts), message


def test_one_bad_kernel_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "why_not", lambda script, kernel: "not built" if kernel == "cpu" else "")
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 2**20)
    with pytest.raises(ValueError, match="not every kernel.* cpu at"):
        call("wkv7", "--shape", "1,16,1,16", page=tmp_path / "README.md")
    assert "|" not in (tmp_path / "README.md").read_text()
