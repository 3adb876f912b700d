"""The tokenizers of data/text.py, data/fineweb.py and sample.py: bytes, GPT-2's byte pairs (needs tiktoken), and those
of a vocabulary file.

    tokenizer = load("gpt2")                      fetches GPT-2's ranks, or finds them where tiktoken keeps them
    tokenizer = load("gpt2", "r50k_base.tiktoken")      reads them from a file: no network
    tokenizer = from_file("r50k_base.tiktoken")   the same, slowly where there is no tiktoken; RWKV's own vocabulary too
    tokenizer.encode("text") -> uint16 array, without the document mark; what looks like a mark in the text is text
    tokenizer.lengths() -> how many bytes each id stands for

A vocabulary file has tiktoken's form, one "base64 rank" a line, and may hold any byte-level vocabulary of GPT-2's kind.
The sha256 of a tokenizer is that of its vocabulary in this form, in the order of the ranks; data and checkpoints
carry it (manifest.json). The document mark is the id after the last rank; RWKV's own vocabulary has it at 0.
"""

import ast
import base64
import binascii
import hashlib
import importlib.util
import itertools
import json
import math
import pathlib
import re
import sys
import unicodedata

import numpy as np

from shards import LARGEST_ID, Failure

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of r50k_base.tiktoken
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
BY_SIZE = {257: "bytes", 50257: "gpt2", 65536: "rwkv_world"}  # the tokenizer of a model that names none
MARKS = "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|rwkv_tokenizer_end_of_text|>"  # of a tokenizer.json


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

    def lengths(self):
        return np.repeat([1, 0], [256, 1])


class BytesAlone(Bytes):
    """... of a model of 256 ids, which has no document mark: -1."""

    vocab_size, document_mark = 256, -1

    def lengths(self):
        return np.ones(256, np.int64)


class BytePairs:
    """GPT-2's way of splitting text into words, then byte pairs merged in the order of their ranks."""

    # A contraction, or letters, digits or other signs with at most one blank before them, or blanks.
    SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

    def __init__(self, tokens, name):
        self.tokens, self.document_mark, self.vocab_size = tokens, len(tokens), len(tokens) + 1
        self.sha256 = hashlib.sha256(canonical(tokens)).hexdigest()
        self.name = "gpt2" if self.sha256 == GPT2_SHA256 else name
        self.ranks = {token: i for i, token in enumerate(tokens)}
        self.prepare()

    def prepare(self):
        self.bpe = need("tiktoken").Encoding(self.name, pat_str=self.SPLIT, mergeable_ranks=self.ranks,
                                             special_tokens={"<|endoftext|>": self.document_mark})

    def encode(self, text):
        return self.bpe.encode_to_numpy(text, disallowed_special=()).astype("<u2")

    def decode(self, ids):
        """-> bytes; the document marks vanish."""
        return b"".join(self.tokens[i] for i in np.asarray(ids).tolist() if i != self.document_mark)

    def lengths(self):
        return np.array([*map(len, self.tokens), 0])


class SlowBytePairs(BytePairs):
    """The same without tiktoken: quick enough for a prompt."""

    def prepare(self):
        """SPLIT for Python's re, which knows no \\p{} and counts four control characters more as blanks."""
        kinds = [list(map(ord, "\t\n\v\f\r\x85")), [], []]  # blanks, letters, digits
        for code in range(sys.maxunicode + 1):
            kind = "ZLN".find(unicodedata.category(chr(code))[0])
            if kind >= 0:
                kinds[kind].append(code)
        ranges = lambda codes: "".join(  # of neighbours, which keep their distance from their index
            f"\\U{run[0]:08x}-\\U{run[-1]:08x}" for run in (
                [code for _, code in group] for _, group in itertools.groupby(enumerate(codes), lambda x: x[1] - x[0])))
        s, letters, digits = map(ranges, kinds)
        self.split = re.compile(rf"'(?:[sdmt]|ll|ve|re)| ?[{letters}]+| ?[{digits}]+| ?[^{s}{letters}{digits}]+|"
                                rf"[{s}]+\Z|[{s}]+(?![^{s}])|[{s}]")

    def encode(self, text):
        ids = []
        for word in self.split.findall(text):
            parts = [bytes([byte]) for byte in word.encode()]
            while len(parts) > 1:
                pairs = [self.ranks.get(x + y, math.inf) for x, y in zip(parts, parts[1:])]
                i = pairs.index(min(pairs))
                if pairs[i] == math.inf:
                    break
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            ids += [self.ranks[part] for part in parts]
        return np.array(ids, "<u2")


class Longest:
    """RWKV's own tokenizer (rwkv_vocab_v20230424.txt): at each place the longest token that fits. Mark: id 0."""

    name, document_mark = "rwkv_world", 0

    def __init__(self, tokens):
        """tokens: [bytes], the index being the id; b"" at 0 and where an id is not in use."""
        self.tokens, self.vocab_size = tokens, len(tokens)
        self.sha256 = hashlib.sha256(canonical(tokens)).hexdigest()
        self.ids = {token: i for i, token in enumerate(tokens) if token}
        self.sizes = {}  # of the tokens that start with a byte, the longest first
        for size in sorted({len(token) for token in self.ids}, reverse=True):
            for byte in {token[0] for token in self.ids if len(token) == size}:
                self.sizes.setdefault(byte, []).append(size)

    def encode(self, text):
        data, at, ids = text.encode(), 0, []
        while at < len(data):
            token = next(t for size in self.sizes[data[at]] if (t := data[at:at + size]) in self.ids)
            ids.append(self.ids[token])
            at += len(token)
        return np.array(ids, "<u2")

    def decode(self, ids):
        """-> bytes; the document marks vanish."""
        return b"".join(self.tokens[i] for i in np.asarray(ids).tolist())

    def lengths(self):
        return np.array([*map(len, self.tokens)])


class HuggingFace:
    """A tokenizer.json, read by the tokenizers package: byte pairs of GPT-2's kind, or pieces whose blank is \u2581 and
    whose odd bytes are <0x00> to <0xFF>. The document mark is one of MARKS, or -1: none."""

    def __init__(self, data, path):
        try:
            self.inner = need("tokenizers").Tokenizer.from_buffer(data)
            parts = json.loads(data)
        except Failure:
            raise
        except Exception as error:  # the package has no class of its own
            raise Failure(f"cannot read the tokenizer {path}: {str(error).splitlines()[0][:120]}") from None
        if not self.inner.get_vocab() or parts["model"].get("type") in ("WordPiece", "WordLevel"):
            raise Failure(f"{path} is of the kind {parts['model'].get('type')}, whose tokens do not tell their text. "
                          "Byte pairs and Unigram are read")
        self.inner.encode_special_tokens = True  # marks in a text are text
        self.inner.no_truncation()
        self.inner.no_padding()
        self.vocab_size = 1 + max(self.inner.get_vocab().values())
        added = {token["id"]: token for token in parts.get("added_tokens") or ()}
        special = {i: token["content"] for i, token in added.items() if token["special"]}
        marks = [i for mark in MARKS for i, content in special.items() if content == mark]
        self.document_mark = marks[0] if marks else -1
        byte_level = "ByteLevel" in json.dumps([parts.get("decoder"), parts.get("pre_tokenizer")])
        text = [self.inner.id_to_token(i) or "" for i in range(self.vocab_size)]
        self.tokens = [piece_bytes(piece, byte_level) for piece in text]
        for i, token in added.items():  # written as they are
            self.tokens[i] = b"" if i in special else token["content"].encode()
        ordinary = [token for i, token in enumerate(self.tokens) if i not in special]
        self.sha256 = hashlib.sha256(canonical(ordinary)).hexdigest()
        self.name = "gpt2" if self.sha256 == GPT2_SHA256 else name_of(path)

    def encode(self, text):
        text.encode()  # a half of a pair of surrogates: the error that the others raise
        return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids):
        """-> bytes; the marks vanish."""
        return b"".join(self.tokens[i] for i in np.asarray(ids).tolist())

    def lengths(self):
        return np.array([*map(len, self.tokens)])


def piece_bytes(piece, byte_level):
    """The bytes that a piece of a tokenizer.json stands for."""
    if byte_level:
        return bytes(GPT2_BYTES[character] for character in piece if character in GPT2_BYTES)
    odd = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(odd[1], 16)]) if odd else piece.replace("\u2581", " ").encode()


def gpt2_bytes():
    """{character: byte} of GPT-2's files: bytes that cannot be seen are shown as the characters from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(rest)}


GPT2_BYTES = gpt2_bytes()


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


def read_longest(data, where):
    """[bytes] of the content of a file of RWKV's own kind: a line is the id, a Python string or bytes, its length."""
    tokens, known = {0: b""}, {b""}
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                i, text = line.decode().strip().split(" ", 1)
                text, size = text.rsplit(" ", 1)
                token = ast.literal_eval(text)
                token = token.encode() if isinstance(token, str) else token
                if not isinstance(token, bytes) or len(token) != int(size) or int(i) in tokens or token in known:
                    raise ValueError
                tokens[int(i)] = token
                known.add(token)
            except (ValueError, SyntaxError, TypeError):
                raise Failure(f'{where} line {number} is not "id token length". Fetch it again.') from None
    if not {bytes([i]) for i in range(256)} <= set(tokens.values()) or max(tokens) > LARGEST_ID:
        raise Failure(f"{where} lacks some single bytes or has ids beyond {LARGEST_ID}. Fetch it again.")
    return [tokens.get(i, b"") for i in range(max(tokens) + 1)]


def from_file(path):
    """The tokenizer of a vocabulary file: ranks in tiktoken's form, RWKV's own, or a tokenizer.json."""
    data = read_file(path)
    if str(path).endswith(".json"):
        return HuggingFace(data, path)
    if re.match(rb"\s*\d+ b?['\"]", data):
        return Longest(read_longest(data, path))
    tokens, name = read_vocabulary(data, path), name_of(path)
    try:
        return BytePairs(tokens, name)
    except Failure:  # no tiktoken
        return SlowBytePairs(tokens, name)


def read_file(path):
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise Failure(f"cannot read the vocabulary {path}: {error.strerror or error}") from None


def name_of(path):
    return re.sub(r"[^\w.-]+", "_", pathlib.Path(path).stem)


def load(name="bytes", vocab=None):
    """The tokenizer `name` (bytes or gpt2). vocab: file with the ranks, for gpt2 on a machine without network."""
    if name == "bytes":
        if vocab:
            raise Failure("--vocab goes with --tokenizer gpt2; the tokenizer bytes has no vocabulary file")
        return Bytes()
    if name == "rwkv_world":
        package = importlib.util.find_spec("rwkv")
        if not package:
            raise Failure("RWKV's vocabulary is not here: pip install rwkv brings it, or give the file "
                          "rwkv_vocab_v20230424.txt with --tokenizer FILE")
        return from_file(pathlib.Path(package.origin).with_name("rwkv_vocab_v20230424.txt"))
    if name != "gpt2":
        raise Failure(f"no tokenizer is called {name}: bytes or gpt2 (with --vocab FILE any vocabulary of its kind)")
    need("tiktoken")
    if vocab:
        return BytePairs(read_vocabulary(read_file(vocab), vocab), name_of(vocab))
    from tiktoken.load import load_tiktoken_bpe
    try:
        ranks = load_tiktoken_bpe(GPT2_URL, expected_hash=GPT2_SHA256)
    except Exception as error:  # whatever the HTTP client of the day raises
        raise Failure(f"cannot fetch GPT-2's vocabulary ({type(error).__name__}). Without network: bring the file "
                      f"{GPT2_URL} and name it with --vocab FILE.") from None
    return BytePairs(sorted(ranks, key=ranks.get), "gpt2")


def for_model(header, size, wanted=None):
    """The tokenizer of a model with `size` ids, about: {tokenizer, tokenizer_sha256} as far as known; or the one wanted
    (bytes, gpt2 or a vocabulary file), if it can be the model's."""
    name = wanted or header.get("tokenizer") or BY_SIZE.get(size)
    if not wanted and name not in BY_SIZE.values():
        raise Failure(f"the model's tokenizer{f', {name},' if name else ''} is not known here. Give its vocabulary "
                      "file with --tokenizer FILE, or bytes, or gpt2")
    try:
        if name == "bytes" and size == 256:
            tokenizer = BytesAlone()
        else:
            tokenizer = load(name) if name in BY_SIZE.values() else from_file(name)
    except Failure as failure:
        if name != "gpt2":
            raise
        message = str(failure).replace("--vocab", "--tokenizer").rstrip(".")
        if "--tokenizer" not in message:
            message += ", or give GPT-2's vocabulary, r50k_base.tiktoken, with --tokenizer FILE"
        raise Failure(message) from None
    theirs = header.get("tokenizer_sha256")
    padded = size - 128 if not str(name).endswith(".json") else 0  # tables are padded; others pad by more
    if theirs not in (None, tokenizer.sha256) or not padded < tokenizer.vocab_size <= size:
        was = f"{header.get('tokenizer')}, sha256 {theirs[:12]}" if theirs else f"{size} ids"
        raise Failure(f"wrong tokenizer: {name} has {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256[:12]}; the "
                      f"model was trained with another ({was}). Give its vocabulary file with --tokenizer FILE")
    return tokenizer
