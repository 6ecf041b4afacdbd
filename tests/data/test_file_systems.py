"""What a file system lacks is done without, with a line of warning; modes are the umask's."""

import errno
import fcntl
import os
import re
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttrain import storage as files
from fasttrain.command import _open_closed_streams
from fasttrain.data.dataset import HEADER_BYTES
from fasttrain.data.format import open_dataset
from fasttrain.prepare import main as prepare
from fasttrain.run import folder
from fasttrain.storage import DataError, NoLocks, cache_folder, lock, sync_folder
from fasttrain.train import main
from tests.support.toy import write_config
from tests.support.toy_trainer import rows

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _nothing_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_warned", set())


def failing(number: int, when: Callable[..., bool], real: Callable[..., Any]) -> Callable[..., Any]:
    """Return a system call that fails with an error ``when`` that holds of its arguments."""

    def call(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return call


def lacking(number: int, capsys: Capture) -> list[str]:
    """Return the warnings of a call that a file system lacks, by the error it gives."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("warning: ") and os.strerror(number) in line]


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def write_text(folder: Path) -> Path:
    text = folder / "text.txt"
    text.write_text("some words of a text\n" * 400)
    return text


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", failing(number, lambda *_: True, fcntl.flock))
    config = write_config(tmp_path)
    assert prepare(["made", "--input", str(write_text(tmp_path)), "--tokenizer", "bytes"]) == 0
    assert main([str(config), "train.steps=3"]) == 0
    assert len(rows(tmp_path / "runs/toy")) == 3
    assert (tmp_path / "runs/toy/.lock").is_file()
    (told,) = lacking(number, capsys)
    assert "locks" in told.replace(os.strerror(number), "")
    with pytest.raises(NoLocks):
        lock(tmp_path / "lock")


def test_a_lock_that_fails_for_another_reason_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO, lambda *_: True, fcntl.flock))
    with pytest.raises(OSError, match="Input/output error"):
        lock(tmp_path / "lock")


def test_shards_are_fetched_into_a_cache_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK, lambda *_: True, fcntl.flock))
    config, cache = write_config(tmp_path), tmp_path / "cache"
    there = [f"data.path=file://{tmp_path / 'data'}", f"data.cache_dir={cache}"]
    assert main([str(config), "train.steps=3", *there]) == 0
    (told,) = lacking(errno.ENOLCK, capsys)
    assert "locks" in told.replace(os.strerror(errno.ENOLCK), "")
    assert not list(cache.rglob("*.part"))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_folders_is_used_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(number, is_folder, os.fsync))
    config = write_config(tmp_path)
    assert prepare(["made", "--input", str(write_text(tmp_path)), "--tokenizer", "bytes"]) == 0
    assert main([str(config), "train.steps=3"]) == 0
    assert (tmp_path / "runs/toy/checkpoints/step-00000003/manifest.json").is_file()
    (told,) = lacking(number, capsys)
    assert re.search("sync.* folders", told)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, is_folder, os.fsync))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_a_disk_that_does_not_say_how_full_it_is_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.shutil, "disk_usage", failing(errno.ENOSYS, lambda *_: True, print))
    folder.check_disk(tmp_path, 2**60, 2)


@pytest.mark.parametrize("umask", [0o007, 0o077])
def test_files_of_datasets_and_runs_have_the_modes_of_the_umask(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, text = write_config(tmp_path), write_text(tmp_path)
    (place := tmp_path / "place").mkdir()
    monkeypatch.chdir(place)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # as on a mounted bucket

    monkeypatch.setattr(os, "chmod", refused)
    before = os.umask(umask)
    try:
        assert prepare(["made", "--input", str(text), "--tokenizer", "bytes"]) == 0
        assert main([str(config), "train.steps=3", f"data.cache_dir={place / 'cache'}"]) == 0
    finally:
        os.umask(before)
    for path in place.rglob("*"):
        mode = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_a_dataset_may_have_more_shards_than_a_process_has_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = 20240520, 1, 50
    for number in range(60):
        ids = np.arange(50, dtype="<u2") + number
        file = tmp_path / f"text_train_{number:03}.bin"
        file.write_bytes(header.tobytes() + ids.tobytes())
    n_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 20, limits[1]))
    try:
        dataset = open_dataset(tmp_path, "train", vocab_size=512, cache_dir=tmp_path / "cache")
        assert dataset.read(0, 3000).reshape(60, 50)[:, 0].tolist() == list(range(60))
        # Where there are too few all the same, the message names the limit.
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
        monkeypatch.setattr(os, "open", failing(errno.EMFILE, lambda *_: True, os.open))
        with pytest.raises(DataError, match=rf"\b{n_open + 20}\b.* ulimit -n"):
            type(dataset.shards[0])(dataset.shards[0].path)
        for descriptor in held:
            os.close(descriptor)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_a_home_the_cache_is_a_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a name
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert cache_folder() == tmp_path / f"tmp/fasttrain-{os.getuid()}"
    assert not (tmp_path / "~").exists()
    with pytest.raises(DataError, match=r"data\.path = ~/x: .*\bhome\b"):
        open_dataset("~/x", "train")


def test_standard_streams_that_were_closed_lead_to_the_null_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    _open_closed_streams()
    print("nobody reads this")
    print("nor this", file=sys.stderr)
    assert sys.stdin.read() == ""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()
