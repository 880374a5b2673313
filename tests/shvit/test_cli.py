"""The program as a shell sees it: exit status, one line of error, JSON last, nothing imported too early."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

import shvit
from shvit import cli
from shvit.environment import EXTRAS
from shvit.errors import CheckFailed, InputError
from tests import forks
from tests.conftest import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


PROGRAM = Path(sysconfig.get_path("scripts")) / "shvit"


def program(*argv: str, **options) -> subprocess.CompletedProcess:
    """`shvit argv` in a process of its own."""
    return subprocess.run([PROGRAM, *argv], capture_output=True, text=True, check=False, **options)


@pytest.fixture
def main(monkeypatch, capsys):
    """`shvit argv` in this process, which has imported torch already."""

    def call(*argv: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["shvit", *argv])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return subprocess.CompletedProcess(argv, status, *capsys.readouterr())

    return call


def modules_after(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code + PRINT_MODULES], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


PRINT_MODULES = "\nimport sys; print('\\n'.join(sys.modules), file=sys.stderr)"


def test_help_names_every_command_and_imports_no_torch():
    start = f"import runpy, sys; sys.argv = [{str(PROGRAM)!r}, '--help']"
    code = f"{start}\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit: pass"
    loaded = modules_after(code)
    assert "shvit.cli" in loaded
    assert not loaded & {"torch", "timm", "tyro", "rich", "numpy"}
    done = program("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)


def test_help_of_a_linked_program_imports_no_torch(tmp_path):
    """As pipx and others install it."""
    link = tmp_path / "shvit"
    link.symlink_to(PROGRAM)
    assert "torch" not in modules_after(f"import sys; sys.argv = [{str(link)!r}]; import shvit.cli")


USER = """
import shvit, timm
assert callable(shvit.deploy) and shvit.SHViT and shvit.load_checkpoint
assert len(timm.list_models("shvit*")) == 4
print(type(timm.create_model("shvit_s1", device="meta")).__module__)
"""


@pytest.mark.parametrize("name", ["shvit", "shvit-script.py"])
def test_users_script_of_the_same_name_gets_our_models(tmp_path, name):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / name).write_text(USER)
    for script, folder in ((f"bin/{name}", tmp_path), (name, tmp_path / "bin"), (tmp_path / "bin" / name, "/")):
        done = forks.run(script, cwd=folder)
        assert (done.stdout, done.stderr) == ("shvit.shvit\n", "")


def test_users_script_gets_our_models_in_an_interpreter_of_its_own(tmp_path):
    (tmp_path / "shvit").write_text(USER)
    command = [sys.executable, "-W", "error", "shvit"]  # nor is any library's warning ours
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("shvit.shvit\n", "")


@pytest.mark.parametrize(
    ("imports", "model"),
    [
        ("shvit.weights.models, timm", "timm.create_model('shvit_s1')"),
        ("shvit.train.loop, timm", "timm.create_model('shvit_s1')"),
        ("shvit.export.spec", "shvit.export.spec.open_model('shvit_s1')[0]"),
    ],
)
def test_program_makes_our_models(imports, model):
    """In it importing shvit does not register them."""
    code = f"import sys; sys.argv = [{str(PROGRAM)!r}]; import {imports}; print(type({model}).__module__)"
    assert forks.run(code=code).stdout == "shvit.shvit\n"


HOOK = """
import json, os, sys

class AtTorch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            told = {key: value for key, value in os.environ.items() if key.startswith(("OMP_W", "GOMP_", "KMP_"))}
            print(json.dumps(told), flush=True)
            os._exit(0)

sys.meta_path.insert(0, AtTorch)
"""
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""As GNU's, LLVM's and Intel's manuals have it."""


def when_torch_loads(folder: Path, *command: object, **environment: str) -> dict[str, str]:
    """What a command says to OpenMP's libraries, which read it once: when PyTorch loads them."""
    (folder / "sitecustomize.py").write_text(HOOK)
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_W", "GOMP_", "KMP_"))}
    environment = {**plain, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "command",
    [
        (PROGRAM, "list"),
        (sys.executable, "-m", "shvit.cli", "list"),
        (sys.executable, "-m", "shvit.train", "demo"),
        (sys.executable, "-m", "shvit.detection", "configs"),
    ],
)
def test_threads_wait_asleep_in_every_command(tmp_path, command):
    assert when_torch_loads(tmp_path, *command) == SLEEPING


@pytest.mark.parametrize("users", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "200"}])
def test_threads_wait_as_the_user_says(tmp_path, users):
    assert when_torch_loads(tmp_path, PROGRAM, "list", **users) == users


@pytest.mark.parametrize("code", ["import shvit", "import shvit.cli", "import shvit.train.loop"])
def test_importing_shvit_leaves_the_threads_alone(tmp_path, code):
    assert when_torch_loads(tmp_path, sys.executable, "-c", code + "; import torch") == {}


def test_processes_that_measure_get_the_users_environment():
    code = "import os; from shvit.environment import *; let_threads_sleep(); "
    code += "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'; print('OMP_WAIT_POLICY' in users_environment())"
    start = f"import sys; sys.argv = [{str(PROGRAM)!r}]; "
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_W", "GOMP_", "KMP_"))}
    for theirs, kept in (({}, "False\n"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "True\n")):
        done = subprocess.run(
            [sys.executable, "-c", start + code], capture_output=True, text=True, check=True, env={**plain, **theirs}
        )
        assert done.stdout == kept


def test_importing_shvit_brings_no_tool_that_only_commands_need():
    loaded = set(forks.run(code="import shvit" + PRINT_MODULES).stderr.split())
    assert {"timm", "shvit.shvit"} <= loaded
    assert not loaded & {
        "onnx",
        "onnxruntime",
        "coremltools",
        "openvino",
        "matplotlib",
        "tyro",
        "rich",
        "skimage",
        "elpv_dataset",
    }
    assert not any(name.startswith(("shvit.train", "shvit.export", "shvit.weights")) for name in loaded)


def test_result_is_the_last_line_as_json():
    done = forks.run(PROGRAM, "info", "shvit_s1", "--img-size", "64")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1])["params"] == 6_330_808


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tran"], "unknown command 'tran'; did you mean `shvit train`?"),
        (["frobnicate"], "choose from list, info, train"),
        (["bench", "--modles", "x"], "did you mean --models"),
        (["info"], "Missing"),
        (["info", "shvit_s7"], "unknown model 'shvit_s7'; choose from shvit_s1"),
        (["info", "shvit_s1", "--img-size", "many"], "--img-size"),
        (["export", "onyx"], "onnx, openvino, coreml, litert, ncnn, executorch, all"),
        (["weights", "pull", "nothing_like_it"], "nothing_like_it"),
    ],
)
def test_unusable_input_is_one_line_on_stderr_and_status_2(main, argv, message):
    done = main(*argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_unusable_input_is_the_same_line_in_any_encoding():
    argv = ["bench", "--modles", "x"]
    lines = [program(*argv, env=os.environ | {"PYTHONIOENCODING": encoding}).stderr for encoding in ("utf-8", "ascii")]
    assert lines == ["shvit bench: Unrecognized options: --modles, x; did you mean --models [STR [STR ...]]?\n"] * 2


def test_debug_shows_the_traceback(main):
    done = main("info", "shvit_s7", "--debug")
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("shvit info: unknown model 'shvit_s7'")
    assert done.returncode == 2


@dataclass(frozen=True)
class Failing:
    """A command whose check does not hold."""

    def run(self) -> dict:
        raise CheckFailed("a.onnx: drifted\nby 3", {"passed": False, "max_abs_error": 3.0})


def test_a_check_that_does_not_hold_is_status_1_with_its_figures(main, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "verify", cli.Entry(f"{__name__}:Failing", ""))
    done = main("verify")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"passed": False, "max_abs_error": 3.0}
    assert done.stderr == "shvit verify: a.onnx: drifted by 3\n"
    assert "Traceback" in main("verify", "--debug").stderr


def test_missing_package_names_its_extra(monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"pip install 'shvit\[export\]'"):
        cli.run(["bench"])


def test_every_extra_named_for_a_missing_package_brings_it():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        packages = {re.split(r"[<>=;\[]", need)[0] for need in extras[extra]} - {"shvit"}
        nested = [name for need in extras[extra] if need.startswith("shvit[") for name in need[6:-1].split(",")]
        return packages.union(*map(brought, nested))

    distributions = {
        "skimage": "scikit-image",
        "elpv_dataset": "elpv-dataset",
        "yaml": "pyyaml",
        "sklearn": "scikit-learn",
    }
    distributions |= {
        "sklearn": "scikit-learn",
        "pillow_heif": "pillow-heif",
        "mmdet": "onedl-mmdetection",
        "mmcv": "onedl-mmcv",
        "mmengine": "onedl-mmengine",
        "litert_torch": "litert-torch",
        "ai_edge_litert": "ai-edge-litert",
        "ai_edge_quantizer": "ai-edge-quantizer",
    }
    for module, named in EXTRAS.items():
        bringing = {extra for extra in extras if distributions.get(module, module) in brought(extra)}
        assert set(named) == bringing - {"all", "dev"}, module


def test_no_command_and_version_and_no_option_before_a_command(main):
    assert main().returncode == 2
    assert main("--version").stdout == f"shvit {shvit.__version__}\n"
    done = main("--models", "x")
    assert done.returncode == 2
    assert "unknown command '--models'" in done.stderr


def test_interruption_is_one_line(main, monkeypatch):
    def interrupt(self) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "verify", cli.Entry(f"{__name__}:Failing", ""))
    monkeypatch.setattr(Failing, "run", interrupt)
    done = main("verify")
    assert (done.returncode, done.stderr) == (130, "shvit verify: interrupted\n")


def test_missing_module_of_ours_is_a_bug_and_not_hidden(monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError("No module named 'shvit.exporter'", name="shvit.exporter")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError):
        cli.run(["bench"])


def test_every_command_has_help():
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.run([name, "--help"])
        assert stop.value.code in (0, None), name


@dataclass(frozen=True)
class Two:
    size: int = 1

    def run(self) -> dict:
        return {"command": "of two words", "size": self.size}


def parse_one(options: list[str], prog: str):
    return Answer({"command": "of one word", "options": options, "prog": prog})


@dataclass(frozen=True)
class Answer:
    result: dict

    def run(self) -> dict:
        return self.result


@pytest.fixture
def two_words(monkeypatch):
    """A table where `bench phone` is a command beside `bench`."""
    monkeypatch.setitem(cli.COMMANDS, "bench", cli.Entry(f"{__name__}:parse_one", ""))
    monkeypatch.setitem(cli.COMMANDS, "bench phone", cli.Entry(f"{__name__}:Two", ""))
    monkeypatch.delitem(cli.COMMANDS, "bench import")


def test_command_of_two_words_goes_before_that_of_one(two_words):
    assert cli.run(["bench", "phone", "--size", "3"]) == {"command": "of two words", "size": 3}
    assert cli.run(["bench", "import", "f"]) == {"command": "of one word", "options": ["import", "f"],
                                                 "prog": "shvit bench"}  # fmt: skip
    assert cli.run(["bench"])["options"] == []
    with pytest.raises(InputError, match="did you mean --size INT"):
        cli.run(["bench", "phone", "--siz", "3"])
    with pytest.raises(InputError, match="unknown command 'phone'"):
        cli.run(["phone"])


def test_names_with_a_prefix_are_models_of_whoever_registered_it(monkeypatch):
    from torch import nn

    from shvit import create

    monkeypatch.setattr(create, "_schemes", {})
    with pytest.raises(InputError, match="names with a source are not taken"):
        create.create_model("tiny:8")
    create.register_scheme("tiny", lambda rest, checkpoint: nn.Linear(int(rest), 1))
    assert create.create_model("tiny:8").in_features == 8
    with pytest.raises(InputError, match="tiny:8 takes a checkpoint alone"):
        create.create_model("tiny:8", num_classes=3)
    assert not create.has_scheme("tiny")


def test_scheme_of_a_package_that_is_not_installed_names_its_extra(monkeypatch):
    from shvit import create

    def absent(name: str):
        raise ModuleNotFoundError("No module named 'mmengine'", name="mmengine")

    monkeypatch.setattr(create, "_schemes", {})
    monkeypatch.setitem(cli.SCHEMES, "detector", f"{__name__}:no_detector")
    with pytest.raises(InputError, match=r"needs the package mmengine; .*'shvit\[detection\]'"):
        cli.run(["export", "onnx", "--model", "detector:x.py", "--features", "--output", "x.onnx"])


def no_detector(config: str, checkpoint: Path | None):
    raise ModuleNotFoundError("No module named 'mmengine'", name="mmengine")


@pytest.mark.parametrize("name", ["info", "eval", "export", "verify", "bench", "bench phone", "site"])
def test_commands_that_take_models_know_names_with_a_prefix(name, monkeypatch):
    from shvit import create

    monkeypatch.setattr(create, "_schemes", {})
    known = types.SimpleNamespace(run=lambda: {"known": create.has_scheme("detector:mask.py")})
    monkeypatch.setattr(cli, "_parse", lambda *_: known)
    assert cli.run(name.split()) == {"known": True}
