"""What is left of an interrupted preparation, and how it goes on.

A dataset OUT is built in `.OUT.partial` beside it:

    dataset/       what will be OUT: finished shards, tokenizer.json, and the shard being written
    progress.json  what was asked for, and how far everything in dataset/ can be trusted
    lock           held by the process at work

`progress.json` is replaced only when everything it speaks of is on disk. To go on, the input is
read again from its beginning, which takes little, and not encoded up to there. OUT keeps what was
asked for in `prepared.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttrain.config.untrusted import read_json
from fasttrain.data.files import DataError, write_atomically
from fasttrain.data.format import DATASET_JSON

__all__ = ["Partial"]

PREPARED_JSON = "prepared.json"


class Partial:
    """The folder in which a dataset is built, held by this process alone."""

    def __init__(
        self, out: Path, asked: dict[str, Any], *, resume: bool, note: Callable[[str], None]
    ) -> None:
        self.out, self.folder = out, out.parent / f".{out.name}.partial"
        self.dataset = self.folder / "dataset"
        self._progress, self._asked = self.folder / "progress.json", asked
        self.state: dict[str, Any] = {}
        there = out.exists() and (not out.is_dir() or any(out.iterdir()))
        self.complete = False
        if there:
            if not (out / DATASET_JSON).is_file():
                raise DataError(
                    f"{out}: exists already and is not empty; name a new folder or remove it"
                )
            other = self._other_than_made() if resume else ""
            self.complete = resume and not other
            if not self.complete:
                raise DataError(
                    f"{out}: exists already and holds a dataset{other}; train on it as it is, "
                    "remove it, or name a new folder"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        import fcntl  # Windows has none

        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise DataError(f"{out}: another process is preparing it now; wait for it") from None
        except OSError:  # a file system without locks
            pass
        if self.complete:
            self.close()
            return
        try:
            self._take_up(resume, note)
        except BaseException:
            os.close(self._lock)
            raise

    def _take_up(self, resume: bool, note: Callable[[str], None]) -> None:
        """Reads what is left, or makes room."""
        if self._progress.exists():
            if resume:
                self._load()
                note(f"Going on with what an interrupted run left in {self.folder}")
            else:
                note(
                    f"Starting anew: {self.folder} of an interrupted run is replaced (--resume "
                    "would have gone on with it)"
                )
        elif resume:
            note(f"Nothing to resume: no interrupted run left {self.folder}; starting")
        if not self.state:
            shutil.rmtree(self.dataset, ignore_errors=True)
            self._progress.unlink(missing_ok=True)
        self.dataset.mkdir(exist_ok=True)
        for path in self.dataset.glob(".*"):  # files that were being written
            path.unlink()

    def _other_than_made(self) -> str:
        """How what is asked for differs from what the finished dataset was made of, if it does."""
        record = self.out / PREPARED_JSON
        if not record.exists():  # made by an earlier fasttrain
            return " that has no record of the files it was made of"
        try:
            other = self._other_than(read_json(record, "prepare it anew", DataError))
        except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
            return f" whose {PREPARED_JSON} is damaged ({error})"
        return other and f" made of something else: it had {other}"

    def _load(self) -> None:
        try:
            left = read_json(self._progress, "start anew without --resume", DataError)
            other, state = self._other_than(left["asked"]), left["state"]
        except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{self._progress}: damaged ({error}); start anew without --resume"
            ) from error
        if other:
            raise DataError(
                f"--resume: the interrupted run had {other}; repeat its command, or start anew "
                "without --resume"
            )
        self.state = state

    def _other_than(self, before: dict[str, Any]) -> str:
        """What was asked for `before` and is not now, in words; empty where it is the same."""
        asked = json.loads(json.dumps(self._asked))  # as it looks after being stored
        old, new = before["source"], asked["source"]
        for key in new:
            if key not in ("n_files", "n_bytes") and old.get(key) != new[key]:
                return f"{key} = {old.get(key)!r}, this one has {new[key]!r}"
        was, now = ({name: facts for name, *facts in a["files"]} for a in (before, asked))
        for name in was | now:
            if name not in was or name not in now:
                return f"other files: {name} is {'gone' if name in was else 'new'}"
            if was[name] != now[name]:
                return f"another {name} (its size, time of change or content)"
        if before["tokenizer_sha256"] != asked["tokenizer_sha256"]:
            return "another content of the tokenizer's file"
        return "" if before["recipe"] == asked["recipe"] else "another fasttrain or tokenizers"

    def save(self, **state: Any) -> None:
        """Records how far the work is; all of that must be on disk already."""
        self.state |= state
        content = json.dumps({"asked": self._asked, "state": self.state})
        write_atomically(self._progress, content.encode())

    def publish(self) -> None:
        """Gives the finished dataset its name."""
        write_atomically(self.dataset / PREPARED_JSON, json.dumps(self._asked).encode())
        os.chmod(self.dataset, 0o755)
        _sync(self.dataset)
        os.rename(self.dataset, self.out)
        _sync(self.out.parent)
        self.state = {}

    def close(self) -> None:
        """Lets another process go on; what is not worth that is removed."""
        if self._lock < 0:
            return
        if not self.state:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1


def _sync(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
