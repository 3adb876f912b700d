"""Makes the token shards of FineWeb from the raw dataset, as those that cached_fineweb10B.py fetches ready-made.

    pip install -r data/requirements.txt
    python data/fineweb.py --version 10B              sample-10BT of HuggingFaceFW/fineweb into data/fineweb10B/
    python data/fineweb.py --version 100B             sample-100BT into data/fineweb100B/
    python data/fineweb.py --version 10B --input DIR --vocab r50k_base.tiktoken      no network: parquet files at hand

Every document is <|endoftext|> and its text in GPT-2's tokens, in the order of the dataset, cut into shards of
--shard_size tokens wherever that falls; the first shard is for validation. The shards are the same for any number of
workers. Broken off, the same command goes on after the last whole shard. The package datasets keeps the raw text in
its own cache (HF_HOME), where it takes more room than the shards.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time

try:
    import numpy as np
    from tqdm import tqdm

    import tokenizer
    from cached_fineweb10B import Manifest, alone, explain, file_name, scan, unchanged
    from shards import (MANIFEST, SHARD_TOKENS, Damaged, Failure, OneLineParser, entry_of, header, write_token_bytes)
except ImportError as error:
    sys.exit(f"fineweb.py: {error.name} is missing in {sys.executable}. Call .venv/bin/python instead, or: pip install "
             "-r requirements.txt -r data/requirements.txt")

REPO = "HuggingFaceFW/fineweb"
BATCH = 256  # documents a worker takes at once: about 0.8 MB of text
AHEAD = 4    # batches a worker may be behind: bounds the memory


# --------------------------------------------------------------------------------------------------------------------
# Documents

def open_dataset(args):
    """-> (the dataset: len() documents, [i:j]["text"] is a list of texts; what it is, for the manifest)"""
    paths = [p for path in map(pathlib.Path, args.input or ())
             for p in (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])]
    if args.input and not paths:
        raise Failure(f"no .parquet files in {', '.join(args.input)}")
    for path in paths:
        if not path.is_file():
            raise Failure(f"{path} does not exist")
    datasets = tokenizer.need("datasets")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said once, below
    try:
        if not paths:
            name = f"sample-{args.version}T"
            return datasets.load_dataset(REPO, name=name, split="train", num_proc=args.workers), f"{REPO} {name}"
        source = " ".join(f"{p.name}:{p.stat().st_size}" for p in paths)
        source = source if len(source) < 200 else f"{len(paths)} files, {hashlib.sha256(source.encode()).hexdigest()}"
        return datasets.load_dataset("parquet", data_files=list(map(str, paths)), split="train"), source
    except Exception as error:  # of datasets, pyarrow, the hub's client or the disk
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        where = f"cannot read {' '.join(args.input)}" if args.input else f"cannot fetch {REPO}"
        way = "Is it parquet, and whole?" if args.input else \
            "Set HF_ENDPOINT or HTTPS_PROXY, or read parquet files at hand with --input; the same command goes on."
        raise Failure(f"{where} ({type(error).__name__}: {reason}). {way}") from None


def begin(vocab):
    """In a new worker: it ends with its parent, even a killed one."""
    global ENCODER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    ENCODER = tokenizer.load("gpt2", vocab)


def encode(texts):
    """-> (tokens of the documents, uint16, one after the other; lengths of the documents)"""
    mark = np.array([ENCODER.document_mark], "<u2")
    parts = [part for text in texts for part in (mark, ENCODER.encode(text))]
    lengths = np.array([len(part) for part in parts], np.int64).reshape(-1, 2).sum(1)
    return np.concatenate(parts), lengths


def encoded(dataset, start, pool, workers):
    """Yields (index of the first document, tokens, lengths) from document `start` on, in order."""
    waiting, firsts = collections.deque(), iter(range(start, len(dataset), BATCH))
    while True:
        while len(waiting) < workers * AHEAD and (first := next(firsts, None)) is not None:
            texts = dataset[first:first + BATCH]["text"]
            if None in texts:
                raise Failure(f"document {first + texts.index(None)} has no text")
            waiting.append((first, pool.submit(encode, texts)))
        if not waiting:
            return
        first, future = waiting.popleft()
        yield first, *future.result()


# --------------------------------------------------------------------------------------------------------------------
# Shards

def place(folder, manifest, name, tokens, following):
    """Writes a shard, whole or not at all; following: [document, token of it] where the next one begins.

    The manifest knows it first: killed in between, a file is missing, which is seen, and none is unknown.
    """
    head = header(len(tokens))
    part, digest = os.path.join(folder, f".{name}.part"), hashlib.sha256(head)
    digest.update(tokens)
    try:
        with open(part, "wb") as f:
            f.write(head)
            f.write(tokens)
            f.flush()
            os.fsync(f.fileno())
        changed = os.stat(part).st_mtime_ns
        manifest.add(entry_of(name, len(tokens), digest.hexdigest(), mtime_ns=changed, next=following))
        os.replace(part, os.path.join(folder, name))
    finally:
        if os.path.exists(part):
            os.remove(part)


def finished(folder, manifest):
    """-> (number of shards that are whole, [document, token] where the one after them begins)"""
    number, following = 0, [0, 0]
    while shard := manifest.shards.get(file_name(number)):
        path = os.path.join(folder, shard["name"])
        try:
            if not unchanged(path, shard):
                if scan(path)["sha256"] != shard["sha256"]:
                    break
                manifest.add(dict(shard, mtime_ns=os.stat(path).st_mtime_ns))
        except (OSError, Damaged):
            break
        number, following = number + 1, shard["next"]
    return number, following


def make(args, dataset, manifest, say):
    """Makes the shards that are not there yet. -> how many"""
    number, (document, skip) = finished(args.out, manifest)
    strangers = [name for name in sorted(os.listdir(args.out))
                 if name.startswith("fineweb_") and name.endswith(".bin") and name not in manifest.shards]
    if strangers:
        raise Failure(f"{args.out} holds {strangers[0]}, which stands in no {MANIFEST}. Name another folder with --out "
                      "DIR, or delete it.")
    if document == len(dataset) and number > 1:
        return 0
    if number:
        say(f"{number} shards are whole: going on in document {document:,} of {len(dataset):,}")
    shard, fill, made = np.empty(args.shard_size, "<u2"), 0, number
    context = multiprocessing.get_context("spawn")  # forked while threads of pyarrow run, a worker may wait forever
    pool = concurrent.futures.ProcessPoolExecutor(args.workers, context, begin, (args.vocab,))
    bar = tqdm(total=len(dataset), initial=document, unit="doc", unit_scale=True, dynamic_ncols=True,
               mininterval=0.2 if sys.stderr.isatty() else 10)
    try:
        for first, tokens, lengths in encoded(dataset, document, pool, args.workers):
            ends, done = np.cumsum(lengths), skip
            skip = 0
            while done < len(tokens):
                part = tokens[done:done + args.shard_size - fill]
                shard[fill:fill + len(part)] = part
                fill, done = fill + len(part), done + len(part)
                if fill == args.shard_size:
                    at = int(np.searchsorted(ends, done, "right"))
                    following = [first + at, int(done - (ends[at - 1] if at else 0))]
                    place(args.out, manifest, file_name(made), shard, following)
                    made, fill = made + 1, 0
                    bar.set_postfix_str(f"{made} shards")
            bar.update(len(lengths))
        if made + bool(fill) < 2:
            raise Failure(f"{made * args.shard_size + fill:,} tokens fill no more than the val shard: choose a "
                          "--shard_size of less than half of them.")
        if fill:
            place(args.out, manifest, file_name(made), shard[:fill], [len(dataset), 0])
            made += 1
    except concurrent.futures.process.BrokenProcessPool:
        raise Failure("a worker was killed; if for want of memory, take fewer --workers. The same command goes on "
                      "after the last whole shard.") from None
    finally:
        bar.close()
        pool.shutdown(wait=sys.exc_info()[0] is None, cancel_futures=True)
    return made - number


# --------------------------------------------------------------------------------------------------------------------
# Main

def parse(argv):
    def whole(low, high):
        def number(text):
            if not text.isdigit() or not low <= int(text) <= high:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
            return int(text)
        return number

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = OneLineParser("fineweb.py", __doc__)
    parser.add_argument("--version", choices=("10B", "100B"), required=True, help="which sample of FineWeb")
    parser.add_argument("--shard_size", type=whole(1, 2**31 - 1), default=SHARD_TOKENS, help="tokens a shard [10^8]")
    parser.add_argument("--input", nargs="+", metavar="PATH", help="parquet files or folders of them in place of the "
                                                                   "hub's; a column `text` is all they need")
    parser.add_argument("--vocab", metavar="FILE", help="GPT-2's ranks in tiktoken's form (r50k_base.tiktoken), for a "
                                                        "machine without network")
    parser.add_argument("--workers", type=whole(1, 4096), default=cores, help=f"processes [every core, here {cores}]")
    parser.add_argument("--out", metavar="DIR", help="folder for the shards [data/fineweb10B or 100B]")
    args = parser.parse_args(argv)
    args.out = args.out or os.path.join(os.path.dirname(os.path.abspath(__file__)), f"fineweb{args.version}")
    return args


def run(args):
    start = time.perf_counter()
    bpe = tokenizer.load("gpt2", args.vocab)
    dataset, source = open_dataset(args)
    if "text" not in dataset.column_names:
        raise Failure(f"{source} has no column `text`; it has {', '.join(dataset.column_names)}")
    facts = dict(dataset=f"fineweb{args.version}", source=source, tokenizer=bpe.name, tokenizer_sha256=bpe.sha256,
                 vocab_size=bpe.vocab_size, document_mark=bpe.document_mark, shard_size=args.shard_size,
                 documents=len(dataset))
    os.makedirs(args.out, exist_ok=True)
    with alone(args.out):
        manifest = Manifest(args.out, facts)
        if manifest.damaged:
            raise Failure(f"{manifest.path} is damaged. Delete the folder and begin anew, or name another with --out "
                          "DIR.")
        made = make(args, dataset, manifest, lambda text: tqdm.write(text, file=sys.stderr))
        write_token_bytes(args.out, bpe.lengths().tolist())
    tokens = sum(entry["tokens"] for entry in manifest.shards.values())
    what = f"{made} of them made in {time.perf_counter() - start:.0f} s" if made else "intact, nothing to make"
    print(f"fineweb{args.version}: {len(manifest.shards)} shards, {tokens:,} tokens of {len(dataset):,} documents in "
          f"{args.out}: {what}")
    return 0


def main(argv=None):
    args = parse(argv)
    try:
        try:
            return run(args)
        except OSError as error:
            raise explain(error, args.out) from None
    except Failure as failure:
        print(f"fineweb.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfineweb.py: interrupted; the same command goes on after the last whole shard", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
