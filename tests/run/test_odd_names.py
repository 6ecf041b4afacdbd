"""Every command under odd names of files, folders and runs: one line and status 2, nothing raw."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fasttrain.__main__ import COMMANDS
from fasttrain.train import main as train
from tests.support.toy import module_of, write_config

RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
NAMES = {
    "formula": "cost_$5_to_$10_",
    "markup": "_a$\\frac{[bold]<b>&amp;{x}%s%(x)d",
    "escapes": "x\x1b]0;pwn\x07\x9b2J\u202etxt\u2066b\u200b",
    "lines": "a\nerror: b\r",
    "no UTF-8": os.fsdecode(b"a\xff\xfe"),
    "shell": "-- a'\"`$(x)",
}
NOWHERE = ("/dev/null/x", "missing/" * 3, "", ".", "/proc/self/mem", "toy.toml", "n" * 300)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    config = write_config(folder)
    out = [f"run.out_dir={folder / 'runs'}", "run.name=r", "train.steps=3"]
    assert train([str(config), *out]) == 0
    return folder


@pytest.fixture
def here(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(sound / "toy.toml", tmp_path)
    monkeypatch.setattr("fasttrain.storage.PAUSE_S", 0)
    return tmp_path


def call(name: str, *arguments: str) -> int:
    try:
        status: int = module_of(name).main([*arguments])
    except SystemExit as error:  # of argparse
        status = int(error.code or 0)
    return status


def check(said: Any, status: int, what: object, *, is_generated: bool) -> None:
    text = said.out + said.err
    assert "Traceback" not in text, (what, text[-2000:])
    # What a model writes goes into a file as it is.
    assert not (raw := RAW.findall(said.err if is_generated else text)), (what, raw, text)
    assert status in (0, 2), (what, status, text)
    if status == 2 and "usage:" not in text:
        assert said.err.splitlines()[-1].startswith("error: "), (what, said.err)


def commands(run: str, out: str) -> dict[str, list[list[str]]]:
    """Return for each command the arguments that name a run, or a place to write to."""
    return {
        "train": [
            ["--resume", run, "--stop-at-step=4", "train.steps=5"],
            ["toy.toml", f"run.name={out}", "train.steps=3"],
            ["toy.toml", f"run.out_dir={out}", "train.steps=3"],
            [out],
        ],
        "prepare": [
            [out, "--input", f"{run}/config.toml", "--tokenizer", "bytes"],
            ["made", "--input", run, "--tokenizer", "bytes"],
            ["made", "--input", "toy.toml", "--tokenizer", out],
            ["--inspect", out],
            [out, "--merge"],
        ],
        "preflight": [[f"{run}/config.toml", "--no-probe"], [out]],
        "generate": [[run, "--max-tokens=2", f"--prompt={out}"], [out], [run, "--tokenizer", out]],
        "report": [[run, "--out", f"{out}.html"], [out]],
        "checkpoint": [[run], [out]],
        "evaluate": [[run, "--tasks", out], [run, "--tasks", "x", "--include-path", out]],
        "hf": [["export", run, out], ["export", out, "x"], ["import", run, out]],
    }


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "evaluate"])
def test_R25_R36_an_odd_name_is_no_traceback_and_nothing_raw(
    command: str, kind: str, sound: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if command == "report":
        pytest.importorskip("plotly")
        pytest.importorskip("matplotlib")
    name = NAMES[kind]
    shutil.copytree(sound / "runs/r", here / name)
    for arguments in commands(f"./{name}", f"out-{name}")[command]:
        status = call(command, *arguments)
        check(capfd.readouterr(), status, (arguments, kind), is_generated=command == "generate")


@pytest.mark.parametrize("command", COMMANDS)
def test_R25_R36_a_place_that_cannot_be_is_one_line(
    command: str,
    sound: Path,
    here: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command == "evaluate":
        manager = pytest.importorskip("lm_eval.tasks.manager")
        monkeypatch.setattr(manager, "__file__", str(here / "manager.py"))  # has few tasks
    if command == "report":
        pytest.importorskip("plotly")
        pytest.importorskip("matplotlib")
    for place in NOWHERE:
        for arguments in commands(str(sound / "runs/r"), place)[command]:
            if command == "train" and "--resume" in arguments:
                continue
            status = call(command, *arguments)
            check(capfd.readouterr(), status, arguments, is_generated=command == "generate")
        for arguments in commands(place, "out")[command]:
            status = call(command, *arguments)
            check(capfd.readouterr(), status, arguments, is_generated=command == "generate")
            for made in (here / "out", here / "made"):
                shutil.rmtree(made, ignore_errors=True)
