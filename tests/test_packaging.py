"""The wheel and the sdist, as a user gets them."""

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests import forks
from tests.conftest import ROOT, kept_files


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the sdist and the wheel that was built from it, by the setuptools of this environment."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


@pytest.fixture(scope="module")
def clean_python(dist, tmp_path_factory):
    """A virtual environment with the wheel alone; the dependencies are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parent.parent))  # its own .pth files are not read
    python = folder / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True)
    return python


def test_wheel_holds_every_package_and_the_data_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {
        "shvit": "shvit",
        "weights": "shvit/weights",
        "train": "shvit/train",
        "export": "shvit/export",
        "detection": "shvit/detection",
    }
    for folder, installed in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{installed}/{path.relative_to(ROOT / folder)}" in names
    assert "shvit/weights/manifest.toml" in names
    assert "shvit/export/backends/executorch_arm64.cpp" in names
    for name in ("weights/published.toml", *(f"export/web/explorer.{kind}" for kind in ("html", "css", "js"))):
        assert f"shvit/{name}" in names
    assert "shvit/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"shvit", "shvit-0.1.0.dist-info"}


def test_sdist_can_be_built_from(dist):
    """The wheel was built from it, and the tests run in it."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "shvit/shvit.py", "train/recipe.py"} <= names
    assert kept_files() - names == set()  # with tests, goldens and all that they read


def test_wheel_works_in_a_clean_environment_from_another_folder(clean_python, tmp_path):
    program = clean_python.with_name("shvit")

    def shvit(*argv: str) -> dict:
        done = forks.run(program, *argv, cwd=tmp_path, python=clean_python)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert subprocess.check_output([program, "--version"], cwd=tmp_path, text=True) == "shvit 0.1.0\n"
    where = forks.run(code="import shvit; print(shvit.__file__)", cwd=tmp_path, python=clean_python).stdout
    assert where.startswith(str(clean_python.parent.parent))
    assert {"shvit_s1", "shvit_s4"} <= {model["model"] for model in shvit("list")["models"]}
    result = shvit("export", "onnx", "--model", "shvit_s1", "--img-size", "64", "--output", "s1.onnx")
    certificate = result["certificate"]
    assert (certificate["passed"], certificate["random_weights"]) == (None, True)  # sound, as far as can be told
    assert (tmp_path / "s1.onnx").is_file()


def test_installed_package_is_not_the_source_folder(clean_python, tmp_path):
    code = f"import sys; sys.argv = [{str(clean_python.with_name('shvit'))!r}]; import shvit, importlib.util as u; "
    code += "print(shvit.__file__); print(u.find_spec('shvit.train.recipe').origin)"  # without timm, as the program is
    done = subprocess.run([clean_python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 2
    for line in done.stdout.split():
        assert str(clean_python.parent.parent) in line
