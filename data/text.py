"""Makes shards of your own text for the training scripts: .txt, .jsonl, .parquet, those in .gz or .zst, and folders.

    python data/text.py book.txt --by tail --out data/mine
    python data/text.py folder more.jsonl.gz --out data/mine --tokenizer gpt2 --dedup

A .jsonl line is {"text": ...}, a parquet file has a column `text` (--field names another), a .txt file is one document
or several with <|endoftext|> between. Text that is not UTF-8 is replaced by U+FFFD and counted. Everything streams:
memory stays under 500 MB for any length of text, if no line of .jsonl is longer than 32 MB (refused) and no page of
.parquet larger than about 200 MB (the rule is 1 MB; some writers put 1024 rows into one, whatever their sizes).
The same input gives the same shards. The folder appears whole, at the end; manifest.json in it says what it holds.
"""

import codecs
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from shards import (HEADER_BYTES, MANIFEST, SHARD_TOKENS, TOKEN_BYTES, Damaged, Failure, OneLineParser, entry_of,
                    header, read_manifest, sha256_of, write_manifest, write_token_bytes)
from tokenizer import load, need

# --------------------------------------------------------------------------------------------------------------------
# Choices

SEPARATOR = b"<|endoftext|>"  # between documents in a .txt file
BLOCK = 1 << 16             # bytes read at once; larger ones leave the processor's cache while they are checked
LARGEST_ROW = 1 << 25       # bytes; a line or row must be in memory as a whole, several times over
IN_MEMORY = 1 << 23         # tokens; a longer document waits on the disk until its end is known
KINDS = (".txt", ".jsonl", ".parquet")
PACKED = (".gz", ".zst")


# --------------------------------------------------------------------------------------------------------------------
# Input

def find_files(inputs):
    """[path] in the order of the arguments, folders by the names in them; what else is in a folder is left alone."""
    files = []
    for path in map(pathlib.Path, inputs):
        if path.is_dir():
            names = sorted(p for p in path.rglob("*") if p.is_file() and kind(p)
                           and not any(part.startswith(".") for part in p.relative_to(path).parts))
            if not names:
                raise Failure(f"no {', '.join(KINDS)} (or those in {', '.join(PACKED)}) in the folder {path}")
            files += names
        elif not path.exists():
            raise Failure(f"{path} does not exist")
        elif not kind(path):
            raise Failure(f"{path}: its name must end in {', '.join(KINDS)}, plain or with {', '.join(PACKED)}")
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def kind(path):
    """(".txt", ".jsonl" or ".parquet"; "", ".gz" or ".zst") of a file's name, or None."""
    name = path.name.lower()
    packed = next((p for p in PACKED if name.endswith(p)), "")
    plain = next((k for k in KINDS if name.removesuffix(packed).endswith(k)), None)
    return plain and (plain, packed)


class Watched(io.FileIO):
    """A file that moves the progress bar as it is read."""

    def __init__(self, path, bar):
        super().__init__(path)
        self.bar = bar

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.bar.update(count or 0)
        return count


class Cleaner:
    """Valid UTF-8 out of anything; counts what had to be replaced."""

    def __init__(self):
        self.replaced = 0
        codecs.register_error("count", self.replace)

    def replace(self, error):
        """Bytes that are no character, or halves of surrogate pairs that JSON lets through."""
        decoding = isinstance(error, UnicodeDecodeError)
        count = 1 if decoding else error.end - error.start
        self.replaced += count
        return "\ufffd" if decoding else "\ufffd".encode() * count, error.end

    def clean(self, data, final):
        """-> (valid UTF-8, number of bytes of `data` it stands for): without `final` a cut character may remain."""
        before = self.replaced
        text, used = codecs.utf_8_decode(data, "count", final)
        return (text.encode() if self.replaced > before else data if used == len(data) else data[:used]), used


def read_txt(file, where, cleaner):
    """-> (piece, whether a document ends with it). A line end after the separator belongs to it."""
    rest, first = b"", True
    while True:
        block = file.read(BLOCK)
        data = rest + block
        if first:
            if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise Failure(f"{where} is UTF-16: convert it, iconv -f UTF-16 -t UTF-8 {where} > utf8.txt")
            data, first = data.removeprefix(codecs.BOM_UTF8), False
        cut = data.rfind(b"<", -len(SEPARATOR) - 1) if block else -1
        if cut >= 0 and (SEPARATOR + b"\r\n").startswith(data[cut:]):  # one may have begun: wait for the next block
            data, rest = data[:cut], data[cut:]
        else:
            rest = b""
        position = 0
        while (at := data.find(SEPARATOR, position)) >= 0:
            text, position = data[position:at], at + len(SEPARATOR)
            position += 1 if data.startswith(b"\n", position) else 2 * data.startswith(b"\r\n", position)
            yield cleaner.clean(text, True)[0], True
        data = data[position:]
        if not block:
            yield cleaner.clean(data, True)[0], True
            return
        piece, used = cleaner.clean(data, bool(rest))
        rest = data[used:] + rest
        if piece:
            yield piece, False


def read_jsonl(file, where, cleaner, field):
    number = 0
    while line := file.readline(LARGEST_ROW + 1):
        number += 1
        if len(line) > LARGEST_ROW:
            raise Failure(f"{where} line {number} is longer than {LARGEST_ROW >> 20} MB: put it in a .txt file")
        line = cleaner.clean(line.removeprefix(codecs.BOM_UTF8), True)[0]
        if line.isspace():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(": line")[0]
            raise Failure(f"{where} line {number} is not JSON ({reason}): one object a line, "
                          f'{{"{field}": "..."}}') from None
        del line  # 32 MB, perhaps, and four times that as a str
        text = entry.get(field) if isinstance(entry, dict) else None
        if not isinstance(text, str):
            has = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise Failure(f'{where} line {number} has no text in "{field}" (it has: {has[:80] or "nothing"}). '
                          "--field NAME reads another one")
        for i in range(0, max(1, len(text)), BLOCK):
            yield text[i:i + BLOCK].encode("utf-8", "count"), i + BLOCK >= len(text)
        del entry, text


def slices(data, cleaner):
    at, final = 0, False
    while not final:
        final = at + BLOCK >= len(data)
        piece, used = cleaner.clean(data[at:at + BLOCK], final)
        at += used
        yield piece, final


def read_parquet(path, cleaner, field, bar):
    parquet = need("pyarrow.parquet").parquet
    import pyarrow
    try:
        table = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # pages as they come, not row groups
        rows, size = table.metadata.num_rows, path.stat().st_size
        types = {column.name: str(column.type) for column in table.schema_arrow}
        if types.get(field) not in ("string", "large_string", "binary", "large_binary"):
            has = ", ".join(f"{name} ({type})" for name, type in types.items())
            raise Failure(f"{path} has no column of text called {field} (it has: {has[:200]}). --field NAME reads "
                          "another one")
        few = max(1, min(1024, rows * (1 << 20) // size))  # rows of 1 MB together, more or less
        for batch in table.iter_batches(batch_size=few, columns=[field], use_threads=False):
            for text in batch.column(0).cast(pyarrow.large_binary()):
                yield from slices(text.as_py() or b"", cleaner)
            bar.update(size * len(batch) // rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise Failure(f"{path} is no parquet file, or damaged: {str(error).splitlines()[0][:120]}") from None


def read(path, cleaner, field, bar):
    """-> (piece of text in UTF-8, whether a document ends with it), for every document of a file."""
    plain, packed = kind(path)
    if plain == ".parquet":
        if packed:
            raise Failure(f"{path}: parquet is packed inside already; unpack this file first")
        yield from read_parquet(path, cleaner, field, bar)
        return
    try:
        with io.BufferedReader(Watched(path, bar), 1 << 20) as file:
            if packed == ".gz":
                file = io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)
            elif packed == ".zst":
                file = io.BufferedReader(need("pyarrow").CompressedInputStream(file, "zstd"), 1 << 20)
            yield from read_txt(file, path, cleaner) if plain == ".txt" else read_jsonl(file, path, cleaner, field)
    except (OSError, EOFError, zlib.error) as error:
        damaged = " (damaged, or cut short?)" if packed else ""
        raise Failure(f"cannot read {path}: {getattr(error, 'strerror', None) or error}{damaged}") from None


# --------------------------------------------------------------------------------------------------------------------
# Tokens

CUT = re.compile(r"(?s:.*)\S(?=[ \n\r\t])")


def tokens(pieces, tokenizer):
    """-> (uint16 array, whether a document ends with it, its text). A document begins with the mark.

    Byte pairs never reach across the start of a blank after something else, so a long document cut there has the
    tokens of the whole. Where a block holds no such place, it is cut at its end.
    """
    mark, rest, start = np.array([tokenizer.document_mark], "<u2"), "", True
    for piece, end in pieces:
        if tokenizer.name == "bytes":
            body = np.frombuffer(piece, np.uint8)
        else:
            text = rest + piece.decode()
            cut = None if end or not (match := CUT.match(text)) else match.end()
            text, rest = text[:cut], "" if cut is None else text[cut:]
            body = tokenizer.encode(text)
        yield np.concatenate((mark, body), dtype="<u2") if start else body.astype("<u2", copy=False), end, piece
        start = end


# --------------------------------------------------------------------------------------------------------------------
# Shards

class Shards:
    """A stream of tokens in files of `size` tokens, whose sha256 a thread computes as they are finished."""

    def __init__(self, folder, split, first, size, pool):
        self.folder, self.split, self.first, self.size, self.pool = folder, split, first, size, pool
        self.total, self.file, self.counts, self.digests = 0, None, [], []

    def path(self, i):
        return self.folder / f"text_{self.split}_{self.first + i:06d}.bin"

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(self.path(len(self.counts)), "wb", buffering=1 << 18)
                self.file.write(bytes(HEADER_BYTES))
                self.counts.append(0)
            part = tokens[:self.size - self.counts[-1]]
            self.file.write(part)
            self.counts[-1] += len(part)
            self.total += len(part)
            tokens = tokens[len(part):]
            if self.counts[-1] == self.size:
                self.close()

    def close(self):
        """Finish the last shard: header, and its sha256 in the background."""
        if self.file:
            self.file.seek(0)
            self.file.write(header(self.counts[-1]))
            self.file.close()
            self.file = None
            self.digests.append(self.pool.submit(sha256_of, self.path(len(self.counts) - 1)))

    def move_tail(self, count, to, mark):
        """Move the last `count` tokens to other shards, which begin with the mark like every stream."""
        self.close()
        self.total -= count
        first, keep = divmod(self.total, self.size)  # every shard but the last is full
        for i in range(first, len(self.counts)):
            self.digests[i].result()  # until now it may have been reading this file
            with open(self.path(i), "rb") as file:
                file.seek(HEADER_BYTES + (2 * keep if i == first else 0))
                while len(part := np.frombuffer(file.read(1 << 20), "<u2")):
                    if not to.total and part[0] != mark:
                        to.write(np.array([mark], "<u2"))
                    to.write(part)
            if i > first or not keep:
                self.path(i).unlink()
        del self.counts[first:], self.digests[first:]
        if keep:
            os.truncate(self.path(first), HEADER_BYTES + 2 * keep)
            self.counts.append(keep)
            self.file = open(self.path(first), "r+b")
            self.close()

    def described(self):
        """[entry of the manifest] of the finished shards."""
        self.close()
        return [entry_of(self.path(i).name, count, digest.result())
                for i, (count, digest) in enumerate(zip(self.counts, self.digests))]


class Seen:
    """The texts met so far: a table of their hashes, in a nameless file as soon as it outgrows 64 MB of memory."""

    def __init__(self):
        import sqlite3
        self.table = sqlite3.connect("", isolation_level=None)
        self.table.execute("PRAGMA cache_size = -65536")
        self.table.execute("PRAGMA journal_mode = OFF")
        self.table.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, digest):
        """Whether it is new."""
        return self.table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1


def deal(stream, train, val, args, mark):
    """Write the documents of a stream of tokens() to the shards. -> counts of documents, empty ones and duplicates.

    By document: of 20 documents the 10th is held out (--val 0.05), whatever their sizes. By tail: all goes to train
    first, whose end then moves. A document waits, on the disk if it is long, only while it may yet be left out.
    """
    counts, seen = dict(documents=0, empty=0, duplicates=0), Seen() if args.dedup else None
    parts, size, digest, blank, spool = [], 0, hashlib.blake2b(digest_size=16), True, None

    def place():
        i = counts["documents"]
        held_out = args.by == "document" and int((i + 1) * args.val + 0.5) > int(i * args.val + 0.5)
        shards = val if held_out else train
        if spool:
            spool.seek(0)
            while part := spool.read(1 << 20):
                shards.write(np.frombuffer(part, "<u2"))
        for part in parts:
            shards.write(part)

    for body, end, text in stream:
        parts.append(body)
        blank = blank and (not text or text.isspace())
        if seen:
            digest.update(text)
        if not seen and not blank:
            place()
            parts, spool = [], None
        elif not end and (size := size + len(body)) > IN_MEMORY:
            spool = spool or tempfile.TemporaryFile(dir=train.folder)
            for part in parts:
                spool.write(part)
            parts = []
        if end:
            if blank:
                counts["empty"] += 1
            elif seen and not seen.add(digest.digest()):
                counts["duplicates"] += 1
            else:
                if seen:
                    place()
                counts["documents"] += 1
            parts, size, blank, spool = [], 0, True, None
            digest = seen and hashlib.blake2b(digest_size=16)
    if args.by == "tail":
        train.move_tail(round(args.val * train.total), val, mark)
    return counts


# --------------------------------------------------------------------------------------------------------------------
# Main

def check_place(out, overwrite):
    """Refuse to replace anything but a folder of shards that this program made."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    try:
        facts, shards = read_manifest(out)
        ours = {MANIFEST, TOKEN_BYTES, *shards} if facts.get("dataset") == "text" else set()
    except (OSError, Damaged):
        ours = set()
    strange = sorted({path.name for path in out.iterdir()} - ours) if out.is_dir() else [out.name]
    if strange:
        raise Failure(f"{out} exists and holds what is not of this program ({strange[0]}): choose another --out")
    if not overwrite:
        raise Failure(f"{out} exists: choose another --out, or replace it with --overwrite")


def stage(out):
    """A new folder beside `out`, where files wait until they are whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    mask = os.umask(0)
    os.umask(mask)
    staging.chmod(0o777 & ~mask)
    return staging


def put_in_place(staging, out, overwrite):
    """Give the finished folder its name; an older one vanishes only then. Both are resolved paths."""
    old = staging.with_name(staging.name + ".old")
    if overwrite and out.exists():
        os.rename(out, old)
    try:
        os.rename(staging, out)
    except BaseException:
        old.exists() and os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def build(args, staging, bar):
    """All shards and the manifest, in the folder `staging`. -> manifest"""
    tokenizer, cleaner, files = load(args.tokenizer, args.vocab), Cleaner(), find_files(args.inputs)
    bar.reset(sum(path.stat().st_size for path in files))
    with ThreadPoolExecutor(1) as pool:
        train = Shards(staging, "train", 1, args.shard_size, pool)
        val = Shards(staging, "val", 0, args.shard_size, pool)
        pieces = (piece for path in files for piece in read(path, cleaner, args.field, bar))
        counts = deal(tokens(pieces, tokenizer), train, val, args, tokenizer.document_mark)
        shards = train.described() + val.described()
    if not counts["documents"]:
        raise Failure(f"no text in {', '.join(args.inputs)[:200]}: nothing but blanks in {len(files)} file(s)")
    if not val.total or not train.total:
        way = "--by tail cuts within a document" if args.by == "document" else "give more text"
        raise Failure(f"{counts['documents']} document(s), {train.total + val.total} tokens: too little to hold out "
                      f"{args.val:g} of it by {args.by}. {way[0].upper()}{way[1:]}, or a larger --val holds out more")
    facts = dict(
        dataset="text", tokenizer=tokenizer.name, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size,
        document_mark=tokenizer.document_mark, files=len(files), **counts, replaced=cleaner.replaced, val=args.val,
        by=args.by, dedup=args.dedup, builder=sha256_of(__file__))
    write_token_bytes(staging, tokenizer.lengths().tolist())
    write_manifest(staging, facts, shards)
    return dict(facts, shards=shards)


def parse(argv):
    parser = OneLineParser("text.py", __doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file or folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards, such as data/mine")
    parser.add_argument("--tokenizer", default="bytes", choices=("bytes", "gpt2"),
                        help="how text becomes tokens [bytes]")
    parser.add_argument("--vocab", metavar="FILE", help="gpt2: ranks in tiktoken's form, where there is no network")
    parser.add_argument("--val", type=float, default=0.05, metavar="SHARE", help="share held out [0.05]")
    parser.add_argument("--by", default="document", choices=("document", "tail"),
                        help="hold out whole documents, evenly, or the end of the text [document]")
    parser.add_argument("--dedup", action="store_true", help="keep a document that occurs again only once")
    parser.add_argument("--field", default="text", metavar="NAME",
                        help="where .jsonl and .parquet have the text [text]")
    parser.add_argument("--shard_size", type=int, default=SHARD_TOKENS, metavar="TOKENS",
                        help="tokens a shard [10^8]")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this program made")
    args = parser.parse_args(argv)
    if not 0 < args.val < 1:
        raise Failure(f"--val {args.val:g} is not a share between 0 and 1, such as 0.05")
    if not 1 <= args.shard_size < 2**31:
        raise Failure(f"--shard_size {args.shard_size} is not between 1 and 2^31 - 1")
    return args


def main(argv=None):
    start, staging = time.perf_counter(), None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        args = parse(argv)
        out = pathlib.Path(args.out).resolve()
        check_place(out, args.overwrite)
        try:
            staging = stage(out)
            with tqdm(unit="B", unit_scale=True, disable=None, leave=False) as bar:
                manifest = build(args, staging, bar)
            put_in_place(staging, out, args.overwrite)
        except OSError as error:
            raise Failure(f"cannot write {out}: {error.strerror or error}. Make room, or name another --out") from None
    except Failure as failure:
        print(f"text.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("text.py: interrupted, nothing written", file=sys.stderr)
        return 130
    finally:
        if staging:
            shutil.rmtree(staging, ignore_errors=True)
    count = {split: sum(s["tokens"] for s in manifest["shards"] if s["split"] == split) for split in ("train", "val")}
    notes = [f"{manifest[key]} {what}" for key, what in (("replaced", "invalid bytes or characters replaced"),
             ("empty", "empty documents left out"), ("duplicates", "duplicates left out")) if manifest[key]]
    print(f"text.py: {manifest['documents']} documents, {count['train']} train and {count['val']} val tokens "
          f"({manifest['tokenizer']}), {''.join(note + ', ' for note in notes)}{time.perf_counter() - start:.1f} s\n"
          f"train on them: ./run_rwkv7.sh --track tiny --data {args.out}"
          + (f" --vocab_size {manifest['vocab_size']}" if manifest["vocab_size"] != 257 else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
