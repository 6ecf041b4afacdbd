"""One run from a config: dataset, model, optimizers, run folder, resuming, signals, summary."""

import json
import os
import platform
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fasttrain import checkpoint
from fasttrain.config import (
    TrainConfig,
    UserError,
    config_difference,
    config_to_toml,
    load_config,
)
from fasttrain.data.corpus import build_default_corpus
from fasttrain.data.format import TokenDataset, open_dataset
from fasttrain.data.loader import Loader
from fasttrain.data.tokenizer import end_of_text_id, load_tokenizer
from fasttrain.device import keep_freed_memory, resolve_device
from fasttrain.generate import generate
from fasttrain.loggers import Console, format_count, format_duration
from fasttrain.model import Transformer
from fasttrain.optim import build_optimizers
from fasttrain.run_folder import check_disk, lock_run_dir, new_run_dir, run_dir_of
from fasttrain.trainer import Sampler, Trainer

__all__ = ["run"]

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED = (
    0,
    1,
    75,
)  # 75 is EX_TEMPFAIL of sysexits.h: preempted, can be resumed
# Keys that may differ when a run is resumed: where it goes, what it shows, never what it computes.
MAY_CHANGE = (
    *("run.name", "run.out_dir", "run.device", "run.threads"),
    *("data.path", "data.prefetch", "data.cache_dir", "eval.", "checkpoint.", "log."),
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run(
    config: TrainConfig,
    *,
    name: str,
    resume: str | None = None,
    stop_at_step: int | None = None,
    allow_change: Sequence[str] = (),
) -> int:
    """Train as ``config`` says and return the exit status.

    Args:
        config: the configuration as loaded.
        name: the run folder's name where ``run.name`` is unset; taken with ``-2``, ``-3``, … where
            it exists and ``resume`` is None.
        resume: ``auto``, or the path of a run or checkpoint folder; None: a new run.
        stop_at_step: end there with a checkpoint.
        allow_change: keys that may differ from the resumed run's, beyond `MAY_CHANGE`.

    Raises:
        UserError: something is missing or does not fit; nothing was overwritten.
    """
    started = time.perf_counter()
    device = resolve_device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    run_dir = new_run_dir(config, name) if resume is None else run_dir_of(config, name, resume)
    lock = lock_run_dir(run_dir, new=resume is None)
    console = Console(log_file=run_dir / "train.log")
    try:
        source: Path | None = None
        if resume is not None:
            target = run_dir if resume == "auto" else Path(resume)
            source = checkpoint.resolve(target, report=console.warn)
        trainer = _build(config, run_dir, source, allow_change, console)
        if stop_at_step is not None:
            if stop_at_step <= trainer.step_count:
                raise UserError(
                    f"--stop-at-step {stop_at_step}: the run is at step {trainer.step_count}; "
                    "name a later step"
                )
            trainer.request_stop(stop_at_step)
        _header(trainer, console, source)
        with _SignalHandlers(trainer, console):
            try:
                outcome = trainer.fit()
                trainer.close()
            except (checkpoint.CheckpointError, FloatingPointError) as error:
                console.warn(str(error))
                return EXIT_FAILED
        _summary(trainer, console, outcome, run_dir, time.perf_counter() - started)
        return EXIT_DONE if outcome == "done" else EXIT_STOPPED
    except (UserError, KeyboardInterrupt):
        # A new run that never began leaves no folder behind.
        log = run_dir / "metrics.jsonl"
        if resume is None and not (log.exists() and log.stat().st_size):
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    finally:
        console.close()
        lock.close()


# ---- building ------------------------------------------------------------------------------------


def open_splits(
    config: TrainConfig, report: Callable[[str], None]
) -> tuple[TrainConfig, TokenDataset, TokenDataset]:
    """Open (or build) the dataset; return the config with its vocabulary settled and the splits."""
    cache_dir = Path(config.data.cache_dir) if config.data.cache_dir else None
    if config.data.path is None:
        path = build_default_corpus(
            vocab_size=config.data.corpus_vocab_size, cache_dir=cache_dir, report=report
        )
    else:
        path = Path(config.data.path)
    train, val = (
        open_dataset(
            path,
            split,
            dtype=config.data.dtype,
            vocab_size=config.model.vocab_size,
            cache_dir=cache_dir,
        )
        for split in ("train", "val")
    )
    if config.model.vocab_size is None:
        if train.vocab_size is None:
            raise UserError(
                f"{path} does not say its vocabulary size; set model.vocab_size (GPT-2's is 50257)"
            )
        rounded = -(-train.vocab_size // 64) * 64
        config = replace(config, model=replace(config.model, vocab_size=rounded))
    return config, train, val


def _build(
    config: TrainConfig,
    run_dir: Path,
    source: Path | None,
    allow_change: Sequence[str],
    console: Console,
) -> Trainer:
    config, train, val = open_splits(config, console.note)
    recorded = {"dataset": train.fingerprint, "val_dataset": val.fingerprint}
    state: dict[str, Any] = {}
    if source is not None:
        state = _check_resumable(source, config, recorded, allow_change)
    torch.manual_seed(config.run.seed)
    device = resolve_device(config.run.device)
    model = Transformer(config.model, seq_len=config.data.seq_len).to(device)
    check_disk(run_dir, model.num_parameters(), config.checkpoint.keep_last)
    sampler = None
    if train.tokenizer_path is not None:
        if source is None:
            shutil.copyfile(train.tokenizer_path, run_dir / "tokenizer.json")
        sampler = _sampler(config, train.tokenizer_path, device)
    epochs = config.train.epochs
    samples = (train.n_tokens - 1) // config.data.seq_len
    loader = Loader(
        train,
        seq_len=config.data.seq_len,
        micro_batch=config.train.micro_batch,
        seed=config.run.seed,
        device=device,
        position=state.get("position", 0),
        end=None if epochs is None else -int(-epochs * samples // 1),
        prefetch=config.data.prefetch,
    )
    trainer = Trainer(
        model,
        build_optimizers(model, config.optim),
        None,
        None,
        config,
        train_loader=loader,
        val_dataset=val,
        run_dir=run_dir,
        console=console,
        sampler=sampler,
        recorded=recorded,
    )
    if source is not None:
        trainer.load_checkpoint(source)
    (run_dir / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
    return trainer


def _check_resumable(
    source: Path, config: TrainConfig, recorded: dict[str, str], allow_change: Sequence[str]
) -> dict[str, Any]:
    """Return the checkpoint's state; refuse when config or data are not those it was made with."""
    old_config = load_config(source / "config.toml")
    state: dict[str, Any] = json.loads((source / "state.json").read_text(encoding="utf-8"))
    changed = [
        f"{key}: {old!r} → {new!r}"
        for key, old, new in config_difference(old_config, config)
        if not key.startswith(MAY_CHANGE) and key not in allow_change
    ]
    changed += [
        f"{key}: {str(state.get(key))[:12]}… → {value[:12]}…"
        for key, value in recorded.items()
        if state.get(key) != value and key not in allow_change
    ]
    if changed:
        raise UserError(
            f"{source} was made with other settings: {'; '.join(changed)}; put them back, or allow "
            "each with --allow-change KEY"
        )
    return state


def _sampler(config: TrainConfig, tokenizer_path: Path, device: torch.device) -> Sampler | None:
    prompts = config.eval.prompts
    if not prompts:
        return None
    tokenizer = load_tokenizer(tokenizer_path)

    def sample(model: Transformer, number: int) -> tuple[str, str]:
        prompt = prompts[number % len(prompts)]
        encoded = tokenizer.encode(prompt, add_special_tokens=False).ids
        # A prompt of which the tokenizer knows nothing starts like a new document.
        start = encoded or [end_of_text_id(tokenizer) or 0]
        ids = torch.tensor([start], dtype=torch.int64, device=device)
        generator = torch.Generator(device).manual_seed(config.run.seed + number)
        out = generate(
            model,
            ids,
            max_new_tokens=config.eval.sample_tokens,
            temperature=config.eval.temperature,
            top_k=config.eval.top_k,
            generator=generator,
        )
        return prompt, tokenizer.decode(out[0, ids.shape[1] :].tolist())

    return sample


# ---- what a person sees --------------------------------------------------------------------------


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _header(trainer: Trainer, console: Console, source: Path | None) -> None:
    config, model = trainer.config, trainer.model
    m, step = config.model, trainer.train_step
    train, val = trainer.train_loader.dataset, trainer.val_dataset
    assert val is not None
    compiled = "eager" if step.compile_mode == "off" else f"torch.compile ({step.compile_mode})"
    if trainer.total_steps is None:
        plan = f"{config.train.hours} h"
    else:
        tokens = trainer.total_steps * trainer.tokens_per_step
        plan = f"{trainer.total_steps:,} steps × {trainer.tokens_per_step:,} tokens"
        plan += f" = {format_count(tokens)} tokens, {tokens / train.n_tokens:.2f} epochs"
    rows = [
        ("device", f"{_device_name(trainer.device)} · {trainer.precision.name} · {compiled}"),
        (
            "model",
            f"{format_count(model.num_parameters())} parameters: {m.n_layers} layers × {m.dim}, "
            f"{m.n_heads} heads, vocabulary {m.vocab_size:,}, context {config.data.seq_len}",
        ),
        (
            "data",
            f"{config.data.path or 'Python standard library source'}: "
            f"{format_count(train.n_tokens)} tokens to train on, "
            f"{format_count(val.n_tokens)} to validate",
        ),
        ("plan", plan),
        ("optimizer", f"{config.optim.name}, lr {config.optim.lr:g}, {config.schedule.name}"),
        ("run", str(trainer.run_dir)),
    ]
    if source is not None:
        rows.append(("resumed", f"{source} at step {trainer.step_count:,}"))
    console.header(rows)


def _summary(
    trainer: Trainer, console: Console, outcome: str, run_dir: Path, wall_s: float
) -> None:
    tokens = trainer.step_count * trainer.tokens_per_step
    rows = [
        (
            "time",
            f"{format_duration(wall_s)} in all, {format_duration(trainer.trained_s)} in steps",
        ),
        (
            "speed",
            f"{tokens / max(trainer.trained_s, 1e-9):,.0f} tokens/s over "
            f"{trainer.step_count:,} steps, first step after {trainer.first_step_s or 0.0:.1f} s",
        ),
    ]
    val = trainer.last_eval
    if val:
        bpb = val["val_bpb"]
        rows.append(
            (
                "validation",
                f"loss {val['val_loss']:.4f}, best {trainer.best_val_loss:.4f}"
                + (f", {bpb:.4f} bits per byte" if bpb is not None else "")
                + f", accuracy {val['val_accuracy']:.1%}",
            )
        )
    rows.append(("checkpoint", str(checkpoint.resolve(run_dir, which="latest"))))
    if outcome == "done":
        prompt = shlex.quote(next(iter(trainer.config.eval.prompts), ""))
        tokenizer = "" if trainer.sampler else " --tokenizer PATH"
        command = f"python -m fasttrain.generate {run_dir} --prompt {prompt}{tokenizer}"
        rows.append(("generate", command))
    else:
        rows.append(("resume", "the same command with --resume auto"))
    console.summary(rows, title="done" if outcome == "done" else "stopped")


class _SignalHandlers:
    """While training: the first signal ends the run after the step under way, a second at once."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.trainer, self.console = trainer, console
        self.received = False

    def __enter__(self) -> None:
        self.previous = {s: signal.signal(s, self._handle) for s in SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(1)  # checkpoints are committed by rename: what is on disk stays whole
        self.received = True
        self.trainer.request_stop()
        name = signal.Signals(number).name
        self.console.note(f"{name}: saving a checkpoint after this step (once more: exit at once)")
