"""The tokenizers of data/text.py and data/fineweb.py: bytes, and GPT-2's byte pairs (needs tiktoken).

    tokenizer = load("gpt2")                      fetches GPT-2's ranks, or finds them where tiktoken keeps them
    tokenizer = load("gpt2", "r50k_base.tiktoken")      reads them from a file: no network
    tokenizer.encode("text") -> uint16 array, without the document mark; what looks like a mark in the text is text

A vocabulary file has tiktoken's form, one "base64 rank" a line, and may hold any byte-level vocabulary of GPT-2's kind.
The sha256 of a tokenizer is that of its vocabulary in this form, in the order of the ranks; data and checkpoints
carry it (manifest.json). The document mark is the id after the last rank.
"""

import base64
import binascii
import hashlib
import pathlib
import re

import numpy as np

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of r50k_base.tiktoken
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
LARGEST_ID = 65535  # shards hold uint16


class Failure(Exception):
    """A cause and its way round, in one line for the user."""

    def __str__(self):
        message = super().__str__()
        return message if message[-1:] in ".?" else f"{message}."


def need(module):
    """Import an optional package, or say how to get it."""
    try:
        return __import__(module)
    except ImportError:
        raise Failure(f"{module} is not installed: pip install -r data/requirements.txt") from None


def canonical(tokens):
    """The vocabulary as tiktoken writes it, one "base64 id" a line. tokens: [bytes], the index being the id."""
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


class Bytes:
    """Token = byte of the text in UTF-8; the document mark is 256."""

    name, vocab_size, document_mark = "bytes", 257, 256
    sha256 = hashlib.sha256(canonical([bytes([i]) for i in range(256)])).hexdigest()

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype("<u2")

    def decode(self, ids):
        """-> bytes; the document marks vanish."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()


class BytePairs:
    """GPT-2's way of splitting text into words, then byte pairs merged in the order of their ranks."""

    # A contraction, or letters, digits or other signs with at most one blank before them, or blanks.
    SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

    def __init__(self, tokens, name):
        self.document_mark, self.vocab_size = len(tokens), len(tokens) + 1
        self.sha256 = hashlib.sha256(canonical(tokens)).hexdigest()
        self.name = "gpt2" if self.sha256 == GPT2_SHA256 else name
        ranks, mark = {token: i for i, token in enumerate(tokens)}, {"<|endoftext|>": self.document_mark}
        self.bpe = need("tiktoken").Encoding(self.name, pat_str=self.SPLIT, mergeable_ranks=ranks, special_tokens=mark)

    def encode(self, text):
        return self.bpe.encode_to_numpy(text, disallowed_special=()).astype("<u2")

    def decode(self, ids):
        """-> bytes; the document marks vanish."""
        ids = np.asarray(ids)
        return self.bpe.decode_bytes(ids[ids != self.document_mark].tolist())


def read_vocabulary(data, where):
    """[bytes] of the content of a vocabulary file; `where` names it in messages."""
    ranks, count = {}, 0
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[int(rank)], count = base64.b64decode(token, validate=True), count + 1
            except (ValueError, binascii.Error):
                raise Failure(f'{where} line {number} is not "base64 rank": is it a tiktoken vocabulary?') from None
    tokens = [ranks[i] for i in sorted(ranks)]
    if count > LARGEST_ID:
        raise Failure(f"{where} has {count} tokens and a document mark: ids beyond {LARGEST_ID}, which shards "
                      "(uint16) cannot hold. Use a smaller vocabulary, such as GPT-2's.")
    if sorted(ranks) != list(range(count)) or len(set(tokens)) != count:
        raise Failure(f"{where} is damaged: its {count} ranks are not 0 to {count - 1}, of different tokens. "
                      "Fetch it again.")
    if not {bytes([i]) for i in range(256)} <= set(tokens):
        raise Failure(f"{where} lacks some single bytes, so that not every text can be encoded. Fetch it again.")
    return tokens


def load(name="bytes", vocab=None):
    """The tokenizer `name` (bytes or gpt2). vocab: file with the ranks, for gpt2 on a machine without network."""
    if name == "bytes":
        if vocab:
            raise Failure("--vocab goes with --tokenizer gpt2; the tokenizer bytes has no vocabulary file")
        return Bytes()
    if name != "gpt2":
        raise Failure(f"no tokenizer is called {name}: bytes or gpt2 (with --vocab FILE any vocabulary of its kind)")
    need("tiktoken")
    if vocab:
        try:
            data = pathlib.Path(vocab).read_bytes()
        except OSError as error:
            raise Failure(f"cannot read the vocabulary {vocab}: {error.strerror or error}") from None
        return BytePairs(read_vocabulary(data, vocab), re.sub(r"[^\w.-]+", "_", pathlib.Path(vocab).stem))
    from tiktoken.load import load_tiktoken_bpe
    try:
        ranks = load_tiktoken_bpe(GPT2_URL, expected_hash=GPT2_SHA256)
    except Exception as error:  # whatever the HTTP client of the day raises
        raise Failure(f"cannot fetch GPT-2's vocabulary ({type(error).__name__}). Without network: bring the file "
                      f"{GPT2_URL} and name it with --vocab FILE.") from None
    return BytePairs(sorted(ranks, key=ranks.get), "gpt2")
