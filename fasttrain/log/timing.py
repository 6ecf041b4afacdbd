"""Where the time goes: the phases of steps, and the wall clock of a session."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels._torch import dump_memory_history, record_memory_history

_Moment = Any  # seconds; on CUDA an event


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals, each a beginning and an end."""
    length, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        length += max(end - max(begin, reached), 0.0)
        reached = max(end, reached)
    return length


class StepClock:
    """Adds up the time of each phase of steps; on CUDA by events, which no step waits for.

    It also adds up the time in which at least one collective was under way, from where its tensors
    were ready here to its end, so with the wait for slower ranks; phases include it.
    """

    def __init__(self, device: torch.device, n_phases: int) -> None:
        self.on_cuda = device.type == "cuda"
        self._n_phases = n_phases
        self._marks: list[_Moment] = []  # of the step under way
        self._spans: list[list[_Moment]] = []  # its collectives
        self._over: list[tuple[list[_Moment], list[list[_Moment]]]] = []  # steps to be added up

    def mark(self, n_done: int) -> None:
        """Note that ``n_done`` phases of the step are over; 0 begins it."""
        if n_done == 0:
            self._marks, self._spans = [], []
        self._marks.append(self._now())
        if n_done == self._n_phases:
            self._over.append((self._marks, self._spans))
            self._marks = []

    def begin(self) -> list[_Moment]:
        """Note that a collective begins on the current stream; only those of a step count."""
        span = [self._now()]
        if self._marks:
            self._spans.append(span)
        return span

    def end(self, span: list[_Moment]) -> None:
        """Note that it ends there, or that what follows it does: the last call counts."""
        span[1:] = [self._now()]

    def read(self) -> list[float]:
        """Return the seconds since the last reading of each phase, and those of collectives."""
        totals_s = [0.0] * (self._n_phases + 1)
        while self._over and (not self.on_cuda or self._over[0][0][-1].query()):
            marks, spans = self._over.pop(0)
            phases = [self._between(*ends) for ends in pairwise(marks)]
            both = [[self._between(marks[0], moment) for moment in span] for span in spans]
            phases.append(covered((begin, end) for begin, end in both))
            totals_s = [a + b for a, b in zip(totals_s, phases, strict=True)]
        return totals_s

    def _now(self) -> _Moment:
        if not self.on_cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, begin: _Moment, end: _Moment) -> float:
        if not self.on_cuda:
            return float(end - begin)
        end.synchronize()  # a stream that nobody waited for may be behind
        return float(begin.elapsed_time(end)) / 1000


# What a line reports: the mean of a step in ms, and the sum in s.
_MEANS = ("step", "data_wait", "forward_backward", "optimizer", "communication")
_SUMS = ("eval", "checkpoint", "sample")


class TimeAccount:
    """The wall clock of a session that begins at ``step``: what went into steps, what did not."""

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.started_s = time.perf_counter()
        self.steady_s, self.n_steady = 0.0, 0  # of all steps but the first, which compiles
        self.steady_wait_s = 0.0  # for data, beside steady_s
        self._window = dict.fromkeys((*_MEANS, *_SUMS), 0.0)
        self.n_steps = 0  # since the last line
        self._paced_from_s: float | None = None  # the end of the first step

    def add(self, name: str, seconds: float) -> None:
        self._window[name] += seconds

    def add_step(self, seconds: float, wait_s: float) -> None:
        """Add a step; ``wait_s`` is the part of it that it waited for data."""
        self.n_steps += 1
        self.add("step", seconds)
        self.add("data_wait", wait_s)
        if self._paced_from_s is None:
            self._paced_from_s = time.perf_counter()
        else:
            self.steady_s += seconds - wait_s
            self.steady_wait_s += wait_s
            self.n_steady += 1

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def left_s(self, step: int, total_steps: int) -> float | None:
        """Return the seconds from ``step`` to the last step; None before a second step is done.

        Evaluations and saves count, the compilation in the session's first step does not.
        """
        n_steps = step - self.first_step - 1
        if self._paced_from_s is None or n_steps < 1:
            return None
        pace_s = (time.perf_counter() - self._paced_from_s) / n_steps
        return pace_s * max(total_steps - step, 0)

    def line(self, step: int) -> dict[str, float | None]:
        """Return the account since the last line, and begin the next; ``step`` steps are done.

        The ``_ms`` are means over steps, the ``_s`` sums. ``communication_ms``, which lies within
        ``forward_backward_ms``, leaves out sums of single numbers and Muon's exchange; it is None
        where nothing was sent. ``goodput`` is the part of the session's wall clock that its steps
        need at their steady pace without waiting for data; None while there is no steady step.
        """
        spent = self._window
        n = max(self.n_steps, 1)
        row: dict[str, float | None] = {f"{name}_ms": 1000 * spent[name] / n for name in _MEANS}
        row["communication_ms"] = row["communication_ms"] or None
        row |= {f"{name}_s": spent[name] for name in _SUMS}
        row["goodput"] = None
        if self.n_steady:
            useful_s = max(step - self.first_step, 0) * self.steady_s / self.n_steady
            # The first step, counted as another, may have been shorter than one that stalled.
            spent_s = max(time.perf_counter() - self.started_s, 1e-9)
            row["goodput"] = min(useful_s / spent_s, 1.0)
        self._window = dict.fromkeys(spent, 0.0)
        self.n_steps = 0
        return row


MAX_MEMORY_EVENTS = 100_000  # of the allocator, a few hundred MB at most


class StepProfiler:
    """Writes ``profile/trace.json`` (chrome://tracing, Perfetto) and, on CUDA, ``memory.pickle``.

    ``steps`` are the first and the last, counted from 1, or empty. These steps are slower.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, ...], device: torch.device) -> None:
        self._folder, self._device = run_dir / "profile", device
        self._first, self._last = steps or (0, 0)
        self._at_end = ExitStack()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the step in the block where its number is asked for."""
        if number == self._first:
            self.close()  # a rollback may have come back
            self._start()
        profiled = self._first <= number <= self._last
        with torch.profiler.record_function(f"step {number}") if profiled else nullcontext():
            yield
        if number == self._last:
            self.close()

    def _start(self) -> None:
        folder, at_end = self._folder, self._at_end  # last first
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("memory.pickle", "trace.json"):  # which may be links
            (folder / name).unlink(missing_ok=True)
        if self._device.type == "cuda":  # https://pytorch.org/memory_viz reads it
            record_memory_history(max_entries=MAX_MEMORY_EVENTS)
            at_end.callback(record_memory_history, enabled=None)
            at_end.callback(dump_memory_history, str(folder / "memory.pickle"))
        # Of all activities that there are: of the CPU and, where there is one, of the GPU.
        profiler = torch.profiler.profile(record_shapes=True, profile_memory=True, acc_events=True)
        at_end.callback(profiler.export_chrome_trace, str(folder / "trace.json"))
        at_end.enter_context(profiler)
        if self._device.type == "cuda":
            at_end.callback(torch.cuda.synchronize, self._device)

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        self._at_end.close()
