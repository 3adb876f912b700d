"""Speed of data/text.py against `cat` into a file (bytes) and against tiktoken alone (gpt2), in turns, in one run.

    python dev/bench_text.py big.txt                          seconds of wall clock and of processor, and their ratios
    python dev/bench_text.py big.txt --vocab r50k_base.tiktoken

cat copies within the kernel; "cat | cat" moves the bytes through a program, as any tokenizer must. text.py writes two
bytes for each. tiktoken alone: the documents, already in memory, through encode_ordinary; both then on one core.
"""

import argparse
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "data"))
import text
import tokenizer


def measure(*command, **options):
    """-> (seconds, processor seconds) of a process."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, **{"stdout": subprocess.DEVNULL, **options})
    wall, after = time.perf_counter() - start, os.times()
    return wall, sum(after[2:4]) - sum(before[2:4])


def bare(path, vocab):
    """-> (seconds, processor seconds) of tiktoken's own encoding of a text's documents."""
    bpe = tokenizer.load("gpt2", vocab).bpe
    documents = path.read_bytes().decode(errors="replace").split("<|endoftext|>")
    wall, processor = time.perf_counter(), time.process_time()
    for document in documents:
        bpe.encode_ordinary(document)
    return time.perf_counter() - wall, time.process_time() - processor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="text to read, some 100 MB")
    parser.add_argument("--vocab", help="measure gpt2 with this vocabulary file instead of bytes")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all contestants [5]")
    args = parser.parse_args()
    times, names = {}, ("tiktoken alone", "text.py gpt2") if args.vocab else ("cat", "cat | cat", "text.py bytes")
    if args.vocab:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    with tempfile.TemporaryDirectory(dir=args.file.parent) as folder:
        out, copy = pathlib.Path(folder, "out"), pathlib.Path(folder, "copy")
        program = [sys.executable, text.__file__, args.file, "--by", "tail", "--out", out]
        for _ in range(args.rounds):
            if args.vocab:
                results = bare(args.file, args.vocab), measure(*program, "--tokenizer", "gpt2", "--vocab", args.vocab)
            else:
                paths, cats = [shlex.quote(str(path)) for path in (args.file, copy)], []
                for command in ("cat {} > {}", "cat {} | cat > {}"):
                    cats.append(measure("sh", "-c", command.format(*paths)))
                    copy.unlink()
                results = *cats, measure(*program)
            shutil.rmtree(out)
            for name, seconds in zip(names, results):
                times.setdefault(name, []).append(seconds)
    size = args.file.stat().st_size / 1e6
    for name in names:
        wall, processor = (statistics.median(seconds[i] for seconds in times[name]) for i in (0, 1))
        print(f"{name:15} {wall:6.2f} s, {processor:6.2f} s of processor, {size / wall:7.1f} MB/s")
    for name, other in ((name, names[-1]) for name in names[:-1]):
        for i, what in enumerate(("wall clock", "processor")):
            ratios = [a[i] / b[i] for a, b in zip(times[name], times[other])]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}, n = {args.rounds}"
            print(f"speed of {other} / {name} by {what}: {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
