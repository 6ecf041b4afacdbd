"""How long a save holds the training thread, and how it slows the steps that follow.

Saved are fp32 parameters and two AdamW moments of each: 0.3 GB, with `--full` 123M parameters and
1.5 GB. The ways take turns within a round, each after the one before has written all its bytes;
ratios are medians over rounds of those in a round. The yardstick is one plain copy of the bytes
into memory that is there already. `dcp` is `torch.distributed.checkpoint`, its stager kept from
save to save or not.

`committed_s` is the time until all is written where the caller does nothing but wait;
`committed_while_training_s`, with `--full`, where steps go on at once, on every thread of a CPU:
training goes first. `slowdown` is the time of such a step (two matrix products) while our thread
writes in the background, over its time before and after, with nothing else to do.
"""

import math
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks import measure
from fasttrain.checkpoint import CheckpointWriter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
N_PARAMETERS, FULL_N_PARAMETERS = 24_000_000, 120_000_000
N_STEPS = 20  # a few of them take a second
Groups = dict[str, dict[str, Tensor]]


def make_groups(n_parameters: int) -> Groups:
    """Tensors shaped as those of a GPT-2-like model: matrices of 4·dim × dim and small vectors."""
    dim = 64 * max(1, round(math.sqrt(n_parameters / 48) / 64))
    shapes = [(4 * dim, dim)] * round(n_parameters / (4 * dim * dim)) + [(dim,)] * 48
    model = {f"w{i}": torch.randn(shape, device=DEVICE) for i, shape in enumerate(shapes)}
    moments = {f"{n}.{m}": t.square() for n, t in model.items() for m in ("exp_avg", "exp_avg_sq")}
    return {"model": model, "optimizer": moments}


def stager() -> DefaultStager:
    """The options of which none needs a GPU, or all."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=CUDA,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=CUDA,
        )
    )


class Ways:
    """The ways to save, each a call that returns when training may go on."""

    def __init__(self, groups: Groups, folder: Path) -> None:
        self.groups, self.folder = groups, folder
        tensors = [tensor for group in groups.values() for tensor in group.values()]
        self.gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=CUDA) for t in tensors]
        self.pairs = list(zip(copies, tensors, strict=True))
        self.writer = CheckpointWriter(folder / "checkpoints", keep_last=1)
        self.stager = stager()
        self.pending: Any = None

    def ours(self) -> None:
        self.writer.save(1, self.groups, {}, "")

    def plain_copy(self) -> None:
        for mine, tensor in self.pairs:
            mine.copy_(tensor, non_blocking=True)

    def torch_save(self) -> None:
        torch.save(self.groups, self.folder / "torch.pt")

    def dcp_save(self) -> None:
        dcp.save(self.groups, checkpoint_id=self.folder / "dcp", no_dist=True)

    def dcp_async_save(self, async_stager: DefaultStager | None = None) -> None:
        self.pending = dcp.async_save(
            self.groups,
            checkpoint_id=self.folder / "dcp",
            async_stager=async_stager or stager(),
            no_dist=True,
        )

    def dcp_async_save_again(self) -> None:
        self.dcp_async_save(self.stager)

    def finish(self) -> None:
        """Wait until all is written, and forget it."""
        self.writer.wait()
        if self.pending is not None:
            getattr(self.pending, "upload_completion", self.pending).result()
            self.pending = None
        (self.folder / "torch.pt").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "dcp", ignore_errors=True)


def timed(call: Callable[[], object]) -> float:
    return measure.seconds(call, flush=False)


def test_stall_of_a_save(
    benchmark: Any, request: pytest.FixtureRequest, full: bool, budget_s: float, tmp_path: Path
) -> None:
    rehearse = request.config.getoption("--rehearse")
    n_parameters = FULL_N_PARAMETERS if full else N_PARAMETERS
    ways = Ways(make_groups(1_000_000 if rehearse else n_parameters), tmp_path)
    calls = {
        "save": ways.ours,
        "plain copy": ways.plain_copy,
        "torch.save": ways.torch_save,
        "dcp.save": ways.dcp_save,
        "dcp.async_save": ways.dcp_async_save,
        "dcp.async_save, stager kept": ways.dcp_async_save_again,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    commits: dict[str, list[float]] = {name: [] for name in calls}
    slowdowns: list[float] = []
    a = torch.randn(1024, 1024, device=DEVICE)
    product = torch.empty_like(a)

    def step() -> None:
        torch.mm(a, a, out=product)
        torch.mm(a, a, out=product)

    def save(name: str) -> None:
        started = time.perf_counter()
        times[name].append(timed(calls[name]))
        ways.finish()
        commits[name].append(time.perf_counter() - started)

    def steps_while_writing(at_most: float) -> float:
        """Add a round's slowdown; return the time until all was written."""
        alone = [timed(step) for _ in range(N_STEPS)]
        started = time.perf_counter()
        ways.ours()
        thread, during = ways.writer._thread, []
        assert thread is not None
        while len(during) < at_most and thread.is_alive():
            during.append(timed(step))
        ways.finish()
        committed_s = time.perf_counter() - started
        alone += [timed(step) for _ in range(N_STEPS)]
        slowdowns.append(statistics.median(during or alone) / statistics.median(alone))
        return committed_s

    def others() -> None:
        for name in list(calls)[2:]:
            save(name)
        steps_while_writing(2 * N_STEPS)
        save("plain copy")  # last, so that it meets the memory and the disk as our save does

    def all_rounds() -> None:
        for _ in measure.rounds_within(2 * budget_s):
            others()
            save("save")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # dcp: no process group
        others()  # allocates the buffers
        save("save")
        if full and not rehearse:
            benchmark.extra_info["committed_while_training_s"] = steps_while_writing(math.inf)
        for values in (*times.values(), *commits.values(), slowdowns):
            values.clear()
        benchmark.pedantic(all_rounds)

    benchmark.extra_info.update(
        measure.comparison(times),
        gigabytes=ways.gigabytes,
        committed_s={name: statistics.median(values) for name, values in commits.items()},
        slowdown=statistics.median(slowdowns),
    )
