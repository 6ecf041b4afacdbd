"""Damaged and hostile checkpoints are found out, and nothing in them runs (R14, R15, R25)."""

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.checkpoint import CheckpointError, load, resolve, verify
from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.__main__ import main
from tests.support.faults import flip_bit
from tests.support.toy_checkpoints import reseal, save

# ---- R14, R15: damage ----------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [40, pytest.param(200, marks=pytest.mark.soak)])
def test_R14_bit_flips(flips: int, tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1, 2)
    older, newer = (tmp_path / "checkpoints" / f"step-0000000{n}" for n in (1, 2))
    files = sorted(newer.iterdir())
    chance = random.Random(14)
    for number in range(flips):
        file = files[number % len(files)]
        bit = chance.randrange(8 * file.stat().st_size)
        flip_bit(file, bit)
        for check in (verify, load, resolve):
            with pytest.raises(CheckpointError, match=file.name):
                check(newer)
        passed_over: list[str] = []
        assert resolve(tmp_path, report=passed_over.append) == older
        assert len(passed_over) == 1
        assert str(file) in passed_over[0]
        flip_bit(file, bit)
    assert resolve(tmp_path) == newer


def _swap(a: Path, b: Path) -> None:
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


DAMAGES: dict[str, Callable[[Path, Path], Any]] = {
    "missing": lambda file, _: file.unlink(),
    "empty": lambda file, _: file.write_bytes(b""),
    "truncated": lambda file, _: os.truncate(file, file.stat().st_size - 1),
    "longer": lambda file, _: file.write_bytes(file.read_bytes() + b"\0"),
    "of another step": lambda file, other: shutil.copy(other / file.name, file),
    "a folder": lambda file, _: (file.unlink(), file.mkdir()),
    "a link": lambda file, other: (file.unlink(), file.symlink_to(other / file.name)),
    "a pipe": lambda file, _: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_R15_damaged_files(damage: Callable[[Path, Path], Any], tmp_path: Path) -> None:
    folder = tmp_path / "before" / "checkpoints"
    save(folder, 1, 2)
    for number, name in enumerate(sorted(os.listdir(folder / "step-00000002"))):
        if name == "config.toml" and damage is DAMAGES["of another step"]:
            continue  # it is the same in both
        run = tmp_path / str(number)
        shutil.copytree(folder.parent, run)
        older, newer = (run / "checkpoints" / f"step-0000000{n}" for n in (1, 2))
        damage(newer / name, older)
        for check in (verify, load, resolve):
            with pytest.raises(CheckpointError, match=name):
                check(newer)
        with pytest.raises(CheckpointError, match=name):
            resolve(run, "latest")
        passed_over: list[str] = []
        assert resolve(run, report=passed_over.append) == older
        assert [name in line for line in passed_over] == [True]


def test_R15_swapped_files_and_folders(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 2)
    _swap(path / "model.safetensors", path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors|optimizer\.safetensors"):
        verify(path)
    _swap(path / "model.safetensors", path / "optimizer.safetensors")
    verify(path)
    os.rename(path, tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match=r"step-00000003/manifest\.json: .*\bstep 2\b"):
        verify(tmp_path / "step-00000003")
    os.rename(tmp_path / "step-00000003", tmp_path / "my-best-one")
    verify(tmp_path / "my-best-one")


def test_R15_additional_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt: .*remove"):
        verify(path)


def test_R15_never_a_silent_fresh_start(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2)
    for step in (1, 2):
        (folder / f"step-0000000{step}" / "model.safetensors").unlink()
    passed_over: list[str] = []
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: .*\b2 checkpoints\b"):
        resolve(tmp_path, report=passed_over.append)
    assert len(passed_over) == 2
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(CheckpointError, match=rf"{tmp_path}\b.*: .*no checkpoint"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match=r"/nowhere: .*folder"):
        resolve(tmp_path / "nowhere")


def test_damaged_pointers_are_not_followed(tmp_path: Path) -> None:
    newest = save(tmp_path, 1, 2)
    for text in ("", "../../etc", "step-00000009", "\udcff"):
        (tmp_path / "latest").write_text(text, errors="surrogateescape")
        assert resolve(tmp_path) == newest
        with pytest.raises(CheckpointError, match=r"'latest'.*'auto'"):
            resolve(tmp_path, "latest")
    with pytest.raises(CheckpointError, match=r"'best'.*'auto'"):
        resolve(tmp_path, "best")


# ---- R25: hostile checkpoints --------------------------------------------------------------------


def with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HOSTILE = {
    "header larger than the file": with_header({}, length=1 << 62),
    "no room for a length": b"\0\0\0",
    "not JSON": with_header(b"\xff{"),
    "not an object": with_header([1]),
    "deep": with_header(b"[" * 200_000),
    "long number": with_header(b'{"w": ' + b"9" * 100_000 + b"}"),
    "entry not an object": with_header({"w": 3}),
    "unknown dtype": with_header(one(dtype="PICKLE"), bytes(8)),
    "dtype not text": with_header(one(dtype=["F32"]), bytes(8)),
    "negative shape": with_header(one(shape=[-2, -1]), bytes(8)),
    "boolean shape": with_header(one(shape=[True, 2]), bytes(8)),
    "huge shape": with_header(one(shape=[1 << 62, 1 << 62]), bytes(8)),
    "empty but huge": with_header(one(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0])),
    "many dimensions": with_header(one(shape=[1] * 100_000), bytes(8)),
    "beyond the end": with_header(one(shape=[4], offsets=[0, 16]), bytes(8)),
    "negative offsets": with_header(one(offsets=[-8, 0]), bytes(8)),
    "one offset": with_header(one(offsets=[0]), bytes(8)),
    "a gap": with_header(one(offsets=[4, 12]), bytes(12)),
    "bytes left over": with_header(one(), bytes(12)),
    "overlap": with_header({**one(), "v": one()["w"]}, bytes(8)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_R25_hostile_tensors(content: bytes, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(content)
    reseal(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(path)
    assert main([str(path)]) == 1


@settings(max_examples=150)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_R25_any_bytes_are_refused_or_parsed(data: bytes, length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for raw in (data, length.to_bytes(8, "little") + data):
            (file := Path(folder, "x")).write_bytes(raw)
            try:
                found = disk.map_tensors(file)
            except CheckpointError:
                continue
            assert sum(tensor.nbytes for tensor in found.values()) <= len(raw)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a/b", "..", ".hidden", ""])
def test_R25_path_traversal(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1)
    secret = tmp_path / "checkpoints" / "secret.txt"
    secret.write_text("secret")
    files = json.loads((path / disk.MANIFEST).read_text())["files"]
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    reseal(path, files={**files, name: entry})
    with pytest.raises(CheckpointError, match=rf"manifest\.json: .*{re.escape(repr(name))}"):
        load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": [1]},
        {"step": "1"},
        {"step": True},
        {"commit": None},
        {"metric": "low"},
        {"format": "other"},
        {"version": 99},
        {"files": {"state.json": {"bytes": 1 << 62, "sha256": "0"}, "config.toml": {}}},
        {"files": {"state.json": 3, "config.toml": 4}},
    ],
    ids=str,
)
def test_R25_hostile_manifest(changes: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    reseal(path, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load(path)
    assert main([str(tmp_path)]) == 1


def test_R25_declared_size_is_not_allocated(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = json.loads((path / disk.MANIFEST).read_text())["files"]
    files["model.safetensors"]["bytes"] = 1 << 50
    reseal(path, files=files)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*\b{1 << 50}\b"):
        load(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_R25_foreign_pickles_are_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    for attempt in (load, verify, resolve):
        with pytest.raises(CheckpointError, match=r"pickle.*safetensors.*weights_only=True"):
            attempt(file)
    with pytest.raises(CheckpointError, match=rf"model\{suffix}: .*pickle"):
        resolve(tmp_path)
    assert main([str(file)]) == 2
    assert sorted(os.listdir(tmp_path)) == [file.name]


def test_a_lineage_of_other_fields_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1)
    path = tmp_path / "checkpoints/step-00000001"
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"lineage": [{"a": 1}]}))
    reseal(path)
    assert main([str(tmp_path)]) == 1
    with pytest.raises(CheckpointError, match="lineage"):
        verify(path)
