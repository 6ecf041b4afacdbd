"""What is shipped: the wheel's contents, and the README's two lines as the CI runs them."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"fasttrain": ROOT / "fasttrain", "fasttrain_kernels": ROOT / "kernels/fasttrain_kernels"}
FIRST_LINE = "pip install -e . -c constraints.txt && python -m fasttrain.train configs/base.toml"
SECOND_LINE = 'pip install -e ".[test]" -c constraints.txt && pytest'
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# One worker builds the wheel for all tests of this file.
pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel offline from a copy, so that no build folder is left or taken up."""
    temp = tmp_path_factory.mktemp("packaging")
    source = temp / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("fasttrain", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    # Without isolation pip downloads nothing: torch itself requires a setuptools that suffices.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--wheel-dir", str(temp), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = temp.glob("*.whl")
    return built


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".cpp", ".h") or path.name == "py.typed"
    }
    assert held == expected
    assert {"fasttrain/py.typed", "fasttrain_kernels/py.typed"} <= held
    assert not any("test" in name for name in held)


def test_wheel_declares_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == ("fasttrain", PROJECT["version"])
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) >= {
        "hf", "peers", "report", "tensorboard", "test", "wandb",
    }  # fmt: skip
    needed = {
        re.match(r"[\w-]+", requirement)[0]
        for requirement in metadata.get_all("Requires-Dist")
        if "extra ==" not in requirement
    }
    assert needed == {"numpy", "rich", "safetensors", "tokenizers", "torch", "triton"}


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "bad.toml").write_text("[model]\ndmi = 3\n")
    # `coverage` and the like may stand in the path; only ours must come from the wheel.
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    found = python("-c", "import fasttrain, sys; print(fasttrain.__file__, fasttrain.__version__)")
    expected = f"{tmp_path / 'site/fasttrain/__init__.py'} {PROJECT['version']}"
    assert found.stdout.strip() == expected, found.stderr
    shown = python("-m", "fasttrain.train", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "tokens_per_step" in shown.stdout
    refused = python("-m", "fasttrain.train", "bad.toml")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "model.dmi is not a config key; did you mean model.dim?" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_readme_and_ci_run_the_same_two_lines():
    readme = (ROOT / "README.md").read_text("utf-8")
    script = (ROOT / ".ci/run").read_text("utf-8")
    for line in (FIRST_LINE, SECOND_LINE):
        assert re.search(rf"^\s*{re.escape(line)}(\s|$)", readme, re.MULTILINE), line
        assert re.search(rf"^{re.escape(line)}\s", script, re.MULTILINE), line
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_readme_names_every_required_package():
    readme = (ROOT / "README.md").read_text("utf-8")
    for requirement in PROJECT["dependencies"]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"\b{name}\b", readme), f"the README says why {name} is needed"


def test_nothing_is_capped_and_the_constraints_name_what_was_tested():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in PROJECT["dependencies"]:
        name, bound = re.match(r"([\w-]+)>=([\d.]+)(?:;|$)", requirement).groups()
        assert [*map(int, pinned[name].split("."))] >= [*map(int, bound.split("."))], name
