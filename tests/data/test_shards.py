"""One shard file: header, reading, writing, and what it refuses."""

import hashlib
import random
import tracemalloc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data.dataset import HEADER_BYTES, Shard, dtype_for
from fasttrain.prepare.writer import ShardWriter
from fasttrain.storage import DataError, cache_folder

VOCAB = 1000


def write_shard(folder: Path, count: int) -> None:
    with closing(ShardWriter(folder, "train", vocab_size=VOCAB)) as writer:
        writer.write(np.arange(count) % VOCAB)


def test_document_ends_lie_beside_the_shard_they_end_in(tmp_path: Path) -> None:
    with closing(ShardWriter(tmp_path, "train", vocab_size=10, shard_tokens=4)) as writer:
        writer.write(np.array([1, 2, 0, 3, 4]), [3])
        writer.write(np.array([5, 0, 6]), [2, 3])
    ends = [np.fromfile(tmp_path / f"train_00000{i}.ends", "<u8").tolist() for i in range(2)]
    assert ends == [[3], [3, 4]]
    assert [shard["documents"] for shard in writer.shards] == [1, 2]
    assert (writer.n_tokens, writer.n_documents) == (8, 3)
    for shard in writer.shards:
        content = (tmp_path / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]


@pytest.mark.parametrize("value", [VOCAB, 70_000, -1])
def test_R22_writer_refuses_a_token_outside_the_vocabulary(tmp_path: Path, value: int) -> None:
    with closing(ShardWriter(tmp_path, "train", vocab_size=VOCAB, shard_tokens=50)) as writer:
        writer.write(np.arange(40))
        tokens = np.zeros(30, np.int64)
        tokens[17] = value
        with pytest.raises(DataError, match=rf"train_000001\.bin: .* {value}\b.*\b7\b.*\b1000\b"):
            writer.write(tokens)
    assert writer.n_tokens == 40
    assert Shard(tmp_path / "train_000000.bin").n_tokens == 40


SOAK = (pytest.mark.soak, pytest.mark.timeout(1800))


@pytest.mark.parametrize("mutants", [400, pytest.param(10_000, marks=SOAK)])
def test_R21_every_mutated_header_is_a_typed_error_that_names_the_file(
    tmp_path: Path, mutants: int
) -> None:
    write_shard(tmp_path, 2000)
    good = (tmp_path / "train_000000.bin").read_bytes()
    path = tmp_path / "mutant.bin"
    rng = random.Random(21)
    tracemalloc.start()
    for number in range(mutants):
        mutant = bytearray(good)
        kind = number % 4
        if kind == 0:  # a bit of the three numbers that mean something
            mutant[rng.randrange(12)] ^= 1 << rng.randrange(8)
        elif kind == 1:  # any byte of the header
            at = rng.randrange(HEADER_BYTES)
            mutant[at] ^= rng.randrange(1, 256)
        elif kind == 2:  # cut off or too long
            size = rng.randrange(len(good) - 1)
            mutant = mutant[:size] if rng.random() < 0.7 else mutant + bytes(1 + size)
        else:  # another count: negative, huge, off by one
            count = rng.choice([-1, -(2**31), 2**31 - 1, 1999, 2001, rng.randrange(2**31)])
            mutant[8:12] = count.to_bytes(4, "little", signed=True)
        path.write_bytes(mutant)
        with pytest.raises(DataError, match=r"mutant\.bin: "):
            Shard(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    path.write_bytes(good)
    assert Shard(path).n_tokens == 2000


def test_the_dtype_follows_the_vocabulary() -> None:
    assert [dtype_for(n).name for n in (1, 65536, 65537, 2**32)] == ["uint16"] * 2 + ["uint32"] * 2
    for bad in (0, -5, 2**32 + 1):
        with pytest.raises(DataError, match="vocab_size"):
            dtype_for(bad)


def test_the_cache_folder_is_the_users_or_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fasttrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "fasttrain"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder().parent == tmp_path
    assert cache_folder().name.startswith("fasttrain-")
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        cache_folder(tmp_path / "file" / "below")
