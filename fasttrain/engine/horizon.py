"""How long a run is, in steps where that is known, else by the clock; and what makes a step."""

import math
from typing import NamedTuple

from fasttrain.config import LoopConfig

__all__ = ["HOURS_ESTIMATE_AT", "StepShape", "n_steps", "step_shape"]

# With train.hours the number of steps is estimated once, from the time that steps took up to here.
HOURS_ESTIMATE_AT = 20


def n_steps(
    loop: LoopConfig, *, tokens_per_step: int, samples_per_step: int, samples_per_epoch: int
) -> int | None:
    """Return the number of steps of a run; None with ``train.hours``, which has to be measured."""
    if loop.steps is not None:
        return loop.steps
    if loop.tokens is not None:
        return math.ceil(loop.tokens / tokens_per_step)
    if loop.epochs is not None:
        return math.ceil(math.ceil(loop.epochs * samples_per_epoch) / samples_per_step)
    return None


class StepShape(NamedTuple):
    """The sequences of one micro-batch and the micro-batches of one step, on each rank."""

    rows: int
    n_micro: int

    @property
    def samples(self) -> int:
        """The sequences of one step, on each rank."""
        return self.rows * self.n_micro


def step_shape(loop: LoopConfig, seq_len: int, n_ranks: int = 1) -> StepShape:
    """Return how each of ``n_ranks`` makes a step of ``train.tokens_per_step``.

    A rank takes the nearest number of whole sequences, and as many at a time as divide it, up to
    ``train.micro_batch``, which may be ``auto``; the loss does not depend on that split.
    """
    if loop.tokens_per_step is None:
        return StepShape(loop.micro_batch, 1)
    unit = seq_len * n_ranks
    samples = max((loop.tokens_per_step + unit // 2) // unit, 1)
    most = samples if isinstance(loop.micro_batch, str) else min(loop.micro_batch, samples)
    rows = next(n for n in range(most, 0, -1) if samples % n == 0)
    return StepShape(rows, samples // rows)
