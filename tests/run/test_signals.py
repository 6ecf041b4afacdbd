"""Signals and limits end a run whole, in whatever phase they come (R10)."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain.checkpoint import load, resolve
from fasttrain.run import setup as session
from fasttrain.run import signals
from fasttrain.train import main
from tests.support.toy import ENV, ROOT, start, wait_until, write_config

LIMIT_S = 300.0  # on a machine that does other things as well


def compilers(pid: int) -> list[int]:
    """Return the compilers and Inductor's workers of a run, not those that test a compiler."""

    def works(child: int) -> bool:
        with contextlib.suppress(OSError):
            options = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            name = options[0].rpartition(b"/")[2]
            compiles = name in (b"cc1plus", b"clang++") and b"-fsyntax-only" not in options
            return compiles or any(b"compile_worker" in option for option in options)
        return False

    return [child for child in signals._descendants(pid) if works(child)]


STOPPED_AT = {
    "in_first_step": 0,
    "in_a_step": 6,
    "in_a_step_that_fails": 6,
    "between_batches_of_an_evaluation": 5,
    "in_a_batch_of_an_evaluation": 5,
    "in_a_sample": 12,
    "in_a_save": 5,
    "in_a_step_while_saving": 6,
}


def test_R10_a_signal_in_every_phase_ends_whole_and_resumes_exactly(tmp_path: Path) -> None:
    write_config(tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.toy_phases", str(tmp_path)],
        cwd=ROOT, env=ENV, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    reports = {report["phase"]: report for report in json.loads(result.stdout)}
    assert reports.keys() == STOPPED_AT.keys()
    for phase, report in reports.items():
        assert report["status"] == 75, (phase, report["log"])
        assert report["took_s"] < 25, phase  # half a second, on a machine that does nothing else
        assert report["stopped"] == STOPPED_AT[phase], phase
        assert report["signal"] in report["log"], phase
        assert "--resume auto" in report["log"], phase
        assert "Traceback" not in report["log"], phase
        assert report["resumed"] == 0, (phase, report["log"])
        assert report["equal"], f"{phase}: other bits than those of the uninterrupted run"


def test_R10_a_signal_while_the_compiler_runs_leaves_no_process(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    process = start("fasttrain.train", config, "run.compile=default", cache, cwd=tmp_path)
    wait_until(lambda: compilers(process.pid))
    compiler = compilers(process.pid)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, out + err
    assert resolve(tmp_path / "runs/toy").name == "step-00000000"
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in compiler))


def test_R10_a_second_signal_ends_at_once_and_spoils_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    endless = ("train.steps=1000000", "checkpoint.every_steps=1", "log.every_steps=1")
    process = start("fasttrain.train", config, *endless, cwd=tmp_path)
    checkpoints = tmp_path / "runs/toy/checkpoints"
    wait_until(lambda: (checkpoints / "latest").exists())
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode in (1, 75), out + err  # 75: it was over before the second
    assert "Traceback" not in out + err
    assert load(resolve(checkpoints)).step >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_R10_a_signal_before_the_first_step_leaves_nothing(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    before = signal.getsignal(number)
    monkeypatch.setattr(session, "open_splits", lambda *_: signal.raise_signal(number))
    assert main([str(config)]) == 128 + number
    assert re.search("interrupted.*nothing", capsys.readouterr().err)
    assert not list((tmp_path / "runs").iterdir())
    assert signal.getsignal(number) == before


def test_R10_a_signal_before_a_resumed_run_goes_on_says_that_it_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    assert main([str(config), "--stop-at-step", "3"]) == 75
    monkeypatch.setattr(session, "open_splits", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main([str(config), "--resume", "auto"]) == 75
    assert load(resolve(tmp_path / "runs/toy")).step == 3


def test_what_is_watched_ends_with_its_context() -> None:
    stopped: list[str] = []
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    n_files = len(os.listdir("/proc/self/fd"))
    watch = signals.stop_signals(
        stop=stopped.append, rescue=lambda: stopped.append("rescue"), patience_s=lambda: 60.0
    )
    with watch:
        signal.raise_signal(signal.SIGUSR1)
        wait_until(lambda: stopped)
    assert stopped == ["SIGUSR1"]
    assert before == {number: signal.getsignal(number) for number in signals.SIGNALS}
    assert len(os.listdir("/proc/self/fd")) <= n_files
