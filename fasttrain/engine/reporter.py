"""What a run tells of itself: a line of numbers, an evaluation, a sample, to file and console."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fasttrain.command import redact
from fasttrain.distributed.sharding import gathered
from fasttrain.log import metrics
from fasttrain.log.sinks import LogFile, Sinks, keep_lines
from fasttrain.model.transformer import flops_constants

if TYPE_CHECKING:
    from fasttrain.data.loader import Batch
    from fasttrain.engine.step import Numbers
    from fasttrain.engine.trainer import Trainer

__all__ = ["Reporter"]


class Reporter:
    """Writes the log of one run.

    Args:
        trainer: the run; without a ``run_dir`` there are no files, without a console no lines. On
            any rank but the first there are neither.

    Attributes:
        n_tokens: targets that the run was trained on, padding left out, over all ranks.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.sinks: Sinks | None = None
        if trainer.run_dir is not None and trainer.world.leads:
            made_by = trainer.recorded.get("provenance")
            self.sinks = Sinks(trainer.config, trainer.run_dir, made_by)
        self.ema = metrics.LossTracker()
        constants = flops_constants(trainer.model)
        seq_len = trainer.config.data.seq_len
        self.flops_per_token = metrics.flops_per_token(**constants, seq_len=seq_len)
        self.peak_flops = metrics.peak_flops(trainer.device, trainer.precision.name)
        if self.peak_flops is not None:
            self.peak_flops *= trainer.world.size
        self.first_line = True  # of this session
        self.n_tokens = self._n_fresh = 0  # the latter since the last line

    def count(self, batches: Sequence[Batch]) -> None:
        """Count the tokens of a step; the loader knows them, the device is not asked."""
        n_tokens = sum(batch.n_tokens for batch in batches)
        self.n_tokens += n_tokens
        self._n_fresh += n_tokens

    def train(self, numbers: Numbers, *, stopped: bool) -> None:
        """Write a line for the step just done.

        Args:
            numbers: of the steps since the last line.
            stopped: there is a line only because the run stops here. Its loss is not averaged, and
                a run that goes on drops it: both are as if it had not stopped.
        """
        trainer, loss = self.trainer, numbers.steps[-1].loss
        per_step, self._n_fresh = self._n_fresh / max(trainer.account.n_steps, 1), 0
        times = trainer.account.line(trainer.step_count)
        tokens_per_s = 1000 * per_step / max(times["step_ms"] or 0.0, 1e-6)
        done, left_s = trainer.progress()
        row: dict[str, Any] = {
            "step": trainer.step_count,
            "progress": done,
            "left_s": left_s,
            "tokens": self.n_tokens,
            "epoch": trainer.position / trainer.train_loader.samples_per_epoch,
            "loss": loss,
            "loss_ema": self.ema.value if stopped else self.ema.update(loss),
            "lr": trainer.last_lr,
            "grad_norm": numbers.steps[-1].norm,
            "tokens_per_s": tokens_per_s,
            **times,
            "mfu": metrics.mfu(tokens_per_s, self.flops_per_token, self.peak_flops),
            "peak_memory_gib": metrics.peak_memory_gib(trainer.device),
            "skipped_steps": trainer.recovery.policy.skipped_steps,
            "spikes": trainer.recovery.policy.spikes,
            "rollbacks": trainer.recovery.policy.rollbacks,
        }
        if trainer.precision.scaled:
            row["grad_scale"] = numbers.grad_scale
        if stopped:
            row["stopped"] = True
        if self.first_line:
            row["first_step_s"] = trainer.first_step_s
            self.first_line = False
        if self.sinks:
            self.sinks.write("train", row)
        if trainer.console:
            trainer.console.train(row)

    def evaluation(self, result: dict[str, float | None]) -> None:
        """Write the result of an evaluation."""
        row = {"step": self.trainer.step_count, **result}
        if self.sinks:
            self.sinks.write("eval", row)
        if self.trainer.console:
            loss, lowest = result["val_loss"], self.trainer.best_val_loss
            best = loss is not None and loss < lowest < math.inf  # the first says nothing
            self.trainer.console.evaluation({**row, "best": best})

    def sample(self) -> None:
        """Let the model go on from the next of the prompts, and write what it made of it."""
        trainer, every = self.trainer, self.trainer.config.eval.sample_every_steps
        assert trainer.sampler is not None
        trainer.model.eval()
        opened, measured = trainer.guard.opened(), trainer.account.measure("sample")
        averaged, whole = trainer.ema.in_use(), gathered(trainer.model, trainer.world)
        with averaged, opened, measured, whole:
            prompt, text = trainer.sampler(
                trainer.model, trainer.step_count // every if every else 0
            )
        trainer.model.train()
        if trainer.console:
            trainer.console.sample(trainer.step_count, prompt, text)
        if trainer.run_dir and trainer.world.leads:
            file = LogFile(trainer.run_dir / "samples.txt")
            file.write(redact(f"--- step {trainer.step_count}\n{prompt}{text}\n"))
            file.close()

    def drop_after(self, step: int) -> None:
        """Forget the rows and samples of steps after ``step``: the run goes on from there."""
        if self.sinks:
            self.sinks.drop_after(step)
            at = 0

            def keep(line: str) -> bool:
                nonlocal at
                if head := re.fullmatch(r"--- step (\d+)\n", line):
                    at = int(head[1])
                return at <= step

            assert self.trainer.run_dir is not None
            keep_lines(self.trainer.run_dir / "samples.txt", keep)

    def warn(self, text: str) -> None:
        """Tell a person that something is wrong."""
        if self.trainer.console:
            self.trainer.console.warn(text)

    def close(self) -> None:
        """Close the files."""
        if self.sinks:
            self.sinks.close()
