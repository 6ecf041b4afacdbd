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
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import comparison, rounds_within
from benchmarks.rivals import OURS
from benchmarks.subject import GPT2_CHARS, LLAMA_LIKE, ROOT, config_of
from fasttrain.config import TrainConfig, config_to_toml

PATHS = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}
LIMIT_S = 100  # of one process, which takes a fifth of it on two idle cores
# The shape, its steps, and those of them that warm up: compilation and first touches.
SHAPES = {
    "gpt2-chars": (GPT2_CHARS, 100, 20),
    # nanoGPT in fp32 at the width of a small Llama; ours is that Llama.
    "llama-256": (LLAMA_LIKE, 12, 3),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with characters of the standard library, as nanoGPT's .bin; how many there are."""
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
    return folder, len(chars)


def run(command: list[str], folder: Path) -> str:
    process = subprocess.run(
        [sys.executable, *command],
        cwd=folder, env=ENV, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if process.returncode:
        raise RuntimeError(process.stdout + process.stderr)
    return process.stdout


def run_nanogpt(folder: Path, config: TrainConfig) -> list[float]:
    """Return the milliseconds of nanoGPT's steps."""
    if not (path := os.environ.get("NANOGPT_DIR")):
        raise ImportError("NANOGPT_DIR does not name a checkout")
    peer, model = Path(path).resolve(), config.model
    for name in ("configurator.py", "config"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(peer / name)
    # Without it nanoGPT takes GPT-2's vocabulary of 50,304, which would be far more work.
    meta = pickle.dumps({"vocab_size": model.vocab_size})
    (folder / "data" / "chars" / "meta.pkl").write_bytes(meta)
    arguments = {
        "dataset": "chars", "device": "cpu", "compile": False, "log_interval": 1,
        "eval_iters": 1, "eval_interval": 10**9,
        "max_iters": config.train.steps, "lr_decay_iters": config.train.steps,
        "warmup_iters": 0,  # as many as lr_decay_iters, it divides by zero
        "dropout": 0.0, "n_layer": model.n_layers, "n_head": model.n_heads, "n_embd": model.dim,
        "block_size": config.data.seq_len, "batch_size": config.train.micro_batch,
    }  # fmt: skip
    command = [str(peer / "train.py"), "config/train_shakespeare_char.py"]
    out = run([*command, *(f"--{k}={v}" for k, v in arguments.items())], folder)
    return [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", out)]


def run_ours(folder: Path, config: TrainConfig) -> list[float]:
    """Return the milliseconds of our steps."""
    runs = folder / "runs"
    name = f"r{len(list(runs.glob('*')))}"
    (folder / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
    run(["-m", "fasttrain.train", "config.toml", f"run.name={name}"], folder)
    rows = map(json.loads, (runs / name / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row["step_ms"] for row in rows if row["kind"] == "train"]


def run_hf(folder: Path, config: TrainConfig) -> list[float]:
    """Return the milliseconds of the Trainer's steps."""
    if not all(importlib.util.find_spec(module) for module in ("transformers", "accelerate")):
        raise ImportError("transformers and accelerate are not both installed")
    sizes = {
        "dim": config.model.dim, "length": config.data.seq_len, "vocab": config.model.vocab_size,
        "rows": config.train.micro_batch, "steps": config.train.steps,
    }  # fmt: skip
    command = ["-m", "benchmarks.hf_trainer", str(folder / "data/chars/train.bin")]
    command += [f"--{key}={value}" for key, value in sizes.items()]
    command += ["--llama"] if config.model.norm == "rms" else []
    times: list[float] = json.loads(run(command, folder).splitlines()[-1])
    return times


@pytest.mark.parametrize("name", SHAPES)
def test_trainers(benchmark: Any, work: tuple[Path, int], budget_s: float, name: str) -> None:
    (folder, n_chars), (shape, n_steps, n_warm) = work, SHAPES[name]
    overrides = shape | {
        "data.path": str(folder / "data" / "chars"), "data.dtype": "uint16",
        "optim.lr": 1e-3, "optim.betas": [0.9, 0.99], "schedule.warmup_steps": n_warm,
        "run.dtype": "fp32", "train.steps": n_steps, "eval.prompts": [], "log.every_steps": 1,
    }  # fmt: skip
    config = config_of(overrides | ({"model.vocab_size": n_chars} if shape is GPT2_CHARS else {}))
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
                    step_ms = trainers[key](folder, config)
                    assert len(step_ms) >= n_steps - 1  # the Trainer's first has no beginning
                    times[key].append(statistics.median(step_ms[n_warm:]) / 1e3)
                except subprocess.TimeoutExpired:
                    left_out[key] = f"took longer than {LIMIT_S} s"
                except Exception as error:
                    if key == OURS:
                        raise
                    left_out[key] = str(error).strip().split("\n")[-1]
        if OURS in left_out:
            pytest.skip(f"{OURS} {left_out[OURS]}")

    benchmark.pedantic(all_rounds)
    figures = comparison({key: values for key, values in times.items() if key not in left_out})
    tokens = config.data.seq_len * config.train.micro_batch
    rates = {key: tokens / seconds for key, seconds in figures["median_s"].items()}
    benchmark.extra_info.update(figures, tokens_per_s=rates, left_out=left_out)
