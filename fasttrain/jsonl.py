"""``metrics.jsonl``: what was measured, for programs."""

import contextlib
import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fasttrain.log_file import LogFile

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
        kept, head = [], ""
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if not isinstance(row, dict) or row.get("stopped"):
                    continue
                if row.get("kind") == "run":
                    head = line + "\n"
                elif row.get("step", 0) <= step:
                    kept += [head, line + "\n"]
                    head = ""
        if self._head not in kept:
            self._head = ""
        self._begin = step
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._path)
        self._file = LogFile(self._path)

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def _line(kind: str, row: Mapping[str, Any]) -> str:
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"kind": kind, "time": now, **finite}, allow_nan=False) + "\n"
