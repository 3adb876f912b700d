"""setup.sh and run_*.sh: which Python they choose, how they launch. No network: in copies of the scripts, with a PATH
of the test's own, and with empty wheels in place of the packages. To run: ./test.sh tests/test_setup.py"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = "bash cat cmp cp dirname env grep mkdir rm tail uname".split()
REQUIREMENTS = ("requirements.txt", "data/requirements.txt", "records/requirements.txt", "tests/requirements.txt")
PINS = dict(re.findall(r"^([\w-]+)==([\w.]+)", "".join(
    (ROOT / path).read_text() for path in REQUIREMENTS), re.MULTILINE))
SHOW = "import json, sys; print(json.dumps({'argv': sys.argv, 'executable': sys.executable}))\n"


def write_wheel(folder, name, version, more=""):
    """A wheel that holds nothing. more: lines of its METADATA, each with its end."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Box:
    """A copy of the repository's scripts and a PATH of its own."""

    def __init__(self, folder):
        self.repo, self.bin, self.wheels = folder / "a repo", folder / "stub bin", folder / "wheels"
        for path in (*map(self.repo.joinpath, ("data", "records", "tests")), self.bin, self.wheels, folder / "home"):
            path.mkdir(parents=True)
        for name in "setup.sh run_rwkv7.sh run_rwkv6.sh run_gpt2.sh test.sh".split() + list(REQUIREMENTS):
            shutil.copy(ROOT / name, self.repo / name)
        for name in ("train_rwkv7.py", "train_rwkv6.py", "train_gpt2.py"):
            (self.repo / name).write_text(SHOW)
        (self.repo / "data" / "pydocs.py").write_text("print('corpus made')\n")
        self.tools(*TOOLS)
        self.env = {"PATH": str(self.bin), "HOME": str(folder / "home"), "PIP_CONFIG_FILE": "/dev/null",
                    "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.wheels.as_uri(), "PIP_NO_CACHE_DIR": "1"}

    def tools(self, *names):
        for name in names:
            (self.bin / name).symlink_to(shutil.which(name))

    def venv(self, python, *installed):
        """A .venv whose python is a link, with these requirement files noted as installed."""
        for folder in ("bin", "installed") if installed else ("bin",):
            (self.repo / ".venv" / folder).mkdir(parents=True)
        for name in installed:
            shutil.copy(self.repo / name, self.repo / ".venv" / "installed")
        (self.repo / ".venv" / "bin" / "python").symlink_to(self.bin / python)

    def stub(self, name, *lines):
        (self.bin / name).write_text("\n".join([f"#!{shutil.which('bash')}", *lines, ""]))
        (self.bin / name).chmod(0o755)

    def python(self, name="python3", packages=None):
        """A Python at hand that sees the standard library (-S) and, if given, {name: version} of empty packages."""
        calls = shlex.quote(str(self.repo.parent / "calls"))
        lines = ["all=$*", f"printf '%s\\n' \"$0 ${{all//$'\\n'/ }}\" >>{calls}"]
        if packages is not None:
            folder = self.repo.parent / f"packages of {name}"
            for package, version in packages.items():
                info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
                info.mkdir(parents=True)
                (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
            (folder / "torch" / "distributed").mkdir(parents=True)
            (folder / "torch" / "distributed" / "run.py").write_text(SHOW)
            lines.append(f"export PYTHONPATH={shlex.quote(str(folder))}")
        self.stub(name, *lines, f'exec {shlex.quote(sys.executable)} -S "$@"')

    def not_python(self, name, version):
        """Answers like a Python of another version: fails the check of packages, says what it is."""
        self.stub(name, f'case "$2" in *ensurepip*) echo "{version}" ;; *) exit 1 ;; esac')

    def gpus(self, n):
        self.stub("nvidia-smi", f"for ((i = 0; i < {n}; i++)); do echo \"GPU $i: Stub (UUID: GPU-$i)\"; done")

    def run(self, *arguments, script="run_rwkv7.sh", cwd="/", **env):
        return subprocess.run([str(self.repo / script), *arguments], cwd=cwd, env={**self.env, **env},
                              capture_output=True, text=True)

    def launched(self, *arguments, **options):
        """-> (sys.argv of what was launched, the lines printed before)"""
        done = self.run(*arguments, **options)
        assert done.returncode == 0, done
        *before, last = done.stdout.splitlines()
        return json.loads(last)["argv"], before

    def calls(self):
        return (self.repo.parent / "calls").read_text().splitlines()


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


@pytest.fixture
def ready(box):
    """A box whose python3 has everything, so that only the launch is left to look at."""
    box.python(packages=PINS)
    return box


@pytest.mark.parametrize("model, change", [
    ("rwkv7", {}), ("rwkv6", {"torch": "2.11.0a0+git1"}), ("gpt2", {"torch": "2.14.0+cu130", "numpy": "1.26.0"})])
def test_takes_the_python_at_hand_with_other_versions_too(box, model, change):
    box.python(packages={**PINS, **change})
    assert box.launched(script=f"run_{model}.sh") == ([f"train_{model}.py"], [])
    assert not (box.repo / ".venv").exists()


def test_takes_python_where_python3_lacks_packages_or_the_one_named(box):
    box.python("python3")
    for name, env in (("python", {}), ("my python", {"PYTHON": str(box.bin / "my python")})):
        box.python(name, packages=PINS)
        box.launched(**env)
        assert box.calls()[-1].startswith(f"{box.bin / name} "), box.calls()


@pytest.mark.parametrize("change, lacks", [
    ({"torch": "2.10.1"}, "torch 2.11 or newer (has 2.10.1)"), ({"torch": None}, "torch"),
    ({"numpy": None, "safetensors": None}, "numpy, safetensors"), ({"huggingface-hub": None}, "huggingface-hub")])
def test_says_what_the_python_named_lacks(box, change, lacks):
    box.python("other", packages={k: v for k, v in {**PINS, **change}.items() if v})
    box.venv("cat", "requirements.txt")
    done = box.run(PYTHON="other")
    assert done.stderr == f"setup: PYTHON=other lacks {lacks}: using .venv\n" and done.stdout == SHOW, done


def test_tests_need_pytest_too(box):
    box.python("python3", packages={k: v for k, v in PINS.items() if k != "pytest"})
    box.python("python", packages=PINS)
    for arguments, folder in ((["-k", "a or b"], "tests "), (["tests/requirements.txt::x"], "")):
        assert "No module named pytest" in box.run(*arguments, script="test.sh").stderr  # only its metadata is there
        call = box.calls()[-1]
        assert "/python -m pytest " in call and call.endswith(f" {folder}{' '.join(arguments)}"), call


def test_makes_an_environment_remembers_and_repairs_it(box):
    if subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True).returncode:
        pytest.skip("this Python cannot make environments (ensurepip is missing)")
    box.python()
    for name, version in PINS.items():
        write_wheel(box.wheels, name, version)
    done = box.run("first start")
    assert done.returncode == 0, done
    assert "making .venv with python3" in done.stderr and "installing requirements.txt" in done.stderr, done.stderr
    start = os.times()
    done = box.run("second start")
    seconds = sum(os.times()[2:4]) - sum(start[2:4])  # of the children, on the processor: the same on a busy machine
    assert done.returncode == 0 and done.stderr == "" and seconds < 1, (seconds, done)
    python = str(box.repo / ".venv" / "bin" / "python")
    assert json.loads(done.stdout) == dict(executable=python, argv=["train_rwkv7.py", "second start"])

    requirements = box.repo / "requirements.txt"
    text = requirements.read_text()
    requirements.write_text(text + "no-such-package==1.0\n")
    done = box.run()
    assert done.returncode == 1 and "setup: pip failed" in done.stderr and done.stdout == "", done
    requirements.write_text(text)
    packages = next((box.repo / ".venv" / "lib").glob("python3.*")) / "site-packages"
    for path in packages.glob("tqdm*"):  # as if it had been interrupted
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = box.run()
    assert done.returncode == 0 and "installing" in done.stderr and "making" not in done.stderr, done
    assert (packages / "tqdm.py").exists() and box.run().stderr == ""

    done = box.run(script="test.sh")  # its requirements come on top
    assert f"installing {' '.join(REQUIREMENTS)}" in done.stderr and (packages / "pytest.py").exists(), done
    assert box.run(script="test.sh").stderr == "" and box.run().stderr == ""


def test_an_environment_made_by_hand_serves_if_whole(box):
    box.python("python3")
    box.python("elsewhere", packages=PINS)
    box.venv("elsewhere")
    assert box.launched() == (["train_rwkv7.py"], []) and not (box.repo / ".venv" / "installed").exists()


@pytest.mark.parametrize("pythons, about", [
    ({"python3": "3.8.10 venv", "python": "2.7.18 no-venv"}, "python3 is 3.8.10, python is 2.7.18"),
    ({}, "none at all"), ({"python3": "3.11.2 no-venv"}, None)])
def test_no_python_fits(box, pythons, about):
    for name, version in pythons.items():
        box.not_python(name, version)
    done = box.run()
    said = (f"no Python 3.10 to 3.13 ({about}). Install one or name it: PYTHON=/path/to/python3.12" if about else
            "Python 3.11.2 cannot make .venv, it lacks venv or ensurepip. Debian, Ubuntu: apt install python3-venv")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"setup: {said}\n"), done


@pytest.mark.parametrize("broken", (False, True))
def test_a_newer_python_is_passed_over(box, broken):
    """broken: where a .venv lost its python, as after an upgrade."""
    if broken:
        box.venv("gone", "requirements.txt")
    box.not_python("python3", "3.14.0 venv")
    box.not_python("python3.13", "3.13.1 venv")
    assert "making .venv with python3.13 (Python 3.13.1)" in box.run().stderr


def test_arguments_pass_untouched(ready):
    given = ["--a", "two words", "", "*", "$HOME", 'quo"te', "--b=c d"]
    for gpus in (0, 2):
        ready.gpus(gpus)
        assert ready.launched(*given)[0][-len(given) - 1:] == ["train_rwkv7.py", *given]


@pytest.mark.parametrize("gpus, visible, processes", [
    (None, None, 1), (0, None, 1), (1, None, 1), (2, None, 2), (8, None, 8), (8, "", 1), (8, "-1", 1), (8, "3", 1),
    (8, "0,1,2", 3), (8, "0,1,-1,2", 2), (2, "0,1,2,3", 2), (8, "GPU-a, GPU-b", 2), (None, "0,1", 1)])
def test_one_process_a_gpu(ready, gpus, visible, processes):
    if gpus is not None:
        ready.gpus(gpus)
    argv, _ = ready.launched("x", **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    if processes == 1:
        assert argv == ["train_rwkv7.py", "x"]
    else:  # torch.distributed.run
        assert argv[0].endswith("run.py")
        assert argv[1:] == ["--standalone", f"--nproc_per_node={processes}", "train_rwkv7.py", "x"]


def test_the_tiny_track_and_help_take_one_process(ready):
    assert "--nproc_per_node=3" in ready.launched(NPROC="3")[0]
    ready.gpus(8)
    for arguments, env in ((["--track", "tiny"], {}), (["--help"], {}), ([], {"NPROC": "1"})):
        assert ready.launched(*arguments, **env)[0] == ["train_rwkv7.py", *arguments]
    assert "--nproc_per_node=2" in ready.launched("--track", "tiny", NPROC="2")[0]


@pytest.mark.parametrize("setting, said", [
    ("NPROC=two", " is not a number of processes"), ("PYTHON=/nowhere/python3", ": no such program"),
    ("NNODES=two", " is not a number of machines"),
    ("NNODES=2", " needs MASTER_ADDR=the first machine, NODE_RANK=0 on it, 1 on the next ..."),
    ("NNODES=2 MASTER_ADDR=a", " needs MASTER_ADDR=the first machine, NODE_RANK=0 on it, 1 on the next ...")])
def test_settings_that_make_no_sense(ready, setting, said):
    done = ready.run(**dict(part.split("=") for part in setting.split()))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"setup: {setting.split()[0]}{said}\n"), done


@pytest.mark.parametrize("arguments, made", [
    ("--track tiny", True), ("--track=tiny", True), ("--x 1 --track tiny --y", True), ("", False),
    ("--track fineweb", False), ("--name tiny", False), ("--track=tiny --track=fineweb", False),
    ("--track tiny --help", False), ("--track tiny -h", False), ("--track tiny --data d", False),
    ("--data=d --track=tiny", False)])
def test_corpus_is_made_when_needed(ready, arguments, made):
    argv, before = ready.launched(*arguments.split())
    assert before == (["corpus made"] if made else []) and argv == ["train_rwkv7.py", *arguments.split()]


def test_exit_status_passes_through(ready):
    script = ready.repo / "train_rwkv7.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1]))\n")
    assert ready.run("37").returncode == 37
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    assert ready.run().returncode == -2  # as if Python itself had been called


def test_a_failing_corpus_or_check_stops_the_run(ready):
    (ready.repo / "data" / "pydocs.py").write_text("import sys; sys.exit('no text')\n")
    done = ready.run("--track", "tiny")
    assert (done.returncode, done.stderr, done.stdout) == (1, "no text\n", ""), done
    (ready.repo / "train_rwkv7.py").write_text(
        "import os, sys\nif sys.argv[1:] == ['x', '--check']: sys.exit('no shards for ' + os.environ['WORLD_SIZE'])\n")
    ready.gpus(2)
    done = ready.run("x")  # before many processes start
    assert (done.returncode, done.stderr, done.stdout) == (1, "no shards for 2\n", ""), done


def test_works_from_any_folder(ready):
    (ready.repo / "train_rwkv7.py").write_text("import os; print(os.getcwd())\n")
    for cwd, script in (("/", ready.repo / "run_rwkv7.sh"), (ready.repo, "./run_rwkv7.sh"),
                        (ready.repo.parent, "a repo/run_rwkv7.sh")):
        done = subprocess.run(["bash", str(script)], cwd=cwd, env={**ready.env, "CDPATH": ".:/"},
                              capture_output=True, text=True)
        assert done.stdout.splitlines() == [str(ready.repo)], done
