"""What ranks are told before they meet: how a step is shared, which mode, whose folder."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.config import DistributedConfig, LoopConfig, UserError, load_config
from fasttrain.distributed import world as distributed
from fasttrain.distributed.lockstep import Lockstep
from fasttrain.distributed.world import (
    SharedError,
    World,
    checksum,
    choose_mode,
    facts_of_rank,
    start,
)
from fasttrain.engine.run_size import RunSize, warnings_at_start
from fasttrain.resolve import step_shape
from fasttrain.run.folder import RunFolder
from tests.support.toy import write_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tokens", "micro_batch", "seq_len", "n_ranks", "shape"),
    [
        (2048, 8, 256, 1, (8, 1)),
        (2048, 8, 256, 2, (4, 1)),
        (2048, 8, 256, 3, (3, 1)),  # 9 sequences, not 8
        (2048, 8, 256, 64, (1, 1)),
        (2048, 8, 64, 1, (8, 4)),
        (2048, 5, 64, 1, (4, 8)),
        (2048, 8, 96, 1, (7, 3)),  # 21 sequences, where 2,048 tokens are 21.3
        (2048, 8, 4096, 1, (1, 1)),
        (2048, "auto", 64, 2, (16, 1)),
        (None, 8, 256, 4, (8, 1)),
    ],
)
def test_any_number_of_ranks_and_any_length_make_nearly_the_same_step(
    tokens: int | None, micro_batch: Any, seq_len: int, n_ranks: int, shape: tuple[int, int]
) -> None:
    loop = LoopConfig(steps=1, tokens_per_step=tokens, micro_batch=micro_batch)
    step = step_shape(loop, seq_len, n_ranks)
    assert (step.rows, step.n_micro) == shape
    assert step.samples == shape[0] * shape[1] * n_ranks
    assert step.tokens == step.samples * seq_len


def test_it_is_said_where_a_step_is_not_the_one_that_is_named(tmp_path: Path) -> None:
    def warnings(n_ranks: int, *overrides: str) -> list[str]:
        config = load_config(write_config(tmp_path), overrides)
        model: Any = None
        return list(warnings_at_start(RunSize(config, model, None, None, n_ranks)))

    assert warnings(1) == warnings(2, "train.tokens_per_step=64") == []
    (grows,) = warnings(2)
    assert re.search(r"train\.tokens_per_step .*\b2 ranks\b.*\b128 tokens\b", grows)
    (rounded,) = warnings(3, "train.tokens_per_step=64")
    assert "tokens_per_step = 64 is not a whole number" in rounded
    assert "a step has 48 tokens" in rounded


def test_ranks_may_wait_longer_before_the_first_step_than_after_it() -> None:
    config = DistributedConfig()
    assert config.init_timeout_s > 1.5 * config.timeout_s + 1  # see `Trainer._train`


def test_one_process_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    world, device = start(DistributedConfig(), CPU)
    assert (world, device) == (World(), CPU)
    assert choose_mode(DistributedConfig(mode="fsdp"), world, 10, CPU) is world
    tensor = torch.ones(2)
    assert world.sum(tensor) is tensor
    world.begin_sum(tensor)()
    assert tensor.tolist() == [1.0, 1.0]
    assert world.gather("a") == ["a"]
    with pytest.raises(UserError, match="no disk"), world.failing_together():
        raise UserError("no disk")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE .*'RANK' .*torchrun"):
        start(DistributedConfig(), CPU)
    monkeypatch.setenv("WORLD_SIZE", "two")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match=r"WORLD_SIZE .*'two' .*torchrun"):
        start(DistributedConfig(), CPU)


def test_a_model_that_does_not_fit_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_, **__: None)
    monkeypatch.setattr("os.sysconf", lambda _: 2**15)
    world = World(size=8, local_size=4, mode="auto")
    for n_parameters, mode, gib in ((2**20, "ddp", "0.02"), (2**30, "fsdp", "20.00")):
        chosen = choose_mode(DistributedConfig(), world, n_parameters, CPU)
        assert (chosen.mode, chosen.sharded) == (mode, mode == "fsdp")
        assert re.search(rf"^{re.escape(gib)} GiB .*\bfit\b.* 0\.2 GiB$", chosen.why)
        assert (" not " in chosen.why) == chosen.sharded
    assert choose_mode(DistributedConfig(mode="hsdp"), world, 1, CPU).mode == "hsdp"
    for size, shard_ranks in ((8, 3), (8, 8), (4, None)):
        config = DistributedConfig(mode="hsdp", shard_ranks=shard_ranks)
        with pytest.raises(UserError, match=r"distributed\.mode = hsdp .*distributed\.mode=fsdp"):
            choose_mode(config, replace(world, size=size), 1, CPU)


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cuda = torch.device("cuda", 0)
    world = World(rank=5, local_rank=5, size=8)
    with pytest.raises(UserError, match=r"rank 5 .* has 4 CUDA devices; .* --nproc-per-node 4"):
        world.device(cuda)
    assert replace(world, local_rank=3).device(cuda) == torch.device("cuda", 3)
    assert world.device(CPU) == CPU


def test_alone_every_decision_holds_at_once() -> None:
    lockstep = Lockstep(World(), 1.0)
    lockstep(stop=False, time_over=False)
    assert (lockstep.stop, lockstep.time_over) == (False, False)
    lockstep(stop=False, time_over=True)
    lockstep(stop=True, time_over=False)
    assert (lockstep.stop, lockstep.time_over, lockstep.stopped_by) == (True, True, 0)


def test_a_restarted_job_finds_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(tmp_path), [f"run.out_dir={tmp_path / 'runs'}"])

    def folder_of(job: str, attempt: int) -> str:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        folder = RunFolder(config, "toy", None, World())
        assert folder.source is None
        folder.close()
        return folder.path.name

    assert [folder_of(job, 0) for job in ("a", "b")] == ["toy", "toy-2"]
    assert [folder_of(job, 1) for job in ("a", "b", "a")] == ["toy", "toy-2", "toy"]
    assert folder_of("c", 1) == "toy-3"  # it ended before it had a folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_R30_every_flipped_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, 5).to(dtype).t(), torch.zeros((), dtype=dtype), torch.ones(0)]
    sound = int(checksum(tensors))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for tensor, bit in product(tensors[:2], range(8 * dtype.itemsize)):
        word = tensor.view(integers)[(1,) * tensor.ndim]
        flip = torch.tensor(1, dtype=integers) << bit
        word ^= flip
        assert int(checksum(tensors)) != sound
        word ^= flip
    assert int(checksum(tensors)) == sound != int(checksum(tensors[::-1]))


def test_R30_R33_bits_flipped_in_opposite_directions_do_not_cancel() -> None:
    tensors = [torch.zeros(3, 4, dtype=torch.int32) for _ in range(2)]
    sound, words = int(checksum(tensors)), [t.view(-1) for t in tensors]
    places = list(product(range(2), range(12)))
    for (a, i), (b, j), bit in product(places, places, (0, 16, 30)):
        if (a, i) != (b, j):
            words[a][i] += 1 << bit
            words[b][j] -= 1 << bit
            assert int(checksum(tensors)) != sound, (a, i, b, j, bit)
            words[a][i] = words[b][j] = 0


def test_R30_the_ranks_that_drifted_are_those_unlike_most() -> None:
    class Ranks(World):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            own = int(tensor[self.rank])
            tensor[:] = own + torch.tensor(others)
            return tensor

    parameters = [torch.ones(3)]
    for mode, others, odd in (
        ("ddp", [0, 0, 7, 0], [2]),
        ("ddp", [0, 7, 7, 7], [0]),
        ("ddp", [0, 7, 0, 9], [1, 3]),
        ("ddp", [0, 0, 0, 0], []),
        ("fsdp", [0, 1, 2, 3], []),
        ("hsdp", [0, 5, 0, 5, 0, 5], []),  # two shards of three copies
        ("hsdp", [0, 5, 0, 6, 1, 5], [3, 4]),
    ):
        mesh: Any = torch.zeros((3, 2) if mode == "hsdp" else len(others))
        world = Ranks(mode=mode, size=len(others), mesh=mesh)
        assert world.drifted(parameters) == odd


def test_R30_what_differs_between_ranks_is_named() -> None:
    config = load_config("base")
    facts = facts_of_rank(config, {"train": {"shards": ["a" * 64]}}, {})
    moved = replace(config, run=replace(config.run, name="x", out_dir="/else", threads=3))
    assert facts_of_rank(moved, {"train": {"shards": ["a" * 64]}}, {}) == facts
    file = "code of fasttrain/engine/step.py"

    class Ranks(World):
        """Rank 1, and a rank 0 that has these facts and no error."""

        def gather(self, value: Any) -> list[Any]:
            return [facts, value] if isinstance(value, dict) else ["", value]

    with pytest.raises(SharedError, match="rank 1: differs from rank 0") as caught:
        Ranks(rank=1, size=2).agree(facts | {"torch": "1.0", file: "f" * 64})
    assert f'torch = "1.0", and rank 0 has "{torch.__version__}"' in str(caught.value)
    assert f"{file} = (sha256 " in str(caught.value)
    assert "all ranks" in str(caught.value)
    with pytest.raises(SharedError, match=r"data.train.shards = \(sha256 \w+\), and rank 0 has \("):
        Ranks(rank=1, size=2).agree(facts | {"data.train.shards": ["b" * 64]})
    Ranks(rank=1, size=2).agree(facts)
