"""Turns shards into the .bin/.idx pairs that RWKV's own trainer reads (Megatron's MMapIndexedDataset), and back.

    python data/binidx.py data/mine --out pairs/mine       writes pairs/mine_train.bin, .idx, mine_val.bin, .idx
    python data/binidx.py pairs/mine_train pairs/mine_val --out data/mine      train pair, val pair -> shards

In shards a document begins with the mark, in the pairs it ends with it (RWKV's tools append it). So going there and
back gives the same files, and a pair whose documents all end with the mark survives the other way round too.
Another tokenizer than bytes or gpt2 is described: --tokenizer rwkv_world --vocab_size 65536 --document_mark 0.

.idx, little-endian: "MMIDIDX\\0\\0", version 1 (uint64), type of the tokens (uint8; 8 = uint16), number of pieces and
number of documents + 1 (uint64 each), tokens of each piece (int32), its first byte in .bin (int64), first piece of each
document and the number of pieces (int64). .bin holds the tokens and nothing else.
"""

import argparse
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from shards import (HEADER_BYTES, LARGEST_ID, SHARD_TOKENS, Damaged, Failure, OneLineParser, count_tokens,
                    read_manifest, write_manifest, write_token_bytes)
from text import Shards, check_place, deal, put_in_place, stage
from tokenizer import GPT2_SHA256, Bytes

IDX_MAGIC, IDX_VERSION = b"MMIDIDX\0\0", 1
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats, no tokens
UINT16 = 8
BLOCK = 1 << 20  # numbers read or written at once
KNOWN = {"bytes": (Bytes.sha256, 257, 256), "gpt2": (GPT2_SHA256, 50257, 50256)}


def numbers(path, kind, offset=0, count=None):
    """-> arrays of at most BLOCK numbers of a file."""
    kind = np.dtype(kind)
    with open(path, "rb") as file:
        file.seek(offset)
        while count is None or count > 0:
            part = np.fromfile(file, kind, BLOCK if count is None else min(count, BLOCK))
            if not len(part):
                return
            yield part
            count = None if count is None else count - len(part)


# --------------------------------------------------------------------------------------------------------------------
# Shards -> pair

def open_shards(folder, split):
    """[path] of the shards of a split, in the order of training."""
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    for path in paths:
        with open(path, "rb") as file:
            try:
                count_tokens(file.read(HEADER_BYTES), path.stat().st_size)
            except Damaged as error:
                raise Failure(f"{path} {error} (format: data/README.md)") from None
    return paths


def write_pair(paths, prefix, mark):
    """Write prefix.bin and prefix.idx of the documents in some shards. -> documents

    Each begins with the mark and shall end with it: that is the stream without its first token, and a mark at its end.
    """
    documents = position = start = 0
    with open(f"{prefix}.bin", "wb") as bin, tempfile.TemporaryFile(dir=os.path.dirname(prefix)) as sizes:
        for path in paths:
            for part in numbers(path, "<u2", HEADER_BYTES):
                if position == 0:
                    if part[0] != mark:
                        raise Failure(f"{path} does not begin with the document mark {mark}: give the right "
                                      "--document_mark, or write shards as data/README.md says")
                    bin.write(part[1:])
                else:
                    bin.write(part)
                starts = np.concatenate(([start], position + np.flatnonzero(part == mark)))
                starts = starts[1:] if position == 0 else starts
                lengths = np.diff(starts)
                if len(lengths) and lengths.max() >= 2**31:
                    raise Failure(f"a document in {path} has more than 2^31 - 1 tokens, which .idx cannot say")
                sizes.write(lengths.astype("<i4"))
                documents, start, position = documents + len(lengths), starts[-1], position + len(part)
        bin.write(np.array([mark], "<u2"))
        sizes.write(np.array([position - start], "<i4"))
        documents += 1
        with open(f"{prefix}.idx", "wb") as idx:
            idx.write(IDX_MAGIC + np.uint64(IDX_VERSION).tobytes() + bytes([UINT16])
                      + np.array([documents, documents + 1], "<u8").tobytes())
            sizes.seek(0)
            shutil.copyfileobj(sizes, idx)
            sizes.seek(0)
            at = 0
            while len(part := np.frombuffer(sizes.read(4 * BLOCK), "<i4")):
                ends = at + 2 * np.cumsum(part, dtype="<i8")
                idx.write(ends - 2 * part)
                at = int(ends[-1])
            for first in range(0, documents + 1, BLOCK):
                idx.write(np.arange(first, min(first + BLOCK, documents + 1), dtype="<i8"))
    return documents


# --------------------------------------------------------------------------------------------------------------------
# Pair -> shards

class Pair:
    """prefix.bin and prefix.idx: documents() and what the header says."""

    def __init__(self, prefix):
        prefix = str(prefix)
        self.prefix = prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix
        try:
            with open(f"{self.prefix}.idx", "rb") as file:
                head = file.read(34)
                size = os.fstat(file.fileno()).st_size
            self.bytes = os.stat(f"{self.prefix}.bin").st_size
        except OSError as error:
            raise Failure(f"cannot read {error.filename}: {error.strerror}. A pair is NAME.bin and NAME.idx") from None
        if head[:9] != IDX_MAGIC or len(head) < 34:
            raise Failure(f"{self.prefix}.idx does not begin with {IDX_MAGIC[:7].decode()}: not the index of a pair")
        version, self.type = int.from_bytes(head[9:17], "little"), head[17]
        self.pieces, marks = (int(n) for n in np.frombuffer(head, "<u8", 2, 18))
        if version != IDX_VERSION or self.type not in TYPES:
            raise Failure(f"{self.prefix}.idx has version {version} and tokens of type {self.type}; readable are "
                          f"version {IDX_VERSION} and types {', '.join(map(str, TYPES))} (uint16: {UINT16})")
        self.documents, self.at = marks - 1, (34, 34 + 4 * self.pieces, 34 + 12 * self.pieces)
        if size != self.at[2] + 8 * marks or marks < 1:
            raise Failure(f"{self.prefix}.idx is damaged: {size} bytes, not the {self.at[2] + 8 * marks} of its "
                          f"{self.pieces} pieces and {self.documents} documents")

    def spans(self):
        """-> (first byte in .bin, bytes, whether a document ends here) of every piece, in their order."""
        width, idx = np.dtype(TYPES[self.type]).itemsize, f"{self.prefix}.idx"
        ends = (end for part in numbers(idx, "<i8", self.at[2]) for end in part.tolist())
        end, piece = next(ends), 0
        for sizes, firsts in zip(numbers(idx, "<i4", self.at[0], self.pieces),
                                 numbers(idx, "<i8", self.at[1], self.pieces)):
            for size, first in zip(sizes.tolist(), firsts.tolist()):
                while end <= piece:
                    end = next(ends, sys.maxsize)
                piece += 1
                if size < 0 or first < 0 or first + size * width > self.bytes:
                    raise Failure(f"{self.prefix}: piece {piece - 1} ({size} tokens at byte {first}) is not in the "
                                  f".bin of {self.bytes} bytes: damaged, or not its .idx")
                yield first, size * width, piece == end

    def stream(self, mark, vocab_size):
        """-> (uint16 array, whether a document ends with it): each has the mark before it and none after it."""
        kind, begins = np.dtype(TYPES[self.type]), True
        with open(f"{self.prefix}.bin", "rb") as file:
            for first, size, ends in self.spans():
                if file.tell() != first:
                    file.seek(first)
                while True:
                    part = np.frombuffer(file.read(min(size, BLOCK * kind.itemsize)), kind)
                    size -= part.nbytes
                    for worst in (int(part.max()), int(part.min())) if len(part) else ():
                        if not 0 <= worst < vocab_size:
                            raise Failure(f"{self.prefix}.bin holds token id {worst}, beyond the vocabulary of "
                                          f"{vocab_size}" + ("; shards are uint16" if worst > LARGEST_ID else ""))
                    if ends and not size and len(part) and part[-1] == mark:
                        part = part[:-1]
                    yield np.concatenate(([mark], part) if begins else (part,)).astype("<u2"), ends and not size
                    begins = False
                    if not size:
                        break
                begins = ends


def read_pairs(inputs, staging, facts, val_share):
    """Shards and manifest of a train and a val pair, or of one, of which some documents are held out. -> manifest"""
    with ThreadPoolExecutor(1) as pool:
        pairs = [Pair(prefix) for prefix in inputs]
        streams = [pair.stream(facts["document_mark"], facts["vocab_size"]) for pair in pairs]
        train, val = Shards(staging, "train", 1, SHARD_TOKENS, pool), Shards(staging, "val", 0, SHARD_TOKENS, pool)
        if len(pairs) == 2:
            for shards, stream in zip((train, val), streams):
                for part, _ in stream:
                    shards.write(part)
        else:
            split = argparse.Namespace(by="document", dedup=False, val=val_share)
            deal(((part, end, b"text") for part, end in streams[0]), train, val, split, facts["document_mark"])
        shards = train.described() + val.described()
    if not train.total or not val.total:
        raise Failure(f"{', '.join(inputs)}: {sum(pair.documents for pair in pairs)} documents, too few for train and "
                      "val. Give a train and a val pair, or a larger --val")
    if facts["tokenizer"] == "bytes":  # of others there is no vocabulary here
        write_token_bytes(staging, Bytes().lengths().tolist())
    facts = dict(dataset="text", **facts, documents=sum(pair.documents for pair in pairs))
    write_manifest(staging, facts, shards)
    return dict(facts, shards=shards)


# --------------------------------------------------------------------------------------------------------------------
# Main

def describe(args, folder):
    """{tokenizer, tokenizer_sha256, vocab_size, document_mark} by the manifest of a folder, if any, or the flags."""
    keys = ("tokenizer", "tokenizer_sha256", "vocab_size", "document_mark")
    try:
        facts = read_manifest(folder)[0] if folder else {}
    except FileNotFoundError:
        facts = {}
    except Damaged as error:
        raise Failure(f"{error}: make the data again") from None
    facts = {key: facts.get(key) for key in keys}
    given = dict(zip(keys, (args.tokenizer, *KNOWN.get(args.tokenizer, (None, args.vocab_size, args.document_mark)))))
    wrong = [key for key in keys if None not in (facts[key], given[key]) and facts[key] != given[key]]
    if wrong:
        raise Failure(f"{folder} has {wrong[0]} {facts[wrong[0]]} by its manifest, not {given[wrong[0]]}")
    facts = {key: given[key] if facts[key] is None else facts[key] for key in keys}
    if not facts["tokenizer"]:
        raise Failure("say of which tokenizer these tokens are: --tokenizer bytes, gpt2, or another name")
    if facts["vocab_size"] is None or facts["document_mark"] is None:
        raise Failure(f"--tokenizer {facts['tokenizer']} needs --vocab_size N (ids are below N) and --document_mark ID")
    if not 0 <= facts["document_mark"] < facts["vocab_size"] <= LARGEST_ID + 1:
        raise Failure(f"--document_mark {facts['document_mark']} and --vocab_size {facts['vocab_size']}: the mark must "
                      f"be below the size, and that at most {LARGEST_ID + 1} (shards are uint16)")
    return facts


def to_pairs(args, folder, staging):
    """-> the line that says what was done"""
    facts, out, done = describe(args, folder), pathlib.Path(args.out), []
    for split in ("train", "val"):
        if paths := open_shards(folder, split):
            documents = write_pair(paths, str(staging / f"{out.name}_{split}"), facts["document_mark"])
            done.append(f"{documents} documents in {out}_{split}.bin and .idx")
    if not done:
        raise Failure(f"no shards (*_train_*.bin, *_val_*.bin) in {folder}")
    for path in sorted(staging.iterdir()):
        if (out.parent / path.name).exists() and not args.overwrite:
            raise Failure(f"{out.parent / path.name} exists: choose another --out, or --overwrite")
    for path in sorted(staging.iterdir()):
        os.replace(path, out.parent / path.name)
    return f"{', '.join(done)}; document mark {facts['document_mark']}, --vocab_size {facts['vocab_size']}"


def to_shards(args, staging):
    out, facts = pathlib.Path(args.out).resolve(), describe(args, None)
    check_place(out, args.overwrite)
    manifest = read_pairs(args.inputs, staging, facts, args.val)
    put_in_place(staging, out, args.overwrite)
    tokens = [sum(s["tokens"] for s in manifest["shards"] if s["split"] == split) for split in ("train", "val")]
    return f"{manifest['documents']} documents, {tokens[0]} train and {tokens[1]} val tokens in {args.out}"


def main(argv=None):
    parser = OneLineParser("binidx.py", __doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a folder of shards, or one or two pairs")
    parser.add_argument("--out", required=True, metavar="PATH", help="start of the pairs' names, or folder of shards")
    parser.add_argument("--tokenizer", metavar="NAME",
                        help="whose tokens they are [as the folder's manifest.json says]")
    parser.add_argument("--vocab_size", type=int, metavar="N",
                        help="ids of a tokenizer that is neither bytes nor gpt2")
    parser.add_argument("--document_mark", type=int, metavar="ID",
                        help="id that begins a document, of a tokenizer that is neither")
    parser.add_argument("--val", type=float, default=0.05, metavar="SHARE",
                        help="held out of the documents of one pair [0.05]")
    parser.add_argument("--overwrite", action="store_true", help="replace pairs, or a folder that text.py or this made")
    args, staging = parser.parse_args(argv), None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        folder = pathlib.Path(args.inputs[0])
        if len(args.inputs) > (1 if folder.is_dir() else 2) or not 0 < args.val < 1:
            raise Failure("give one folder of shards, or one pair, or a train and a val pair; --val is between 0 and 1")
        try:
            staging = stage(pathlib.Path(args.out).resolve())
            done = to_pairs(args, folder, staging) if folder.is_dir() else to_shards(args, staging)
        except OSError as error:
            where = error.filename or args.out
            raise Failure(f"{where}: {error.strerror or error}. Make room, or name another --out") from None
    except Failure as failure:
        print(f"binidx.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("binidx.py: interrupted, nothing written", file=sys.stderr)
        return 130
    finally:
        if staging:
            shutil.rmtree(staging, ignore_errors=True)
    print(f"binidx.py: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
