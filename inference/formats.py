"""Export a trained model: RWKV-7 to the layout of the official x070 models, and any model to one safetensors file.

    python inference/formats.py CHECKPOINT --to rwkv --out model.pth         for the rwkv package and its relatives
    python inference/formats.py CHECKPOINT --to safetensors --out FILE       weights and what is known of them, in one

CHECKPOINT: a file, a run's name, its record's folder or the word latest (recurrent.py). The official layout has a
place for plain RWKV-7 alone: train with --x070. What has none is listed, and nothing is written. The rwkv package
(pip install rwkv) reads it so; heads may have any size on a CPU, its CUDA kernel takes 64 channels:

    os.environ["RWKV_V7_ON"] = "1"                       # before the import
    model = rwkv.model.RWKV("model", "cpu fp32")         # the name without .pth
    logits, state = model.forward([ids], None)           # of the last token; full_output=True: of all

Both kinds are read again by recurrent.load, sample.py and this program. A safetensors file is what the training scripts
leave after the last step: the weights and, as JSON under the name checkpoint in its header, script, config, run, step,
tokenizer and its sha256. So such a checkpoint needs no export but to change its dtype, or to drop an unfinished run's
optimisers.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch

import recurrent

SUFFIX = dict(rwkv=".pth", safetensors=".safetensors")  # the rwkv package appends its own
KEPT = ("script", "run", "step", "finished", "config", "tokenizer", "tokenizer_sha256")
NO_PLACE = {  # what the format cannot hold of the scripts that train no RWKV-7
    "train_gpt2.py": ["attention with rotary positions and normed queries and keys", "value residual (att.mix)",
                      "x0 lambdas (lambdas)", "RMSNorm without parameters", "MLP without token shift",
                      "everything of x070's time mixing is missing"],
    "train_rwkv6.py": ["the recurrence of RWKV-6 with its bonus (att.u)", "data-dependent token shift (att.x_x, A, B)",
                       "gate through tanh", "factor on the embedding (emb_scale)", "head tied to the embedding",
                       "channel mixing without token shift", "x070's in-context learning rate is missing"]}


def without_place(model):
    """The parts of a model that x070's layout cannot hold: words for the user, none for plain x070."""
    config, script = model.config, f"{model.script.__name__}.py"
    if script in NO_PLACE:
        softcap = getattr(config, "softcap", 0)
        return NO_PLACE[script] + ([f"softcap {softcap:g} of the logits"] if softcap else [])
    return [what for present, what in (
        (config.x0_lambdas, "x0 lambdas (blocks.*.lambdas)"),
        (config.rms_norm, "RMSNorm after the embedding and before the head (LN_0 and LN_out are missing)"),
        (config.softcap, f"softcap {config.softcap:g} of the logits")) if present]


def write(out, force, writer):
    """recurrent.write() of a file that is new, or may be replaced."""
    if out.is_dir() or (out.exists() and not force):
        raise ValueError(f"{out} is there already. Name another --out" + ("." if out.is_dir() else ", or add --force."))
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder. Make it, or name another --out.")
    recurrent.write(out, writer)


def export(checkpoint, to, out, dtype="fp32", force=False):
    """Write the file `out`. Returns a line about it. Raises ValueError with the way out."""
    out = Path(out)
    if out.suffix != SUFFIX[to]:
        raise ValueError(f"--out {out}: --to {to} writes a {SUFFIX[to]} file.")
    model = recurrent.load(checkpoint)
    config, lacking = model.config, without_place(model) if to == "rwkv" else []
    if lacking:
        raise ValueError(f"{checkpoint} is not plain x070. Without a place in its layout: {'; '.join(lacking)}. "
                         "Train with ./run_rwkv7.sh --x070, or take --to safetensors.")
    weights = {name: t.to(recurrent.DTYPES[dtype]).contiguous() for name, t in model.trained.items()}
    if to == "rwkv":
        write(out, force, lambda path: torch.save(weights, path))
    else:
        facts = {key: model.header.get(key) for key in KEPT}
        header = dict(format="pt", checkpoint=json.dumps(dict(facts, schema=3)))
        write(out, force, lambda path: safetensors.torch.save_file(weights, path, metadata=header))
    rows = next(t for name, t in weights.items() if name in ("emb.weight", "wte.weight")).size(0)
    padding = f" of which ids from {config.vocab_size} on are padding" if rows > config.vocab_size else ""
    heads = "; the rwkv package's CUDA kernel takes heads of 64 only" if to == "rwkv" and config.headsz != 64 else ""
    return (f"{out}: {sum(t.numel() for t in weights.values()):,} parameters in {dtype}, {config.layers} layers, width "
            f"{config.width}, heads of {config.headsz}, {rows} rows in the vocabulary{padding}{heads}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="formats.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"formats.py: {message} (all flags: --help)\n")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, a run, a record's folder or latest")
    parser.add_argument("--to", required=True, choices=tuple(SUFFIX), help="rwkv: official x070 layout, .pth")
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
