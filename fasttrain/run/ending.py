"""How a run ends: done, stopped by a signal, given up in the middle of a step, or failed."""

import contextlib
import platform
import shlex
import time
from pathlib import Path

import torch

from fasttrain import checkpoint
from fasttrain.command import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, redact, redacted
from fasttrain.config import UserError
from fasttrain.config.keys import counted
from fasttrain.distributed.lockstep import call_ranks, hearing_ranks
from fasttrain.distributed.world import record_failure
from fasttrain.engine.plan import warnings_of_step
from fasttrain.engine.trainer import Outcome, Trainer
from fasttrain.log.console import Console, format_count, format_duration
from fasttrain.model.cpu.blocks import why_unfit
from fasttrain.run.folder import RunFolder
from fasttrain.run.signals import StopSignals, end_at_once

# Seconds from a signal to the moment from which the step under way is given up. The first step
# compiles for as long as a minute; later ones, batches of evaluation and samples take less.
PATIENCE_COMPILING_S, PATIENCE_S = 1.0, 8.0
# A terminal's Ctrl-C and a scheduler signal torchrun and all ranks, and torchrun signals these too.
ECHO_S = 3.0


def train_to_end(trainer: Trainer, folder: RunFolder, started: float) -> int:
    """Train to the end or to a signal; say how it ended and return the exit status.

    Args:
        trainer: the run.
        folder: its folder, with the console.
        started: when this process began, by `time.perf_counter`.
    """
    before = (trainer.step_count, trainer.trained_s, trainer.reporter.n_tokens)
    several = trainer.world.size > 1

    def end(outcome: Outcome) -> int:
        if folder.console:
            wall_s = time.perf_counter() - started
            show_end(trainer, folder.console, outcome, wall_s, *before)
        if outcome == "stopped":
            return EXIT_STOPPED
        return EXIT_DONE if trainer.saver.saved_at == trainer.step_count else EXIT_FAILED

    def rescue() -> None:
        """Save the state before a step that does not end, and end the process."""
        status = EXIT_FAILED
        try:
            if not trainer.save_unfinished():
                return  # it ended after all
            folder.note(f"{trainer.stop_reason}: the step under way was given up")
            status = end("stopped")
            folder.close()
        except Exception as error:
            folder.warn(str(error))
        end_at_once(status)

    def told_to_stop(reason: str) -> None:
        trainer.stop_for(reason)
        call_ranks(trainer.world)

    def called(rank: int) -> None:
        signals.call(f"rank {rank} is to stop")

    signals = StopSignals(
        stop=told_to_stop,
        rescue=rescue,
        patience_s=lambda: PATIENCE_COMPILING_S if trainer.compiling else PATIENCE_S,
        echo_s=ECHO_S if several else 0.0,
    )
    try:
        with signals, hearing_ranks(trainer.world, called):
            outcome = trainer.fit()
            try:
                trainer.close()
            except checkpoint.CheckpointError as error:
                if outcome == "done":
                    raise
                folder.warn(str(error))  # it can be resumed from an older one, if there is any
            # torchrun ends all ranks when the first ends, by a signal: they end together.
            statuses = trainer.world.gather(end(outcome)) if several else [end(outcome)]
        return EXIT_FAILED if EXIT_FAILED in statuses else statuses[0]
    except (UserError, FloatingPointError, OSError) as error:  # of a run that had begun: no input
        record_failure(redacted(error))
        folder.warn(str(error))
        return EXIT_FAILED
    finally:
        with contextlib.suppress(Exception):  # of an end that failed: what it failed of was said
            trainer.close()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = counted(torch.get_num_threads(), "thread")
    return f"{platform.processor() or platform.machine()} CPU, {threads}"


def show_start(trainer: Trainer, console: Console, source: Path | None) -> None:
    """Show what is about to run; ``source`` is the checkpoint it goes on from."""
    config, model = trainer.config, trainer.model
    m, step = config.model, trainer.train_step
    train, val = trainer.train_loader.dataset, trainer.val_dataset
    dropped = trainer.train_loader.dropped_tokens  # ends of long documents, or of the split
    assert val is not None
    named = ", ".join(config.data.paths) or config.data.path or "Python standard library source"
    modes = {"off": "eager", "c++": "blocks in C++"}
    compiled = modes.get(step.compile_mode, f"torch.compile ({step.compile_mode})")
    on_cpu = trainer.device.type == "cpu" and config.run.compile in ("auto", "c++")
    if on_cpu and (reason := why_unfit(config)):
        compiled += f" ({reason})"
    if trainer.total_steps is None:
        plan = f"{config.train.hours} h"
    else:
        tokens = trainer.total_steps * trainer.tokens_per_step
        plan = f"{counted(trainer.total_steps, 'step')} × {trainer.tokens_per_step:,} tokens"
        samples = trainer.total_steps * trainer.samples_per_step
        epochs = samples / trainer.train_loader.samples_per_epoch
        plan += f" = {format_count(tokens)} tokens, {epochs:.2f} epochs"
    world = trainer.world
    rows = [("ranks", f"{world.size} · {world.mode}: {world.why}")] if world.size > 1 else []
    rows += [
        ("device", f"{_device_name(trainer.device)} · {trainer.precision.name} · {compiled}"),
        (
            "model",
            f"{format_count(model.num_parameters())} parameters: {counted(m.n_layers, 'layer')} × "
            f"{m.dim}, {counted(m.n_heads, 'head')}, vocabulary {m.vocab_size:,}, "
            f"context {config.data.seq_len}",
        ),
        (
            "data",
            f"{redact(named)}: "
            f"{format_count(train.n_tokens)} tokens to train on"
            f"{f' ({format_count(dropped)} in no sequence)' if dropped else ''}, "
            f"{format_count(val.n_tokens)} to validate",
        ),
        ("plan", plan),
        ("optimizer", f"{config.optim.name}, lr {config.optim.peak_lr:g}, {config.schedule.name}"),
        ("run", str(trainer.run_dir)),
    ]
    if source is not None:
        left = "" if trainer.step_count != trainer.total_steps else ": nothing is left to train"
        rows.append(("resumed", f"{source} at step {trainer.step_count:,}{left}"))
    console.header(rows)
    for warning in warnings_of_step(config, world.size):
        console.warn(warning)
    if step.compile_mode not in modes:
        console.note("compiling: the first step waits for it")


def show_end(
    trainer: Trainer,
    console: Console,
    outcome: str,
    wall_s: float,
    first_step: int,
    trained_before_s: float,
    tokens_before: int,
) -> None:
    """Show how the run ended.

    Args:
        trainer: the run; its checkpoint is complete.
        console: where to.
        outcome: as `Trainer.fit` returns it.
        wall_s: seconds since this process began the run, or to go on with it.
        first_step: step at which it began.
        trained_before_s: seconds that the steps before took.
        tokens_before: tokens that these were trained on.
    """
    assert trainer.run_dir is not None
    n_steps, trained_s = trainer.step_count - first_step, trainer.trained_s - trained_before_s
    time = f"{format_duration(wall_s)} in all, {format_duration(trained_s)} in steps"
    n_tokens = trainer.reporter.n_tokens - tokens_before
    speed = f"{n_tokens / max(trained_s, 1e-9):,.0f} tokens/s over {counted(n_steps, 'step')}"
    if first_step:
        time += f" (with what came before: {format_duration(trainer.trained_s)} in steps)"
    else:
        speed += f", first step after {trainer.first_step_s or 0.0:.1f} s"
    rows = [("time", time), ("speed", speed)] if n_steps else [("time", time)]
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
    rows.append(("checkpoint", str(checkpoint.resolve(trainer.run_dir, which="latest"))))
    if outcome == "done":
        prompt = next(iter(trainer.config.eval.prompts or ()), "")
        # Behind a space it would be taken for an option.
        prompt = ("=" if prompt.startswith("-") else " ") + shlex.quote(prompt)
        known = (trainer.run_dir / "tokenizer.json").is_file()
        tokenizer = "" if known else " --tokenizer PATH"
        run_dir = shlex.quote(str(trainer.run_dir))
        command = f"python -m fasttrain.generate {run_dir} --prompt{prompt}{tokenizer}"
        rows.append(("generate", command))
    else:
        rows.append(("resume", "the same command with --resume auto"))
    console.summary(rows, title="done" if outcome == "done" else "stopped")
