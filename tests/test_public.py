"""Public checkpoints: what formats.py reads of others computes what transformers and the rwkv package compute, from any
wrapper, file, folder or the hub; tokenizer.json. To run: ./test.sh tests/test_public.py"""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

import formats
import public
import sample
from helpers import ROOT, environment, tree
from hub import Hub

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
tokenizers = pytest.importorskip("tokenizers", reason="pip install -r tests/requirements.txt")
tokenizer = sample.tokenizers

LIMIT = 1e-5  # of differences of the logits of 100 tokens, relative to the largest; measured up to 1.1e-6
GPT2 = {"small": dict(vocab_size=300, n_embd=64, n_layer=2, n_head=1),
        "heads of 32": dict(vocab_size=257, n_embd=96, n_layer=3, n_head=3),
        "other gelu": dict(vocab_size=300, n_embd=128, n_layer=1, n_head=2, activation_function="gelu")}
X060 = {"small": (64, 1, 2, 300, 256, 32, 64), "odd sizes": (128, 2, 3, 261, 448, 16, 24)}  # C H L V hidden mix decay
PACKAGE = """
import sys
import torch
from rwkv.model import RWKV
path, tokens = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
model, state, one = RWKV(path[:-len(".pth")], "cpu fp32"), None, []
at_once, _ = model.forward(tokens, None, full_output=True)
for token in tokens:
    logits, state = model.forward([token], state)
    one.append(logits.clone())
torch.save(dict(at_once=at_once, one_by_one=torch.stack(one)), sys.argv[2])
"""


def tokens(V, *shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(3))


def noise(generator, *shape):
    return torch.randn(shape, generator=generator) * (0.7 / shape[-1] ** 0.5 if min(shape) > 1 else 0.3)


def forms(model, text):
    """{form: logits} of token by token, pieces and all at once."""
    one, pieces = model.new_state(len(text)), model.new_state(len(text))
    with torch.no_grad():
        return dict(one=torch.cat([model(text[:, t:t + 1], one) for t in range(text.size(1))], 1),
                    pieces=torch.cat([model(part, pieces) for part in text.split([37, 1, text.size(1) - 38], 1)], 1),
                    parallel=model.parallel().logits(text))


def agree(results, want):
    largest = want.abs().max()
    assert largest > 2, "logits too small to tell anything"
    errors = {form: ((z - want).abs().max() / largest).item() for form, z in results.items()}
    assert max(errors.values()) < LIMIT, errors


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2


def gpt2(case):
    """A GPT-2 of transformers with every parameter scattered, so that no term is 0."""
    config = transformers.GPT2Config(n_positions=128, bos_token_id=None, eos_token_id=None, **GPT2[case])
    torch.manual_seed(0)
    model, generator = transformers.GPT2LMHeadModel(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise(generator, *p.shape))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as save_pretrained leaves it, with a tokenizer.json."""
    path = tmp_path_factory.mktemp("gpt2") / "small-gpt2"
    gpt2("small").save_pretrained(path)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8")], tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"], show_progress=False))
    bpe.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("case", GPT2)
def test_gpt2_is_that_of_transformers(case, tmp_path):
    theirs = gpt2(case)
    theirs.save_pretrained(tmp_path / "gpt2")
    model, text = formats.load(tmp_path / "gpt2"), tokens(257, 2, 100)
    with torch.no_grad():
        agree(forms(model, text), theirs(text).logits)
    assert isinstance(model, public.GPT2) and model.label == "gpt2, GPT-2"
    assert model.parameters == sum(p.numel() for p in theirs.parameters()), "the tied head counts once"
    shutil.copy(tmp_path / "gpt2" / "model.safetensors", tmp_path / "gpt2" / "optimizer.pt")  # what may lie beside it
    assert formats.load(tmp_path / "gpt2" / "model.safetensors").config.headsz == model.config.headsz
    assert model.config.seq_len == 128 and model.config.headsz * GPT2[case]["n_head"] == model.C
    for form in (lambda text: model(text, model.new_state()), model.parallel().logits):
        with pytest.raises(ValueError, match="this GPT-2 has 128 positions, 129 tokens do not fit"):
            form(tokens(257, 1, 129))


def test_every_form_of_file(folder, tmp_path):
    """One file, sharded with an index, .bin, bf16 and fp16; a head of its own."""
    first, theirs, text = formats.load(folder), gpt2("small"), tokens(300, 1, 60)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert formats.load(tmp_path / "sharded").hash == first.hash == formats.load(folder / "model.safetensors").hash
    state = dict(theirs.state_dict())
    (tmp_path / "bin").mkdir()
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).bool()}
    torch.save({**state, **mask}, tmp_path / "bin" / "pytorch_model.bin")
    assert formats.load(tmp_path / "bin").hash == first.hash
    for dtype in (torch.bfloat16, torch.float16):
        torch.save({name: t.to(dtype) for name, t in state.items()}, tmp_path / "half.pth")
        half = gpt2("small")
        half.load_state_dict({name: t.to(dtype) for name, t in state.items()})
        with torch.no_grad():
            agree(forms(formats.load(tmp_path / "half.pth"), text), half(text).logits)
    torch.save({**state, "lm_head.weight": 2 * state["lm_head.weight"]}, tmp_path / "own.pth")
    untied = formats.load(tmp_path / "own.pth")
    assert torch.equal(untied.parallel().logits(text), 2 * first.parallel().logits(text))
    assert untied.parameters == first.parameters + 300 * 64
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}, which model.safetensors.index.json names"):
        formats.load(tmp_path / "sharded")


def test_nanogpt(tmp_path):
    """Its checkpoint: wrapped, prefixed, matrices as (out, in), exact GELU, no biases."""
    theirs = gpt2("other gelu")
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    weights = {f"_orig_mod.{name}": t.T.contiguous() if re.search(r"\.c_\w+\.weight$", name) else t
               for name, t in theirs.state_dict().items() if not name.endswith("bias")}
    torch.save(dict(model=weights, model_args=dict(n_head=2, n_layer=1), iter_num=5, optimizer=dict(state={})),
               tmp_path / "ckpt.pt")
    with torch.no_grad():
        agree(forms(formats.load(tmp_path / "ckpt.pt"), tokens(300, 1, 100)), theirs(tokens(300, 1, 100)).logits)


# ----------------------------------------------------------------------------------------------------------------------
# RWKV-6 and RWKV-7


def x060(case):
    """{name: tensor} of an x060 file, vectors as (1, 1, C)."""
    (C, H, L, V, hidden, mix, decay), generator = X060[case], torch.Generator().manual_seed(1)
    normal = lambda *shape: noise(generator, *shape)
    norm = lambda name: {f"{name}.weight": 1 + normal(C), f"{name}.bias": normal(C)}
    weights = {"emb.weight": normal(V, C), **norm("blocks.0.ln0")}
    for l in range(L):
        att, ffn = f"blocks.{l}.att.", f"blocks.{l}.ffn."
        weights |= norm(f"blocks.{l}.ln1") | norm(f"blocks.{l}.ln2") | norm(f"{att}ln_x")
        weights |= {f"{att}time_maa_{letter}": 0.5 + normal(1, 1, C) for letter in "xwkvrg"}
        weights |= {f"{att}time_maa_w1": normal(C, 5 * mix), f"{att}time_maa_w2": normal(5, mix, C),
                    f"{att}time_decay": normal(1, 1, C) - 1, f"{att}time_decay_w1": normal(C, decay),
                    f"{att}time_decay_w2": normal(decay, C), f"{att}time_faaaa": normal(H, C // H)}
        weights |= {f"{att}{name}.weight": normal(C, C) for name in ("receptance", "key", "value", "gate", "output")}
        weights |= {f"{ffn}time_maa_k": 0.5 + normal(1, 1, C), f"{ffn}time_maa_r": 0.5 + normal(1, 1, C),
                    f"{ffn}key.weight": normal(hidden, C), f"{ffn}receptance.weight": normal(C, C),
                    f"{ffn}value.weight": normal(C, hidden)}
    return weights | norm("ln_out") | {"head.weight": normal(V, C) * 3}


def package(path, text, folder):
    """{mode: logits} of the rwkv package, which takes its settings from a process's environment."""
    torch.save(text, folder / "exchange")
    env = dict(environment(), RWKV_V7_ON="0", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    done = subprocess.run([sys.executable, "-c", PACKAGE, str(path), str(folder / "exchange")], env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "exchange", weights_only=True)


@pytest.mark.parametrize("case", X060)
def test_x060_is_that_of_the_rwkv_package(case, tmp_path):
    text = tokens(X060[case][3], 1, 100)
    torch.save(x060(case), tmp_path / "model.pth")
    model = formats.load(tmp_path / "model.pth")
    ours = forms(model, text)
    for want in package(tmp_path / "model.pth", text[0].tolist(), tmp_path).values():
        agree({form: z[0] for form, z in ours.items()}, want)
    assert isinstance(model, public.X060) and model.label == "model, RWKV-6 x060"
    torch.save({name: t[0, 0] if t.shape[:2] == (1, 1) else t for name, t in x060(case).items()}, tmp_path / "flat.pth")
    assert formats.load(tmp_path / "flat.pth").hash == model.hash, "vectors as (C,)"
    out = tmp_path / "again.pth"
    assert formats.main([str(tmp_path / "model.pth"), "--to", "rwkv", "--out", str(out)]) == 0
    again, first = torch.load(out, weights_only=True), x060(case)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name].flatten(), first[name].flatten()) for name in first)


def hugging_face(weights, stacked=False):
    """x070's weights under the names of the RWKV/rwkv7-* repositories."""
    projections = dict(receptance="r_proj", key="k_proj", value="v_proj", output="o_proj", ln_x="g_norm")
    renamed, mixes = {}, {}
    for name, t in weights.items():
        first, *rest = name.split(".")
        if first != "blocks":
            key = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}[first]
            renamed[f"{key}.{rest[0]}"] = t
            continue
        l, part, *leaf = rest
        layer = f"model.layers.{l}"
        if part in ("ln0", "ln1", "ln2"):
            renamed[f"{layer}.{dict(ln0='pre_norm', ln1='attn_norm', ln2='ffn_norm')[part]}.{leaf[0]}"] = t
        elif part == "ffn":
            renamed[".".join([layer, "ffn", *leaf])] = t.flatten() if leaf[0] == "x_k" else t
        elif re.fullmatch("[wavg][012]", leaf[0]):
            where = dict(zip("012", ("2.bias", "0.weight", "2.weight")))[leaf[0][1]]
            key = f"{layer}.attn.{leaf[0][0]}_lora.lora.{where}"
            renamed[key] = t.flatten() if "bias" in where else t.T.contiguous()
        elif stacked and leaf[0].startswith("x_"):
            mixes.setdefault(f"{layer}.attn.x_x", {})[leaf[0]] = t.flatten()
        elif leaf[0] in projections:
            renamed[f"{layer}.attn.{projections[leaf[0]]}.{leaf[1]}"] = t
        else:
            renamed[f"{layer}.attn.{leaf[0]}"] = t.flatten() if leaf[0] in ("k_k", "k_a") else t
    return renamed | {name: torch.stack([mix[f"x_{letter}"] for letter in "rwkvag"]) for name, mix in mixes.items()}


@pytest.fixture(scope="module")
def x070(tmp_path_factory):
    """A file in x070's layout and its weights."""
    import train_rwkv7
    config = train_rwkv7.Hyperparameters(x070=True, layers=2, width=128, headsz=64, vocab_size=300, device="cpu",
                                         dtype="fp32", kernel="torch")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    weights = {name: t + noise(generator, *t.shape) for name, t in train_rwkv7.build_model(config).state_dict().items()}
    path = tmp_path_factory.mktemp("x070") / "official.pth"
    torch.save(weights, path)
    return path, weights


@pytest.mark.parametrize("stacked", (False, True))
def test_hugging_faces_rwkv7_is_x070(stacked, x070, tmp_path):
    path, weights = x070
    (tmp_path / "hf").mkdir()
    safetensors.torch.save_file(hugging_face(weights, stacked), tmp_path / "hf" / "model.safetensors")
    first, again, text = formats.load(path), formats.load(tmp_path / "hf"), tokens(300, 1, 100)
    assert all(torch.equal(z, forms(again, text)[form]) for form, z in forms(first, text).items())
    assert again.label == "hf, RWKV-7 in Hugging Face's naming" and again.hash == first.hash


@pytest.mark.parametrize("wrap", [
    lambda w: dict(model=w, step=3), lambda w: dict(state_dict={f"model.{k}": t for k, t in w.items()}, epoch=1),
    lambda w: dict(module={f"_forward_module.{k}": t for k, t in w.items()}),
    lambda w: {f"module._orig_mod.{k}": t for k, t in w.items()},
    lambda w: {**w, **{f"blocks.0.att.v{i}": torch.ones(2, 2) for i in range(3)}}])
def test_what_trainers_leave(wrap, x070, tmp_path):
    path, weights = x070
    torch.save(wrap(weights), tmp_path / "model.pth")
    assert formats.load(tmp_path / "model.pth").hash == formats.load(path).hash


@pytest.mark.parametrize("kind", ("GPT-2", "RWKV-6 x060", "RWKV-7 x070"))
def test_through_our_own_format(kind, folder, x070, tmp_path):
    """Exported to one safetensors file and read again: the same model, by name too."""
    torch.save(x060("small"), tmp_path / "six.pth")
    path = {"GPT-2": folder, "RWKV-6 x060": tmp_path / "six.pth", "RWKV-7 x070": x070[0]}[kind]
    out = tmp_path / "out.safetensors"
    assert formats.main([str(path), "--to", "safetensors", "--out", str(out)]) == 0
    first, again, text = formats.load(path), formats.load(out), tokens(300, 1, 60)
    assert again.label == first.label and kind in again.label and type(again) is type(first)
    assert all(torch.equal(z, forms(again, text)[form]) for form, z in forms(first, text).items())


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_tokenizer_json(folder):
    own, theirs = tokenizer.from_file(folder / "tokenizer.json"), tokenizers.Tokenizer.from_file(
        str(folder / "tokenizer.json"))
    text = "Ω naïve\n\n  <|endoftext|> it's 🙂 12"
    assert own.document_mark == theirs.token_to_id("<|endoftext|>") == 0 and own.vocab_size == 300
    plain = (ROOT / "README.md").read_text(encoding="utf-8")
    assert own.encode(plain).tolist() == theirs.encode(plain).ids and own.decode(own.encode(plain)) == plain.encode()
    assert own.document_mark not in own.encode(text) and own.decode(own.encode(text)) == text.encode(), "marks are text"
    assert own.lengths()[own.encode(text)].sum() == len(text.encode()) and own.lengths()[0] == 0
    with pytest.raises(UnicodeEncodeError):
        own.encode("\ud83d")


def test_what_a_tokenizer_json_asks_for(folder, tmp_path):
    """Added tokens that are no marks are text as written; truncation and padding are not obeyed; words are no text."""
    parts, path = json.loads((folder / "tokenizer.json").read_text()), tmp_path / "tokenizer.json"
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens(["<think>", " héllo", "    "])
    inner.enable_truncation(5)
    inner.enable_padding(length=50)
    inner.save(str(path))
    own, text = tokenizer.from_file(path), "<think> héllo    x and much more than five tokens"
    assert own.decode(own.encode(text)) == text.encode() and 302 in own.encode(text)
    assert own.lengths()[own.encode(text)].sum() == len(text.encode())
    parts["model"] = dict(type="WordLevel", vocab={"a": 0, "<unk>": 1}, unk_token="<unk>")
    path.write_text(json.dumps(parts))
    with pytest.raises(tokenizer.Failure, match="is of the kind WordLevel, whose tokens do not tell their text"):
        tokenizer.from_file(path)


def test_a_tokenizer_that_changes_text(folder, tmp_path, capsys):
    """... is told: bits per byte are of its own count."""
    parts = json.loads((folder / "tokenizer.json").read_text())
    parts["normalizer"] = dict(type="Lowercase")
    parts["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    (tmp_path / "text.txt").write_text("An Old Text. " * 30)
    err = run(capsys, folder, "--eval", tmp_path / "text.txt", "--tokenizer", tmp_path / "tokenizer.json").err
    assert "text.txt stand for 391 bytes, the text has 390" in err and err.count("\n") == 1


def test_pieces_of_other_kinds(tmp_path):
    """Blanks as U+2581 and odd bytes as <0x..>; no mark."""
    pieces = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    bpe.save(str(tmp_path / "tokenizer.json"))
    own = tokenizer.from_file(tmp_path / "tokenizer.json")
    assert own.document_mark == -1 and own.encode(" aé").tolist() == [259, 0xC3 + 1, 0xA9 + 1]
    assert own.decode(own.encode(" a aé")) == " a aé".encode()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(tokenizer.Failure, match="cannot read the tokenizer .*tokenizer.json"):
        tokenizer.from_file(tmp_path / "tokenizer.json")


def test_the_tokenizer_of_a_model():
    """By size: RWKV's own from the rwkv package; bytes with a mark (257 ids) and without (256)."""
    world = tokenizer.for_model({}, 65536)
    assert world.name == "rwkv_world" and world.decode(world.encode("naïve 🙂")) == "naïve 🙂".encode()
    assert tokenizer.for_model({}, 257).document_mark == 256
    assert tokenizer.for_model({}, 256, "bytes").document_mark == -1
    assert tokenizer.for_model({}, 256, "bytes").lengths().tolist() == [1] * 256
    with pytest.raises(tokenizer.Failure, match="not known here"):
        tokenizer.for_model({}, 256)


# ----------------------------------------------------------------------------------------------------------------------
# sample.py with them


def run(capsys, *flags, status=0):
    capsys.readouterr()
    assert sample.main([str(flag) for flag in flags]) == status, capsys.readouterr().err
    return capsys.readouterr()


@pytest.fixture(scope="module")
def models(folder, x070, tmp_path_factory):
    """{kind: path}: one of each, the RWKVs of 256 ids and so of bytes without a mark."""
    root = tmp_path_factory.mktemp("models")
    cut = lambda weights: {name: t[:256] if name in ("emb.weight", "head.weight") else t for name, t in weights.items()}
    torch.save(cut(x060("small")), root / "six.pth")
    torch.save(cut(x070[1]), root / "seven.pth")
    (root / "hf").mkdir()
    safetensors.torch.save_file(hugging_face(cut(x070[1])), root / "hf" / "model.safetensors")
    return {"GPT-2": folder, "x060": root / "six.pth", "x070": root / "seven.pth", "hf": root / "hf"}


@pytest.mark.parametrize("kind", ("GPT-2", "x060", "x070", "hf"))
def test_text_check_and_eval(kind, models, tmp_path, capsys):
    path, flags = models[kind], [] if kind == "GPT-2" else ["--tokenizer", "bytes"]
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8")[:700], encoding="utf-8")
    text = run(capsys, path, "--start", "The ", "--max_new_tokens", 20, *flags)
    assert text.out.startswith("The ") and len(text.out) > 8 and formats.load(path).label in text.err
    check = run(capsys, path, "--check", "--text", tmp_path / "text.txt", "--tokens", 80, *flags)
    assert "all forms agree" in check.out
    out = run(capsys, path, "--eval", tmp_path / "text.txt", "--context", 64, *flags).out.splitlines()
    result, model = json.loads(out[-1]), formats.load(path)
    assert out[-2] == (f"| {model.label} | {model.parameters:,} | {tmp_path / 'text.txt'} | {result['loss']:.4f} | "
                       f"{result['bits_per_byte']:.4f} | {result['tokens']:,} | 64 |")
    own = sample.open_tokenizer(model, sample.parse([str(path), *flags]))
    ids = own.encode((tmp_path / "text.txt").read_text(encoding="utf-8"))
    ids = torch.from_numpy(np.append([own.document_mark] * (own.document_mark >= 0), ids).astype(np.int64))
    pieces = ids[:(len(ids) - 1) // 64 * 64 + 1]
    with torch.no_grad():
        z = model.parallel().logits(pieces[:-1].view(-1, 64))
    want = torch.nn.functional.cross_entropy(z.flatten(0, 1), pieces[1:]).item()
    assert result["loss"] == pytest.approx(want, rel=1e-5) and result["bytes"] == own.lengths()[pieces[1:]].sum()
    if kind != "GPT-2":
        assert "nothing to begin with" in run(capsys, path, "--tokenizer", "bytes", status=1).err


def test_the_table(models, tmp_path, capsys):
    """A row takes the place of that of the same model and data; a page without markers is left alone."""
    (tmp_path / "text.txt").write_text("An old text. " * 30)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{sample.BEGIN}\n{sample.END}\nafter\n")
    flags = ["--eval", tmp_path / "text.txt", "--tokenizer", "bytes", "--table", page, "--context"]
    for path, context in ((models["x060"], 16), (models["x070"], 16), (models["x060"], 32)):
        row = run(capsys, path, *flags, context).out.splitlines()[-2]
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and lines[2].startswith("| model | parameters | data |")
    assert [line.split(",")[0] for line in lines[4:6]] == ["| seven", "| six"] and lines[5] == row and len(lines) == 8
    for text, words in (("no markers", "needs the lines"),
                        (f"{sample.BEGIN}\na line of prose\n{sample.END}", "Take it out"),
                        (f"{sample.BEGIN}\n{lines[2]}\n{lines[3]}\n| short |\n{sample.END}", "Take it out")):
        page.write_text(text)
        refused = run(capsys, models["x060"], *flags, 16, status=1)
        assert words in refused.err and refused.out == "" and page.read_text() == text, "before the work"


def test_the_end_of_the_positions(models, tmp_path, capsys):
    """128 of them: refused before anything is computed, with what does fit; --check and --bench take what fits."""
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    path = models["GPT-2"]
    for flags, words in ((["--start", "The ", "--max_new_tokens", 200], "--max_new_tokens 12"),
                         (["--eval", tmp_path / "text.txt", "--context", 200], "--context 128 or less"),
                         (["--eval", tmp_path / "text.txt", "--context", 0], "--context 128 or less")):
        refused = run(capsys, path, *flags, status=1)
        assert "the model has 128 positions" in refused.err and words in refused.err and refused.out == "", refused
    assert "all forms agree" in run(capsys, path, "--check").out
    assert run(capsys, path, "--check").out.startswith("small-gpt2, GPT-2: 128 tokens of sample.py's own head")
    flags = ["--bench", "--positions", "64,4096", "--rounds", 1, "--out", tmp_path / "out"]
    assert "no room for 128 tokens after a text" in run(capsys, path, *flags, status=1).err
    assert not (tmp_path / "out").exists()


def test_bench(models, tmp_path, capsys):
    flags = ["--positions", "16,24", "--rounds", "2", "--chunk", "8", "--out", tmp_path / "out"]
    run(capsys, "--init_from", models["x060"], "--bench", *flags)
    assert "RWKV-6" in (tmp_path / "out" / "table.md").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(folder, x070):
    """A hub with three repositories: a model.safetensors, a pytorch_model.bin, several .pth."""
    files = {f"/owner/small-gpt2/{path.name}": path.read_bytes() for path in folder.iterdir()}
    files |= {"/owner/pths/a.pth": x070[0].read_bytes(), "/owner/pths/b.pth": x070[0].read_bytes()}
    weights = folder.parent / "pytorch_model.bin"
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), weights)
    files |= {"/owner/old/pytorch_model.bin": weights.read_bytes(),
              "/owner/old/config.json": (folder / "config.json").read_bytes()}
    hub = Hub(files)
    yield hub
    hub.close()


@pytest.fixture
def go(hub, tmp_path):
    """sample.py as a process, with this hub and a cache of its own."""
    def call(*flags, **env):
        own = re.compile("HF_|HUGGING|.*_PROXY$", re.IGNORECASE)
        settings = {key: value for key, value in environment().items() if not own.match(key)}
        settings |= dict(HF_ENDPOINT=hub.url(), HF_HOME=str(tmp_path / "cache"), HF_HUB_DISABLE_XET="1") | env
        return subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, flags)], env=settings, text=True,
                              cwd=tmp_path, capture_output=True, timeout=300)
    return call


def test_from_the_hub_and_from_the_cache(go, hub, folder):
    flags = ["--init_from", "owner/small-gpt2", "--start", "The ", "--num_samples", 1, "--max_new_tokens", 10]
    done = go(*flags)
    assert done.returncode == 0 and done.stdout.startswith("The ") and "owner/small-gpt2, GPT-2" in done.stderr, done
    hub.requests.clear()
    again = go(*flags, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == done.stdout and not hub.requests, again
    assert go(folder, *flags[2:]).stdout == done.stdout, "and what it is without a hub"
    assert go("--init_from", "owner/old", *flags[2:4], "--max_new_tokens", 0, "--tokenizer",
              folder / "tokenizer.json").returncode == 0
    done = go("--init_from", "owner/pths/b.pth", "--start", "a", "--max_new_tokens", 5, "--tokenizer",
              folder / "tokenizer.json")
    assert done.returncode == 0 and "b, RWKV-7 x070" in done.stderr, done


@pytest.mark.parametrize("flags, env, words", [
    (["owner/nothing"], {}, ["cannot fetch owner/nothing", "OWNER/NAME of the hub"]),
    (["latest"], {}, ["no checkpoint in", "Train one"]), (["../gone"], {}, ["no such file"]),
    (["owner/pths"], {}, ["owner/pths has no weights", "a.pth, b.pth"]),
    (["owner/small-gpt2"], dict(HF_HUB_OFFLINE="1"), ["cannot fetch owner/small-gpt2", "bring its folder"]),
    (["owner/small-gpt2"], dict(HF_ENDPOINT="http://127.0.0.1:9"), ["cannot fetch owner/small-gpt2", "HF_ENDPOINT"])])
def test_what_the_hub_does_not_give(flags, env, words, go, tmp_path):
    done = go("--init_from", *flags, "--start", "a", **env)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert done.stderr.startswith("sample.py: ") and all(word in done.stderr for word in words), done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_folders_that_are_none(folder, x070, tmp_path):
    """One clear line each."""
    weights = {name: t for name, t in safetensors.torch.load_file(folder / "model.safetensors").items()}
    less = {name: t for name, t in weights.items() if not name.endswith("ln_f.bias")}
    six, name = x060("small"), "transformer.wpe.weight"
    wpe = weights[name]
    cases = {
        "two models": ({"a.pth": six, "b.pth": six}, {}, "holds several models: a.pth, b.pth"),
        "lacking": ({"pytorch_model.bin": less}, {}, "is not plain GPT-2: it lacks ln_f.bias"),
        "heads": ({"pytorch_model.bin": weights}, {"config.json": '{"n_head": 7}'}, "7 heads over a width of 64"),
        "activation": ({"pytorch_model.bin": weights}, {"config.json": '{"activation_function": "relu"}'}, "relu"),
        "config": ({"pytorch_model.bin": weights}, {"config.json": "{"}, "config.json is damaged"),
        "index": ({}, {"model.safetensors.index.json": "[]"}, "index.json is damaged"),
        "rank": ({"a.pth": {**six, "blocks.1.att.time_maa_w2": torch.ones(5, 31, 64)}}, {},
                 "time_maa_w2 is (5, 31, 64)"),
        "more": ({"a.pth": {**six, "blocks.1.att.time_mix": torch.ones(64)}}, {},
                 "has besides it blocks.1.att.time_mix"),
        "heads of x060": ({"a.pth": {**six, **{f"blocks.{l}.att.time_faaaa": torch.ones(3, 50) for l in range(2)}}}, {},
                          "3 heads of 50 are not its width 64"),
        "empty": ({}, {"config.json": "{}"}, "is a folder without weights"),
        "shards": ({"a_train.bin": weights, "a_val.bin": weights}, {}, "is a folder without weights"),
        "scale": ({"model.pth": weights}, {"config.json": '{"scale_attn_by_inverse_layer_idx": true}'},
                  "its configuration has scale_attn_by_inverse_layer_idx True, not False"),
        "epsilon": ({"model.pth": weights}, {"config.json": '{"layer_norm_epsilon": 0.01}'}, "layer_norm_epsilon 0.01"),
        "layers": ({"model.pth": weights}, {"config.json": '{"n_layer": 12}'}, "n_layer 12, not 2"),
        "list": ({"model.pth": weights}, {"config.json": '{"activation_function": ["gelu"]}'}, "activation ['gelu']"),
        "float8": ({"a.pth": {**weights, name: wpe.to(torch.float8_e4m3fn)}}, {}, "float8_e4m3fn, not (128, 64) of"),
        "sparse": ({"a.pth": {**weights, name: wpe.to_sparse()}}, {}, "sparse, not"),
        "two in one": ({"a.pth": {**weights, "h.0.ln_1.bias": torch.zeros(64)}}, {}, "two models in one"),
        "llama": ({"a.pth": {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}}, {}, "none of the models")}
    for case, (tables, texts, words) in cases.items():
        path = tmp_path / case
        path.mkdir()
        for name, table in tables.items():
            torch.save(table, path / name)
        for name, text in texts.items():
            (path / name).write_text(text)
        with pytest.raises(ValueError) as refused:
            formats.load(path)
        message = str(refused.value)
        assert words in message and "\n" not in message and len(message) < 500 and message.endswith("."), message


def test_nothing_of_the_gpt2_has_a_place(folder, tmp_path, capsys):
    assert formats.main([str(folder), "--to", "rwkv", "--out", str(tmp_path / "x.pth")]) == 1
    assert "learned positions" in capsys.readouterr().err and not tree(tmp_path)
    with pytest.raises(SystemExit):
        sample.main(["--start", "a"])
    assert "give a CHECKPOINT or --init_from ID" in capsys.readouterr().err
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    assert sample.main([str(tmp_path / "alone.safetensors"), "--start", "a"]) == 1
    assert "tokenizer is not known here" in capsys.readouterr().err and os.listdir(tmp_path) == ["alone.safetensors"]
