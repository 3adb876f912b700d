"""Text from a checkpoint of any of the three models, the proof that its forms agree, and its loss on any text.

    python sample.py latest --start "The " --num_samples 2 --max_new_tokens 200 --seed 1
    python sample.py CHECKPOINT --start FILE:prompt.txt --temperature 0.8 --top_p 0.9
    python sample.py CHECKPOINT --start "..." --max_new_tokens 0 --save_state F      reads once; --load_state F goes on
    python sample.py CHECKPOINT --check             parallel form, chunked prefill and token by token on one text
    python sample.py CHECKPOINT --eval data/pydocs  loss and bits per byte; the run's own val loss unless told otherwise
    python sample.py CHECKPOINT --bench             time a token at every context (inference/bench.py has its flags)
    python sample.py --init_from gpt2 --start "..." a public model, fetched from the Hugging Face hub into its cache

CHECKPOINT: a file, a folder, a run's name, its record's folder or the word latest; ours, RWKV-7, RWKV-6 or GPT-2
(inference/formats.py). --init_from takes these too, or an id of the hub; HF_HUB_OFFLINE=1 looks into the cache alone.
Text goes to stdout as it comes, all else to stderr. It begins with the document mark, as documents do in training, and
ends where the model draws one.
The logits pass, in this order, each step working on what the one before left (in brackets: what turns it off):
    --repetition (1)             logits of tokens in prompt or text: z / r if z > 0, else z r
    --presence (0)               z - a if the token is in the text so far, the prompt not counted
    --frequency (0)              z - a n if it is in it n times
    --temperature (1)            softmax(z / t); 0 takes the best token and skips all that follows
    --top_k (0)                  keeps the k most probable
    --top_p (1)                  keeps the fewest most probable that sum up to p or more
    --top_p_x (1)                of what --top_p would drop, keeps tokens with p > x
    --min_p (0)                  drops p < m p_max
    --top_a (0)                  drops p < a p_max^2; 0.2 is usual
Among equals the lower id comes first; the most probable token always stays. Sample i of --seed s is the same however
many are drawn, since each is drawn alone (--batch 1) from its own random numbers.
"""

import argparse
import codecs
import contextlib
import fnmatch
import itertools
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "inference"), str(ROOT / "data")]
import formats  # noqa: E402
import recurrent  # noqa: E402
import tokenizer as tokenizers  # noqa: E402

PIECES = (1, 15, 16, 17, 2, 33, 7, 64, 3)  # odd places to split a prompt at

# ----------------------------------------------------------------------------------------------------------------------
# Samplers: z (V,) logits, p (V,) probabilities in fp64, both of the ids in use


def repetition(z, seen, r):
    """z / r where z > 0, else z r, for the tokens in `seen` (V,) bool."""
    return torch.where(seen, torch.where(z > 0, z / r, z * r), z)


def presence(z, count, a):
    return torch.where(count > 0, z - a, z)


def frequency(z, count, a):
    return z - a * count.to(z.dtype)


def temperature(z, t):
    """softmax(z / t) for t > 0."""
    return torch.softmax((z - z.max()) / t, -1)


def ranked(p):
    """Ids from the most probable on, the lower id first among equals."""
    return p.sort(descending=True, stable=True).indices


def best(x):
    return int((x == x.max()).nonzero()[0])


def keeping(p, keep):
    """p of the tokens in `keep` (V,) bool and of the best one, scaled to the sum 1."""
    keep[best(p)] = True
    p = torch.where(keep, p, 0)
    return p / p.sum()


def top_k(p, k):
    return keeping(p, torch.zeros_like(p, dtype=torch.bool).index_fill_(0, ranked(p)[:k], True))


def top_p(p, share, x=1.0):
    """The fewest most probable tokens with a sum of at least `share`, and every other one with p > x."""
    order = ranked(p)
    before = F.pad(p[order].cumsum(0)[:-1], (1, 0))  # what the more probable ones sum up to
    return keeping(p, torch.zeros_like(p, dtype=torch.bool).index_copy_(0, order, before < share) | (p > x))


def min_p(p, m):
    return keeping(p, p >= m * p.max())


def top_a(p, a):
    return keeping(p, p >= a * p.max() ** 2)


def draw(p, u):
    """The token in whose part of [0, 1) u lies; one with p = 0 has no part."""
    below = p.cumsum(0)
    return min(int(torch.searchsorted(below, u * below[-1], right=True)), int(p.nonzero()[-1]))


def choose(z, seen, count, how, u):
    """The next token from logits z (V,), by the samplers in the order of the file's head. how: the flags."""
    z = z.double()
    z = repetition(z, seen, how.repetition) if how.repetition != 1 else z
    z = presence(z, count, how.presence) if how.presence else z
    z = frequency(z, count, how.frequency) if how.frequency else z
    if not z.max().isfinite():
        raise ValueError("the logits are not finite: --repetition, --presence or --frequency are out of all measure, "
                         "or the model's weights are broken. Take usual values, or an earlier step of the run.")
    if how.temperature == 0:
        return best(z)
    p = temperature(z, how.temperature)
    p = top_k(p, how.top_k) if how.top_k else p
    p = top_p(p, how.top_p, how.top_p_x) if how.top_p < 1 else p
    p = min_p(p, how.min_p) if how.min_p else p
    p = top_a(p, how.top_a) if how.top_a else p
    return draw(p, u)


# ----------------------------------------------------------------------------------------------------------------------
# Generate


def open_tokenizer(model, args):
    """The model's tokenizer, or that of --tokenizer if it can be the model's; saved states then name it."""
    tokenizer = tokenizers.for_model(model.header, model.vocab_size,
                                     args.tokenizer or model.header.get("tokenizer_file"))
    model.header = dict(model.header, tokenizer=tokenizer.name, tokenizer_sha256=tokenizer.sha256)
    return tokenizer


def read_text(path):
    try:
        return Path(path).read_bytes().decode()  # read_text() would change \r\n
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}. Give a file of text.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it, such as with iconv.") from None


def encode(tokenizer, text, *before):
    """Tokens int64 of the text after those given."""
    try:
        return np.concatenate((np.array(before, np.int64), tokenizer.encode(text)))
    except UnicodeEncodeError:
        raise ValueError("--start is not valid Unicode. Give it as UTF-8, or with FILE:prompt.txt.") from None


def generate(model, state, token, seen, count, how, rngs, mark):
    """Yields the next tokens of n samples, [id]; None for one that has ended with the mark. how: the flags.

    state: of batch n, which has not read `token` yet. seen, count (n, V): as for choose(), kept up to date.
    """
    tokens, ended = [token] * len(rngs), [False] * len(rngs)
    for _ in range(how.max_new_tokens):
        z = model(torch.tensor(tokens)[:, None], state)[:, -1, :seen.size(1)].cpu()  # no id of the padding
        for i in (i for i in range(len(tokens)) if not ended[i]):
            tokens[i] = choose(z[i], seen[i], count[i], how, rngs[i].random())
            if tokens[i] != mark:  # which is no text
                seen[i, tokens[i]] = True
                count[i, tokens[i]] += 1
        yield [None if end else token for token, end in zip(tokens, ended)]
        ended = [not how.go_on and token == mark for token in tokens]
        if all(ended):
            return


class Text:
    """Writes tokens as text; the beginning of a character waits for its end."""

    def __init__(self, tokenizer, write, waiting=b""):
        self.tokenizer, self.write, self.gap = tokenizer, write, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.decoder.setstate((waiting, 0))

    def add(self, token):
        if token == self.tokenizer.document_mark:
            self.end()
            self.gap = "\n---\n"  # if more comes
        else:
            self.put(self.decoder.decode(self.tokenizer.decode([token])))

    def end(self):
        self.put(self.decoder.decode(b"", True))

    def put(self, text):
        if text:
            self.write(self.gap + text)
            self.gap = ""


def write(text):
    """To stdout at once. A terminal gets no control characters, of which broken models know many."""
    if sys.stdout.isatty():
        text = re.sub(r"[^\n\t -~\xa0-\U0010ffff]", "\ufffd", text.replace("\r\n", "\n"))
    print(text, end="", flush=True)


def begin(model, tokenizer, args):
    """--start after the document mark or a saved text: prompt, the state, tokens that it has not read yet, seen and
    count as for choose(), bytes waiting for the rest of a character."""
    V, mark = min(tokenizer.vocab_size, model.vocab_size), tokenizer.document_mark
    prompt = read_text(args.start[5:]) if args.start.startswith("FILE:") else args.start
    state, seen, count, waiting = model.new_state(), torch.zeros(1, V, dtype=torch.bool), torch.zeros(1, V), b""
    if args.load_state:
        state, facts = model.load_state(args.load_state)
        alone = all(t.size(1) == 1 for t in state.tensors.values())
        if not alone or not {"pending", "seen", "count", "waiting"} <= facts.keys():
            raise ValueError(f"{args.load_state} was not saved by sample.py: it lacks the last token.")
        tokens = encode(tokenizer, prompt, facts["pending"])
        seen[0, facts["seen"]] = True
        for token, n in facts["count"].items():
            count[0, int(token)] = n
        waiting = b"" if prompt else bytes(facts["waiting"])
    else:
        tokens = encode(tokenizer, prompt, *[mark] * (args.mark and mark >= 0))
        if not len(tokens):
            raise ValueError("no document mark and an empty --start leave nothing to begin with: give one of the two.")
    seen[0, tokens] = True
    seen[0, [mark] * (mark >= 0)] = False
    return prompt, state, tokens, seen, count, waiting


def sample(model, args):
    """Write the prompt and what follows, for every sample; with --save_state keep the state after the text."""
    tokenizer, drawn = open_tokenizer(model, args), 0
    prompt, state, tokens, seen, count, waiting = begin(model, tokenizer, args)
    start, last = time.perf_counter(), int(tokens[-1])
    room = model.positions - state.position - len(tokens) + 1
    if args.max_new_tokens > room:
        raise ValueError(f"the model has {model.positions} positions, the text so far {state.position + len(tokens)} "
                         f"tokens: take a shorter --start, or --max_new_tokens {max(0, room)} at most.")
    if len(tokens) > 1:
        model.prefill(torch.from_numpy(tokens[None, :-1]), state)
    read = time.perf_counter()
    for first in range(0, args.num_samples, args.batch):
        n = min(args.batch, args.num_samples - first)
        branch, seen_n, count_n = state.branch(n), seen.repeat(n, 1), count.repeat(n, 1)
        rngs, held = [random.Random(f"{args.seed} {i}") for i in range(first, first + n)], [[] for _ in range(n)]
        texts = [Text(tokenizer, held[i].append if i else write, waiting) for i in range(n)]  # the first streams
        head = lambda i: write((f"--- sample {i + 1} of {args.num_samples}\n" if args.num_samples > 1 else "") + prompt)
        head(first)
        for step in generate(model, branch, int(tokens[-1]), seen_n, count_n, args, rngs, tokenizer.document_mark):
            for text, token in zip(texts, step):
                if token is not None:
                    text.add(token)
                    drawn, last = drawn + 1, token
        for i, text in enumerate(texts):
            if i:
                head(first + i)
            if not args.save_state:
                text.end()
            write("".join(held[i]) + "\n")
    if args.save_state:
        ids = lambda t: t[0].nonzero().flatten().tolist()
        branch.save(args.save_state, model, pending=last, waiting=list(text.decoder.getstate()[0]), seen=ids(seen_n),
                    count={i: int(count_n[0, i]) for i in ids(count_n)})
    print(f"[{model.label}: {len(tokens)} tokens read in {read - start:.2f} s, {drawn} "
          f"drawn in {time.perf_counter() - read:.2f} s; state {branch.bytes() / n / 1024:,.0f} KB]", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Check
# Every form is held against the training script's module in fp32, states against that of one piece in fp32. In bf16 a
# form rounds in other places than training's own, but no more: the limit is twice the distance of training's own bf16
# form (KL, which grows with the square: four times; state, which that form lacks: of one piece) plus a floor for luck.

FP32 = dict(logits=1e-4, kl=1e-6, top1=0.01, state=1e-4)  # top1: near ties
BF16 = dict(logits=(2, 1e-4), kl=(4, 1e-6), top1=(2, 0.02), state=(2, 1e-4))  # times the measure, plus the floor


def forms(model, tokens):
    """Yields the model's forms on tokens (1, T): name, logits (T, V), state after the last (the parallel one: none)."""
    with torch.no_grad():
        yield "parallel", model.parallel().logits(tokens.to(model.device))[0].cpu(), None
    cycle, odd = itertools.cycle(PIECES), []
    while sum(odd) < tokens.size(1):
        odd.append(min(next(cycle), tokens.size(1) - sum(odd)))
    for name, sizes in (("one piece", [tokens.size(1)]), ("odd pieces", odd), ("one by one", 1)):
        state = model.new_state()
        z = torch.cat([model(part, state)[0].cpu() for part in tokens.split(sizes, dim=1)])
        yield name, z, {key: (t[:, :, :, :state.position] if key in ("k", "v") else t).cpu().float()
                        for key, t in state.tensors.items()}


def distance(z, state, z_true, state_true):
    """Largest difference of the logits, the same relative to the largest logit, KL in nats a token, share of tokens
    with another best guess, largest difference of the state relative to the largest value of its tensor."""
    p, q = (F.log_softmax(x.double(), -1) for x in (z_true, z))
    relative = lambda a, b: ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
    return dict(absolute=(z - z_true).abs().max().item(), logits=relative(z, z_true),
                kl=(p.exp() * (p - q)).sum(-1).mean().item(),
                top1=(z.argmax(-1) != z_true.argmax(-1)).double().mean().item(),
                state=max(relative(state[key], state_true[key]) for key in state) if state else None)


def check(args):
    """Print the table of all forms in fp32 and bf16. Returns whether every figure is within its limit."""
    def row(dtype, form, d, end):
        cell = lambda key: f"{'-' if d.get(key) is None else format(d[key], '.1e'):>10}"
        print(f"{dtype:5} {form:11}{cell('absolute')}{cell('logits')}{cell('kl')}{1 - d['top1']:>9.2%}{cell('state')}"
              f"  {end}", flush=True)

    true, good, path = [], True, formats.find(args.checkpoint)  # once: latest may become another
    for dtype in ("fp32", "bf16"):
        model, limits = formats.load(path, dtype, args.device), dict(FP32) if dtype == "fp32" else {}
        if not true:
            tokens, source = check_tokens(model, args)
            print(f"{model.label}: {tokens.size(1)} tokens of {source}\n{'dtype':5} "
                  f"{'form':11}{'logits':>10}{'relative':>10}{'KL':>10}{'top-1':>9}{'state':>10}")
        for form, z, state in forms(model, tokens):
            true = true or [z, None]
            true[1] = true[1] or state
            d = distance(z, state, *true)
            own = [key for key in BF16 if key not in limits and d[key] is not None]
            limits.update({key: BF16[key][0] * d[key] + BF16[key][1] for key in own})
            broken = [key for key in limits if d[key] is not None and not d[key] <= limits[key]]  # a nan breaks it too
            end = "ok" if not own else "-" if "logits" in own else f"ok, sets the limit of {', '.join(own)}"
            row(dtype, form, d, f"BROKEN: {', '.join(broken)}" if broken else end)
            good = good and not broken
        row(dtype, "limit", limits, "")
    print("all forms agree" if good else "the forms do NOT agree")
    return good


def check_tokens(model, args):
    """(tokens (1, T), what they are): --text, or the held-out text of the run's data, or this file's head."""
    if args.text:
        source, tokenizer = args.text, None if is_shards(args.text) else open_tokenizer(model, args)
        tokens = read_tokens(model, source, args.tokens, tokenizer)
    else:
        source = f"{model.config.data}/val"
        try:
            tokens = read_tokens(model, source if Path(model.config.data).exists() else ROOT / source, args.tokens)
        except ValueError:  # the data is not here, or another by now
            source = "sample.py's own head, its bytes as ids (the run's data is not here)"
            tokens = np.frombuffer(__doc__.encode(), np.uint8).astype(np.int64) % model.vocab_size
    if len(tokens) < 2:
        raise ValueError(f"{source} is empty: nothing to compare. Give a file of text.")
    return torch.from_numpy(tokens[None, :min(args.tokens, model.positions)]), source


# ----------------------------------------------------------------------------------------------------------------------
# Eval

COLUMNS = ["model", "parameters", "data", "loss", "bits/byte", "tokens", "context"]  # of a row
BEGIN = "<!-- eval: python sample.py CHECKPOINT --eval DATA --table inference/README.md -->"
END = "<!-- end of eval -->"


def is_shards(path):
    return not Path(path).is_file() or str(path).endswith(".bin")


def read_tokens(model, path, limit, tokenizer=None):
    """The first `limit` tokens of a folder's val shards (FOLDER/train: its train shards), of a shard, or of a text, the
    document mark before it. ValueError when shards are not of the model's tokenizer."""
    path, script = Path(path), model.script
    if not is_shards(path):
        text, mark = read_text(path), tokenizer.document_mark
        tokens = encode(tokenizer, text, *[mark] * (mark >= 0))
        count, length = tokenizer.lengths()[tokens].sum(), len(text.encode())
        if count != length:
            print(f"sample.py: the tokens of {path} stand for {count:,} bytes, the text has {length:,}: this tokenizer "
                  "adds, changes or drops some; bits per byte are of its own count", file=sys.stderr)
        return tokens[:limit]
    folder, split = (path.parent, path.name) if path.name in ("val", "train") and not path.exists() else (path, "val")
    if folder.is_dir():
        stream = script.TokenStream(folder, split, limit)
        tokens = stream.read(0, min(limit, len(stream)))
    elif folder.exists():
        tokens = np.array(script.open_shard(folder)[:limit], np.int64)
    else:
        raise ValueError(f"no such data: {folder}. Give a folder of shards, a shard or a file of text.")
    manifest = (folder if folder.is_dir() else folder.parent) / "manifest.json"
    try:
        header = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
        theirs, ours = header.get("tokenizer_sha256"), model.header.get("tokenizer_sha256")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{manifest} is damaged ({error}). Make the data again, or delete this file.") from None
    if theirs and ours and theirs != ours or tokens.max() >= model.vocab_size:
        raise ValueError(f"{folder} holds tokens of {header.get('tokenizer') or 'another tokenizer'}, up to id "
                         f"{tokens.max()}; the model reads {model.header.get('tokenizer') or 'others'}, "
                         f"{model.vocab_size} ids. Give data of the model's tokenizer.")
    return tokens


def losses(model, tokens, context, mark):
    """Nats of each token but the first, given those before it in its sequence of `context` tokens, or, context 0, in
    its document; a sequence or document starts from the empty state."""
    tokens, out = torch.from_numpy(tokens), []
    if context:
        size = max(1, min(2 ** 12, 2 ** 24 // model.vocab_size) // min(context, 512))  # more only take memory
        batches = zip(*(t.view(-1, context).split(size) for t in (tokens[:-1], tokens[1:])))
    else:
        starts = sorted({0, *(tokens[:-1] == mark).nonzero().flatten().tolist()})
        sizes = np.diff([*starts, len(tokens) - 1]).tolist()
        batches = zip(tokens[None, :-1].split(sizes, 1), tokens[None, 1:].split(sizes, 1))
    for batch in batches:
        state, nats = model.new_state(len(batch[0])), []
        for x, y in zip(*(t.split(512, 1) for t in batch)):
            z = model(x, state)  # (B, T, V)
            nats.append(F.cross_entropy(z.mT, y.to(z.device), reduction="none").double().cpu())
        out.append(torch.cat(nats, 1).flatten())
    return torch.cat(out).numpy()


def ratio(sums, sizes):
    """sum(sums) / sum(sizes) and its standard error over documents drawn at random: with the residuals e = sum - ratio
    size of D documents, sqrt(D / (D - 1) sum(e^2)) / sum(sizes). nan for one document."""
    mean, D = sums.sum() / sizes.sum(), len(sums)
    residuals = sums - mean * sizes
    return mean, math.sqrt(D / (D - 1) * (residuals ** 2).sum()) / sizes.sum() if D > 1 else math.nan


def evaluate(model, args):
    """Print loss and bits per byte of the data of --eval, with standard errors, and as a row of a Markdown table; the
    last line is one JSON."""
    try:
        tokenizer = open_tokenizer(model, args)
    except tokenizers.Failure as failure:
        if args.tokenizer or not is_shards(args.eval):
            raise
        tokenizer, unknown = None, failure  # shards can be read without; only their bytes are not known
    mark = tokenizer.document_mark if tokenizer else model.vocab_size - 1
    limit = args.eval_tokens or model.config.val_tokens
    tokens = read_tokens(model, args.eval, limit + 1, tokenizer)
    n = min(limit, len(tokens) - 1)
    context = min(model.config.seq_len, n) if args.context is None else args.context
    n -= n % context if context else 0
    if n < 1:
        raise ValueError(f"{args.eval}: its {len(tokens) - 1} tokens to predict make no sequence of {context}. "
                         "Give more text or a smaller --context.")
    start, tokens = time.perf_counter(), tokens[:n + 1]
    longest = context or max(np.diff([0, *(tokens[:-1] == mark).nonzero()[0].tolist(), n]))
    if longest > model.positions:
        raise ValueError(f"the model has {model.positions} positions, a sequence here {longest:,} tokens: take "
                         f"--context {model.positions} or less.")
    nats, ones = losses(model, tokens, context, mark), np.ones(n)
    document = np.cumsum(tokens[:-1] == mark)  # a token belongs to the document of the one before it
    per_document = lambda x: np.bincount(document, x)[np.unique(document)]
    loss, error = ratio(per_document(nats), per_document(ones))
    result = dict(loss=loss, standard_error=error, tokens=n, documents=len(np.unique(document)), context=context,
                  data=args.eval, dtype=args.dtype, step=model.step)
    around = lambda x, error: f"{x:.4f}" + (f" ± {error:.4f}" if error == error else " (± needs a second document)")
    print(f"loss           {around(loss, error)} nats per token")
    if tokenizer:
        count = tokenizer.lengths()[tokens[1:]]
        bits, error = ratio(per_document(nats / math.log(2)), per_document(count))
        result.update(bits_per_byte=bits, bits_standard_error=error, bytes=int(count.sum()))
    print("bits per byte  " + (f"{around(bits, error)}, {count.sum():,} bytes; a document mark is none" if tokenizer
                               else f"not known: {unknown}"))
    print(f"tokens         {n:,} of {args.eval}, in {result['documents']} documents\ncontext        "
          + (f"{context} tokens, each sequence from the empty state" if context else "whole documents") +
          f"\ntime           {time.perf_counter() - start:.1f} s in {args.dtype} on {args.device}\n"
          "±              standard error of a ratio of sums over documents drawn at random")
    row = [model.label, f"{model.parameters:,}", args.eval, f"{loss:.4f}", f"{bits:.4f}" if tokenizer else "",
           f"{n:,}", str(context or "documents")]
    print(line_of(row))
    print(json.dumps({key: None if value != value else value for key, value in result.items()}))
    if args.table:
        into_table(args.table, row)


def line_of(row):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def read_table(path):
    """(what stands before, the rows, what stands after) of a Markdown file with the table. Raises ValueError."""
    page = read_text(path)
    if not (page.count(BEGIN) == page.count(END) == 1 and page.index(BEGIN) < page.index(END)):
        raise ValueError(f"{path} needs the lines {BEGIN} and {END} once each, in this order.")
    head, rest = page.split(BEGIN)
    old, tail = rest.split(END)
    lines = old.strip().splitlines()
    rows = [re.split(r" *(?<!\\)\| *", line.strip()[1:-1].strip()) for line in lines[2:]]
    if lines and lines[0] != line_of(COLUMNS) or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError(f"{path} has something else than the table of --eval between {BEGIN} and {END}. Take it out.")
    return head, [[cell.replace("\\|", "|") for cell in row] for row in rows], tail


def into_table(path, row):
    """Put the row of --eval into the table of a Markdown file, in place of that of the same model and data."""
    head, rows, tail = read_table(path)
    kept = [line_of(other) for other in rows if (other[0], other[2]) != (row[0], row[2])]
    table = "\n".join([line_of(COLUMNS), "|---" * len(COLUMNS) + "|", *kept, line_of(row)])
    recurrent.write(path, lambda part: part.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# Main


def fetch(name):
    """What --init_from names: a path or run as find() takes it, or else OWNER/NAME, OWNER/NAME/FILE or a NAME of the
    hub, fetched into huggingface_hub's cache. Returns a path. Raises ValueError with the way out."""
    plain = re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) and not {".", ".."}.intersection(name.split("/"))
    if Path(name).exists() or not plain or name == "latest":
        return name
    try:
        return formats.find(name)
    except ValueError:
        pass
    try:
        import huggingface_hub.constants
    except ImportError:
        raise ValueError("huggingface_hub is not installed: pip install -r requirements.txt.") from None
    repository, rest = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        if rest:
            return huggingface_hub.hf_hub_download(repository, rest)
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        files = [] if offline else huggingface_hub.HfApi().model_info(repository, timeout=20).siblings
        names = [file.rfilename for file in files]
        top = [other for other in names if "/" not in other]
        weights = fnmatch.filter(top, "model*.safetensors") or fnmatch.filter(top, "pytorch_model*.bin")
        if weights or offline:
            wanted = fnmatch.filter(top, "*.json") + fnmatch.filter(top, "*.txt") + weights
            folder = huggingface_hub.snapshot_download(repository, allow_patterns=wanted or None)
            if not formats.weight_files(Path(folder)):
                raise OSError("the cache has no weights of it, and HF_HUB_OFFLINE is set")
            return folder
    except Exception as error:  # whatever the HTTP client of the day raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"cannot fetch {name} ({reason}). Is it a file, a run or OWNER/NAME of the hub? Without "
                         "network: bring its folder and name that; HF_ENDPOINT names a mirror.") from None
    others = [other for other in names if other.endswith(".pth")]
    raise ValueError(f"{name} has no weights in .safetensors or pytorch_model.bin. Name one of its files, such as "
                     f"{repository}/FILE: {formats.few(others) or 'it has no .pth either'}.")


def number(kind, fits, words, off=None):
    """A type for argparse: a number that fits, described in words; off: the value that turns the step off."""
    def read(text):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(value := kind(text)) and fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text} is no {words}" + ("" if off is None else f" ({off}: off)"))
    return read


def parse(argv):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"sample.py: {message} (all flags: --help)\n")
    add, share = parser.add_argument, lambda off: number(float, lambda x: 0 <= x <= 1, "number from 0 to 1", off)
    whole = lambda low, off=None: number(int, lambda n: n >= low, f"whole number of at least {low}", off)
    at_least_0 = lambda off: number(float, lambda x: x >= 0, "number of at least 0", off)
    above_0, any_number = number(float, lambda x: x > 0, "number above 0", 1), number(float, lambda x: 1, "number", 0)
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="a file, a folder, a run, a record's folder or latest")
    add("--init_from", metavar="ID", help="in place of CHECKPOINT: gpt2, OWNER/NAME or OWNER/NAME/FILE of the hub")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="hold the model's forms against each other")
    what.add_argument("--eval", metavar="DATA", help="loss on a folder's val shards (FOLDER/train: train), a shard "
                                                     "or a .txt file")
    add("--start", default="", metavar="TEXT", help="the prompt, or FILE:its file; empty: the document mark alone")
    add("--num_samples", type=whole(1), default=1, metavar="N", help="texts from one prompt, which is read once [1]")
    add("--max_new_tokens", type=whole(0), default=200, metavar="N", help="tokens a sample at most [200]")
    add("--seed", type=whole(0), default=1, metavar="N", help="seed of the random numbers [1]")
    add("--batch", type=whole(1), default=1, metavar="N", help="samples at once; rounding then depends on N [1]")
    add("--temperature", type=at_least_0(1), default=1.0, metavar="T", help="softmax(z / T); 0: the best token [1]")
    add("--top_k", type=whole(0, 0), default=0, metavar="K", help="keep the K most probable tokens [0: all]")
    add("--top_p", type=share(1), default=1.0, metavar="P", help="keep the fewest tokens that sum up to P [1: all]")
    add("--top_p_x", type=share(1), default=1.0, metavar="X", help="keep tokens above X even so [1: none]")
    add("--min_p", type=share(0), default=0.0, metavar="M", help="drop tokens below M times the best's probability [0]")
    add("--top_a", type=at_least_0(0), default=0.0, metavar="A", help="drop tokens below A times its square [0]")
    add("--repetition", type=above_0, default=1.0, metavar="R", help="divide logits of tokens that occurred by R [1]")
    add("--presence", type=any_number, default=0.0, metavar="A", help="take A off logits of tokens in the text [0]")
    add("--frequency", type=any_number, default=0.0, metavar="A", help="... and A more each time [0]")
    add("--go_on", action="store_true", help="do not stop at the document mark; --- stands for it in the text")
    add("--mark", action=argparse.BooleanOptionalAction, default=True, help="begin with the document mark [yes]")
    add("--save_state", metavar="F", help="write the state after the text, to go on from with --load_state")
    add("--load_state", metavar="F", help="go on from there; --start is then what comes next, without a mark")
    add("--tokenizer", metavar="NAME", help="bytes, gpt2, rwkv_world or a file: tiktoken's form, RWKV's or a "
                                            "tokenizer.json [the model's]")
    add("--text", metavar="FILE", help="--check: on this text or shard, not the run's held-out data")
    add("--tokens", type=whole(2), default=256, metavar="N", help="--check: so many tokens [256]")
    add("--eval_tokens", type=whole(1), metavar="N", help="--eval: the first there are [the run's --val_tokens]")
    add("--context", type=whole(0), metavar="N", help="--eval: tokens a sequence; 0: documents [the run's --seq_len]")
    add("--dtype", choices=(*recurrent.DTYPES, "int8"), default="fp32",
        help="int8: the weights. --check: both others [fp32]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where to compute: a GPU if there is one [auto]")
    add("--table", type=Path, metavar="FILE", help="--eval: also put the row into the table between its markers there")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.init_from is None):
        parser.error("give a CHECKPOINT or --init_from ID")
    if args.table and not args.eval:
        parser.error("--table takes the row of --eval: give both")
    if args.save_state and args.num_samples > 1:
        parser.error("--save_state keeps one state: take --num_samples 1 (with --max_new_tokens 0 it is the prompt's)")
    if args.top_p_x < 1 and args.top_p == 1:
        parser.error("--top_p_x softens --top_p, which is off: give both")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device. Take --device cpu")
    if args.save_state and not Path(args.save_state).absolute().parent.is_dir():
        parser.error(f"--save_state {args.save_state}: there is no such folder")
    if args.save_state and Path(args.save_state).is_dir():
        parser.error(f"--save_state {args.save_state} is a folder. Name a file")
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    return args


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--bench" in argv:
            import bench
            words = [str(word) for word in argv if word != "--bench"]
            argv = [part for word in words for part in re.split("(?<=^--init_from)=", word)]
            if "--init_from" in argv[:-1]:
                i = argv.index("--init_from")
                argv[i:i + 2] = [fetch(argv[i + 1])]
            return bench.main(argv)
        args = parse(argv)
        args.checkpoint = args.checkpoint or fetch(args.init_from)
        if args.table:
            read_table(args.table)  # before the work
        if args.check:
            return 0 if check(args) else 1
        model = formats.load(args.checkpoint, args.dtype, args.device)
        evaluate(model, args) if args.eval else sample(model, args)
    except (ValueError, tokenizers.Failure) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"sample.py: {error}. Make room, set permissions or name another file.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsample.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
