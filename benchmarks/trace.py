"""What a profiler's trace says of training steps on a GPU: launches, busy time, gaps, kernels."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
N_TOP = 12


def summarize(events: Iterable[Mapping[str, Any]], n_steps: int) -> dict[str, Any]:
    """Return figures for each step of a chrome trace that covers ``n_steps`` of them.

    Args:
        events: the ``traceEvents``; those on the device count, times in microseconds.
        n_steps: the steps that were profiled.

    Returns:
        ``launches_per_step``; ``busy_ms`` in which at least one kernel or copy ran and
        ``span_ms``, from the first to the last, both for a step; ``gap_fraction``, the idle part
        of the span; ``longest_gap_us``; ``top_kernels``: name, milliseconds and launches a step.
        None for each where nothing ran on a device.
    """
    spans: list[tuple[float, float]] = []
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE:
            started, lasted = float(event["ts"]), float(event["dur"])
            spans.append((started, started + lasted))
            by_name[str(event["name"])].append(lasted)
    if not spans:
        keys = ("launches_per_step", "busy_ms", "span_ms", "gap_fraction", "longest_gap_us")
        return dict.fromkeys((*keys, "top_kernels"))
    spans.sort()
    busy, longest = 0.0, 0.0
    first, reached = spans[0][0], spans[0][0]
    for start, end in spans:  # streams overlap: the union counts
        longest = max(longest, start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - first
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:N_TOP]
    return {
        "launches_per_step": len(spans) / n_steps,
        "busy_ms": busy / n_steps / 1e3,
        "span_ms": span / n_steps / 1e3,
        "gap_fraction": 1 - busy / span if span else 0.0,
        "longest_gap_us": longest,
        "top_kernels": [
            {
                "name": name[:120],
                "ms": sum(times) / n_steps / 1e3,
                "launches": len(times) / n_steps,
            }
            for name, times in top
        ],
    }


def profile(step: Callable[[], object], n_steps: int, path: Path) -> dict[str, Any]:
    """Profile ``n_steps`` steps, write the chrome trace to ``path`` and return its summary."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    cuda = torch.cuda.is_available()
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(n_steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return summarize(json.loads(path.read_text("utf-8"))["traceEvents"], n_steps)
