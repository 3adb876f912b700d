"""The cost of a token: ms at every context length, memory, share of the memory bound, int8, RWKV against the GPT.

    python bench.py CHECKPOINT            a step's folder, a run's, a record's, the word latest, a file (recurrent.py)
    python bench.py --shape 124m          the three scripts' fineweb models with random weights; no checkpoint needed
    python sample.py CHECKPOINT --bench   the same

A checkpoint is held against the GPT-2 of its track (a GPT-2 against RWKV-7) with random weights: the time does not
depend on them. How it is measured, on one CPU process, one stream:
- A round does every measurement once, in random order, so that all share the machine's noise: tokens for 5 ms to warm
  up, then for 20 ms, at least 3. ms are medians over the rounds; errors are 1.2533 * 1.4826 * MAD / sqrt(rounds).
- RWKV's states come from reading the text (validation data of the run; random tokens without it) by chunked prefill,
  for at most --read_seconds; beyond that the last state stands in, and a line says so. The GPT's cache is full of random
  keys and values, since reading 64k tokens takes minutes; room for the next tokens is there, so that no growth is timed.
- Slope: every round gives a least-squares line of ms against position; the slope is the rounds' median.
- Flat: |slope| within 2 errors of 0, or below 1 % of the first position's ms per 16k tokens; undecided if those 2
  errors are more than 5 %. Memory constant: the same bytes of state at every position.
- Bound: bytes of the weights a token reads / bandwidth of the faster of torch.mv and recurrent.py's linear() on 256 MB
  of fp32 matrices (2688, 768), in every round. Share: bound / ms, of each round, the median. Weights of a tiny model
  stay in the caches; its share says nothing and is not printed.
- Loss: 64 pieces of the validation data, one token after the other, fp32 and int8 on the same ones.
Table, CSV, JSON (the last line printed too) and plot go to bench/<run> or --out.
"""

import argparse
import importlib
import json
import os
import platform
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

import recurrent

NAMES = dict(train_rwkv7="RWKV-7", train_rwkv6="RWKV-6", train_gpt2="GPT-2")
FAMILIES = dict(train_rwkv7=recurrent.RWKV7, train_rwkv6=recurrent.RWKV6, train_gpt2=recurrent.GPT2)
FIELDS = ("model", "dtype", "position", "ms", "ms_error", "state_bytes", "rss_bytes")
POSITIONS = 1024, 4096, 16384, 65536
ROOM = 128  # tokens of the GPT's cache beyond the position
BEGIN, END = "<!-- bench: python bench.py --write -->", "<!-- end of bench -->"
COLOURS = "#0072b2", "#d55e00", "#009e73"  # as in records/

# ----------------------------------------------------------------------------------------------------------------------
# Models and states


def random_model(name, track):
    """The model of a script at a track's shape, random weights; the same ones every time."""
    script = importlib.import_module(name)
    kernel = {} if name == "train_gpt2" else dict(kernel="torch")
    config = script.Hyperparameters(track=track, device="cpu", dtype="fp32", **kernel)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = {key: t + 0.02 * torch.randn_like(t) for key, t in script.build_model(config).state_dict().items()}
    return FAMILIES[name](config, weights, "fp32", "cpu", None, script)


def validation(model, count):
    """Tokens of the run's validation data (at most count) and None, or random ones and the reason."""
    try:
        stream = model.script.TokenStream(model.config.data, "val", count, "The bench's text", repeat=0)
        tokens = torch.from_numpy(stream.read(0, min(count, len(stream))))
        if len(tokens) < 1024 or tokens.max() >= model.vocab_size:
            raise ValueError(f"{model.config.data} is not the text of this model")
        return tokens, None
    except (OSError, ValueError) as error:
        return torch.randint(model.vocab_size, (count,), generator=torch.Generator().manual_seed(0)), str(error)


def rss():
    """Bytes of memory this process holds now; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def states(model, text, args, say):
    """[(position, state, bytes, rss)] and the tokens/s of reading."""
    kinds, seconds, done, found = model.new_state(), 0.0, 0, []
    if "k" in kinds.tensors:
        room = args.positions[-1] + ROOM
        cache = {key: torch.randn(t.shape[:3] + (room, model.N), dtype=t.dtype) for key, t in kinds.tensors.items()}
        for position in args.positions:
            used = 2 * cache["k"][..., :position, :].numel() * cache["k"].element_size()
            found.append((position, recurrent.State(cache, position), used, rss()))
    state, pieces = model.new_state(), text.repeat(-(-args.positions[-1] // len(text)))[None]
    for position in args.positions[:1] if found else args.positions:
        while done < position and seconds < args.read_seconds:
            piece = pieces[:, done:min(position, done + args.chunk)]
            start = time.perf_counter()
            model(piece, state, last=True)
            seconds, done = seconds + time.perf_counter() - start, done + piece.size(1)
        if "wkv" in state.tensors:
            found.append((position, state.clone(), state.bytes(), rss()))
    if done < args.positions[-1] and "wkv" in state.tensors:
        say(f"{NAMES[model.script.__name__]} read {done:,} tokens in {seconds:.0f} s; that state stands in further on.")
    return found, done / seconds


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def error_of(values):
    """Standard error of a median, from the median absolute deviation: a busy machine's outliers do not count."""
    middle = statistics.median(values)
    return 1.2533 * 1.4826 * statistics.median(abs(v - middle) for v in values) / len(values) ** 0.5


def slope_of(positions, rounds):
    """ms per 16k tokens: the median over the rounds of each one's least-squares slope, and its error."""
    mean = statistics.mean(positions)
    square = sum((p - mean) ** 2 for p in positions)
    slopes = [16384 * sum((p - mean) * ms for p, ms in zip(positions, row)) / square for row in rounds]
    return statistics.median(slopes), error_of(slopes)


def verdict(slope, error, ms):
    """flat, grows, falls or undecided; the rule is in the docstring above."""
    if abs(slope) > max(2 * error, 0.01 * ms):
        return "grows" if slope > 0 else "falls"
    return "flat" if 2 * error <= 0.05 * ms else "undecided"


def measure(jobs, rounds):
    """{name: [of every round]} for jobs {name: function that returns a measurement}, in random order each round."""
    found, order, dice = {name: [] for name in jobs}, list(jobs), random.Random(0)
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            found[name].append(jobs[name]())
    return found


def token_ms(model, state, kept, position):
    """A job: ms per token at a position. state: where all positions of a model run; kept: what it starts from."""
    def run(least, seconds):
        start, tokens, passed = time.perf_counter(), 0, 0.0
        while tokens < least or (passed < seconds and tokens < ROOM // 2):
            model(torch.tensor([[tokens]]), state)
            tokens, passed = tokens + 1, time.perf_counter() - start
        return passed / tokens * 1e3

    def job():
        if kept is not state:
            for key, t in kept.tensors.items():
                state.tensors[key].copy_(t)
        state.position = position
        run(1, 0.005)
        return run(3, 0.02)
    return job


def bandwidth():
    """A job: bytes/s of a matrix-vector product over more weights than caches hold, the faster of two ways."""
    matrices, x = torch.randn(32, 2688, 768), torch.randn(768)

    def job():
        best = 0.0
        for product in (lambda W: torch.mv(W, x), lambda W: recurrent.linear(x[None], W)):
            with torch.inference_mode():
                start = time.perf_counter()
                for W in matrices.unbind():
                    product(W)
                best = max(best, matrices.nbytes / (time.perf_counter() - start))
        return best
    return job


def losses(models, text):
    """Nats per token of every model over the same pieces, token by token, one number a piece."""
    T = min(models[0].config.seq_len, 256)
    pieces, totals = text[:len(text) // (T + 1) * (T + 1)].view(-1, T + 1)[:64], [[] for _ in models]
    for batch in pieces.split(16):
        for model, total in zip(models, totals):
            state, loss = model.new_state(len(batch)), torch.zeros(len(batch))
            for t in range(T):
                z = model(batch[:, t:t + 1], state)[:, 0, :model.vocab_size]
                loss += torch.nn.functional.cross_entropy(z, batch[:, t + 1], reduction="none")
            total += (loss / T).tolist()
    return totals


def bench(models, args, say):
    """The result, as plain JSON. models: fp32; the first is the one the bench is about without --shape."""
    lines, speeds, jobs, every = [], [], dict(bandwidth=bandwidth()), {}
    for model in models:
        name = NAMES[model.script.__name__]
        text, why = validation(model, max(20000, args.positions[0]))
        if why and model is models[0] and not args.shape:
            say(f"Random tokens stand in for the text: {why}")
        every[name, "fp32"], every[name, "int8"] = model, model.quantize()
        found, rate = states(model, text, args, say)
        work = found[0][1] if "k" in found[0][1].tensors else model.new_state()
        for position, state, size, held in found:
            jobs[name, "fp32", position] = token_ms(model, work, state, position)
            lines.append(dict(model=name, dtype="fp32", position=position, state_bytes=size, rss_bytes=held))
        jobs[name, "int8", args.positions[0]] = token_ms(every[name, "int8"], work, *found[0][1::-1])
        for dtype in ("fp32", "int8"):
            m = every[name, dtype]
            speeds.append(dict(model=name, dtype=dtype, weight_bytes=m.weight_bytes(), bytes_read=m.weight_bytes(True),
                               prefill_tokens_per_s=rate if dtype == "fp32" else None))
    times = measure(jobs, args.rounds)
    for line in lines:
        ms = times[line["model"], line["dtype"], line["position"]]
        line.update(ms=statistics.median(ms), ms_error=error_of(ms))
    slopes = []
    for name in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == name]
        slope, error = slope_of(args.positions, zip(*(times[name, "fp32", p] for p in args.positions)))
        constant = len({line["state_bytes"] for line in own}) == 1
        slopes.append(dict(model=name, ms_per_16k=slope, error=error, memory="constant" if constant else "grows",
                           time=verdict(slope, error, own[0]["ms"])))
    for row in speeds:
        ms, plain = (times[row["model"], dtype, args.positions[0]] for dtype in (row["dtype"], "fp32"))
        row.update(ms=statistics.median(ms), tokens_per_s=1e3 / statistics.median(ms),
                   times_fp32=statistics.median(a / b for a, b in zip(plain, ms)))
        bounds = [row["bytes_read"] / rate * 1e3 for rate in times["bandwidth"]]
        big = row["bytes_read"] > 64e6
        row["bound_share"] = statistics.median(b / t for b, t in zip(bounds, ms)) if big else None
    loss = None
    if not args.shape:
        text, why = validation(models[0], 20000)
        if why is None:
            a, b = losses([models[0], every[NAMES[models[0].script.__name__], "int8"]], text)
            change = [y - x for x, y in zip(a, b)]
            loss = dict(fp32=statistics.mean(a), int8=statistics.mean(b), change=statistics.mean(change),
                        change_error=statistics.stdev(change) / len(change) ** 0.5, pieces=len(a))
    return dict(machine=dict(cpu=cpu(), threads=torch.get_num_threads(), torch=torch.__version__,
                             load=os.getloadavg()[0]),
                rounds=args.rounds, bandwidth=statistics.median(times["bandwidth"]), positions=lines, slopes=slopes,
                speed=speeds, loss=loss, peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def cpu():
    try:
        return next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------------------------------
# Showing


def table(result):
    """The result in Markdown."""
    at, machine, mb = {}, result["machine"], lambda n: f"{n / 1e6:,.1f}"
    for line in result["positions"]:
        at.setdefault(line["model"], []).append(line)
    heads = [f"{line['position'] / 1024:g}k" for line in next(iter(at.values()))]
    out = [f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; medians of {result['rounds']} rounds"
           f"; load {machine['load']:.1f}; matrix-vector product {result['bandwidth'] / 1e9:.1f} GB/s; "
           f"process at most {mb(result['peak_rss'])} MB", "",
           f"| fp32, ms per token at | {' | '.join(heads)} | slope, ms per 16k | time | state, MB | memory |",
           "|---" * (len(heads) + 5) + "|"]
    for row in result["slopes"]:
        own = at[row["model"]]
        sizes = [mb(line["state_bytes"]) for line in (own[:1] if row["memory"] == "constant" else (own[0], own[-1]))]
        out.append(f"| {row['model']} | {' | '.join('{ms:.2f} ± {ms_error:.2f}'.format(**line) for line in own)} | "
                   f"{row['ms_per_16k']:.3f} ± {row['error']:.3f} | {row['time']} | {' to '.join(sizes)} | "
                   f"{row['memory']} |")
    out += ["", "| | weights, MB | read a token, MB | ms | tokens/s | of the bound | times fp32 | prefill, tokens/s |",
            "|---" * 8 + "|"]
    for row in result["speed"]:
        share = "in cache" if row["bound_share"] is None else f"{row['bound_share']:.0%}"
        rate = f"{row['prefill_tokens_per_s']:,.0f}" if row["prefill_tokens_per_s"] else ""
        out.append(f"| {row['model']} {row['dtype']} | {mb(row['weight_bytes'])} | {mb(row['bytes_read'])} | "
                   f"{row['ms']:.2f} | {row['tokens_per_s']:.1f} | {share} | {row['times_fp32']:.2f} | {rate} |")
    said = "not measured (no validation data of a trained model)"
    if loss := result["loss"]:
        said = (f"fp32 {loss['fp32']:.4f}, int8 {loss['int8']:.4f}, change {loss['change']:+.5f} ± "
                f"{loss['change_error']:.5f} nats per token")
    return "\n".join([*out, "", f"Validation loss: {said}."])


def plot(result, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), dpi=110)
    for name, colour in zip(dict.fromkeys(line["model"] for line in result["positions"]), COLOURS):
        own = [line for line in result["positions"] if line["model"] == name]
        x = [line["position"] for line in own]
        axes[0].errorbar(x, [line["ms"] for line in own], [line["ms_error"] for line in own], marker="o", markersize=4,
                         capsize=3, color=colour, label=name)
        axes[1].plot(x, [line["state_bytes"] / 1e6 for line in own], marker="o", markersize=4, color=colour)
    for axis, label in zip(axes, ("ms per token", "state, MB")):
        axis.set(xscale="log", xlabel="context, tokens", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def write(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def into(path, text):
    """Put text between the markers of a file."""
    page = path.read_text(encoding="utf-8")
    if not (page.count(BEGIN) == page.count(END) == 1 and page.index(BEGIN) < page.index(END)):
        raise ValueError(f"{path} needs the lines {BEGIN} and {END} once each, in this order")
    write(path, f"{page.split(BEGIN)[0]}{BEGIN}\n{text}\n{END}{page.split(END)[1]}")


def show(result, folder, say):
    """Write table.md, bench.csv, bench.json and bench.png into the folder; print the table and the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "table.md", table(result) + "\n")
    write(folder / "bench.json", json.dumps(result) + "\n")
    write(folder / "bench.csv", "".join(f"{','.join(map(str, row))}\n" for row in (
        FIELDS, *([line[field] for field in FIELDS] for line in result["positions"]))))
    print(table(result), flush=True)
    try:
        plot(result, folder / "bench.png")
    except ImportError:
        say("No plot: matplotlib is missing (pip install -r records/requirements.txt).")
    print(f"\n{folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    print(json.dumps(result))


def parse(argv):
    def count(low):
        def read(word):
            if not word.isdecimal() or int(word) < low:
                raise argparse.ArgumentTypeError(f"{word} is not a whole number of at least {low}")
            return int(word)
        return read

    def positions(words):
        found = [count(1)(word) for word in words.split(",")]
        if len(found) < 2 or found != sorted(set(found)):
            raise argparse.ArgumentTypeError(f"{words} is not a rising list such as 1024,4096")
        return found

    parser = argparse.ArgumentParser("bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message} (all flags: python bench.py --help)\n")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT")
    parser.add_argument("--shape", choices=("124m",), help="random weights of the fineweb models, no checkpoint")
    parser.add_argument("--positions", type=positions, default=POSITIONS, help="tokens [1024,4096,16384,65536]")
    parser.add_argument("--rounds", type=count(3), default=20, help="measurements of everything [20]")
    parser.add_argument("--chunk", type=count(2), default=512, help="tokens a piece of prefill [512]")
    parser.add_argument("--read_seconds", type=count(1), default=60, help="of prefill, at most, a model [60]")
    parser.add_argument("--threads", type=count(1), help="of torch [its own choice]")
    parser.add_argument("--out", type=Path, help="folder of table.md, bench.csv, .json, .png [bench/<run or shape>]")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"also put the table there, between {BEGIN} and {END}")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.shape is None):
        parser.error("give a CHECKPOINT or --shape 124m")
    return args


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else list(map(str, argv)))
    say = lambda line: print(line, file=sys.stderr, flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        if args.shape:
            models = [random_model(name, "fineweb") for name in NAMES]
        else:
            mine = recurrent.load(args.checkpoint)
            other = "train_rwkv7" if mine.script.__name__ == "train_gpt2" else "train_gpt2"
            models = [mine, random_model(other, mine.config.track)]
        result = bench(models, args, say)
        run = args.shape or models[0].about.get("run") or Path(args.checkpoint).stem
        show(result, args.out or Path("bench") / run, say)
        if args.write:
            into(args.write, table(result))
        return 0
    except (OSError, ValueError) as error:
        say(f"bench.py: {error}")
        return 1
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
