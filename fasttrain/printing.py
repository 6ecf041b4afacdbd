"""The only module that prints, so that untrusted text cannot send commands to a terminal.

Names of files, configs, checkpoints, datasets and what a model writes may hold escape sequences,
which set the title or the clipboard, and characters that reorder a line. Standard library only.
"""

import sys
from typing import TextIO


def printable(text: str) -> str:
    """Return text in which control and invisible characters are escaped, but for \\n and \\t."""
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text: str = "", *, end: str = "\n", stream: TextIO | None = None) -> None:
    """Print text at once, to standard output unless another ``stream`` is named."""
    print(printable(text), end=end, file=stream or sys.stdout, flush=True)


def write(data: str) -> None:
    """Write text to standard output as it is: the result of a command, which goes to a file."""
    print(data, end="", flush=True)
