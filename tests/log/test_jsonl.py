"""metrics.jsonl: readable at once, JSON whatever the numbers, each step once."""

import csv
import json
import math
import resource
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fasttrain.config import LogConfig, LoopConfig, TrainConfig
from fasttrain.log.sinks import JsonlLogger, LogFile, Sinks

ROW = {"step": 120, "loss": 3.4521, "lr": 1e-3, "mfu": None}


def rows(path: Path) -> list[dict[str, object]]:
    """Return the rows without their times."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    times = [datetime.fromisoformat(row.pop("time")) for row in found]
    assert times == sorted(times)
    assert all(datetime.now(UTC) - when < timedelta(hours=1) for when in times)
    return found


def test_jsonl_rows_are_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.write("train", ROW)
    assert rows(path) == [{"kind": "train", **ROW}]
    logger.write("eval", {"step": 120, "val_loss": 2.9})
    assert rows(path)[1] == {"kind": "eval", "step": 120, "val_loss": 2.9}
    logger.close()
    logger.close()


def test_jsonl_is_json_where_the_loss_is_not_finite(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.write("train", {"step": 1, "loss": math.nan, "grad_norm": math.inf})
    logger.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row == {"kind": "train", "step": 1, "loss": None, "grad_norm": None}


def test_jsonl_of_a_resumed_run_holds_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlLogger(path)
    for step in (10, 20, 30, 40):
        first.write("train", {"step": step})
    first.write("eval", {"step": 40})
    first.close()
    with path.open("a") as f:
        f.write('{"kind": "train", "st')  # the process was killed here
    resumed = JsonlLogger(path)
    resumed.drop_after(20)
    resumed.write("train", {"step": 30})
    resumed.close()
    assert [row["step"] for row in rows(path)] == [10, 20, 30]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_is_continued_by_default(tmp_path: Path) -> None:
    for step in (1, 2):
        logger = JsonlLogger(tmp_path / "metrics.jsonl")
        logger.write("train", {"step": step})
        logger.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("middle", [False, True])
def test_R12_rows_are_dropped_on_a_full_disk(tmp_path: Path, middle: bool) -> None:
    """Whole lines are cut off; a line between others, which no run leaves, may cost the latter."""
    run_dir = tmp_path
    config = TrainConfig(train=LoopConfig(steps=9), log=LogConfig(csv=True))
    sinks = Sinks(config, run_dir)
    for step in (1, 2, 3, 9 if middle else 4, 5):
        sinks.write("train", {"step": step, "loss": 0.5})
        sinks.write("eval", {"val_loss": 0.5, "step": step})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        sinks.drop_after(5 if middle else 2)
        sinks.write("train", {"step": 4, "loss": 0.5})  # it waits
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sinks.write("train", {"step": 5, "loss": 0.5})
    sinks.close()
    kept = [1, 2, 3] if middle else [1, 2]
    found = rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in found if row["kind"] == "train"] == [*kept, 4, 5]
    assert [row["step"] for row in found if row["kind"] == "eval"] == kept
    for kind, steps in (("train", [*kept, 4, 5]), ("eval", kept)):
        with (run_dir / f"{kind}.csv").open(newline="") as file:
            assert [int(row["step"]) for row in csv.DictReader(file)] == steps
    assert sorted(p.name for p in run_dir.iterdir()) == ["eval.csv", "metrics.jsonl", "train.csv"]


def test_what_made_the_rows_stands_before_the_first_of_each_session(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def session(name: str, begin: int | None, *steps: int) -> JsonlLogger:
        logger = JsonlLogger(path, {"command": name})
        if begin is not None:
            logger.drop_after(begin)
        for step in steps:
            logger.write("train", {"step": step})
        return logger

    def told() -> list[object]:
        return [row.get("command") or row["step"] for row in rows(path)]

    session("a", None, 10, 20).close()
    session("b", 20).close()  # ended before its first row
    session("c", 20, 30).close()
    session("d", 30, 40).close()
    assert told() == ["a", 10, 20, "c", 30, "d", 40]
    assert rows(path)[3] == {"kind": "run", "step": 20, "command": "c"}
    last = session("e", 20, 30, 40)
    assert told() == ["a", 10, 20, "e", 30, 40]
    last.drop_after(30)  # it goes back within its own rows, and before them
    last.write("train", {"step": 40})
    assert told() == ["a", 10, 20, "e", 30, 40]
    last.drop_after(10)
    last.write("train", {"step": 20})
    assert told() == ["a", 10, "e", 20]
    last.drop_after(0)
    last.close()
    assert told() == []


def test_a_line_goes_with_the_one_before_and_one_that_was_cut_off_alone(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    path.write_bytes(b"--- 1\na\rb\n--- 2\nc\n--- 3\nd\n--- 2\ncut o")

    def step_of(line: str) -> int | None:
        return int(line[4:]) if line.startswith("--- ") else None

    LogFile(path).drop_after(2, step_of)
    assert path.read_bytes() == b"--- 1\na\rb\n--- 2\nc\n--- 2\n"
    LogFile(path).drop_after(1, step_of)
    assert path.read_bytes() == b"--- 1\na\rb\n"
