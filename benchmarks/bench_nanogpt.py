"""Training speed against karpathy/nanoGPT, on the shape of its README's CPU command.

nanoGPT is not part of this project: name a checkout of it in the environment variable
``NANOGPT_DIR``. Both trainers run as whole processes on the same character-level token file, in
turn, A B A B …, and each reports its own time per step (nanoGPT's ``time``, our ``step_ms``).
"""

import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
N_STEPS = 300
N_WARM = 50  # compilation and first touches
ROUNDS = 3
SHAPE = {"block_size": 64, "batch_size": 12, "n_layer": 4, "n_head": 4, "n_embd": 128}
TOKENS = SHAPE["block_size"] * SHAPE["batch_size"]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}

CONFIG = """
[model]
vocab_size = {vocab}
dim = 128
n_layers = 4
n_heads = 4
mlp = "gelu"
norm = "layer"
positions = "learned"
tied_embeddings = true
[data]
path = "{data}"
dtype = "uint16"
seq_len = 64
[optim]
lr = 1e-3
betas = [0.9, 0.99]
[schedule]
warmup_steps = 100
[train]
steps = {steps}
micro_batch = 12
[eval]
prompts = []
[log]
every_steps = 1
"""


@pytest.fixture(scope="module")
def nanogpt() -> Path:
    path = os.environ.get("NANOGPT_DIR")
    if not path:
        pytest.skip("NANOGPT_DIR does not name a checkout of karpathy/nanoGPT")
    return Path(path).resolve()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, nanogpt: Path) -> Path:
    """A folder in which both run: characters of the standard library, as nanoGPT's .bin."""
    folder = tmp_path_factory.mktemp("nanogpt")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    text = "".join(p.read_text(encoding="utf-8", errors="ignore") for p in sources)
    text = "".join(c for c in text if ord(c) < 128)
    chars = sorted(set(text))
    table = np.zeros(128, dtype=np.uint16)
    table[[ord(c) for c in chars]] = np.arange(len(chars))
    tokens = table[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]
    data = folder / "data" / "chars"
    data.mkdir(parents=True)
    tokens[: int(0.99 * len(tokens))].tofile(data / "train.bin")
    tokens[int(0.99 * len(tokens)) :].tofile(data / "val.bin")
    # Without it nanoGPT takes GPT-2's vocabulary of 50,304, which would be eight times the work.
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars)}))
    (folder / "configurator.py").symlink_to(nanogpt / "configurator.py")
    (folder / "config").symlink_to(nanogpt / "config")
    toml = CONFIG.format(vocab=len(chars), data=data, steps=N_STEPS)
    (folder / "same.toml").write_text(toml, encoding="utf-8")
    return folder


def run(command: list[str], folder: Path) -> str:
    process = subprocess.run(
        command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def run_nanogpt(nanogpt: Path, folder: Path) -> float:
    """Return nanoGPT's median tokens a second."""
    arguments = {
        "dataset": "chars",
        "device": "cpu",
        "compile": False,
        "eval_iters": 1,
        "eval_interval": 10**9,
        "log_interval": 1,
        "max_iters": N_STEPS,
        "lr_decay_iters": N_STEPS,
        "dropout": 0.0,
        **SHAPE,
    }
    command = [sys.executable, str(nanogpt / "train.py"), "config/train_shakespeare_char.py"]
    out = run([*command, *(f"--{k}={v}" for k, v in arguments.items())], folder)
    times = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", out)]
    assert len(times) >= N_STEPS
    return 1000 * TOKENS / statistics.median(times[N_WARM:])


def run_ours(folder: Path) -> float:
    """Return our median tokens a second."""
    existing = len(list((folder / "runs").glob("*"))) if (folder / "runs").exists() else 0
    run([sys.executable, "-m", "fasttrain.train", "same.toml", f"run.name=r{existing}"], folder)
    lines = (folder / f"runs/r{existing}/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    times = [row["step_ms"] for row in rows if row["kind"] == "train"]
    assert len(times) == N_STEPS
    return 1000 * TOKENS / statistics.median(times[N_WARM:])


def test_training_step_against_nanogpt(benchmark: Any, nanogpt: Path, work: Path) -> None:
    ours, theirs = [], []

    def one_round() -> None:
        theirs.append(run_nanogpt(nanogpt, work))
        ours.append(run_ours(work))

    benchmark.pedantic(one_round, rounds=ROUNDS, iterations=1)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    benchmark.extra_info["fasttrain_tokens_per_s"] = statistics.median(ours)
    benchmark.extra_info["nanogpt_tokens_per_s"] = statistics.median(theirs)
    benchmark.extra_info["ratio"] = statistics.median(ratios)
    print(
        f"\nfasttrain {statistics.median(ours):,.0f} tokens/s, "
        f"nanoGPT {statistics.median(theirs):,.0f} tokens/s, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    assert statistics.median(ratios) > 1.0
