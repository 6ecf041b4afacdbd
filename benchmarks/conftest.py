"""Shared by the benchmarks: rivals timed side by side, and what they ran on.

    def test_norm(compare):
        result = compare({"fasttrain": ours, "torch": theirs}, rounds=50)
        assert result.speedup["torch"] > 0.9

The machine's load drifts by more than the differences of interest. So the rivals take turns within
each round, and a speed-up is the median over rounds of the ratio within a round.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


class Comparison(NamedTuple):
    """What `compare` measured; the first callable is the one the others are compared with."""

    median_s: dict[str, float]  # seconds for one call
    speedup: dict[str, float]  # how many times as long as the first each of the others takes


Compare = Callable[..., Comparison]


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return what a measurement depends on: device, threads, versions."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        import triton

        info["triton"] = triton.__version__
    except ImportError:
        info["triton"] = None
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _timed(call: Callable[[], object], n_calls: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(n_calls):
        call()
    _synchronize()
    return (time.perf_counter() - started) / n_calls


@pytest.fixture
def compare(benchmark: Any) -> Compare:
    """A function that times callables against each other and records the result.

    Args of the function:
        callables: name → callable without arguments; the first is ours. At least one.
        rounds: how often each is timed.
        n_calls: calls in one timing: more than one where a call is too short for the clock.
        warmup: calls of each before the first timing, for compilation and caches.

    Returns of the function: a `Comparison`. Medians, speed-ups and the machine are stored in the
    benchmark's ``extra_info``; its own statistics are those of ours, for ``n_calls`` calls.
    """

    def run(
        callables: Mapping[str, Callable[[], object]],
        *,
        rounds: int = 20,
        n_calls: int = 1,
        warmup: int = 3,
    ) -> Comparison:
        ours, *rivals = callables
        times: dict[str, list[float]] = {name: [] for name in callables}
        for call in callables.values():
            for _ in range(warmup):
                call()

        def time_one(name: str) -> None:
            times[name].append(_timed(callables[name], n_calls))

        def time_rivals() -> None:
            # Turned by one each round, so that none always runs first or next to ours.
            turn = len(times[ours]) % max(1, len(rivals))
            for name in rivals[turn:] + rivals[:turn]:
                time_one(name)

        benchmark.pedantic(
            time_one, args=(ours,), setup=time_rivals, rounds=rounds, iterations=1, warmup_rounds=0
        )
        median_s = {name: statistics.median(values) for name, values in times.items()}
        speedup = {
            name: statistics.median(
                theirs / own for theirs, own in zip(times[name], times[ours], strict=True)
            )
            for name in rivals
        }
        benchmark.extra_info.update(
            machine=machine(), n_calls=n_calls, median_s=median_s, speedup=speedup
        )
        return Comparison(median_s, speedup)

    return run


@pytest.fixture(autouse=True)
def _machine_info(request: pytest.FixtureRequest) -> None:
    """Record the machine with every benchmark, also those that do not use `compare`."""
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info["machine"] = machine()
