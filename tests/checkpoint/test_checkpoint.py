"""What checkpoints hold, which are kept, and when the training thread is free (R16, R17)."""

import errno
import fcntl
import math
import os
import random
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fasttrain.checkpoint import CheckpointError, CheckpointWriter, load, resolve
from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint import writer as checkpoint_writer
from fasttrain.checkpoint.__main__ import main
from fasttrain.checkpoint.writer import Snapshot
from fasttrain.config import LoopConfig, RunConfig, TrainConfig
from tests.support.faults import Faults, flip_bit
from tests.support.toy_checkpoints import CONFIG, Groups, groups, reseal, save


def assert_holds(path: Path, expected: Groups) -> None:
    loaded = load(path)
    assert len(loaded.tensors) == sum(map(len, expected.values()))
    for stem, tensors in expected.items():
        for name, tensor in tensors.items():
            got = loaded.tensors[f"{stem}.{name}"]
            assert got.dtype == tensor.dtype
            assert got.shape == tensor.shape
            assert torch.equal(got, tensor.detach())


def steps_in(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))


# ---- what is saved is what is loaded -------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1000)
    assert path == tmp_path / "checkpoints" / "step-00001000"
    assert sorted(os.listdir(path)) == [
        "config.toml", "manifest.json", "model.safetensors", "optimizer.safetensors",
        "rng.safetensors", "state.json",
    ]  # fmt: skip
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00001000\n"
    assert_holds(path, groups(1000))
    loaded = load(path)
    assert (loaded.path, loaded.step, loaded.state) == (path, 1000, {"step": 1000})
    assert loaded.config == TrainConfig(run=RunConfig(name="toy"), train=LoopConfig(steps=1))
    assert loaded.group("rng").keys() == {"cpu"}
    assert load(path, only=("model",)).tensors.keys() == {f"model.{n}" for n in groups()["model"]}


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for stem, tensors in groups(1).items():
        theirs = safetensors.torch.load_file(path / f"{stem}.safetensors")
        assert theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(theirs[name], tensor.detach())
    plain = {n: t.detach().contiguous() for n, t in groups(5)["model"].items()}
    safetensors.torch.save_file(plain, path / "model.safetensors", metadata={"by": "another"})
    reseal(path)
    for name, tensor in load(path, only=("model",)).group("model").items():
        assert torch.equal(tensor, plain[name])


@pytest.mark.parametrize("dtype", disk.DTYPE_NAMES, ids=str)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    values = (torch.arange(6) % 2).to(dtype)
    writer = CheckpointWriter(tmp_path, keep_last=1, asynchronous=False)
    path = writer.save(
        1, {"model": {"byte": torch.ones(1, dtype=torch.uint8), "x": values}}, {}, CONFIG
    )
    loaded = load(path).tensors["model.x"]
    assert loaded.dtype == dtype
    assert loaded.view(torch.uint8).tolist() == values.view(torch.uint8).tolist()
    theirs = safetensors.torch.load_file(path / "model.safetensors")["x"]
    assert theirs.dtype == dtype


def test_arguments_that_cannot_be_saved(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1)
    complex_ = {"model": {"w": torch.zeros(2, dtype=torch.complex128)}}
    with pytest.raises(CheckpointError, match=r"model\.w .*complex128"):
        writer.save(1, complex_, {}, "")
    with pytest.raises(CheckpointError, match="JSON"):
        writer.save(1, groups(), {"best": float("inf")}, "")
    assert os.listdir(tmp_path) == []


# ---- R16: retention ------------------------------------------------------------------------------


def test_going_back_to_an_older_step_makes_that_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, keep_last=2)
    assert steps_in(tmp_path) == [20, 30]
    assert save(tmp_path, 25, keep_last=2) == resolve(tmp_path)
    assert steps_in(tmp_path) == [25, 30]
    (tmp_path / "step-00000025" / disk.MANIFEST).unlink()
    passed_over: list[str] = []
    assert resolve(tmp_path, report=passed_over.append).name == "step-00000030"


def test_R16_last_and_best_are_kept(tmp_path: Path) -> None:
    for step, metric in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 4.5), (5, None)):
        save(tmp_path, step, keep_last=2, metric=metric)  # a new writer: best survives a restart
    assert steps_in(tmp_path) == [2, 4, 5]
    assert resolve(tmp_path, "best").name == "step-00000002"
    assert resolve(tmp_path, "latest").name == "step-00000005"
    save(tmp_path, 6, keep_last=1, metric=2.9)
    assert steps_in(tmp_path) == [6]
    save(tmp_path, 7, keep_last=1, metric=float("nan"))
    assert steps_in(tmp_path) == [6, 7]
    assert resolve(tmp_path, "best").name == "step-00000006"


def test_R16_only_verified_checkpoints_count(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=2)
    for step in (1, 2):
        writer.save(step, groups(step), {}, CONFIG, metric=step)
    writer.wait()
    flip_bit(tmp_path / "step-00000002" / "model.safetensors", 1000)
    writer.save(3, groups(3), {}, CONFIG)
    writer.wait()
    assert steps_in(tmp_path) == [1, 2, 3]  # two that are good, and the damaged one between them
    flip_bit(tmp_path / "step-00000001" / "state.json", 3)
    flip_bit(tmp_path / "step-00000003" / "state.json", 3)
    writer.save(4, groups(4), {}, CONFIG, metric=9.0)
    writer.wait()
    assert steps_in(tmp_path) == [1, 2, 3, 4]  # only one is good: nothing is removed
    assert resolve(tmp_path, "best").name == "step-00000004"
    writer.save(5, groups(5), {}, CONFIG)
    writer.close()
    assert steps_in(tmp_path) == [4, 5]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_R16_nonfinite_state_is_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, 1)
    bad = torch.zeros(100_003, dtype=dtype)
    bad[random.Random(str((value, dtype))).randrange(len(bad))] = value
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.save(2, {**groups(2), "optimizer": {"exp_avg": bad}}, {}, CONFIG)
    with pytest.raises(CheckpointError, match=r"optimizer\.exp_avg .*finite.*step 2\b"):
        writer.wait()
    assert steps_in(tmp_path) == [1]
    assert resolve(tmp_path, "latest").name == "step-00000001"


@pytest.mark.parametrize("dtype", [d for d in disk.DTYPE_NAMES if d.is_floating_point], ids=str)
def test_R16_what_is_finite_is_told_from_what_is_not(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    finite = [limits.max, limits.min, limits.tiny, -limits.tiny, 0.0, -0.0]
    for values in ([], finite, *([*finite, x] for x in (math.nan, -math.nan))):
        tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
        snapshot = Snapshot("model", {"w": tensor})
        snapshot.copy_from({"w": tensor})
        assert snapshot.first_nonfinite() == ("w" if len(values) > len(finite) else None)


# ---- R17: asynchronous saves ---------------------------------------------------------------------


def test_R17_the_snapshot_is_what_is_saved(tmp_path: Path) -> None:
    tensors = groups(1)
    may_write = threading.Event()
    writer = CheckpointWriter(tmp_path, keep_last=9)
    with Faults(tmp_path, before=lambda what: may_write.wait(300) and None) as faults:
        for step in (1, 2):
            expected = {
                s: {n: t.detach().clone() for n, t in g.items()} for s, g in tensors.items()
            }
            path = writer.save(step, tensors, {}, CONFIG)
            assert not path.exists()
            with torch.no_grad():
                for tensor in (t for group in tensors.values() for t in group.values()):
                    tensor.copy_(torch.ones_like(tensor) * (40 + step))
            may_write.set()
            writer.wait()
            may_write.clear()
            assert_holds(path, expected)
    assert faults.log


@pytest.mark.parametrize("step", [1, 2], ids=["new", "replaced"])
def test_R17_pointers_move_after_everything_is_fsynced(step: int, tmp_path: Path) -> None:
    save(tmp_path, 2, metric=2.0)
    with Faults(tmp_path) as faults:
        save(tmp_path, step, metric=1.0)
    log = faults.log
    name = f"step-0000000{step}"
    partial = next(line.split()[1] for line in log if line.startswith("mkdir .tmp-step"))
    for file in os.listdir(tmp_path / name):
        assert log.index(f"write {partial}/{file}") < log.index(f"fsync {partial}/{file}")
        assert log.index(f"fsync {partial}/{file}") < log.index(f"fsync {partial}")
    renamed = log.index(f"rename {name}")
    assert log.index(f"fsync {partial}") < renamed
    assert log[renamed + 1] == "fsync ."
    for pointer in {"latest", "best"} if step == 1 else {"latest"}:
        moved = log.index(f"replace {pointer}")
        assert renamed + 1 < log.index(f"fsync .tmp-{pointer}") < moved
        assert log[moved + 1] == "fsync ."


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads share one priority")
def test_R17_a_large_save_gives_way_to_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "setpriority", lambda which, who, value: asked.append(value))
    save(tmp_path, 1)
    assert asked == []  # over in no time: better soon
    monkeypatch.setattr(checkpoint_writer, "_BULKY", 0)
    save(tmp_path, 2)
    (niceness,) = asked
    assert 0 < niceness < 20
    assert_holds(resolve(tmp_path), groups(2))


def test_R17_buffers_are_reused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1, asynchronous=False)
    writer.save(1, groups(1), {}, CONFIG)
    places = [s.content.data_ptr() for s in writer._snapshots.values()]
    writer.save(2, groups(2), {}, CONFIG)
    assert [s.content.data_ptr() for s in writer._snapshots.values()] == places
    larger = {"model": {"weight": torch.ones(500)}}
    assert_holds(writer.save(3, larger, {}, CONFIG), larger)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has a page cache alone")
@pytest.mark.parametrize("refused", ["nothing", "the flag", "writes"])
def test_R17_a_large_file_leaves_the_page_cache_to_the_data_set(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write, real_fcntl, n_bytes = os.write, fcntl.fcntl, {True: 0, False: 0}

    def write(descriptor: int, data: memoryview) -> int:
        direct = bool(real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if direct and refused == "writes":
            raise OSError(errno.EINVAL, "its blocks are larger")
        if len(data) > 1000:
            n_bytes[direct] += len(data)
        return real_write(descriptor, data)

    def set_flags(descriptor: int, command: int, flags: int = 0) -> int:
        if refused == "the flag" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no such thing")
        return real_fcntl(descriptor, command, flags)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(fcntl, "fcntl", set_flags)
    large: Groups = {"model": {"w": torch.randn(5 << 18)}, "optimizer": {"m": torch.randn(900)}}
    path = CheckpointWriter(tmp_path, keep_last=1, asynchronous=False).save(1, large, {}, CONFIG)
    assert_holds(path, large)
    size = 5 << 20 if refused == "nothing" else 0
    assert n_bytes[True] == size
    assert (3600 < n_bytes[False] < 8000) is (refused == "nothing")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_R17_cuda_snapshot(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.randn(1 << 22, device="cuda"), "n": torch.tensor(3)}}
    writer = CheckpointWriter(tmp_path, keep_last=1)
    for step in (1, 2):
        expected = {"model": {n: t.cpu().clone() for n, t in tensors["model"].items()}}
        path = writer.save(step, tensors, {}, CONFIG)
        tensors["model"]["w"].mul_(3)  # on the training stream: must wait for the copy
        writer.wait()
        assert_holds(path, expected)


# ---- the command ---------------------------------------------------------------------------------


def test_command_lists_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "checkpoints", 1, 2)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("verified") == 2
    assert 'name = "toy"' in shown
    row = next(line for line in shown.splitlines() if "model.safetensors" in line).split()
    size = (path / "model.safetensors").stat().st_size
    assert row == ["model.safetensors", str(size), "bytes", "6", "tensors", "131", "parameters"]
    flip_bit(path / "optimizer.safetensors", 1000)
    assert main([str(path)]) == 1
    shown = capsys.readouterr().out
    assert "DAMAGED" in shown
    assert str(path / "optimizer.safetensors") in shown
    assert main([str(tmp_path / "nowhere")]) == 2
    for arguments, status in (([], "2"), (["--help"], "0")):
        with pytest.raises(SystemExit, match=status):
            main(arguments)
