"""A stand-in for a training script in races: no torch, milliseconds, losses drawn from the seed and its flags.

    python tests/contestant.py --random_seed 1 --name a_seed1 --records DIR [--level 1.5] [--noise 0.01] [--die SEED]

It writes the record of a run of four steps with a validation at each. --die SEED: fails on that seed; --hang: waits to
be interrupted after its log began, unless the file named by it exists; --val: another validation set.
"""
import argparse
import json
import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path

STEPS, TOKENS = 4, 100


def main():
    parser = argparse.ArgumentParser()
    for name, kind, default in (
            ("random_seed", int, 0), ("name", str, ""), ("records", str, ""), ("track", str, "tiny"), ("hang", str, ""),
            ("level", float, 1.5), ("noise", float, 0.01), ("speed", float, 10.0), ("die", int, -1), ("val", str, "v")):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.level <= 0:
        sys.exit("contestant.py: --level must be positive")
    if args.check:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # a contestant's noise is its own: by its name, which is its place in the race, and the seed
    rng = random.Random(f"{args.name} {args.random_seed}")
    stamp = f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}_contestant_{args.name}"
    folder = Path(args.records) / stamp
    folder.mkdir(parents=True)
    config = dict(track=args.track, name=args.name, random_seed=args.random_seed, bsz=1, seq_len=TOKENS, steps=STEPS,
                  val_every=1, dtype="fp32", level=args.level, records=args.records)
    end = args.level + args.noise * rng.gauss(0, 1)
    speed = args.speed * (1 + 0.01 * rng.gauss(0, 1))
    curve = [dict(step=step, val_loss=end + 2 * (STEPS - step) / STEPS, train_ms=1e3 * speed * step / STEPS,
                  tokens=TOKENS * step) for step in range(STEPS + 1)]
    with open(folder / "log.txt", "w", encoding="utf-8", buffering=1) as log:
        print(f"config: {json.dumps(config)}\ncommand: {' '.join(sys.argv)}", file=log)
        for point in curve:
            step, time_ = point["step"], f"train_time:{point['train_ms']:.0f}ms step_avg:1.00ms"
            if step:
                print(f"step:{step}/{STEPS} train_loss:{point['val_loss']:.4f} {time_}", file=log)
            print(f"step:{step}/{STEPS} val_loss:{point['val_loss']:.4f} {time_}", file=log)
            if step == 2 and args.die == args.random_seed:
                print("half way", flush=True)
                sys.exit("contestant.py: out of luck")
            if step == 2 and args.hang and not os.path.exists(args.hang):
                Path(args.hang).touch()
                try:
                    time.sleep(60)
                except KeyboardInterrupt:
                    print("end: interrupted", file=log)
                    sys.exit(130)
        print("end: finished", file=log)
    result = dict(
        schema=3, run=stamp, script="contestant.py", config=config,
        command=shlex.join(["contestant.py", *sys.argv[1:]]), environment=dict(torch="none"),
        hardware=dict(name="a CPU", count=1), git=dict(commit="none", changed=[]),
        data=dict(train=[dict(name="t", sha256="t")], val=[dict(name="v", sha256=args.val)]),
        model=dict(active=12, parameters=12, flops_per_token=72), sources=[dict(name="contestant.py", sha256="0")],
        curve=curve, parts=[], final=dict(
            val_loss=end, val_tokens=10, text_bytes=None, train_seconds=speed, tokens=TOKENS * STEPS, steps=STEPS,
            peak_memory_bytes=10**8, devices=1))
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
