"""Names of runs, wherever they come from, stay inside the folder that is theirs; a checkpoint is data, never run.
To run: ./test.sh tests/test_security.py"""

import importlib

import pytest
import torch

import formats
from helpers import SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_of_runs(script, tmp_path, monkeypatch, capsys):
    """Refused before anything else happens; on no system is one of them a path."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "resolve", lambda *_: pytest.fail("went on"))
    for name in ("..", "../x", "a/b", "/tmp/x", "a\\b", ".", ".x", "a\0b", "a\nb", "x ", "C:x", "~", "é",
                 "x/../../y", "x\n"):
        with pytest.raises(SystemExit) as ended:
            module.main(["--track=tiny", f"--name={name}", f"--records={tmp_path}"])
        assert ended.value.code == 2 and "--name" in capsys.readouterr().err, name


class Program:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "a")


@pytest.mark.parametrize("file", ("x.pth", "x_step000001.safetensors"))
def test_a_checkpoint_that_is_a_program(file, tmp_path):
    """One line, and it has not run."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    torch.save({"emb.weight": Program(tmp_path / "ran")}, path)
    with pytest.raises(ValueError) as refused:
        formats.load(path)
    assert "\n" not in str(refused.value) and not (tmp_path / "ran").exists()
    with open(path, "rb") as file:
        torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists(), "it would have run"
