"""A text file that a run goes on without where the disk is full. Standard library only."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from itertools import compress
from pathlib import Path

__all__ = ["NO_SPACE", "LogFile", "keep_lines"]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LogFile:
    """A text file that lines are appended to, handed to the system at once.

    Where the disk is full, the run goes on: lines wait in a buffer of 8 KiB and are written with
    the next that can be; what does not fit it is lost, a line at a time.

    Args:
        path: the file; created where missing, continued where not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._full = False

    def write(self, lines: str) -> None:
        """Append whole lines."""
        try:
            self._file.write(lines)
            self._full = False
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            if not self._full:
                message = f"warning: {self._path}: {error.strerror}; free some space on this disk"
                with contextlib.suppress(OSError):  # standard error may lie on the same disk
                    print(message, file=sys.stderr, flush=True)
            self._full = True

    def close(self) -> None:
        """Close the file. May be called twice."""
        with contextlib.suppress(OSError):  # it was told when it was written
            self._file.close()


def keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Drop lines of a file in place, where a full disk hinders nothing.

    Args:
        path: a text file; where it is missing, there is nothing to do.
        keep: says of each line in turn whether it stays; only one that was cut off lacks its end.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [keep(line.decode("utf-8", "replace")) for line in lines]
    n_first = [*kept, False].index(False)
    os.truncate(path, sum(map(len, lines[:n_first])))
    file = LogFile(path)
    rest = b"".join(compress(lines[n_first:], kept[n_first:]))  # a run leaves none
    file.write(rest.decode("utf-8", "replace"))
    file.close()
