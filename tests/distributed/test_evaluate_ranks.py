"""Scores on lm-eval's tasks in training, on one rank and on two: the same."""

from pathlib import Path

import pytest

from tests.support import ranks
from tests.support.toy import write_config
from tests.support.toy_tasks import write_tasks
from tests.support.toy_trainer import rows

pytest.importorskip("lm_eval", reason="needs the extra eval")

MODES = {"one": (1, "auto"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        (folder / "tasks").mkdir()
        values = [
            'eval.tasks=["both", "texts"]',
            f"eval.tasks_path={write_tasks(folder / 'tasks')}",
        ]
        # A row at a time: the ranks have 10 inputs of the choices to share, and 5 contexts.
        values += ["eval.every_steps=6", "eval.batch_size=1", "train.tokens_per_step=64"]
        values += ["train.micro_batch=2", "distributed.init_timeout_s=300"]
        config = str(write_config(folder))
        runs = {
            name: {
                "size": n,
                "argv": [config, *values, f"run.name={name}", f"distributed.mode={m}"],
            }
            for name, (n, m) in MODES.items()
        }
        ranks.run_all(folder, runs)

    return ranks.once(tmp_path_factory, "evaluate-ranks", fill)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_give_the_scores_of_one(made: Path, mode: str) -> None:
    for rank in range(2):
        assert ranks.result(made, mode, rank)["status"] == 0
    found, expected = (
        [
            {k: v for k, v in row.items() if k != "time"}
            for row in rows(made / "runs" / name, "tasks")
        ]
        for name in (mode, "one")
    )
    assert [row["step"] for row in found] == [6, 12]
    assert "texts/bits_per_byte" in found[0]
    assert found == [pytest.approx(row, abs=1e-4) for row in expected]
