"""A profiler trace and, on CUDA, a snapshot of memory of the steps in ``log.profile_steps``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels._torch import dump_memory_history, record_memory_history

__all__ = ["StepProfiler"]

MAX_MEMORY_EVENTS = 100_000  # of the allocator, a few hundred MB at most


class StepProfiler:
    """Writes ``trace.json`` (chrome://tracing, Perfetto) and, on CUDA, ``memory.pickle``.

    Args:
        run_dir: in its folder ``profile``, made when the steps are over; None: nothing is done.
        steps: first and last step, counted from 1; empty: nothing is done.
        device: what is profiled beside the CPU.

    Numerics: none; profiled steps are slower.
    """

    def __init__(self, run_dir: Path | None, steps: tuple[int, ...], device: torch.device) -> None:
        self.device = device
        self.first, self.last = steps if run_dir is not None and steps else (0, 0)
        self.folder = run_dir / "profile" if run_dir is not None else None
        self._profiler: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the step in the block where its number is asked for."""
        cuda = self.device.type == "cuda"
        if self.first and number == self.first:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if cuda:
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
                # https://pytorch.org/memory_viz reads it.
                record_memory_history(max_entries=MAX_MEMORY_EVENTS)
            self._profiler = torch.profiler.profile(
                activities=kinds, record_shapes=True, profile_memory=True, acc_events=True
            )
            self._profiler.start()
        if self._profiler is None:
            yield
            return
        try:
            with torch.profiler.record_function(f"step {number}"):
                yield
        finally:
            if number >= self.last:
                self.close()

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        if self._profiler is None or self.folder is None:
            return
        cuda, profiler, self._profiler = self.device.type == "cuda", self._profiler, None
        try:
            if cuda:
                torch.cuda.synchronize(self.device)
            profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "trace.json"))
            if cuda:
                dump_memory_history(str(self.folder / "memory.pickle"))
        finally:
            if cuda:
                record_memory_history(enabled=None)
