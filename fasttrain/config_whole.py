"""The whole configuration: all sections, and what must hold between them. Standard library only."""

from dataclasses import dataclass, field
from typing import NoReturn

from fasttrain.config_keys import refuse
from fasttrain.config_sections import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    LogConfig,
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
            self._refuse(
                "schedule.name",
                "waits for evaluations, of which there is one, at the end; set eval.every_steps",
            )
        if self.schedule.min_lr > self.optim.peak_lr:
            peak = self.optim.peak_lr
            self._refuse("schedule.min_lr", f"is above the peak learning rate, {peak}; lower it")
        for name in ("on_nonfinite", "on_spike"):
            if getattr(self.train, name) == "rollback" and self.checkpoint.every_steps is None:
                self._refuse(f"train.{name}", "needs checkpoints; set checkpoint.every_steps")
        vocab_size = self.model.vocab_size
        corpus = self.data.path is None and not self.data.paths
        if corpus and vocab_size and vocab_size < self.data.corpus_vocab_size:
            self._refuse(
                "model.vocab_size",
                f"is below data.corpus_vocab_size = {self.data.corpus_vocab_size}; leave it unset, "
                "or lower that",
            )

    def _refuse(self, name: str, problem: str) -> NoReturn:
        section, _, k = name.partition(".")
        refuse(name, getattr(getattr(self, section), k), problem)

    def _check_horizon(self) -> None:
        names = ("steps", "epochs", "tokens", "hours")
        horizon = [f"train.{k}" for k in names if getattr(self.train, k) is not None]
        if not horizon:
            self._refuse(
                "train.steps",
                "leaves the length of the run open; set one of train.steps, train.epochs, "
                "train.tokens and train.hours",
            )
        if len(horizon) > 1:
            others = " and ".join(f"{k} = {getattr(self.train, k[6:])}" for k in horizon[1:])
            self._refuse(
                horizon[0],
                f"and {others} both fix the length of the run; keep one and unset the other, as in "
                f"{horizon[0]}=none",
            )
        if self.train.steps is not None and self.schedule.warmup_steps >= self.train.steps:
            self._refuse(
                "schedule.warmup_steps",
                f"is not below train.steps = {self.train.steps}; lower it, or train for longer",
            )

    def _check_step(self) -> None:
        if self.train.tokens_per_step is None and isinstance(self.train.micro_batch, str):
            self._refuse(
                "train.micro_batch",
                "leaves open how many tokens make a step, which decides how a run learns; set "
                "train.tokens_per_step",
            )
