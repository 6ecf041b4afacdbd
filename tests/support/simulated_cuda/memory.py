"""What happens where a GPU's memory does not suffice, with errors that an allocation raises."""

import gc
from pathlib import Path

import pytest
import torch

from fasttrain.checkpoint import load
from fasttrain.checkpoint.files import history
from fasttrain.command import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from fasttrain.config import load_config
from fasttrain.preflight import memory
from fasttrain.train import main
from tests.support.simulated_cuda.shim import memory_limit, used
from tests.support.simulated_cuda.training import CUDA, RUNS, TINY
from tests.support.toy import ROOT, write_dataset

KEYS = [*TINY, *RUNS["gpt2"][1:], "run.device=cuda", "eval.batch_size=1"]
KEYS += ["data.seq_len=64", "train.tokens_per_step=256"]
CONFIG = ROOT / "configs/gpt2-124m.toml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tokens", n_val=200)


@pytest.fixture(scope="module")
def limit(data: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Return a memory in which a run of 2 rows has room, and one of 4 has not."""
    peaks = []
    for rows in (2, 4):
        gc.collect()
        torch.cuda.reset_peak_memory_stats(0)
        keys = [f"data.path={data}", f"run.out_dir={tmp_path_factory.mktemp('run')}"]
        assert main([str(CONFIG), *KEYS, "train.steps=2", *keys, f"train.micro_batch={rows}"]) == 0
        peaks.append(torch.cuda.max_memory_allocated(0))
    assert peaks[1] > 1.2 * peaks[0]
    return sum(peaks) // 2


def test_auto_takes_the_most_rows_that_an_allocator_lets_run(
    data: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "USABLE", 1e9)  # what is estimated always fits
    keys = [*KEYS, "train.micro_batch=auto", "model.vocab_size=320", f"data.path={data}"]
    config = load_config(CONFIG, [*keys, "run.dtype=fp32"])
    gc.collect()
    before = used(0)
    with memory_limit(limit):
        best = memory.best_micro_batch(config, 1, CUDA, print)
    gc.collect()
    assert best == 2
    assert used(0) == before  # of the attempts nothing is left


def test_a_run_without_memory_names_the_remedy_and_can_be_resumed(
    data: Path, limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [*KEYS, f"data.path={data}", f"run.out_dir={tmp_path}"]

    def run(rows: int, *arguments: str) -> int:
        gc.collect()
        with memory_limit(limit):
            return main([str(CONFIG), *keys, f"train.micro_batch={rows}", *arguments])

    assert run(2, "--stop-at-step=2") == EXIT_STOPPED
    assert run(4, "--resume=auto", "--allow-change=train.micro_batch") == EXIT_FAILED
    told = capsys.readouterr().err
    assert "CUDA out of memory" in told
    assert "train.micro_batch" in told
    assert "Traceback" not in told
    (folder,) = tmp_path.glob("*/checkpoints")
    assert load(history(folder)[0][0]).state["step"] == 2
    assert run(2, "--resume=auto") == EXIT_DONE
