"""Shared by the benchmarks: rivals timed side by side, the table at the end, figures to files.

A benchmark fails only where a result is wrong: what a figure should be is stated in compare.py.
A comparison, a test and the whole have a budget of seconds; what that leaves out is named at the
end. ``--full`` lifts them, and takes the large forms.
"""

import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, report
from fasttrain.device import keep_freed_memory

BUDGET_S, FULL_BUDGET_S = 3.0, 20.0  # for the rounds of one comparison
SESSION_S, TEST_S = 500, 120  # for the whole, and for one test of it
ENTRIES: dict[str, list[dict[str, Any]]] = {}  # of each suite
FACTS: dict[str, Any] = {}  # of the machine, with its load before any of this
STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write figures to this folder, by processor")
    parser.addoption("--suite", help="run only the benchmarks of this suite: adamw, rms_norm, …")
    parser.addoption("--full", action="store_true", help="more rounds, larger shapes, longer runs")
    parser.addoption("--rehearse", action="store_true", help="call everything once, untimed")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--results"):
        harness.yield_to_others()
    FACTS.update(harness.machine())
    if not harness.CUDA:
        # As in a run. Else what ran before decides whether new memory is mapped anew at each call:
        # torch's RMSNorm of 2048 × 768 took 21 ms or 7.
        keep_freed_memory()


def figures_of(item: pytest.Item) -> tuple[str, str]:
    """Return suite and name of a test's figures."""
    suite, name = item.path.stem.removeprefix("bench_"), item.name.removeprefix("test_")
    marker = item.get_closest_marker("figures")
    return (marker.args[0], marker.kwargs.get("name", name)) if marker else (suite, name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with ops, which take seconds: a busy machine may not reach the last of whole runs."""
    only = config.getoption("--suite")
    items[:] = [item for item in items if only in (None, figures_of(item)[0])]
    items.sort(key=lambda item: -report.rank(figures_of(item)[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Leave out what takes too long: on a busy machine a compilation alone may take minutes."""
    left_s = SESSION_S - (time.monotonic() - STARTED)

    def skip(*_: object) -> None:
        why = f"not finished in {TEST_S} s" if left_s > TEST_S else f"not reached in {SESSION_S} s"
        pytest.skip(f"{why}: run it alone, or --full")

    if item.config.getoption("--full"):
        return (yield)
    signal.signal(signal.SIGALRM, skip)
    signal.alarm(max(1, int(min(left_s, TEST_S))))
    try:
        return (yield)
    finally:
        signal.alarm(0)


def _given(name: str) -> Any:
    return pytest.fixture(name=name)(lambda request: request.config.getoption(f"--{name}"))


full, rehearse = _given("full"), _given("rehearse")


@pytest.fixture
def compare(benchmark: Any, rehearse: bool, full: bool) -> Callable[..., dict[str, Any]]:
    """A function that times callables, ours first, against each other and records the result.

    ``n_calls`` are made in one timing, after ``warmup`` of each. With ``rounds`` the callables tell
    their seconds themselves. ``left_out`` says why other rivals do not take part, and ``per_call``
    of a rate such as ``gb_per_s`` how much of it a call does. What `harness.comparison` finds is
    stored in the benchmark's ``extra_info`` and returned; for pytest-benchmark all rounds are one.
    """

    def run(
        calls: Any, *, n_calls: int = 1, warmup: int = 2, flush: bool = True, rounds: Any = None,
        left_out: Any = (), per_call: Any = (),
    ) -> dict[str, Any]:  # fmt: skip
        if rounds is None:
            for call in calls.values():
                for _ in range(0 if rehearse else warmup):
                    call()
            n = 1 if rehearse else n_calls
            calls = {k: partial(harness.seconds, x, n, flush=flush) for k, x in calls.items()}
            rounds = harness.rounds_within(FULL_BUDGET_S if full else BUDGET_S)
        times = benchmark.pedantic(harness.turns, args=(calls, [0] if rehearse else rounds))
        benchmark.extra_info["left_out"] = dict(left_out)
        benchmark.extra_info.update(harness.comparison(times, **dict(per_call)))
        return benchmark.extra_info

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    outcome = yield
    suite, name = figures_of(item)
    entry: dict[str, Any] = {"name": name}
    if outcome.skipped:
        entry["skipped"] = outcome.longrepr[2].removeprefix("Skipped: ")
    elif outcome.when == "call" and "benchmark" in getattr(item, "funcargs", {}):
        entry |= item.funcargs["benchmark"].extra_info
        if outcome.failed:
            entry["failed"] = str(call.excinfo.value if call.excinfo else "").split("\n")[0]
    else:
        return outcome
    entries = ENTRIES.setdefault(suite, [])
    entries.append(entry)
    folder = item.config.getoption("--results")
    if folder is not None and not item.config.getoption("--rehearse"):
        harness.save(folder, harness.document(suite, entries, FACTS, harness.ceilings()))
    return outcome


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    ceilings = harness.ceilings() if harness.CUDA else {}
    documents = [harness.document(k, v, FACTS, ceilings) for k, v in ENTRIES.items()]
    if documents:
        terminalreporter.section("benchmarks")
        terminalreporter.write(report.plain_text(documents))
