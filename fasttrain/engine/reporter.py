"""What a run writes about itself to files and console: metrics, evaluations, samples, warnings."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fasttrain.checkpoint import Mirror
from fasttrain.command import redact
from fasttrain.config import TrainConfig
from fasttrain.engine.state import RunState
from fasttrain.engine.step import StepNumbers, TrainStep
from fasttrain.log import metrics
from fasttrain.log.console import Console
from fasttrain.log.sinks import LogFile, Sinks
from fasttrain.model.transformer import Transformer


@dataclass
class Reporter:
    """Writes the log of one run; the first rank alone writes files."""

    state: RunState
    train_step: TrainStep
    config: TrainConfig
    samples_per_epoch: int
    run_dir: Path
    console: Console | None
    mirror: Mirror | None
    made_by: dict[str, Any] | None

    def __post_init__(self) -> None:
        step = self.train_step
        self.sinks = Sinks(self.config, self.run_dir, self.made_by) if step.world.leads else None
        self.flops_per_token = cast(Transformer, step.model).flops_per_token()
        self.device = step.loss.device
        self.peak_flops = metrics.peak_flops(self.device, step.precision.name)
        self._session_has_line = False

    def train(self, step: StepNumbers, *, stopped: bool) -> None:
        """Write a line for the step just done.

        ``stopped``: there is a line only because the run stops here. Its loss is not averaged, and
        a resumed run drops it: both are as if it had not stopped.
        """
        state = self.state
        if not stopped:
            state.loss_ema = metrics.smoothed(state.loss_ema, step.loss)
        per_step, state.fresh_tokens = state.fresh_tokens / max(state.account.n_steps, 1), 0
        times = state.account.line(state.step)
        tokens_per_s = 1000 * per_step / max(times["step_ms"] or 0.0, 1e-6)
        of_one = tokens_per_s / self.train_step.world.size
        done, left_s = state.progress()
        row: dict[str, Any] = {
            "step": state.step,
            "progress": done,
            "left_s": left_s,
            "tokens": state.tokens,
            "epoch": state.position / self.samples_per_epoch,
            "loss": step.loss,
            "loss_ema": state.loss_ema,
            "lr": state.lr,
            "grad_norm": step.norm,
            "tokens_per_s": tokens_per_s,
            **times,
            "mfu": metrics.mfu(of_one, self.flops_per_token, self.peak_flops),
            "peak_memory_gib": metrics.peak_memory_gib(self.device),
            "skipped_steps": state.faults.skipped_steps,
            "spikes": state.faults.spikes,
            "rollbacks": state.faults.rollbacks,
        }
        if self.train_step.precision.scaled:
            row["grad_scale"] = step.grad_scale
        if self.mirror:
            row["failed_copies"] = self.mirror.failures
        if stopped:
            row["stopped"] = True
        if not self._session_has_line:
            row["first_step_s"], self._session_has_line = state.first_step_s, True
        if self.sinks:
            self.sinks.write("train", row)
        if self.console:
            self.console.train(row)

    def evaluation(self, result: dict[str, Any], scores: dict[str, float]) -> None:
        """Write the result of an evaluation, and scores on ``eval.tasks`` if there are any."""
        step, best = self.state.step, self.state.best_val_loss
        if self.sinks:
            self.sinks.write("eval", {"step": step, **result})
            if scores:
                self.sinks.write("tasks", {"step": step, **scores})
        if self.console:
            is_best = result["val_loss"] < best < math.inf  # the first says nothing
            self.console.evaluation({"step": step, **result, "best": is_best})
            if scores:
                shown = (f"{name} {score:.4f}" for name, score in scores.items())
                self.console.note(f"tasks {step:>7}  {'  '.join(shown)}")

    def sample(self, prompt: str, text: str) -> None:
        """Write a prompt and how the model continued it."""
        if self.console:
            self.console.sample(self.state.step, prompt, text)
        if self.sinks:
            file = LogFile(self.run_dir / "samples.txt")
            file.write(redact(f"--- step {self.state.step}\n{prompt}{text}\n"))
            file.close()

    def drop_after(self, step: int) -> None:
        """Remove the rows and samples of steps after ``step``, from which the run continues."""

        def step_of(line: str) -> int | None:
            head = re.fullmatch(r"--- step (\d+)\n", line)
            return int(head[1]) if head else None

        if self.sinks:
            self.sinks.drop_after(step)
            LogFile(self.run_dir / "samples.txt").drop_after(step, step_of)

    def warn(self, text: str) -> None:
        """Show a warning."""
        if self.console:
            self.console.warn(text)

    def close(self) -> None:
        """Close the files."""
        if self.sinks:
            self.sinks.close()
