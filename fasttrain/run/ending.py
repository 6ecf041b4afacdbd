"""What a run shows at its start, and how it ends: done, stopped, given up in a step, or failed."""

import contextlib
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from fasttrain import checkpoint
from fasttrain.command import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, record
from fasttrain.config import UserError, counted
from fasttrain.device import ATTENTION
from fasttrain.distributed.lockstep import call_ranks, hearing_ranks
from fasttrain.engine.loop import Outcome, TrainingLoop
from fasttrain.engine.run_size import RunSize, warnings_at_start
from fasttrain.engine.state import RunState
from fasttrain.log.console import Console, format_count, format_duration
from fasttrain.model.transformer import Transformer
from fasttrain.redact import redact
from fasttrain.run.folder import RunFolder
from fasttrain.run.signals import ECHO_S, end_at_once, stop_signals
from fasttrain.storage import DataError

# Seconds from a signal to the moment from which the step under way is given up. The first step
# compiles for as long as a minute; later ones, batches of evaluation and samples take less.
PATIENCE_COMPILING_S, PATIENCE_S = 1.0, 8.0


def train_to_end(loop: TrainingLoop, folder: RunFolder, started: float) -> int:
    """Train to the end or to a signal; say how it ended and return the exit status."""
    state, world = loop.state, loop.world
    before = replace(state)

    def end(outcome: Outcome) -> int:
        if folder.console:
            wall_s = time.perf_counter() - started
            show_end(folder.console, loop, folder.path, outcome, wall_s, before)
            if outcome == "done":
                folder.end_record()
        if outcome == "stopped":
            return EXIT_STOPPED
        return EXIT_DONE if loop.saver.saved_at == state.step else EXIT_FAILED

    def rescue() -> None:
        """Save the state from before a step that does not end, and end the process."""
        status = EXIT_FAILED
        try:
            if not loop.save_unfinished():
                return  # it ended after all
            loop.saver.close()  # waits for the copy
            folder.note(f"{loop.stop_reason}: the step under way was given up")
            status = end("stopped")
            folder.close()
        except Exception as error:
            folder.warn(str(error))
        end_at_once(status)

    signals = stop_signals(
        stop=loop.stop_for,
        rescue=rescue,
        patience_s=lambda: PATIENCE_S if state.first_step_s else PATIENCE_COMPILING_S,
        echo_s=ECHO_S if world.size > 1 else 0.0,
    )
    try:
        with signals as call, hearing_ranks(world, lambda r: call(f"rank {r} is to stop")):
            outcome = loop.fit()
            try:
                loop.close()
            except checkpoint.CheckpointError as error:
                if outcome == "done":
                    raise
                folder.warn(str(error))  # an older checkpoint, if there is one, can be resumed
            # torchrun ends all ranks when the first ends, by a signal: they end together.
            statuses = world.gather(end(outcome))
        return EXIT_FAILED if EXIT_FAILED in statuses else statuses[0]
    except (UserError, FloatingPointError, OSError) as error:  # not bad input: the run had begun
        record(f"error: {error}")
        folder.warn(str(error))
        if isinstance(error, DataError):  # no fault of the state
            call_ranks(world)
            try:
                loop.recovery.look_and_save(loop.train_loader, loop.guard.rng)
                folder.note(f"saved: {checkpoint.resolve(folder.path, which='latest')}")
            except (UserError, FloatingPointError, OSError) as another:
                folder.warn(str(another))
        return EXIT_FAILED
    finally:
        with contextlib.suppress(Exception):  # the error that is being raised has the reason
            loop.close()


def describe(run_size: RunSize) -> dict[str, str]:
    """Return in words what a run is made of, by label; of data only those that are there."""
    config = run_size.config
    step = run_size.shape
    model = run_size.model
    train = run_size.train
    val = run_size.val
    m, loop = config.model, config.train
    n_matmul, flops_per_token = model.num_matmul_parameters(), model.flops_per_token()
    size = f"{model.num_parameters():,} parameters, {n_matmul:,} in matrix products"
    shape = f"{counted(m.n_layers, 'layer')} × {m.dim}, {counted(m.n_heads, 'head')}"
    rows = {"model": f"{size}: {shape}; {format_count(flops_per_token)} FLOPs a token"}
    if train and val:
        named = ", ".join(config.data.paths) or config.data.path or "Python standard library source"
        vocabulary, own = f"vocabulary {m.vocab_size:,}", train.vocab_size
        if own is not None and -(-own // 64) * 64 != m.vocab_size != own:
            vocabulary += f" of the model, {own:,} of the data"
        dropped = run_size.dropped_tokens
        left_over = f" ({format_count(dropped)} left over)" if dropped else ""
        tokens = f"{train.n_tokens:,} training tokens{left_over}, {val.n_tokens:,} validation"
        rows["data"] = f"{redact(named)}: {tokens}; {vocabulary}"
    ranks = f" on each of {run_size.n_ranks} ranks" if run_size.n_ranks > 1 else ""
    micro_batches = counted(step.n_micro, "micro-batch")
    sequences = f"{counted(step.rows, 'sequence')} × {config.data.seq_len} tokens"
    rows["step"] = f"{step.tokens:,} tokens: {micro_batches} × {sequences}{ranks}"
    rows["run"] = f"{loop.hours} h"
    if run_size.tokens is not None:
        epochs = "" if run_size.epochs is None else f"{run_size.epochs:,.2f} epochs, "
        flops = f"{run_size.tokens * flops_per_token:.3g} FLOPs"
        length = f"{counted(run_size.steps or 0, 'step')}, {format_count(run_size.tokens)} tokens"
        rows["run"] = f"{length}, {epochs}{flops}"
    elif loop.epochs is not None:
        rows["run"] = f"{loop.epochs:g} epochs of data that are not there"
    return rows


def show_start(folder: RunFolder, loop: TrainingLoop) -> None:
    """Show what is about to run, and warn of what will hurt it."""
    console, state = folder.console, loop.state
    assert console is not None
    config, world, step = loop.config, loop.world, loop.train_step
    # How it computes
    modes = {"off": "eager", "c++": "blocks in C++"}
    compiled = modes.get(step.compile_mode, f"torch.compile ({step.compile_mode})")
    name = loop.saver.recorded["provenance"]["device"]
    if loop.device.type == "cpu":
        name += f" CPU, {counted(torch.get_num_threads(), 'thread')}"
        if reason := loop.resolved.why_not_cpp:
            compiled += f" ({reason})"
    if step.attention is not None:
        window = config.model.sliding_window_tokens or config.data.seq_len
        plain = config.data.attention_across_documents and window >= config.data.seq_len
        compiled += f" · {ATTENTION[step.attention] if plain else 'FlexAttention'}"
    # On what, and for how long
    train, model = loop.train_loader.dataset, cast(Transformer, step.model)
    run_size = RunSize(config, model, train, loop.val_dataset, world.size)
    by = "" if world.launcher == "torchrun" else f", started by {world.launcher}"
    rows = [("ranks", f"{world.size}{by} · {world.mode}: {world.why}")] if world.size > 1 else []
    rows += [
        ("device", f"{name} · {step.precision.name} · {compiled}"),
        *describe(run_size).items(),
        ("optimizer", f"{config.optim.name}, lr {config.optim.peak_lr:g}, {config.schedule.name}"),
        ("folder", str(folder.path)),
    ]
    if folder.origin is not None:
        rows.append(("branch of", f"{folder.origin} at step {state.step:,}"))
    if folder.source is not None:
        left = "" if state.step != state.total_steps else ": nothing is left to train"
        rows.append(("resumed", f"{folder.source} at step {state.step:,}{left}"))
    console.panel("fasttrain", rows, "cyan")
    for warning in warnings_at_start(run_size):
        console.warn(warning)
    if step.compile_mode not in modes:
        console.note("compiling: the first step waits for it")


def show_end(
    console: Console,
    loop: TrainingLoop,
    run_dir: Path,
    outcome: str,
    wall_s: float,
    before: RunState,
) -> None:
    """Show how a run ended, ``wall_s`` after its process began, from the state ``before``."""
    state = loop.state
    n_steps, trained_s = state.step - before.step, state.trained_s - before.trained_s
    time = f"{format_duration(wall_s)} in all, {format_duration(trained_s)} in steps"
    tokens_s = (state.tokens - before.tokens) / max(trained_s, 1e-9)
    speed = f"{tokens_s:,.0f} tokens/s over {counted(n_steps, 'step')}"
    if before.step:
        time += f" (with what came before: {format_duration(state.trained_s)} in steps)"
    else:
        speed += f", first step after {state.first_step_s or 0.0:.1f} s"
    rows = [("time", time), ("speed", speed)] if n_steps else [("time", time)]
    if val := state.last_eval:
        bpb = "" if val["val_bpb"] is None else f", {val['val_bpb']:.4f} bits per byte"
        text = f"loss {val['val_loss']:.4f}, best {state.best_val_loss:.4f}{bpb}"
        rows.append(("validation", f"{text}, accuracy {val['val_accuracy']:.1%}"))
    rows.append(("checkpoint", str(checkpoint.resolve(run_dir, which="latest"))))
    if outcome == "done":
        prompt = next(iter(loop.config.eval.prompts or ()), "")
        tokenizer = "" if (run_dir / "tokenizer.json").is_file() else " --tokenizer PATH"
        command = f"python -m fasttrain.generate {shlex.quote(str(run_dir))}"
        rows.append(("generate", f"{command} --prompt={shlex.quote(prompt)}{tokenizer}"))
    else:
        named = shlex.quote(str(run_dir))
        rows.append(("resume", f"the same command with --resume auto, or --resume {named}"))
    console.panel(outcome, rows, "green")
