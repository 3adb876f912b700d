"""What no file of the repository may do: unpickle, evaluate text, or give a shell what a user typed. And names of runs,
wherever they come from, stay inside the folder that is theirs."""

import ast
import importlib
import re

import pytest
import torch

import recurrent
from helpers import ROOT, SCRIPTS

FOLDERS = (".", ".ci", "data", "dev", "tests", "records", "cuda", "cuda/wkv6", "cuda/wkv7")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")
                 if path.name != "test_security.py")  # which holds the examples
SHELL = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*") if path.suffix == ".sh") + [
    ROOT / ".ci" / "run", ROOT / "Dockerfile"]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
ALLOWED = {("recurrent.py", "imports pickle"): "for the name of its error",
           ("tests/test_export.py", "imports pickle"): "to write files that must be refused"}


def called(node):
    """The dotted name of what is called: torch.load, or load where the rest is no name."""
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join([*([function.id] if isinstance(function, ast.Name) else []), *reversed(parts)])


def keyword(node, name):
    return next((word.value for word in node.keywords if word.arg == name), None)


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def faults(text):
    """[(line, what)] of the Python source, and of the sources that lie in it as strings."""
    found, imports = [], {}
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        found += [(node.lineno, f"imports {name}") for name in names if name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.ImportFrom):
            imports.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
            try:
                found += [(node.lineno + line - 1, what) for line, what in faults(node.value)]
            except SyntaxError:  # a text, not a program
                pass
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        name = imports.get(name, name)
        last = name.split(".")[-1]
        if name in ("eval", "exec", "builtins.eval", "builtins.exec", "compile"):
            found.append((node.lineno, f"{name}()"))
        elif name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput") or (
                keyword(node, "shell") is not None):
            found.append((node.lineno, "a shell"))
        elif name == "torch.load" and not is_true(keyword(node, "weights_only")):
            found.append((node.lineno, "torch.load without weights_only=True"))
        elif last in ("load", "loads") and name.startswith(("np.", "numpy.")) and keyword(node, "allow_pickle"):
            found.append((node.lineno, "numpy with allow_pickle"))
        elif name.startswith("yaml.") and last != "safe_load":
            found.append((node.lineno, "yaml that makes objects"))
        elif keyword(node, "trust_remote_code") is not None or name.startswith("torch.hub."):
            found.append((node.lineno, "code of a download"))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_does(path):
    name, found = path.relative_to(ROOT).as_posix(), faults(path.read_text(encoding="utf-8"))
    assert [(line, what) for line, what in found if (name, what) not in ALLOWED] == []
    assert {(name, what) for _, what in found} == {key for key in ALLOWED if key[0] == name}, "an exception too many"


@pytest.mark.parametrize("line", (
    "import pickle ", "from dill import loads", "import os, marshal", "eval(x)", "exec(open(p).read())",
    "import os\nos.system(x)", "from os import popen\npopen(x)", "import subprocess as s\ns.run(x, shell=True)",
    "subprocess.Popen(x, shell=yes)", "torch.load(p)", "torch.load(p, weights_only=False)",
    "torch.load(p, weights_only=flag)", "from torch import load\nload(p)", "np.load(p, allow_pickle=True)",
    "yaml.load(x)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "CODE = '''\nimport pickle\n'''",
    "def f():\n    return torch.hub.load(x)"))
def test_and_would_be_found(line):
    assert len(faults(line)) == 1


@pytest.mark.parametrize("line", (
    "torch.load(p, weights_only=True)", "import json\njson.load(f)", "model.eval()", "subprocess.run([x])",
    "re.compile(x)", "np.load(p)", "yaml.safe_load(x)", "ast.literal_eval(x)",
    "model.load_state_dict(torch.load(p, weights_only=True))"))
def test_what_is_fine(line):
    assert faults(line) == []


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_script_evaluates_text(path):
    text = re.sub(r"(^|\s)#.*", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"(^|[\s;&|(])(eval|source /tmp|(ba)?sh -c)\s|curl[^\n]*\|\s*(ba)?sh", text, re.M)
    assert re.search(r"\$\*", text) is None or path.name == "setup.sh", "$* takes words apart; \"$@\" keeps them"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ("..", "../x", "a/b", "/tmp/x", "a\\b", ".", ".x", "a\0b", "a\nb", "x ", "C:x", "~",
                                  "é", "x/../../y", "x\n"))
def test_names_of_runs(script, name, tmp_path, monkeypatch):
    """Refused before anything else happens; on no system is one of them a path."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "resolve", lambda *_: pytest.fail("went on"))
    with pytest.raises(ValueError, match="--name"):
        module.set_up(module.Hyperparameters(track="tiny", name=name, records=str(tmp_path)), 0)


class Program:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "a")


@pytest.mark.parametrize("file", ("x.pth", "step000001/model.safetensors", "step000001/checkpoint.json"))
def test_a_checkpoint_that_is_a_program(file, tmp_path):
    """One line, and it has not run."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    torch.save({"emb.weight": Program(tmp_path / "ran")}, path)
    with pytest.raises(ValueError) as refused:
        recurrent.load(tmp_path / file.split("/")[0])
    assert "\n" not in str(refused.value) and not (tmp_path / "ran").exists()
    with open(path, "rb") as file:
        torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists(), "it would have run"
