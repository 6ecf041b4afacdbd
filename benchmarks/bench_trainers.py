"""Whole trainers side by side: fasttrain, karpathy/nanoGPT, Hugging Face's Trainer.

nanoGPT is not part of this project: name a checkout of it in the environment variable
``NANOGPT_DIR``. The Trainer takes part where transformers and accelerate are installed. All run as
processes of their own on the same token file, in turn.

Steps: the times are those that each reports: nanoGPT's ``time``; our ``step_ms``, in which the
writing of its log line is not, 0.6 ms of 40, once in ten steps by default; the Trainer's by a
callback. Two shapes, in fp32: that of nanoGPT's README command for a CPU, and a small Llama's,
where nanoGPT has the same width, and its own parts.

Time to a loss: that command of nanoGPT's, 2,000 steps, and ours, configs/chars.toml, from the same
tokens to the end of either recipe, and the loss of each on its whole validation split. The text is
the documentation that comes with Python; ``CHARS_TEXTS`` names other text files instead (separated
as in ``PATH``). The recipe was tuned on neither. A text takes five minutes, so that this is done
with ``--full`` alone, as are whole runs of configs/base.toml and speedrun.toml.
"""

import importlib.util
import json
import os
import pickle
import pydoc_data.topics
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import CUDA, OURS, comparison, rounds_within, run
from benchmarks.steps import GPT2_CHARS, LLAMA_LIKE, config_of, source_bytes
from benchmarks.store import ROOT
from fasttrain.config import TrainConfig, config_to_toml
from fasttrain.data.format import open_dataset

NANOGPT_DIR = os.environ.get("NANOGPT_DIR", "")
LIMIT_S = 100.0  # of a process of some steps, which takes a fifth of it on two idle cores
# The shape, its steps, and those of them that warm up: compilation and first touches.
SHAPES = {
    "gpt2-chars": (GPT2_CHARS, 100, 20),
    # nanoGPT in fp32 at the width of a small Llama; ours is that Llama.
    "llama-256": (LLAMA_LIKE, 12, 3),
}


def run_nanogpt(folder: Path, config: TrainConfig, limit_s: float = LIMIT_S, **more: Any) -> str:
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
        "dataset": "chars", "device": "cpu", "log_interval": 1, "dropout": 0.0,
        "max_iters": steps, "lr_decay_iters": steps,
        "n_layer": model.n_layers, "n_head": model.n_heads, "n_embd": model.dim,
        "block_size": config.data.seq_len, "batch_size": config.train.micro_batch,
    }  # fmt: skip
    command = [str(peer / "train.py"), "config/train_shakespeare_char.py", "--out_dir=out"]
    return run(*command, *(f"--{k}={v}" for k, v in arguments.items()), cwd=folder, limit_s=limit_s)


def rows_of(folder: Path, name: str, kind: str) -> list[dict[str, Any]]:
    """Return the rows of a kind that our run of that name has logged."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


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
    command = ["-m", "fasttrain.train", str(ROOT / "configs" / f"{config}.toml"), *overrides]
    started = time.perf_counter()
    benchmark.pedantic(run, args=(*command, "run.name=run"), kwargs={"cwd": tmp_path}, rounds=1)
    wall_s = time.perf_counter() - started
    rows = (rows_of(tmp_path, "run", kind) for kind in ("train", "eval"))
    benchmark.extra_info.update({"wall_s": wall_s} | figures_of_run(*rows))


# ---- steps ---------------------------------------------------------------------------------------


def nanogpt_ms(folder: Path, config: TrainConfig) -> list[float]:
    """Return the milliseconds of nanoGPT's steps."""
    # With as many warmup_iters as lr_decay_iters, it divides by zero.
    options = {"compile": False, "eval_iters": 1, "eval_interval": 10**9, "warmup_iters": 0}
    out = run_nanogpt(folder, config, **options)
    return [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", out)]


def our_ms(folder: Path, config: TrainConfig) -> list[float]:
    """Return the milliseconds of our steps."""
    name = f"r{len(list((folder / 'runs').glob('*')))}"
    (folder / "config.toml").write_text(config_to_toml(config), "utf-8")
    run("-m", "fasttrain.train", "config.toml", f"run.name={name}", cwd=folder, limit_s=LIMIT_S)
    return [row["step_ms"] for row in rows_of(folder, name, "train")]


def hf_ms(folder: Path, config: TrainConfig) -> list[float]:
    """Return the milliseconds of the Trainer's steps."""
    if not all(importlib.util.find_spec(module) for module in ("transformers", "accelerate")):
        raise ImportError("transformers and accelerate are not both installed")
    model, seq_len = config.model, config.data.seq_len
    # Both kinds of config know these names.
    sizes: dict[str, Any] = {
        "vocab_size": model.vocab_size, "hidden_size": model.dim, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": seq_len,
    }  # fmt: skip
    if model.norm == "rms":
        sizes |= {"model_type": "llama", "intermediate_size": 704}
    else:
        sizes |= {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"model": sizes, "rows": config.train.micro_batch, "steps": config.train.steps}
    command = ["-m", "benchmarks.hf_trainer", "data/chars/train.bin"]
    command += [json.dumps(sizes | {"seq_len": seq_len})]
    times: list[float] = json.loads(run(*command, cwd=folder, limit_s=LIMIT_S).splitlines()[-1])
    return times


@pytest.mark.parametrize("name", SHAPES)
def test_trainers(benchmark: Any, tmp_path: Path, budget_s: float, name: str) -> None:
    shape, n_steps, n_warm = SHAPES[name]
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
        "run.dtype": "fp32", "train.steps": n_steps, "eval.prompts": [], "log.every_steps": 1,
    }  # fmt: skip
    vocab = {"model.vocab_size": len(chars)} if shape is GPT2_CHARS else {}
    config = config_of(overrides | vocab)
    # As each is started by default: compiled, nanoGPT is below and plain torch in bench_step.py.
    trainers = {"nanoGPT": nanogpt_ms, "HF Trainer": hf_ms, OURS: our_ms}
    times: dict[str, list[float]] = {key: [] for key in (OURS, *trainers)}
    left_out: dict[str, str] = {}

    def all_rounds() -> None:
        for _ in rounds_within(6 * budget_s):  # a round takes a minute, most of it to start them
            for key in [key for key in trainers if key not in left_out]:
                if len(left_out) == len(trainers) - 1:
                    pytest.skip("; ".join(left_out.values()))
                try:
                    step_ms = trainers[key](tmp_path, config)
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
    n_tokens = config.data.seq_len * config.train.micro_batch
    rates = {key: n_tokens / seconds for key, seconds in figures["median_s"].items()}
    benchmark.extra_info.update(figures, tokens_per_s=rates, left_out=left_out)


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
        command = ["-m", "fasttrain.train", str(ROOT / "configs" / "chars.toml")]
        overrides = ["data.path=data/ours", f"run.seed={seed}", f"run.name=seed-{seed}"]
        started = time.perf_counter()
        run(*command, *overrides, cwd=tmp_path)
        times[OURS].append(time.perf_counter() - started)
        losses[OURS].append(rows_of(tmp_path, f"seed-{seed}", "eval")[-1]["val_loss"])

    def theirs(name: str, *, compiled: bool) -> None:
        # The checkpoint is written also where its own estimate of the loss did not improve.
        options = {"compile": compiled, "eval_iters": 20, "always_save_checkpoint": True}
        started = time.perf_counter()
        printed = run_nanogpt(tmp_path, config, 900.0, **options)
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
