"""A dataset and a config small enough to train in a second, shared by tests."""

import gc
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.config import ModelConfig, OptimConfig, ScheduleConfig, TrainConfig, load_config
from fasttrain.data.format import write_dataset_json
from fasttrain.data.tokenizer import byte_tokenizer, end_of_text_id
from fasttrain.prepare.writer import ShardWriter

ROOT = Path(__file__).parents[2]
OPTIMIZERS, SCHEDULES, MLPS = (
    next(f.metadata["choices"] for f in fields(section) if f.name == key)
    for section, key in ((OptimConfig, "name"), (ScheduleConfig, "name"), (ModelConfig, "mlp"))
)
OPTIMIZERS = [name for name in OPTIMIZERS if name != "adamw8bit"]  # which needs torchao


def wait_until(condition: Callable[[], object], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def module_of(name: str) -> Any:
    """Return the module of a command: of a package its ``__main__``."""
    module = importlib.import_module(f"fasttrain.{name}")
    is_package = hasattr(module, "__path__")
    return importlib.import_module(f"fasttrain.{name}.__main__") if is_package else module


def set_imports_aside() -> None:
    """Keep what there is out of every garbage collection to come in this process.

    A Trainer collects when it begins, for 0.2 s, most of it in torch's modules. Its own
    `gc.unfreeze` would bring them back for the next one.
    """
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def alive(pid: int) -> bool:
    """Return whether a process runs: one that waits for somebody to ask for its status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


TOY_TOML = """
[run]
seed = 7
device = "cpu"
dtype = "fp32"
compile = "off"
[model]
dim = 32
n_layers = 2
n_heads = 2
[data]
path = "{data}"
seq_len = 16
[optim]
lr = 3e-3
[schedule]
warmup_steps = 2
[train]
steps = 12
micro_batch = 4
[eval]
prompts = ["abc"]
sample_tokens = 8
[log]
every_steps = 1
"""


def write_dataset(
    folder: Path, n_train: int = 4_000, n_val: int = 500, shard_tokens: int = 10**6
) -> Path:
    """Write a byte-level dataset of words that a model can learn, and return its folder."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = end_of_text_id(tokenizer)
    assert end is not None
    rng = np.random.default_rng(0)
    words = [b"alpha ", b"beta ", b"gamma ", b"delta ", b"\n"]
    splits = {}
    for split, n in (("train", n_train), ("val", n_val)):
        text = b"".join(words[i] for i in rng.integers(0, len(words), n))[:n]
        ids = np.array([*tokenizer.encode(text.decode()).ids, end])
        writer = ShardWriter(
            folder, split, vocab_size=tokenizer.get_vocab_size(), shard_tokens=shard_tokens
        )
        writer.write(ids, [len(ids)])
        splits[split] = (writer.close(), n)
    write_dataset_json(
        folder,
        vocab_size=tokenizer.get_vocab_size(),
        end_of_text=end,
        splits=splits,
        source={"made by": "tests"},
    )
    return folder


def write_config(folder: Path, *overrides: str) -> Path:
    """Write a dataset and a config that trains on it into ``folder``; return the config's path."""
    data = folder / "data"
    if not data.exists():
        write_dataset(data)
    path = folder / "toy.toml"
    path.write_text(TOY_TOML.format(data=data), encoding="utf-8")
    assert isinstance(load_config(path, overrides), TrainConfig)
    return path


ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


started: list[subprocess.Popen[str]] = []  # ended with the test at the latest


def start(module: str, *arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start ``python -m module`` in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


def end_started() -> None:
    """Leave no process behind, whatever a test failed of: it would train on, or warn elsewhere."""
    while started:
        process = started.pop()
        process.kill()
        process.communicate()
