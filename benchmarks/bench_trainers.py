"""Whole trainers side by side: fasttrain, karpathy/nanoGPT, Hugging Face's Trainer, litgpt.

nanoGPT is not part of this project: name a checkout of it in the environment variable
``NANOGPT_DIR``. The others take part where they are installed. All run as processes of their own
on the same token file, in turn; with ``--full`` in six rounds.

Steps: the times are those that each reports: nanoGPT's ``time``; our ``step_ms``, in which the
writing of its log line is not, 0.6 ms of 40, once in ten steps by default; the others' by a clock
between their steps. Two shapes: that of nanoGPT's README command for a CPU, and a small Llama's,
where nanoGPT has the same width, and its own parts. nanoGPT computes in fp32 on a CPU, eager; ours
runs as a user starts it; the others are compiled, in bf16 where the CPU multiplies it natively. On
a GPU: nanoGPT, compiled, at its shape of GPT-2.

Waiting: configs/base.toml by default settings, alone and beside two processes that keep the cores
busy, against other ways to use the threads (``--full``).

Time to a loss: that command of nanoGPT's, 2,000 steps, and ours, configs/chars.toml, from the same
tokens to the end of either recipe, and the loss of each on its whole validation split. The text is
the documentation that comes with Python; ``CHARS_TEXTS`` names other text files instead (separated
as in ``PATH``). The recipe was tuned on neither. A text takes five minutes, so that this is done
with ``--full`` alone, as are whole runs of configs/base.toml and speedrun.toml.
"""

import json
import os
import pickle
import pydoc_data.topics
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import CUDA, DEVICE, OURS, comparison, gather, run, turns
from benchmarks.steps import GPT2_CHARS, LLAMA_LIKE, NANOGPT, TINY, config_of, source_bytes
from benchmarks.store import ROOT
from fasttrain.config import TrainConfig, config_to_toml
from fasttrain.data.format import open_dataset

CONFIGS = ROOT / "configs"
NANOGPT_DIR = os.environ.get("NANOGPT_DIR", "")
FULL_ROUNDS = 6
# The shape, its steps, and those of them that warm up: compilation and first touches.
SHAPES = {
    "gpt2-chars": (GPT2_CHARS, 200, 40),
    # nanoGPT at the width of a small Llama; the others are that Llama.
    "llama-256": (LLAMA_LIKE, 30, 6),
}
if CUDA:
    SHAPES = {"gpt2-124m": (NANOGPT, 40, 20)}


def run_nanogpt(folder: Path, config: TrainConfig, **more: Any) -> str:
    """Train nanoGPT at the shape of ``config`` on ``data/chars``; return what it printed."""
    if not NANOGPT_DIR:
        raise ImportError("NANOGPT_DIR does not name a checkout of karpathy/nanoGPT")
    peer, model, steps = Path(NANOGPT_DIR).resolve(), config.model, config.train.steps
    for name in ("configurator.py", "config"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(peer / name)
    # Without it nanoGPT takes GPT-2's vocabulary of 50,304, which would be far more work.
    (folder / "data/chars/meta.pkl").write_bytes(pickle.dumps({"vocab_size": model.vocab_size}))
    arguments = more | {
        "dataset": "chars", "device": DEVICE, "log_interval": 1, "dropout": 0.0,
        "max_iters": steps, "lr_decay_iters": steps,
        "n_layer": model.n_layers, "n_head": model.n_heads, "n_embd": model.dim,
        "block_size": config.data.seq_len, "batch_size": config.train.micro_batch,
    }  # fmt: skip
    command = [str(peer / "train.py"), "config/train_shakespeare_char.py", "--out_dir=out"]
    return run(*command, *(f"--{k}={v}" for k, v in arguments.items()), cwd=folder)


def train(folder: Path, config: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Run our trainer as a process; return the rows that it logged, by their kind."""
    name = f"r{len(list(folder.glob('runs/*')))}"
    command = ("-m", "fasttrain.train", str(config), f"run.name={name}")
    run(*command, *overrides, cwd=folder, **options)
    rows: dict[str, Any] = {"train": [], "eval": []}
    for line in (folder / "runs" / name / "metrics.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["kind"], []).append(row)
    return rows


# ---- runs ----------------------------------------------------------------------------------------

# On a GPU without --full, and in a rehearsal.
SHORT = ("train.steps=400", "eval.every_steps=200", "checkpoint.every_steps=none")
TINY_RUN = (
    *("run.compile=off", "train.steps=2", "eval.every_steps=none", "eval.prompts=[]"),
    *("eval.sample_every_steps=none", "schedule.warmup_steps=0", "eval.batch_size=512"),
    *("model.dim=32", "model.n_heads=1", "data.seq_len=16", "train.micro_batch=2"),
    *("model.bigram_vocab_size=none", "train.tokens_per_step=32"),
)
OF_A_RUN = ("step_ms", "data_wait_ms", "mfu", "peak_memory_gib", "loss")


def figures_of_run(train: Sequence[Any], evals: Sequence[Any]) -> dict[str, Any]:
    """Return what the rows of a ``metrics.jsonl`` say of the run's end."""
    last, end = train[-1], ([*evals] or [{}])[-1]
    found = {"steps": last["step"], "tokens_per_s": {OURS: last["tokens_per_s"]}}
    found |= {key: last.get(key) for key in OF_A_RUN}
    return found | {key: end.get(key) for key in ("val_loss", "val_bpb")}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(name, marks=pytest.mark.figures(f"run-{name}", name=f"{name}.toml"))
        for name in ("base", "speedrun")
    ],
)
def test_run(benchmark: Any, full: bool, rehearse: bool, tmp_path: Path, config: str) -> None:
    if not (full or rehearse or CUDA):
        pytest.skip("takes four minutes: --full")
    overrides = TINY_RUN if rehearse else () if full else SHORT
    started = time.perf_counter()
    rows = benchmark.pedantic(train, args=(tmp_path, CONFIGS / f"{config}.toml", *overrides))
    wall_s = time.perf_counter() - started
    figures = figures_of_run(rows["train"], rows["eval"])
    benchmark.extra_info.update({"wall_s": wall_s} | figures)


# ---- steps ---------------------------------------------------------------------------------------


def nanogpt_ms(folder: Path, config: TrainConfig) -> list[float]:
    """Return the milliseconds of nanoGPT's steps, on a CPU as its README starts it: fp32, eager."""
    # With as many warmup_iters as lr_decay_iters, it divides by zero.
    options = {"compile": CUDA, "eval_iters": 1, "eval_interval": 10**9, "warmup_iters": 0}
    out = run_nanogpt(folder, config, **options)
    return [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", out)]


def our_ms(folder: Path, config: TrainConfig) -> list[float]:
    """Return the milliseconds of our steps, as a user starts it."""
    return [row["step_ms"] for row in train(folder, folder / "config.toml")["train"]]


def peer_ms(name: str, folder: Path, config: TrainConfig) -> list[float]:
    """Return the milliseconds of the steps of a peer in Python: see peers.py."""
    printed = run("-m", "benchmarks.peers", name, "config.toml", cwd=folder)
    times: list[float] = json.loads(printed.splitlines()[-1])
    return times


@pytest.mark.parametrize("name", SHAPES)
def test_trainers(benchmark: Any, tmp_path: Path, full: bool, rehearse: bool, name: str) -> None:
    shape, n_steps, n_warm = SHAPES[name]
    if rehearse:
        shape, n_steps, n_warm = shape | TINY, 3, 0
    text = source_bytes(60)  # its characters, as nanoGPT's .bin
    chars, tokens = np.unique(text[text < 128], return_inverse=True)
    data = tmp_path / "data" / "chars"
    data.mkdir(parents=True)
    train, val = np.split(tokens.astype(np.uint16), [int(0.99 * len(tokens))])
    train.tofile(data / "train.bin")
    val.tofile(data / "val.bin")
    overrides = shape | {
        "data.path": str(data), "data.dtype": "uint16",
        "optim.lr": 1e-3, "optim.betas": [0.9, 0.99], "schedule.warmup_steps": n_warm,
        "train.steps": n_steps, "eval.prompts": [], "log.every_steps": 1,
    }  # fmt: skip
    if shape is GPT2_CHARS:
        overrides |= {"model.vocab_size": len(chars)}
    config = config_of(overrides)
    (tmp_path / "config.toml").write_text(config_to_toml(config), "utf-8")

    def step_s(step_ms: Callable[..., list[float]]) -> float:
        times = step_ms(tmp_path, config)
        assert len(times) >= n_steps - 1
        return statistics.median(times[n_warm:]) / 1e3

    ways = {OURS: our_ms, "nanoGPT": nanogpt_ms}
    if not CUDA:
        ways |= {peer: partial(peer_ms, peer) for peer in ("HF Trainer", "litgpt")}
    makers = {key: partial(partial, step_s, way) for key, way in ways.items()}
    rivals, left_out = gather(makers, lambda _, call: call())  # compiled once, kept on disk
    if len(rivals) == 1:
        pytest.skip("; ".join(left_out.values()))
    n_rounds = FULL_ROUNDS if full else 1
    times = benchmark.pedantic(turns, args=(rivals, range(n_rounds)))
    n_tokens = config.data.seq_len * config.train.micro_batch
    benchmark.extra_info.update(comparison(times, tokens_per_s=n_tokens), left_out=left_out)


# ---- beside other processes ----------------------------------------------------------------------

GCC = {"GOMP_SPINCOUNT": "300000"}  # its own default: fasttrain/command.py sets another
# How many busy processes there are, and other ways to wait: an environment and overrides.
WAITING: dict[str, tuple[int, dict[str, tuple[dict[str, str], tuple[str, ...]]]]] = {
    "alone": (0, {"GCC's spinning": (GCC, ())}),
    "beside two busy processes": (
        2,
        {"one thread": ({}, ("run.threads=1",)), "passive": ({"OMP_WAIT_POLICY": "passive"}, ())},
    ),
}
BUSY_RUN = (
    *("train.steps=200", "eval.every_steps=none", "eval.prompts=[]", "checkpoint.every_steps=none"),
    "eval.sample_every_steps=none",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.figures("busy", name=name)) for name in WAITING],
)
def test_busy(benchmark: Any, full: bool, rehearse: bool, tmp_path: Path, name: str) -> None:
    if CUDA or not (full or rehearse):
        pytest.skip("takes ten minutes on a CPU: --full")
    n_busy, others = WAITING[name]
    length = TINY_RUN if rehearse else BUSY_RUN

    def step_s(env: dict[str, str], overrides: tuple[str, ...]) -> float:
        rows = train(tmp_path, CONFIGS / "base.toml", *length, *overrides, env=env)["train"]
        return statistics.mean(row["step_ms"] for row in rows[len(rows) // 10 :]) / 1e3

    step_s({}, ("train.steps=2",))  # makes the dataset, and compiles
    calls = {key: partial(step_s, *way) for key, way in {OURS: ({}, ()), **others}.items()}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_busy)]
    try:
        n_rounds = 1 if rehearse else FULL_ROUNDS
        times = benchmark.pedantic(turns, args=(calls, range(n_rounds)))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    figures = comparison(times, tokens_per_s=2048)
    share = min(1.0, *figures["speedup"].values())
    benchmark.extra_info.update(figures, share_of_best=share)


# ---- time to a loss ------------------------------------------------------------------------------

SEEDS = (1, 2, 3)
TEXTS = [Path(name) for name in os.environ.get("CHARS_TEXTS", "").split(os.pathsep) if name]
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


def prepare_text(folder: Path, text: Path | None) -> int:
    """Write a text as our dataset and as nanoGPT's; return the size of its vocabulary."""
    if text is None:
        topics = pydoc_data.topics.topics
        (folder / "text.txt").write_text("\n".join(topics[k] for k in sorted(topics)), "utf-8")
    else:
        shutil.copyfile(text, folder / "text.txt")
    arguments = ["data/ours", "--input", "text.txt", "--tokenizer", "chars", "--val-fraction=0.1"]
    run("-m", "fasttrain.prepare", *arguments, cwd=folder)
    (folder / "data" / "chars").mkdir()
    for split in ("train", "val"):
        dataset = open_dataset(folder / "data" / "ours", split, cache_dir=folder / "cache")
        dataset.read(0, dataset.n_tokens).tofile(folder / "data" / "chars" / f"{split}.bin")
    return dataset.vocab_size


@pytest.mark.figures("chars")
@pytest.mark.parametrize("text", TEXTS or [None], ids=lambda text: text.stem if text else "")
def test_time_to_the_loss_of_nanogpt(
    benchmark: Any, full: bool, tmp_path: Path, text: Path | None
) -> None:
    if not full:
        pytest.skip("takes five minutes for each text: --full")
    if not NANOGPT_DIR:
        pytest.skip("NANOGPT_DIR does not name a checkout of karpathy/nanoGPT")
    vocab = {"model.vocab_size": prepare_text(tmp_path, text), "train.steps": 2000}
    config = config_of(GPT2_CHARS | vocab)
    losses: dict[str, list[float]] = {OURS: [], "nanogpt": [], "nanogpt compiled": []}
    times: dict[str, list[float]] = {name: [] for name in losses}

    def ours(seed: int) -> None:
        overrides = ("data.path=data/ours", f"run.seed={seed}")
        started = time.perf_counter()
        rows = train(tmp_path, CONFIGS / "chars.toml", *overrides)
        times[OURS].append(time.perf_counter() - started)
        losses[OURS].append(rows["eval"][-1]["val_loss"])

    def theirs(name: str, *, compiled: bool) -> None:
        # The checkpoint is written also where its own estimate of the loss did not improve.
        options = {"compile": compiled, "eval_iters": 20, "always_save_checkpoint": True}
        started = time.perf_counter()
        printed = run_nanogpt(tmp_path, config, **options)
        times[name].append(time.perf_counter() - started)
        assert "number of parameters: 0.80M" in printed
        printed = run("-c", EVALUATE, str(Path(NANOGPT_DIR).resolve()), cwd=tmp_path)
        losses[name].append(float(printed.strip().splitlines()[-1]))

    def all_in_turn() -> None:
        # nanoGPT's seed is fixed: each form of it runs once, between the runs of ours.
        ours(SEEDS[0])
        theirs("nanogpt", compiled=False)
        ours(SEEDS[1])
        theirs("nanogpt compiled", compiled=True)
        ours(SEEDS[2])

    benchmark.pedantic(all_in_turn, rounds=1, iterations=1)
    median = {name: statistics.median(values) for name, values in times.items()}
    speedup = {name: s / median[OURS] for name, s in median.items() if name != OURS}
    benchmark.extra_info.update(times_s=times, median_s=median, speedup=speedup, val_loss=losses)
    assert max(losses[OURS]) <= min(losses["nanogpt"] + losses["nanogpt compiled"])
