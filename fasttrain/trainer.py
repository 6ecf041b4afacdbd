"""The training loop, read top to bottom: step, log, evaluate, sample, save.

A *step* is one optimizer update, a *micro-batch* one forward and backward pass. A step that does
not log never waits for the device.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from fasttrain import metrics
from fasttrain.checkpoint import Checkpoint
from fasttrain.config import TrainConfig, UserError
from fasttrain.data.format import TokenDataset
from fasttrain.data.loader import Loader
from fasttrain.device import resolve_device, resolve_precision
from fasttrain.evaluation import evaluate
from fasttrain.horizon import HOURS_ESTIMATE_AT, n_steps, steps_in
from fasttrain.loggers import Console, JsonlLogger
from fasttrain.model import Transformer, flops_constants
from fasttrain.saving import Saver
from fasttrain.schedule import lr_at
from fasttrain.step import Criterion, TrainStep

__all__ = ["Outcome", "Trainer"]

# Steps in a row that may be skipped for a non-finite gradient. An fp16 scale halves at each of
# them, so that 2^16 is down to 1 after 16.
MAX_SKIPPED_IN_A_ROW = 20

Outcome = Literal["done", "stopped"]
Sampler = Callable[[Transformer, int], tuple[str, str]]  # model, sample number → prompt, text


class Trainer:
    """Trains a model: steps, evaluation, samples, checkpoints and the log.

    Args:
        model: maps tokens (B, T) to hidden states (B, T, D); ``head_weight`` (V, D) makes logits.
        optimizer: one optimizer or several whose parameters are disjoint. Each parameter group may
            carry ``lr_scale``, a factor on the schedule's learning rate.
        scheduler: learning rate as a pure function of the step; None: ``[schedule]`` of ``config``.
        criterion: ``(model, tokens, targets, doc_starts)`` → summed loss; None: fused linear
            cross-entropy.
        config: the resolved configuration.
        train_loader: micro-batches of ``config.train.micro_batch`` rows.
        val_dataset: the held-out split; None: nothing is evaluated.
        run_dir: where metrics, samples and checkpoints go; None: nothing is written.
        console: where a person looks; None: silence.
        sampler: makes the samples of ``eval.sample_every_steps``.
        recorded: further facts for the checkpoint's state, such as fingerprints of the data.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scheduler: Callable[[int], float] | None,
        criterion: Criterion | None,
        config: TrainConfig,
        *,
        train_loader: Loader,
        val_dataset: TokenDataset | None = None,
        run_dir: Path | None = None,
        console: Console | None = None,
        sampler: Sampler | None = None,
        recorded: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.device = resolve_device(config.run.device)
        self.precision = resolve_precision(config.run.dtype, self.device)
        self.model = model.to(self.device)
        self.optimizers = (
            [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        )
        self.scheduler = scheduler
        self.train_loader = train_loader
        self.val_dataset = val_dataset
        self.run_dir, self.console = run_dir, console
        self.sampler = sampler
        self.recorded = recorded or {}
        self.train_step = TrainStep(
            self.model,
            self.optimizers,
            config,
            device=self.device,
            precision=self.precision,
            criterion=criterion,
        )
        self.jsonl: JsonlLogger | None = None
        if run_dir is not None:
            self.jsonl = JsonlLogger(run_dir / "metrics.jsonl")
        self.saver = Saver(self)
        self.writer = self.saver.writer

        rows, seq_len = config.train.micro_batch, config.data.seq_len
        self.accumulation = (config.train.tokens_per_step or rows * seq_len) // (rows * seq_len)
        self.samples_per_step = rows * self.accumulation
        self.tokens_per_step = self.samples_per_step * seq_len
        constants = flops_constants(self.model)
        self.flops_per_token = metrics.flops_per_token(**constants, seq_len=seq_len)
        self.peak_flops = metrics.peak_flops(self.device, self.precision.name)
        self.total_steps = n_steps(
            config.train,
            tokens_per_step=self.tokens_per_step,
            samples_per_step=self.samples_per_step,
            samples_per_epoch=train_loader.samples_per_epoch,
        )
        self.step_count = 0
        self.position = self.train_loader.position  # global index of the next sample
        self.trained_s = 0.0  # seconds inside steps, over all sessions of the run
        self.first_step_s: float | None = None  # compilation included
        self.best_val_loss = math.inf
        self.last_eval: dict[str, float | None] = {}  # of this very step, else empty
        self.stop_at: int | None = None
        self.last_lr = 0.0
        self.ema = metrics.LossTracker()
        self._window = (0.0, 0.0, 0)  # step seconds, wait seconds and steps since the last log line

    # ---- the loop ------------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train to the horizon or to a requested stop; evaluate and save at the end.

        Returns:
            ``done``, or ``stopped`` where `request_stop` ended it with a checkpoint.

        Raises:
            FloatingPointError: too many steps in a row had a non-finite loss or gradient.
        """
        return self._run(until=None)

    def train_epoch(self) -> Outcome:
        """Train to the end of the current epoch of the data or the horizon, whichever is first."""
        per_epoch = self.train_loader.samples_per_epoch
        epoch = self.step_count * self.samples_per_step // per_epoch
        return self._run(until=math.ceil((epoch + 1) * per_epoch / self.samples_per_step))

    def request_stop(self, at_step: int | None = None) -> None:
        """Make the loop end with a checkpoint after ``at_step``; None: after the step under way."""
        self.stop_at = self.step_count if at_step is None else at_step

    def _run(self, until: int | None) -> Outcome:
        session_start = time.perf_counter()
        self.model.train()
        # A garbage collection inside a step stalls it for milliseconds, and steps make no cycles
        # that matter; evaluation collects.
        gc.collect()
        gc.disable()
        try:
            while not self._finished(until):
                if self.stop_at is not None and self.step_count >= self.stop_at:
                    self.saver.save_once()
                    return "stopped"
                log = self._step()
                if self.first_step_s is None:
                    self._synchronize()
                    self.first_step_s = time.perf_counter() - session_start
                last = self._finished(until)
                if log or last:
                    self._log()
                self._after_step(last)
        finally:
            gc.enable()
        self.saver.save_once()
        return "done"

    def _step(self) -> bool:
        """Run and time one step; return whether its numbers are to be logged."""
        started, waited = time.perf_counter(), self.train_loader.wait_s
        batches = list(islice(self.train_loader, self.accumulation))  # fewer at the end of epochs
        self.last_lr = self.lr()
        self.train_step(batches, self.last_lr)
        self.step_count += 1
        self.position += self.samples_per_step
        log = self._due(self.config.log.every_steps) or self.step_count in (1, HOURS_ESTIMATE_AT)
        if log:
            self._synchronize()
        elapsed = time.perf_counter() - started
        self.trained_s += elapsed
        step_s, wait_s, n_steps = self._window
        wait_s += self.train_loader.wait_s - waited
        self._window = (step_s + elapsed, wait_s, n_steps + 1)
        return log

    def lr(self) -> float:
        """Return the learning rate of the step to come."""
        if self.scheduler is not None:
            return self.scheduler(self.step_count)
        # Before train.hours has been measured, the end is far away.
        total = self.total_steps if self.total_steps is not None else 10**12
        return lr_at(self.step_count, total, self.config.schedule, self.config.optim.lr)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step_count % every == 0

    def _finished(self, until: int | None) -> bool:
        if until is not None and self.step_count >= until:
            return True
        if self.config.train.hours is not None:
            left_s = self.config.train.hours * 3600 - self.trained_s
            if self.total_steps is None and self.step_count >= HOURS_ESTIMATE_AT:
                self.total_steps = steps_in(
                    left_s,
                    step=self.step_count,
                    trained_s=self.trained_s,
                    first_step_s=self.first_step_s or 0.0,
                )
            if left_s <= 0:
                return True
        return self.total_steps is not None and self.step_count >= self.total_steps

    def _after_step(self, last: bool) -> None:
        config = self.config
        if self.console:
            self.console.progress(self.step_count, self.total_steps or 0)
        self.last_eval = {}
        if self.val_dataset is not None and (self._due(config.eval.every_steps) or last):
            before = self.best_val_loss
            self.evaluate()
            if self.best_val_loss < before:
                self.saver.save_once()
        if self._due(config.checkpoint.every_steps) or last:
            self.saver.save_once()
        if self.sampler and (self._due(config.eval.sample_every_steps) or last):
            self._sample()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _log(self) -> None:
        """Write a line for the step just done; here alone a step's numbers reach the host."""
        loss, norm, skipped, in_a_row, scale = self.train_step.numbers()
        step_s, wait_s, n_steps = self._window
        self._window = (0.0, 0.0, 0)
        tokens_per_s = n_steps * self.tokens_per_step / step_s
        row: dict[str, Any] = {
            "step": self.step_count,
            "tokens": self.position * self.config.data.seq_len,
            "epoch": self.position / self.train_loader.samples_per_epoch,
            "loss": loss,
            "loss_ema": self.ema.update(loss),
            "lr": self.last_lr,
            "grad_norm": norm,
            "tokens_per_s": tokens_per_s,
            "step_ms": 1000 * step_s / n_steps,
            "data_wait_ms": 1000 * wait_s / n_steps,
            "mfu": metrics.mfu(tokens_per_s, self.flops_per_token, self.peak_flops),
            "peak_memory_gib": metrics.peak_memory_gib(self.device),
            "skipped_steps": int(skipped),
        }
        if self.precision.scaled:
            row["grad_scale"] = scale
        if self.jsonl:
            self.jsonl.write("train", row)
        if self.console:
            self.console.train(row)
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"loss or gradient was not finite in the last {in_a_row:.0f} steps, up to step "
                f"{self.step_count}; the parameters are as before the first of them: lower "
                "optim.lr, raise schedule.warmup_steps or use run.dtype=bf16"
            )

    def close(self) -> None:
        """Wait for the checkpoint being written, then end the threads and close the files.

        Raises:
            CheckpointError: that checkpoint could not be written.
        """
        self.train_loader.close()
        if self.jsonl:
            self.jsonl.close()
        self.saver.close()

    # ---- evaluation and samples ----------------------------------------------------------------

    def evaluate(self) -> dict[str, float | None]:
        """Evaluate on the whole validation split, log it and return it (see `evaluation.evaluate`).

        Raises:
            UserError: there is no validation split.
        """
        if self.val_dataset is None:
            raise UserError("there is no validation split to evaluate on; give the Trainer one")
        gc.collect()
        self.last_eval = evaluate(
            self.model,
            self.val_dataset,
            seq_len=self.config.data.seq_len,
            batch_size=self.config.eval.batch_size or self.config.train.micro_batch,
            device=self.device,
            precision=self.precision,
        )
        row = {"step": self.step_count, **self.last_eval}
        if self.jsonl:
            self.jsonl.write("eval", row)
        if self.console:
            self.console.evaluation(row)
        self.best_val_loss = min(self.best_val_loss, self.last_eval["val_loss"] or math.inf)
        return self.last_eval

    def _sample(self) -> None:
        assert self.sampler is not None
        every = self.config.eval.sample_every_steps
        self.model.eval()
        prompt, text = self.sampler(self.model, self.step_count // every if every else 0)
        self.model.train()
        if self.console:
            self.console.sample(self.step_count, prompt, text)
        if self.run_dir:
            with (self.run_dir / "samples.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- step {self.step_count}\n{prompt}{text}\n")

    # ---- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self) -> Path | None:
        """Save everything that the run needs to go on as if it had not stopped.

        Returns:
            The checkpoint's folder, complete after ``writer.wait()``; None without a run folder.
        """
        return self.saver.save()

    def load_checkpoint(self, path: Path) -> Checkpoint:
        """Restore all that `save_checkpoint` saved at ``path``; training goes on from there.

        The loader is not moved: build it at ``checkpoint.state["position"]``.

        Raises:
            CheckpointError: the checkpoint is damaged.
            UserError: it is of another model.
        """
        return self.saver.load(path)
