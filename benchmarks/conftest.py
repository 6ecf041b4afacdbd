"""Shared by the benchmarks: rivals timed side by side, the table at the end, figures to files.

    def test_norm(compare):
        compare({"fasttrain": ours, "torch": theirs})

A benchmark reports, and fails only where a result is wrong: what a figure should be is stated in
compare.py. ``--results benchmarks/results`` also writes the figures, a file for each suite, after
every test; ``--suite NAME`` runs one suite. A comparison, a test and the whole have a budget of
seconds; what that leaves out is named at the end. ``--full`` lifts them, and takes the large forms.
"""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, report, store
from fasttrain.device import keep_freed_memory

ENTRIES = pytest.StashKey[dict[str, list[dict[str, Any]]]]()  # of each suite
MACHINE = pytest.StashKey[dict[str, Any]]()
STARTED = pytest.StashKey[float]()
BUDGET_S, FULL_BUDGET_S = 3.0, 20.0  # for the rounds of one comparison
SESSION_S, TEST_S = 500, 120  # for the whole, and for one test of it


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmarks."""
    parser.addoption("--results", type=Path, help="write figures to this folder, by processor")
    parser.addoption("--suite", help="run the benchmarks of this suite alone: adamw, rms_norm, …")
    parser.addoption("--full", action="store_true", help="more rounds, larger shapes, longer runs")
    parser.addoption(
        "--rehearse", action="store_true", help="call everything, once; the times mean nothing"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start with no figures, and memory in the state of a run."""
    config.stash[ENTRIES] = {}
    if not config.getoption("--results"):
        harness.yield_to_others()
    config.stash[MACHINE] = harness.machine()  # with the load before any of this
    config.stash[STARTED] = time.monotonic()
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
    left_s = SESSION_S - (time.monotonic() - item.config.stash[STARTED])

    def skip(*_: object) -> None:
        why = f"not finished in {TEST_S} s" if left_s > TEST_S else f"not reached in {SESSION_S} s"
        pytest.skip(f"{why}: run it alone, or --full")

    if item.config.getoption("--full"):
        return (yield)
    if left_s < 1:
        skip()
    signal.signal(signal.SIGALRM, skip)
    signal.alarm(int(min(left_s, TEST_S)))
    try:
        return (yield)
    finally:
        signal.alarm(0)


def _given(name: str) -> Any:
    """Return the fixture that says whether an option is given."""
    return pytest.fixture(name=name)(lambda request: request.config.getoption(f"--{name}"))


full, rehearse = _given("full"), _given("rehearse")


@pytest.fixture
def budget_s(rehearse: bool, full: bool) -> float:
    """The seconds for the rounds of one comparison; none in a rehearsal, which has one round."""
    return 0.0 if rehearse else FULL_BUDGET_S if full else BUDGET_S


@pytest.fixture
def compare(benchmark: Any, rehearse: bool, budget_s: float) -> Callable[..., dict[str, float]]:
    """A function that times callables, ours first, against each other and records the result.

    ``left_out`` says why other rivals do not take part, and ``per_call`` of a rate such as
    ``gb_per_s`` how much of it a call does; the options are those of `harness.in_turn`. Median
    seconds of a call (which it returns), the times of all rounds, speed-ups and rates are stored in
    the benchmark's ``extra_info``; for pytest-benchmark all rounds are one.
    """

    def run(calls: Any, *, left_out: Any = (), per_call: Any = (), **options: Any) -> Any:
        options = {"budget_s": budget_s, "n_calls": 1, **options}
        if rehearse:
            options |= {"budget_s": 0.0, "n_calls": 1, "warmup": 0}
        times = benchmark.pedantic(harness.in_turn, args=(calls,), kwargs=options)
        figures = harness.comparison(times, **dict(per_call))
        figures |= {"n_calls": options["n_calls"], "left_out": dict(left_out)}
        benchmark.extra_info.update(figures)
        return figures["median_s"]

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    """Keep what a test recorded, or why it was skipped."""
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
    entries = item.config.stash[ENTRIES].setdefault(suite, [])
    entries.append(entry)
    folder = item.config.getoption("--results")
    if folder is not None and not item.config.getoption("--rehearse"):
        machine = item.config.stash[MACHINE]
        store.save(folder, suite, entries, machine, harness.ceilings())
    return outcome


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """End with the table: ours, the others, how many times as long they take."""
    machine = config.stash[MACHINE]
    ceilings = harness.ceilings() if machine["kind"] == "cuda" else {}
    found = config.stash[ENTRIES].items()
    documents = [store.document(suite, entries, machine, ceilings) for suite, entries in found]
    if documents:
        terminalreporter.section("benchmarks")
        terminalreporter.write(report.plain_text(documents))
