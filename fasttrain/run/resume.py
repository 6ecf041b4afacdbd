"""What a checkpoint was made of, and whether a run may continue from it."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fasttrain.checkpoint import Checkpoint, check_model
from fasttrain.config import TrainConfig, UserError, config_difference, counted, misfit
from fasttrain.distributed.world import facts_by_name
from fasttrain.engine.schedule import lr_at
from fasttrain.engine.state import RunState

LR_JUMP = 0.1  # of the peak; a larger jump between two steps is warned of

# Keys that may differ when a run is resumed: they change where it runs, writes and what it shows,
# never what it computes.
MAY_CHANGE = (
    *("run.name", "run.out_dir", "run.device", "run.threads", "run.deterministic"),
    *("model.init_from", "data.path", "data.prefetch", "data.cache_", "checkpoint.", "log."),
    *("eval.sample", "eval.prompts", "eval.temperature", "eval.top_k", "eval.tasks"),
    *("distributed.", "train.activation_checkpointing", "train.recheck_every_steps"),
)
# These too, unless evaluations decide the learning rate or the end of the run.
MAY_CHANGE_IF_UNUSED = ("eval.every_steps", "eval.batch_size", "eval.stride_fraction")


def check_resumable(
    source: Checkpoint,
    config: TrainConfig,
    data: dict[str, dict[str, Any]],
    allow_change: Sequence[str],
    samples_per_step: int,
) -> list[dict[str, Any]]:
    """Return the history of the checkpoint ``source``, allowed changes added.

    Raises UserError where the config, the facts of the ``data`` or the samples of a step are not
    those of the checkpoint and ``allow_change`` does not name the key (it names all of them), or
    where the checkpoint holds another model than the config describes.
    """
    state, path = source.state, source.path
    if "position" not in state or "data" not in state:
        raise UserError(
            f"{path} holds a model, and no run to go on with; start one with "
            f"model.init_from={path}, without --resume or --decay-from"
        )
    before, now = facts_by_name(source.config, state["data"]), facts_by_name(config, data)
    for key in allow_change:
        if key not in now:
            near = difflib.get_close_matches(key, now, n=1)
            hint = f"did you mean {near[0]}?" if near else "it takes section.key"
            raise UserError(f"--allow-change {key}: there is no such key; {hint}")
    # What differs, but for keys that change no number
    unused = config.schedule.name != "plateau" and config.eval.patience is None
    harmless = MAY_CHANGE + (MAY_CHANGE_IF_UNUSED if unused else ())
    changes = [
        (key, before.get(key), value)
        for key, value in now.items()
        if before.get(key) != value and not key.startswith(harmless)
    ]
    refused = [f"{k}: {_difference(old, new)}" for k, old, new in changes if k not in allow_change]
    took, takes = state.get("samples_per_step", samples_per_step), samples_per_step
    shape = {"train.tokens_per_step", "train.micro_batch", "data.seq_len"}
    if took != takes and not shape & {key for key, *_ in changes}:
        if (key := "train.tokens_per_step") not in allow_change:
            how = f"a step took {counted(took, 'sample')}, and on this number of ranks it takes"
            refused.append(f"{key}: {how} {takes}")
        changes.append((key, took, takes))
    if refused:
        raise UserError(
            f"{path} was made with other settings: {'; '.join(refused)}; put them back, or allow "
            "each with --allow-change KEY; of another run: --resume RUN"
        )
    check_model(config, source.group("model"), path)
    when = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "step": state["step"]}
    shown = ({"key": key, "old": _short(old), "new": _short(new)} for key, old, new in changes)
    return [*state.get("history", []), *(when | change for change in shown)]


def same_settings(config: TrainConfig, saved: TrainConfig, allow_change: Sequence[str]) -> bool:
    """Return whether a saved run has the settings of ``config``, but for those that may differ.

    What ``config`` leaves open, as ``train.micro_batch = "auto"`` does, fits any value.
    """
    left_open = ("model.vocab_size", "schedule.decay_start_step", "train.micro_batch")
    harmless = (*MAY_CHANGE, *MAY_CHANGE_IF_UNUSED, *allow_change)
    return all(
        key.startswith(harmless) or (key in left_open and ours in (None, "auto"))
        for key, ours, _ in config_difference(config, saved)
    )


def made_otherwise(state: dict[str, Any], made_by: Mapping[str, Any], *, exact: bool) -> str | None:
    """Return a warning where a resumed run may not have the bits of one never stopped.

    ``made_by`` is its provenance, and what else its bits depend on; ``exact``: the same operations
    give the same bits each time, on a CPU or as the run is deterministic.
    """
    recorded = state.get("provenance")
    before = state if not isinstance(recorded, dict) else recorded | state
    changed = "; ".join(
        f"{name} {_short(before[name])} → {_short(value)}"
        for name, value in made_by.items()
        # None: threads of a run on a GPU.
        if name not in ("command", "parent") and before.get(name) not in (value, None)
    )
    if changed:
        but = "the run goes on, but perhaps not with the same bits"
        return f"the checkpoint was made otherwise: {changed}: {but}"
    if not exact:
        return (
            "on a GPU sums take another order each time: the run goes on, but perhaps not with the "
            "bits of one that was never stopped; run.deterministic=true makes it exact, and slower"
        )
    return None


def lr_jump(source: Checkpoint, config: TrainConfig, total_steps: int | None) -> str | None:
    """Return a warning where other settings make the learning rate jump at the next step."""
    state, peak, peak_then = source.state, config.optim.peak_lr, source.config.optim.peak_lr
    if total_steps is None or state["total_steps"] is None:
        return None
    step, total_then = state["step"], state["total_steps"]
    new = lr_at(step, total_steps, config.schedule, peak)
    named = source.config.schedule != config.schedule or peak_then != peak
    if named:
        # A change of the rate by name is meant; what is not is that a decay is undone.
        old = lr_at(step, total_then, source.config.schedule, peak_then)
        least = min(new - old, (new / peak - old / peak_then) * peak_then)
        jumps = least > LR_JUMP * peak_then
    else:
        old = lr_at(step, total_then, config.schedule, peak)
        jumps = abs(new - old) > LR_JUMP * peak
    if not jumps:
        return None
    longer = f"with {counted(total_steps, 'step')} in place of {total_then:,} "
    return (
        f"{longer if total_steps != total_then else ''}the learning "
        f"rate of step {step + 1:,} is {new:.3g}, and was to be {old:.3g}: the "
        "loss will jump too; better: a new run with --decay-from CHECKPOINT, one from before the "
        "decay, or a low rate to the end: schedule.name=constant "
        "optim.lr=… and --allow-change for both"
    )


def _difference(old: Any, new: Any) -> str:
    """Say how two values differ, and of as many hashes which."""
    if misfit(list[str], old) or misfit(list[str], new) or len(old) != len(new):
        return f"{_short(old)} → {_short(new)}"
    if sorted(old) == sorted(new):
        return "the same files in another order"
    at = next(n for n, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
    return f"file {at + 1} of {len(old)}: {_short(old[at])} → {_short(new[at])}"


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return counted(len(value), "file")
    text = "none" if value is None else str(value)
    is_hash = len(text) in (40, 64) and not set(text) - set("0123456789abcdef")
    return f"{text[:12]}…" if is_hash else text[:200]


# Keys in which a decaying branch may differ from its parent: how long it is and how it decays.
DECAY_MAY_CHANGE = (
    *("train.steps", "train.epochs", "train.tokens", "train.hours", "schedule.name"),
    *("schedule.min_lr", "schedule.decay_fraction", "schedule.decay_start_step"),
)


def settle_decay(config: TrainConfig, source: Checkpoint, *, decays: bool) -> TrainConfig:
    """Return the config with the step where its decay begins: at ``source``, or as set."""
    schedule = config.schedule
    if decays and schedule.name != "wsd":
        raise UserError(
            f"--decay-from: schedule.name = {schedule.name} has no decay of its own; set "
            "schedule.name=wsd"
        )
    begun = source.step if decays else schedule.decay_start_step
    begun = source.config.schedule.decay_start_step if begun is None else begun
    return replace(config, schedule=replace(schedule, decay_start_step=begun))


def begin_decay(state: RunState, config: TrainConfig, source: Path) -> None:
    """Make the state restored from ``source`` that of a new run, without its time and losses."""
    if config.train.hours is not None:
        state.total_steps = None  # to be measured: not what the other run's hours came to
    step, end = state.step, state.total_steps
    if end is not None and end <= step:
        raise UserError(
            f"--decay-from {source}: it is at step {step}, and this config ends at step {end}; "
            "set train.steps to where the branch is to end, counted from the run's first step"
        )
    state.best_val_loss, state.val_losses, state.eval_due = math.inf, [], False
    state.trained_s = 0.0
