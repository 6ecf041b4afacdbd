"""The state of a run: what a checkpoint holds of it, as groups of tensors, and who may save it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasttrain.checkpoint import Checkpoint
from fasttrain.config import UserError
from fasttrain.distributed.slices import cut
from fasttrain.engine.optim import load_optimizer_tensors, optimizer_tensors
from fasttrain.model.transformer import Transformer

if TYPE_CHECKING:
    from fasttrain.engine.step import TrainStep

__all__ = ["StateGuard", "collect", "restore", "restore_rng", "rng_of_rank", "rng_state"]


def rng_state(device: torch.device) -> dict[str, Tensor]:
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


def rng_of_rank(rng: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return random states by their names among those of all ranks in a checkpoint."""
    return {f"{name}@{rank}" if rank else name: state for name, state in rng.items()}


def _restore_rng_of_rank(saved: Mapping[str, Tensor], device: torch.device, rank: int) -> None:
    """Put back a rank's random state; where none was saved, seed it by that of rank 0."""
    names = rng_of_rank({name: saved["cpu"] for name in ("cpu", "cuda")}, rank)
    own = {name.partition("@")[0]: saved[name] for name in names if name in saved}
    if "cpu" in own:
        restore_rng(own, device)
    else:
        words = saved["cpu"].numpy().tobytes() + rank.to_bytes(8, "little")
        torch.manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:8], "little"))


def collect(
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    train_step: TrainStep,
    rank: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """Return all tensors that a run needs to go on, by group, not copied."""
    rng = rng_of_rank(rng_state(train_step.loss.device), rank)
    # First the model's: FSDP2 then puts its shards in the place of what a forward gathered.
    return train_step.ema.groups(model.state_dict()) | {
        "optimizer": optimizer_tensors(model, optimizers),
        "trainer": train_step.state() | rng,
    }


def restore(
    checkpoint: Checkpoint,
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    train_step: TrainStep,
    rank: int = 0,
) -> None:
    """Put back what `collect` returned, on any number of ranks, sharded or not; none waits.

    Raises:
        UserError: the checkpoint is of another model.
    """
    try:
        own = model.state_dict()
        saved = checkpoint.group("model")
        model.load_state_dict({n: cut(t, own[n]) if n in own else t for n, t in saved.items()})
        tensors, state = checkpoint.group("optimizer"), checkpoint.state
        stepped = state.get("step", 0) > state.get("faults", {}).get("skipped_steps", 0)
        load_optimizer_tensors(model, optimizers, tensors, stepped=stepped)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{checkpoint.path}: the checkpoint is of another model: {reason}"
        ) from error
    train_step.ema.load(checkpoint.group("ema"))
    rest, device = checkpoint.group("trainer"), train_step.loss.device
    # Of a run on a CPU; and a window of another size begins empty.
    optional = {"cuda", "spike_count"} - rest.keys()
    if "spike_count" in optional or "spike_values" in rest:
        optional.add("spike_values")
    for name, mine in (train_step.state() | rng_state(device)).items():
        there, here = (
            "missing" if t is None else f"{tuple(t.shape)} {t.dtype}"
            for t in (rest.get(name), mine)
        )
        if there != here and name not in optional:
            raise UserError(
                f"{checkpoint.path}: trainer.{name} is {there}, and not {here}; resume from an "
                "earlier checkpoint"
            )
    try:
        _restore_rng_of_rank(rest, device, rank)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{checkpoint.path}: no state of a random generator: {reason}") from error
    train_step.load(rest)


def _made(event: torch.cuda.Event) -> bool:
    """Return whether the device has come to an event."""
    return bool(event.query())  # type: ignore[no-untyped-call]


class StateGuard:
    """Keeps the state of a run to the training thread, except while that only computes from it.

    Forward and backward, evaluation and samples may last: a compiler runs, a disk hangs. Parameters
    and moments are then still those of the last whole step, and another thread may take them over.

    Attributes:
        rng: the random state at the beginning of what is being computed.
        is_open: whether the training thread now only computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rng: dict[str, Tensor] = {}
        self.is_open = False
        self._device = device
        self._begun: deque[tuple[torch.cuda.Event, tuple[int, ...], dict[str, Tensor]]] = deque()
        self._lock = threading.Lock()
        self._training = False

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Hold the state while this thread trains."""
        self._lock.acquire()
        self._training = True
        try:
            yield
        finally:
            self.close()  # waits for ever for a thread that has taken over: that ends the process
            self._training = False
            self._lock.release()

    def open(self) -> None:
        """Begin to compute; outside of `training` nobody else may save, and this does nothing."""
        if self._training and not self.is_open:
            self.rng = rng_state(self._device)
            self.is_open = True
            self._lock.release()

    def begin(self, *where: int) -> None:
        """Begin a step, and note of what state: the device may come to it some steps later.

        Args:
            where: steps, samples and tokens before it.
        """
        self.open()
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._begun.append((event, where, self.rng))
            while len(self._begun) > 1 and _made(self._begun[1][0]):
                self._begun.popleft()

    def close(self) -> None:
        """Before the state changes."""
        if self.is_open:
            self._lock.acquire()
            self.is_open = False

    def give_up(self) -> None:
        """Go back to where the computing that failed began."""
        self.close()
        restore_rng(self.rng, self._device)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Compute, or wait for the device or for other ranks, within a block."""
        was_open = self.is_open
        self.open()
        try:
            yield
        finally:
            if not was_open:
                self.close()

    @contextlib.contextmanager
    def beside(self) -> Iterator[tuple[int, ...] | None]:
        """Let this thread, having taken over, work beside what hangs on the device.

        Yields:
            What `begin` was told of the last step that the device came to, where later ones, which
            the host has issued, are held up with it; `rng` is then of that step. Otherwise None.
        """
        if self._device.type != "cuda":
            yield None
            return
        torch.cuda.set_device(self._device)
        now, reached = torch.cuda.Event(), None  # type: ignore[no-untyped-call]
        now.record(torch.cuda.default_stream(self._device))
        if not _made(now) and self._begun:
            while not _made(self._begun[-1][0]):
                self._begun.pop()
            _, reached, self.rng = self._begun[-1]
        with torch.cuda.stream(torch.cuda.Stream(self._device)):  # type: ignore[no-untyped-call]
            yield reached

    def take_over(self) -> bool:
        """Stop the training thread for good, at once where it computes, else when it does so next.

        Returns:
            False where it has ended its training; the state is then its own again.
        """
        self._lock.acquire()
        if not self._training:
            self._lock.release()
        return self._training
