"""Time to a loss: a character-level model by `configs/chars.toml` and by karpathy/nanoGPT.

nanoGPT's README trains one on a CPU in 2,000 steps. Here that command and ours run as whole
processes in turn, from the same tokens to the end of either recipe, and the validation loss of each
is that of its whole validation split.

nanoGPT is not part of this project: name a checkout of it in the environment variable
``NANOGPT_DIR``. The text is the documentation that comes with Python; ``CHARS_TEXTS`` names other
text files instead (separated as in ``PATH``). The recipe was tuned on neither. A text takes five
minutes, so that all this is done with ``--full`` alone.
"""

import json
import os
import pickle
import pydoc_data.topics
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fasttrain.data.format import open_dataset

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
SEEDS = (1, 2, 3)
TEXTS = [Path(name) for name in os.environ.get("CHARS_TEXTS", "").split(os.pathsep) if name]
NANOGPT = {
    "dataset": "chars",
    "device": "cpu",
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
    "dropout": 0.0,
    "always_save_checkpoint": True,  # else only where its own estimate of the loss improved
}
# Mean loss of nanoGPT's checkpoint over its validation file, each token but the first once.
EVALUATE = """
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from model import GPT, GPTConfig
saved = torch.load("out/ckpt.pt", weights_only=True)
assert saved["iter_num"] == 2000, saved["iter_num"]
model = GPT(GPTConfig(**saved["model_args"])).eval()
model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()})
tokens = torch.from_numpy(np.fromfile("data/chars/val.bin", dtype=np.uint16).astype(np.int64))
total, length = 0.0, saved["model_args"]["block_size"]
with torch.no_grad():
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1][None]
        loss = model(window[:, :-1], window[:, 1:])[1].item()
        total += loss * (window.shape[1] - 1)
print(total / (len(tokens) - 1))
"""


@pytest.fixture(scope="module")
def nanogpt(request: pytest.FixtureRequest) -> Path:
    """The checkout of nanoGPT."""
    if not request.config.getoption("--full"):
        pytest.skip("takes five minutes for each text: --full")
    path = os.environ.get("NANOGPT_DIR")
    if not path:
        pytest.skip("NANOGPT_DIR does not name a checkout of karpathy/nanoGPT")
    return Path(path).resolve()


@pytest.fixture(scope="module", params=TEXTS or [None], ids=lambda text: text.stem if text else "")
def work(
    request: pytest.FixtureRequest, nanogpt: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder in which both run: one text, as our dataset and as nanoGPT's."""
    folder = tmp_path_factory.mktemp("chars")
    if request.param is None:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[name] for name in sorted(topics))
        (folder / "text.txt").write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(request.param, folder / "text.txt")
    arguments = ["data/ours", "--input", "text.txt", "--tokenizer", "chars", "--val-fraction=0.1"]
    run([sys.executable, "-m", "fasttrain.prepare", *arguments], folder)
    (folder / "data" / "chars").mkdir()
    for split in ("train", "val"):
        dataset = open_dataset(folder / "data" / "ours", split, cache_dir=folder / "cache")
        dataset.read(0, dataset.n_tokens).tofile(folder / "data" / "chars" / f"{split}.bin")
    # Without it nanoGPT takes GPT-2's vocabulary of 50,304, which would be eight times the work.
    meta = pickle.dumps({"vocab_size": dataset.vocab_size})
    (folder / "data" / "chars" / "meta.pkl").write_bytes(meta)
    for name in ("configurator.py", "config"):
        (folder / name).symlink_to(nanogpt / name)
    return folder


def run(command: list[str], folder: Path) -> tuple[float, str]:
    """Run a process to its end; return its seconds, start-up included, and what it printed."""
    started = time.perf_counter()
    process = subprocess.run(
        command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=900, check=False
    )
    elapsed = time.perf_counter() - started
    assert process.returncode == 0, process.stdout + process.stderr
    return elapsed, process.stdout


def run_nanogpt(nanogpt: Path, folder: Path, *, compiled: bool) -> tuple[float, float]:
    """Return the seconds of nanoGPT's process and the validation loss at its end."""
    arguments = [f"--{k}={v}" for k, v in (NANOGPT | {"compile": compiled}).items()]
    command = [sys.executable, str(nanogpt / "train.py"), "config/train_shakespeare_char.py"]
    elapsed, printed = run([*command, *arguments, "--out_dir=out"], folder)
    assert "number of parameters: 0.80M" in printed
    loss = run([sys.executable, "-c", EVALUATE, str(nanogpt)], folder)[1]
    return elapsed, float(loss.strip().splitlines()[-1])


def run_ours(folder: Path, seed: int) -> tuple[float, float]:
    """Return the seconds of our process and the validation loss at its end."""
    command = [sys.executable, "-m", "fasttrain.train", str(ROOT / "configs" / "chars.toml")]
    name = f"seed-{seed}"
    overrides = ["data.path=data/ours", f"run.seed={seed}", f"run.name={name}"]
    elapsed, _ = run([*command, *overrides], folder)
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return elapsed, [row for row in map(json.loads, lines) if row["kind"] == "eval"][-1]["val_loss"]


def test_time_to_the_loss_of_nanogpt(benchmark: Any, nanogpt: Path, work: Path) -> None:
    losses: dict[str, list[float]] = {"fasttrain": [], "nanogpt": [], "nanogpt compiled": []}
    times: dict[str, list[float]] = {name: [] for name in losses}

    def keep(name: str, result: tuple[float, float]) -> None:
        times[name].append(result[0])
        losses[name].append(result[1])

    def all_in_turn() -> None:
        # nanoGPT's seed is fixed: each form of it runs once, between the runs of ours.
        keep("fasttrain", run_ours(work, SEEDS[0]))
        keep("nanogpt", run_nanogpt(nanogpt, work, compiled=False))
        keep("fasttrain", run_ours(work, SEEDS[1]))
        keep("nanogpt compiled", run_nanogpt(nanogpt, work, compiled=True))
        keep("fasttrain", run_ours(work, SEEDS[2]))

    benchmark.pedantic(all_in_turn, rounds=1, iterations=1)
    median = {name: statistics.median(values) for name, values in times.items()}
    speedup = {name: median[name] / median["fasttrain"] for name in median if name != "fasttrain"}
    benchmark.extra_info.update(
        {"times_s": times, "median_s": median, "speedup": speedup, "val_loss": losses}
    )
    for name, values in losses.items():
        print(f"\n{name}: {median[name]:.1f} s, validation loss", *(f"{x:.4f}" for x in values))
    assert max(losses["fasttrain"]) <= min(losses["nanogpt"] + losses["nanogpt compiled"])
