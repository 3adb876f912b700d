"""The format of token shards, once for all programs in data/: header, whole files, manifest.json, token_bytes.bin.

Imported, not run; needs no package. data/README.md describes the format; the training scripts, which stand alone, read
it by themselves.
"""

import argparse
import hashlib
import json
import os
import struct

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024  # header: 256 int32: magic, version, number of tokens, then zeros
MANIFEST, TOKEN_BYTES = "manifest.json", "token_bytes.bin"
SHARD_TOKENS = 100_000_000  # tokens a shard, where nothing else is asked for
LARGEST_ID = 65535  # a token is a uint16


class Failure(Exception):
    """A cause and its way out, in one line for the user."""

    def __str__(self):
        message = super().__str__()
        return message if message[-1:] in ".?" else f"{message}."


class Damaged(Exception):
    """What is wrong with the bytes of a shard."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that prints a program's docstring as help, and errors in one line."""

    def __init__(self, prog, description):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (all flags: python data/{self.prog} --help)\n")


def header(tokens):
    """The 1024 bytes before so many tokens."""
    return struct.pack("<3i", MAGIC, VERSION, tokens).ljust(HEADER_BYTES, b"\0")


def count_tokens(head, size):
    """The number of tokens of a shard of `size` bytes, by its first HEADER_BYTES. Raises Damaged."""
    if len(head) < HEADER_BYTES:
        raise Damaged(f"is no shard: {size} bytes, less than a header")
    magic, version, tokens = struct.unpack_from("<3i", head)
    if (magic, version) != (MAGIC, VERSION):
        raise Damaged(f"is no shard: it begins with {magic} and {version}, not with {MAGIC} and {VERSION}")
    if tokens < 1 or HEADER_BYTES + 2 * tokens != size:
        raise Damaged(f"is damaged: {tokens} tokens by its header, {(size - HEADER_BYTES) / 2:.12g} by its size")
    return tokens


def entry_of(name, tokens, sha256, **more):
    """What manifest.json says of a shard. sha256: of the whole file, in hex."""
    split = "val" if "_val_" in name else "train"
    return dict(name=name, tokens=tokens, bytes=HEADER_BYTES + 2 * tokens, sha256=sha256, split=split, **more)


def sha256_of(path):
    """sha256 of a file in hex; 4 MB at a time, since each read may cost a wait for the interpreter."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 22))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def write(path, data, part=None):
    """Write a file beside its place (as `part`, if only one process does so) and rename it: a reader never sees half
    of it. Raises OSError."""
    part = part or f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_manifest(folder, facts, shards, part=None):
    """manifest.json: facts of the data set (dataset, tokenizer and its sha256, vocab_size, document_mark, ...) and the
    entries of its shards. Written last: what it lists is whole."""
    text = json.dumps(dict(facts, shards=shards), indent=1) + "\n"
    write(os.path.join(folder, MANIFEST), text.encode(), part=part)


def read_manifest(folder):
    """(facts, {name: entry}) of a folder's manifest.json. Raises FileNotFoundError, and Damaged."""
    path = os.path.join(folder, MANIFEST)
    with open(path, encoding="utf-8") as file:
        try:
            facts = json.load(file)
            return facts, {entry["name"]: entry for entry in facts.pop("shards")}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise Damaged(f"{path} is damaged ({type(error).__name__}: {error})") from None


def write_token_bytes(folder, lengths):
    """token_bytes.bin: a uint8 a token id, the bytes of text that it stands for, 0 for the document mark. By it the
    training scripts count the text of what they validate. One that is the same is left alone."""
    path, data = os.path.join(folder, TOKEN_BYTES), bytes(lengths)
    if os.path.exists(path):
        with open(path, "rb") as file:
            if file.read() == data:
                return
    write(path, data)
