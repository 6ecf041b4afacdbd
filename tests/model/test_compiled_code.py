"""What torch.compile keeps from one process to the next, and how damage in it is found."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasttrain.model.compiled import CHECKED_JSON, SETTLED_S, CompiledCode
from tests.support.toy import ROOT


def names(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    found = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in found if not name.startswith("users/"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three entries that were recorded as complete."""
    for name in ("ab/one.so", "ab/one.cpp", "cd/two.so", "triton/KEY/kernel.cubin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    kept = CompiledCode(tmp_path)
    kept.check()  # of an earlier version, without a record: removed
    assert names(tmp_path) == []
    for name in ("ab/one.so", "ab/one.cpp", "cd/two.so", "triton/KEY/kernel.cubin"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    kept.record()
    close(kept)
    return tmp_path


def close(kept: CompiledCode) -> None:
    """Release a folder, as the end of its process does."""
    assert kept._lock is not None
    os.close(kept._lock)


@pytest.mark.parametrize("damage", [b"", b"ab/one.so" * 50, b"AB/one.so" * 100])
def test_a_damaged_entry_of_compiled_code_is_removed_and_the_others_stay(
    folder: Path, damage: bytes
) -> None:
    (folder / "ab/one.so").write_bytes(damage)
    kept = CompiledCode(folder)
    assert kept.check() == 1
    assert names(folder) == ["cd/two.so", CHECKED_JSON, "triton/KEY/kernel.cubin"]
    (folder / "ab/one.so").write_bytes(b"made again")
    kept.record()
    close(kept)
    assert CompiledCode(folder).check() == 0
    assert "ab/one.so" in names(folder)


def test_a_file_that_torch_writes_again_is_not_damaged(folder: Path) -> None:
    kept = CompiledCode(folder)
    kept.check()
    (folder / "cd/two.so").write_bytes(b"tuned anew")
    os.utime(folder / "cd/two.so", ns=(1, 1))
    kept.record()
    close(kept)
    assert CompiledCode(folder).check() == 0
    assert "cd/two.so" in names(folder)


def test_what_a_killed_process_left_unfinished_is_removed(folder: Path) -> None:
    (folder / "ef").mkdir()
    (folder / "ef/three.so").write_bytes(b"cut o")
    assert CompiledCode(folder).check() == 0
    assert "ef/three.so" not in names(folder)
    assert "cd/two.so" in names(folder)


def test_what_another_process_is_making_is_neither_removed_nor_recorded_as_complete(
    folder: Path,
) -> None:
    other, kept = CompiledCode(folder), CompiledCode(folder)
    other.check()
    (folder / "ef").mkdir()
    for name in ("three.so", "four.so"):
        (folder / "ef" / name).write_bytes(b"half of it")
    long_ago = time.time() - SETTLED_S - 5
    os.utime(folder / "ef/four.so", (long_ago, long_ago))
    assert kept.check() == 0
    assert {"ef/three.so", "ef/four.so"} <= set(names(folder))
    kept.record()
    assert '"ef/four.so"' in (folder / CHECKED_JSON).read_text()
    assert '"ef/three.so"' not in (folder / CHECKED_JSON).read_text()
    close(other)
    kept.record()  # alone now
    assert '"ef/three.so"' in (folder / CHECKED_JSON).read_text()
    close(kept)


def test_what_a_process_was_making_when_it_was_killed_is_not_recorded_by_another(
    folder: Path,
) -> None:
    killed, kept = CompiledCode(folder), CompiledCode(folder)
    killed.check()
    kept.check()
    (folder / "ef").mkdir()
    (folder / "ef/three.so").write_bytes(b"cut o")
    close(killed)
    assert killed._held is not None
    os.close(killed._held)
    kept.end()
    close(kept)
    assert '"ef/three.so"' not in (folder / CHECKED_JSON).read_text()
    assert CompiledCode(folder).check() == 0
    assert "ef/three.so" not in names(folder)
    assert "cd/two.so" in names(folder)


def test_folders_and_links_in_place_of_compiled_files_are_removed(folder: Path) -> None:
    (folder / "ab/one.so").unlink()
    (folder / "ab/one.so").mkdir()
    (folder / "cd/two.so").unlink()
    (folder / "cd/two.so").symlink_to("nowhere")
    (folder / "locks").mkdir()
    (folder / "locks/a.lock").mkdir()
    (folder / "ef").write_bytes(b"")
    CompiledCode(folder).check()
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert not left & {"ab/one.so", "cd/two.so", "locks/a.lock", "ef"}
    assert "triton/KEY/kernel.cubin" in left


def test_a_damaged_record_of_compiled_code_is_only_slower(folder: Path) -> None:
    (folder / CHECKED_JSON).write_text('{"ab/one.so": {"sha256": 3')
    assert CompiledCode(folder).check() == 0
    assert names(folder) == [CHECKED_JSON]


PROGRAM = """
import sys
from pathlib import Path
import torch
from fasttrain.model.compiled import compile_cache_use, keep_compiled
keep_compiled(Path(sys.argv[1]))
f = torch.compile(lambda x: (x.sin() * 3).sum())
print(f"{f(torch.linspace(0, 1, 100)).item():.3f}", compile_cache_use())
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_R36_a_damaged_library_of_torch_compile_is_made_again(tmp_path: Path) -> None:
    dropped = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

    def compile_and_run() -> tuple[str, str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "kept")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    assert compile_and_run()[0] == "137.791 cold"
    libraries = [path for path in tmp_path.rglob("*.so") if "cpp" not in path.parts]
    for path in libraries:
        os.truncate(path, path.stat().st_size // 2)
    out, err = compile_and_run()
    assert out.startswith("137.791")
    assert re.search(rf"warning: {tmp_path}/kept\S*: [1-9]\d* .*\bcompiled code\b", err)
    assert all(path.stat().st_size > 8192 for path in libraries if path.exists())
