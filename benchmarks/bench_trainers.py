"""Whole trainers side by side: fasttrain, karpathy/nanoGPT, Hugging Face's Trainer.

nanoGPT is not part of this project: name a checkout of it in the environment variable
``NANOGPT_DIR``. The Trainer takes part where transformers and accelerate are installed. All run as
processes of their own on the same token file, in turn, A B C A B C …, and the times of a step are
those that each reports: nanoGPT's ``time``; our ``step_ms``, in which the writing of its log line
is not, 0.6 ms of 40, once in ten steps by default; the Trainer's by a callback. Two shapes, in
fp32: that of nanoGPT's README command for a CPU, and a small Llama's, where nanoGPT has the same
width, and its own parts.
"""

import importlib.util
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks.measure import comparison, rounds_within
from benchmarks.rivals import OURS

ROOT = Path(__file__).parent.parent
PATHS = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}


LIMIT_S = 100  # of one process, which takes a fifth of it on two idle cores


class Shape(NamedTuple):
    """A model and a batch, and how many steps are timed after those that warm up."""

    n_embd: int
    block_size: int
    batch_size: int
    vocab_size: int | None  # None: as many as there are characters
    model: str  # ours, in TOML
    n_steps: int
    n_warm: int  # compilation and first touches


GPT2 = """
mlp = "gelu"
norm = "layer"
positions = "learned"
tied_embeddings = true
"""
SHAPES = {
    "gpt2-chars": Shape(128, 64, 12, None, GPT2, 100, 20),
    # nanoGPT in fp32 at the width of a small Llama; ours is that Llama.
    "llama-256": Shape(256, 256, 8, 4096, "", 12, 3),
}

CONFIG = """
[model]
vocab_size = {vocab}
dim = {shape.n_embd}
n_layers = 4
n_heads = 4
{shape.model}
[data]
path = "{data}"
dtype = "uint16"
seq_len = {shape.block_size}
[optim]
lr = 1e-3
betas = [0.9, 0.99]
[schedule]
warmup_steps = {shape.n_warm}
[train]
steps = {shape.n_steps}
micro_batch = {shape.batch_size}
[eval]
prompts = []
[log]
every_steps = 1
"""


def nanogpt() -> Path | None:
    path = os.environ.get("NANOGPT_DIR")
    return Path(path).resolve() if path else None


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all run: characters of the standard library, as nanoGPT's .bin."""
    folder = tmp_path_factory.mktemp("trainers")
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
    if (peer := nanogpt()) is not None:
        (folder / "configurator.py").symlink_to(peer / "configurator.py")
        (folder / "config").symlink_to(peer / "config")
    for name, shape in SHAPES.items():
        vocab = shape.vocab_size or len(chars)
        toml = CONFIG.format(vocab=vocab, data=data, shape=shape)
        (folder / f"{name}.toml").write_text(toml, encoding="utf-8")
        (folder / f"{name}.vocab").write_text(str(vocab), "utf-8")
        # Without it nanoGPT takes GPT-2's vocabulary of 50,304, which would be far more work.
        (folder / f"{name}.pkl").write_bytes(pickle.dumps({"vocab_size": vocab}))
    return folder


def run(command: list[str], folder: Path) -> str:
    process = subprocess.run(
        command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_nanogpt(folder: Path, name: str) -> float:
    """Return nanoGPT's median seconds of a step."""
    shape, peer = SHAPES[name], nanogpt()
    if peer is None:
        raise ImportError("NANOGPT_DIR does not name a checkout")
    shutil.copyfile(folder / f"{name}.pkl", folder / "data" / "chars" / "meta.pkl")
    arguments = {
        "dataset": "chars",
        "device": "cpu",
        "compile": False,
        "eval_iters": 1,
        "eval_interval": 10**9,
        "log_interval": 1,
        "max_iters": shape.n_steps,
        "lr_decay_iters": shape.n_steps,
        "warmup_iters": 0,  # as many as lr_decay_iters, it divides by zero
        "dropout": 0.0,
        "block_size": shape.block_size,
        "batch_size": shape.batch_size,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": shape.n_embd,
    }
    command = [sys.executable, str(peer / "train.py"), "config/train_shakespeare_char.py"]
    out = run([*command, *(f"--{k}={v}" for k, v in arguments.items())], folder)
    times = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", out)]
    assert len(times) >= shape.n_steps
    return statistics.median(times[shape.n_warm :]) / 1e3


def run_ours(folder: Path, name: str) -> float:
    """Return our median seconds of a step."""
    shape = SHAPES[name]
    runs = folder / "runs"
    run_name = f"r{len(list(runs.glob('*'))) if runs.exists() else 0}"
    run([sys.executable, "-m", "fasttrain.train", f"{name}.toml", f"run.name={run_name}"], folder)
    lines = (runs / run_name / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    times = [row["step_ms"] for row in rows if row["kind"] == "train"]
    assert len(times) == shape.n_steps
    return statistics.median(times[shape.n_warm :]) / 1e3


def run_hf(folder: Path, name: str) -> float:
    """Return the Trainer's median seconds of a step."""
    if not all(importlib.util.find_spec(module) for module in ("transformers", "accelerate")):
        raise ImportError("transformers and accelerate are not both installed")
    shape = SHAPES[name]
    vocab = (folder / f"{name}.vocab").read_text("utf-8")
    command = [sys.executable, "-m", "benchmarks.hf_trainer", str(folder / "data/chars/train.bin")]
    sizes = {"dim": shape.n_embd, "length": shape.block_size, "rows": shape.batch_size}
    sizes |= {"vocab": vocab, "steps": shape.n_steps}
    command += [f"--{key}={value}" for key, value in sizes.items()]
    command += ["--llama"] if shape.model != GPT2 else []
    times: list[float] = json.loads(run(command, folder).splitlines()[-1])
    return statistics.median(times[shape.n_warm :]) / 1e3


@pytest.mark.parametrize("name", SHAPES)
def test_trainers(benchmark: Any, work: Path, budget_s: float, name: str) -> None:
    # As each is started by default: compiled, nanoGPT is in bench_chars.py and plain torch in
    # bench_step.py.
    trainers = {"nanoGPT": run_nanogpt, "HF Trainer": run_hf, OURS: run_ours}
    times: dict[str, list[float]] = {key: [] for key in (OURS, *trainers)}
    left_out: dict[str, str] = {}

    def all_rounds() -> None:
        for _ in rounds_within(6 * budget_s):  # a round takes a minute, most of it to start them
            for key in [key for key in trainers if key not in left_out]:
                if len(left_out) == len(trainers) - 1:
                    pytest.skip("; ".join(left_out.values()))
                try:
                    times[key].append(trainers[key](work, name))
                except subprocess.TimeoutExpired:
                    left_out[key] = f"took longer than {LIMIT_S} s"
                except Exception as error:
                    if key == OURS:
                        raise
                    left_out[key] = str(error).split("\n")[0]
        if OURS in left_out:
            pytest.skip(f"{OURS} {left_out[OURS]}")

    benchmark.pedantic(all_rounds)
    figures = comparison({key: values for key, values in times.items() if key not in left_out})
    tokens = SHAPES[name].block_size * SHAPES[name].batch_size
    rates = {key: tokens / seconds for key, seconds in figures["median_s"].items()}
    benchmark.extra_info.update(figures, tokens_per_s=rates, left_out=left_out)
