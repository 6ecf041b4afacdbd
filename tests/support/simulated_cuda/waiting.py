"""A step that does not log makes the host wait for nothing: no blocking copy, no value read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fasttrain_kernels import FusedAdamW, Muon, grad_norm
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fasttrain.config import load_config
from fasttrain.engine.loop import TrainingLoop
from tests.support.simulated_cuda.shim import waits
from tests.support.simulated_cuda.training import RUNS, TINY
from tests.support.toy import OPTIMIZERS, ROOT, write_dataset
from tests.support.toy_trainer import build

# Where a value is read: of optimizers that are not ours the verdict on the step, on the host.
READERS = {
    f"optim.name={name}": ["step.py"] for name in OPTIMIZERS if name not in ("adamw", "muon")
}
READERS["optim.name=adafactor"] += ["_adafactor.py"]
CASES = {name: (*run, "run.dtype=fp16") for name, run in RUNS.items()}
CASES |= {key: (*RUNS["options"], key) for key in (*READERS, "optim.name=muon")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tokens", n_val=100)


def started(data: Path, config: str, *overrides: str) -> TrainingLoop:
    """Return a run that has made its first steps, which may fill tables and log."""
    keys = [*TINY, "train.tokens_per_step=16", *overrides, f"data.path={data}"]
    keys += ["log.every_steps=100", "train.steps=100", "run.device=cuda"]
    trainer = build(load_config(ROOT / f"configs/{config}.toml", keys), device="cuda")
    for _ in range(2):
        trainer._step()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing(data: Path, case: str) -> None:
    trainer = started(data, *CASES[case])
    with waits() as found:
        trainer._step()
    trainer.close()
    # Of the loader: the copy before the last, which is over since a step. FlexAttention, which runs
    # as it is here, copies in its own code.
    others = [("event.synchronize", "loader.py"), ("copy_ between", "flex_attention.py")]
    ours = [wait for wait in found if not any(what in wait and by in wait for what, by in others)]
    readers = {wait.split()[2].partition(":")[0] for wait in ours}
    assert readers == set(READERS.get(case, ())), ours
    assert all("_local_scalar_dense" in wait for wait in ours)


def test_what_waits_is_found(data: Path) -> None:
    trainer = started(data, *RUNS["gpt2"])
    sound, page = trainer.train_step._judge, torch.zeros(1)
    planted = {
        "_local_scalar_dense": lambda: trainer.train_step.loss.item(),
        "nonzero": lambda: trainer.train_step.history.nonzero(),
        "copy_ between": lambda: trainer.train_step.loss.cpu(),
        "aten::copy_": lambda: trainer.train_step.history.copy_(page, non_blocking=True),
        "synchronize": torch.cuda.synchronize,
    }
    for name, waiting in planted.items():
        trainer.train_step._judge = lambda waiting=waiting: (waiting(), sound())[1]
        with waits() as found:
            trainer._step()
        assert any(name in wait and "waiting.py" in wait for wait in found), (name, found)
    trainer.close()


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_sharded_optimizers_wait_for_nothing() -> None:
    mesh = init_device_mesh("cuda", (2,))
    params = [
        torch.nn.Parameter(DTensor.from_local(torch.randn(8, 8, device="cuda"), mesh, [Shard(0)]))
        for _ in range(3)
    ]
    optimizers = [Muon(params[:2], lr=0.1), FusedAdamW(params[2:], lr=0.1)]

    def step() -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        norm = grad_norm([p.grad for p in params if p.grad is not None], 1.0)
        for optimizer in optimizers:
            optimizer.step(clip_coefficient=norm.clip_coefficient, found_inf=norm.found_inf)

    step()
    with waits() as found:
        step()
    assert found == []
