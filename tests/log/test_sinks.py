"""CSV, TensorBoard, W&B and the profiler: what a run writes where its config asks for it."""

import csv
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fasttrain.config import UserError, load_config
from fasttrain.log.sinks import CsvLogger, Sinks
from fasttrain.train import main
from tests.support.toy import write_config
from tests.support.toy_trainer import rows


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_the_rows_of_the_jsonl_also_after_a_resume(toy: Path) -> None:
    settings = ["run.name=r", "log.csv=true", "eval.every_steps=2", "train.steps=5"]
    assert main([str(toy), *settings, "--stop-at-step", "3"]) == 75
    run = Path("runs/r")
    with (run / "train.csv").open("a") as file:  # as a crash leaves them
        file.write("4,1,2\n5,cut o")
    assert main([str(toy), *settings, "--resume", "auto"]) == 0
    for kind in ("train", "eval"):
        written, expected = table(run / f"{kind}.csv"), rows(run, kind)
        assert [int(row["step"]) for row in written] == [row["step"] for row in expected]
        key = "loss" if kind == "train" else "val_loss"
        assert [float(row[key]) for row in written] == [row[key] for row in expected]


def test_a_csv_cell_is_quoted_and_a_missing_one_empty(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    logger.write("train", {"step": 1, "a": 'x,"y', "b": None})
    logger.write("train", {"step": 2, "later": 3.5, "b": 0.25})
    logger.close()
    found = table(tmp_path / "train.csv")
    assert found == [{"step": "1", "a": 'x,"y', "b": ""}, {"step": "2", "a": "", "b": "0.25"}]


def test_tensorboard_gets_the_numbers(toy: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([str(toy), "run.name=r", "log.tensorboard=true", "train.steps=3"]) == 0
    events = EventAccumulator("runs/r/tensorboard")
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    expected = [(row["step"], row["loss"]) for row in rows(Path("runs/r"))]
    assert found == [(step, pytest.approx(loss)) for step, loss in expected]
    assert "eval/val_loss" in events.Tags()["scalars"]


def test_a_run_that_starts_over_in_its_folder_leaves_one_row_a_step(toy: Path) -> None:
    """As torchrun's restart of one that was killed before its first checkpoint was committed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ["run.name=r", "log.tensorboard=true", "log.csv=true", "eval.every_steps=1"]
    settings += ["eval.sample_every_steps=1", "--resume=auto"]
    run = Path("runs/r")
    assert main([str(toy), *settings, "train.steps=5"]) == 0
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main([str(toy), *settings, "train.steps=4"]) == 0
    for kind in ("train", "eval"):
        found = [row["step"] for row in rows(run, kind)]
        assert found == [int(row["step"]) for row in table(run / f"{kind}.csv")] == [1, 2, 3, 4]
    samples = [line for line in (run / "samples.txt").read_text().split("\n") if "--- step" in line]
    assert samples == [f"--- step {step}" for step in (1, 2, 3, 4)]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for key in ("train/loss", "eval/val_loss"):
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("setting", "package"),
    [("log.tensorboard=true", "tensorboard"), ("log.wandb_project=p", "wandb")],
)
def test_a_missing_package_is_told_before_anything_is_made(
    toy: Path,
    setting: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    assert main([str(toy), "run.name=r", setting]) == 2
    error = capsys.readouterr().err
    assert f"pip install {package}" in error
    assert not Path("runs/r").exists()


class _FakeRun:
    id = "abc123"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.finished = 0

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of that name that keeps what it is told."""
    fake: Any = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.Error = type("Error", (Exception,), {})
    fake.Settings = lambda **options: options
    fake.started, fake.run = [], _FakeRun()

    def init(**options: Any) -> _FakeRun:
        if options["project"] == "refused":
            raise fake.Error("no API key")
        fake.started.append(options)
        run: _FakeRun = fake.run
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_config_and_numbers_and_a_resumed_run_its_own_again(
    toy: Path, wandb: Any, tmp_path: Path
) -> None:
    settings = ["log.wandb_project=p", "log.wandb_mode=offline"]
    config = load_config(toy, settings)
    for _ in range(2):
        sinks = Sinks(config, tmp_path)
        sinks.write("train", {"step": 3, "loss": 1.5, "mfu": None})
        sinks.close()
    first, second = wandb.started
    assert (first["project"], first["mode"], first["id"]) == ("p", "offline", None)
    assert second["id"] == "abc123"
    assert first["config"]["model"]["dim"] == 32
    assert wandb.run.rows == [{"step": 3, "train/loss": 1.5}] * 2
    assert wandb.run.finished == 2
    with pytest.raises(UserError, match="wandb_mode=offline"):
        Sinks(load_config(toy, ["log.wandb_project=refused"]), tmp_path)


def test_profiled_steps_leave_a_trace(toy: Path) -> None:
    assert main([str(toy), "run.name=r", "log.profile_steps=[2,3]", "train.steps=4"]) == 0
    trace = json.loads(Path("runs/r/profile/trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 2", "step 3"} <= names
    assert not names & {"step 1", "step 4"}
    assert any(str(name).startswith("aten::") for name in names)
    assert main([str(toy), "run.name=s", "log.profile_steps=[3,2]"]) == 2
