"""fasttrain.log.console: numbers for people, the plain console, the log file, metrics.jsonl."""

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from fasttrain.command import command
from fasttrain.log.console import Console, clean, format_count, format_duration

ROW = {
    "step": 120,
    "progress": 0.0799,
    "left_s": 133.0,
    "tokens": 983_040,
    "epoch": 0.25,
    "loss": 3.4521,
    "loss_ema": 3.5012,
    "lr": 1e-3,
    "grad_norm": 0.4824,
    "tokens_per_s": 34_512.3,
    "step_ms": 237.4,
    "data_wait_ms": 0.021,
    "mfu": None,
    "peak_memory_gib": 1.23,
}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1.0k"),
        (34_512.3, "34.5k"),
        (999_949, "999.9k"),
        (999_950, "1.0M"),
        (1_234_567, "1.2M"),
        (124_439_808, "124.4M"),
        (2.95e9, "3.0B"),
        (1.5e12, "1.5T"),
        (2e15, "2.0e+15"),
        (-1500, "-1.5k"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_format_count(value: float, shown: str) -> None:
    assert format_count(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.085, "85 ms"),
        (0.9996, "1.0s"),
        (9.21, "9.2s"),
        (9.97, "10s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (133, "2m 13s"),
        (3599.6, "1h 00m"),
        (11_100, "3h 05m"),
        (86_400, "1d 00h"),
        (187_200, "2d 04h"),
        (math.inf, "?"),
    ],
)
def test_format_duration(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_clean_keeps_text_and_escapes_control_characters() -> None:
    assert clean("def f():\r\n\treturn 'é✓'") == "def f():\n    return 'é✓'"
    assert clean("\x1b[31m\rX\x07\x00") == "\\x1b[31m\\rX\\x07\\x00"
    assert clean("a\u202eb\x9b") == "a\\u202eb\\x9b"  # right-to-left override, C1 control


@pytest.fixture
def unlogged() -> Iterator[Callable[[], Console]]:
    """Return consoles that have no log file."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(Console(Path(os.devnull))))


def everything(console: Console) -> None:
    """Call every method once, as a run does."""
    console.panel("fasttrain", [("device", "cpu"), ("plan", "2,000 steps")], "cyan")
    console.note("building the corpus")
    for step in range(1, 4):
        console.progress(step, 3, 64 * step, step / 3, None)
    console.train(ROW)
    console.warn("a damaged checkpoint was passed over")
    console.evaluation({"step": 120, "val_loss": 2.9134, "val_bpb": 1.612, "val_accuracy": 0.412})
    console.evaluation({"step": 240, "val_loss": 2.8134, "best": True})
    console.sample(120, "def main(", "args):\n\x1b[31m\r\treturn é\n")
    rows = [("time", "2m 13s"), ("checkpoint", "runs/base/checkpoints/step-00000240")]
    console.panel("done", rows, "green")
    console.close()


EXPECTED = """\
fasttrain:
  device  cpu
  plan    2,000 steps
building the corpus
step      120  loss  3.4521  lr 1.00e-03  grad  0.482  tok/s  34.5k  tokens 983.0k  done   7%  left  2m 13s
warning: a damaged checkpoint was passed over
eval      120  val_loss 2.9134  val_ppl 18.42  bpb 1.6120  accuracy 41.2%
eval      240  val_loss 2.8134  val_ppl 16.67  change -0.100  best
sample, step 120
  | def main(args):
  | \\x1b[31m\\r    return é
done:
  time        2m 13s
  checkpoint  runs/base/checkpoints/step-00000240
"""  # noqa: E501


def test_without_a_terminal_lines_are_plain(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    console = Console(tmp_path / "train.log")
    assert not console.interactive  # pytest's standard output is no terminal
    everything(console)
    assert capsys.readouterr().out == EXPECTED


@pytest.mark.parametrize("interactive", [False, True])
def test_the_log_file_holds_every_line_plainly_with_its_time(
    interactive: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if interactive:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", Terminal())
    console = Console(tmp_path / "train.log")
    assert console.interactive is interactive
    everything(console)
    text = (tmp_path / "train.log").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert "".join(line[21:] + "\n" for line in lines) == EXPECTED
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in lines)


def test_the_log_file_is_continued(tmp_path: Path) -> None:
    for text in ("first run", "resumed"):
        console = Console(tmp_path / "train.log")
        console.note(text)
        console.close()
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[21:] for line in lines] == ["first run", "resumed"]


class Terminal(io.StringIO):
    """Claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_reader_that_is_gone_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stream:  # its last flush must not fail either
        monkeypatch.setattr(sys, "stdout", stream)
        console = Console(tmp_path / "train.log")
        console.note("one")
        console.note("two")
        console.close()
    assert [line[-3:] for line in (tmp_path / "train.log").read_text().split("\n")] == [
        "one",
        "two",
        "",
    ]


def test_R12_a_full_disk_behind_the_output_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    with closing(Console(tmp_path / "train.log")) as console:
        console.note("one")
        console.note("two")
    with suppress(OSError):
        stream.close()
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[-3:] for line in lines] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "value", "interactive", "coloured"),
    [
        ("NO_COLOR", "1", True, False),
        ("TERM", "dumb", False, False),
        ("TERM", "xterm-256color", True, True),
    ],
)
def test_the_environment_decides_on_a_terminal(
    unlogged: Any,
    name: str,
    value: str,
    interactive: bool,
    coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    console = unlogged()
    assert console.interactive is interactive
    console.warn("hello")  # bold and yellow
    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert ("\x1b[" in shown) is interactive
    assert ("33m" in shown) is coloured
    console.close()


def test_a_character_that_the_stream_cannot_encode_is_escaped(
    unlogged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    command(lambda: unlogged().sample(1, "é", "✓") or 0)()
    assert raw.getvalue() == b"sample, step 1\n  | \\xe9\\u2713\n"


@pytest.mark.parametrize(("loss", "shown"), [(math.nan, "nan"), (800.0, "inf"), (10.9, "54.2k")])
def test_perplexity_of_any_loss(
    unlogged: Any, loss: float, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console = unlogged()
    console.evaluation({"step": 1, "val_loss": loss})
    assert f"val_ppl {shown}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        # How far the run is
        ({"progress": 0.29, "left_s": 11_100.0}, "tokens 983.0k  done  29%  left  3h 05m"),
        ({"progress": 0.9999, "left_s": 0.2}, "done  99%  left      1s"),  # 100% is the end
        ({"progress": 1.0, "left_s": 0.0}, "done 100%  left      0s"),
        ({"progress": 0.0006, "left_s": None}, "done   0%  left     n/a"),  # of the first step
        # What is shown only where it says something
        ({}, "left  2m 13s"),
        ({"mfu": 0.412}, "left  2m 13s  mfu 41.2%"),
        ({"data_wait_ms": 11.8}, "left  2m 13s"),  # less than a twentieth of the step
        ({"data_wait_ms": 12.0}, "left  2m 13s  wait 12ms"),
        ({"data_wait_ms": 12.0, "rollbacks": 1}, "left  2m 13s  wait 12ms  rollbacks 1"),
        ({"skipped_steps": 0, "spikes": 0, "rollbacks": 0}, "left  2m 13s"),
        ({"skipped_steps": 3, "spikes": 0}, "left  2m 13s  skipped_steps 3"),
    ],
)
def test_how_a_plain_line_ends(
    unlogged: Any, changes: dict[str, float | None], end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    unlogged().train({**ROW, **changes})
    assert capsys.readouterr().out.endswith(f"  {end}\n")


@pytest.mark.parametrize(
    ("loss", "shown"), [(99.99, "99.9900"), (123.456, "123.46"), (12_345.6, "12.3k")]
)
def test_a_huge_loss_keeps_the_columns(
    unlogged: Any, loss: float, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console = unlogged()
    console.train(ROW)
    console.train({**ROW, "loss": loss})
    usual, huge = capsys.readouterr().out.splitlines()
    assert shown in huge
    assert huge.index("lr ") == usual.index("lr ")


def test_missing_values_are_not_available(
    unlogged: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    unlogged().train({"step": 1, "loss": 5.0, "grad_norm": None, "mfu": None})
    out = capsys.readouterr().out.split()
    assert out == ["step", "1", "loss", "5.0000", "grad", "n/a"], "of mfu, not even that"


def test_progress_costs_next_to_nothing_when_it_does_not_draw(
    unlogged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 5 ms must not feel it: a call that does not draw looks at the clock, no more."""
    now, stream = [0.0], Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("fasttrain.log.console.time.monotonic", lambda: now[0])
    console = unlogged()
    for step in range(1000):
        console.progress(step, 2000, 64 * step, step / 2000, 9.0)
        now[0] += 0.005
    console.progress(1000, 2000, 64_000, 0.5, 9.0)
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: "call" in event and calls.append(frame.f_code.co_name))
    console.progress(1001, 2000, 64_064, 0.5005, 9.0)
    sys.setprofile(None)
    drawn = stream.getvalue().count("/2000")
    console.close()
    assert 20 <= drawn <= 30  # five a second
    assert calls[:2] == ["progress", "<lambda>"]
    assert len(calls) == 3  # the last is the end of the profile


def on_terminal(unlogged: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Terminal]:
    """Return a console on a terminal of 100 columns."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", stream)
    return unlogged(), stream


@pytest.mark.parametrize(
    ("total", "left_s", "shown"),
    [
        (2000, 90.0, "55%  1m 30s left  step 1100/2000  9.0M tokens"),
        (None, 90.0, "55%  1m 30s left  step 1100  9.0M tokens"),  # of train.hours, at first
        (2000, None, "55%  step 1100/2000  9.0M tokens"),
    ],
)
def test_the_bar_says_how_far_the_run_is(
    unlogged: Any,
    total: int | None,
    left_s: float | None,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console, stream = on_terminal(unlogged, monkeypatch)
    console.progress(1100, total, 9_011_200, 0.55, left_s)
    console.close()
    assert shown in stream.getvalue()


def test_a_bar_that_was_removed_is_drawn_anew_at_once(
    unlogged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, stream = on_terminal(unlogged, monkeypatch)
    for step in (1, 2):
        console.progress(step, 9, 64, step / 9, None)
        assert f"step {step}/9" in stream.getvalue()
        console.clear_progress()
        console.clear_progress()
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 2
    console.close()


def test_every_line_of_a_sample_is_marked(
    unlogged: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    unlogged().sample(7, "a", "b\n\nc\n\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["sample, step 7", "  | ab", "  | ", "  | c"]
