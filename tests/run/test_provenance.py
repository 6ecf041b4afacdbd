"""What made a run is in its log and in each checkpoint; continuing with other versions warns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttrain.run import provenance as module
from fasttrain.run.provenance import provenance
from fasttrain.train import main
from tests.run.test_secrets import SECRET
from tests.support.toy import write_config
from tests.support.toy_trainer import rows

CPU = torch.device("cpu")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_known_where_there_is_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str, folder: Path = tmp_path) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(folder), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    code, other = tmp_path / "fasttrain/a.py", tmp_path / "notes.txt"
    code.parent.mkdir()
    assert module._checkout(tmp_path) == (None, None)
    git("init", "-q")
    assert module._checkout(tmp_path) == (None, False)  # there is no commit yet
    for path in (code, other):
        path.write_text("1")
    git("add", ".")
    git("commit", "-qm", "a")
    worktree = tmp_path.with_name(f"{tmp_path.name}-worktree")
    git("worktree", "add", "-q", str(worktree))
    commit = git("rev-parse", "HEAD")
    other.write_text("2")
    assert module._checkout(tmp_path) == module._checkout(worktree) == (commit, False)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook
    assert module._checkout(tmp_path) == (commit, False)
    monkeypatch.delenv("GIT_DIR")
    (code.parent / "new.py").touch()
    assert module._checkout(tmp_path) == (commit, True)
    (code.parent / "new.py").unlink()
    code.write_text("2")
    assert module._checkout(tmp_path) == (commit, True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._checkout(tmp_path) == (None, None)  # there is no git


def test_what_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROOT", Path("nowhere"))
    monkeypatch.setattr(module, "PACKAGES", ("numpy", "no-such-package"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "x y", f"https://a:{SECRET}@b.org"])
    found = provenance(CPU, Path("runs/a"))
    assert found.pop("device")
    assert found.pop("numpy")
    assert found.pop("python") == sys.version.split()[0]
    assert found == {
        "fasttrain": module.__version__, "commit": None, "uncommitted_changes": None,
        "torch": str(torch.__version__), "no-such-package": None, "cuda": None, "driver": None,
        "command": "python 'x y' https://***@b.org", "parent": "runs/a",
    }  # fmt: skip


def test_a_driver_is_found_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    for line, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release", "570.86"),
        ("", None),
    ):
        file.write_text(line + "\nGCC version:  gcc version 12\n")
        assert module._first(module._DRIVER, str(file)) == version
    assert module._first(module._DRIVER, str(tmp_path / "missing")) is None


def test_a_run_and_its_checkpoints_say_what_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", ["python", "first"])
    command = [str(write_config(tmp_path)), "run.name=a", "log.every_steps=2", "log.csv=true"]
    assert main([*command, "--stop-at-step", "5"]) == 75
    with monkeypatch.context() as other:
        real, newer = module.distributions, {"tokenizers": [SimpleNamespace(version="9.9")]}
        other.setattr(module, "distributions", lambda name: newer.get(name) or real(name=name))
        other.setattr(sys, "orig_argv", ["python", "second"])
        capsys.readouterr()
        assert main([*command, "--resume", "auto"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    before = provenance(CPU)["tokenizers"]
    assert f" tokenizers {before} → 9.9" in said
    run = Path("runs/a")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, second = rows(run, "run")
    assert lines[0] == first
    assert (first["step"], first["command"]) == (0, "python first")
    assert (second["step"], second["command"]) == (5, "python second")
    assert (first["parent"], second["parent"]) == (None, "runs/a/checkpoints/step-00000005")
    assert lines.index(second) == next(n for n, x in enumerate(lines) if x["step"] == 6) - 1
    assert [row["step"] for row in rows(run)] == [1, 2, 4, 6, 8, 10, 12]

    def recorded(step: int) -> dict[str, Any]:
        state = json.loads((run / f"checkpoints/step-{step:08d}/state.json").read_text())
        return {**state["provenance"], "kind": "run"}

    for step, line in ((5, first), (12, second)):
        assert recorded(step).items() <= line.items()
    # A run without such rows, of an older version, can be continued.
    old = [json.dumps(line) + "\n" for line in lines if line["kind"] != "run"]
    (run / "metrics.jsonl").write_text("".join(old))
    longer = ["train.steps=14", "--allow-change", "train.steps"]
    assert main([*command, "--resume", "auto", *longer]) == 0
    assert [line["step"] for line in rows(run, "run")] == [12]
    assert [row["step"] for row in rows(run)] == [1, 2, 4, 6, 8, 10, 12, 14]
