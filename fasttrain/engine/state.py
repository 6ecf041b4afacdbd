"""The state of a run beside its tensors, and which thread may save it."""

import contextlib
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.log.timing import TimeAccount

Tensors = dict[str, Tensor]  # by name
# How a fault is described whose step had other results when it was run again.
_RECHECKED = {
    "transient": "transient error: a second run gave another result, a third run agreed with one",
    "persistent": "persistent error: three runs gave three results",
}
_DESCRIPTIONS = {**_RECHECKED, "empty": "no target counts, so there is nothing to learn"}


class Fault(NamedTuple):
    """A step of which no update was made."""

    step: int  # the first is 1
    position: int  # global index of its first sample
    kind: str  # overflow (fp16), nonfinite, spike, empty; rechecked: transient, persistent
    loss: float
    norm: float  # before clipping

    @property
    def of_machine(self) -> bool:
        """Whether the machine is to blame, and not the samples."""
        return self.kind in _RECHECKED

    def __str__(self) -> str:
        what = _DESCRIPTIONS.get(self.kind, self.kind)
        return f"step {self.step}: {what} (loss {self.loss:.4g}, gradient norm {self.norm:.4g})"

    def saved(self) -> dict[str, Any]:
        """Return the fields for JSON: a number that is not finite is text."""
        numbers = {"loss": self.loss, "norm": self.norm}
        return self._asdict() | {k: str(n) for k, n in numbers.items() if not math.isfinite(n)}


@dataclass
class FaultCounts:
    """What a run remembers of its bad steps."""

    skipped_steps: int = 0  # without an update; steps that a rollback repeats count again
    spikes: int = 0  # of these
    rollbacks: int = 0
    passed_over: list[int] = field(default_factory=list)  # first samples of skipped batches
    row: list[Fault] = field(default_factory=list)  # the last steps, while all were skipped

    def saved(self) -> dict[str, Any]:
        """Return this for JSON."""
        return {**vars(self), "row": [tuple(fault.saved().values()) for fault in self.row]}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore what `saved` returned."""
        row = [Fault(*what[:3], *map(float, what[3:])) for what in saved["row"]]
        vars(self).update(saved, row=row)

    def rolled_back(self, offending: Sequence[Fault]) -> None:
        """Count a rollback; samples that are to blame are not trained on again."""
        self.rollbacks += 1
        blamed = (fault.position for fault in offending if not fault.of_machine)
        self.passed_over = sorted({*self.passed_over, *blamed})
        self.row.clear()


@dataclass
class RunState:
    """Where a run is. All down to ``faults`` is saved, under the same names."""

    samples_per_step: int  # of all ranks together
    total_steps: int | None  # None until a horizon in hours has been measured
    position: int  # global index of the next sample
    regular: bool  # all steps of the run had as many samples of the same length
    step: int = 0
    tokens: int = 0  # targets trained on, padding left out, over all ranks
    trained_s: float = 0.0  # inside steps, over all sessions
    eval_due: bool = False  # the evaluation of this step has begun and is not done
    best_val_loss: float = math.inf
    val_losses: list[float] = field(default_factory=list)  # of all evaluations
    loss_ema: float | None = None  # of the logged losses
    faults: FaultCounts = field(default_factory=FaultCounts)
    # Of this session
    limit_s: float = math.inf  # how long the run may train
    last_eval: dict[str, Any] = field(default_factory=dict)  # of this step, or empty
    lr: float = 0.0  # of the last step
    first_step_s: float | None = None  # with compilation; None until it is done
    fresh_tokens: int = 0  # since the last line of the log
    account: TimeAccount = field(default_factory=lambda: TimeAccount(0))

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON holds it: a loss that is not finite is null."""
        names = [f.name for f in fields(self)]
        found = {name: getattr(self, name) for name in names[: names.index("limit_s")]}
        all_losses = (self.best_val_loss, *self.val_losses)
        best, *losses = (loss if math.isfinite(loss) else None for loss in all_losses)
        found |= {"best_val_loss": best, "val_losses": losses}
        return found | {"faults": self.faults.saved()}

    def go_back(self, saved: Mapping[str, Any], seq_len: int) -> None:
        """Restore what `saved` returned, but for time, horizon and faults."""
        self.step, self.position = saved["step"], saved["position"]
        self.tokens = saved.get("tokens", self.position * seq_len)  # of a save without the count
        losses = (saved["best_val_loss"], *saved.get("val_losses", []))
        self.best_val_loss, *self.val_losses = (math.inf if x is None else x for x in losses)
        self.loss_ema, self.eval_due, self.last_eval = saved["loss_ema"], saved["eval_due"], {}

    def resume(self, saved: Mapping[str, Any], *, same_hours: bool) -> None:
        """Restore what `go_back` leaves out; ``same_hours``: the measured horizon still holds."""
        self.trained_s = saved["trained_s"]
        if self.total_steps is None and same_hours:
            self.total_steps = saved["total_steps"]
        self.faults.load(saved["faults"])
        self.account = TimeAccount(self.step)

    def due(self, *every: int | None) -> bool:
        """Return whether any of what happens every so many steps happens after this one."""
        return any(n is not None and self.step % n == 0 for n in every)

    @property
    def next_position(self) -> int:
        """The first global sample index from ``position`` on that is not passed over."""
        position = self.position
        for start in self.faults.passed_over:
            if start <= position < start + self.samples_per_step:
                position = start + self.samples_per_step
        return position

    @property
    def horizon(self) -> int:
        """The number of steps; before `limit_s` has been measured in steps, the end is far away."""
        return self.total_steps if self.total_steps is not None else 10**12

    @property
    def left_s(self) -> float:
        """Seconds that the run may still train."""
        return self.limit_s - self.trained_s

    def progress(self) -> tuple[float, float | None]:
        """Return the part of the run that is done, in [0, 1], and the seconds left, if known."""
        if self.total_steps is None:
            left_s = max(self.left_s, 0.0)
            return self.trained_s / (self.trained_s + left_s), left_s
        left = self.account.left_s(self.step, self.total_steps)
        return min(self.step / self.total_steps, 1.0), left


def rng_state(device: torch.device) -> Tensors:
    """Return the states of torch's random generators, by the name in the checkpoint."""
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return rng


def restore_rng(rng: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(rng["cpu"].clone())  # as it lies in a file, it is not aligned
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"].clone(), device)


class StateGuard:
    """Reserves the state of a run for the training thread, except while that thread only reads it.

    Forward and backward passes, evaluation and samples may take long: a compiler runs, a disk
    hangs. Parameters and moments are then still those of the last whole step, and another thread
    may take them over to save them:

        training thread                         another thread (a watchdog)
        with guard.training():
            with guard.computing():
                ...                             guard.take_over()  # from here on it may save
            # waits here, until the process ends
    """

    def __init__(self, device: torch.device) -> None:
        self.rng: Tensors = {}  # at the beginning of what is being computed
        self.is_open = False  # whether the training thread only computes now
        self.interrupted = False  # whether an exception ended what was computed last
        self._device = device
        self._begun: deque[tuple[Any, tuple[int, ...], Tensors]] = deque()
        self._lock = threading.Lock()
        self._training = False

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Hold the state while this thread trains."""
        with self._lock:
            self._training = True
            try:
                yield
            finally:
                self._training = False

    @contextlib.contextmanager
    def computing(self, *step: int) -> Iterator[None]:
        """Let another thread take the state over while this block only reads it.

        Within another such block, and outside of `training` (where nobody else may save), this
        does nothing. If another thread has taken over, the block never ends: the process does.

        Args:
            step: The state that a step begins from, which `beside` may yield later: a GPU may come
                to the step when the host is some steps ahead.
        """
        if self.is_open or not self._training:
            yield
            return
        self.rng = rng_state(self._device)
        self.interrupted = False
        self.is_open = True
        self._lock.release()
        try:
            if step:
                self._note_step(step)
            yield
        except BaseException:
            self.interrupted = True
            raise
        finally:
            self._lock.acquire()
            self.is_open = False

    def _note_step(self, step: tuple[int, ...]) -> None:
        """Record where a step begins on the device; forget the steps that it has finished."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._begun.append((event, step, self.rng))
            while len(self._begun) > 1 and self._begun[1][0].query():
                self._begun.popleft()

    @contextlib.contextmanager
    def beside(self) -> Iterator[tuple[int, ...] | None]:
        """Let this thread, which has taken over, work beside what hangs on the device.

        Yields None, except where the host has issued steps that the device has not come to: then
        what `computing` was told of the last step that the device came to. `rng` is of that step.
        """
        if self._device.type != "cuda":
            yield None
            return
        torch.cuda.set_device(self._device)
        now: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        now.record(torch.cuda.default_stream(self._device))
        reached = None
        if not now.query() and self._begun:
            while not self._begun[-1][0].query():
                self._begun.pop()
            _, reached, self.rng = self._begun[-1]
        with torch.cuda.stream(torch.cuda.Stream(self._device)):  # type: ignore[no-untyped-call]
            yield reached

    def take_over(self) -> bool:
        """Stop the training thread for good, as soon as it computes; False: it has ended."""
        self._lock.acquire()
        if not self._training:
            self._lock.release()
        return self._training
