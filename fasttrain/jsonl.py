"""``metrics.jsonl``: what was measured, for programs."""

import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fasttrain.log_file import LogFile, keep_lines

__all__ = ["JsonlLogger"]


class JsonlLogger:
    """Appends rows to ``metrics.jsonl``, one JSON object a line, handed to the system at once.

    Args:
        path: the file; created where missing, continued where not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = LogFile(path)

    def write(self, kind: Literal["train", "eval"], row: Mapping[str, Any]) -> None:
        """Append a row and when that was; a number that is not finite becomes null, as in JSON."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self._file.write(json.dumps({"kind": kind, "time": now, **finite}, allow_nan=False) + "\n")

    def drop_after(self, step: int) -> None:
        """Drop rows of steps after ``step`` and lines cut off by a crash, for a run that goes on
        from a checkpoint of that step: each row then stands once. So go rows that an uninterrupted
        run does not have.
        """
        self._file.close()
        keep_lines(self._path, lambda line: _step_of(line) <= step)
        self._file = LogFile(self._path)

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def _step_of(line: str) -> float:
    """Return the step of a line; infinity of what is to go whatever the step."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or row.get("stopped"):
        return math.inf
    step = row.get("step", 0)
    return step if isinstance(step, int) else math.inf
