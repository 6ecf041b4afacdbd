"""The sections on what a run tells and keeps: evaluation, checkpoints, logs."""

from dataclasses import dataclass
from typing import ClassVar

from fasttrain.config_keys import Section, key, refuse

__all__ = ["CheckpointConfig", "EvalConfig", "LogConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(Section):
    """Evaluation on the validation split, and samples."""

    section: ClassVar[str] = "eval"
    every_steps: int | None = key(None, "steps between evaluations (None: only at the end)", ge=1)
    batch_size: int | None = key(None, "sequences of one forward (None: train.micro_batch)", ge=1)
    stride_tokens: int | None = key(
        None,
        "tokens between the starts of windows, of which only the new ones are predicted: each then"
        " sees seq_len - stride_tokens or more before it (None: windows side by side)",
        ge=1,
    )
    sample_every_steps: int | None = key(
        None, "steps between samples (None: only at the end)", ge=1
    )
    prompts: tuple[str, ...] | None = key(
        None,
        "prompts of the samples, taken in turn; [] for no samples (None: how four documents of the"
        " validation split begin)",
    )
    sample_tokens: int = key(128, "tokens of a sample", ge=1)
    temperature: float = key(0.8, "temperature of the samples", gt=0)
    top_k: int | None = key(50, "sample from the k likeliest tokens (None: from all)", ge=1)
    patience: int | None = key(
        None, "end the run after this many evaluations without a lower loss (None: never)", ge=1
    )
    min_change: float = key(
        0.0, "nats by which a loss must be lower, for eval.patience and a plateau schedule", ge=0
    )

    def check(self) -> None:
        if self.patience is not None and self.every_steps is None:
            refuse(
                "eval.patience",
                self.patience,
                "counts evaluations, of which there is one, at the end",
                "set eval.every_steps",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Section):
    """Checkpoints."""

    section: ClassVar[str] = "checkpoint"
    every_steps: int | None = key(
        None, "steps between checkpoints (None: at the end and on interruption)", ge=1
    )
    keep_last: int = key(2, "newest checkpoints kept, beside the best", ge=1)
    asynchronous: bool = key(True, "write in a background thread")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig(Section):
    """What is reported."""

    section: ClassVar[str] = "log"
    every_steps: int = key(10, "steps between log lines", ge=1)
    csv: bool = key(False, "write train.csv and eval.csv beside metrics.jsonl")
    tensorboard: bool = key(False, "write TensorBoard's files into the run folder")
    wandb_project: str | None = key(
        None,
        "project of Weights & Biases (None: not used)",
        pattern=(r"[^/\\#?%:]+", "a name without /, \\, #, ?, %, :"),
    )
    wandb_mode: str = key(
        "online", "offline: kept in the run folder", choices=("online", "offline")
    )
    profile_steps: tuple[int, ...] = key(
        (), "first and last step of a profiler trace, in the run's folder profile ([]: none)", ge=1
    )

    def check(self) -> None:
        steps = self.profile_steps
        if steps and (len(steps) != 2 or steps[0] > steps[1]):
            refuse(
                "log.profile_steps", list(steps), "is no first and last step", "write [10, 12], say"
            )
