"""A step that does not log: it never waits for the device, and the memory it takes it gives back.

On the CPU every number is at hand, and the fused optimizers and the norm, which decide there on
the host, read some; on CUDA they do not. So what is counted here is who reads: nobody else may.
"""

import ctypes
import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.config import load_config
from fasttrain.engine.loop import TrainingLoop
from fasttrain.engine.step import TrainStep
from fasttrain.model.transformer import Transformer
from tests.support import toy_trainer
from tests.support.toy import write_config

# Everything that a step may do: two micro-batches, clipping, spikes judged.
KEYS = ["train.tokens_per_step=128", "train.on_spike=skip", "train.spike_window_steps=8"]
KEYS += ["train.steps=1000", "log.every_steps=100", "optim.name=muon", "optim.lr=1e-4"]
KEYS += ["train.ema_decay=0.9"]


def build(folder: Path, *overrides: str, device: str = "cpu") -> TrainingLoop:
    config = load_config(write_config(folder), [*KEYS, f"run.device={device}", *overrides])
    return toy_trainer.build(config, device=device)


class HostReads(TorchDispatchMode):
    """Notes who asks for a value on the host."""

    READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_assert_async")

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.READS:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
            reader = next(f for f in reversed(frames) if f.filename != __file__)
            self.readers.append(reader.filename)
        return func(*args, **(kwargs or {}))


def readers(trainer: TrainingLoop, n_steps: int) -> list[str]:
    with HostReads() as reads:
        for _ in range(n_steps):
            assert not trainer._step()
    return [name for name in reads.readers if "fasttrain_kernels" not in name]


def test_a_step_that_does_not_log_reads_nothing_from_the_device(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    assert trainer._step()  # the first one logs
    assert readers(trainer, 12) == []


def test_what_reads_is_found(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer._step()
    sound = trainer.train_step.criterion

    def reading(model: Transformer, *batch: Any) -> Tensor:
        loss = sound(model, *batch)
        trainer.state.lr = toy_trainer.value_of(loss)
        return loss

    trainer.train_step.criterion = reading
    assert readers(trainer, 1) == [toy_trainer.__file__] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: its syncs are counted")
def test_a_step_that_does_not_log_never_waits_for_the_gpu(tmp_path: Path) -> None:
    trainer = build(tmp_path, device="cuda")
    for _ in range(5):
        trainer._step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            assert not trainer._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(trainer.train_step.numbers()) == 25
    assert trainer.train_step.clock.read()[0] > 0


class _MallocInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
        *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )]  # fmt: skip


SMALL = 50 * 128  # bytes: the smallest tensor takes more than a fiftieth of it


def left_by_fifty(step: Callable[[], object]) -> tuple[int, int]:
    """Unreachable objects and bytes that fifty calls leave behind, in the cleanest of five rounds.

    What a step leaves, it leaves in each of them; what another thread or an earlier test of this
    process gives back late falls into one.
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("needs glibc 2.33, whose mallinfo2 says what malloc has handed out")
    mallinfo2.restype = _MallocInfo

    def held() -> int:
        info = mallinfo2()
        return int(info.uordblks + info.hblkhd)

    rounds = []
    gc.disable()  # as in a run
    try:
        for _ in range(30):
            step()
        gc.collect()
        for _ in range(5):
            heap = held()
            for _ in range(50):
                step()
            grown = held() - heap
            rounds.append((gc.collect(), grown))
    finally:
        gc.enable()
    return min(rounds)


def test_fifty_steps_leave_memory_as_it_was(tmp_path: Path) -> None:
    unreachable, grown = left_by_fifty(build(tmp_path)._step)
    assert unreachable == 0  # no step leaves cycles behind: nobody collects them
    assert grown < SMALL


def test_what_fifty_steps_leave_is_found() -> None:
    def leave_a_cycle() -> None:
        cycle: list[Any] = []
        cycle.append(cycle)

    kept: list[Tensor] = []
    assert left_by_fifty(leave_a_cycle)[0] == 50
    assert left_by_fifty(lambda: kept.append(torch.empty(())))[1] >= SMALL


def test_the_compiled_loss_is_one_graph(tmp_path: Path) -> None:
    step: TrainStep = build(tmp_path, "model.dropout=0.1", "model.qk_norm=true").train_step
    torch._dynamo.reset()
    tokens = torch.zeros(4, 16, dtype=torch.int64)
    explained = torch._dynamo.explain(step._loss)(tokens, tokens, None)
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1
