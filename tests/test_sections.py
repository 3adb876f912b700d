"""The scripts' anatomy: what they share, in which order, how long they are, and that importing one does nothing."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT, environment, load_program

SHARED = ("Muon optimizer", "Data loader", "Record", "Checkpoint", "Learning rate", "Command line", "Main")
SCRIPT_LINES = {"train_gpt2.py": 1206, "train_rwkv6.py": 1398, "train_rwkv7.py": 1467}  # on the way to house size
KERNEL_LINES = {".py": 454}  # a file under cuda/, else 400
COLUMNS = {".py": 120, ".sh": 120, ".cpp": 140, ".cu": 140, ".cuh": 140, ".h": 140}  # C++ spells out its types
SCRIPTS = sorted(ROOT.glob("train_*.py"))
FOLDERS = ".", "inference", "data", "dev", "tests", "records", "cuda", "cuda/wkv7", "cuda/wkv6"
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*")
                 if path.suffix in COLUMNS and path.is_file())

sections = load_program("dev/sections.py")


def unshared(paths):
    """What the scripts do not share although they must. The list above says what they must: markers alone could not."""
    parts = {path.name: sections.sections(path.read_text(encoding="utf-8")) for path in paths}
    wrong = []
    for title in SHARED:
        bodies = {name: part.get(f"{title} [shared]") for name, part in parts.items()}
        wrong += [f"{name} lacks {title}" for name, body in bodies.items() if body is None]
        wrong += [f"{title} differs"] if len(set(bodies.values())) > 1 else []
    return wrong


@pytest.fixture
def copies(tmp_path):
    """The scripts and the tool in a folder of their own, to be broken there."""
    (tmp_path / "dev").mkdir()
    shutil.copy(ROOT / "dev" / "sections.py", tmp_path / "dev")
    return [tmp_path / shutil.copy(path, tmp_path) for path in SCRIPTS]


def tool(folder, *arguments):
    program = [sys.executable, str(folder / "dev" / "sections.py")]
    return subprocess.run([*program, *arguments], capture_output=True, text=True)


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is in {path.name} {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_what_must_be_shared_is():
    assert {path.name for path in SCRIPTS} >= {"train_rwkv7.py", "train_gpt2.py"}
    assert unshared(SCRIPTS) == []
    assert tool(ROOT, "check").returncode == 0


def test_titles_are_unique_and_in_one_order():
    orders = []
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        titles = re.findall(r"^# -{40,}\n# (.+)\n", text, re.M)
        assert len(titles) == len(set(titles)), f"{path.name}: {titles}"
        assert len(re.findall(r"^# -{10,}$", text, re.M)) == len(titles), f"{path.name}: a rule line without a title"
        orders.append(titles)
    for titles in orders:
        assert [t for t in titles if t in orders[0]] == [t for t in orders[0] if t in titles]
        assert [t for t in titles if t.endswith("[shared]")] == [f"{title} [shared]" for title in SHARED]


def test_a_changed_line_is_found_and_repaired(tmp_path, copies):
    before = {path.name: path.read_bytes() for path in copies}
    replace(copies[-1], "SCHEMA = 3  # of records", "SCHEMA = 4  # of records")
    done = tool(tmp_path, "check")
    assert done.returncode == 1 and "'Record [shared]'" in done.stdout, done
    assert "-SCHEMA = 3" in done.stdout and "+SCHEMA = 4" in done.stdout and copies[-1].name in done.stdout, done.stdout
    assert done.stdout.count("section ") == 1, f"only one section differs:\n{done.stdout}"
    assert unshared(copies) == ["Record differs"]
    done = tool(tmp_path, "copy", copies[0].name)
    assert done.returncode == 0, done
    assert tool(tmp_path, "check").returncode == 0
    assert {path.name: path.read_bytes() for path in copies} == before
    assert not list(tmp_path.glob("*.part"))


def test_a_lost_marker_is_found_and_copy_does_not_guess(tmp_path, copies):
    replace(copies[-1], "# Record [shared]\n", "# Record\n")
    before = copies[-1].read_bytes()
    done = tool(tmp_path, "check")
    assert done.returncode == 1 and f"{copies[-1].name} lacks the section 'Record [shared]'" in done.stdout, done
    done = tool(tmp_path, "copy", copies[0].name)
    assert done.returncode == 1 and "Record [shared]" in done.stderr and copies[-1].name in done.stderr, done
    assert copies[-1].read_bytes() == before
    for path in copies[:-1]:
        replace(path, "# Record [shared]\n", "# Record\n")
    assert tool(tmp_path, "check").returncode == 0, "without any marker the tool has nothing to compare ..."
    assert unshared(copies) == [f"{path.name} lacks Record" for path in copies], "... but the list in this file has"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_limits_and_first_lines(path):
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]
    if path in SCRIPTS:
        assert len(lines) <= SCRIPT_LINES[path.name]
    if "cuda" in path.parts:
        assert len(lines) <= KERNEL_LINES.get(path.suffix, 400)
    wide = [(i, len(line)) for i, line in enumerate(lines, 1) if len(line) > COLUMNS[path.suffix]]
    assert not wide, f"(line, columns): {wide}"
    assert text.endswith("\n") and not any(line != line.rstrip() for line in lines), "blanks at a line's end"
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(text))
    else:
        first = lines[1] if lines[0].startswith("#!") else lines[0]
        about = re.match(r"(?:#|//|/\*)\s*(.*)", first)
        about = about and about[1]
    assert about and len(about.split()) >= 4, "the file does not begin with what it is"


COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def density(text):
    """Of lines that are no blanks, comments or docstrings: mean length, share above 100 columns. And how many
    comprehensions hold another or have two loops; the lines of the longest function."""
    tree, skipped, nested, longest = ast.parse(text), set(), 0, 0
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            skipped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            longest = max(longest, node.end_lineno - node.lineno + 1)
        if isinstance(node, COMPREHENSIONS):
            inner = [child for child in ast.walk(node) if child is not node and isinstance(child, COMPREHENSIONS)]
            nested += bool(inner) or len(node.generators) > 1
    lines = [len(line) for i, line in enumerate(text.split("\n"), 1)
             if i not in skipped and line.strip() and not line.strip().startswith("#")]
    return sum(lines) / len(lines), sum(n > 100 for n in lines) / len(lines), nested, longest


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_density(path):
    """56 characters a line, a tenth of them above 100 columns, 80 lines a function."""
    mean, wide, nested, longest = density(path.read_text(encoding="utf-8"))
    assert mean <= 56 and wide <= 0.10 and nested == 0 and longest <= 80, (mean, wide, nested, longest)


WATCH = r"""
import sys, torch, tqdm, torch.library, torch._library.custom_ops  # what is not the script's own doing
seen, on = [], True
def hook(event, args):
    written = event == "open" and isinstance(args[2], int) and args[2] & 3  # O_WRONLY, O_RDWR
    if on and (written or event.split(".")[0] in ("subprocess", "socket") or event in ("os.mkdir", "os.fork")):
        seen.append((event, args))
sys.addaudithook(hook)
sys.dont_write_bytecode = True
state = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
sys.path.insert(0, sys.argv[1])
__import__(sys.argv[2])
on = False
assert not seen, seen
assert torch.equal(state[0], torch.get_rng_state())
assert state[1:] == (torch.get_num_threads(), torch.get_default_dtype()) and not torch.distributed.is_initialized()
"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_importing_does_nothing(path, tmp_path):
    done = subprocess.run([sys.executable, "-c", WATCH, str(ROOT), path.stem, "--nonsense", "--steps", "many"],
                          cwd=tmp_path, env=environment(RANK="3", WORLD_SIZE="4"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr, os.listdir(tmp_path)) == ("", "", [])
