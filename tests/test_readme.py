"""README's figures on text and on the cost of a token are those that dev/text.py and bench.py wrote."""

import importlib.util

import bench
from helpers import ROOT

spec = importlib.util.spec_from_file_location("text", ROOT / "dev" / "text.py")
text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(text)

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = """\
train_gpt2, step 4400: 256 tokens of data/pydocs/val
dtype form           logits  relative        KL    top-1     state
fp32  parallel      0.0e+00   0.0e+00   0.0e+00  100.00%         -  ok
fp32  one piece     1.0e-05   4.0e-07   5.0e-13  100.00%   0.0e+00  ok
fp32  odd pieces    1.1e-05   6.0e-07   4.0e-13   99.61%   7.0e-07  ok
fp32  one by one    1.2e-05   5.0e-07   6.0e-13  100.00%   8.0e-07  ok
fp32  limit               -   1.0e-04   1.0e-06   99.00%   1.0e-04
bf16  odd pieces    1.1e-01   6.0e-03   4.0e-05   98.44%   7.0e-03  ok
bf16  one by one    1.2e-01   5.0e-03   6.0e-05   99.61%   8.0e-03  ok
bf16  limit               -   1.2e-02   2.0e-04   95.66%   2.0e-02
all forms agree
"""


def between(begin, end):
    assert README.count(begin) == README.count(end) == 1
    return README.split(begin)[1].split(end)[0].strip()


def test_the_worst_of_the_recurrent_forms():
    assert text.worst(PAGE) == ("train_gpt2", [
        ["fp32", "6.0e-07 (1.0e-04)", "6.0e-13 (1.0e-06)", "99.61% (99.00%)", "8.0e-07 (1.0e-04)"],
        ["bf16", "6.0e-03 (1.2e-02)", "6.0e-05 (2.0e-04)", "98.44% (95.66%)", "8.0e-03 (2.0e-02)"]])


def test_text_of_all_three_models_is_shown():
    section = between(text.BEGIN, text.END)
    for name in text.NAMES.values():
        assert f"\n{name}:\n\n```text\nThe " in section and section.count(f"| {name} | ") == 2


def test_the_bench_is_the_one_committed():
    folder = ROOT / "dev" / "inference"
    assert between(bench.BEGIN, bench.END) == (folder / "table.md").read_text(encoding="utf-8").strip()
    assert "(dev/inference/bench.png)" in README and (folder / "bench.png").stat().st_size > 10000
