"""How long a save holds the training thread, and how it slows the steps that follow.

Saved are fp32 parameters and two AdamW moments of each: 0.3 GB, with `--full` 123M parameters and
1.5 GB. The ways take turns within a round, each after the one before has written all its bytes;
ratios are medians over rounds of those in a round. The yardstick is one plain copy of the bytes
into memory that is there already. `dcp` is `torch.distributed.checkpoint`, its stager kept from
save to save or not.

`committed_s` is the time until all is written where the caller does nothing but wait. `slowdown` is
the time of a step (two matrix products, on every thread of a CPU) while our thread writes in the
background, over its time before and after, with nothing else to do: training goes first.
"""

import math
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks import harness
from benchmarks.harness import CUDA, DEVICE
from benchmarks.steps import config_of
from fasttrain.checkpoint import CheckpointWriter
from fasttrain.config import config_to_toml

N_PARAMETERS, FULL_N_PARAMETERS = 24_000_000, 120_000_000
N_STEPS = 20  # a few of them take a second


class Ways:
    """The ways to save, each a call that returns when training may go on."""

    def __init__(self, n_parameters: int, folder: Path) -> None:
        # Shaped as a GPT-2-like model: matrices of 4·dim × dim and small vectors.
        dim = 64 * max(1, round(math.sqrt(n_parameters / 48) / 64))
        shapes = [(4 * dim, dim)] * round(n_parameters / (4 * dim * dim)) + [(dim,)] * 48
        model = {f"w{i}": torch.randn(shape, device=DEVICE) for i, shape in enumerate(shapes)}
        moments = {
            f"{n}.{m}": t.square() for n, t in model.items() for m in ("exp_avg", "exp_avg_sq")
        }
        groups = {"model": model, "optimizer": moments}
        tensors = [*model.values(), *moments.values()]
        self.gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=CUDA) for t in tensors]
        self.folder = folder
        self.writer = CheckpointWriter(folder / "checkpoints", keep_last=1)
        self.pending: Any = None
        to_dcp: dict[str, Any] = {"checkpoint_id": folder / "dcp", "no_dist": True}
        # Of its options those of which none needs a GPU, or all.
        names = ("use_pinned_memory", "use_non_blocking_copy")
        options = dict.fromkeys(names, CUDA)
        options |= {"use_shared_memory": False, "use_async_staging": False}
        kept = DefaultStager(StagingOptions(**options))

        def plain_copy() -> None:
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)

        def async_save(stager: DefaultStager | None = None) -> None:
            stager = stager or DefaultStager(StagingOptions(**options))
            self.pending = dcp.async_save(groups, async_stager=stager, **to_dcp)

        self.calls: dict[str, Callable[[], object]] = {
            "save": partial(self.writer.save, 1, groups, {}, config_to_toml(config_of({}))),
            "plain copy": plain_copy,
            "torch.save": partial(torch.save, groups, folder / "torch.pt"),
            "dcp.save": partial(dcp.save, groups, **to_dcp),
            "dcp.async_save": async_save,
            "dcp.async_save, stager kept": partial(async_save, kept),
        }

    def finish(self) -> None:
        """Wait until all is written, and forget it."""
        self.writer.wait()
        if self.pending is not None:
            getattr(self.pending, "upload_completion", self.pending).result()
            self.pending = None
        (self.folder / "torch.pt").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "dcp", ignore_errors=True)


def test_stall_of_a_save(
    benchmark: Any, rehearse: bool, full: bool, budget_s: float, tmp_path: Path
) -> None:
    n_parameters = FULL_N_PARAMETERS if full else N_PARAMETERS
    ways = Ways(1_000_000 if rehearse else n_parameters, tmp_path)
    times: dict[str, list[float]] = {name: [] for name in ways.calls}
    commits: dict[str, list[float]] = {name: [] for name in ways.calls}
    slowdowns: list[float] = []
    timed = partial(harness.seconds, flush=False)
    a = torch.randn(1024, 1024, device=DEVICE)
    product = torch.empty_like(a)

    def step() -> None:
        torch.mm(a, a, out=product)
        torch.mm(a, a, out=product)

    def save(name: str) -> None:
        started = time.perf_counter()
        times[name].append(timed(ways.calls[name]))
        ways.finish()
        commits[name].append(time.perf_counter() - started)

    def steps_while_writing() -> None:
        """Add a round's slowdown."""
        alone = [timed(step) for _ in range(N_STEPS)]
        ways.calls["save"]()
        thread, during = ways.writer._thread, []
        while len(during) < 2 * N_STEPS and thread.is_alive():
            during.append(timed(step))
        ways.finish()
        alone += [timed(step) for _ in range(N_STEPS)]
        slowdowns.append(statistics.median(during or alone) / statistics.median(alone))

    def one_round() -> None:
        for name in list(times)[2:]:
            save(name)
        steps_while_writing()
        save("plain copy")  # so late that it meets the memory and the disk as our save does
        save("save")

    def all_rounds() -> None:
        for _ in harness.rounds_within(2 * budget_s):
            one_round()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # dcp: no process group
        one_round()  # allocates the buffers
        for values in (*times.values(), *commits.values(), slowdowns):
            values.clear()
        benchmark.pedantic(all_rounds)

    benchmark.extra_info.update(
        harness.comparison(times),
        gigabytes=ways.gigabytes,
        committed_s={name: statistics.median(values) for name, values in commits.items()},
        slowdown=statistics.median(slowdowns),
    )
