"""Whole trainers as processes: fasttrain, karpathy/nanoGPT, Hugging Face's Trainer, litgpt.

``NANOGPT_DIR`` names a checkout of nanoGPT; the others take part where they are installed. What is
measured how: docs/benchmarks.md.
"""

import json
import os
import pickle
import pydoc_data.topics
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bench_step import BASE, GPT2, GPT2_CHARS, LLAMA_LIKE, config_of, shape
from benchmarks.harness import CUDA, DEVICE, ENV, OURS, ROOT, gather, run, slug
from fasttrain.config import TrainConfig, config_to_toml
from fasttrain.data.format import open_dataset
from fasttrain.report.page import Run, read_run

CONFIGS = ROOT / "configs"
NANOGPT_DIR = os.environ.get("NANOGPT_DIR", "")
ROUNDS = 6  # with --full
# The shape, its steps, and those of them that warm up: compilation and first touches.
SHAPES = {
    "gpt2-chars": (GPT2_CHARS, 200, 40),
    "llama-256": (LLAMA_LIKE, 30, 6),
}
if CUDA:
    SHAPES = {"gpt2-124m": (GPT2 | shape(768, 12, 12, 50304, 1024, 12), 40, 20)}
# What stands in for them in a rehearsal.
TINY = shape(64, 2, 2, 512, 32, 2) | {"run.compile": "off", "run.dtype": "fp32"}


def run_nanogpt(folder: Path, config: TrainConfig, **more: Any) -> str:
    """Train nanoGPT at the shape of ``config`` on ``data/chars``; return what it printed."""
    if not NANOGPT_DIR:
        raise ImportError("NANOGPT_DIR does not name a checkout of karpathy/nanoGPT")
    data, model, steps = folder / "data/chars", config.model, config.train.steps
    # Without it nanoGPT takes GPT-2's vocabulary of 50,304, which would be far more work.
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": model.vocab_size}))
    arguments = more | {
        "dataset": data, "out_dir": folder / "out", "device": DEVICE, "log_interval": 1,
        "max_iters": steps, "lr_decay_iters": steps, "dropout": 0.0,
        "n_layer": model.n_layers, "n_head": model.n_heads, "n_embd": model.dim,
        "block_size": config.data.seq_len, "batch_size": config.train.micro_batch,
    }  # fmt: skip
    options = (f"--{key}={value}" for key, value in arguments.items())
    return run("train.py", "config/train_shakespeare_char.py", *options, cwd=Path(NANOGPT_DIR))


def train(folder: Path, config: Path, *overrides: str, **options: Any) -> Run:
    """Run our trainer as a process; return what it logged."""
    name = f"r{len(list(folder.glob('runs/*')))}"
    command = ("-m", "fasttrain.train", str(config), f"run.name={name}")
    run(*command, *overrides, cwd=folder, **options)
    return read_run(folder / "runs" / name)


def prepare_text(folder: Path, text: Path | None = None) -> int:
    """Write a text's characters, by default Python's documentation; return how many there are."""
    topics = pydoc_data.topics.topics
    characters = text.read_text("utf-8") if text else "\n".join(topics[k] for k in sorted(topics))
    (folder / "text.txt").write_text(characters, "utf-8")
    arguments = ["data/ours", "--input", "text.txt", "--tokenizer", "chars", "--val-fraction=0.1"]
    run("-m", "fasttrain.prepare", *arguments, cwd=folder)
    (folder / "data" / "chars").mkdir()
    for split in ("train", "val"):
        dataset = open_dataset(folder / "data" / "ours", split, cache_dir=folder / "cache")
        dataset.read(0, dataset.n_tokens).tofile(folder / "data" / "chars" / f"{split}.bin")
    return dataset.vocab_size


def clocked(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[float, Any]:
    """Return the seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    found = call(*args, **options)
    return time.perf_counter() - started, found


def suites(*names: str, suite: str) -> Any:
    """Return parameters with the suite and the name of their figures."""
    found = ((name, suite.format(slug(name.removesuffix(".toml")))) for name in names)
    return [pytest.param(k, marks=pytest.mark.figures(s, name=k), id=k) for k, s in found]


ALONE = (
    *("eval.every_steps=none", "eval.prompts=[]", "eval.sample_every_steps=none"),
    *("checkpoint.every_steps=none", "schedule.warmup_steps=0"),
)
# Large configs on a GPU: one micro-batch a step.
STEPS = ("train.steps=40", "train.tokens_per_step=none", "data.dtype=uint32", *ALONE)
RUNS = {
    "base.toml": (),
    "speedrun.toml": (),
    "gpt2-124m bf16": (*STEPS, "run.dtype=bf16"),
    "llama-1b bf16": (*STEPS, "run.dtype=bf16"),
    "llama-1b fp8": (*STEPS, "run.fp8=true"),
}
TINY_RUN = (
    *("run.compile=off", "train.steps=2", "eval.batch_size=512"),
    *("model.dim=32", "model.n_heads=1", "data.seq_len=16", "train.micro_batch=2"),
    *("model.bigram_vocab_size=none", "train.tokens_per_step=32", *ALONE),
)
SMALL = ("model.n_kv_heads=none", "model.hidden_dim=128", "model.vocab_size=512", "run.fp8=false")
OF_THE_END = ("tokens_per_s", "step_ms", "data_wait_ms", "mfu", "peak_memory_gib", "loss")


def figures_of_run(train: Sequence[Any], evals: Sequence[Any]) -> dict[str, Any]:
    """Return what the rows of a ``metrics.jsonl`` say of the run's end."""
    last, end = train[-1], ([*evals] or [{}])[-1]
    found = {"steps": last["step"]} | {key: last.get(key) for key in OF_THE_END}
    return found | {key: end.get(key) for key in ("val_loss", "val_bpb")}


@pytest.mark.parametrize("name", suites(*RUNS, suite="run-{}"))
def test_run(benchmark: Any, full: bool, rehearse: bool, tmp_path: Path, name: str) -> None:
    config, *large = name.removesuffix(".toml").split()
    if not (rehearse or CUDA or (full and not large)):
        pytest.skip("needs a CUDA device" if large else "takes four minutes: --full")
    overrides = RUNS[name]
    if large:
        for split in ("train", "val"):  # random tokens
            ids = np.random.default_rng(0).integers(512, size=500_000, dtype=np.uint32)
            ids.tofile(tmp_path / f"{split}.bin")
        overrides += (f"data.path={tmp_path}",)
    if rehearse:
        overrides += (*TINY_RUN, *SMALL) if large else TINY_RUN
    arguments = (train, tmp_path, CONFIGS / f"{config}.toml", *overrides)
    wall_s, made = benchmark.pedantic(clocked, args=arguments)
    benchmark.extra_info.update({"wall_s": wall_s} | figures_of_run(made.train, made.evals))


@pytest.mark.figures("startup")
def test_first_step(compare: Any, tmp_path: Path) -> None:
    options = ("run.compile=off", f"run.out_dir={tmp_path}", "log.every_steps=1")
    command = [sys.executable, "-m", "fasttrain.train", str(BASE), *options]

    def first_step_s() -> float:
        started = time.perf_counter()
        with subprocess.Popen(command, env=os.environ | ENV, stdout=subprocess.PIPE) as process:
            assert any(line.split()[:2] == [b"step", b"1"] for line in process.stdout or ())
            took_s = time.perf_counter() - started
            process.kill()
        return took_s

    first_step_s()  # makes the dataset where it is not cached
    figures = compare({OURS: first_step_s}, rounds=range(3))
    figures["first_step_s"] = figures["median_s"][OURS]


@pytest.mark.parametrize("name", SHAPES)
def test_trainers(compare: Any, tmp_path: Path, full: bool, rehearse: bool, name: str) -> None:
    sizes, n_steps, n_warm = SHAPES[name]
    if rehearse:
        sizes, n_steps, n_warm = sizes | TINY, 3, 0
    n_chars = prepare_text(tmp_path)
    overrides = sizes | {
        "data.path": str(tmp_path / "data/chars"), "data.dtype": "uint16",
        "optim.lr": 1e-3, "optim.betas": [0.9, 0.99], "schedule.warmup_steps": n_warm,
        "train.steps": n_steps, "eval.prompts": [], "log.every_steps": 1,
    }  # fmt: skip
    if sizes is GPT2_CHARS:
        overrides |= {"model.vocab_size": n_chars}
    config = config_of(overrides)
    (tmp_path / "config.toml").write_text(config_to_toml(config), "utf-8")

    def ours() -> list[float]:  # as a user starts it
        return [row["step_ms"] for row in train(tmp_path, tmp_path / "config.toml").train]

    def nanogpt() -> list[float]:  # on a CPU as its README starts it: fp32, eager
        # With as many warmup_iters as lr_decay_iters, it divides by zero.
        options = {"compile": CUDA, "eval_iters": 1, "eval_interval": 10**9, "warmup_iters": 0}
        printed = run_nanogpt(tmp_path, config, **options)
        return [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", printed)]

    def peer(name: str) -> Any:
        printed = run("-m", "benchmarks.peers", name, "config.toml", cwd=tmp_path)
        return json.loads(printed.splitlines()[-1])

    def maker(step_ms: Callable[[], list[float]]) -> Callable[[], float]:
        def step_s() -> float:
            times = step_ms()
            assert len(times) >= n_steps - 1
            return statistics.median(times[n_warm:]) / 1e3

        step_s()  # compiled once, kept on disk
        return step_s

    ways = {OURS: ours, "nanoGPT": nanogpt}
    if not CUDA:
        ways |= {name: partial(peer, name) for name in ("HF Trainer", "litgpt")}
    calls, left_out = gather({name: partial(maker, way) for name, way in ways.items()})
    if len(calls) == 1:
        pytest.skip("; ".join(left_out.values()))
    per_call = {"tokens_per_s": config.data.seq_len * config.train.micro_batch}
    rounds = range(ROUNDS if full else 1)
    compare(calls, rounds=rounds, left_out=left_out, per_call=per_call)


GCC = {"GOMP_SPINCOUNT": "300000"}  # its own default: fasttrain/command.py sets another
OTHERS = {"one thread": ({}, "run.threads=1"), "passive": ({"OMP_WAIT_POLICY": "passive"},)}
# How many busy processes there are, and other settings: an environment and overrides.
WAITING: Any = {
    "alone": (0, {"GCC's spinning": (GCC,)}),
    "beside one busy process": (1, OTHERS),
    "beside two busy processes": (2, OTHERS),
}


@pytest.mark.parametrize("name", suites(*WAITING, suite="busy"))
def test_busy(compare: Any, full: bool, rehearse: bool, tmp_path: Path, name: str) -> None:
    if CUDA or not (full or rehearse):
        pytest.skip("takes ten minutes on a CPU: --full")
    n_busy, others = WAITING[name]
    length = TINY_RUN if rehearse else ("train.steps=200", *ALONE)

    def step_s(env: dict[str, str], *overrides: str) -> float:
        rows = train(tmp_path, BASE, *length, *overrides, env=env).train
        return statistics.mean(row["step_ms"] for row in rows[len(rows) // 10 :]) / 1e3

    step_s({}, "train.steps=2")  # makes the dataset, and compiles
    calls = {key: partial(step_s, *way) for key, way in {OURS: ({},), **others}.items()}
    with ExitStack() as busy:
        for _ in range(n_busy):
            process = busy.enter_context(subprocess.Popen([sys.executable, "-c", "while 1: pass"]))
            busy.callback(process.kill)
        figures = compare(calls, rounds=range(ROUNDS), per_call={"tokens_per_s": 2048})
    figures["share_of_best"] = min(1.0, *figures["speedup"].values())


TEXTS = [Path(name) for name in os.environ.get("CHARS_TEXTS", "").split(os.pathsep) if name]


@pytest.mark.figures("chars")
@pytest.mark.parametrize("text", TEXTS or [None], ids=lambda text: text.stem if text else "")
def test_time_to_the_loss_of_nanogpt(compare: Any, full: bool, tmp_path: Path, text: Any) -> None:
    if not full:
        pytest.skip("takes ten minutes for each text: --full")
    if not NANOGPT_DIR:
        pytest.skip("NANOGPT_DIR does not name a checkout of karpathy/nanoGPT")
    vocab = {"model.vocab_size": prepare_text(tmp_path, text), "train.steps": 2000}
    config = config_of(GPT2_CHARS | vocab)
    losses: dict[str, list[float]] = {OURS: [], "nanogpt": [], "nanogpt compiled": []}

    def ours() -> float:
        overrides = ("data.path=data/ours", f"run.seed={len(losses[OURS]) + 1}")
        took_s, made = clocked(train, tmp_path, CONFIGS / "chars.toml", *overrides)
        losses[OURS].append(made.evals[-1]["val_loss"])
        return took_s

    def theirs(name: str) -> float:
        # The checkpoint is written also where its own estimate of the loss did not improve.
        options = {"compile": name != "nanogpt", "eval_iters": 20, "always_save_checkpoint": True}
        took_s, printed = clocked(run_nanogpt, tmp_path, config, **options)
        assert "number of parameters: 0.80M" in printed
        # From its checkpoint, on random windows 16 times as long as the validation split.
        options = {"init_from": "resume", "eval_iters": 1000, "compile": False}
        printed = run_nanogpt(tmp_path, config, **options)
        losses[name] += map(float, re.findall(r"step 2000: .* val loss ([\d.]+)", printed))
        return took_s

    ways = {name: partial(theirs, name) for name in ("nanogpt", "nanogpt compiled")}
    compare({OURS: ours} | ways, rounds=range(3))["val_loss"] = losses
    assert max(losses[OURS]) <= min(losses["nanogpt"] + losses["nanogpt compiled"])
