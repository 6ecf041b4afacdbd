"""Copies that are under way: what reads them waits, and what they read stays as it was."""

import contextlib
import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fasttrain_kernels import FusedAdamW, grad_norm
from torch import Tensor

from fasttrain.checkpoint import CheckpointWriter, load
from fasttrain.checkpoint import writer as checkpoint_snapshot
from fasttrain.checkpoint.files import history
from fasttrain.config import load_config
from fasttrain.data.format import open_dataset
from fasttrain.data.loader import Loader, evaluation_batches
from fasttrain.data.order import LoaderOptions
from fasttrain.engine.loop import TrainingLoop
from tests.support.simulated_cuda.shim import (
    Stall,
    capturing,
    deferred_copies,
    device,
    planted,
    waits,
)
from tests.support.simulated_cuda.training import RUNS, TINY
from tests.support.toy import ROOT, wait_until, write_dataset
from tests.support.toy_data import write_tokens
from tests.support.toy_trainer import build

MIB = 1 << 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tokens", n_val=100)


def batches(data: Path, where: str, *, n: int = 12, behind: bool = False) -> list[list[Tensor]]:
    """Return batches as a consumer sees them whose device is, or is not, behind the host."""
    found = []
    options = LoaderOptions(
        batching="padded", separate_documents=True, seq_len=8, micro_batch=2, seed=1, prefetch=2
    )
    folder = data.parent / "documents"
    if not folder.exists():
        write_tokens(folder, list(range(1, 97)), [*range(5, 96, 7), 96])
    with Loader(open_dataset(folder, "train"), options, device=where) as loader:
        stall = Stall() if behind else None
        for batch in islice(loader, n):
            found.append([batch.tokens.clone(), batch.targets.clone()])
            del batch
        if stall:
            stall.release()
    return [[t.cpu() for t in pair] for pair in found]


def equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return torch.equal(*(torch.stack([t for pair in pairs for t in pair]) for pairs in (a, b)))


@pytest.mark.parametrize("behind", [False, True])
def test_a_loader_gives_what_it_read(data: Path, behind: bool) -> None:
    with deferred_copies():
        assert equal(batches(data, "cuda", behind=behind), batches(data, "cpu"))


@pytest.mark.parametrize("fault", ["no event", "buffer reused early", "no record_stream"])
def test_a_fault_of_the_loader_is_found(
    data: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "no record_stream":
        monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    kind = {"no event": 1, "buffer reused early": 2}.get(fault, 0)
    with deferred_copies(), planted(kind):
        found = batches(data, "cuda", behind=fault != "no event")
    assert not equal(found, batches(data, "cpu"))


def test_evaluation_batches_are_those_of_a_cpu(data: Path) -> None:
    val, options = open_dataset(data, "val"), LoaderOptions(seq_len=8, micro_batch=4)
    with deferred_copies():
        found = [
            [b.tokens.cpu() for b in evaluation_batches(val, options, where)]
            for where in ("cuda", "cpu")
        ]
    assert equal(*found)


def test_a_snapshot_is_of_its_moment(tmp_path: Path) -> None:
    """The next update follows the copy, and what writes it waits for it."""
    weight = torch.arange(64.0, device="cuda")
    writer = CheckpointWriter(tmp_path, keep_last=1)
    with deferred_copies():
        path = writer.save(1, {"model": {"weight": weight}}, {}, "[train]\nsteps = 1\n")
        weight.add_(1)
        writer.close()
    assert torch.equal(load(path).tensors["model.weight"], torch.arange(64.0))


def test_uploads_reach_the_launches_that_read_them() -> None:
    found = []
    for deferred in (False, True):
        param = torch.nn.Parameter(torch.ones(64, device="cuda"))
        optimizer = FusedAdamW([param], lr=0.1)
        with deferred_copies() if deferred else contextlib.nullcontext():
            for step in range(3):
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
                param.grad = torch.full_like(param, step)
                optimizer.step(clip_coefficient=grad_norm([param.grad], 1.0).clip_coefficient)
        found.append(param.detach().cpu())
    assert torch.equal(*found)


def test_a_capture_pins_nothing_and_has_numbers_of_its_own() -> None:
    param = torch.nn.Parameter(torch.ones(8, device="cuda"))
    optimizer = FusedAdamW([param], lr=0.1)

    def step() -> None:
        param.grad = torch.ones_like(param)
        grad_norm([param.grad], 1.0)
        optimizer.step()

    step()
    (made,) = optimizer._prepared.rounds
    (members, _), *_ = made.triton._classes
    before = members.hyper.tensor.clone()
    optimizer.param_groups[0].update(lr=0.01, betas=(0.8, 0.9))
    with capturing():
        step()
        assert torch.equal(members.hyper.tensor, before)  # an ordinary step's
        with pytest.raises(RuntimeError, match="make an ordinary step before each capture"):
            step()
    step()
    assert members.hyper.tensor[0, 0].item() == pytest.approx(0.01)


def test_norms_on_two_streams_have_tables_of_their_own() -> None:
    one, two = torch.full((8,), 1.0, device="cuda"), torch.full((8,), 2.0, device="cuda")
    side = torch.cuda.Stream()
    with deferred_copies():
        grad_norm([one])
        stall = Stall()
        first = grad_norm([one]).norm
        with torch.cuda.stream(side):
            second = grad_norm([two]).norm.cpu()
        stall.release()
        assert (first.item() ** 2, second.item() ** 2) == pytest.approx((8, 32))


def test_a_snapshot_pins_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"weight": torch.ones(17 * MIB // 4, device="cuda")}
    unpinned = device.sim_peak_pinned(True)
    snapshot = checkpoint_snapshot.Snapshot("model", tensors)
    assert 17 * MIB < device.sim_peak_pinned(False) - unpinned < 17 * MIB + 8192
    assert snapshot.content.is_pinned()
    with waits() as found:
        snapshot.copy_from(tensors)
    assert found == []
    del snapshot
    assert device.sim_peak_pinned(True) == unpinned

    refusing = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    snapshot = checkpoint_snapshot.Snapshot("model", tensors)
    snapshot.copy_from(tensors)
    assert snapshot.views["weight"].min() == 1


def test_a_writer_opens_no_context_on_another_device(tmp_path: Path) -> None:
    weight = torch.ones(3, device="cuda:1")
    with torch.cuda.device(1):
        device.sim_touched(-1)
        writer = CheckpointWriter(tmp_path, keep_last=1)
        writer.save(1, {"model": {"weight": weight}}, {}, "[train]\nsteps = 1\n")
        writer.close()
        assert [device.sim_touched(number) for number in (0, 1)] == [False, True]


@pytest.mark.parametrize("saved_before", [False, True])
def test_a_step_that_hangs_on_the_device_is_given_up(
    data: Path, tmp_path: Path, saved_before: bool
) -> None:
    """The host issues the update and the next step behind it; what is saved is the step before."""
    keys = [*TINY, *RUNS["gpt2"][1:], f"data.path={data}", "train.steps=9", "log.every_steps=9"]
    keys += ["run.device=cuda", "train.tokens_per_step=16", "train.on_spike=skip"]

    def started(name: str) -> TrainingLoop:
        config = load_config(ROOT / "configs/gpt2-124m.toml", keys)
        return build(config, tmp_path / name, device="cuda")

    sound = started("sound")
    sound.request_stop(3)
    assert sound.fit() == "stopped"
    sound.close()
    hung = started("hung")
    stalls: list[Stall] = []
    loss = hung.train_step.criterion

    def hangs(*inputs: Any) -> Tensor:
        if hung.state.step == 3 and not stalls:
            stalls.append(Stall())
        elif hung.state.step == 4:
            torch.cuda.synchronize()  # as a launch does once there are 1,024
        return loss(*inputs)

    hung.train_step.criterion = hangs
    if saved_before:
        hung.saver.save()
    thread = threading.Thread(target=hung.fit, daemon=True)
    thread.start()
    wait_until(lambda: stalls and hung.state.step == 4 and hung.guard.is_open)
    rescue = threading.Thread(target=hung.save_unfinished, daemon=True)
    rescue.start()
    rescue.join(60)
    assert not rescue.is_alive()
    runs = (tmp_path / name / "checkpoints" for name in ("hung", "sound"))
    a, b = (load(history(run)[0][0]) for run in runs)
    assert a.state["step"] == b.state["step"] == 3
    assert all(a.state[key] == b.state[key] for key in ("position", "tokens"))
    for group in ("model", "optimizer", "trainer"):
        ours, theirs = a.group(group), b.group(group)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    stalls[0].release()
    hung.guard._lock.release()  # a run's process would have ended by now
    thread.join()
    hung.close()
