"""cuda/bench.py: no time without a green check, what the rows say, both clocks, the table in cuda/README.md."""

import importlib.util
import inspect
import json
import sys
import types

import pytest
import torch

import train_rwkv7
from helpers import ROOT

sys.path.append(str(ROOT / "cuda"))
import cases  # noqa: E402

spec = importlib.util.spec_from_file_location("cuda_bench", ROOT / "cuda" / "bench.py")  # the root has a bench.py too
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

SHAPE = (2, 20, 2, 16)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(*flags, readme=None):
    arguments = bench.parse_arguments(["wkv7", "--device=cpu", "--repeats=3", "--threads=1", *map(str, flags)])
    return bench.bench(arguments, **(dict(readme=readme) if readme else {}))


def rows_of(kernels, timer=None, shape=SHAPE):
    """measure() of these kernels; rows by name."""
    kernels = {"torch": cases.Kernel(train_rwkv7.wkv7), **kernels}
    rows = bench.measure(cases.wkv7(), shape, kernels, timer or bench.WallClock(), "cpu", 3, 1e9)
    return {row["kernel"]: row for row in rows}


def test_whole_on_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 2**20)
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- bench wkv7 cpu: begin -->\n<!-- bench wkv7 cpu: end -->\nbelow\n")
    machine, rows = call("--shape", "2,20,2,16", "1,33,1,32", "--json", tmp_path / "rows.json", "--write", readme=page)
    assert [(row["shape"], row["kernel"]) for row in rows] == [
        (shape, kernel) for shape in (SHAPE, (1, 33, 1, 32)) for kernel in ("torch", "cpu")]
    for row in rows:
        assert row["refused"] == "" and row["forward_ms"] > 0 and row["backward_ms"] > 0
        assert row["both_ms"] > max(row["forward_ms"], row["backward_ms"])
        B, T, H, N = row["shape"]
        assert row["bytes"] == 20 * 4 * B * T * H * N
        assert row["flops_per_second"] == pytest.approx(28 * B * T * H * N * N / (row["both_ms"] / 1e3))
        assert row["of_floor"] == pytest.approx(row["bytes"] / row["both_ms"] * 1e-6 / machine["copy GB/s"], rel=0.2)
        assert set(row["errors"]) == {"random", "correlated"}
        for errors in row["errors"].values():
            assert set(errors) == {"y", "dr", "dw", "dk", "dv", "da", "db"} and 0 < max(errors.values()) < 2e-6
    assert rows[0]["speed_up"] == 1
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["machine"] == machine and len(written["rows"]) == 4
    printed, text = capsys.readouterr().out, page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n")
    for row in rows:
        assert bench.line(bench.cells(row, machine)) in text and bench.line(bench.cells(row, machine)) in printed
    assert machine["device"] in text and machine["date"] in text and machine["commit"] in text


def spoilt(name, spoil):
    """WKV-7 with one of y and the gradients spoilt."""
    where = cases.wkv7().tensors.index(name)

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            y = train_rwkv7.wkv7(*inputs)
            return spoil(y) if where == 0 else y

        @staticmethod
        def backward(ctx, dy):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                gradients = list(torch.autograd.grad(train_rwkv7.wkv7(*leaves), leaves, dy))
            if where:
                gradients[where - 1] = spoil(gradients[where - 1])
            return tuple(gradients)
    return Spoilt.apply


def nan_at_one(x):
    x = x.clone()
    x.flatten()[7] = torch.nan
    return x


@pytest.mark.parametrize("name", ("y", "dr", "dw", "dk", "dv", "da", "db"))
@pytest.mark.parametrize("spoil", (lambda x: x * 1.00001, nan_at_one))
def test_a_wrong_kernel_is_refused_and_not_timed(name, spoil, monkeypatch):
    timed = []

    class Watched(bench.Passes):
        def __init__(self, kernel, *rest):
            timed.append(kernel)
            super().__init__(kernel, *rest)
    monkeypatch.setattr(bench, "Passes", Watched)
    wrong = cases.Kernel(spoilt(name, spoil))
    rows = rows_of({"wrong": wrong})
    assert f"random {name} " in rows["wrong"]["refused"] and "above 2.0e-06" in rows["wrong"]["refused"]
    assert rows["torch"]["refused"] == "" and len(timed) == 1 and timed[0] is not wrong
    assert not [key for key in rows["wrong"] if key.endswith("_ms")]
    cells = bench.cells(rows["wrong"], dict(device="d", date="today"))
    assert len(cells) == len(bench.COLUMNS) and cells[5].startswith("not timed: random") and set(cells[6:13]) == {"-"}


def test_a_kernel_that_does_not_repeat_itself_is_refused():
    count = iter(range(100))
    rows = rows_of({"restless": cases.Kernel(lambda *x: train_rwkv7.wkv7(*x) * (1 + (next(count) % 2) * 1.2e-7))})
    assert rows["restless"]["refused"] == "random: two runs differ; correlated: two runs differ"


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


def test_an_operator_with_parameters(monkeypatch):
    """What has no tokens stays in fp32, has a gradient of its own and is checked with the rest."""
    monkeypatch.setitem(bench.DTYPES, "cpu", torch.bfloat16)
    plain, seen = cases.wkv7(), set()

    def make(family, B, T, H, N):
        inputs, dy = plain.make(family, B, T, H, N)
        return (*inputs, torch.linspace(1, 2, H * N).view(H, N)), dy

    def gained(*inputs, wrong=1.0):
        *inputs, gain = inputs
        seen.add((inputs[0].dtype, gain.dtype))
        return train_rwkv7.wkv7(*inputs) * (gain + (wrong - 1) * (gain - gain.detach())).to(inputs[0].dtype)
    operator = cases.Operator(
        tensors=(*plain.tensors, "d_gain"), make=make, kernels=None, elements=plain.elements, flops=plain.flops,
        reference=lambda *x: plain.reference(*x[:6]) * x[6], head_sizes=plain.head_sizes, shapes={},
        gates=lambda *about: {**dict.fromkeys(plain.tensors, 6e-3), "d_gain": 1e-2})
    kernels = dict(good=cases.Kernel(gained), bad=cases.Kernel(lambda *x: gained(*x, wrong=1.5)))
    good, bad = bench.measure(operator, SHAPE, kernels, bench.WallClock(), "cpu", 3, 1e9)
    assert good["refused"] == "" and good["both_ms"] > 0 and good["errors"]["random"]["d_gain"] > 0
    assert bad["refused"].startswith("random d_gain 5.0e-01 above 1.0e-02; correlated d_gain ")
    assert seen == {(torch.bfloat16, torch.float32)}


def test_the_time_mixing(monkeypatch):
    """Its steps on the CPU pass its gates; an error in the gradient of a parameter is seen."""
    monkeypatch.setitem(bench.CHECK_SHAPE, "cpu", bench.CHECK_SHAPE["cuda"])
    operator = cases.time_mixing()
    kernels = operator.kernels("cpu", False)
    kernels["wrong"] = cases.Kernel(lambda *x: cases.time_mix(*x[:-1], x[-1] * 2 - x[-1].detach()))
    shape = (1, 32, 1, 64)
    rows = {row["kernel"]: row for row in bench.measure(operator, shape, kernels, bench.WallClock(), "cpu", 3, 1e9)}
    assert list(rows) == ["mix torch", "mix cpu", "wrong"]
    assert set(rows["mix cpu"]["errors"]["random"]) == set(cases.MIXED)
    for name in ("mix torch", "mix cpu"):
        assert rows[name]["refused"] == "" and rows[name]["both_ms"] > 0, rows[name]
    assert rows["mix torch"]["speed_up"] == 1
    assert rows["wrong"]["refused"].startswith("random dln_b 1.0e+00 above 2.0e-06")
    gates = operator.gates("bf16", torch.bfloat16, "random")
    assert set(gates) == set(cases.MIXED) and gates["dw"] == 1e-2 and gates["dln_b"] == 1e-5


def test_wkv6_on_the_cpu(tmp_path, monkeypatch):
    """The same program: only the operator's description is another."""
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 2**20)
    page = tmp_path / "README.md"
    page.write_text("<!-- bench wkv6 cpu: begin -->\n<!-- bench wkv6 cpu: end -->\n")
    flags = ["--device=cpu", "--repeats=3", "--threads=1", "--shape=2,20,2,16", "--write"]
    arguments = bench.parse_arguments(["wkv6", *flags])
    machine, rows = bench.bench(arguments, readme=page)
    assert [row["kernel"] for row in rows] == ["torch", "cpu"]
    B, T, H, N = SHAPE
    for row in rows:
        assert row["refused"] == "" and row["bytes"] == 14 * 4 * B * T * H * N
        assert row["flops_per_second"] == pytest.approx(16 * B * T * H * N * N / (row["both_ms"] / 1e3))
        for errors in row["errors"].values():
            assert set(errors) == {"y", "dr", "dk", "dv", "dw", "du"} and 0 < max(errors.values()) < 2e-6
        assert bench.line(bench.cells(row, machine)) in page.read_text()


def test_peer_of_wkv6(monkeypatch):
    def chunk_rwkv6(r, k, v, w, u, scale=None):
        assert scale == 1
        return cases.REFERENCE["wkv6"].wkv6(r, k, v, torch.log(-w), u)
    fake_fla(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv6", types.SimpleNamespace())
    assert "AttributeError" in cases.wkv6_kernels("cpu", True)["fla"].missing
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv6", types.SimpleNamespace(chunk_rwkv6=chunk_rwkv6))
    kernels = {name: kernel for name, kernel in cases.wkv6_kernels("cpu", True).items() if name != "cpu"}
    rows = bench.measure(cases.wkv6(), SHAPE, kernels, bench.WallClock(), "cpu", 3, 1e9)
    assert [(row["kernel"], row["refused"]) for row in rows] == [("torch", ""), ("fla", "")]


def fake_fla(monkeypatch, chunk_rwkv7):
    monkeypatch.setattr(cases.importlib.metadata, "version", lambda package: "9.9")
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    module = types.ModuleType("fla.ops.rwkv7")
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", module)
    if chunk_rwkv7:
        module.chunk_rwkv7 = chunk_rwkv7


def test_peer(monkeypatch):
    """A stand-in with the peer's interface: log decay, one more setting in its newer versions; y and a state."""
    seen = []

    def chunk_rwkv7(r, w, k, v, a, b, scale=2.0, chunk_size=None, disable_recompute=False):
        seen.append((scale, chunk_size, disable_recompute))
        gate = -w / train_rwkv7.DECAY_BOUND
        return cases.REFERENCE["wkv7"].wkv7(r, torch.log(gate / (1 - gate)), k, v, a, b)
    fake_fla(monkeypatch, chunk_rwkv7)
    kernels = cases.wkv7_kernels("cpu", True)
    rows = rows_of({name: kernels[name] for name in ("fla", "fla, more saved")})
    for name, saved in (("fla", False), ("fla, more saved", True)):
        assert rows[name]["refused"] == "" and rows[name]["both_ms"] > 0 and rows[name]["peer"]
        assert (1.0, 64, saved) in seen
    assert "safe_gate" not in inspect.signature(chunk_rwkv7).parameters  # and was not passed


def test_peer_that_is_wrong_or_does_not_compile(monkeypatch):
    def miscompiled(r, w, k, v, a, b):
        return cases.REFERENCE["wkv7"].wkv7(r, w, k, v, a, b)
    fake_fla(monkeypatch, miscompiled)
    row = rows_of({"fla": cases.wkv7_kernels("cpu", True)["fla"]})["fla"]
    assert row["refused"].startswith("wrong results: random y ") and "both_ms" not in row

    def broken(r, w, k, v, a, b):
        raise IndexError("map::at\nand forty lines more")
    fake_fla(monkeypatch, broken)
    assert rows_of({"fla": cases.wkv7_kernels("cpu", True)["fla"]})["fla"]["refused"] == "IndexError: map::at"
    fake_fla(monkeypatch, None)
    row = rows_of({"fla": cases.wkv7_kernels("cpu", True)["fla"]})["fla"]
    assert "flash-linear-attention 9.9: AttributeError" in row["refused"]


def test_peer_that_is_not_installed_is_said_and_no_failure(monkeypatch, capsys):
    def missing(package):
        raise cases.importlib.metadata.PackageNotFoundError(package)
    monkeypatch.setattr(cases.importlib.metadata, "version", missing)
    monkeypatch.setattr(bench, "describe", lambda device: dict(device="d", date="today"))
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 2**20)
    _, rows = call("--peers", "--kernels", "torch", "fla", "--shape", "1,16,1,16")
    assert [row["refused"] for row in rows] == ["", "flash-linear-attention is not installed"]
    assert "not timed: flash-linear-attention is not installed" in capsys.readouterr().out


def test_write_keeps_the_rows_of_other_devices(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- bench wkv7 cuda: begin -->\n<!-- bench wkv7 cuda: end -->\nb\n")
    row = dict(shape=SHAPE, dtype="bfloat16", kernel="fast", refused="head size | 16", peer=False)

    def write(device, date):
        machine = dict(device=device, date=date)
        bench.write_readme("wkv7", "cuda", machine, f"{device}, {date}, driver 1", [row, row], page)
    write("NVIDIA H100", "2026-01-01")
    write("NVIDIA H200", "2026-01-02")
    write("NVIDIA H100", "2026-01-03")
    lines = page.read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines if line.startswith("| NVIDIA")] == [
        ["| NVIDIA H200", "2026-01-02"]] * 2 + [["| NVIDIA H100", "2026-01-03"]] * 2
    assert [line for line in lines if line.startswith("- ")] == [
        "- NVIDIA H200, 2026-01-02, driver 1", "- NVIDIA H100, 2026-01-03, driver 1"]
    assert len([line for line in lines if line.startswith("| device |")]) == 1
    assert {line.count("|") for line in lines if line.startswith("|")} == {len(bench.COLUMNS) + 1}
    assert lines[0] == "a" and lines[-1] == "b"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        write("NVIDIA H100", "2026-01-03")
    assert page.read_text() == "no markers"


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_readme_has_a_place_for_every_table(operator):
    page = (ROOT / "cuda" / "README.md").read_text()
    page = page.partition(f"## WKV-{operator[-1]}\n")[2].partition("\n## ")[0]
    for device in ("cpu", "cuda"):
        for end in ("begin", "end"):
            assert page.count(f"<!-- bench {operator} {device}: {end} -->") == 1
    begin, end = (f"<!-- bench {operator} cuda: {end} -->" for end in ("begin", "end"))
    on_gpus = page.partition(f"{begin}\n")[2].partition(end)[0]
    assert ("No GPU row has been measured yet" in page) == (on_gpus == ""), "the sentence and the table disagree"


@pytest.mark.parametrize("flags, parts", (
    (["wkv9"], ["wkv9", "wkv7"]), (["wkv7", "--shape", "1,2,3"], ["B,T,H,N"]),
    (["wkv7", "--repeats", "1"], ["at least 2"]),
    (["wkv7", "--device", "cpu", "--shape", "1,16,1,48"], ["head size 48", "16, 32, 64"]),
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
    page = tmp_path / "README.md"
    page.write_text("<!-- bench wkv7 cpu: begin -->\n<!-- bench wkv7 cpu: end -->\n")
    before = page.read_text()
    with pytest.raises(ValueError, match="not every kernel.* cpu at"):
        call("--shape", "1,16,1,16", "--write", readme=page)
    assert page.read_text() == before
