"""What is shipped: the wheel's contents, and the README's two lines as the CI runs them."""

import importlib.metadata as metadata_module
import json
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
from typing import Any

import fasttrain_kernels
import pytest

import fasttrain

ROOT = Path(__file__).parents[2]
# By distribution: the folder of each package in its wheel.
FOLDERS = {
    "fasttrain": {"fasttrain": "fasttrain/", "fasttrain/configs": "configs/"},
    "fasttrain_kernels": {"fasttrain_kernels": "kernels/fasttrain_kernels/"},
}
FIRST_LINE = "pip install -e . -c constraints.txt && python -m fasttrain.train configs/base.toml"
SECOND_LINE = 'pip install -e ".[test]" -c constraints.txt && pytest'
PROJECT, KERNELS = (
    tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))["project"]
    for folder in (".", "kernels")
)


def project_files() -> set[str]:
    """What the project is made of: by git, or by the list in an unpacked sdist."""
    if (ROOT / ".git").exists():
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        return set(subprocess.check_output(command, cwd=ROOT, text=True).split("\0")) - {""}
    listed = set((ROOT / "fasttrain.egg-info/SOURCES.txt").read_text("utf-8").splitlines())
    return {name for name in listed if ".egg-info/" not in name}


def built(command: list[str], folder: Path, pattern: str, cwd: Path | None = None) -> Path:
    """Run a command that puts one file into a folder; return the file."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob(pattern)
    return file


@pytest.fixture(scope="module")
def sdists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build both sdists from a copy, so that no build folder is left or taken up."""
    temp = tmp_path_factory.mktemp("packaging")
    for name in project_files():
        (temp / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, temp / "source" / name)
    build = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, str(temp)]
    return {
        "fasttrain": built(command, temp, "fasttrain-*.gz", temp / "source"),
        "fasttrain_kernels": built(
            command, temp, "fasttrain_kernels-*.gz", temp / "source/kernels"
        ),
    }


@pytest.fixture(scope="module")
def wheels(sdists: dict[str, Path]) -> dict[str, Path]:
    """Build both wheels offline, from the sdists."""
    # Without isolation pip downloads nothing: torch itself requires a setuptools that suffices.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    wheels = {}
    for name, sdist in sdists.items():
        folder = sdist.parent / f"wheel-{name}"
        more = ["--no-index", "--quiet", "--wheel-dir", str(folder), str(sdist)]
        wheels[name] = built([*command, *more], folder, "*.whl")
    return wheels


@pytest.mark.parametrize("name", FOLDERS)
def test_sdist_holds_all_files_of_its_folder(sdists, name):
    folder = {"fasttrain": "", "fasttrain_kernels": "kernels/"}[name]
    own = {f.removeprefix(folder) for f in project_files() if f.startswith(folder)}
    if name == "fasttrain_kernels":  # without the tools of those who work on the kernels
        own = {f for f in own if not f.startswith("dev/")}
    with tarfile.open(sdists[name]) as archive:
        held = {file.name.partition("/")[2] for file in archive if file.isfile()}
    made = {file for file in held if ".egg-info/" in file} | {"PKG-INFO", "setup.cfg"}
    assert held == own | made


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_holds_its_packages_and_nothing_else(wheels, name):
    with zipfile.ZipFile(wheels[name]) as archive:
        held = {file for file in archive.namelist() if ".dist-info/" not in file}
    expected = {
        f"{package}/{file.removeprefix(folder)}"
        for package, folder in FOLDERS[name].items()
        for file in project_files()
        if file.startswith(folder)
    }
    assert held == expected
    assert f"{name}/py.typed" in held
    assert ("fasttrain/configs/base.toml" in held) == (name == "fasttrain")
    assert ("fasttrain_kernels/cpu/blocks.cpp" in held) == (name == "fasttrain_kernels")
    assert not any("test" in file for file in held)


def metadata_of(wheel: Path, name: str) -> tuple[Any, set[str]]:
    """Return a wheel's metadata, and the distributions that it needs without an extra."""
    with zipfile.ZipFile(wheel) as archive:
        folder = f"{name}-{fasttrain.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        licence = archive.read(f"{folder}/licenses/LICENSE").decode()
    assert licence == (ROOT / "LICENSE").read_text("utf-8")
    assert "the fasttrain authors" in licence
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = {
        re.match(r"[\w-]+", requirement)[0]
        for requirement in metadata.get_all("Requires-Dist")
        if "extra ==" not in requirement
    }
    return metadata, needed


def test_wheel_of_fasttrain_declares_what_it_needs(wheels):
    metadata, needed = metadata_of(wheels["fasttrain"], "fasttrain")
    with zipfile.ZipFile(wheels["fasttrain"]) as archive:
        folder = f"fasttrain-{fasttrain.__version__}.dist-info"
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("fasttrain", fasttrain.__version__)
    assert scripts.split() == ["[console_scripts]", "fasttrain", "=", "fasttrain.__main__:main"]
    extras = {"hf", "peers", "report", "tensorboard", "test", "wandb"}
    assert set(metadata.get_all("Provides-Extra")) >= extras
    assert needed == {"fasttrain-kernels", "numpy", "rich", "safetensors", "tokenizers", "torch"}
    assert f"fasttrain-kernels=={fasttrain.__version__}" in metadata.get_all("Requires-Dist")


def test_wheel_of_the_kernels_needs_torch_and_triton_alone(wheels):
    metadata, needed = metadata_of(wheels["fasttrain_kernels"], "fasttrain_kernels")
    assert metadata["Name"] == "fasttrain-kernels"
    assert metadata["Version"] == fasttrain_kernels.__version__ == fasttrain.__version__
    assert needed == {"torch", "triton"}


def test_a_project_can_install_the_kernels_from_their_folder(tmp_path):
    """As ``pip install ./kernels`` does, without what they need, which is here already."""
    for name in project_files():
        if name.startswith("kernels/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--target", str(tmp_path / "site"), "./kernels"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "kernels")
    program = (
        "import sys, fasttrain_kernels, torch\n"
        "x = torch.ones(2, 8, requires_grad=True)\n"
        "fasttrain_kernels.rms_norm(x).sum().backward()\n"
        "unwanted = {'tokenizers', 'rich', 'safetensors', 'fasttrain'} & {*sys.modules}\n"
        "print(fasttrain_kernels.__file__, unwanted or 'alone')"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ran.stdout.split() == [f"{tmp_path}/site/fasttrain_kernels/__init__.py", "alone"], ran


def test_wheels_work_away_from_the_checkout(wheels, tmp_path):
    for wheel in wheels.values():
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
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for requirement in {*PROJECT["dependencies"], *KERNELS["dependencies"]}:
        name, bound = re.match(r"([\w-]+)[>=]=([\d.]+)(?:;|$)", requirement).groups()
        if name == "fasttrain-kernels":
            assert bound == fasttrain_kernels.__version__
            continue
        assert [*map(int, pinned[name].split("."))] >= [*map(int, bound.split("."))], name


@pytest.mark.parametrize("name", ["checkout", "a folder, 100% ünlike #others"])
def test_an_editable_install_takes_the_kernels_from_its_checkout(tmp_path, name):
    root = tmp_path / name
    for file in project_files():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--target", str(site)]
    done = subprocess.run([*command, "-e", str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (dist,) = metadata_module.distributions(name="fasttrain", path=[str(site)])
    (needed,) = (r for r in dist.requires if r.startswith("fasttrain-kernels"))
    done = subprocess.run([*command, needed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (kernels,) = metadata_module.distributions(name="fasttrain-kernels", path=[str(site)])
    assert kernels.version == fasttrain_kernels.__version__
    assert json.loads(kernels.read_text("direct_url.json"))["url"] == (root / "kernels").as_uri()


def test_no_message_tells_to_install_what_is_on_no_index():
    sources = {path: path.read_text("utf-8") for path in (ROOT / "fasttrain").rglob("*.py")}
    assert any("pip install" in text for text in sources.values())
    for path, text in sources.items():
        assert not re.search(r"fasttrain\[|pip install '?\"?fasttrain", text), path
