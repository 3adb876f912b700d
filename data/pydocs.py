"""Makes data/pydocs/, a small English corpus, without network: the text that ships inside Python itself.

    python data/pydocs.py              build, or say that everything is intact
    python data/pydocs.py --force      build anew
    python data/pydocs.py --out DIR    somewhere else

Sources: the help topics (pydoc_data/topics.py) and every docstring of the standard library, read with ast; nothing
is imported or executed. Needs Python 3.10 or newer and no package, so it runs before anything is installed.
The text differs a little between Python versions: compare losses only between runs on one fingerprint (manifest.json).
"""

import array
import hashlib
import os
import sys
import sysconfig
import time

from shards import (HEADER_BYTES, TOKEN_BYTES, Damaged, Failure, OneLineParser, entry_of, header, read_manifest,
                    sha256_of, write, write_manifest, write_token_bytes)

# --------------------------------------------------------------------------------------------------------------------
# Choices

DOCUMENT_MARK = 256         # first token of every document; tokens 0..255 are the bytes of the text in UTF-8
TOKENIZER_SHA256 = "e66088df4cdb28fbad3c55ac5a7ae741bc402e732ed948eb096a8ed6f852768f"  # tokenizer.py says of what
MIN_DOCSTRING = 32          # characters; what is shorter ("Return the name.") is mostly boilerplate
MIN_DOCUMENT = 256          # bytes; a document should fill the context of the tiny track once
MIN_REPEAT = 64             # characters; a paragraph this long is kept once in the whole corpus
MIN_TEXT = 500_000          # bytes; less means that this Python came without its sources
MIN_VAL = 64 * 1024         # tokens
VAL_FRACTION = 0.1
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
TRAIN, VAL = "pydocs_train_000001.bin", "pydocs_val_000000.bin"


def python_version():
    return "%d.%d.%d" % sys.version_info[:3]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Text

def source_files(stdlib):
    """[(name with forward slashes, path)] in one order on every file system."""
    files = []
    for folder, folders, names in os.walk(stdlib):
        folders[:] = [f for f in folders if f not in SKIP]
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                files.append((os.path.relpath(path, stdlib).replace(os.sep, "/"), path))
    return sorted(files)


def docstrings(tree):
    """The docstrings of a module, its classes, functions and methods, in the order of the source."""
    import ast
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    may_hold_more = (ast.stmt, ast.excepthandler, ast.match_case)  # expressions hold no definitions: skipped for speed
    texts, stack = [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, documented):
            texts.append(ast.get_docstring(node) or "")  # cleaned as inspect.cleandoc does
        stack += reversed([child for child in ast.iter_child_nodes(node) if isinstance(child, may_hold_more)])
    return texts


def topics(tree):
    """{name: text} of pydoc_data/topics.py: one dictionary literal."""
    import ast
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            return {key.value: value.value for key, value in zip(node.value.keys, node.value.values)}
    return {}


def paragraphs(text):
    """Blocks between blank lines, without trailing blanks and what no terminal shows (NUL, lone surrogates)."""
    text = "".join(c for c in text.expandtabs() if c.isprintable() or c == "\n")
    block, lines = [], [line.rstrip() for line in text.split("\n")]
    for line in lines + [""]:
        if line:
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []


def documents(stdlib):
    """-> ({name: text}, number of source files with text, fingerprint of those files).

    One document a help topic and one a module. A module's document is its docstrings in source order with a blank
    line between and no headings: most docstrings are far shorter than the model's context, and next to each other
    they give it a subject to stay on, where a name and a signature would only add code to the English.

    Topics hold one another ("compound" holds "if" and "while"), and methods repeat the docstrings they override.
    So a long paragraph stays where it is met first, the longest topics going first: what they contain vanishes as a
    topic of its own, and no such paragraph is in both train and val.
    """
    import ast
    import warnings
    raw, modules, files, fingerprint = {}, {}, 0, hashlib.sha256()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        for name, path in source_files(stdlib):
            try:
                with open(path, "rb") as f:
                    source = f.read()
                tree = ast.parse(source)
            except (OSError, SyntaxError, ValueError):
                continue  # unreadable, or not this Python's syntax
            if name == "pydoc_data/topics.py":
                texts = raw = {f"topic {key}": [text] for key, text in topics(tree).items()}
            else:
                texts = modules[f"module {name}"] = [text for text in docstrings(tree) if len(text) >= MIN_DOCSTRING]
            if texts:
                files += 1
                fingerprint.update(f"{name} {len(source)}\n".encode() + source)
    order = sorted(raw, key=lambda name: (-len(raw[name][0]), name)) + list(modules)
    raw.update(modules)

    seen, docs = set(), {}
    for name in order:
        kept = []
        for text in raw[name]:
            for paragraph in paragraphs(text):
                key = " ".join(paragraph.split())
                if len(key) < MIN_REPEAT or key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
        text = "\n\n".join(kept) + "\n"
        if len(text.encode()) >= MIN_DOCUMENT:
            docs[name] = text
    return docs, files, fingerprint.hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Shards

def split(docs):
    """-> {"train": [text], "val": [text]}, shuffled.

    The order is by sha256 of the document's name, not of its text, so that nearly the same documents are held out
    under every Python version. Documents longer than an eighth of the goal always train: no module dominates val.
    """
    size = {name: len(text.encode()) + 1 for name, text in docs.items()}
    goal = max(int(VAL_FRACTION * sum(size.values())), MIN_VAL)
    parts, held_out = {"train": [], "val": []}, 0
    for name in sorted(docs, key=lambda name: sha256(name.encode())):
        val = held_out < goal and size[name] <= goal // 8
        held_out += size[name] if val else 0
        parts["val" if val else "train"].append(docs[name])
    return parts


def shard(texts):
    """The bytes of a shard of these documents."""
    tokens = array.array("H")
    for text in texts:
        tokens.append(DOCUMENT_MARK)
        tokens.extend(text.encode())
    count = len(tokens)
    if sys.byteorder == "big":
        tokens.byteswap()
    return header(count) + tokens.tobytes()


# --------------------------------------------------------------------------------------------------------------------
# Main

def builder():
    """Names this program, so that a corpus made by an older one is made anew."""
    with open(os.path.abspath(__file__), "rb") as f:
        return sha256(f.read().replace(b"\r\n", b"\n"))


def stale(out):
    """Why the corpus in `out` must be made, or "" if it is intact; its facts, its shards (None without a manifest)."""
    try:
        facts, listed = read_manifest(out)
        if facts["python"] != python_version():
            return f"was made by Python {facts['python']}, this is {python_version()}", facts, listed
        if facts["builder"] != builder():
            return "was made by another version of pydocs.py", facts, listed
        if list(listed) != [TRAIN, VAL]:
            return "has a manifest of other shards", facts, listed
        for name in (TOKEN_BYTES, TRAIN, VAL):
            if not os.path.exists(os.path.join(out, name)):
                return f"lacks {name}", facts, listed
        for name, shard in listed.items():
            if sha256_of(os.path.join(out, name)) != shard["sha256"]:
                return f"is damaged: {name} is not what the manifest says", facts, listed
    except FileNotFoundError:
        return "is not there yet", None, None
    except (OSError, Damaged, KeyError):
        return "has no readable manifest", None, None
    return "", facts, listed


def build(stdlib, out):
    """Reads the library, writes the two shards and, last, the manifest. -> (facts, {name: entry}) of it"""
    docs, files, fingerprint = documents(stdlib)
    parts = split(docs)
    shards = {TRAIN: shard(parts["train"]), VAL: shard(parts["val"])}
    listed = {}
    for name, data in shards.items():
        listed[name] = entry_of(name, (len(data) - HEADER_BYTES) // 2, sha256(data))
    text = sum(shard["tokens"] for shard in listed.values()) - len(docs)
    if text < MIN_TEXT or listed[VAL]["tokens"] < MIN_VAL:
        raise Failure(f"only {text} bytes of text in {stdlib}, {MIN_TEXT} needed: this Python lacks its sources. "
                      "Install its full standard library (Debian: libpython3-stdlib) or use another Python.")
    facts = dict(
        dataset="pydocs", tokenizer="bytes", tokenizer_sha256=TOKENIZER_SHA256, vocab_size=257,
        document_mark=DOCUMENT_MARK, python=python_version(), files=files, documents=len(docs),
        fingerprint=fingerprint, builder=builder())
    try:
        os.makedirs(out, exist_ok=True)
        for name, data in shards.items():
            write(os.path.join(out, name), data)
        write_token_bytes(out, [1] * 256 + [0])
        write_manifest(out, facts, list(listed.values()))
    except OSError as error:
        reason = error.strerror or error
        raise Failure(f"cannot write {out}: {reason}. Name a writable folder with --out DIR.") from None
    return facts, listed


def main():
    folder = os.path.dirname(os.path.abspath(__file__))
    parser = OneLineParser("pydocs.py", __doc__)
    parser.add_argument("--out", default=os.path.join(folder, "pydocs"), metavar="DIR", help="its folder [data/pydocs]")
    parser.add_argument("--force", action="store_true", help="build even if everything is intact")
    args = parser.parse_args()
    start = time.perf_counter()
    why, facts, listed = stale(args.out)
    if why or args.force:
        if facts and why:
            print(f"pydocs: {args.out} {why}: making it anew", flush=True)
        try:
            facts, listed = build(sysconfig.get_path("stdlib"), args.out)
        except Failure as failure:
            print(f"pydocs: {failure}", file=sys.stderr)
            return 1
    train, val = (shard["tokens"] for shard in listed.values())
    done = f"{time.perf_counter() - start:.1f} s" if why or args.force else "intact"
    print(f"pydocs: {facts['documents']} documents, {train} train and {val} val tokens (bytes), "
          f"Python {facts['python']}, {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
