"""Parts of a dataset, made one by one and merged, are byte by byte what one run makes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
from tokenizers import Tokenizer, models

from fasttrain.data.format import open_dataset
from fasttrain.data.tokenizer import Encoder, OtherIdsError
from fasttrain.prepare import build, prepare
from fasttrain.prepare.build import merge
from fasttrain.prepare.inputs import local_file
from fasttrain.prepare.sources import Source
from fasttrain.prepare.writer import ShardWriter
from fasttrain.storage import DataError
from tests.support.toy_mirror import At, Faulty


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "BATCH_CHARS", 700)  # batches of one run and of parts differ
    monkeypatch.setattr(build, "BLOCK_TOKENS", 333)
    monkeypatch.setattr(Faulty, "happens", Faulty.happens)  # the last `At` must not outlive a test


def write_inputs(folder: Path, n_files: int = 9) -> str:
    rng = random.Random(5)
    (folder / "in").mkdir()
    for n in range(n_files):
        lines = [
            json.dumps({"text": f"{n} {k}: " + "word 12 日本 é\n" * rng.randint(1, 30)}) + "\n"
            for k in range(rng.randint(1, 40))
        ]
        lines[n % 4 : n % 4] = ["{broken\n", '{"other": 1}\n'][n % 3 :]
        (folder / f"in/{n}.jsonl").write_text("".join(lines))
    (folder / "in/4b.txt").write_text("a longer text of many lines\n" * 150)
    (folder / "in/5b.txt").touch()
    return str(folder / "in")


def make(out: Path | str, source: str, **options: object) -> list[str]:
    notes: list[str] = []
    options = {"tokenizer": "bytes", "shard_tokens": 1000} | options
    prepare(out, [source], note=notes.append, **options)  # type: ignore[arg-type]
    return notes


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("n_parts", [1, 3, 12])
@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer": "bpe:300", "val_fraction": 0.1, "shard_tokens": 777},
        {"tokenizer": "chars"},  # how much is held out depends on all of the text
        {"tokenizer": "bytes", "val_fraction": 1e-6},  # the smallest hash of all
        {"tokenizer": "bytes", "val_fraction": 0, "shard_tokens": 10**6},
    ],
    ids=["bpe", "auto", "smallest", "one-shard"],
)
def test_merged_parts_are_what_one_run_makes(
    tmp_path: Path, n_parts: int, options: dict[str, object]
) -> None:
    source = write_inputs(tmp_path)
    whole = make(tmp_path / "whole", source, **options)
    for number in random.Random(n_parts).sample(range(1, n_parts + 1), n_parts):  # in any order
        make(tmp_path / "out", source, shard_of=f"{number}/{n_parts}", **options)
    assert not (tmp_path / "out").exists()
    notes: list[str] = []
    merge(tmp_path / "out", note=notes.append)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    # All but what was found, the training of a BPE, and what was written.
    told = whole[2 if options["tokenizer"] == "bpe:300" else 1 : -1]
    assert notes[:-1] == told
    problems = json.loads((tmp_path / "out/dataset.json").read_text())["source"]["problems"]
    assert len(problems) == 3
    assert {f"{reason}: {count:,}" for reason, count in problems.items()} <= set(told)
    assert open_dataset(tmp_path / "out", "train").n_documents > 50  # hashes fit


def test_problems_are_listed_as_in_one_run(tmp_path: Path) -> None:
    vocabulary = {letter: n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz ?")}
    Tokenizer(models.BPE(vocabulary, [], unk_token="?")).save(str(tmp_path / "t.json"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jsonl").write_text('{"text": "Lost"}\n' * 5)
    (tmp_path / "in/2.jsonl").write_text('{"text": "kept"}\n{broken\n' * 5)
    options = {"tokenizer": str(tmp_path / "t.json"), "val_fraction": 0}
    make(tmp_path / "whole", str(tmp_path / "in"), **options)
    for number in (1, 2):
        make(tmp_path / "out", str(tmp_path / "in"), shard_of=f"{number}/2", **options)
    merge(tmp_path / "out", note=lambda line: None)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    found = json.loads((tmp_path / "out/dataset.json").read_text())["source"]["problems"]
    assert list(found.values()) == [5, 5]


def test_each_file_is_in_one_part_and_parts_are_about_equal(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.txt" for n in range(40)]
    for n, path in enumerate(paths):
        path.write_text("x" * (n * 37 % 100))
    total = sum(path.stat().st_size for path in paths)
    for n_parts in (1, 2, 3, 7, 40):
        files = []
        for number in range(1, n_parts + 1):
            source = Source([local_file(path) for path in paths])
            assert abs(source.take(number, n_parts) - total / n_parts) <= 100
            files += [file.path for file in source.files]
        assert files == paths


COMMAND = """
import os, signal, sys
from fasttrain import prepare as command
from fasttrain.prepare import build
from fasttrain.prepare.writer import Partial
build.BATCH_CHARS, build.CHECKPOINT_S = 700, 0.0
if "KILLED" in os.environ:  # behind its third checkpoint
    save, saves = Partial.save, []
    def saved(self, **state):
        save(self, **state)
        saves.append(state)
        if len(saves) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    Partial.save = saved
sys.exit(command.main(sys.argv[1:]))
"""


def test_the_command_with_a_part_killed_and_resumed(tmp_path: Path) -> None:
    source = write_inputs(tmp_path)
    make(tmp_path / "whole", source, tokenizer="bpe:300", shard_tokens=777)
    out = str(tmp_path / "out")

    def run(*more: str, status: int = 0, **variables: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", COMMAND, out, *more],
            capture_output=True, text=True, timeout=200,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        )  # fmt: skip
        assert result.returncode == status, result.stderr
        return result.stdout + result.stderr

    asked = ("--input", source, "--tokenizer", "bpe:300", "--shard-tokens", "777")
    said = run(*asked, "--shard-of", "1/2")
    assert f"python -m fasttrain.prepare {out} --merge" in said
    run(*asked, "--shard-of", "2/2", status=-signal.SIGKILL, KILLED="1")
    assert re.search(r"out\.parts: .*\b1-of-2\b.*\b1-of-N\b", run("--merge", status=2))
    said = run(*asked, "--shard-of", "2/2", "--resume")
    assert re.search(r"^(Continu|Resum)ing .*\.partial", said, re.MULTILINE)
    said = run("--merge")
    assert f"{out}.parts" in said
    assert f"data.path={out}" in said
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    complete = rf"{re.escape(out)}\b.*\bcomplete\b"
    assert re.search(complete, run("--merge", "--resume"))
    assert re.search(r"/out: .*\bexists\b.*\bdataset\b", run("--merge", status=2))
    shutil.rmtree(f"{out}.parts")
    assert re.search(complete, run(*asked, "--resume"))  # as if one machine had made it
    for wrong in (("--merge", "--input", source), ("--merge", "--shard-of", "1/2")):
        assert re.search("error: .*--merge.*--input.*--shard-of", run(*wrong, status=2))


def test_a_merge_that_fails_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_inputs(tmp_path)
    make(tmp_path / "whole", source)
    for number in (1, 2):
        make(tmp_path / "out", source, shard_of=f"{number}/2")
    write, n_writes = ShardWriter.write, 0

    def full(*arguments: object) -> None:
        nonlocal n_writes
        n_writes += 1
        if n_writes == 50:
            raise OSError(28, "No space left on device")
        write(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", full)
        with pytest.raises(DataError, match=r"/out: .*\(No space left"):
            merge(tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"cache", "in", "out.parts", "whole"}
    merge(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    source, parts = write_inputs(tmp_path), tmp_path / "out.parts"
    out = tmp_path / "out"
    for wrong in ("0/2", "3/2", "2", "a/b", "-1/2"):
        with pytest.raises(DataError, match=f"--shard-of {wrong}: .*I/N"):
            make(out, source, shard_of=wrong)
    with pytest.raises(DataError, match=r"out\.parts: \D*\b1-of-N\b"):
        merge(out)
    make(out, source, shard_of="1/2")
    with pytest.raises(DataError, match=r"out\.parts: .*\b1-of-2\b.*\b1-of-N\b"):
        merge(out)
    make(out, source, shard_of="1/3")
    with pytest.raises(DataError, match=r"out\.parts: .*\b1-of-2, 1-of-3\b.*\b1-of-N\b"):
        merge(out)
    shutil.rmtree(parts / "1-of-3")
    for options, match in (
        ({"shard_tokens": 5}, r"shard_tokens = 5\b.*\b1000\b"),
        ({"tokenizer": "chars"}, "tokenizer = 'chars'.*'bytes'"),
    ):
        make(out, source, shard_of="2/2", **options)
        with pytest.raises(DataError, match=rf"2-of-2: .*\b1-of-2\b.*\b{match}"):
            merge(out)
        shutil.rmtree(parts / "2-of-2")
    shutil.copytree(parts / "1-of-2", parts / "2-of-2")
    with pytest.raises(DataError, match=r"2-of-2: .*\b1-of-2\b.*\bpart = 1/2"):
        merge(out)
    shutil.rmtree(parts / "2-of-2")
    make(out, source, shard_of="2/2")
    for name, match in (
        ("train_000001.bin", r"train_000001\.bin: .*SHA-256"),
        ("val_000000.ends", r"val_000000\.ends: .*val_000000\.bin"),
        ("tokenizer.json", r"tokenizer\.json: .*SHA-256"),
        ("prepared.json", r"prepared\.json: .*\bJSON\b"),
    ):
        damaged = parts / "2-of-2" / name
        kept = damaged.read_bytes()
        damaged.write_bytes(kept[:-2] + bytes([kept[-2] ^ 1]) + kept[-1:])
        with pytest.raises(DataError, match=f"2-of-2/{match}"):
            merge(out)
        damaged.write_bytes(kept)
    meta = json.loads((parts / "2-of-2/dataset.json").read_text())
    meta["tokenizer"]["sha256"] = "0" * 64
    (parts / "2-of-2/dataset.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"2-of-2: .*\b1-of-2\b.*\btokenizer\b"):
        merge(out)
    assert not out.exists()


def test_a_part_that_tiktoken_splits_otherwise_is_not_encoded_in_another_way_than_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tiktoken", reason="needs the extra data")

    def other(self: Encoder, texts: list[str]) -> None:
        raise OtherIdsError("after 'x'")

    monkeypatch.setattr(Encoder, "_compare", other)
    source = write_inputs(tmp_path)
    with pytest.raises(DataError, match=r"tiktoken.*after 'x'.*\bparts\b.*tiktoken"):
        make(tmp_path / "out", source, tokenizer="bpe:300", shard_of="1/2")


def test_parts_and_dataset_come_to_an_address_however_often_the_copies_are_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, there = write_inputs(tmp_path), tmp_path / "there"
    address = f"faulty://{there}/out"
    make(tmp_path / "whole", source)
    n_points = 0

    def interrupted_everywhere(work: Callable[[bool], object], folder: Path) -> None:
        """Each time one operation later, which leaves half of a file; and then not at all."""
        nonlocal n_points
        for n in count():
            point = At(n, Mock(side_effect=KeyboardInterrupt))
            with suppress(KeyboardInterrupt):
                work(n > 0)
            if not point.done:
                break
            n_points += 1
            if (folder / "dataset.json").exists():  # cut off itself
                assert point.n_done == n + 1
                with pytest.raises(DataError, match=r"dataset\.json: .*\bJSON\b"):
                    open_dataset(f"faulty://{folder}", "train")
            elif folder.parent != there:
                with pytest.raises(DataError, match=r"out\.parts: .*\b1-of-N\b"):
                    merge(address)

    for number in (1, 2):
        part = {"shard_of": f"{number}/2"}
        interrupted_everywhere(
            lambda resume, part=part: make(address, source, resume=resume, **part),
            there / f"out.parts/{number}-of-2",
        )
    interrupted_everywhere(
        lambda resume: merge(address, resume=resume, note=lambda line: None), there / "out"
    )
    assert content(there / "out") == content(tmp_path / "whole")
    assert n_points > 30
    assert open_dataset(address, "train").n_documents == 139
    assert not list((tmp_path / "cache/fasttrain/prepare").rglob("*.*n")), "nothing is left here"
