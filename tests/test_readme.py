"""The README against the code: what it lists is all there is, and what it shows works."""

import math
import re
import runpy
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttrain import hf, prepare, report
from fasttrain.checkpoint.__main__ import main as checkpoint_main
from fasttrain.command import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from fasttrain.config import config_reference, load_config
from fasttrain.generate import main as generate
from fasttrain.preflight import __main__ as preflight
from fasttrain.train import main as train
from tests.toy import ROOT, write_config

README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = {
    "fasttrain.train": train,
    "fasttrain.prepare": prepare.main,
    "fasttrain.generate": generate,
    "fasttrain.checkpoint": checkpoint_main,
    "fasttrain.preflight": preflight.main,
    "fasttrain.report": report.main,
    "fasttrain.hf": hf.main,
}


def part(name: str) -> str:
    """What stands between ``<!-- name … -->`` and ``<!-- /name -->``."""
    found = re.findall(rf"^<!-- {name}\b[^\n]*-->\n(.*?)^<!-- /{name} -->$", README, re.S | re.M)
    assert len(found) == 1, f"README.md must have one part marked <!-- {name} -->"
    return str(found[0])


def snippet(name: str) -> str:
    """The Python block that follows ``<!-- name -->``."""
    found = re.findall(rf"^<!-- {name} -->\n```python\n(.*?)^```$", README, re.S | re.M)
    assert len(found) == 1, f"README.md must have one Python block marked <!-- {name} -->"
    return str(found[0])


def run_snippet(name: str, tmp_path: Path) -> dict[str, Any]:
    """Run the README's block as a script; return its variables."""
    script = tmp_path / "snippet.py"
    script.write_text(snippet(name), "utf-8")
    return runpy.run_path(str(script))


def commands() -> list[list[str]]:
    """Every ``python -m fasttrain…`` of the README's shell blocks, as arguments."""
    shell = "\n".join(re.findall(r"^```bash\n(.*?)^```$", README, re.S | re.M))
    shell = shell.replace("\\\n", " ")
    found = re.findall(r"python -m (fasttrain\.[^\n]*)", shell)
    return [shlex.split(line, comments=True) for line in found]


def test_config_reference_is_up_to_date() -> None:
    given = part("config reference").strip()
    assert given == config_reference().strip(), (
        "put the output of fasttrain.config.config_reference() between the README's markers"
    )


@pytest.mark.parametrize("folder", ["fasttrain", "kernels/fasttrain_kernels"])
def test_file_tree_lists_every_module(folder: str) -> None:
    top = folder.rpartition("/")[2]
    listed = re.search(rf"^ *{top}/(.*?)(?=^kernels/|^configs/|\Z)", part("file tree"), re.S | re.M)
    assert listed is not None
    named = re.findall(r"\b_?\w+\.py\b", listed[1])
    assert len(named) == len(set(named)), "a module is listed twice"
    present = {p.name for p in (ROOT / folder).rglob("*.py")} - {"__init__.py"}
    assert set(named) == present


def test_reliability_table_names_the_tests_there_are() -> None:
    there = defaultdict(set)
    for path in (ROOT / "tests").glob("test_*.py"):
        for numbers in re.findall(r"^def test_((?:R\d+_)+)", path.read_text("utf-8"), re.M):
            for number in numbers.strip("_").split("_"):
                there[number].add(path.name)
    listed = {
        number: set(re.findall(r"`(test_\w+\.py)`", files))
        for number, files in re.findall(r"^\| (R\d+) \|.*\|(.*)\|$", part("reliability"), re.M)
    }
    assert listed == there


def test_exit_statuses_are_those_of_the_code() -> None:
    table = README.partition("| exit status |")[2].partition("\n\n")[0]
    listed = [int(status) for status in re.findall(r"^\| (\d+) \|", table, re.M)]
    assert sorted(listed) == sorted([EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED])


def test_every_command_names_an_existing_module_and_config() -> None:
    found = commands()
    assert len(found) >= 8
    for module, *arguments in found:
        assert module in COMMANDS
        configs = [a for a in arguments if a.startswith("configs/")]
        overrides = [a for a in arguments if re.match(r"\w+\.\w+=", a)]
        if module == "fasttrain.train":
            assert len(configs) == 1
            load_config(ROOT / configs[0], overrides)


def test_relative_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_kernels_snippet_runs_and_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = run_snippet("kernels snippet", tmp_path)
    assert names["loss"].item() < math.log(1000) - 0.5


def foreign(folder: Path, header: bool) -> None:
    """Token files as nanoGPT or llm.c write them."""
    folder.mkdir(parents=True)
    for split, n in (("train", 3000), ("val", 300)):
        tokens = (np.arange(n) % 60).astype("<u2").tobytes()
        head = np.array([20240520, 1, n, *[0] * 253], "<i4").tobytes() if header else b""
        (folder / f"{'fineweb_' * header}{split}{'_000001' * header}.bin").write_bytes(
            head + tokens
        )


def test_every_command_runs_and_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands as they stand, with smaller models; two that take long have their own tests."""
    for package in ("plotly", "matplotlib"):
        pytest.importorskip(package, reason="needs the extra report")
    monkeypatch.chdir(tmp_path)
    text = write_config(tmp_path).read_text("utf-8").replace("steps = 12", "steps = 4")
    gpt2 = 'positions = "learned"\nnorm = "layer"\nmlp = "gelu"\nvocab_size = 512\n'
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/base.toml").write_text(text, "utf-8")
    (tmp_path / "configs/gpt2-124m.toml").write_text(text.replace("[data]", gpt2 + "[data]"))
    (tmp_path / "texts").mkdir()
    for name in ("README.md", "CHANGELOG.md", "pyproject.toml"):
        (tmp_path / "texts" / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    foreign(tmp_path / "nanoGPT/data/shakespeare_char", header=False)
    foreign(tmp_path / "fineweb10B", header=True)
    runs = [line for line in commands() if not {"--kernels", "--verify-resume"} & set(line)]
    runs.sort(key=lambda line: line[0] not in ("fasttrain.prepare", "fasttrain.train"))
    for module, *arguments in runs:
        if arguments[0] == "import":  # what is downloaded is what was exported
            Path("exported").rename("downloaded")
        assert COMMANDS[module](arguments) == 0, capsys.readouterr().err
    assert "You may" in capsys.readouterr().out
    assert Path("runs/base/report.html").is_file()
    names = run_snippet("library snippet", tmp_path)
    assert isinstance(names["model"], torch.nn.Module)
    assert names["logits"].shape == (1, 4, names["model"].config.vocab_size)
    assert names["longer"].shape == (1, 12)
    assert names["config"].optim.lr == 1e-4
