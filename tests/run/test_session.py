"""How a run begins and ends: disks that are full, locks, failures on the way, what is left."""

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fasttrain import checkpoint, verify_resume
from fasttrain import storage as files
from fasttrain.config import UserError
from fasttrain.data.loader import Loader
from fasttrain.log.sinks import LogFile
from fasttrain.run import setup as session
from fasttrain.run.folder import check_disk, lock_run_dir
from fasttrain.storage import DataError
from fasttrain.train import main
from tests.support.faults import Faults
from tests.support.toy import ENV, ROOT
from tests.support.toy_trainer import rows

Capture = pytest.CaptureFixture[str]


def full_disk(operation: str, *names: str) -> None:
    if operation.startswith("write") and any(name in operation for name in names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- R12: disks ----------------------------------------------------------------------------------


def test_R12_training_goes_on_past_a_full_disk_and_older_checkpoints_stay(
    toy: Path, capsys: Capture
) -> None:
    saves = ["checkpoint.every_steps=2", "checkpoint.keep_last=1", "train.steps=10"]
    assert main([str(toy), *saves, "run.name=whole"]) == 0
    run_dir = toy.parent / "runs/a"
    seen: list[list[str]] = []

    def full(operation: str) -> None:
        if operation.startswith("create") and "tmp-step-00000008" in operation:
            # Two saves have failed by now; the one before them is still there.
            seen.append(sorted(p.name[:18] for p in (run_dir / "checkpoints").glob("*step*")))
        full_disk(operation, "tmp-step-00000004", "tmp-step-00000006")

    with Faults(run_dir, before=full):
        assert main([str(toy), *saves, "run.name=a"]) == 0
    warned = re.findall(r"warning: .*?/step-(\d+) .*\bfree\b.*\bspace\b", capsys.readouterr().out)
    assert warned == ["00000004", "00000006"]
    assert seen[0] == [".tmp-step-00000008", "step-00000002"]
    assert [p.name for p in (run_dir / "checkpoints").glob("*step*")] == ["step-00000010"]
    assert verify_resume.first_difference(toy.parent / "runs/whole", run_dir)[0] is None


@pytest.mark.parametrize(("asynchronous", "last"), [("true", 8), ("false", 7)])
def test_R12_five_failed_saves_in_a_row_end_the_run(
    asynchronous: str, last: int, toy: Path, capsys: Capture
) -> None:
    run_dir = toy.parent / "runs/a"

    def full(operation: str) -> None:
        if not any(f"0000000{step}" in operation for step in (1, 2)):
            full_disk(operation, "tmp-step")

    with Faults(run_dir, before=full):
        saves = ["checkpoint.every_steps=1", f"checkpoint.asynchronous={asynchronous}"]
        assert main([str(toy), "run.name=a", *saves]) == 1
    out, err = capsys.readouterr()
    warned = re.findall(r"warning: .*?/step-0000000(\d) ", out)
    assert warned == ["3", "4", "5", "6", "7"]
    assert rows(run_dir)[-1]["step"] == last  # of 12: the fifth save that fails is step 7's
    assert "Traceback" not in out + err
    assert checkpoint.resolve(run_dir).name == "step-00000002"
    assert main([str(toy), "run.name=a", "--resume", "auto"]) == 0


def test_R12_a_save_that_fails_when_a_run_is_stopped(toy: Path, capsys: Capture) -> None:
    """Resumable where there is an older checkpoint; failed, not bad input, where there is none."""
    with Faults(toy.parent / "runs/a", before=lambda op: full_disk(op, "tmp-step-00000003")):
        saves = ["run.name=a", "checkpoint.every_steps=2"]
        assert main([str(toy), *saves, "--stop-at-step", "3"]) == 75
    assert "step-00000002" in capsys.readouterr().out
    with Faults(toy.parent / "runs/b", before=lambda op: full_disk(op, "tmp-step")):
        assert main([str(toy), "run.name=b", "--stop-at-step", "3"]) == 1
    for mode in ("true", "false"):  # nor is a run done whose end is not saved
        last = Faults(toy.parent / f"runs/last-{mode}", before=lambda op: full_disk(op, "00000012"))
        with last:
            saves = [f"run.name=last-{mode}", f"checkpoint.asynchronous={mode}"]
            assert main([str(toy), *saves, "checkpoint.every_steps=6"]) == 1


def test_R12_full_disk_of_the_logs(
    toy: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = LogFile(Path("/dev/full"))
    for number in range(2000):
        full.write(f"line {number}\n")
    full.close()
    warned = capfd.readouterr().err
    assert warned.count("warning: /dev/full: No space left on device") == 1
    monkeypatch.setattr("fasttrain.log.sinks.LogFile", lambda path: LogFile(Path("/dev/full")))
    assert main([str(toy)]) == 0
    assert checkpoint.resolve(toy.parent / "runs/toy").name == "step-00000012"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_R12_the_disk_is_checked_for_the_size_that_checkpoints_have(
    toy: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    override, foreseen = f"optim.name={optimizer}", list[int]()

    def check(run_dir: Path, checkpoint_bytes: int, keep_last: int) -> None:
        foreseen.append(checkpoint_bytes)

    monkeypatch.setattr(session, "check_disk", check)
    assert main([str(toy), override, "--stop-at-step", "1"]) == 75
    path = checkpoint.resolve(toy.parent / "runs/toy")
    files = [path / f"{stem}.safetensors" for stem in ("model", "optimizer")]
    written = sum(file.stat().st_size for file in files)
    assert foreseen == [pytest.approx(written, rel=0.03)]  # JSON headers and step counts aside
    run_dir = path.parents[1]
    free = os.statvfs(run_dir)
    check_disk(run_dir, free.f_bavail * free.f_frsize // 8, keep_last=4)
    with pytest.raises(UserError, match=r"\b6 of .* GiB\b.*checkpoint\.keep_last"):
        check_disk(run_dir, free.f_bavail * free.f_frsize // 5, keep_last=4)


# ---- R13: one trainer a folder -------------------------------------------------------------------


HOLD = """
import subprocess, sys, time
from pathlib import Path
from fasttrain.run.folder import lock_run_dir
lock = lock_run_dir(Path(sys.argv[1]))
lock.__enter__()
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_R13_the_lock_dies_with_its_process_though_a_child_lives(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match=r"\bin use\b.*run\.name"):
            lock_run_dir(tmp_path).__enter__()
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        with lock_run_dir(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


# ---- failures on the way -------------------------------------------------------------------------


def fails_at(call: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = Loader.__next__, 0

    def failing(self: Loader) -> object:
        nonlocal count
        count += 1
        if count == call:
            raise error
        return real(self)

    monkeypatch.setattr(Loader, "__next__", failing)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_a_data_error_on_the_way_is_a_failure_and_not_bad_input(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before = threads()
    fails_at(6, DataError("shard 3: changed while it was read"), monkeypatch)
    assert main([str(toy), "checkpoint.every_steps=2"]) == 1
    out, err = capsys.readouterr()
    assert "warning: shard 3: changed while it was read" in out
    assert "Traceback" not in out + err
    path = checkpoint.resolve(toy.parent / "runs/toy")
    assert path.name == "step-00000005", "the steps before it are kept"
    assert re.search("saved.*runs/toy/checkpoints/step-00000005", out)
    assert threads() <= before


def test_any_other_error_shows_where_and_closes_all_that_is_open(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before, n_files = threads(), len(os.listdir("/proc/self/fd"))
    fails_at(6, RuntimeError("of the fifth step"), monkeypatch)
    assert main([str(toy), "checkpoint.every_steps=2"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "RuntimeError: of the fifth step" in err
    assert checkpoint.resolve(toy.parent / "runs/toy").name == "step-00000004"
    assert threads() <= before
    monkeypatch.undo()  # the error, held by what raised it, holds the frames of its traceback
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= n_files
    with lock_run_dir(toy.parent / "runs/toy"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_is_full_at_the_start_is_one_line_and_leaves_no_folder(
    number: int, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "sync", full)
    assert main([str(toy)]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("error: runs/toy/")
    assert f"{os.strerror(number)}; " in shown[-1]
    assert not any("Traceback" in line for line in shown)
    assert not Path("runs/toy").exists()
