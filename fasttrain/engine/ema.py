"""An exponential moving average of a model's parameters."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from fasttrain_kernels.grad_norm import local_tensor
from torch import Tensor, nn

from fasttrain.config import UserError
from fasttrain.distributed.sharding import cut
from fasttrain.engine.optim import parameters_by_name


class Ema:
    """Averages a model's parameters p over steps: average ← decay · average + (1 - decay) · p.

    The average of a parameter begins at its value when it is first seen to train, and is evaluated
    in its place. ``decay`` is in (0, 1); None: there is no average, and every method does nothing.

    Numerics: averages are fp32, of fp64 parameters fp64. In bf16, with three digits, most updates
        would be rounded away.
    Memory: one copy of the parameters, and another while the average is in use. Source: Polyak &
    Juditsky 1992; with exponential weights, as in Morales-Brotons et al. 2024 (arXiv:2411.18704).
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self._model = model
        self._sources: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] = {}  # spread over the ranks as the parameters are
        self._held: dict[str, Tensor] = {}  # the parameters, while the average is in use
        self.follow([p for p in model.parameters() if p.requires_grad])

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Begin an average of each of the model's parameters here that has none."""
        if self.decay is None:
            return
        followed = {id(p) for p in self._sources.values()}
        new = {id(p) for p in parameters} - followed
        if not new:
            return
        for name, p in parameters_by_name(self._model).items():
            if id(p) in new:
                self._sources[name] = p
                self.averages[name] = p.detach().to(_wide(p.dtype), copy=True)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Take the parameters of the step just done into the average; never waits for the device.

        ``skipped``: a scalar on the device, 1 where no step was made and the average stays, else 0.
        """
        if self.decay is None:
            return
        weight = (1.0 - self.decay) * (1.0 - skipped)
        averages = [local_tensor(average) for average in self.averages.values()]
        parameters = [p.to(_wide(p.dtype)) for p in map(local_tensor, self._sources.values())]
        weights = [weight.to(average.dtype) for average in averages]
        torch._foreach_lerp_(averages, parameters, weights)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model compute with the average; afterwards it has its parameters back.

        They are copied in place: compiled graphs know them by their addresses.
        """
        if self.decay is None or self._held:
            yield
            return
        self._held = {name: p.detach().clone() for name, p in self._sources.items()}
        self._assign(self.averages)
        try:
            yield
        finally:
            self._assign(self._held)
            self._held = {}

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        own = [local_tensor(p) for p in self._sources.values()]
        torch._foreach_copy_(own, [local_tensor(values[name]) for name in self._sources])

    def groups(self, model_state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the groups ``model`` and, with an average, ``ema`` for a checkpoint, not copied.

        ``model_state`` is `state_by_name` of the model: the average, while that is in use.
        """
        groups = {"model": {**model_state, **self._held}}
        return groups if self.decay is None else groups | {"ema": self.averages}

    def check(self, saved: Mapping[str, Tensor]) -> None:
        """Raise UserError unless ``saved`` is an average of this model, or empty."""
        if self.decay is None:
            return
        shapes = {name: p.shape for name, p in parameters_by_name(self._model).items()}
        if any(shapes.get(name) != tensor.shape for name, tensor in saved.items()):
            raise UserError("the checkpoint's average is of another model; unset train.ema_decay")

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the average; what the saved one lacks begins at the present parameters."""
        if self.decay is None:
            return
        self.check(saved)
        named = parameters_by_name(self._model)
        self.follow([named[name] for name in saved])
        with torch.no_grad():
            for name, average in self.averages.items():
                average.copy_(cut(saved[name], average) if name in saved else self._sources[name])


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which parameters of ``dtype`` are averaged."""
    return torch.float64 if dtype == torch.float64 else torch.float32
