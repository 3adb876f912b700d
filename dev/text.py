"""The figures on text in inference/README.md: samples and the table of --check, from checkpoints of the tiny recipe.

    python dev/text.py CHECKPOINT ...            prints them
    python dev/text.py CHECKPOINT ... --write    puts them between the markers of inference/README.md

A CHECKPOINT is what sample.py takes. Samples are the first that seed 1 draws, cut at nothing; the table has the largest
difference of a model's two recurrent forms, chunked prefill in odd pieces and token by token, from the parallel form.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- text: python dev/text.py CHECKPOINT ... --write -->", "<!-- end of text -->"
NAMES = dict(train_rwkv7="RWKV-7", train_rwkv6="RWKV-6", train_gpt2="GPT-2")
DRAW = ("--start", "The ", "--max_new_tokens", "300", "--temperature", "0.8", "--top_p", "0.9", "--seed", "1")
COLUMNS = ("logits, relative", "KL, nats", "top-1", "state, relative")


def sample(*arguments):
    """Standard output of sample.py; its own message ends the program when it fails."""
    done = subprocess.run([sys.executable, ROOT / "sample.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def worst(page):
    """(script, [[dtype, logits, KL, top-1, state]]) of a page of --check: the worst of the recurrent forms, each with
    its limit."""
    script, rows = page.split(",")[0], []
    for dtype in ("fp32", "bf16"):
        figures = {line[6:17].strip(): line[17:].split()[1:5] for line in page.splitlines() if line.startswith(dtype)}
        cells = []
        for i in range(4):
            values = [figures[form][i] for form in ("odd pieces", "one by one")]
            number = lambda text: float(text.rstrip("%"))
            cells.append(f"{(min if i == 2 else max)(values, key=number)} ({figures['limit'][i]})")
        rows.append([dtype, *cells])
    return script, rows


def page(checkpoints):
    out, table = [], [f"| | | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for checkpoint in checkpoints:
        script, rows = worst(sample(checkpoint, "--check"))
        table += [f"| {NAMES[script]} | {' | '.join(row)} |" for row in rows]
        text = re.sub(r"[^\S\n]+$", "", sample(checkpoint, *DRAW).strip("\n"), flags=re.M)
        out += [f"{NAMES[script]}:", "", "```text", *text.splitlines(), "```", ""]
    flags = " ".join(f'"{word}"' if " " in word else word for word in DRAW)
    return "\n".join([f"`sample.py {flags}` on the tiny track's models:", "", *out,
                      "`--check`: the recurrent forms against the parallel one, in brackets the limits:", "", *table])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of a finished run")
    parser.add_argument("--write", action="store_true", help="write them into inference/README.md")
    args = parser.parse_args()
    text, readme = page(args.checkpoints), ROOT / "inference" / "README.md"
    if not args.write:
        return print(text)
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        sys.exit(f"dev/text.py: {readme} lacks the lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
