"""How long a run is: in steps where that is known, else by the clock."""

import math

from fasttrain.config import LoopConfig

__all__ = ["HOURS_ESTIMATE_AT", "n_steps"]

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
