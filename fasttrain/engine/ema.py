"""A moving average of the parameters, which is evaluated in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from fasttrain_kernels.grad_norm import local_tensor
from torch import Tensor, nn

from fasttrain.config import UserError
from fasttrain.distributed.slices import cut

__all__ = ["Ema"]


class Ema:
    """Averages a model's parameters p over steps: average ← decay · average + (1 - decay) · p.

    Args:
        model: its trainable parameters are averaged, from their present values on.
        decay: weight of the past a step, in (0, 1); None: there is no average, and every method
            does nothing.

    Memory: one copy of the parameters, and another while they are in use.

    Source: Polyak & Juditsky 1992; with exponential weights, as in Morales-Brotons et al. 2024
    (arXiv:2411.18704).
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and decay]
        self.names = [name for name, _ in named]
        self._sources = [p.detach() for _, p in named]
        self.averages = [p.clone() for p in self._sources]  # spread over ranks as they are
        self._local = [local_tensor(p) for p in self._sources]
        self._local_averages = [local_tensor(p) for p in self.averages]
        self._held: list[Tensor] | None = None  # the parameters, while the average is in use

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Take the parameters of the step just done into the average; never waits for the device.

        Args:
            skipped: scalar on the device, 1 where no step was made, and the average stays; else 0.
        """
        if self.decay is None:
            return
        weight: Any = 1.0 - self.decay
        if skipped is not None:
            weight = weight * (1.0 - skipped)
            weight = [weight.to(average.dtype) for average in self._local_averages]
        torch._foreach_lerp_(self._local_averages, self._local, weight)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model compute with the average; afterwards it has its parameters back.

        They are copied in place: compiled graphs know them by their addresses.
        """
        if self.decay is None or self._held is not None:
            yield
            return
        self._held = [p.clone() for p in self._sources]
        torch._foreach_copy_(self._local, self._local_averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._local, [local_tensor(p) for p in self._held])
            self._held = None

    def groups(self, model_state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the groups ``model`` and, with an average, ``ema`` for a checkpoint, not copied.

        Args:
            model_state: ``model.state_dict()``; while the average is in use, that is in it.
        """
        model = dict(model_state)
        if self.decay is None:
            return {"model": model}
        if self._held is not None:
            model |= dict(zip(self.names, self._held, strict=True))
        return {"model": model, "ema": dict(zip(self.names, self.averages, strict=True))}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the average; of a run that had none it begins at the present parameters.

        Raises:
            UserError: the average is of another model.
        """
        if self.decay is None:
            return
        if saved and set(saved) != set(self.names):
            raise UserError("the checkpoint's average is of another model; unset train.ema_decay")
        sources = [saved[name] for name in self.names] if saved else self._sources
        with torch.no_grad():
            for average, source in zip(self.averages, sources, strict=True):
                average.copy_(cut(source, average))
