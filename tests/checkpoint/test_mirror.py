"""Copies of checkpoints elsewhere: whole or never taken, whatever cuts an upload off."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fasttrain import storage as files
from fasttrain.checkpoint import CheckpointError, CheckpointWriter, resolve
from fasttrain.checkpoint.files import read_manifest
from fasttrain.config import UserError
from fasttrain.mirror import Mirror
from fasttrain.storage import DataError
from tests.checkpoint import test_sharded_checkpoint as sharded
from tests.checkpoint.test_checkpoint_faults import groups, is_intact
from tests.support.faults import Crash, flip_bit
from tests.support.toy import ENV, ROOT, wait_until
from tests.support.toy_checkpoints import CONFIG, reseal
from tests.support.toy_mirror import At, Faulty

METRICS = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5}


@pytest.fixture(autouse=True)
def _whole_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSE_S", 0.01)
    monkeypatch.setattr(Faulty, "happens", Faulty.happens)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # spares the disk
    Faulty.log.clear()


class Run:
    """A run folder, its mirror on the faulty file system, and what the mirror warned of."""

    def __init__(self, root: Path, *, keep_last: int = 1, address: str = "") -> None:
        self.root, self.copies = root, root / "m/a/checkpoints"
        self.warned: list[str] = []
        self.noted: list[str] = []
        self.address = address or f"faulty://{root}/m"
        self.mirror = Mirror(
            self.address,
            root / "runs/a",
            keep_last,
            note=self.noted.append,
            warn=self.warned.append,
        )
        self.writer = CheckpointWriter(
            root / "runs/a/checkpoints", keep_last=2, asynchronous=False, mirror=self.mirror
        )

    def save(self, step: int, version: int = 0) -> None:
        """Save, and leave it to the test to copy."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(self.mirror, "wake", lambda: None)
            self.writer.save(
                step, groups(step, version), {"version": version}, CONFIG, metric=METRICS.get(step)
            )

    def copy(self) -> None:
        self.mirror._copy_new()

    def fetch(self) -> Path:
        """Bring what is in the mirror to another machine, and return the newest that verifies."""
        there = self.root / "elsewhere/a"
        shutil.rmtree(there, ignore_errors=True)
        Mirror(self.address, there, 1, note=self.noted.append, warn=self.warned.append).fetch()
        return resolve(there, report=self.warned.append)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.copies))


def test_what_is_copied_is_what_was_saved(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for name in ("metrics.jsonl", "tokenizer.json"):
        (tmp_path / "runs/a" / name).write_text(f"{name} of a run\n")
    for step, names in (
        (1, ["step-00000001-c1"]),
        (2, ["step-00000002-c2"]),
        (3, ["step-00000002-c2", "step-00000003-c3"]),  # the best is kept
        (4, ["step-00000004-c4"]),
    ):
        run.save(step)
        run.copy()
        assert run.names() == names
        assert is_intact(run.fetch()) == step
        best = resolve(tmp_path / "elsewhere/a", "best")
        assert is_intact(best) == min(range(1, step + 1), key=METRICS.__getitem__)
    assert (tmp_path / "elsewhere/a/metrics.jsonl").read_text() == "metrics.jsonl of a run\n"
    assert (tmp_path / "elsewhere/a/tokenizer.json").is_file()
    assert run.warned == []


def test_the_manifest_comes_last_and_goes_first(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
        run.copy()
    last = [line for line in Faulty.log if "step-00000002" in line and line.startswith("write")][-1]
    assert last.endswith("step-00000002-c2/manifest.json")
    gone = [line.split("/checkpoints/")[1] for line in Faulty.log if line[0] in "ur"]
    assert gone == ["step-00000001-c1/manifest.json", "step-00000001-c1"]
    assert Faulty.log.index(last) < Faulty.log.index(
        next(line for line in Faulty.log if line.startswith("unlink"))
    )


def saved_again(run: Run) -> None:
    run.save(3, version=1)


def after_a_cut(run: Run) -> None:
    """As an upload leaves it that was cut off, in the middle of another commit of this number."""
    half = run.copies / "step-00000004-c4"
    half.mkdir()
    (half / "of-another.safetensors").write_bytes(b"x")
    record = json.loads((run.copies.parent / "mirror.json").read_text())
    record["copies"].append(half.name)
    (run.copies.parent / "mirror.json").write_text(json.dumps(record))
    run.save(4)


CHANGES = {
    "next": lambda run: run.save(4),  # the new best: all others go
    "again": saved_again,
    "after a cut": after_a_cut,
    "first": lambda run: (shutil.rmtree(run.root / "m"), run.save(4)),
}


@pytest.mark.parametrize("after_half", [True, False], ids=["half", "before"])
@pytest.mark.parametrize("change", CHANGES)
def test_R5_crash_at_every_operation(change: str, after_half: bool, tmp_path: Path) -> None:
    """A crash leaves the newest whole copy to be found, and the next upload puts all in order."""
    before, crashed = Run(tmp_path / "before"), True
    for step in (1, 2, 3):
        before.save(step)
        before.copy()
    CHANGES[change](before)
    least = 0 if change == "first" else 3
    number = -1
    while crashed:
        number += 1
        shutil.copytree(tmp_path / "before", tmp_path / str(number))
        run = Run(tmp_path / str(number))
        at = At(number, lambda: (_ for _ in ()).throw(Crash()), after_half=after_half)
        with contextlib.suppress(Crash):
            run.copy()
        crashed, Faulty.happens = at.done, lambda what, half: None
        where, whole = Faulty.log[-1], []
        for path in run.copies.iterdir() if run.copies.is_dir() else ():
            with contextlib.suppress(CheckpointError):
                whole.append(read_manifest(path))
        if whole:
            newest = max(whole, key=lambda m: m["commit"])
            found = run.fetch()
            assert read_manifest(found) == newest, where
            assert is_intact(found) >= least, where
        else:
            assert least == 0, where
        assert len(run.warned) <= (after_half and where.endswith("manifest.json")), run.warned
        if not crashed:
            assert is_intact(run.fetch()) == newest["step"] == (3 if change == "again" else 4)
        # The next upload, of a session after the crash
        again = Run(tmp_path / str(number))
        again.copy()
        good = {"again": ["step-00000002-c2", "step-00000003-c4"]}.get(change, ["step-00000004-c4"])
        assert again.names() == good, where
        assert is_intact(again.fetch()) == int(good[-1][5:13])
        assert again.warned == []
        shutil.rmtree(tmp_path / str(number))
    assert number >= 6, "the faults were not injected"


def test_R5_what_a_folder_holds_is_on_its_disk_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, synced = Run(tmp_path, address=str(tmp_path / "m")), list[str]()
    run.save(1)
    monkeypatch.setattr(os, "fsync", lambda f: synced.append(os.readlink(f"/proc/self/fd/{f}")))
    run.copy()
    copy = str(run.copies / "step-00000001-c1")
    first = synced.index(f"{copy}/manifest.json")
    for name in {*os.listdir(copy)} - {"manifest.json"}:
        assert synced.index(f"{copy}/{name}") < first
    assert {copy, str(run.copies)} <= {*synced[:first]}
    assert copy in synced[first:]


def test_R5_crash_at_every_file_that_is_brought_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next time everything is brought back: the newest, the best and all of the log."""
    run, there = Run(tmp_path), tmp_path / "elsewhere/a"
    (tmp_path / "runs/a/metrics.jsonl").write_text("a row\nanother\n")
    for step in (1, 2, 3):
        run.save(step)
        run.copy()

    def get_file(self: Faulty, source: str, target: str, **_: Any) -> None:
        content = Path(self._strip_protocol(source)).read_bytes()
        left[0] -= 1
        if left[0] == 0:
            Path(target).write_bytes(content[: len(content) // 2])
            raise Crash
        Path(target).write_bytes(content)

    monkeypatch.setattr(Faulty, "get_file", get_file, raising=False)
    crashed, left, number = True, [0], 0
    while crashed:
        crashed, number = False, number + 1
        shutil.rmtree(there, ignore_errors=True)
        for left[0] in (number, 0):
            try:
                Mirror(run.address, there, 1, note=run.noted.append, warn=run.warned.append).fetch()
            except Crash:
                crashed = True
        assert is_intact(resolve(there)) == 3
        assert is_intact(resolve(there, "best")) == 2
        assert (there / "metrics.jsonl").read_text() == "a row\nanother\n"
    assert number > 8
    assert run.warned == []


def test_a_copy_of_this_name_that_another_machine_made_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    shutil.copytree(tmp_path / "runs", tmp_path / "old")
    run.save(2)
    run.copy()
    shutil.rmtree(tmp_path / "runs")
    os.rename(tmp_path / "old", tmp_path / "runs")
    stale = Run(tmp_path)
    stale.save(2, version=8)  # before it has looked there: the second commit too
    stale.copy()
    assert json.loads((stale.fetch() / "state.json").read_text()) == {"version": 8}
    assert stale.names() == ["step-00000002-c2"]


@pytest.mark.parametrize("flips", [200])
def test_R14_bit_flips_over_every_file(flips: int, tmp_path: Path) -> None:
    run, draw = Run(tmp_path, keep_last=2), random.Random(14)
    for step in (1, 3):
        run.save(step)
        run.copy()
    names = sorted((run.copies / "step-00000003-c2").iterdir())
    for n in range(flips):
        file = names[n % len(names)]
        bit = draw.randrange(8 * file.stat().st_size)
        flip_bit(file, bit)
        run.warned.clear()
        assert is_intact(run.fetch()) == 1
        assert len(run.warned) == 1
        assert "step-00000003-c2" in run.warned[0]
        assert "damaged" in run.warned[0]
        flip_bit(file, bit)
    assert is_intact(run.fetch()) == 3


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "swapped", "longer"])
def test_R15_files_that_are_not_as_they_were(how: str, tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=2)
    for step in (1, 3):
        run.save(step)
        run.copy()
    newest = run.copies / "step-00000003-c2"
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        if how == "missing":
            file.unlink()
        else:
            other = (run.copies / "step-00000001-c1" / file.name).read_bytes()
            spoiled = {"truncated": content[:-1], "empty": b"", "swapped": other}
            file.write_bytes(spoiled.get(how, content + b"\0"))
        run.warned.clear()
        same = how == "swapped" and other == content
        assert is_intact(run.fetch()) == (3 if same else 1), file
        # A copy without its manifest is one that was cut off.
        assert len(run.warned) == (not same and (how, file.name) != ("missing", "manifest.json"))
        file.write_bytes(content)
    shutil.rmtree(run.copies / "step-00000001-c1")
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/m\b.*: .*checkpoint.*run\.name"):
        run.fetch()


def test_a_hostile_manifest_writes_nothing_elsewhere(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.copy()
    copy = run.copies / "step-00000001-c1"
    shutil.copy(copy / "state.json", run.copies / "hostile")
    entry = read_manifest(copy)["files"]["state.json"]
    reseal(copy, files={**read_manifest(copy)["files"], "../hostile": entry})
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/m\b.*: .*checkpoint.*run\.name"):
        run.fetch()
    assert not list((tmp_path / "elsewhere").rglob("hostile"))


def test_R14_a_damaged_checkpoint_here_is_replaced_by_its_copy(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.copy()
    flip_bit(tmp_path / "runs/a/checkpoints/step-00000001/model.safetensors", 9999)
    run.mirror.fetch()
    assert is_intact(resolve(tmp_path / "runs/a", report=run.warned.append)) == 1


def test_what_lies_there_shorter_than_it_was_sent_is_no_copy_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.copy()
    real = Faulty._write

    def short(self: Faulty, path: str, content: bytes) -> None:
        real(self, path, content[:-1] if path.endswith("model.safetensors.part") else content)

    monkeypatch.setattr(Faulty, "_write", short)
    run.save(2)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/m\b.*: .*step-00000002-c2\b"):
        run.copy()
    assert is_intact(run.fetch()) == 1
    monkeypatch.setattr(Faulty, "_write", real)
    run.copy()
    assert run.names() == ["step-00000002-c2"]


def test_what_was_damaged_before_it_is_copied_is_not_copied(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    flip_bit(tmp_path / "runs/a/checkpoints/step-00000001/model.safetensors", 9999)
    with pytest.raises(CheckpointError, match=r"step-00000001/model\.safetensors: .*SHA-256"):
        run.copy()
    assert "manifest.json" not in os.listdir(run.copies / "step-00000001-c1")


def test_a_checkpoint_that_is_saved_again_during_its_upload_is_not_mixed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    At(4, lambda: run.save(1, version=5), after_half=False)
    run.copy()
    assert not (run.copies / "step-00000001-c1/manifest.json").exists()
    run.copy()
    assert run.names() == ["step-00000001-c2"]
    assert is_intact(run.fetch()) == 1


def test_an_older_checkpoint_that_is_gone_on_from_is_the_newest_there_too(tmp_path: Path) -> None:
    """Named with --resume on a machine that lacks what another has saved since."""
    run = Run(tmp_path)
    run.save(1)
    shutil.copytree(tmp_path / "runs", tmp_path / "old")
    for step in (2, 3):
        run.save(step)
        run.copy()
    shutil.rmtree(tmp_path / "runs")
    os.rename(tmp_path / "old", tmp_path / "runs")
    stale = Run(tmp_path)
    stale.copy()
    stale.save(2, version=8)
    stale.copy()
    found = stale.fetch()
    assert is_intact(found) == 2
    assert json.loads((found / "state.json").read_text()) == {"version": 8}


def blocked(run: Run) -> threading.Event:
    """Have the next write there wait for the event that is returned."""
    event = threading.Event()
    At(2, lambda: event.wait(60), after_half=False)
    return event


def test_saves_do_not_wait_for_an_upload_nor_remove_what_it_reads(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.writer.keep_last = 1
    release = blocked(run)
    for step in range(11, 16):  # none is evaluated, and so none is best
        run.writer.save(step, groups(step), {"version": 0}, CONFIG)
        wait_until(lambda: run.mirror.copying is not None)
    kept = sorted(p.name for p in (tmp_path / "runs/a/checkpoints").glob("step-*"))
    assert kept == ["step-00000011", "step-00000015"]
    release.set()
    run.mirror.finish(60)
    (note,) = run.noted
    assert re.search(rf"{run.mirror.address}.*\b60 s\b", note)
    assert run.warned == []
    assert run.names() == ["step-00000015-c5"]
    assert [line for line in Faulty.log if "step-00000011-c1/manifest.json" in line]
    assert not [line for line in Faulty.log if "step-00000013" in line]  # it was overtaken
    assert is_intact(run.fetch()) == 15


def test_the_end_waits_for_the_upload_for_a_bounded_time_and_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path)
    release = blocked(run)
    run.writer.save(1, groups(1), {"version": 0}, CONFIG)
    run.mirror.finish(0.2)
    assert re.search(rf"{run.address}.*\b0\.2 s\b", run.noted[0])
    assert re.search(f"checkpoint.*{run.address}", run.warned[0])
    run.mirror.finish(1e9)  # nothing is waited for twice
    assert len(run.noted) == 1
    release.set()
    wait_until(lambda: run.mirror.copying is None)


def failing(what: str, half: object) -> None:
    raise OSError(5, "the bucket is on fire")


def test_a_bucket_that_fails_is_tried_a_bounded_number_of_times_and_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    Faulty.happens = failing
    run.writer.save(1, groups(1), {"version": 0}, CONFIG)
    run.mirror.finish(60)
    assert len(Faulty.log) == files.ATTEMPTS
    assert run.mirror.failures == 1
    assert "the bucket is on fire" in run.warned[0]
    assert f"{files.ATTEMPTS} attempts" in run.warned[0]
    Faulty.happens = lambda what, half: None
    run.writer.save(2, groups(2), {"version": 0}, CONFIG)
    run.mirror.finish(60)
    assert len(run.warned) == run.mirror.failures == 1
    assert is_intact(run.fetch()) == 2


def test_a_fault_that_passes_is_not_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for n in range(6):
        run.save(n)

        def fail() -> None:
            raise OSError(5, "once")

        at = At(n, fail)
        run.copy()
        assert at.done
        assert is_intact(run.fetch()) == n
    assert run.warned == []


def test_any_file_system_of_fsspec(tmp_path: Path) -> None:
    run = Run(tmp_path, address="memory://bucket/runs")
    for step in (1, 2, 3):
        run.save(step)
        run.copy()
    assert is_intact(run.fetch()) == 3
    memory = fsspec.filesystem("memory")
    names = {path.split("/")[5] for path in memory.find("/bucket/runs/a/checkpoints")}
    assert names == {"step-00000002-c2", "step-00000003-c3"}
    memory.rm("/bucket", recursive=True)


def test_the_run_itself_is_no_mirror_of_it(tmp_path: Path) -> None:
    for address in (f"{tmp_path}/runs", f"file://{tmp_path}/runs/"):
        with pytest.raises(UserError, match=r"checkpoint\.mirror .*run\.out_dir"):
            Mirror(address, tmp_path / "runs/a", 1, note=print, warn=print)


def test_secrets_in_an_address_are_not_shown(tmp_path: Path) -> None:
    run = Run(tmp_path, address=f"faulty://me:hunter2@{tmp_path}/m")
    run.mirror.finish(1)
    Faulty.happens = failing
    run.writer.save(1, groups(1), {"version": 0}, CONFIG)
    run.writer.wait()
    run.mirror.finish(60)
    assert run.warned
    assert "hunter2" not in " ".join(run.warned)


def test_several_ranks_files_are_there_before_the_manifest(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=2)
    several = sharded.writers(tmp_path / "runs/a/checkpoints", 2)
    for step in (1, 2):
        assert sharded.save(several, step) == [None, None]
        Faulty.log.clear()
        run.copy()
        written = [line.rpartition("/")[2] for line in Faulty.log if line.startswith("write")]
        assert written[-1] == "manifest.json"
        assert {"rank-00000.json", "rank-00001.json", "model.rank-00001.safetensors"} <= {*written}
        assert sharded.is_intact(run.fetch(), 2) == step


FEW, ALL = [10, 12, 21], [*range(40)]


@pytest.mark.parametrize("points", [FEW, pytest.param(ALL, marks=pytest.mark.soak)])
def test_R4_killed_during_an_upload_and_resumed_on_another_machine(
    points: list[int], tmp_path: Path
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.toy_mirror", str(tmp_path), *map(str, points)],
        cwd=ROOT, env=ENV, capture_output=True, text=True, check=False, timeout=3000,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["differences"] == []
    assert report["killed"] >= min(len(points), 30)
    # The manifest of the first copy is the 14th change: folders, records, and its six other files.
    assert 0 < report["from_nothing"] == report["killed"] - len(report["fetched"]) <= 14


def test_a_mirror_that_cannot_be_reached_is_never_taken_for_an_empty_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.copy()
    os.rename(run.copies, tmp_path / "away")
    run.copies.write_text("no folder\n")
    (tmp_path / "m/a").chmod(0o755)
    real = Faulty.ls

    def unreachable(self: Faulty, path: str, **options: Any) -> Any:
        raise OSError(5, "no answer")

    Faulty.ls = unreachable  # type: ignore[method-assign]
    try:
        with pytest.raises(DataError, match="no answer"):
            run.fetch()
    finally:
        Faulty.ls = real  # type: ignore[method-assign]
