"""The cost of a token: ms at every context length, memory, share of the memory bound, int8, RWKV against the GPT.

    python inference/bench.py CHECKPOINT    a file, a folder, a run's name, its record's folder, latest (formats.py)
    python inference/bench.py --shape 124m  the three scripts' fineweb models with random weights, no checkpoint needed;
                                            with a CHECKPOINT before it also what int8 costs that one's model in loss
    python sample.py CHECKPOINT --bench     the same as the first

A checkpoint is held against the GPT-2 of its track (a GPT-2 against RWKV-7) with random weights, on which the time does
not depend. Everything runs in one process, on the CPU, one stream.
- A round measures everything once, in random order, so that all share the machine's noise: tokens for 5 ms to warm up,
  then for 20 ms, at least 3. ms are medians over the rounds, errors 1.2533 * 1.4826 * MAD / sqrt(rounds).
- RWKV's states come from reading text (validation data of the run, or random tokens) in pieces, for --read_seconds at
  most; a line says so where the last state has to stand in for longer contexts. The GPT's cache holds random keys and
  values, since reading 64k tokens takes it minutes; contexts whose cache would not fit half the free memory are left
  out. There is room for the tokens to come: making more of it is not timed.
- Slope: each round's least-squares line of ms against position; their median. Flat: within 2 errors of 0, or within 1 %
  of the first context's ms per 16k tokens, and 2 errors are at most 5 %. It grows or falls beyond 3 errors and 1 %.
- Bound: bytes of the weights a token reads over the bandwidth of torch's matrix-vector product (the faster of torch.mv
  and linear() of recurrent.py) on 264 MB of fp32 matrices (2688, 768), measured right before the tokens in fp32 and
  int8. Share: bound / ms, each round's, the median; not for weights below 64 MB, which may stay in caches.
- Loss: 64 pieces of the validation data of CHECKPOINT's run, token by token, the same ones in fp32 and int8.
- Memory: weights and state are each model's own; the peak is the process's, which holds all models and states at once.
Table, CSV, plot and JSON, printed as the last line too, go to bench/<run> or --out.
"""

import argparse
import importlib
import json
import os
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

import formats
import recurrent

ROOT = Path(__file__).resolve().parent.parent
NAMES = dict(train_rwkv7="RWKV-7", train_rwkv6="RWKV-6", train_gpt2="GPT-2")
FIELDS = ("model", "dtype", "position", "ms", "ms_error", "state_bytes")
POSITIONS = 1024, 4096, 16384, 65536
ROOM = 128  # tokens of the GPT's cache beyond the position
BEGIN, END = "<!-- bench: python inference/bench.py --write -->", "<!-- end of bench -->"
COLOURS = "#0072b2", "#d55e00", "#009e73"  # as in records/


def random_model(name, track):
    """The model of a script at a track's shape, random weights; the same ones every time."""
    script = importlib.import_module(name)
    kernel = {} if name == "train_gpt2" else dict(kernel="torch")
    sizes = script.TINY if track == "tiny" else {}
    config = script.Hyperparameters(**sizes, device="cpu", dtype="fp32", **kernel)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = {key: t + 0.02 * torch.randn_like(t) for key, t in script.build_model(config).state_dict().items()}
    return recurrent.FAMILIES[name](config, weights, "fp32", "cpu", None, script)


def validation(model, count):
    """Tokens of the run's validation data (at most count) and None, or random ones and the reason."""
    try:
        if not model.header.get("run"):
            raise ValueError("the model does not tell its data")
        data = Path(model.config.data)
        data = data if data.exists() else ROOT / data
        stream = model.script.TokenStream(data, "val", count)
        tokens = torch.from_numpy(stream.read(0, min(count, len(stream))))
        if len(tokens) < 1024 or tokens.max() >= model.vocab_size:
            raise ValueError(f"{model.config.data} is not the text of this model")
        return tokens, None
    except (OSError, ValueError) as error:
        return torch.randint(model.vocab_size, (count,), generator=torch.Generator().manual_seed(0)), str(error)


def names(model):
    return NAMES[model.script.__name__]


def free():
    """Bytes of memory that processes can still take; no limit where /proc does not tell."""
    info = Path("/proc/meminfo")
    return int(info.read_text().split("MemAvailable:")[1].split()[0]) * 1024 if info.exists() else float("inf")


def states(model, text, args, say):
    """[(position, state, its bytes)], the state that all of them run in, and tokens/s of prefill."""
    name, work, state, measured, done, seconds = names(model), model.new_state(), model.new_state(), [], 0, 0.0
    grows = "k" in state.tensors
    pieces = text.repeat(-(-args.positions[-1] // len(text)))[None]
    for position in args.positions[:1] if grows else args.positions:
        while done < position and seconds < args.read_seconds:
            start = time.perf_counter()
            piece = pieces[:, done:min(position, done + args.chunk)]
            model(piece, state, last=True)
            seconds, done = seconds + time.perf_counter() - start, done + piece.size(1)
        measured.append((position, state.clone(), state.bytes()))
    if grows:
        size = 2 * model.L * model.C * 4  # bytes of a token
        fit = [p for p in args.positions if p in args.positions[:2] or p * size < free() / 2]
        room = lambda t: (*t.shape[:3], fit[-1] + ROOM, model.N)
        work.tensors = {key: torch.randn(room(t)) for key, t in work.tensors.items()}
        measured = [(position, work, position * size) for position in fit]
        if len(fit) < len(args.positions):
            say(f"{name}: no memory for a cache of {', '.join(map(str, args.positions[len(fit):]))} tokens.")
    elif done < args.positions[-1]:
        say(f"{name} read {done:,} tokens in {seconds:.0f} s; that state stands in for longer contexts.")
    return measured, work, done / seconds


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
    if abs(slope) > max(3 * error, 0.01 * ms):
        return "grows" if slope > 0 else "falls"
    return "flat" if abs(slope) <= max(2 * error, 0.01 * ms) and 2 * error <= 0.05 * ms else "undecided"


def measure(jobs, rounds):
    """{name: [of every round]} for jobs {name: function that returns a measurement}, in random order each round."""
    times, order, dice = {name: [] for name in jobs}, list(jobs), random.Random(0)
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            times[name].append(jobs[name]())
    return times


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
    """A job: (bytes/s of torch.mv, of linear()) over more weights than caches hold."""
    matrices, x = torch.randn(32, 2688, 768), torch.randn(768)

    @torch.inference_mode()
    def job():
        speeds = []
        for product in (lambda W: torch.mv(W, x), lambda W: recurrent.linear(x[None], W)):
            start = time.perf_counter()
            for W in matrices.unbind():
                product(W)
            speeds.append(matrices.nbytes / (time.perf_counter() - start))
        return speeds
    return job


def losses(models, text):
    """Nats per token of two models on the same pieces, token by token, and the change."""
    T, totals = min(models[0].config.seq_len, 256), [[], []]
    pieces = text[:len(text) // (T + 1) * (T + 1)].view(-1, T + 1)[:64]
    for batch in pieces.split(16):
        for model, total in zip(models, totals):
            state, loss = model.new_state(len(batch)), torch.zeros(len(batch))
            for t in range(T):
                z = model(batch[:, t:t + 1], state)[:, 0, :model.vocab_size]
                loss += torch.nn.functional.cross_entropy(z, batch[:, t + 1], reduction="none")
            total += (loss / T).tolist()
    change = [b - a for a, b in zip(*totals)]
    return dict(fp32=statistics.mean(totals[0]), int8=statistics.mean(totals[1]), change=statistics.mean(change),
                change_error=statistics.stdev(change) / len(change) ** 0.5, pieces=len(pieces))


def bench(models, trained, args, say):
    """The result, as plain JSON. models: those timed, in fp32; trained: the checkpoint's, whose loss counts."""
    lines, speeds, slopes, jobs, rates, loss = [], [], [], {}, bandwidth(), None
    if trained:
        text, why = validation(trained, 20000)
        if why:
            say(f"Random tokens stand in for the text, loss is not measured: {why}")
        else:
            model = f"{names(trained)}, {trained.header['run']}, step {trained.step}"
            loss = dict(losses([trained, trained.quantize()], text), model=model)
    for model in models:
        name, (text, _) = names(model), validation(model, 20000)
        measured, work, rate = states(model, text, args, say)
        for position, state, size in measured:
            jobs[name, position] = token_ms(model, work, state, position)
            lines.append(dict(model=name, dtype="fp32", position=position, state_bytes=size))
        small = model.quantize()
        three = rates, *(token_ms(m, work, *measured[0][1::-1]) for m in (model, small))
        jobs[name, "speed"] = lambda three=three: [job() for job in three]
        for m in (model, small):
            speeds.append(dict(model=name, dtype=m.dtype, weight_bytes=m.weight_bytes(),
                               bytes_read=m.weight_bytes(read=True), prefill_tokens_per_s=rate if m is model else None))
    times = measure(jobs, args.rounds)
    for line in lines:
        ms = times[line["model"], line["position"]]
        line.update(ms=statistics.median(ms), ms_error=error_of(ms))
    for name in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == name]
        at = [line["position"] for line in own]
        slope, error = slope_of(at, list(zip(*(times[name, p] for p in at))))
        slopes.append(dict(model=name, ms_per_16k=slope, error=error, time=verdict(slope, error, own[0]["ms"]),
                           memory="constant" if len({line["state_bytes"] for line in own}) == 1 else "grows"))
    for row in speeds:
        rate, plain, small = zip(*times[row["model"], "speed"])
        ms = plain if row["dtype"] == "fp32" else small
        shares = [row["bytes_read"] / max(pair) * 1e3 / t for pair, t in zip(rate, ms)]
        row.update(ms=statistics.median(ms), tokens_per_s=1e3 / statistics.median(ms),
                   bound_share=statistics.median(shares) if row["bytes_read"] > 64e6 else None,
                   times_fp32=statistics.median(a / b for a, b in zip(plain, ms)))
    rate = [statistics.median(way) for way in zip(*(r for key in jobs if "speed" in key for r, _, _ in times[key]))]
    return dict(machine=models[0].script.machine("cpu")["hardware"]["name"], threads=torch.get_num_threads(),
                torch=torch.__version__, load=os.getloadavg()[0], rounds=args.rounds,
                bandwidth=dict(zip(("mv", "linear"), rate)), positions=lines, slopes=slopes, speed=speeds,
                loss=loss, peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def table(result):
    """The result in Markdown."""
    at, mb = {}, lambda n: f"{n / 1e6:,.1f}"
    for line in result["positions"]:
        at.setdefault(line["model"], []).append(line)
    positions = sorted({line["position"] for line in result["positions"]})
    out = [f"{result['machine']}, torch {result['torch']}; {result['rounds']} rounds; load {result['load']:.1f}; "
           + ", ".join(f"{way} {rate / 1e9:.1f} GB/s" for way, rate in result["bandwidth"].items())
           + f"; peak of the process, all models and states together, {mb(result['peak_rss'])} MB", "",
           " | ".join(["| fp32, ms per token at", *(f"{p / 1024:g}k" for p in positions), "slope, ms per 16k", "time",
                       "state, MB", "memory |"]),
           "|---" * (len(positions) + 5) + "|"]
    for row in result["slopes"]:
        own = at[row["model"]]
        cells = [f"{line['ms']:.2f} ± {line['ms_error']:.2f}" for line in own] + ["-"] * (len(positions) - len(own))
        slope = f"{row['ms_per_16k']:.3f} ± {row['error']:.3f}"
        sizes = [mb(line["state_bytes"]) for line in (own[:1] if row["memory"] == "constant" else own[::len(own) - 1])]
        out.append(f"| {' | '.join([row['model'], *cells, slope, row['time'], ' to '.join(sizes), row['memory']])} |")
    out += ["", "| | weights, MB | read a token, MB | ms | tokens/s | of the bound | times fp32 | prefill, tokens/s |",
            "|---" * 8 + "|"]
    for row in result["speed"]:
        share = "in cache" if row["bound_share"] is None else f"{row['bound_share']:.0%}"
        rate = f"{row['prefill_tokens_per_s']:,.0f}" if row["prefill_tokens_per_s"] else ""
        out.append(f"| {row['model']} {row['dtype']} | {mb(row['weight_bytes'])} | {mb(row['bytes_read'])} | "
                   f"{row['ms']:.2f} | {row['tokens_per_s']:.1f} | {share} | {row['times_fp32']:.2f} | {rate} |")
    verdict = "not measured, for want of a trained model and its validation data"
    if loss := result["loss"]:
        verdict = (f"{loss['model']}: fp32 {loss['fp32']:.4f}, int8 {loss['int8']:.4f}, "
                   f"change {loss['change']:+.5f} ± {loss['change_error']:.5f} nats per token")
    return "\n".join([*out, "", f"Validation loss: {verdict}."])


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
    recurrent.write(path, lambda part: figure.savefig(part, format="png"))
    pyplot.close(figure)


def write(path, text):
    recurrent.write(path, lambda part: part.write_text(text, encoding="utf-8"))


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
        (folder / "bench.png").unlink(missing_ok=True)  # of an earlier run, with other figures
        say("No plot: matplotlib is missing (pip install -r records/requirements.txt).")
    print(f"\n{folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    print(json.dumps(result))


def parse(argv):
    def count(word):
        if not word.isdecimal() or int(word) < 1:
            raise argparse.ArgumentTypeError(f"{word} is not a whole number of at least 1")
        return int(word)

    def positions(words):
        contexts = [count(word) for word in words.split(",")]
        if len(contexts) < 2 or contexts != sorted(set(contexts)):
            raise argparse.ArgumentTypeError(f"{words} is not a rising list such as 1024,4096")
        return contexts

    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message} (all flags: --help)\n")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="of a model to time")
    parser.add_argument("--shape", choices=("124m",), help="time the fineweb models, random weights")
    parser.add_argument("--positions", type=positions, default=POSITIONS,
                        help="contexts, in tokens [1024,4096,16384,65536]")
    parser.add_argument("--rounds", type=count, default=20, help="measurements of everything [20]")
    parser.add_argument("--chunk", type=count, default=512, help="tokens a piece of prefill [512]")
    parser.add_argument("--read_seconds", type=count, default=60, help="seconds of prefill a model, at most [60]")
    parser.add_argument("--threads", type=count, help="threads of torch [its own choice]")
    parser.add_argument("--out", type=Path, help="folder of table.md, bench.csv, .json, .png [bench/<run or shape>]")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also put the table between its markers there")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.shape is None:
        parser.error("give a CHECKPOINT, --shape 124m or both")
    return args


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else list(map(str, argv)))
    say = lambda line: print(line, file=sys.stderr, flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        trained = formats.load(args.checkpoint) if args.checkpoint else None
        if args.shape:
            models = [random_model(name, "fineweb") for name in NAMES]
        elif "layout" in trained.header:  # a public model: beside it none of a track's
            models = [trained]
        else:
            other = "train_rwkv7" if trained.script.__name__ == "train_gpt2" else "train_gpt2"
            models = [trained, random_model(other, trained.config.track)]
        end = min(model.positions for model in models) - ROOM
        if args.positions[-1] > end:
            args.positions = sorted({end // 4, end // 2, end})
            if args.positions[0] < 1:
                raise ValueError(f"a model of {end + ROOM} positions has no room for {ROOM} tokens after a text.")
            say(f"The model has {end + ROOM} positions: contexts of {', '.join(map(str, args.positions))} instead.")
        result = bench(models, trained, args, say)
        run = args.shape or trained.header.get("run") or Path(args.checkpoint).stem
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
