"""The whole configuration: all sections, and what must hold between them. Standard library only."""

from dataclasses import dataclass, field

from fasttrain.config_keys import refuse
from fasttrain.config_outputs import CheckpointConfig, EvalConfig, LogConfig
from fasttrain.config_sections import (
    DataConfig,
    DistributedConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The whole configuration of a run.

    Raises:
        ConfigError: a combination of values across sections is impossible.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        self._check_horizon()
        self._check_step()
        if self.schedule.name == "plateau" and self.eval.every_steps is None:
            refuse(
                "schedule.name",
                "plateau",
                "waits for evaluations, of which there is one, at the end",
                "set eval.every_steps",
            )
        self._check_contexts()
        stride, seq_len = self.eval.stride_tokens, self.data.seq_len
        if stride is not None and (
            stride > seq_len or self.data.batching in ("padded", "bucketed")
        ):
            refuse(
                "eval.stride_tokens",
                stride,
                f"makes no overlapping windows of data.seq_len = {seq_len} with data.batching = "
                f"{self.data.batching!r}",
                "set eval.stride_tokens=none, or at most data.seq_len with data.batching=packed",
            )
        if self.schedule.min_lr > self.optim.lr:
            refuse(
                "schedule.min_lr",
                self.schedule.min_lr,
                f"is above optim.lr = {self.optim.lr}",
                "lower it, or raise optim.lr",
            )
        for name in ("on_nonfinite", "on_spike"):
            if getattr(self.train, name) == "rollback" and self.checkpoint.every_steps is None:
                refuse(
                    f"train.{name}",
                    "rollback",
                    "has nothing to go back to, as checkpoint.every_steps is unset",
                    "set checkpoint.every_steps",
                )
        vocab_size = self.model.vocab_size
        corpus = self.data.path is None and not self.data.paths
        if corpus and vocab_size and vocab_size < self.data.corpus_vocab_size:
            refuse(
                "model.vocab_size",
                vocab_size,
                f"is below data.corpus_vocab_size = {self.data.corpus_vocab_size}",
                "leave it unset, or lower data.corpus_vocab_size",
            )
        if self.eval.sample_every_steps is not None and self.eval.prompts == ():
            refuse(
                "eval.sample_every_steps",
                self.eval.sample_every_steps,
                "asks for samples, and eval.prompts is empty",
                "give a prompt, or unset it",
            )

    def _check_horizon(self) -> None:
        loop = self.train
        horizon = {
            name: getattr(loop, name)
            for name in ("steps", "epochs", "tokens", "hours")
            if getattr(loop, name) is not None
        }
        if not horizon:
            refuse(
                "train.steps",
                None,
                "leaves the length of the run open",
                "set one of train.steps, train.epochs, train.tokens and train.hours",
            )
        if len(horizon) > 1:
            (first, value), *others = horizon.items()
            refuse(
                f"train.{first}",
                value,
                f"and {' and '.join(f'train.{k} = {v}' for k, v in others)} both fix the length"
                " of the run",
                f"keep one and unset the other, as in train.{first}=none",
            )
        if loop.steps is not None and self.schedule.warmup_steps >= loop.steps:
            refuse(
                "schedule.warmup_steps",
                self.schedule.warmup_steps,
                f"is not below train.steps = {loop.steps}",
                "lower it, or train for longer",
            )

    def _check_step(self) -> None:
        loop = self.train
        auto = isinstance(loop.micro_batch, str)
        if auto and loop.tokens_per_step is None:
            refuse(
                "train.micro_batch",
                loop.micro_batch,
                "leaves open how many tokens make a step, which decides how a run learns",
                "set train.tokens_per_step",
            )
        unit = self.data.seq_len * (1 if auto else loop.micro_batch)
        unit_is = "data.seq_len" if auto else "train.micro_batch · data.seq_len"
        if loop.tokens_per_step is not None and loop.tokens_per_step % unit:
            below = loop.tokens_per_step // unit * unit
            nearest = [str(n) for n in (below, below + unit) if n]
            refuse(
                "train.tokens_per_step",
                loop.tokens_per_step,
                f"is not a multiple of {unit_is} = {unit}",
                f"use {' or '.join(nearest)}",
            )

    def _check_contexts(self) -> None:
        contexts, data = self.schedule.context_tokens, self.data
        if contexts and data.batching not in ("packed", "sliding"):
            refuse(
                "schedule.context_tokens",
                list(contexts),
                f"cuts windows, and data.batching = {data.batching!r} makes a row of a document",
                "unset it, or use data.batching=packed",
            )
        for length in contexts:
            if data.seq_len % length or length >= data.seq_len:
                refuse(
                    "schedule.context_tokens",
                    list(contexts),
                    f"holds {length}, which is no part of data.seq_len = {data.seq_len}",
                    f"use divisors of it, such as {data.seq_len // 4 or 1} and "
                    f"{data.seq_len // 2 or 1}, or [] for none",
                )
