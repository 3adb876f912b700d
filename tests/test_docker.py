"""Dockerfile, constraints.txt and dev/as_owner.sh, without a Docker engine: of the Dockerfile's commands those run that
do not change the machine (pip from empty wheels, the image's id, the entrypoint).
To run: ./test.sh tests/test_docker.py"""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import train_rwkv7
from test_setup import REQUIREMENTS, ROOT, write_wheel


def pins(path):
    return {name.lower().replace("_", "-"): version for name, version in re.findall(
        r"^([\w.-]+)==([\w.+]+)(?:\s|$)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)}


def texts(keyword):
    """What follows a keyword of the Dockerfile, each on one line."""
    lines = [line for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
             if line.strip() and not line.lstrip().startswith("#")]
    instructions = [line.split(None, 1) for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()]
    return [text for word, text in instructions if word == keyword]


def run_with(part):
    """The one RUN command that contains this."""
    text, = [text for text in texts("RUN") if part in text]
    return text


def requires(name, version):
    """What a package asks for on this Python, if it is installed here in this version; its name as it writes it."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    return [line for line in found.requires or () if "extra ==" not in line] \
        if found.version.split("+")[0] == version else []


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A folder in place of the image's root, in which the commands for Python have run."""
    if subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True).returncode:
        pytest.skip("this Python cannot make environments (ensurepip is missing)")
    root = tmp_path_factory.mktemp("image")
    (root / "wheels").mkdir()
    for name, version in pins("constraints.txt").items():
        needs = "".join(f"Requires-Dist: {line}\n" for line in requires(name, version))
        write_wheel(root / "wheels", name, version, needs)
    (root / "etc").mkdir()
    for text in texts("COPY"):
        *sources, target = text.split()
        for source in sources:
            path = root / target.lstrip("/") / (pathlib.Path(source).name if target.endswith("/") else "")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, path)
    (root / "bin").mkdir()
    (root / "bin" / "python3.12").symlink_to(sys.executable)
    (root / "bin" / "dpkg-query").write_text("#!/bin/sh\n[ \"$*\" = -W ] && printf 'g++\\t4:13.2.0-7ubuntu1\\n'\n")
    (root / "bin" / "dpkg-query").chmod(0o755)
    env = {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "HOME": str(root), "PIP_CONFIG_FILE": "/dev/null",
           "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (root / "wheels").as_uri(), "CUDA_VERSION": "13.0.2"}
    for command in (run_with("pip install"), run_with("rwkv-speedrun-image")):
        command = re.sub(r"(?<=[\s<>])/(?=opt|image|etc)", f"{root}/", f" {command}")
        done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return root


def test_the_packages_install_and_nothing_else_is_asked_for(image):
    """From wheels that hold the real dependencies: one that constraints.txt lacks would not be found."""
    done = subprocess.run([str(image / "opt/venv/bin/python"), "-m", "pip", "list", "--format=freeze"],
                          capture_output=True, text=True, check=True)
    installed = {name.lower().replace("_", "-"): version for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", done.stdout, re.MULTILINE)}
    path, = [re.search(r"PATH=(\S+):", text)[1] for text in texts("ENV") if "PATH=" in text]
    assert shutil.which("python3", path=f"{image}{path.split(':')[0]}"), "setup.sh takes the image's own Python"
    for path in REQUIREMENTS:
        assert pins(path).items() <= installed.items(), path
    assert set(installed.items()) - set(pins("constraints.txt").items()) <= {
        (name, installed.get(name)) for name in ("pip", "setuptools")}


def test_the_images_id(image, monkeypatch):
    text = (image / "etc/rwkv-speedrun-image").read_text()
    assert re.fullmatch(r"cuda 13\.0\.2, packages sha256:[0-9a-f]{64}\n", text), text
    packages = (image / "etc/rwkv-speedrun-packages").read_text()
    assert "g++\t4:13.2.0-7ubuntu1" in packages and f"torch=={pins('requirements.txt')['torch']}" in packages
    assert train_rwkv7.IMAGE == re.search(r">(/etc/\S+-image)$", run_with("-image"))[1]
    monkeypatch.setattr(train_rwkv7, "IMAGE", image / "etc/rwkv-speedrun-image")
    assert train_rwkv7.machine("cpu")["environment"]["image"] == text.strip()


def test_setup_takes_the_images_python(image, tmp_path):
    """Also where the mounted checkout has a .venv of the machine outside."""
    path, = [re.search(r"PATH=(\S+)", text)[1] for text in texts("ENV") if "PATH=" in text]
    path = path.replace("/opt", f"{image}/opt").replace("${PATH}", os.environ["PATH"])
    for name in ("setup.sh", *REQUIREMENTS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text("#!/bin/sh\necho of the machine outside; exit 1\n")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    done = subprocess.run(["bash", "-euc", f'. ./setup.sh; setup_python {" ".join(REQUIREMENTS)}; echo "$PYTHON"'],
                          cwd=tmp_path, env={"PATH": path, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{image}/opt/venv/bin/python3\n", ""), done


def test_the_entrypoint_becomes_the_owner(tmp_path):
    entry = ROOT / "dev" / "as_owner.sh"
    assert texts("ENTRYPOINT") == ['["as_owner"]'] and texts("USER") == [], "the entrypoint drops root itself"
    assert os.access(entry, os.X_OK), "COPY keeps the mode"
    shutil.copy(entry, tmp_path / "as_owner")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    own = (os.geteuid(), os.getegid())
    for owner in {own, (1234, 1235) if own[0] == 0 and shutil.which("setpriv") else own}:
        checkout = tmp_path / f"checkout of {owner[0]}"
        checkout.mkdir()
        os.chown(checkout, *owner)
        command = 'id -u; id -g; id -G; mkdir records && echo "$@" >records/log.txt; exit 7'
        done = subprocess.run([str(tmp_path / "as_owner"), "sh", "-c", command, "sh", "two  words", ""], cwd=checkout,
                              capture_output=True, text=True)
        assert done.returncode == 7 and done.stderr == "", done
        uid, gid, groups = done.stdout.splitlines()
        assert (int(uid), int(gid)) == owner and (owner == own or groups == "1235")
        log = checkout / "records" / "log.txt"
        assert (log.stat().st_uid, log.stat().st_gid) == owner and log.read_text() == "two  words \n"
