"""The command ``fasttrain``: its commands are those of ``python -m fasttrain.NAME``."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fasttrain
from fasttrain.__main__ import COMMANDS, main
from fasttrain.command import EXIT_FAILED, command
from tests.support.toy import ENV, module_of, start, wait_until, write_config

SCRIPT = """
import sys
from fasttrain.__main__ import main
sys.argv[0] = "/usr/bin/fasttrain"
sys.exit(main())
"""
WAYS = {
    "module": ["-m", "fasttrain.train"],
    "package": ["-m", "fasttrain", "train"],
    "script": ["-c", SCRIPT, "train"],
}


def test_alone_it_lists_commands_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        monkeypatch.setattr(sys, "argv", ["fasttrain", *arguments])
        assert main() == 0
        out, err = capsys.readouterr()
        assert err == ""
        for name in COMMANDS:
            assert f"\n  {name} " in out
    for name in COMMANDS:
        assert callable(module_of(name).main)


def test_it_tells_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fasttrain", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"fasttrain {fasttrain.__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("trian", "train"), ("zzz", ", ".join(COMMANDS))],
)
def test_an_unknown_command_is_refused_with_the_nearest(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fasttrain", name])
    assert main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: fasttrain {name}: .* {hint}\W*\n", err)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_in_refuses_alike_and_shows_how_it_was_called(
    way: list[str], tmp_path: Path
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", *way, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)

    refused = run("base", "optim.lr=x")
    assert refused.returncode == 2
    assert "error: optim.lr = " in refused.stderr
    shown = run("--help")
    assert shown.returncode == 0
    name = "fasttrain train" if way[0] == "-c" else "python -m fasttrain.train"
    assert shown.stdout.startswith(f"usage: {name} [-h] ")
    for process in (refused, shown):
        imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
        assert "tomllib" in imported
        assert not imported & {"torch", "numpy", "rich"}


def test_a_signal_ends_a_run_of_the_package_with_a_checkpoint(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    process = start("fasttrain", "train", config, "train.steps=1000000", cwd=tmp_path)
    log = tmp_path / "runs/toy/metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (log.exists() and log.stat().st_size))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, out + err
    assert (tmp_path / "runs/toy/checkpoints/latest").exists()


def test_a_command_runs_and_leaves_as_its_module_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that failed does not wait for the others: `fasttrain.train` says how it leaves."""
    monkeypatch.delitem(sys.modules, "fasttrain.train", raising=False)
    monkeypatch.setattr(sys, "argv", ["fasttrain", "train", "base", "optim.lr=x"])
    monkeypatch.setattr("fasttrain.command.EXIT_BAD_INPUT", 7)
    with pytest.raises(SystemExit, match="7"):
        main()
    left: list[int] = []
    monkeypatch.setattr(sys, "argv", ["fasttrain", "train", "base", "optim.lr=x"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("fasttrain.command.EXIT_BAD_INPUT", EXIT_FAILED)
    monkeypatch.setattr("fasttrain.run.signals.end_at_once", left.append)
    with pytest.raises(SystemExit):
        main()
    assert left == [EXIT_FAILED]


def test_a_command_that_is_interrupted_says_in_one_line_what_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @command
    def stopped(*remedy: str) -> int:
        raise KeyboardInterrupt(*remedy)

    assert stopped() == stopped("; --resume goes on") == 130
    assert re.fullmatch(r"\n(\w+)\n\n\1; --resume goes on\n", capsys.readouterr().err)
