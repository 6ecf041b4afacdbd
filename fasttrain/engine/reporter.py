"""What a run writes about itself to files and console: metrics, evaluations, samples, warnings."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fasttrain.config import TrainConfig
from fasttrain.device import CoreWatch
from fasttrain.engine.state import RunState
from fasttrain.engine.step import StepNumbers, TrainStep
from fasttrain.log import metrics
from fasttrain.log.console import Console
from fasttrain.log.sinks import LogFile, Sinks
from fasttrain.model.transformer import Transformer
from fasttrain.printing import printable
from fasttrain.redact import redact

if TYPE_CHECKING:
    from fasttrain.mirror import Mirror


class _Nothing:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


NOTHING: Any = _Nothing()  # a console or file that takes any call, for a rank that has none


@dataclass
class Reporter:
    """Writes the log of one run; the first rank alone writes files."""

    state: RunState
    train_step: TrainStep
    config: TrainConfig
    samples_per_epoch: int
    run_dir: Path
    console: Console
    mirror: "Mirror | None"
    made_by: dict[str, Any] | None

    def __post_init__(self) -> None:
        step, folder, leads = self.train_step, self.run_dir, self.train_step.world.leads
        self.sinks: Sinks = Sinks(self.config, folder, self.made_by) if leads else NOTHING
        self.samples: LogFile = LogFile(folder / "samples.txt") if leads else NOTHING
        self.flops_per_token = cast(Transformer, step.model).flops_per_token()
        self.device = step.loss.device
        self.peak_flops = metrics.peak_flops(self.device, step.precision.name)
        self._session_has_line = False
        self.cores = CoreWatch()

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
        self.sinks.write("train", row)
        self.console.train(row)

    def watch_cores(self) -> None:
        """After each step on a CPU: have threads sleep while others use their cores, and say so."""
        if self.device.type == "cpu" and (share := self.cores.look()):
            self.console.note(
                f"Threads waited for a CPU core {share:.0%} of the time: other processes use the "
                "cores, or a quota is used up; try run.threads=1"
            )

    def evaluation(self, result: dict[str, Any], scores: dict[str, float]) -> None:
        """Write the result of an evaluation, and scores on ``eval.tasks`` if there are any."""
        step, best = self.state.step, self.state.best_val_loss
        row = {"step": step, **result}
        self.sinks.write("eval", row)
        is_best = result["val_loss"] < best < math.inf  # the first says nothing
        self.console.evaluation(row | {"best": is_best})
        if scores:
            self.sinks.write("tasks", {"step": step, **scores})
            named = (f"{name} {score:.4f}" for name, score in scores.items())
            self.console.note(f"tasks {step:>7}  {'  '.join(named)}")

    def sample(self, prompt: str, text: str) -> None:
        """Write a prompt and how the model continued it."""
        self.console.sample(self.state.step, prompt, text)
        self.samples.write(printable(redact(f"--- step {self.state.step}\n{prompt}{text}\n")))

    def drop_after(self, step: int) -> None:
        """Remove the rows and samples of steps after ``step``, from which the run continues."""

        def step_of(line: str) -> int | None:
            head = re.fullmatch(r"--- step (\d+)\n", line)
            return int(head[1]) if head else None

        self.sinks.drop_after(step)
        self.samples.drop_after(step, step_of)

    def close(self) -> None:
        """Close the files, and let threads spin again."""
        self.cores.close()
        self.sinks.close()
        self.samples.close()
