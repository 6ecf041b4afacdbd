"""The learning rate of every schedule at the steps that matter, exactly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.config import ScheduleConfig
from fasttrain.engine.schedule import context_at, lr_at, n_plateaus, n_stale

# 10 warmup steps, then 91 steps from 10 to 100: the middle of the decay is step 55.
TOTAL, WARMUP, LR, MIN_LR = 101, 10, 6e-4, 6e-5

MONOTONIC = ["cosine", "linear", "constant", "wsd"]  # from lr behind the warmup to the end


def schedule(name: str, **values: object) -> ScheduleConfig:
    return ScheduleConfig(**{"name": name, "warmup_steps": WARMUP, "min_lr": MIN_LR, **values})


@pytest.mark.parametrize("name", MONOTONIC)
def test_warmup_is_linear_and_ends_exactly_at_lr(name):
    config = schedule(name)
    assert lr_at(0, TOTAL, config, LR) == LR / 10
    assert lr_at(4, TOTAL, config, LR) == LR / 2
    assert lr_at(WARMUP - 1, TOTAL, config, LR) == LR
    assert lr_at(WARMUP, TOTAL, config, LR) == LR


@pytest.mark.parametrize(
    ("name", "middle", "last"),
    [
        ("cosine", (LR + MIN_LR) / 2, MIN_LR),
        ("linear", (LR + MIN_LR) / 2, MIN_LR),
        ("constant", LR, LR),
        ("wsd", LR, MIN_LR),
    ],
)
def test_middle_and_last_step(name, middle, last):
    config = schedule(name)
    assert lr_at(55, TOTAL, config, LR) == pytest.approx(middle, rel=1e-15, abs=0)
    assert lr_at(TOTAL - 1, TOTAL, config, LR) == last
    assert lr_at(TOTAL, TOTAL, config, LR) == last, "beyond the horizon the rate stays"
    assert lr_at(10 * TOTAL, TOTAL, config, LR) == last


def test_cosine_at_a_quarter_and_three_quarters():
    config = ScheduleConfig(name="cosine", min_lr=0.0)
    for step, angle in [(1, math.pi / 4), (3, 3 * math.pi / 4)]:
        expected = 0.5 * (1 + math.cos(angle))
        assert lr_at(step, 5, config, 1.0) == pytest.approx(expected, rel=1e-15, abs=0)


def test_wsd_holds_then_decays_linearly():
    config = ScheduleConfig(name="wsd", warmup_steps=2, decay_fraction=0.25)
    rates = [lr_at(step, 20, config, 1.0) for step in range(20)]
    assert rates == [0.5] + [1.0] * 15 + [0.75, 0.5, 0.25, 0.0]


def test_step_decays_by_a_factor_down_to_min_lr():
    config = ScheduleConfig(
        name="step", warmup_steps=2, decay_every_steps=3, decay_factor=0.5, min_lr=0.2
    )
    rates = [lr_at(step, 12, config, 1.0) for step in range(12)]
    assert rates == [0.5, 1.0] + [1.0] * 3 + [0.5] * 3 + [0.25] * 3 + [0.2]


def test_cosine_restarts_as_torch_has_it():
    config = ScheduleConfig(name="cosine_restarts", warmup_steps=3, cycle_steps=8, min_lr=0.1)
    rates = [lr_at(3 + step, 100, config, 1.0) for step in range(60)]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=8, eta_min=0.1)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


@given(step=st.integers(0, 10**9), cycle=st.integers(1, 10**4))
def test_cosine_restarts_stay_within_bounds(step, cycle):
    config = ScheduleConfig(name="cosine_restarts", cycle_steps=cycle)
    assert -1e-12 <= lr_at(step, 10**9, config, 1.0) <= 1.0


def test_decays_and_cycles_are_a_third_of_the_run_where_nothing_else_is_said():
    for name, key in (("step", "decay_every_steps"), ("cosine_restarts", "cycle_steps")):
        unset, third = ScheduleConfig(name=name), ScheduleConfig(**{"name": name, key: 4})
        rates = [[lr_at(step, 11, s, 1.0) for step in range(11)] for s in (unset, third)]
        assert rates[0] == rates[1]
        assert len(set(rates[0])) > 2


def test_wsd_that_decays_throughout_is_linear():
    wsd, linear = schedule("wsd", decay_fraction=1.0), schedule("linear")
    rates = [[lr_at(t, TOTAL, s, LR) for t in range(TOTAL)] for s in (wsd, linear)]
    assert rates[0] == rates[1]
    assert rates[0][55] < LR


@pytest.mark.parametrize("name", MONOTONIC)
def test_a_run_of_one_step_learns(name):
    assert lr_at(0, 1, ScheduleConfig(name=name), LR) == LR


def test_warmup_longer_than_the_horizon_goes_on():
    """A horizon in hours is an estimate and may come out shorter than the warmup."""
    config = schedule("cosine")
    assert lr_at(7, 5, config, LR) == LR * 0.8
    assert lr_at(12, 5, config, LR) == MIN_LR


@given(
    name=st.sampled_from(MONOTONIC),
    total=st.integers(1, 500),
    warmup=st.integers(0, 499),
    fraction=st.floats(0.01, 1.0),
    ratio=st.floats(0.0, 1.0),
)
def test_rises_then_falls_within_its_bounds(name, total, warmup, fraction, ratio):
    lr, min_lr = 3e-3, 3e-3 * ratio
    config = ScheduleConfig(name=name, warmup_steps=warmup, decay_fraction=fraction, min_lr=min_lr)
    rates = [lr_at(step, total, config, lr) for step in range(total)]
    peak = min(warmup, total - 1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    # The weighted mean of two ends may round by an ulp of either.
    tolerance = 4 * math.ulp(lr)
    assert all(b <= a + tolerance for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    assert all(0 < r <= lr + tolerance for r in rates[:peak])
    assert all(min_lr - tolerance <= r <= lr + tolerance for r in rates[peak + 1 :])


def test_contexts_take_equal_parts_of_the_run_and_the_last_is_uncut():
    config = ScheduleConfig(context_fractions=(0.25, 0.5))
    assert [context_at(step, 6, config, 64) for step in range(6)] == [16, 16, 32, 32, 64, 64]
    assert context_at(9, 6, config, 64) == 64  # a horizon in hours is an estimate
    assert {context_at(step, 5, ScheduleConfig(), 64) for step in range(5)} == {64}


@pytest.mark.parametrize(
    ("seq_len", "lengths"),
    [(96, [24, 48]), (100, [25, 50]), (250, [50, 125]), (97, [97, 97]), (1, [1, 1]), (3, [1, 1])],
)
def test_parts_of_any_length_are_divisors_of_it_or_all_of_it(seq_len, lengths):
    config = ScheduleConfig(context_fractions=(0.25, 0.5))
    assert [context_at(step, 3, config, seq_len) for step in range(3)] == [*lengths, seq_len]


def test_a_wsd_run_that_branched_decays_from_there() -> None:
    wsd = ScheduleConfig(name="wsd", decay_start_step=6, decay_fraction=0.9)
    assert [lr_at(t, 11, wsd, 1.0) for t in range(4, 11)] == pytest.approx(
        [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    )


def test_a_plateau_lowers_the_rate_as_often_as_there_were_some() -> None:
    schedule = ScheduleConfig(name="plateau", decay_factor=0.5, min_lr=0.2, warmup_steps=2)
    rates = [lr_at(7, 100, schedule, 1.0, n_plateaus=n) for n in range(4)]
    assert rates == [1.0, 0.5, 0.25, 0.2]
    assert lr_at(0, 100, schedule, 1.0, n_plateaus=2) == 0.5  # the warmup is as ever


@pytest.mark.parametrize(
    ("losses", "min_change", "stale", "plateaus"),
    [
        ([], 0.0, 0, 0),
        ([3.0, 2.0, 1.0], 0.0, 0, 0),
        ([3.0, 3.0, 3.0], 0.0, 2, 1),
        ([3.0, 2.95, 2.92, 2.85], 0.1, 0, 1),  # only the last is lower by 0.1
        ([3.0, 3.1, 3.2, 2.0, 2.1], 0.0, 1, 1),
        ([3.0, math.nan, math.nan, math.nan, math.nan], 0.0, 4, 2),
    ],
)
def test_stale_evaluations_and_plateaus_of_two(
    losses: list[float], min_change: float, stale: int, plateaus: int
) -> None:
    assert n_stale(losses, min_change) == stale
    assert n_plateaus(losses, 2, min_change) == plateaus
