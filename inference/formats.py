"""Checkpoints in and out: ours, RWKV-7 and RWKV-6 of their authors, RWKV-7 of Hugging Face, GPT-2.

    python inference/formats.py CHECKPOINT --to rwkv --out model.pth         for the rwkv package and its relatives
    python inference/formats.py CHECKPOINT --to safetensors --out FILE       weights and what is known of them, in one

CHECKPOINT: a file, a folder of Hugging Face's kind, a run's name, its record's folder or the word latest. Told apart by
the names of their tensors, in .safetensors, .pth or .bin, one file or sharded with an index:
    ours                     what the training scripts and this program write
    RWKV-7 x070              blocks.0.att.x_r ...; --to rwkv writes it: train with --x070, what else has no place there
    RWKV-6 x060              blocks.0.att.time_maa_x ...; --to rwkv writes it
    RWKV-7, Hugging Face     model.layers.0.attn.w_lora.lora.0.weight ... of the RWKV/rwkv7-* repositories
    GPT-2                    h.0.attn.c_attn.weight ... of gpt2, -medium, -large, -xl; and of nanoGPT
Prefixes and wrappers that trainers leave (module., _orig_mod., {"model": ...}) are taken off. The rwkv package reads
what --to rwkv writes; heads may have any size on a CPU, its CUDA kernel takes 64 channels:

    os.environ["RWKV_V7_ON"] = "1"                       # before the import; not for RWKV-6
    model = rwkv.model.RWKV("model", "cpu fp32")         # the name without .pth
    logits, state = model.forward([ids], None)           # of the last token; full_output=True: of all

A safetensors file of ours is what the training scripts leave after the last step: the weights and, as JSON under the
name checkpoint in its header, script, config, run, step, tokenizer and its sha256.
"""

import argparse
import importlib
import json
import pickle
import re
import signal
import sys
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path

import safetensors
import safetensors.torch
import torch

import public
import recurrent

CHECKPOINTS = Path("checkpoints")
SUFFIXES = ".safetensors", ".pth", ".pt"  # not .bin: shards of tokens are called so too
FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16
TOKENIZERS = ("tokenizer.json", "rwkv_vocab_v20230424.txt")  # files beside a model that tell its tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Where a checkpoint lies


def find(path):
    """The checkpoint's file, or folder with weights: from "latest", the path itself, the name of its run or the folder
    of the run's record. Raises ValueError."""
    path = Path(path)
    if path.is_file() or path.is_dir() and weight_files(path):
        return path
    if path.is_dir() and not (path / "log.txt").exists():
        raise ValueError(f"{path} is a folder without weights (model.safetensors, pytorch_model.bin, or one "
                         ".safetensors, .pth or .pt). Name the file, or fetch them.")
    if str(path) == "latest":
        files = sorted(CHECKPOINTS.glob("*_step*.safetensors"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise ValueError(f"no checkpoint in {CHECKPOINTS.absolute()}. Train one: ./run_rwkv7.sh --track tiny")
    else:
        run = re.escape(path.absolute().name)
        files = [file for file in CHECKPOINTS.glob("*.safetensors") if re.fullmatch(rf"{run}_step\d+", file.stem)]
        files.sort(key=lambda file: (len(file.name), file.name))
        if not files:
            raise ValueError(f"{path}: no such file, nor a checkpoint of that name in {CHECKPOINTS}/. Give a file, a "
                             "folder with weights, a run's name, its record's folder or the word latest; from the hub: "
                             "sample.py --init_from OWNER/NAME.")
    return files[-1]


def weight_files(folder, several=False):
    """The files of a folder's weights, [] where there are none; several: of all models there. Raises ValueError."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                files = [folder / Path(name).name for name in names]
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is damaged ({error}). Fetch it again.") from None
            lacking = [file.name for file in files if not file.is_file()]
            if lacking:
                raise ValueError(f"{folder} lacks {few(lacking)}, which {index.name} names. Fetch them again.")
            return files
        if (folder / single).is_file():
            return [folder / single]
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) > 1 and not several:
        raise ValueError(f"{folder} holds several models: {few([file.name for file in files])}. Name one of them.")
    return files


def few(names):
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# ----------------------------------------------------------------------------------------------------------------------
# Tensors of a file or folder


def tensors_of(path):
    """(what the header or a wrapper says, {name: tensor}) of a file, or of a folder's files together. ValueError."""
    if path.is_dir():
        facts, weights = {}, {}
        for file in weight_files(path):
            more, part = tensors_of(file)
            facts.update(more)
            weights.update(part)
        return facts, weights
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                names = [name for name in file.keys() if "checkpoint" not in facts or is_weight(name)]
                return facts, {name: file.get_tensor(name) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what follows as an error
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        strange = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"{path} holds a Python object ({strange[1]}), whose loading could run code; only tables of "
                         "tensors are read. Save its state_dict() alone." if strange else
                         f"{path} is damaged, or no file of tensors. Fetch or export it again.") from None
    except Exception as error:  # torch meets damage with whatever it leads to
        reason = f"{type(error).__name__} {error}".splitlines()[0][:120]
        raise ValueError(f"{path} is damaged, or no file of tensors ({reason}). Fetch or export it again.") from None
    facts = {}
    while isinstance(weights, dict):  # what a trainer wraps around them
        inside = [key for key in ("model", "state_dict", "module") if isinstance(weights.get(key), dict)]
        if not inside:
            break
        facts, weights = weights.get("model_args", facts), weights[inside[0]]
    tensors = isinstance(weights, dict) and all(isinstance(t, torch.Tensor) for t in weights.values())
    if not tensors or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path} is no table of tensors by name. Save its state_dict() alone.")
    return facts if isinstance(facts, dict) else {}, weights


def is_weight(name):
    """Whether a tensor of our checkpoint is the model's: not an optimiser's, <name>:<key>, nor the run's."""
    return ":" not in name and name not in ("losses", "random", "random.cuda")


def read(path):
    """(header, class of recurrent.py or public.py, Hyperparameters, weights) of a file or folder. Raises ValueError."""
    facts, weights = tensors_of(path)
    if "checkpoint" in facts:
        return ours(path, facts["checkpoint"], weights)
    folder = path if path.is_dir() else path.parent
    alone = path.is_dir() or path.stem in ("model", "pytorch_model") or len(weight_files(folder, several=True)) == 1
    config = folder / "config.json"  # of a file among others it may be another's
    try:
        if alone and config.is_file():
            facts = {**json.loads(config.read_text(encoding="utf-8")), **facts}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config} is damaged ({error}). Fetch it again.") from None
    names, prefixes = sorted(weights), r"^((_orig_mod|module|_forward_module|model|transformer)\.)+"
    weights = {re.sub(prefixes, "", name): t for name, t in weights.items()}
    if len(weights) < len(names):
        raise ValueError(f"{path} holds two models in one: without prefixes some names occur twice. Save one of them.")
    for layout, sign, reader in LAYOUTS:
        if any(re.fullmatch(sign, name) for name in weights):
            model, config, weights = reader(path, weights, facts)
            break
    else:
        older = (".att.gate.weight", "RWKV-5 (x052)"), (".att.time_decay", "RWKV-4 or RWKV-5 (x052 or older)")
        for sign, family in older:
            if any(sign in name for name in weights):
                raise ValueError(f"{path} is of {family}; of RWKV, x060 and x070 are read.")
        known = ", ".join(row[0] for row in LAYOUTS)
        raise ValueError(f"{path} holds none of the models that are read ({known}): none of their names is among its "
                         f"{len(names)} ({few(names)}).")
    name = path.name if path.is_dir() else path.stem
    if path.parent.name == "snapshots":  # of huggingface_hub's cache: models--OWNER--NAME/snapshots/COMMIT
        name = path.parent.parent.name.removeprefix("models--").replace("--", "/")
    header = dict(script=f"{script_of(model).__name__}.py", config=vars(config), step=None, layout=layout, model=name)
    files = [str(folder / name) for name in TOKENIZERS if alone and (folder / name).is_file()]
    return dict(header, tokenizer_file=(*files, None)[0]), model, config, weights


def ours(path, text, weights):
    """What read() returns, of a checkpoint of the training scripts. text: the JSON in its header."""
    try:
        header = json.loads(text)
        if header["schema"] != 3 or header["script"] not in (f"{name}.py" for name in recurrent.FAMILIES):
            raise ValueError(f"schema {header['schema']}, script {header['script']}")
        if not isinstance(header["config"], dict) or not isinstance(header["step"], (int, type(None))):
            raise ValueError("its config or step is none")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = f"no {error} in its header" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged: {reason}. Take another step of the run, or export it again.") from None
    model = PUBLIC.get(header.get("layout")) or recurrent.FAMILIES[header["script"][:-len(".py")]]
    script = script_of(model)
    known = {f.name for f in fields(script.Hyperparameters)}
    config = script.Hyperparameters(**{key: value for key, value in header["config"].items() if key in known})
    if "activation" in header["config"]:
        config.activation = header["config"]["activation"]
    return header, model, config, weights


def script_of(model):
    """The training script whose operators a class uses."""
    return importlib.import_module(next(name for name, family in recurrent.FAMILIES.items()
                                        if issubclass(model, family)))


def load(path, dtype="fp32", device="cpu"):
    """The model of a checkpoint (find() says what path may be), in fp32, bf16 or with int8 weights, of which only what
    runs stays in memory: there is no parallel() of it. Raises ValueError."""
    header, family, config, weights = read(find(path))
    try:
        model = family(config, weights, dtype, device, header, script_of(family))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit {header['script']}: {error}.") from None
    if dtype == "int8":
        model.hash, model.trained = model.hash, None
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Layouts: a reader takes (path, {name: tensor}, what config.json or a wrapper says) and returns (class,
# Hyperparameters, weights by the names that the class reads). Shapes tell the sizes. Raises ValueError.


def shape(weights, name):
    """(rows, cols) of a matrix, or a stand-in for one that is missing or strange, which fit() then says."""
    t = weights.get(name, torch.empty(0))
    return t.shape if t.dim() == 2 and t.numel() else (64, 64)


def layers_of(weights):
    return len({name.split(".")[1] for name in weights if re.match(r"(blocks|h)\.\d+\.", name)})


def fit(path, layout, weights, expected, unused=()):
    """{name: tensor} in the shapes expected, {name: shape}, of which some files have lost the dimensions of size 1."""
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected and name not in unused]
    if missing or extra:
        faults = [f"{what} {few(names)}" for what, names in (("lacks", missing), ("has besides it", extra)) if names]
        raise ValueError(f"{path} is not plain {layout}: it {' and '.join(faults)}.")
    result = {}
    for name, right in expected.items():
        t = weights[name]
        dense = t.layout == torch.strided and t.device.type == "cpu" and t.dtype in FLOATS
        if [n for n in t.shape if n > 1] != [n for n in right if n > 1] or not dense:
            raise ValueError(f"{path} is not plain {layout}: its {name} is {tuple(t.shape)} {str(t.dtype)[6:]}"
                             f"{'' if t.layout == torch.strided else ', sparse'}, not {tuple(right)} of floats.")
        result[name] = t.reshape(right)
    return result


def x070(path, weights, facts):
    """RWKV-7 in its authors' layout, which train_rwkv7.py --x070 has too."""
    (V, C), (_, N) = shape(weights, "emb.weight"), shape(weights, "blocks.0.att.r_k")
    hidden, _ = shape(weights, "blocks.0.ffn.key.weight")
    script = script_of(recurrent.RWKV7)
    config = script.Hyperparameters(
        x070=True, layers=layers_of(weights), vocab_size=V, width=C, headsz=N if C % N == 0 else C,
        ffn_ratio=hidden / C, device="cpu", dtype="fp32", kernel="torch")
    with torch.device("meta"):
        expected = {name: list(t.shape) for name, t in script.RWKV7(config, "torch").state_dict().items()}
    for name in expected:
        if name in ("emb.weight", "head.weight"):
            expected[name][0] = V
        elif ".ffn.key." in name or ".ffn.value." in name:
            expected[name] = [hidden, C] if ".key." in name else [C, hidden]
        elif recurrent.on_the_right(name):
            rank = (0, *weights.get(f"{name[:-1]}1", torch.empty(0)).shape)[-1]
            expected[name] = [C, rank] if name[-1] == "1" else [rank, C]
    unused = [f"blocks.0.att.v{i}" for i in range(3)]  # in many files, though layer 0 mixes no v in
    return recurrent.RWKV7, config, fit(path, "x070", weights, expected, unused)


HUGGING_FACE = (  # of RWKV-7: names there, names of x070
    (r"^embeddings\.", "emb."), (r"^norm\.", "ln_out."), (r"^lm_head\.", "head."), (r"^layers\.", "blocks."),
    (r"\.pre_norm\.", ".ln0."), (r"\.attn_norm\.", ".ln1."), (r"\.ffn_norm\.", ".ln2."), (r"\.attn\.", ".att."),
    (r"\.r_proj\.", ".receptance."), (r"\.k_proj\.", ".key."), (r"\.v_proj\.", ".value."), (r"\.o_proj\.", ".output."),
    (r"\.g_norm\.", ".ln_x."), (r"\.([wavg])_lora\.lora\.2\.bias", r".\g<1>0"),
    (r"\.([wavg])_lora\.lora\.0\.weight", r".\g<1>1"), (r"\.([wavg])_lora\.lora\.2\.weight", r".\g<1>2"))


def huggingface_x070(path, weights, facts):
    """RWKV-7 as flash-linear-attention names it for transformers; its first form stacks the six mixes as attn.x_x."""
    eps = facts.get("head_dim", 64) * facts.get("norm_eps", 1e-5)
    if abs(eps - 64e-5) > 1e-9:
        raise ValueError(f"{path} is not plain x070: head_dim times norm_eps, GroupNorm's eps, is {eps}, not 64e-5.")
    renamed = {}
    for name, t in weights.items():
        for theirs, own in HUGGING_FACE:
            name = re.sub(theirs, own, name)
        if name.endswith(".att.x_x"):
            renamed.update({name[:-1] + letter: mix for letter, mix in zip("rwkvag", t)})
        else:
            renamed[name] = t.T.contiguous() if recurrent.on_the_right(name) else t
    return x070(path, renamed, facts)


X060 = dict(time_maa_x="x_x", time_maa_w="x_w", time_maa_k="x_k", time_maa_v="x_v", time_maa_r="x_r", time_maa_g="x_g",
            time_maa_w1="A", time_maa_w2="B", time_decay="w0", time_decay_w1="w1", time_decay_w2="w2", time_faaaa="u")


def x060(path, weights, facts):
    """RWKV-6 in its authors' layout; X060 says which of its names stand for which of train_rwkv6.py's."""
    (V, C), (H, N) = shape(weights, "emb.weight"), shape(weights, "blocks.0.att.time_faaaa")
    hidden, _ = shape(weights, "blocks.0.ffn.key.weight")
    layers = layers_of(weights)
    ranks = [(shape(weights, f"blocks.{l}.att.time_maa_w1")[1], shape(weights, f"blocks.{l}.att.time_decay_w1")[1])
             for l in range(layers)]
    weights = fit(path, "x060", weights, public.x060_shapes(V, C, H, N, hidden, ranks))
    if H * N != C:
        raise ValueError(f"{path} is not plain x060: {H} heads of {N} are not its width {C}.")
    config = script_of(public.X060).Hyperparameters(
        layers=layers, vocab_size=V, width=C, headsz=N, ffn_ratio=hidden / C, device="cpu", dtype="fp32",
        kernel="torch")
    return public.X060, config, {leaf_by(X060, name): t for name, t in weights.items()}


def leaf_by(names, name):
    """name, its last part replaced where names has another for it."""
    owner, dot, leaf = name.rpartition(".")
    return f"{owner}{dot}{names.get(leaf, leaf)}"


def gpt2(path, weights, facts):
    """GPT-2 of OpenAI, whose matrices stand as (in, out), or of nanoGPT: (out, in), exact GELU, biases or none."""
    weights = {name: t for name, t in weights.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}  # masks
    (V, C), (positions, _) = shape(weights, "wte.weight"), shape(weights, "wpe.weight")
    turned = shape(weights, "h.0.attn.c_attn.weight")[1] == 3 * C
    hidden = shape(weights, "h.0.mlp.c_fc.weight")[1 if turned else 0]
    layers = layers_of(weights)
    expected = public.gpt2_shapes(V, C, positions, hidden, layers, turned)
    if not any(name.endswith(".bias") for name in weights):
        weights.update({name: torch.zeros(size) for name, size in expected.items() if name.endswith(".bias")})
    if "lm_head.weight" in weights:
        expected["lm_head.weight"] = (V, C)
    weights = fit(path, "GPT-2", weights, expected)
    if "lm_head.weight" in weights and torch.equal(weights["lm_head.weight"], weights["wte.weight"]):  # tied
        del weights["lm_head.weight"]
    plain = dict(n_head=C // 64, activation_function="gelu_new" if turned else "gelu", layer_norm_epsilon=1e-5,
                 scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, n_layer=layers)
    heads, activation, *others = (facts.get(key, value) for key, value in plain.items())
    if not isinstance(heads, int) or heads < 1 or C % heads or str(activation) not in public.GELU:
        raise ValueError(f"{path} is not plain GPT-2: {heads} heads over a width of {C}, activation {activation}.")
    for key, value in zip(list(plain)[2:], others):
        if value != plain[key]:
            raise ValueError(f"{path} is not plain GPT-2: its configuration has {key} {value}, not {plain[key]}.")
    config = script_of(public.GPT2).Hyperparameters(layers=layers, vocab_size=V, width=C, headsz=C // heads,
                                                    seq_len=positions, softcap=0.0, device="cpu", dtype="fp32")
    config.activation = activation
    result = {}
    for name, t in weights.items():
        name = re.sub(r"^h\.", "blocks.", name).replace("lm_head", "head")
        result[name] = t.T if turned and re.search(r"\.c_\w+\.weight$", name) else t
    return public.GPT2, config, result


LAYOUTS = (  # what it is called, a name that only it has, its reader
    ("RWKV-7 x070", r"blocks\.\d+\.att\.x_r", x070), ("RWKV-6 x060", r"blocks\.\d+\.att\.time_maa_x", x060),
    ("RWKV-7 in Hugging Face's naming", r"layers\.\d+\.attn\.w_lora\.lora\.0\.weight", huggingface_x070),
    ("GPT-2", r"h\.\d+\.attn\.c_attn\.weight", gpt2))
PUBLIC = {"RWKV-6 x060": public.X060, "GPT-2": public.GPT2}  # layouts whose models are not a training script's


# ----------------------------------------------------------------------------------------------------------------------
# Export

SUFFIX = dict(rwkv=".pth", safetensors=".safetensors")  # the rwkv package appends its own
KEPT = ("script", "layout", "model", "run", "step", "finished", "config", "tokenizer", "tokenizer_sha256")
NO_PLACE = {  # what the format cannot hold of the scripts that train no RWKV-7
    "train_gpt2.py": ["attention with rotary positions and normed queries and keys", "value residual (att.mix)",
                      "x0 lambdas (lambdas)", "RMSNorm without parameters", "MLP without token shift",
                      "everything of x070's time mixing is missing"],
    "train_rwkv6.py": ["the recurrence of RWKV-6 with its bonus (att.u)", "data-dependent token shift (att.x_x, A, B)",
                       "gate through tanh", "factor on the embedding (emb_scale)", "head tied to the embedding",
                       "channel mixing without token shift", "x070's in-context learning rate is missing"],
    "GPT-2": ["attention with learned positions", "biases", "GELU"]}


def without_place(model):
    """The parts of a model that the layouts of x070 and x060 cannot hold: words for the user, none for those two."""
    config, kind = model.config, model.header.get("layout") or f"{model.script.__name__}.py"
    if kind in NO_PLACE:
        softcap = getattr(config, "softcap", 0)
        return NO_PLACE[kind] + ([f"softcap {softcap:g} of the logits"] if softcap else [])
    return [] if kind == "RWKV-6 x060" else [what for present, what in (
        (config.x0_lambdas, "x0 lambdas (blocks.*.lambdas)"),
        (config.rms_norm, "RMSNorm after the embedding and before the head (LN_0 and LN_out are missing)"),
        (config.softcap, f"softcap {config.softcap:g} of the logits")) if present]


def export(checkpoint, to, out, dtype="fp32", force=False):
    """Write the file `out`. Returns a line about it. Raises ValueError with the way out."""
    out = Path(out)
    if out.suffix != SUFFIX[to]:
        raise ValueError(f"--out {out}: --to {to} writes a {SUFFIX[to]} file.")
    if out.is_dir() or (out.exists() and not force):
        raise ValueError(f"{out} is there already. Name another --out" + ("." if out.is_dir() else ", or add --force."))
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder. Make it, or name another --out.")
    model = load(checkpoint)
    config, lacking = model.config, without_place(model) if to == "rwkv" else []
    if lacking:
        raise ValueError(f"{checkpoint} is not plain x070. Without a place in its layout: {'; '.join(lacking)}. "
                         "Train with ./run_rwkv7.sh --x070, or take --to safetensors.")
    weights = {name: t.to(recurrent.DTYPES[dtype]).contiguous() for name, t in model.trained.items()}
    if to == "rwkv" and isinstance(model, public.X060):
        weights = {leaf_by({own: theirs for theirs, own in X060.items()}, name): t for name, t in weights.items()}
    if to == "rwkv":
        recurrent.write(out, lambda path: torch.save(weights, path))
    else:
        facts = {key: model.header[key] for key in KEPT if key in model.header}
        header = dict(format="pt", checkpoint=json.dumps(dict(facts, schema=3)))
        recurrent.write(out, lambda path: safetensors.torch.save_file(weights, path, metadata=header))
    rows = next(t for name, t in weights.items() if name in ("emb.weight", "wte.weight")).size(0)
    padding = f" of which ids from {config.vocab_size} on are padding" if rows > config.vocab_size else ""
    heads = "; the rwkv package's CUDA kernel takes heads of 64 only" if to == "rwkv" and config.headsz != 64 else ""
    return (f"{out}: {sum(t.numel() for t in weights.values()):,} parameters in {dtype}, {config.layers} layers, width "
            f"{config.width}, heads of {config.headsz}, {rows} rows in the vocabulary{padding}{heads}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="formats.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"formats.py: {message} (all flags: --help)\n")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, a folder, a run, a record's folder or latest")
    parser.add_argument("--to", required=True, choices=tuple(SUFFIX), help="rwkv: its authors' layout, .pth")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--dtype", default="fp32", choices=tuple(recurrent.DTYPES), help="of its tensors [fp32]")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    try:
        print(f"formats.py: {export(**vars(args))}")
    except ValueError as error:
        print(f"formats.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("formats.py: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and no part of a file stays
    sys.exit(main())
