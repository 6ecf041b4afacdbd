"""The console on a terminal: a small made-up run under a pseudo-terminal, its screen rebuilt here.

The screen is rebuilt from the bytes that the terminal got, by the few control sequences that the
console uses; any other sequence fails the test, as does a character past the last column.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from functools import cache
from pathlib import Path

import pytest
from rich.cells import cell_len

PROGRAM = """
import os
import time
from pathlib import Path
from fasttrain.log.console import Console
console = Console(Path(os.devnull))
assert console.interactive
rows = [("device", "cpu, 2 threads"), ("folder", "runs/" + "long-name-" * 12)]
console.panel("fasttrain", rows, "cyan")
for step in range(1, 61):
    time.sleep(0.01)
    if step % 10 == 0:
        console.train({
            "step": step * 1000, "loss": 12345.6 / step, "lr": 1e-3, "grad_norm": 1234.5,
            "tokens_per_s": 1234567.0, "step_ms": 5.1, "data_wait_ms": 0.02, "mfu": MFU,
            "loss_ema": 3.4, "tokens": 10**12, "epoch": 1.5, "peak_memory_gib": 79.1,
            "progress": step / 60, "left_s": 90_000.0, "rollbacks": int(step == 60),
            "goodput": 0.9, "forward_backward_ms": 4.0,
        })
    if step % 30 == 0:
        console.evaluation({
            "step": step * 1000, "val_loss": 3.2, "val_bpb": 1.61, "best": True,
        })
        console.sample(step, "def main(", "x" * 300 + "\\x1b[2J\\n    return é✓\\n")
    console.progress(step, 60, 10**10 * step, step / 60, 90_000.0)
    if step == 45:
        print("a stray print from a library")
        console.warn("w " * 100)
rows = [("time", "2m 13s"), ("generate", "python -m fasttrain.generate runs/base")]
console.panel("done", rows, "green")
console.close()
"""
SEQUENCE = re.compile(r"\x1b\[(\??\d*(?:;\d+)*)([A-Za-z])")


def program(mfu: float | None = 0.412) -> str:
    return PROGRAM.replace("MFU", repr(mfu))


class Screen:
    """Interprets what a terminal of ``columns`` columns is sent."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.row = self.column = 0
        self.cursor_hidden = False
        self.longest = 0
        self.bars: list[str] = []  # each state that the bar was drawn in

    def feed(self, data: str) -> None:
        """Interpret ``data``."""
        i = 0
        while i < len(data):
            c = data[i]
            if c == "\x1b":
                match = SEQUENCE.match(data, i)
                assert match, f"unknown sequence {data[i : i + 12]!r}"
                self._control(*match.groups())
                i = match.end()
                continue
            if c == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append("")
            elif c == "\r":
                self.column = 0
            else:
                assert c.isprintable(), f"control character {c!r}"
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + c + line[self.column + 1 :]
                self.column += 1
                self.longest = max(self.longest, cell_len(self.lines[self.row]))
                if " left" in self.lines[self.row]:
                    self.bars.append(self.lines[self.row])
            i += 1

    def _control(self, parameters: str, final: str) -> None:
        if final == "m":  # colour
            return
        if final == "K":  # erase the line
            assert parameters == "2"
            self.lines[self.row] = ""
        elif final == "A":  # up
            self.row = max(0, self.row - int(parameters or 1))
        else:  # hide, show the cursor
            assert (parameters, final) in (("?25", "l"), ("?25", "h")), (parameters, final)
            self.cursor_hidden = final == "l"


@cache
def run_on_a_terminal(program: str, columns: int) -> Screen:
    """Run ``program`` on a pseudo-terminal and return its final screen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 200, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    root = Path(__file__).parents[2]
    environment |= {
        "TERM": "xterm-256color",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        "PYTHONUTF8": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        received = b""
        try:
            while chunk := os.read(ours, 65536):
                received += chunk
        except OSError:  # Linux reports the closed other end so
            pass
        finally:
            os.close(ours)
    assert process.returncode == 0, received.decode()
    screen = Screen(columns)
    screen.feed(received.decode())
    return screen


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_run_fits_the_terminal_and_leaves_no_bar(columns: int) -> None:
    screen = run_on_a_terminal(program(), columns)
    text = "\n".join(screen.lines)
    assert screen.longest <= columns
    assert len(set(screen.bars)) >= 3  # it moved
    assert any("100%" in bar for bar in screen.bars)
    assert "step 60/60" not in text  # and went
    assert "━" not in text
    assert not screen.cursor_hidden
    # Header, lines, stray output and summary stand whole, each once and in order.
    order = [
        "fasttrain",
        "step",
        "10000",
        "val 30000",
        "sample",
        "40000",
        "a stray print",
        "warning:",
    ]
    places = [text.index(word) for word in [*order, "50000", "val 60000", "─ done", "2m 13s"]]
    assert places == sorted(places)
    assert text.count("a stray print from a library") == 1
    assert "\\x1b[2J" in text.replace("│\n│", "").replace(" ", "")


def test_columns_that_do_not_fit_are_left_out_whole() -> None:
    """The numbers that matter fit into 80 columns; an unknown mfu takes no space."""
    progress = "step loss lr grad tok/s tokens done left"
    for mfu, columns, expected in (
        (0.412, 40, "step loss lr grad"),
        (0.412, 80, f"{progress} mfu"),
        (None, 80, f"{progress} ppl"),
        (0.412, 140, f"{progress} mfu ppl step time avg loss epoch GiB goodput fwd+bwd"),
    ):
        lines = run_on_a_terminal(program(mfu), columns).lines
        heading = next(s for s in lines if s.lstrip().startswith("step "))
        assert heading.split() == expected.split()
        row = next(s for s in lines if s.split()[:1] == ["10000"])
        assert len(row) == len(heading)
        remarked = next(s for s in lines if s.split()[:1] == ["60000"])
        assert remarked.endswith("  rollbacks 1"), "the last columns make room for a remark"
