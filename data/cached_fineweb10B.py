"""Fetches FineWeb in GPT-2 tokens from the hub (dataset kjj0/fineweb10B-gpt2) into data/fineweb10B/.

    python data/cached_fineweb10B.py 18                       the val shard and the first 18 of 103 train shards
    python data/cached_fineweb10B.py                          all of them, about 20 GB
    python data/cached_fineweb10B.py --steps 3200 --bsz 512   as many as that run reads
    python data/cached_fineweb10B.py --check                  fetch nothing, read every byte of what is there

A shard gets its name only when it is whole: size, header, token ids and the hub's sha256 are right. What was found
stands in manifest.json. A second call looks at sizes and times only, fetches what is missing or damaged, and goes on
where a broken download stopped. HF_ENDPOINT (a mirror), HTTPS_PROXY, HF_TOKEN, HF_HUB_OFFLINE=1 and HF_HUB_CACHE
work as everywhere in huggingface_hub. It is plain HTTP even where hf-xet is installed, because that begins a broken
file anew. cached_fineweb100B.py shares all of this.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import os
import shutil
import sys
import threading
import time

from shards import (HEADER_BYTES, MANIFEST, SHARD_TOKENS, Damaged, Failure, OneLineParser, count_tokens, entry_of,
                    read_manifest, write_manifest, write_token_bytes)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# --------------------------------------------------------------------------------------------------------------------
# Shards

VOCAB_SIZE, DOCUMENT_MARK = 50257, 50256


def file_name(number):
    return f"fineweb_train_{number:06d}.bin" if number else "fineweb_val_000000.bin"


def scan(path, name=None):
    """Reads every byte. -> the entry of the shard (called `name`) in the manifest. Raises Damaged."""
    import numpy as np
    digest, top = hashlib.sha256(), -1
    with open(path, "rb") as f:
        stat = os.fstat(f.fileno())
        head = f.read(HEADER_BYTES)
        digest.update(head)
        tokens = count_tokens(head, stat.st_size)
        while block := f.read(1 << 22):
            digest.update(block)
            top = max(top, int(np.frombuffer(block, "<u2").max()))
    if top >= VOCAB_SIZE:
        raise Damaged(f"is damaged: it holds token id {top}, the vocabulary ends at {VOCAB_SIZE - 1}")
    return entry_of(name or os.path.basename(path), tokens, digest.hexdigest(), mtime_ns=stat.st_mtime_ns)


def unchanged(path, entry):
    """Whether size and time of a file are still those of its entry: then its bytes are taken to be, too."""
    try:
        stat = os.stat(path)
        return entry is not None and (stat.st_size, stat.st_mtime_ns) == (entry["bytes"], entry["mtime_ns"])
    except (OSError, KeyError):
        return False


class Manifest:
    """manifest.json: what the shards beside it are. One process and one thread write it."""

    def __init__(self, folder, facts):
        self.folder, self.path, self.facts = folder, os.path.join(folder, MANIFEST), facts
        self.shards, self.damaged = {}, False
        try:
            known, shards = read_manifest(folder)
        except FileNotFoundError:
            return
        except Damaged:
            self.damaged = True
            return
        if not all(isinstance(shard.get("sha256"), str) for shard in shards.values()):
            self.damaged = True
            return
        for key in facts:
            if known.get(key) != facts[key]:
                raise Failure(f"{folder} holds other shards: {key} is {known.get(key)} there, {facts[key]} here. "
                              "Name another folder with --out DIR, or delete that one.")
        self.shards = shards

    def add(self, entry):
        self.shards[entry["name"]] = entry
        names = sorted(self.shards, key=lambda name: ("_val_" not in name, name))
        write_manifest(self.folder, self.facts, [self.shards[name] for name in names], part=f"{self.path}.part")


def alone(folder):
    """Two processes must not write to the same part files. -> the lock, to be kept open."""
    lock = open(os.path.join(folder, ".lock"), "a")
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"another download into {folder} is running: let it finish, or stop it.") from None
        except OSError:
            pass  # a file system without locks
    return lock


# --------------------------------------------------------------------------------------------------------------------
# Hub

FIRST_PAUSE, LAST_PAUSE = 1, 60  # seconds between tries, doubling
FIRST_CONTACT = 2                # tries again until the server has answered once: it is more likely missing than busy
CHUNK = 1 << 20                  # bytes; at most this much of a broken connection's last part is lost


class Stopped(Exception):
    """Another shard failed for good, or the user wants to stop."""


def hub():
    """The module huggingface_hub, quiet."""
    import huggingface_hub
    import huggingface_hub.file_download
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = CHUNK  # of 10 MB
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def transport(error):
    """Whether this comes from the network: the client's library is httpx or requests, by huggingface_hub's version."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"HTTPError", "RequestException", "ConnectionError", "TimeoutError"}) or (
        isinstance(error, OSError) and error.errno is None)  # the client's consistency check


class Source:
    """The dataset on the hub, on a mirror or in the hub's cache on this disk."""

    def __init__(self, repo, retries, say):
        self.hub, self.repo, self.retries, self.say, self.answered = hub(), repo, retries, say, False
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.offline = bool(self.hub.constants.HF_HUB_OFFLINE)
        self.endpoint = self.hub.constants.ENDPOINT

    def url(self, name, revision="main"):
        return self.hub.hf_hub_url(self.repo, name, repo_type="dataset", revision=revision)

    def failure(self, name, error):
        """-> the Failure that ends a series of tries."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = " ".join(str(error).split())[:150] or type(error).__name__
        if status in (401, 403):
            return Failure(f"{name}: no access to {self.repo} at {self.endpoint} (HTTP {status}). "
                           "Set HF_TOKEN to a token that may read it.")
        if status == 404:
            return Failure(f"{self.url(name)} does not exist (HTTP 404). "
                           "If HF_ENDPOINT names a mirror: it must have this dataset.")
        if status:
            return Failure(f"{name}: HTTP {status} from {self.endpoint}. The same command later goes on from here.")
        return Failure(f"{name}: no connection to {self.endpoint} ({text}). Behind a firewall set HTTPS_PROXY, or "
                       "HF_ENDPOINT to a mirror; or copy the shards here by hand. The same command goes on from here.")

    def again(self, name, error, tries):
        """Waits before the next try, or raises the Failure if there is no sense in one."""
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        final = status is not None and status not in (408, 416, 429) and status < 500
        if final or tries > (self.retries if self.answered else min(self.retries, FIRST_CONTACT)):
            raise self.failure(name, error) from None
        pause = min(LAST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1))
        asked = str(response.headers.get("Retry-After", "")) if status == 429 else ""
        pause = max(pause, min(int(asked), 300)) if asked.isdigit() else pause
        why = f"HTTP {status}" if status else " ".join(str(error).split())[:80] or type(error).__name__
        self.say(f"{name}: {why}; again in {pause:.0f} s")
        if self.stopped.wait(pause):
            raise Stopped

    def locate(self, name):
        """-> dict(name, url, size, sha256, commit, cached): where a shard lies and what it must be, as far as known."""
        remote, tries = dict(name=name, url=None, size=None, sha256=None, commit=None, cached=None), 0
        while not self.offline:
            tries += 1
            try:
                metadata = self.hub.get_hf_file_metadata(self.url(name))
            except Exception as error:
                if not transport(error):
                    raise
                if getattr(error, "response", None) is None and self.cached(name, "main"):
                    break  # no network, but the hub's cache
                self.again(name, error, tries)
                continue
            self.answered = True
            if not metadata.commit_hash or not metadata.etag:
                raise Failure(f"{self.endpoint} does not answer as the hub does (no X-Repo-Commit or ETag for {name}): "
                              "check HF_ENDPOINT and the proxy.")
            etag = metadata.etag.lower()
            remote.update(url=self.url(name, metadata.commit_hash), size=metadata.size, commit=metadata.commit_hash,
                         sha256=etag if len(etag) == 64 and not etag.strip("0123456789abcdef") else None)
            break
        remote["cached"] = path = self.cached(name, remote["commit"] or "main")
        if not remote["url"]:
            if not path:
                raise Failure(f"HF_HUB_OFFLINE is set, and {name} is not in the hub's cache "
                              f"{self.hub.constants.HF_HUB_CACHE}. Unset it, or copy the shards here by hand.")
            blob = os.path.basename(os.path.realpath(path))  # the cache calls it by its checksum
            remote.update(size=os.path.getsize(path), sha256=blob if len(blob) == 64 else None,
                         commit=os.path.basename(os.path.dirname(path)))
        return remote

    def cached(self, name, revision):
        path = self.hub.try_to_load_from_cache(self.repo, name, repo_type="dataset", revision=revision)
        return path if isinstance(path, str) else None

    def fetch(self, remote, folder, arrived):
        """Brings one shard to its place. arrived(n): n more bytes are there (n < 0: they are gone). -> its entry."""
        name, tries = remote["name"], 0
        path, part = os.path.join(folder, name), Part(part_path(remote, folder), arrived, self.stopped)
        try:
            while True:
                before = part.size
                try:
                    if remote["cached"]:
                        part.restart()
                        with open(remote["cached"], "rb") as f:
                            shutil.copyfileobj(f, part, CHUNK)
                    else:
                        headers = dict(self.hub.utils.build_hf_headers(), **{"Accept-Encoding": "identity"})
                        self.hub.file_download.http_get(
                            remote["url"], part, resume_size=part.size, headers=headers, expected_size=remote["size"],
                            displayed_filename=name)
                    entry = verified(part.path, name, remote["sha256"])
                    break
                except Damaged as error:
                    before = part.size
                    part.restart()
                    if not remote["cached"]:
                        tries += 1
                        if tries > min(2, self.retries):
                            raise Failure(f"{remote['url']} {error}, {tries} times over. A proxy or the disk alters "
                                          "the bytes, or HF_ENDPOINT is no mirror of the hub.") from None
                    elif not remote["url"]:
                        raise Failure(f"{remote['cached']} in the hub's cache {error}. Delete it.") from None
                    remote["cached"] = None
                    self.say(f"{name} {error}; fetching it again")
                except Exception as error:
                    if not transport(error):
                        raise
                    if getattr(getattr(error, "response", None), "status_code", None) == 416:
                        part.restart()
                    tries = 1 if part.size > before else tries + 1  # while it goes forward, patience has no end
                    self.again(name, error, tries)
            part.sync()
        finally:
            part.close()
            if not os.path.getsize(part.path):
                os.remove(part.path)
        os.replace(part.path, path)
        return dict(entry, mtime_ns=os.stat(path).st_mtime_ns, commit=remote["commit"],
                    hub_checksum=bool(remote["sha256"]))


def part_path(remote, folder):
    """The part file names the checksum: parts of another version of the shard are never gone on with."""
    return os.path.join(folder, f".{remote['name']}.{(remote['sha256'] or 'unknown')[:16]}.part")


def verified(path, name, sha256):
    shard = scan(path, name)
    if sha256 and shard["sha256"] != sha256:
        raise Damaged(f"is damaged: sha256 {shard['sha256'][:12]}…, by the hub {sha256[:12]}…")
    return shard


class Part:
    """The file in which a shard grows. Unbuffered, so that all that arrived outlives even a killed process."""

    def __init__(self, path, arrived, stopped):
        self.path, self.arrived, self.stopped = path, arrived, stopped
        self.file = open(path, "ab", buffering=0)

    @property
    def size(self):
        return os.fstat(self.file.fileno()).st_size

    tell = size.fget  # for the client, which continues at the end

    def write(self, data):
        if self.stopped.is_set():
            raise Stopped
        data = memoryview(data)
        while data:
            n = self.file.write(data)
            self.arrived(n)
            data = data[n:]

    def seek(self, position):  # the client does this before truncate(), when a server ignored its Range
        self.file.seek(position)

    def truncate(self):
        size, keep = self.size, self.file.tell()
        self.file.truncate(keep)
        self.arrived(keep - size)

    def restart(self):
        self.seek(0)
        self.truncate()

    def sync(self):
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()


# --------------------------------------------------------------------------------------------------------------------
# Main

def parse(script, dataset, train_shards, doc, argv):
    def count(low, high, what):
        def convert(text):
            try:
                number = int(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}") from None
            if number < low or high and number > high:
                raise argparse.ArgumentTypeError(f"{text} {what}: {dataset} has {high}" if number > low else
                                                 f"{text} {what}: at least {low}")
            return number
        return convert

    parser = OneLineParser(script, doc)
    parser.add_argument("count", nargs="?", type=count(1, train_shards, "train shards"),
                        help=f"train shards to have, from the first on [all {train_shards}]")
    parser.add_argument("--steps", type=count(1, None, "steps"), help="work the count out: for this many steps")
    parser.add_argument("--bsz", type=count(1, None, "sequences"), default=512, help="of this many sequences [512]")
    parser.add_argument("--seq_len", type=count(1, None, "tokens"), default=1024, help="of this many tokens [1024]")
    parser.add_argument("--check", action="store_true", help="fetch nothing; read every byte of what is there, or of "
                                                             "the count asked for; status 1 if anything is wrong")
    parser.add_argument("--out", metavar="DIR", help=f"folder for the shards [data/{dataset}]",
                        default=os.path.join(os.path.dirname(os.path.abspath(__file__)), dataset))
    parser.add_argument("--jobs", type=count(1, None, "files"), default=8, help="files at once [8]")
    parser.add_argument("--retries", type=count(0, None, "tries"), default=8,
                        help="tries again after an error, without a byte in between [8: about 3 minutes]")
    args = parser.parse_args(argv)
    if args.steps:
        if args.count:
            parser.error("either a number of shards or --steps, not both")
        need = args.steps * args.bsz * args.seq_len + 1  # the last target is one further
        args.count = -(-need // SHARD_TOKENS)
        if args.count > train_shards:
            parser.error(f"--steps {args.steps} of {args.bsz} x {args.seq_len} tokens read {args.count} shards; "
                         f"{dataset} has {train_shards}")
    return args


def reading(results, count):
    """The results, under a bar: reading takes up to a second a shard."""
    from tqdm import tqdm
    return tqdm(results, "reading", count, unit="shard", leave=False, disable=not count,
                mininterval=0.2 if sys.stderr.isatty() else 10)


def check(args, dataset, manifest, say):
    """--check: reads every byte and fetches nothing. -> exit status"""
    names = [file_name(i) for i in range(args.count + 1)] if args.count else sorted(
        {name for name in os.listdir(args.out) if name.startswith("fineweb_") and name.endswith(".bin")}
        | set(manifest.shards)) if os.path.isdir(args.out) else []
    if not names:
        raise Failure(f"no shards in {args.out}. Fetch some first: python data/cached_{dataset}.py 18")

    def look(name):
        known = manifest.shards.get(name)
        try:
            return name, verified(os.path.join(args.out, name), name, None), known, None
        except FileNotFoundError:
            return name, None, known, "is missing"
        except (Damaged, OSError) as error:
            return name, None, known, str(error)

    wrong, tokens, strangers = [], 0, 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for name, entry, known, fault in reading(pool.map(look, names), len(names)):
            if entry and known and entry["sha256"] != known["sha256"]:
                fault = f"is damaged: sha256 {entry['sha256'][:12]}…, by the manifest {known['sha256'][:12]}…"
            strangers += bool(entry and not known)
            tokens += entry["tokens"] if entry and not fault else 0
            if fault:
                wrong.append(name)
                say(f"{name} {fault}")
    stranger = f"; {strangers} not in {MANIFEST}, so not held against a checksum" if strangers else ""
    if wrong:
        with alone(args.out):
            manifest = Manifest(args.out, manifest.facts)
            for name in set(wrong) & set(manifest.shards):  # no longer trusted for its size and time
                manifest.add(dict(manifest.shards[name], mtime_ns=0))
        raise Failure(f"{len(wrong)} of {len(names)} shards missing or damaged{stranger}. Without --check they are "
                      "fetched.")
    print(f"{dataset}: {len(names)} shards, {tokens:,} tokens, every byte as it should be{stranger}")
    return 0


def survey(args, names, manifest, pool, say):
    """-> (names to fetch, names that are shards but stand in no manifest). Reads only what changed."""
    missing, strangers, changed = [], [], []
    for name in names:
        path = os.path.join(args.out, name)
        if not os.path.exists(path):
            missing.append(name)
        elif not unchanged(path, manifest.shards.get(name)):
            changed.append(name)

    def look(name):
        known = manifest.shards.get(name)
        try:
            return name, known, verified(os.path.join(args.out, name), name, None), None
        except Damaged as error:
            return name, known, None, str(error)

    for name, known, entry, fault in reading(pool.map(look, changed), len(changed)):
        if entry and known and known["sha256"] == entry["sha256"]:
            manifest.add(dict(known, bytes=entry["bytes"], mtime_ns=entry["mtime_ns"]))  # copied or touched
        elif entry and not known:
            strangers.append((name, entry))
        else:
            say(f"{name} {fault or 'is not what the manifest says'}: fetching it again")
            missing.append(name)
    return sorted(missing, key=names.index), strangers


def locate_all(source, names, pool):
    """The first alone: if there is no server, one complaint is enough."""
    return [source.locate(names[0]), *pool.map(source.locate, names[1:])] if names else []


def download(args, dataset, source, remotes, manifest, pool, tqdm):
    """Fetches the shards, several at once, under one bar."""
    def part_size(one):
        path = part_path(one, args.out)
        return os.path.getsize(path) if os.path.exists(path) and not one["cached"] else 0

    total, have = sum(one["size"] or 0 for one in remotes), sum(map(part_size, remotes))
    free = shutil.disk_usage(args.out).free
    if total - have > free:
        room, fit = free + have, 0
        while fit < len(remotes) and (room := room - (remotes[fit]["size"] or 0)) >= 0:
            fit += 1
        fewer = f"fetch fewer (there is room for {fit} of these {len(remotes)} files)" if fit > 1 else "make room"
        raise Failure(f"{(total - have) / 1e9:.2f} GB to fetch, {free / 1e9:.2f} GB free in {args.out}: {fewer}, or "
                      "name a folder on a larger disk with --out DIR.")
    stale = {f".{one['name']}.": os.path.basename(part_path(one, args.out)) for one in remotes}
    for other in os.listdir(args.out):  # parts of another version of the shard
        if other.endswith(".part") and stale.get(other[:other.index(".bin.") + 5] if ".bin." in other else "",
                                                 other) != other:
            os.remove(os.path.join(args.out, other))
    cached = sum(bool(one["cached"]) for one in remotes)
    whence = source.endpoint if cached < len(remotes) else "the hub's cache"
    print(f"{dataset}: fetching {len(remotes)} files, {total / 1e9:.2f} GB, from {whence}"
          f"{f', {have / 1e6:.1f} MB of it here from an earlier try' if have else ''}", flush=True)
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1000, dynamic_ncols=True,
               mininterval=0.2 if sys.stderr.isatty() else 10, postfix=f"0/{len(remotes)} files")
    lock = threading.Lock()

    def arrived(n):
        with lock:
            bar.update(n)

    pending = {pool.submit(source.fetch, one, args.out, arrived) for one in remotes}
    try:
        for done, future in enumerate(concurrent.futures.as_completed(pending), 1):
            manifest.add(future.result())
            bar.set_postfix_str(f"{done}/{len(remotes)} files")
    finally:
        bar.close()


def explain(error, out):
    """A full disk and the like, in one line."""
    return Failure(f"cannot read or write {error.filename or out}: {error.strerror or error}. Make room or set "
                   "permissions, or name another folder with --out DIR; the same command goes on from here.")


def fetch(args, dataset, repo, train_shards, manifest, say):
    from tqdm import tqdm
    names = [file_name(i) for i in range((args.count or train_shards) + 1)]
    start, pool, source = time.perf_counter(), concurrent.futures.ThreadPoolExecutor(args.jobs), None
    try:
        if manifest.damaged:
            say(f"{manifest.path} is damaged: reading every shard")
        missing, strangers = survey(args, names, manifest, pool, say)
        if missing or strangers:
            source = Source(repo, args.retries, say)
        for name, entry in strangers:  # copied here by hand
            remote = source.locate(name) if not source.offline else dict(sha256=None, commit=None)
            if remote["sha256"] in (None, entry["sha256"]):
                manifest.add(dict(entry, commit=remote["commit"], hub_checksum=bool(remote["sha256"])))
            else:
                say(f"{name} is not the hub's (another sha256): fetching it again")
                missing.append(name)
        if missing:
            remotes = locate_all(source, sorted(missing, key=names.index), pool)
            download(args, dataset, source, remotes, manifest, pool, tqdm)
    finally:
        if source:
            source.stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
    tokens = sum(manifest.shards[name]["tokens"] for name in names)
    what = (f"{len(missing)} files fetched in {time.perf_counter() - start:.0f} s, the others were there"
            if 0 < len(missing) < len(names) else f"fetched in {time.perf_counter() - start:.0f} s" if missing else
            "intact, nothing to fetch")
    print(f"{dataset}: {len(names) - 1} train shards and the val shard, {tokens:,} tokens in {args.out}: {what}")


def main(dataset, repo, train_shards, doc, argv=None):
    script, folder = f"cached_{dataset}.py", os.path.dirname(os.path.abspath(__file__))
    args = parse(script, dataset, train_shards, doc, argv)
    try:
        try:
            from tokenizer import GPT2_SHA256
            from tqdm import tqdm
            say = functools.partial(tqdm.write, file=sys.stderr)
            facts = dict(dataset=dataset, source=repo, tokenizer="gpt2", tokenizer_sha256=GPT2_SHA256,
                         vocab_size=VOCAB_SIZE, document_mark=DOCUMENT_MARK)
            if args.check:
                return check(args, dataset, Manifest(args.out, facts), say)
            os.makedirs(args.out, exist_ok=True)
            with alone(args.out):
                fetch(args, dataset, repo, train_shards, Manifest(args.out, facts), say)
                with open(os.path.join(folder, "gpt2_token_bytes.u8"), "rb") as f:
                    write_token_bytes(args.out, f.read())
                return 0
        except ImportError as error:
            raise Failure(f"{error.name or error} is missing in {sys.executable}. Call .venv/bin/python instead "
                          "(./test.sh makes it), or: pip install -r requirements.txt") from None
        except OSError as error:
            raise explain(error, args.out) from None
    except Failure as failure:
        print(f"{script}: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def leave(status):
    """The end, without waiting for threads that wait for the network. Nothing is lost: parts are unbuffered."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main("fineweb10B", "kjj0/fineweb10B-gpt2", 103, __doc__))
