"""The examples run as they stand, each in a process of its own and a folder of its own."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fasttrain import load_model
from tests.support.toy import ENV, ROOT
from tests.support.toy_trainer import rows


def run(
    name: str, cwd: Path, *arguments: str | Path, torchrun: Sequence[str] = (), **variables: str
) -> str:
    """Run an example and return what it prints."""
    done = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "examples" / name), *map(str, arguments)],
        cwd=cwd,
        env={**ENV, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_own_model(tmp_path: Path) -> None:
    for folder in ("own_model", "own_model-2"):  # run again, it overwrites nothing
        out = run("own_model.py", tmp_path)
        assert "loaded step 96" in out
        assert f"saved runs/{folder}/checkpoints/step-00000096" in out
    with (tmp_path / "runs/own_model/eval.csv").open() as file:
        evaluations = list(csv.DictReader(file))
    assert float(evaluations[-1]["val_accuracy"]) > 0.8  # the alphabet is learnt
    assert float(evaluations[-1]["val_loss"]) < 0.5 * float(evaluations[0]["val_loss"])


def test_own_model_ddp(tmp_path: Path) -> None:
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for folder, torchrun in (("one", ()), ("two", two)):
        out = run("own_model_ddp.py", tmp_path, folder, torchrun=torchrun)
        assert f"{1 + bool(torchrun)} ranks, 64 steps" in out
    alone, shared = (rows(tmp_path / folder) for folder in ("one", "two"))
    assert [row["loss"] for row in shared] == pytest.approx(
        [row["loss"] for row in alone], abs=1e-5
    )
    assert alone[-1]["loss"] < 0.01 * alone[0]["loss"]  # it has learnt to count


def test_kernels_in_torch(tmp_path: Path) -> None:
    lines = run("kernels_in_torch.py", tmp_path).splitlines()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert losses[-1] < 0.5 * losses[0]


def test_own_data(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text(f"def add{number}(a, b):\n    return a + b\n" * 150)
    out = run("own_data.py", tmp_path, texts, "made")
    losses = [row["loss"] for row in rows(tmp_path / "made/runs/own")]
    assert losses[-1] < 0.7 * losses[0]
    assert "\ndef " in out  # what it was asked to go on from
    assert load_model(tmp_path / "made/runs/own").vocab_size >= 257


def test_finetune(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert "--tokenizer PATH" not in run("finetune.py", tmp_path), "the run has its tokenizer"
    tuned = tmp_path / "finetune/tuned"
    losses = [row["loss"] for row in rows(tuned)]
    assert losses[-1] < losses[0]
    exported = json.loads((tmp_path / "finetune/tuned-hf/config.json").read_text())
    assert exported["model_type"] == "llama"


def test_quickstart_notebook(tmp_path: Path) -> None:
    """Its code cells run in order, without jupyter; the loss falls far below that of guessing."""
    pytest.importorskip("matplotlib", reason="needs the extra report")
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert not any(c.get("outputs") for c in notebook["cells"]), "clear the outputs"
    script = tmp_path / "quickstart.py"
    check = 'assert metrics.summary()["best_val_loss"] < 1.6, metrics.summary()'
    script.write_text("\n".join([*cells, check]), "utf-8")
    assert "    def " in run(str(script), tmp_path, MPLBACKEND="Agg")
