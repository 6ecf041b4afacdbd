"""The default text: complete, the same every time, made once, and never half there."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fasttrain.data.format import DataError, open_dataset
from fasttrain.prepare import build as build_module
from fasttrain.prepare import corpus
from fasttrain.prepare.corpus import build_default_corpus


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 80 small modules instead of the real one of 12 MB."""
    root = tmp_path / "lib"
    for folder in ("", "json", "test", "json/tests", "idlelib/idle_test", "site-packages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(40 if folder in ("", "json") else 1):
            text = f"def {folder.replace('/', '_')}_{number}(x):\n    return x + {number}\n" * 4
            (root / folder / f"module_{number}.py").write_text(text)
    (root / "empty.py").touch()
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    (root / "data.txt").write_text("not Python")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setattr(corpus, "MIN_BYTES", 1000)
    return root


def build(tmp_path: Path, cache: str = "cache", **options: object) -> Path:
    return build_default_corpus(
        cache_dir=tmp_path / cache,
        **{"vocab_size": 300} | options,  # type: ignore[arg-type]
    )


def decoded(folder: Path, split: str, tmp_path: Path) -> list[str]:
    dataset = open_dataset(folder, split, cache_dir=tmp_path / "cache")  # type: ignore[arg-type]
    tokens = dataset.read(0, dataset.n_tokens)
    ends = np.flatnonzero(tokens == dataset.end_of_text)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    parts = np.split(tokens, ends + 1)
    assert not parts[-1].size  # the last document is ended too
    assert len(parts) - 1 == dataset.n_documents
    return [tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]]


def test_every_source_file_is_one_document_of_one_split(library: Path, tmp_path: Path) -> None:
    folder = build(tmp_path)
    train, val = decoded(folder, "train", tmp_path), decoded(folder, "val", tmp_path)
    expected = {p.read_text() for f in (library, library / "json") for p in f.glob("module_*.py")}
    assert len(train) + len(val) == len(expected) == 80
    assert {*train, *val} == expected
    assert 0 < len(val) < 20
    for split, texts in (("train", train), ("val", val)):
        dataset = open_dataset(folder, split, cache_dir=tmp_path / "cache")  # type: ignore[arg-type]
        assert dataset.n_bytes == sum(len(text.encode()) for text in texts)
        assert dataset.vocab_size == 300
    meta = json.loads((folder / "dataset.json").read_text())
    assert meta["source"]["n_files"] == 80


def test_the_split_of_a_file_does_not_depend_on_the_others(library: Path, tmp_path: Path) -> None:
    val = set(decoded(build(tmp_path), "val", tmp_path))
    for number in range(0, 40, 2):
        (library / f"module_{number}.py").write_text(f"# another text {number}\n")
    after = build(tmp_path)
    unchanged = {path.read_text() for path in library.rglob("module_*.py")}
    assert val & unchanged <= set(decoded(after, "val", tmp_path))
    assert not (val & set(decoded(after, "train", tmp_path)))


def test_two_builds_are_byte_identical_and_a_third_is_cached(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = build(tmp_path, "one", report=said.append)
    assert len(said) == 2
    assert str(library) in said[0]
    assert str(first) in said[1]
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    second = build(tmp_path, "two")
    assert first.name == second.name
    names = sorted(os.listdir(first))
    assert names == sorted(os.listdir(second))
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    said.clear()
    monkeypatch.setattr(corpus, "prepare", None)  # would fail if it were called
    assert build(tmp_path, "one", report=said.append) == first
    assert said == []


def test_another_text_or_vocabulary_is_another_dataset(library: Path, tmp_path: Path) -> None:
    folders = [build(tmp_path), build(tmp_path, vocab_size=301)]
    (library / "module_0.py").write_text("x = 1\n")
    folders.append(build(tmp_path))
    (library / "module_0.py").rename(library / "renamed.py")
    folders.append(build(tmp_path))
    assert len(set(folders)) == 4


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("x")])
def test_a_build_that_fails_leaves_nothing(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(build_module, "write_dataset_json", fail)
    expected = DataError if isinstance(error, OSError) else KeyError
    with pytest.raises(expected, match=r"No space left|x"):
        build(tmp_path)
    assert os.listdir(tmp_path / "cache") == [corpus.LOCK]
    monkeypatch.undo()


IS_KILLED_WHILE_BUILDING = """
import signal, sys, sysconfig
from pathlib import Path
from fasttrain.prepare import corpus
sysconfig.get_path = lambda name: sys.argv[2]
corpus.MIN_BYTES = 1000
def prepare(out, *_, **__):
    (out.parent / "half").touch()
    print(out.parent, flush=True)
    signal.pause()
corpus.prepare = prepare
corpus.build_default_corpus(cache_dir=Path(sys.argv[1]))
"""


def test_a_build_waits_for_another_and_removes_what_is_left_of_it_when_it_is_killed(
    library: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", IS_KILLED_WHILE_BUILDING, str(cache), str(library)],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    with ThreadPoolExecutor(1) as thread:
        try:
            assert process.stdout is not None
            building = Path(process.stdout.readline().strip())
            second = thread.submit(build, tmp_path)
            with pytest.raises(TimeoutError):
                second.result(timeout=1)
            assert sorted(cache.iterdir()) == sorted([building, cache / corpus.LOCK])
            assert (building / "half").exists()
        finally:
            process.kill()
            process.communicate()
        folder = second.result()
        assert sorted(cache.iterdir()) == sorted([folder, cache / corpus.LOCK])


def test_a_build_needs_no_locks(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(path: Path, *, wait: bool) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(corpus, "lock", none)
    folder = build(tmp_path)
    assert os.listdir(tmp_path / "cache") == [folder.name]


def test_a_faster_process_wins_and_both_get_its_folder(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, other = os.rename, build(tmp_path, "other")

    def late(source: Path, target: Path) -> None:
        if target.name == other.name and other.exists():
            rename(other, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    folder = build(tmp_path)
    assert sorted(os.listdir(tmp_path / "cache")) == sorted([folder.name, corpus.LOCK])
    assert open_dataset(folder, "val", cache_dir=tmp_path / "scans").n_tokens > 0


def test_a_python_without_sources_is_refused(library: Path, tmp_path: Path) -> None:
    for path in library.rglob("*.py"):
        path.unlink()
    with pytest.raises(DataError, match=r"/lib: .*\b0 bytes\b.*data\.path"):
        build(tmp_path)


def test_the_real_standard_library_makes_a_real_dataset(tmp_path: Path) -> None:
    folder = build(tmp_path, vocab_size=512)
    train = open_dataset(folder, "train", cache_dir=tmp_path / "cache")
    val = open_dataset(folder, "val", cache_dir=tmp_path / "cache")
    assert train.n_bytes is not None
    assert train.n_bytes > 5e6
    contents = [content for _, content in corpus._source_files(Path(sysconfig.get_path("stdlib")))]
    shares = [int.from_bytes(hashlib.sha256(content).digest()[:4]) / 2**32 for content in contents]
    held_out = [
        len(content) for content, share in zip(contents, shares, strict=True) if share < 0.05
    ]
    assert val.n_bytes == sum(held_out)
    assert len(held_out) > 0.02 * len(contents)
    assert train.n_bytes / train.n_tokens > 1.7
    assert train.vocab_size == 512
    tokenizer = Tokenizer.from_file(str(train.tokenizer_path))
    text = "def main(argv=None):\n    print('ünïcode <|endoftext|>', argv)\r\n\n"
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
