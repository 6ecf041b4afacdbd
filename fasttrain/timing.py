"""Where the time goes: the phases of steps, and the wall clock of a session."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["StepClock", "TimeAccount"]


class StepClock:
    """Adds up the time of each phase of steps; on CUDA by events, which no step waits for.

    Args:
        device: where the steps run.
        n_phases: phases of a step.
    """

    def __init__(self, device: torch.device, n_phases: int) -> None:
        self.on_cuda = device.type == "cuda"
        self.totals_s = [0.0] * n_phases
        self._last_s = 0.0
        # By step since the last reading: used again after it.
        self._events: list[list[torch.cuda.Event]] = []
        self._n_steps = 0

    def mark(self, n_done: int) -> None:
        """Note that ``n_done`` phases of the step are over; 0 begins it."""
        if self.on_cuda:
            if self._n_steps == len(self._events):
                self._events.append(
                    [
                        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                        for _ in range(len(self.totals_s) + 1)
                    ]
                )
            self._events[self._n_steps][n_done].record()
            self._n_steps += n_done == len(self.totals_s)
            return
        now = time.perf_counter()
        if n_done:
            self.totals_s[n_done - 1] += now - self._last_s
        self._last_s = now

    def read(self) -> list[float]:
        """Return the seconds of each phase since the last reading; on CUDA all steps are over."""
        for events in self._events[: self._n_steps]:
            for phase in range(len(self.totals_s)):
                ms = events[phase].elapsed_time(events[phase + 1])
                self.totals_s[phase] += ms / 1000
        self._n_steps = 0
        totals, self.totals_s = self.totals_s, [0.0] * len(self.totals_s)
        return totals


class TimeAccount:
    """The wall clock of a session: what went into steps, and what beside them.

    Args:
        step: the step at which the session begins.
    """

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.started_s = time.perf_counter()
        self.steady_s, self.n_steady = 0.0, 0  # of all steps but the first, which compiles
        self.steady_wait_s = 0.0  # for data, beside steady_s
        self._window = dict.fromkeys(
            ("step", "wait", "forward_backward", "optimizer", "eval", "checkpoint", "sample"), 0.0
        )
        self.n_steps = 0  # since the last line

    def add(self, name: str, seconds: float) -> None:
        """Add to what a line reports."""
        self._window[name] += seconds

    def add_step(self, seconds: float, wait_s: float, *, first: bool) -> None:
        """Add a step and, of its time, what it waited for data."""
        self.n_steps += 1
        self.add("step", seconds)
        self.add("wait", wait_s)
        if not first:
            self.steady_s += seconds - wait_s
            self.steady_wait_s += wait_s
            self.n_steady += 1

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def line(self, step: int) -> dict[str, float | None]:
        """Return the account since the last line, and begin the next.

        Args:
            step: steps done.

        Returns:
            Means over steps, in ms: ``step_ms`` and of it ``data_wait_ms``,
            ``forward_backward_ms`` and ``optimizer_ms``. Seconds in all: ``eval_s``,
            ``checkpoint_s``, ``sample_s``. ``goodput``: of the session's wall clock, the part that
            its steps need at their steady pace without waiting for data; compilation, waits,
            evaluation, samples, saves and steps that a rollback undid are the rest. None while
            there is no steady step.
        """
        spent = self._window
        n = max(self.n_steps, 1)
        row: dict[str, float | None] = {
            "step_ms": 1000 * spent["step"] / n,
            "data_wait_ms": 1000 * spent["wait"] / n,
            "forward_backward_ms": 1000 * spent["forward_backward"] / n,
            "optimizer_ms": 1000 * spent["optimizer"] / n,
            **{f"{name}_s": spent[name] for name in ("eval", "checkpoint", "sample")},
        }
        goodput = None
        if self.n_steady:
            useful_s = max(step - self.first_step, 0) * self.steady_s / self.n_steady
            # The first step, counted as another, may have been shorter than one that stalled.
            goodput = min(useful_s / max(time.perf_counter() - self.started_s, 1e-9), 1.0)
        row["goodput"] = goodput
        self._window = dict.fromkeys(spent, 0.0)
        self.n_steps = 0
        return row
