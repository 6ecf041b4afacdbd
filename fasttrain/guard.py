"""When the state of a run may be saved by another thread than the one that trains."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from fasttrain.state import restore_rng, rng_state

__all__ = ["StateGuard"]


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
        """Compute within a block."""
        self.open()
        try:
            yield
        finally:
            self.close()

    def take_over(self) -> bool:
        """Stop the training thread for good, at once where it computes, else when it does so next.

        Returns:
            False where it has ended its training; the state is then its own again.
        """
        self._lock.acquire()
        if not self._training:
            self._lock.release()
        return self._training
