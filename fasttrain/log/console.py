"""What a person sees: the console with its progress bar, and ``train.log``.

On a terminal the console draws with rich; elsewhere it prints plain lines without control
characters. No thread draws: `Console.progress` itself redraws the bar, at most five times a second,
so that short steps do not share their processor with it.
"""

import math
import os
import sys
import textwrap
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console as RichConsole
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from fasttrain.log.sinks import LogFile
from fasttrain.printing import printable, say
from fasttrain.redact import redact

_REFRESH_S = 0.2  # a redraw takes 0.25 ms of a CPU core
_ROWS_PER_HEADING = 20
_LONG_WAIT = 0.05  # of a step's time: from here on a line says how long it waited for data
_COUNTERS = ("skipped_steps", "spikes", "rollbacks", "failed_copies")  # shown where not zero


def format_count(n: float) -> str:
    """Return a count for people: 950, 34.5k, 1.2M, 3.0B, 1.5T, 2.0e+15."""
    if abs(n) < 999.5:
        return f"{n:.0f}"
    for power, suffix in enumerate("kMBT", start=1):
        if abs(n) < 999.95 * 1000.0**power:
            return f"{n / 1000.0**power:.1f}{suffix}"
    return f"{n:.1e}"  # nan and inf come out as such


def format_duration(seconds: float) -> str:
    """Return a duration for people: 85 ms, 9.2s, 42s, 2m 13s, 3h 05m, 2d 04h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if (whole := round(seconds)) < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if (minutes := round(seconds / 60)) < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def clean(text: str) -> str:
    """Return text that is safe to print: a model may well emit a byte that moves the cursor.

    Line ends become newlines, tabs spaces, and other control characters their escapes.
    """
    return printable(text.replace("\r\n", "\n").replace("\t", "    "))


def _shown(text: str) -> str:
    """Return text that is safe to print and holds no secrets."""
    return clean(redact(text))


def _fixed(digits: int, value: float) -> str:
    """Format with ``digits`` decimals, and shorter if that would not fit a column."""
    if abs(value) < 9999.995:
        return f"{value:.{digits if abs(value) < 100.0 else 2}f}"
    return format_count(value)


def _perplexity(loss: float) -> str:
    return _fixed(2, math.inf if loss >= 700.0 else math.exp(loss))


def _milliseconds(value: float) -> str:
    return f"{value:.2f}ms" if value < 9.995 else f"{value:.0f}ms"


def _percent(part: float) -> str:
    return f"{math.floor(100.0 * part + 1e-9)}%"  # 100% is the end, not before


def _left(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 1.0 else f"{math.ceil(seconds)}s"


class _Column(NamedTuple):
    key: str
    heading: str
    width: int
    format: Callable[[float], str]
    style: str = ""

    def cell(self, row: Mapping[str, Any]) -> str:
        value = row[self.key]
        return "n/a" if value is None else self.format(value)


# In order of importance: what does not fit the terminal's width is left out from the right.
_COLUMNS = (
    _Column("step", "step", 10, "{:d}".format, "bold"),
    _Column("loss", "loss", 9, partial(_fixed, 4), "bold"),
    _Column("lr", "lr", 10, "{:.2e}".format, "dim"),
    _Column("grad_norm", "grad", 8, partial(_fixed, 3)),
    _Column("tokens_per_s", "tok/s", 8, format_count),
    _Column("tokens", "tokens", 8, format_count),
    _Column("progress", "done", 6, _percent),
    _Column("left_s", "left", 9, _left),
    _Column("mfu", "mfu", 7, "{:.1%}".format),
    _Column("loss", "ppl", 9, _perplexity),
    _Column("step_ms", "step time", 11, _milliseconds),
    _Column("loss_ema", "avg loss", 10, partial(_fixed, 4)),
    _Column("epoch", "epoch", 8, "{:.2f}".format),
    _Column("peak_memory_gib", "GiB", 7, "{:.2f}".format),
    _Column("goodput", "goodput", 9, "{:.1%}".format),
    _Column("forward_backward_ms", "fwd+bwd", 9, _milliseconds),
    _Column("optimizer_ms", "optim", 9, _milliseconds),
    _Column("communication_ms", "comm", 9, _milliseconds),
)
_PLAIN = _COLUMNS[:9]  # a plain line stays near 110 characters; metrics.jsonl has the rest
_ODD = {"n/a": "dim", "nan": "bold red", "inf": "bold red", "-inf": "bold red"}  # cells' styles
_VAL_KEYS = ("val_loss", "val_ppl", "val_bpb", "val_accuracy")  # of an eval row
_WHERE_KNOWN = ("mfu", "communication_ms")  # left out on devices and runs that have no such number


def _boxed(body: Text | Table, title: Text, colour: str) -> Panel:
    return Panel(body, title=title, title_align="left", border_style=colour)


def _is_further(key: str) -> bool:
    """Return whether a key of an eval row is a metric that a user of the library has added."""
    return key.startswith("val_") and key not in _VAL_KEYS


class Console:
    """What a person sees of a run, on the terminal and in ``train.log`` if a ``log_file`` is given.

    On a terminal it has colours, panels and a progress bar; else, or if it is dumb, plain lines.
    """

    def __init__(self, log_file: Path | None = None) -> None:
        has_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._rich = RichConsole(force_terminal=has_terminal)
        self.interactive = self._rich.is_interactive  # a terminal that is not dumb
        self._bar = Live(console=self._rich, auto_refresh=False, transient=True)
        self._redraw_s = 0.0  # when the bar may be drawn anew
        self._log = LogFile(log_file) if log_file is not None else None
        if self._log is not None:
            self._log.write("")  # it is there from now on
        self._rows_since_heading = _ROWS_PER_HEADING
        self._last_val_loss: float | None = None

    def panel(self, title: str, rows: list[tuple[str, str]], colour: str) -> None:
        """Remove the progress bar and show pairs of label and value: at the start and the end."""
        self.clear_progress()
        rows = [(_shown(label), _shown(value)) for label, value in rows]
        width = max((len(label) for label, _ in rows), default=0)
        plain = "\n".join([f"{title}:", *(f"  {label:<{width}}  {value}" for label, value in rows)])
        columns = Column(style="dim", no_wrap=True), Column(overflow="fold")
        grid = Table.grid(*columns, padding=(0, 2))
        for label, value in rows:
            grid.add_row(Text(label), Text(value))
        self._emit(plain, _boxed(grid, Text(title, style=f"bold {colour}"), colour))

    def note(self, text: str, style: str = "dim") -> None:
        """Print a remark."""
        line = _shown(text)
        self._emit(line, Text(line, style=style))

    def warn(self, text: str) -> None:
        """Print a warning that stands out."""
        self.note(f"warning: {text}", "bold yellow")

    def train(self, row: Mapping[str, Any]) -> None:
        """Print a train row of ``metrics.jsonl``; a null value shows as n/a."""
        given = row.keys() - {key for key in _WHERE_KNOWN if row.get(key) is None}
        known = [column for column in _COLUMNS if column.key in given]
        cells = [f"{c.heading} {c.cell(row):>{c.width - 2}}" for c in known if c in _PLAIN]
        wait_ms = row.get("data_wait_ms") or 0.0
        waited = wait_ms > _LONG_WAIT * (row.get("step_ms") or math.inf)
        remarked = f"  wait {_milliseconds(wait_ms)}" if waited else ""
        remarked += "".join(f"  {name} {row[name]}" for name in _COUNTERS if row.get(name))
        ends, width = list(accumulate(c.width for c in known)), self._rich.width
        n_shown = max(2, bisect_left(ends, width - len(remarked)))
        if self.interactive and self._rows_since_heading >= _ROWS_PER_HEADING:
            shown = known[: bisect_left(ends, width)]
            heading = "".join(f"{c.heading:>{c.width}}" for c in shown)
            self._rich.print(Text(heading, style="dim"), no_wrap=True, overflow="crop", crop=True)
            self._rows_since_heading = 0
        self._rows_since_heading += 1
        line = Text(no_wrap=True, overflow="crop")
        for column in known[:n_shown]:
            cell = column.cell(row)
            line.append(f"{cell:>{column.width}}", style=_ODD.get(cell, column.style))
        line.append(remarked, style="yellow")
        self._emit("  ".join(cells) + remarked, line)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Print an eval row of ``metrics.jsonl``; ``best`` true in it marks the lowest loss."""
        loss = float(row["val_loss"])
        rest = [f"ppl {_perplexity(loss)}"]
        for key, said in (("val_bpb", "bpb {:.4f}"), ("val_accuracy", "accuracy {:.1%}")):
            if row.get(key) is not None:
                rest.append(said.format(row[key]))
        rest += [f"{k.removeprefix('val_')} {v:.4f}" for k, v in row.items() if _is_further(k)]
        if self._last_val_loss is not None:
            rest.append(f"change {loss - self._last_val_loss:+.3f}")
        rest += ["best"] * bool(row.get("best"))
        self._last_val_loss = loss
        plain = f"eval {row['step']:>8}  val_loss {loss:.4f}  val_{'  '.join(rest)}"
        label = f"val {row['step']}"
        step_width, loss_width = (c.width for c in _COLUMNS[:2])
        shown = "  ".join([f"{label:>{step_width}}{loss:>{loss_width}.4f}", *rest])
        self._emit(plain, Text(shown, style="bold cyan", no_wrap=True, overflow="ellipsis"))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show a sample from the model: ``text`` is what it wrote after ``prompt``."""
        prompt, text = _shown(prompt), _shown(text).rstrip("\n")
        plain = f"sample, step {step}\n" + textwrap.indent(prompt + text, "  | ", lambda _: True)
        body = Text.assemble((prompt, "bold"), text, overflow="fold")
        self._emit(plain, _boxed(body, Text(f"sample · step {step}", style="dim"), "dim"))
        self._rows_since_heading = _ROWS_PER_HEADING

    def progress(
        self, step: int, total: int | None, n_tokens: int, done: float, left_s: float | None
    ) -> None:
        """Redraw the progress bar, at most five times a second; nothing without a terminal.

        ``done`` is a part in [0, 1]; ``total`` steps and ``left_s`` are None until they are known.
        """
        if not self.interactive or ((now := time.monotonic()) < self._redraw_s and done < 1.0):
            return
        self._redraw_s = now + _REFRESH_S
        of_total = f"/{total}" if total else ""
        left = "" if left_s is None else f"  {_left(left_s)} left"
        tail = f"{_percent(done):>4}{left}  step {step}{of_total}  {format_count(n_tokens)} tokens"
        columns = Column(max_width=40), Column(no_wrap=True, overflow="crop")
        line = Table.grid(*columns, padding=(0, 1))
        line.add_row(ProgressBar(1.0, done), tail)
        self._bar.start()
        self._bar.update(line, refresh=True)

    def clear_progress(self) -> None:
        """Remove the progress bar; the next `progress` draws it anew."""
        self._bar.stop()
        self._redraw_s = 0.0

    def close(self) -> None:
        """Remove the bar, restore the cursor and close the log file. May be called twice."""
        self.clear_progress()
        if self._log is not None:
            self._log.close()

    def _emit(self, plain: str, drawn: Text | Panel) -> None:
        """Show ``drawn`` on a terminal or print ``plain``, and append ``plain`` to the log file."""
        if self.interactive:
            self._rich.print(drawn)
        else:
            try:
                say(plain)
            except OSError as error:  # training continues if nobody reads, or the disk is full
                if isinstance(error, BrokenPipeError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self._log is None:
            return
        now = datetime.now().isoformat(" ", "seconds")
        self._log.write("".join(f"{now}  {line}\n" for line in plain.split("\n")))
