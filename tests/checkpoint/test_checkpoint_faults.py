"""Checkpoints under crashes, power cuts, full disks and kills (R4, R5, R6, R12)."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fasttrain.checkpoint import CheckpointError, CheckpointWriter, load, resolve
from fasttrain.checkpoint import files as checkpoint_files
from tests.support.faults import LOSSES, Crash, Faults
from tests.support.toy import ENV, ROOT
from tests.support.toy_checkpoints import CONFIG

Groups = dict[str, dict[str, torch.Tensor]]


def groups(step: int, version: int = 0, size: int = 600) -> Groups:
    """Tensors that tell by their values which save they are of."""
    generator = torch.Generator().manual_seed(1000 * version + step)
    return {
        "model": {"w": torch.randn(size, generator=generator), "n": torch.tensor(step)},
        "rng": {"cpu": torch.randint(256, (40,), generator=generator, dtype=torch.uint8)},
    }


def save(folder: Path, step: int, *, version: int = 0, metric: float | None = None) -> None:
    writer = CheckpointWriter(folder, keep_last=2, asynchronous=False)
    writer.save(step, groups(step, version), {"version": version}, CONFIG, metric=metric)


def is_intact(path: Path) -> int:
    """Loads a checkpoint, holds it against what was saved and returns its step."""
    loaded = load(path)
    for stem, tensors in groups(loaded.step, loaded.state["version"]).items():
        assert loaded.group(stem).keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded.group(stem)[name], tensor), (path, stem, name)
    return loaded.step


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def three_saved(folder: Path) -> None:
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save(folder, step, metric=metric)


def crashed_before(folder: Path) -> None:
    """As a crash between the two renames of a step that is saved again leaves it."""
    three_saved(folder)
    (folder / ".tmp-step-00000003-1").mkdir()
    (folder / ".tmp-step-00000003-1" / "model.safetensors").write_bytes(b"half")
    os.rename(folder / "step-00000003", folder / ".old-step-00000003")


def save_1(folder: Path) -> None:
    save(folder, 1, metric=1.0)


def save_4(folder: Path) -> None:
    save(folder, 4, metric=0.5)  # moves `latest` and `best`, removes step 2


def save_3_again(folder: Path) -> None:
    save(folder, 3, version=1, metric=0.5)


Action = Callable[[Path], None]
# (what lies there before, the save that crashes, the step it is of)
SCENARIOS: list[tuple[Action, Action, int]] = [
    (Path.mkdir, save_1, 1),
    (three_saved, save_4, 4),
    (three_saved, save_3_again, 3),
    (crashed_before, save_4, 4),
]


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the disk where power is only cut in play; `Faults` keeps the books all the same."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def crash_everywhere(
    scenario: tuple[Action, Action, int], loss: str, root: Path, disk: type[Faults] = Faults
) -> Iterator[tuple[str, Path, int]]:
    """Runs a save again and again, crashing one operation later each time, last of all after it.

    Yields:
        where it crashed, the folder as the crash left it, the step that must be there at least.
    """
    prepare, action, step = scenario
    root.mkdir()
    prepare(root / "before")
    least = 0 if prepare is Path.mkdir else 3
    for number in range(10_000):
        folder = root / str(number) / "checkpoints"
        shutil.copytree(root / "before", folder)
        faults = disk(folder.parent, crash_at=number)
        with faults, contextlib.suppress(Crash):
            action(folder)
        faults.lose(loss)
        yield (
            f"{loss} lost at {number}: {faults.log[-1]}",
            folder,
            least if faults.crashed else step,
        )
        if not faults.crashed:
            assert number > 20, "the faults were not injected"
            return
        for rest in root.glob(f"{number}*"):
            shutil.rmtree(rest)


def check_after_crash(where: str, folder: Path, least: int) -> None:
    passed_over: list[str] = []
    try:
        found = resolve(folder, report=passed_over.append)
    except CheckpointError:
        assert least == 0, where  # nothing was committed: an error, never a silent fresh start
    else:
        assert is_intact(found) >= least, where
        for pointer in ("latest", "best"):
            if (folder / pointer).exists():
                is_intact(resolve(folder, pointer))
    save(folder, 9)
    assert is_intact(resolve(folder, report=passed_over.append)) == 9, where
    assert not passed_over, where
    assert leftovers(folder) == [], where


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=["first", "next", "again", "after-a-crash"])
def test_R5_crash_at_every_operation(
    scenario: tuple[Action, Action, int], loss: str, tmp_path: Path
) -> None:
    for where, folder, least in crash_everywhere(scenario, loss, tmp_path / "r"):
        check_after_crash(where, folder, least)


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("loss", LOSSES)
def test_R5_crash_at_every_operation_past_the_page_cache(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "__defaults__", (0, 3000))  # two pages and the half of one
    monkeypatch.setattr(checkpoint_files, "_LARGE", 1)
    monkeypatch.setattr(checkpoint_files, "_WRITE", 4096)
    writes = 0
    for where, folder, least in crash_everywhere(SCENARIOS[1], loss, tmp_path / "r"):
        check_after_crash(where, folder, least)
        writes += "write" in where and "model.safetensors" in where
    assert writes == 3


class ForgetfulOfFiles(Faults):
    """Stands for a writer that does not fsync its files."""

    def _fsync(self, descriptor: int) -> None:
        if os.path.isdir(self._paths.get(descriptor, "/")):
            super()._fsync(descriptor)


class ForgetfulOfFolders(Faults):
    """Stands for a writer that does not fsync its folders."""

    def _fsync(self, descriptor: int) -> None:
        if not os.path.isdir(self._paths.get(descriptor, "/")):
            super()._fsync(descriptor)


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize(
    ("disk", "loss"),
    [(ForgetfulOfFiles, "data"), (ForgetfulOfFiles, "zeroed"), (ForgetfulOfFolders, "names")],
)
def test_R5_the_loop_notices_a_missing_fsync(disk: type[Faults], loss: str, tmp_path: Path) -> None:
    found_out = 0
    for where, folder, least in crash_everywhere(SCENARIOS[1], loss, tmp_path / "r", disk):
        try:
            check_after_crash(where, folder, least)
        except (AssertionError, CheckpointError):
            found_out += 1
    assert found_out > 0


def test_R6_stale_partials_do_not_hinder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    outside = tmp_path / "precious.txt"
    outside.write_text("precious")
    stale = folder / ".tmp-step-00000002-0123456789abcdef-1"
    (stale / "deeper").mkdir(parents=True)
    (stale / "deeper" / "model.safetensors").write_bytes(b"x" * 100)
    (stale / "link").symlink_to(outside)
    (folder / ".tmp-latest").write_text("half")
    (folder / ".tmp-step-00000001-0123456789abcdef-2").write_text("not a folder")
    (folder / ".tmp-best").symlink_to(tmp_path)
    save(folder, 2)
    assert is_intact(resolve(folder, "latest")) == 2
    assert leftovers(folder) == []
    assert outside.read_text() == "precious"


def test_R6_the_same_step_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    three_saved(folder)
    save(folder, 3, version=7, metric=2.0)
    assert load(resolve(folder)).state == {"version": 7}
    assert is_intact(resolve(folder)) == 3
    assert resolve(folder, "best").name == "step-00000002"
    assert leftovers(folder) == []


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize(
    ("error", "persistent"),
    [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False)],
    ids=["full-once", "full-from-then-on", "EIO"],
)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_R12_disk_full_at_every_operation(
    asynchronous: bool, error: int, persistent: bool, tmp_path: Path
) -> None:
    before = tmp_path / "before"
    three_saved(before)
    failures = 0
    for number in range(10_000):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(before, folder)
        warned: list[str] = []
        writer = CheckpointWriter(
            folder, keep_last=2, asynchronous=asynchronous, warn=warned.append
        )
        faults = Faults(folder, fail_at=number, error=error, persistent=persistent)
        raised = None
        with faults:
            try:
                writer.save(4, groups(4), {"version": 0}, CONFIG, metric=0.5)
                writer.wait()
            except CheckpointError as caught:
                raised = caught
        faults.lose("nothing")
        if number >= len(faults.log):
            assert raised is None
            assert warned == []
            assert failures > 30
            return
        where = faults.log[number]
        told = str(raised or " ".join(warned))
        if not told:  # only the sweep of leftovers may shrug
            assert where.startswith(("unlink .tmp-", "rmdir .tmp-")), where
        else:
            failures += 1
            assert raised is None or getattr(raised.__cause__, "errno", None) == error
            assert os.strerror(error) in told
            assert "step-00000004" in told
            # What is on the disk for good is saved, for other ranks as well.
            assert ("complete" in told) == (raised is None), where
        committed = (folder / "step-00000004").is_dir()
        assert committed or raised is not None
        assert is_intact(resolve(folder)) == (4 if committed else 3), where
        if not committed:  # retention is suspended, the partial removed as far as the disk lets
            assert is_intact(folder / "step-00000002") == 2
            assert is_intact(resolve(folder, "best")) == 2
            assert leftovers(folder) == [] or where.startswith(("unlink", "rmdir")), where
        writer.save(5, groups(5), {"version": 0}, CONFIG)  # the error was told once
        writer.wait()
        assert is_intact(resolve(folder)) == 5
        assert leftovers(folder) == []
        shutil.rmtree(folder.parent)
    raise AssertionError("unreachable")


def test_R12_a_background_error_surfaces_at_the_next_save(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    writer = CheckpointWriter(folder, keep_last=1)
    with Faults(folder, fail_at=8):
        writer.save(2, groups(2), {"version": 0}, CONFIG)
        with pytest.raises(CheckpointError, match=r"step-00000002\b.*No space left.*free"):
            writer.save(3, groups(3), {"version": 0}, CONFIG)
    writer.save(3, groups(3), {"version": 0}, CONFIG)
    writer.close()
    assert is_intact(resolve(folder)) == 3


def test_R12_limit_on_file_sizes(tmp_path: Path) -> None:
    """The kernel's own refusal, in the middle of a file."""
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    writer = CheckpointWriter(folder, keep_last=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        writer.save(2, groups(2, size=1 << 20), {"version": 0}, CONFIG)
        with pytest.raises(CheckpointError, match="ulimit -f") as caught:
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert getattr(caught.value.__cause__, "errno", None) == errno.EFBIG
    assert is_intact(resolve(folder)) == 1
    assert leftovers(folder) == []


def test_R12_small_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    try:
        folder = disk / "checkpoints"
        save(folder, 1)
        writer = CheckpointWriter(folder, keep_last=1)
        writer.save(2, groups(2, size=1 << 20), {"version": 0}, CONFIG)
        with pytest.raises(CheckpointError, match=r"No space left.*free") as caught:
            writer.wait()
        assert getattr(caught.value.__cause__, "errno", None) == errno.ENOSPC
        assert is_intact(resolve(folder)) == 1
        assert leftovers(folder) == []
        save(folder, 2)
        assert is_intact(resolve(folder)) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_R12_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file/checkpoints\b"):
        CheckpointWriter(tmp_path / "file" / "checkpoints", keep_last=1)


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.soak)])
def test_R4_kill_in_the_middle_of_a_save(kills: int, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.toy_kills", str(tmp_path), str(kills)],
        cwd=ROOT, env=ENV, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed_over"] == []
    assert report["in_a_save"] == kills
    assert report["partials"] >= kills / 2  # and the kills were all over it: some left these,
    assert 0 < report["lost"] < kills  # some came before the commit, some after
