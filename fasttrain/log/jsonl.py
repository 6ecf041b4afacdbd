"""``metrics.jsonl``: what was measured, for programs."""

import json
import math
from collections.abc import Mapping
from datetime import datetime
from itertools import compress
from pathlib import Path
from typing import Any, Literal

from fasttrain.log.text import LogFile, keep_lines

__all__ = ["JsonlLogger"]


class JsonlLogger:
    """Appends rows to ``metrics.jsonl``, one JSON object a line, handed to the system at once.

    Args:
        path: the file; created where missing, continued where not.
        made_by: what the rows are made by: a line before the first of them says so.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any] | None = None) -> None:
        self._path, self._made_by = path, made_by
        self._file = LogFile(path)
        self._head = ""  # that line, once it is in the file
        self._begin = 0  # the step that these rows begin after

    def write(self, kind: Literal["train", "eval"], row: Mapping[str, Any]) -> None:
        """Append a row and when that was; a number that is not finite becomes null, as in JSON."""
        lines = _line(kind, row)
        if self._made_by and not self._head:
            self._head = _line("run", {"step": self._begin, **self._made_by})
            lines = self._head + lines
        self._file.write(lines)

    def drop_after(self, step: int) -> None:
        """Drop rows of steps after ``step`` and lines cut off by a crash, for a run that goes on
        from a checkpoint of that step: each row then stands once. So go rows that an uninterrupted
        run does not have, and what a row was made by where no such row is left.
        """
        self._file.close()
        lines = [x.decode("utf-8", "replace") for x in self._path.read_bytes().splitlines(True)]
        kept = _kept(lines, step)
        if self._head not in compress(lines, kept):
            self._head = ""
        self._begin = step
        flags = iter(kept)
        keep_lines(self._path, lambda _: next(flags))
        self._file = LogFile(self._path)

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def _kept(lines: list[str], step: int) -> list[bool]:
    """Return which lines stay; one that says what made rows stays with the first of these."""
    kept: list[bool] = []
    has_rows = False  # behind the line
    for line in reversed(lines):
        try:
            row = json.loads(line) if line.endswith("\n") else None
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or row.get("stopped"):
            kept.append(False)
        elif row.get("kind") == "run":
            kept.append(has_rows)
            has_rows = False
        else:
            at = row.get("step", 0)
            kept.append(isinstance(at, int) and at <= step)
            has_rows |= kept[-1]
    return kept[::-1]


def _line(kind: str, row: Mapping[str, Any]) -> str:
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"kind": kind, "time": now, **finite}, allow_nan=False) + "\n"
