"""Learning-rate schedules: pure functions of the step and, for plateaus, of the losses so far.

No state is kept from step to step, so a resumed run and a plot made beforehand agree with the run
itself. Standard library only.
"""

import math
from collections.abc import Iterator, Sequence

from fasttrain.config import LoopConfig, ScheduleConfig, refuse
from fasttrain.resolve import StepShape


def lr_at(
    step: int, total_steps: int, schedule: ScheduleConfig, lr: float, *, n_plateaus: int = 0
) -> float:
    """Return the learning rate of one optimizer step, of which ``lr`` is the peak.

    With W warmup steps, S = total_steps and t the step, counted from 0::

        t < W           lr · (t + 1) / W                the first step already learns
        constant        lr
        cosine, linear  from lr at t = W down to min_lr at t = S - 1
        wsd             lr, then straight from lr at t = S - round(decay_fraction · S) to min_lr
                        at t = S - 1; the decay never starts before t = W, and where
                        decay_start_step is set, it starts there
        step            lr · decay_factor^k after k times decay_every_steps (unset: S / 3) since the
                        warmup, never below min_lr
        cosine_restarts from lr towards min_lr over cycle_steps (unset: S / 3), again and again
        plateau         lr · decay_factor^n_plateaus, never below min_lr

    cosine is half a period, linear is straight; both ends are exact in floating point. Beyond the
    last step (a horizon in hours is an estimate) the rate stays at its end. Where the decay has a
    single step, that step takes lr: a run of one step learns.

    Source: cosine and its restarts: Loshchilov & Hutter 2017 (arXiv:1608.03983). wsd: Hu et al.
    2024 (MiniCPM, arXiv:2404.06395), here with the linear decay of Hägele et al. 2024
    (arXiv:2405.18392).
    """
    name, start, a_third = schedule.name, schedule.warmup_steps, -(-total_steps // 3)
    if step < start:
        return lr * ((step + 1) / start)
    if name in ("step", "plateau"):
        every = schedule.decay_every_steps or a_third
        n_decays = (step - start) // every if name == "step" else n_plateaus
        return max(lr * schedule.decay_factor**n_decays, schedule.min_lr)
    if name == "wsd":
        begun = schedule.decay_start_step
        if begun is None:
            begun = total_steps - round(schedule.decay_fraction * total_steps)
        start = max(start, begun)
    if name == "constant" or step <= start:
        return lr
    progress = min(1.0, (step - start) / max(1, total_steps - 1 - start))
    if name == "cosine_restarts":
        cycle_steps = schedule.cycle_steps or a_third
        progress = (step - start) % cycle_steps / cycle_steps
    if name.startswith("cosine"):
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    elif name not in ("linear", "wsd"):
        refuse("schedule.name", name, "is not implemented; add it to engine/schedule.py")
    # Weighting both ends, rather than adding a difference to one, makes both exact.
    return lr * (1.0 - progress) + schedule.min_lr * progress


def _stale(losses: Sequence[float], min_change: float) -> Iterator[int]:
    """Yield after each loss how many in a row were not below the lowest before them."""
    best, stale = math.inf, 0
    for loss in losses:
        best, stale = (loss, 0) if loss < best - min_change else (best, stale + 1)
        yield stale


def n_stale(losses: Sequence[float], min_change: float) -> int:
    """Return how many of the last losses were not below the lowest before them by ``min_change``.

    A loss that is nan is no improvement. Early stopping ends a run where this reaches its patience.
    """
    return [0, *_stale(losses, min_change)][-1]


def n_plateaus(losses: Sequence[float], patience: int, min_change: float) -> int:
    """Return how many times ``patience`` losses in a row brought no improvement of ``min_change``.

    After a plateau, as many losses again make the next.
    """
    return sum(n > 0 and n % patience == 0 for n in _stale(losses, min_change))


def context_at(step: int, total_steps: int, schedule: ScheduleConfig, seq_len: int) -> int:
    """Return the length, in tokens, into which one step cuts its sequences of ``seq_len``.

    It is the longest divisor of ``seq_len`` within the fraction that it is to have; where that is
    less than half of it, ``seq_len``: a prime would be cut into single tokens.

    Source: Li et al. 2022, The Stability-Efficiency Dilemma (arXiv:2108.06084).
    """
    fractions = (*schedule.context_fractions, 1.0)
    now = min(step * len(fractions) // total_steps, len(fractions) - 1)
    most = max(round(fractions[now] * seq_len), 1)
    length = next(n for n in range(most, 0, -1) if seq_len % n == 0)
    return length if 2 * length >= most else seq_len


def n_steps(loop: LoopConfig, step: StepShape, samples_per_epoch: int) -> int | None:
    """Return the steps of a run; None with ``train.hours``, which must be measured."""
    if loop.steps is not None:
        return loop.steps
    if loop.tokens is not None:
        return math.ceil(loop.tokens / step.tokens)
    if loop.epochs is not None:
        return math.ceil(math.ceil(loop.epochs * samples_per_epoch) / step.samples)
    return None
