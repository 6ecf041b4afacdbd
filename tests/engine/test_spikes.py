"""The spike window: what is flagged, what enters it, and that it never waits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.engine.spikes import LEAST_DEVIATION, SpikeWindow

CPU = torch.device("cpu")


def feed(window: SpikeWindow, loss: float, norm: float = 1.0) -> bool:
    values = torch.tensor([loss, norm])
    return bool(window.judge(values[0], values[1], values.isfinite().all()))


def filled(n_steps: int = 64, sigmas: float = 10.0) -> tuple[SpikeWindow, float, float]:
    """Return a window of noisy losses around 3, their mean and their deviation."""
    window = SpikeWindow(n_steps, sigmas, CPU)
    losses = 3.0 + 0.1 * np.random.default_rng(0).standard_normal(n_steps)
    assert not any([feed(window, float(loss)) for loss in losses])
    return window, float(losses.mean()), float(losses.std())


@pytest.mark.parametrize(("sigmas", "flagged"), [(9.9, False), (10.1, True), (1e6, True)])
def test_R19_ten_sigma_are_a_spike_and_less_are_not(sigmas: float, flagged: bool) -> None:
    window, mean, deviation = filled()
    assert feed(window, mean + sigmas * deviation) is flagged


def test_R19_a_gradient_norm_is_a_spike_too_and_a_fall_is_none() -> None:
    assert feed(filled()[0], 3.0, norm=2.0)
    assert not feed(filled()[0], 0.0, norm=0.0)


def test_R19_a_constant_loss_never_skips() -> None:
    window = SpikeWindow(16, 10.0, CPU)
    rounding = [3.0, 3.0000002, 2.9999998]
    assert not any([feed(window, rounding[i % 3]) for i in range(200)])
    zero = SpikeWindow(16, 10.0, CPU)
    assert not any([feed(zero, 0.0, 0.0) for _ in range(50)])


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (3.0, math.nan), (math.inf, math.inf)])
def test_R19_what_is_not_finite_stays_out_of_the_window(bad: tuple[float, float]) -> None:
    window, mean, deviation = filled()
    values, count = window.values.clone(), window.count.clone()
    for _ in range(5):
        assert not feed(window, *bad)
    assert torch.equal(window.values, values)
    assert torch.equal(window.count, count)
    assert feed(window, mean + 11 * deviation)


def test_R19_nothing_is_a_spike_before_half_of_the_window_is_filled() -> None:
    window = SpikeWindow(8, 10.0, CPU)
    assert [feed(window, loss) for loss in (1.0, 50.0, 1e4, 1e8)] == [False] * 4
    window = SpikeWindow(8, 10.0, CPU)
    assert [feed(window, loss) for loss in (1.0, 1.0, 1.0, 1.0, 50.0)] == [False] * 4 + [True]


def test_R19_a_spike_does_not_hide_the_next_and_a_lasting_rise_is_accepted() -> None:
    window, mean, deviation = filled()
    assert feed(window, 1e9)
    assert feed(window, mean + 30 * deviation)
    for _ in range(20):
        flagged = feed(window, 5.0)
    assert not flagged


finite = st.floats(0.0, 100.0, width=32)
maybe = st.one_of(finite, st.sampled_from([math.nan, math.inf]))


@given(st.lists(st.tuples(maybe, maybe), max_size=40), st.integers(2, 9))
def test_R19_verdicts_are_those_of_the_definition(
    steps: list[tuple[float, float]], n_steps: int
) -> None:
    window = SpikeWindow(n_steps, 3.0, CPU)
    kept: list[list[float]] = []
    for step in steps:
        before: list[Tensor] = [window.values.clone(), window.count.clone()]
        flagged = feed(window, *step)
        if not all(map(math.isfinite, step)):
            assert not flagged
            assert torch.equal(before[0], window.values)
            continue
        last = np.array(kept[-n_steps:], dtype=np.float64).reshape(-1, 2)
        limit = np.array([math.inf, math.inf])
        if 2 * len(kept) >= n_steps:
            mean = last.mean(0)
            limit = mean + 3.0 * np.maximum(last.std(0), LEAST_DEVIATION * np.abs(mean))
        margin = 1e-3 * np.maximum(np.abs(limit), 1e-3)
        if not (np.abs(np.array(step) - limit) < margin).any():  # fp32 against fp64
            assert flagged == bool((np.array(step) > limit).any())
        entered = window.values[:, len(kept) % n_steps].tolist()
        assert entered == pytest.approx(np.minimum(step, limit).tolist(), rel=2e-3, abs=1e-3)
        kept.append(entered)
