"""Checkpoints that several ranks write together, and one rank or others read (R2, R4, R6, R14)."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fasttrain import checkpoint
from fasttrain.checkpoint import CheckpointError, CheckpointWriter, load, resolve, verify
from fasttrain.checkpoint.__main__ import main
from fasttrain.distributed.sharding import cut
from tests.support.faults import Crash, Faults, flip_bit
from tests.support.toy_checkpoints import CONFIG, reseal, world_of

Groups = dict[str, dict[str, Tensor]]
ROOT = Path(checkpoint.__file__).parents[1]
SIZES = {1: (1,), 2: (2,), 3: (3,), 4: (2, 2)}  # four ranks: replicated over two, sharded over two


def values(step: int) -> Groups:
    """Whole tensors whose slices are even, uneven, empty or columns, and some that are not cut."""
    generator = torch.Generator().manual_seed(step)
    shapes = {"even": (6, 5), "uneven": (7, 3), "row": (1, 4), "columns": (2, 9), "none": (0, 4)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        "model": {**tensors, "copy": torch.randn(3, generator=generator), "n": torch.tensor(step)},
        "optimizer": {"even/exp_avg": tensors["even"].bfloat16(), "even/step": torch.tensor(1.0)},
        "trainer": {"cpu": torch.tensor([step % 256], dtype=torch.uint8)},
    }


def dtensor(name: str, whole: Tensor, size: int, rank: int) -> Tensor:
    """The tensor on one rank; plain ones are the same on all."""
    if whole.ndim == 0 or name == "cpu":
        return whole
    mesh = init_device_mesh("cpu", SIZES[size])
    dim = 1 if name == "columns" else 0
    inner = mesh.shape[-1]
    parts = (*whole.chunk(inner, dim), *[whole.narrow(dim, 0, 0)] * inner)
    placement = Replicate() if name == "copy" else Shard(dim)
    local = whole if name == "copy" else parts[rank % inner]
    placements = [*[Replicate()] * (len(mesh.shape) - 1), placement]
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def on_rank(whole: Groups, size: int, rank: int) -> Groups:
    """What a rank would hand to its writer; the group of processes is pretended."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        groups = {
            stem: {name: dtensor(name, t, size, rank) for name, t in tensors.items()}
            for stem, tensors in whole.items()
        }
    finally:
        dist.destroy_process_group()
    if rank:
        groups["trainer"][f"cpu@{rank}"] = torch.tensor([rank], dtype=torch.uint8)
    return groups


def writers(folder: Path, size: int, session: str = "s", **options: Any) -> list[CheckpointWriter]:
    options = {"keep_last": 2, "patience_s": 300.0, **options}
    return [
        CheckpointWriter(folder, world=world_of(rank, size, session), **options)
        for rank in range(size)
    ]


def save(several: list[CheckpointWriter], step: int, *, skip: int | None = None) -> list[Any]:
    """Saves on all ranks, one thread each; returns the error of each."""
    size = len(several)
    for rank in reversed(range(size)):  # rank 0, which sweeps, comes last
        if rank != skip:
            groups = on_rank(values(step), size, rank)
            several[rank].save(step, groups, {"step": step}, CONFIG, metric=-step)
    return wait(several)


def wait(several: list[CheckpointWriter]) -> list[Any]:
    errors: list[Any] = []
    for writer in several:
        try:
            writer.wait()
            errors.append(None)
        except (CheckpointError, Crash) as error:
            errors.append(error)
    return errors


def is_intact(path: Path, size: int) -> int:
    """Loads a checkpoint, holds it against what was saved and returns its step."""
    loaded = load(path)
    expected = {f"{s}.{n}": t for s, g in values(loaded.step).items() for n, t in g.items()}
    expected |= {f"trainer.cpu@{r}": torch.tensor([r], dtype=torch.uint8) for r in range(1, size)}
    assert loaded.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor), name
    return loaded.step


# ---- what several ranks write is whole ----------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_what_several_save_is_whole(size: int, tmp_path: Path) -> None:
    several = writers(tmp_path, size)
    for step in (1, 2, 3):
        assert save(several, step) == [None] * size
    assert is_intact(resolve(tmp_path), size) == 3
    assert sorted(os.listdir(tmp_path)) == ["best", "latest", "step-00000002", "step-00000003"]
    files = set(os.listdir(tmp_path / "step-00000003"))
    always = {"manifest.json", "state.json", "config.toml", "trainer.safetensors"}
    assert files >= always
    if size == 1:
        assert files == always | {"model.safetensors", "optimizer.safetensors"}
    else:
        assert {f"rank-{rank:05d}.json" for rank in range(size)} < files
    if size == 4:  # the other copy is not written
        assert not any(re.fullmatch(r"model\.rank-0000[23]\.safetensors", f) for f in files)
    only = load(tmp_path / "step-00000003", only=("optimizer",)).tensors
    assert only.keys() == {"optimizer.even/exp_avg", "optimizer.even/step"}
    assert main([str(tmp_path)]) == 0


def test_ranks_without_shards_write_what_one_rank_writes(tmp_path: Path) -> None:
    """As with DDP: but for random states, all is rank 0's."""
    plain = values(1)
    alone = CheckpointWriter(tmp_path / "one", keep_last=1, asynchronous=False)
    one = alone.save(1, plain, {}, CONFIG)
    several = writers(tmp_path / "two", 2)
    own = {"cpu@1": torch.ones(1, dtype=torch.uint8)}
    several[0].save(1, plain, {}, CONFIG)
    two = several[1].save(1, {**plain, "trainer": own}, {}, CONFIG)
    assert wait(several) == [None, None]
    for file in one.iterdir():
        if file.name != "manifest.json":
            assert (two / file.name).read_bytes() == file.read_bytes()
    assert set(os.listdir(two)) - set(os.listdir(one)) == {
        "rank-00000.json", "rank-00001.json", "trainer.rank-00001.safetensors",
    }  # fmt: skip
    assert json.loads((one / "manifest.json").read_text())["version"] == 1


def test_a_slice_of_what_was_loaded_owns_its_memory() -> None:
    whole = torch.arange(14.0).reshape(7, 2)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for dim in (0, 1):
            like = distribute_tensor(torch.zeros(7, 2), mesh, [Shard(dim)])
            mine = cut(whole, like)
            assert isinstance(mine, DTensor)
            assert torch.equal(mine.to_local(), whole.chunk(2, dim)[1])
            assert mine.to_local().untyped_storage().nbytes() == mine.to_local().nbytes
        grid = init_device_mesh("cpu", (1, 2))
        twice = DTensor.from_local(whole[:, 1:], grid, [Shard(0), Shard(1)], run_check=False)
        with pytest.raises(TypeError, match=r"DTensor .*Shard\(.*Shard\("):
            cut(whole, twice)
    finally:
        dist.destroy_process_group()


# ---- damage -------------------------------------------------------------------------------------


def test_R14_bit_flips_and_losses_in_every_file(tmp_path: Path) -> None:
    several = writers(tmp_path, 2)
    for step in (1, 2):
        save(several, step)
    older, newer = (tmp_path / f"step-0000000{n}" for n in (1, 2))
    for file in sorted(newer.iterdir()):
        for bit in (3, 4 * file.stat().st_size + 1, 8 * file.stat().st_size - 9):
            flip_bit(file, bit)
            for check in (verify, load):
                with pytest.raises(CheckpointError, match=re.escape(file.name)):
                    check(newer)
            passed_over: list[str] = []
            assert resolve(tmp_path, report=passed_over.append) == older
            assert file.name in passed_over[0]
            flip_bit(file, bit)
        kept = file.read_bytes()
        file.unlink()
        with pytest.raises(CheckpointError, match=re.escape(file.name)):
            load(newer)
        file.write_bytes(kept)
    assert is_intact(newer, 2) == 2


def slices_of(path: Path, change: Any) -> None:
    """Rewrites where rank 1 says its slice of `even` lies, and makes all hashes fit."""
    file = path / "rank-00001.json"
    record = json.loads(file.read_text())
    change(record["slices"])
    file.write_text(json.dumps(record))
    reseal(path)


FILE = "model.rank-00001.safetensors"
HOSTILE: dict[str, Any] = {
    "a gap": {"even": [0, 4, 6, 6, 5]},
    "overlap": {"even": [0, 2, 5, 6, 5]},
    "another whole": {"even": [0, 3, 6, 60, 5]},
    "beyond the end": {"even": [0, 3, 7, 6, 5]},
    "another dimension": {"even": [1, 3, 5, 6, 5]},
    "no dimension": {"even": [5, 3, 6, 6, 5]},
    "huge": {"even": [0, 0, 1 << 50, 1 << 50, 5]},
    "negative": {"even": [0, -3, 6, 6, 5]},
    "not numbers": {"even": ["a", 3, 6, 6, 5]},
    "not a list": {"even": 3},
    "not in the file": {"other": [0, 0, 1, 1]},
    "no longer a slice": {"even": None},
}


@pytest.mark.parametrize("entry", HOSTILE.values(), ids=HOSTILE.keys())
def test_R25_hostile_slices(entry: dict[str, Any], tmp_path: Path) -> None:
    save(writers(tmp_path, 2), 1)
    path = tmp_path / "step-00000001"

    def change(slices: dict[str, Any]) -> None:
        slices[FILE] |= entry
        slices[FILE] = {n: v for n, v in slices[FILE].items() if v is not None}

    slices_of(path, change)
    with pytest.raises(
        CheckpointError, match=r"rank-0000\d\.json: |step-00000001: .*\bmodel\.even\b"
    ):
        load(path)


@pytest.mark.parametrize("slices", [None, {"../x": {}}, {FILE: []}, {"state.json": 4}], ids=str)
def test_R25_hostile_records(slices: Any, tmp_path: Path) -> None:
    save(writers(tmp_path, 2), 1)
    file = tmp_path / "step-00000001" / "rank-00001.json"
    file.write_text(json.dumps({"slices": slices}))
    reseal(file.parent)
    with pytest.raises(CheckpointError, match=r"rank-00001\.json: |step-00000001: .*\bmodel\.\w"):
        load(file.parent)


# ---- ranks that fail ----------------------------------------------------------------------------


def test_a_missing_rank_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    assert save(writers(tmp_path, 3), 1) == [None] * 3
    several = writers(tmp_path, 3, session="impatient", patience_s=0.4)
    errors = save(several, 2, skip=1)
    assert re.search(r"step-00000002\b.*\brank 1\b.*\b0\.4 s\b", str(errors[0]))
    assert errors[1] is None
    assert "step-00000002" in str(errors[2])
    assert not (tmp_path / "step-00000002").exists()
    assert is_intact(resolve(tmp_path), 3) == 1
    fresh = writers(tmp_path, 3, session="t")
    assert save(fresh, 2) == [None] * 3
    assert is_intact(resolve(tmp_path, "latest"), 3) == 2
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_R16_one_ranks_state_that_is_not_finite_fails_the_save_of_all(tmp_path: Path) -> None:
    several = writers(tmp_path, 2)
    started = time.monotonic()
    for rank, writer in enumerate(several):
        whole = values(1)
        whole["model"]["even"][5, 0] = torch.nan  # on rank 1
        writer.save(1, on_rank(whole, 2, rank), {}, CONFIG)
    errors = wait(several)
    assert re.search(r"\brank 1\b.*\bmodel\.even\b.*finite.*step 1\b", str(errors[0]))
    assert re.search(r"\bmodel\.even\b.*finite", str(errors[1]))
    assert time.monotonic() - started < 250  # nobody was waited for
    assert not [name for name in os.listdir(tmp_path) if name.startswith("step")]
    assert save(several, 2) == [None, None]
    assert sorted(os.listdir(tmp_path)) == ["best", "latest", "step-00000002"]


def test_R31_what_rank_0_cannot_parse_back_is_saved_by_none(tmp_path: Path) -> None:
    several = writers(tmp_path, 2)
    for rank, writer in enumerate(several):
        writer.save(1, on_rank(values(1), 2, rank), {"step": 1}, "[train]\nsteps = ***\n")
    assert all(re.search(r"config\.toml\b.*TOML", str(error)) for error in wait(several))
    assert not list(tmp_path.glob("step-*"))


def test_a_run_that_ends_waits_for_no_rank(tmp_path: Path) -> None:
    lonely = writers(tmp_path, 2)
    lonely[0].save(1, on_rank(values(1), 2, 0), {}, CONFIG)
    lonely[0].abandon()
    with pytest.raises(CheckpointError, match=r"step-00000001\b.*\brun\b"):
        lonely[0].close()


def test_R6_stale_partials_of_several_ranks(tmp_path: Path) -> None:
    """What another session left of the very same step is neither waited for nor taken."""
    for rank, session in ((0, "old"), (1, "old")):
        writer = writers(tmp_path, 2, session=session, patience_s=0.05)[rank]
        writer.save(5, on_rank(values(9), 2, rank), {"step": 9}, CONFIG)
        with pytest.raises(CheckpointError):
            writer.wait()
    assert save(writers(tmp_path, 2), 5) == [None, None]
    assert is_intact(resolve(tmp_path), 2) == 5
    assert sorted(os.listdir(tmp_path)) == ["best", "latest", "step-00000005"]


class OfOneRank(Faults):
    """Lets something go wrong in the thread of one rank alone."""

    name = ""
    lock = threading.Lock()  # for the books, which both threads keep

    def _fsync(self, descriptor: int) -> None:
        with self.lock:
            super()._fsync(descriptor)

    def _changed(self, path: str, undo: Any) -> None:
        with self.lock:
            super()._changed(path, undo)

    def _happens(self, kind: str, path: str, partly: Any = None) -> None:
        if threading.current_thread().name.startswith(self.name):
            super()._happens(kind, path, partly)


@pytest.mark.parametrize("error", [None, 28], ids=["crash", "ENOSPC"])
@pytest.mark.parametrize("rank", [0, 1])
def test_R5_a_rank_fails_at_every_operation(
    rank: int, error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    save(writers(tmp_path / "before", 2), 1)
    states = [on_rank(values(2), 2, r) for r in range(2)]
    failures = 0
    for number in range(1000):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(tmp_path / "before", folder)
        several = writers(folder, 2)
        faults = OfOneRank(folder, **({"crash_at": number} if error is None else
                                      {"fail_at": number, "error": error}))  # fmt: skip
        faults.name = f"checkpoint of rank {rank}"
        with faults:
            for r in (1, 0):
                several[r].save(2, states[r], {"step": 2}, CONFIG, metric=-2)
            several[rank]._in_flight.exception()
            if faults.crashed:  # the job ends
                several[1 - rank].abandon()
            errors = wait(several)
        faults.lose("nothing")
        if number >= len(faults.log):
            assert errors == [None, None]
            assert failures > 12
            return
        where = f"{number}: {faults.log[number]}"
        failures += any(errors)
        committed = (folder / "step-00000002").is_dir()
        assert is_intact(resolve(folder), 2) == (2 if committed else 1), where
        if error is None:
            assert isinstance(errors[rank], Crash), where
            several = writers(folder, 2, session="t")  # the job begins anew
        elif not committed:
            assert all(isinstance(e, CheckpointError) for e in errors), where
        assert save(several, 3) == [None, None], where
        assert is_intact(resolve(folder), 2) == 3, where
        assert not [name for name in os.listdir(folder) if name.startswith(".")], where
        shutil.rmtree(folder.parent)
    raise AssertionError("unreachable")
