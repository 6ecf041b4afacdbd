"""The clock of a step: its phases, and beside them the time in which collectives were under way."""

import random
from typing import Any

import pytest
import torch

from fasttrain.log.timing import StepClock, TimeAccount, covered


def test_the_union_of_intervals_is_that_of_their_points() -> None:
    assert covered([]) == 0
    draw = random.Random(1)
    for _ in range(50):
        starts = [draw.randrange(60) for _ in range(12)]
        spans = [(start, start + draw.randrange(8)) for start in starts]
        assert covered(spans) == len({i for begin, end in spans for i in range(begin, end)})


class Time:
    """Stands for the host's clock, and for events of CUDA that take the same time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        return _Event(self)


class _Event:
    def __init__(self, time: Time) -> None:
        self.time, self.at_s, self.over = time, -1.0, False

    def record(self) -> None:
        self.at_s, self.over = self.time.now_s, False

    def synchronize(self) -> None:
        self.over = True

    def query(self) -> bool:
        return self.at_s >= 0

    def elapsed_time(self, end: "_Event") -> float:
        assert end.over
        return 1000 * (end.at_s - self.at_s)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr("fasttrain.log.timing.time.perf_counter", time)
    monkeypatch.setattr(torch.cuda, "Event", time.event)
    return time


def one_step(clock: StepClock, time: Time) -> None:
    """Make a step of 6 s forward and backward and 2 s of update, 4 s of it with collectives."""
    clock.mark(0)
    time.now_s += 1
    first = clock.begin()
    time.now_s += 1
    second = clock.begin()  # while the first is under way
    time.now_s += 1
    clock.end(first)
    time.now_s += 1
    clock.end(second)
    third = clock.begin()
    clock.end(third)
    time.now_s += 1
    clock.end(third)  # an all-reduce followed it
    time.now_s += 1
    clock.mark(1)
    time.now_s += 2
    clock.mark(2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_collectives_of_steps_count_and_those_between_them_do_not(device: str, time: Time) -> None:
    clock = StepClock(torch.device(device), n_phases=2)
    for n_steps in (1, 3):
        for _ in range(n_steps):
            one_step(clock, time)
            outside = clock.begin()  # of an evaluation
            time.now_s += 10
            clock.end(outside)
        clock.mark(0)  # a step under way is not yet counted
        assert clock.read() == pytest.approx([6 * n_steps, 2 * n_steps, 4 * n_steps])
    assert clock.read() == [0.0, 0.0, 0.0]


def test_a_line_says_nothing_of_communication_where_nothing_was_sent(time: Time) -> None:
    account = TimeAccount(0)
    for seconds in (0.0, 3.0):
        for _ in range(2):
            account.add_step(8.0, 0.0)
        account.add("communication", seconds)
        assert account.line(2)["communication_ms"] == (1500.0 if seconds else None)


def test_the_time_left_is_judged_from_all_that_followed_the_first_step(time: Time) -> None:
    """A resumed run that took 10 s for 100 steps and an evaluation needs 90 s for 900 more."""
    account = TimeAccount(999)
    time.now_s += 60  # it compiles
    account.add_step(60.0, 0.0)
    assert account.left_s(1000, 2000) is None
    for _ in range(100):
        time.now_s += 0.08
        account.add_step(0.08, 0.0)
    time.now_s += 2  # an evaluation
    assert account.left_s(1100, 2000) == pytest.approx(90.0)
    assert account.left_s(2001, 2000) == 0.0
    assert account.left_s(999, 2000) is None, "a rollback went back behind the first step"
