"""--help of every program: an example to copy, and a line for each flag.  ./test.sh tests/test_help.py"""

import argparse
import runpy
import signal
import sys

import pytest

from helpers import ROOT

PROGRAMS = sorted(str(path.relative_to(ROOT)) for folder in (".", "inference", "data", "cuda", "records", "dev")
                  for path in (ROOT / folder).glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def help_of(program, monkeypatch, capsys):
    """(what it prints, its flags as argparse has them) in this process."""
    parsers, plain = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args",
                        lambda self, *given: parsers.append(self) or plain(self, *given))
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code in (0, None), program
    return capsys.readouterr().out, parsers[-1]._actions if parsers else []


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program, monkeypatch, capsys):
    text, flags = help_of(program, monkeypatch, capsys)
    name = program.rpartition("/")[2]
    assert f"python {program}" in text or f"./run_{name[6:-3]}.sh" in text, "no example to copy"
    for flag in flags:
        if flag.dest == "help" or name.startswith("train_"):  # whose flags tests/test_run.py looks at
            continue
        assert flag.help, f"{flag.dest} is not explained"
        if flag.option_strings and flag.nargs != 0 and not flag.required:
            shown = flag.help == argparse.SUPPRESS or "[" in flag.help or flag.default in (None, "")
            assert shown, f"{flag.dest}: its default is not shown"
