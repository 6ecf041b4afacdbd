"""What is shipped: the wheel's contents, and the README's two lines as the CI runs them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import fasttrain_kernels
import pytest

import fasttrain

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "fasttrain": "fasttrain/",
    "fasttrain/configs": "configs/",
    "fasttrain_kernels": "kernels/fasttrain_kernels/",
}
FIRST_LINE = "pip install -e . -c constraints.txt && python -m fasttrain.train configs/base.toml"
SECOND_LINE = 'pip install -e ".[test]" -c constraints.txt && pytest'
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def project_files() -> set[str]:
    """What the project is made of: by git, or by the list in an unpacked sdist."""
    if (ROOT / ".git").exists():
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        return set(subprocess.check_output(command, cwd=ROOT, text=True).split("\0")) - {""}
    listed = set((ROOT / "fasttrain.egg-info/SOURCES.txt").read_text("utf-8").splitlines())
    return {name for name in listed if ".egg-info/" not in name}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from a copy, so that no build folder is left or taken up."""
    temp = tmp_path_factory.mktemp("packaging")
    for name in project_files():
        (temp / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, temp / "source" / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    command = [sys.executable, "-c", build]
    done = subprocess.run(command, cwd=temp / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (packed,) = temp.glob("*.tar.gz")
    return packed


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Build the wheel offline, from the sdist."""
    # Without isolation pip downloads nothing: torch itself requires a setuptools that suffices.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--wheel-dir", str(sdist.parent), str(sdist)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = sdist.parent.glob("*.whl")
    return built


def test_sdist_holds_all_files_of_the_project(sdist):
    with tarfile.open(sdist) as archive:
        held = {file.name.partition("/")[2] for file in archive if file.isfile()}
    made = {name for name in held if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert held == project_files() | made


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{name.removeprefix(folder)}"
        for package, folder in FOLDERS.items()
        for name in project_files()
        if name.startswith(folder)
    }
    assert held == expected
    assert {"fasttrain/py.typed", "fasttrain_kernels/py.typed"} <= held
    assert "fasttrain/configs/base.toml" in held
    assert not any("test" in name for name in held)


def test_wheel_declares_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"fasttrain-{fasttrain.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
        licence = archive.read(f"{folder}/licenses/LICENSE").decode()
    assert (metadata["Name"], metadata["Version"]) == ("fasttrain", fasttrain.__version__)
    assert fasttrain_kernels.__version__ == fasttrain.__version__
    assert scripts.split() == ["[console_scripts]", "fasttrain", "=", "fasttrain.__main__:main"]
    assert metadata["License-Expression"] == "MIT"
    assert licence == (ROOT / "LICENSE").read_text("utf-8")
    assert "the fasttrain authors" in licence
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
    expected = f"{tmp_path / 'site/fasttrain/__init__.py'} {fasttrain.__version__}"
    assert found.stdout.strip() == expected, found.stderr
    shown = python("-m", "fasttrain.train", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "tokens_per_step" in shown.stdout
    assert python("-m", "fasttrain", "--version").stdout == f"fasttrain {fasttrain.__version__}\n"
    named = python("-c", "import fasttrain; print(fasttrain.load_config('base').model.dim)")
    assert named.returncode == 0, named.stderr
    assert named.stdout.strip() == str(fasttrain.load_config(ROOT / "configs/base.toml").model.dim)
    refused = python("-m", "fasttrain.train", "bad.toml")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.search(r"error: bad\.toml: model\.dmi .*\bmodel\.dim\b", refused.stderr)
    assert len(refused.stderr.splitlines()) == 1


def test_readme_and_ci_run_the_same_two_lines():
    readme = (ROOT / "README.md").read_text("utf-8")
    script = (ROOT / ".ci/run").read_text("utf-8")
    for line in (FIRST_LINE, SECOND_LINE):
        assert re.search(rf"^\s*{re.escape(line)}(\s|$)", readme, re.MULTILINE), line
        assert re.search(rf"^{re.escape(line)}\s", script, re.MULTILINE), line
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_nothing_is_capped_and_the_constraints_name_what_was_tested():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in PROJECT["dependencies"]:
        name, bound = re.match(r"([\w-]+)>=([\d.]+)(?:;|$)", requirement).groups()
        assert [*map(int, pinned[name].split("."))] >= [*map(int, bound.split("."))], name


def test_no_message_tells_to_install_what_is_on_no_index():
    sources = {path: path.read_text("utf-8") for path in (ROOT / "fasttrain").rglob("*.py")}
    assert any("pip install" in text for text in sources.values())
    for path, text in sources.items():
        assert not re.search(r"fasttrain\[|pip install '?\"?fasttrain", text), path
