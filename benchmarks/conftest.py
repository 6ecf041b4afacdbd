"""Shared by the benchmarks: rivals timed side by side, and where the figures go.

    def test_norm(compare):
        result = compare({"fasttrain": ours, "torch": theirs})
        assert result.speedup["torch"] > 0.9

``pytest benchmarks/ --benchmark-only --results benchmarks/results`` also writes them, a file for
each suite, after every test. All together take minutes: each benchmark has a budget of seconds and
shapes that fit it. ``--full`` lifts both.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import measure, store
from fasttrain.device import keep_freed_memory

Entries = dict[str, list[dict[str, Any]]]  # of each suite
ENTRIES = pytest.StashKey[Entries]()
# For the rounds of one comparison: a hundred of a small op, three of a large one.
BUDGET_S, FULL_BUDGET_S = 3.0, 20.0
LEAST_ROUNDS, MOST_ROUNDS = 3, 100


class Comparison(NamedTuple):
    """What `compare` measured; the first callable is the one the others are compared with."""

    median_s: dict[str, float]  # seconds for one call
    speedup: dict[str, float]  # how many times as long as the first each of the others takes


Compare = Callable[..., Comparison]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmarks."""
    parser.addoption("--results", type=Path, help="write figures to this folder, by device")
    parser.addoption("--full", action="store_true", help="more rounds, larger shapes, longer runs")
    parser.addoption(
        "--rehearse", action="store_true", help="call everything, once; the times mean nothing"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start with no figures, and memory in the state of a run."""
    config.stash[ENTRIES] = {}
    if not torch.cuda.is_available():
        # As in a run. Else what ran before decides whether new memory is mapped anew at each call:
        # torch's RMSNorm of 2048 × 768 took 21 ms or 7.
        keep_freed_memory()


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether a benchmark may take long."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """A function that times callables against each other and records the result.

    Args of the function:
        callables: name → callable without arguments; the first is ours. At least one.
        rounds: how often each is timed; None: as often as `BUDGET_S` allows.
        n_calls: calls in one timing: more than one where a call is too short for the clock.
        warmup: calls of each before the first timing, for compilation and caches; at least one
            without ``rounds``, which are chosen by the time that the last takes.
        flush: on CUDA, overwrite the L2 cache before each call (see `measure.seconds`).

    Returns of the function: a `Comparison`. The times of all rounds, medians and speed-ups are
    stored in the benchmark's ``extra_info``; its own statistics are those of ours, for ``n_calls``
    calls (on CUDA with the overwriting of the cache, which ``extra_info`` leaves out).
    """

    def run(
        callables: Mapping[str, Callable[[], object]],
        *,
        rounds: int | None = None,
        n_calls: int = 1,
        warmup: int = 3,
        flush: bool = True,
    ) -> Comparison:
        if request.config.getoption("--rehearse"):
            rounds, n_calls, warmup = 1, 1, 0
        ours, *rivals = callables
        times: dict[str, list[float]] = {name: [] for name in callables}
        orders = measure.turns(rivals) if rivals else iter(lambda: [], None)
        for _ in range(warmup):
            last_s = [measure.seconds(call, flush=flush) for call in callables.values()]
        if rounds is None:
            budget_s = FULL_BUDGET_S if request.config.getoption("--full") else BUDGET_S
            fitting = int(budget_s / (n_calls * sum(last_s)))
            rounds = min(max(fitting, LEAST_ROUNDS), MOST_ROUNDS)

        def time_one(name: str) -> None:
            times[name].append(measure.seconds(callables[name], n_calls, flush=flush))

        def time_rivals() -> None:
            for name in next(orders):
                time_one(name)

        benchmark.pedantic(
            time_one, args=(ours,), setup=time_rivals, rounds=rounds, iterations=1, warmup_rounds=0
        )
        figures = measure.comparison(times)
        benchmark.extra_info.update(figures, n_calls=n_calls)
        return Comparison(figures["median_s"], figures["speedup"])

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    """Keep what a test recorded, or why it was skipped."""
    report = yield
    entry: dict[str, Any] = {"name": item.name.removeprefix("test_")}
    if report.skipped:
        assert isinstance(report.longrepr, tuple)
        entry["skipped"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.when == "call" and "benchmark" in getattr(item, "funcargs", {}):
        entry |= item.funcargs["benchmark"].extra_info
        if report.failed:
            entry["failed"] = str(call.excinfo.value if call.excinfo else "").split("\n")[0]
    else:
        return report
    suite = item.path.stem.removeprefix("bench_")
    entries = item.config.stash[ENTRIES].setdefault(suite, [])
    entries.append(entry)
    folder = item.config.getoption("--results")
    if folder is not None and not item.config.getoption("--rehearse"):
        machine = measure.machine()
        path = folder / store.folder_of(machine) / f"{suite}.json"
        store.write(path, store.document(suite, entries, machine, measure.ceilings()))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the comparisons: ours in time, the others as multiples of it."""
    rows = [
        (f"{suite} {entry['name']}", entry)
        for suite, entries in config.stash[ENTRIES].items()
        for entry in entries
        if entry.get("median_s")
    ]
    if not rows:
        return
    terminalreporter.section("times, and those of the others as multiples of the first")
    width = max(len(name) for name, _ in rows)
    for name, entry in rows:
        (ours, own), *_ = entry["median_s"].items()
        others = (f"{rival} ×{ratio:.2f}" for rival, ratio in entry.get("speedup", {}).items())
        line = ", ".join([f"{ours} {1e3 * own:.3g} ms", *others])
        terminalreporter.write_line(f"{name:{width}}  {line}")
