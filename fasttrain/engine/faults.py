"""What a run does about losses and gradients that are not finite, and about spikes.

The device has judged each step and made no update of a bad one; the verdicts come to the host with
the next log line, save or evaluation. Here is decided whether the run goes on, goes back to a
checkpoint to continue behind the offending batches, or stops; and the batches are written down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fasttrain.checkpoint.files import history
from fasttrain.config import LoopConfig
from fasttrain.config.keys import counted
from fasttrain.data.files import DataError
from fasttrain.data.loader import Loader
from fasttrain.data.tokenizer import load_tokenizer
from fasttrain.engine.step import (
    FINE,
    NONFINITE,
    OVERFLOW,
    PERSISTENT,
    SPIKE,
    TRANSIENT,
    StepNumbers,
)
from fasttrain.log.metrics import NormWatch

if TYPE_CHECKING:
    from torch import Tensor

    from fasttrain.engine.step import Numbers
    from fasttrain.engine.trainer import Trainer


# Steps in a row that may be skipped. An fp16 scale halves at each overflow, so that 2^16 is down to
# 1 after 16, and only then is a gradient to blame.
MAX_SKIPPED_IN_A_ROW = 20
MAX_REPORTS = 20  # of a run: each holds the text of a whole step
KINDS = {
    **{OVERFLOW: "overflow", NONFINITE: "nonfinite", SPIKE: "spike"},
    **{TRANSIENT: "transient", PERSISTENT: "persistent"},
}
# What is told of steps that came out otherwise when they were run again.
_RECHECKED = {
    "transient": "transient error: run again it came out otherwise, a third time as one of the two",
    "persistent": "persistent error: run three times, it came out in three ways",
}


class Fault(NamedTuple):
    """A step of which no update was made.

    Attributes:
        step: its number, the first step being 1.
        position: global index of its first sample.
        kind: ``overflow`` of fp16 gradients, ``nonfinite``, ``spike``; or ``transient`` or
            ``persistent`` where the step was run again and came out otherwise.
        loss: mean loss.
        norm: gradient norm before clipping.
    """

    step: int
    position: int
    kind: str
    loss: float
    norm: float

    @property
    def of_machine(self) -> bool:
        """Whether the machine is to blame, and not the samples."""
        return self.kind in _RECHECKED

    def __str__(self) -> str:
        what = _RECHECKED.get(self.kind, self.kind)
        return f"step {self.step}: {what} (loss {self.loss:.4g}, gradient norm {self.norm:.4g})"


class Decision(NamedTuple):
    """What to do, about which steps, those to report; and a warning about steps that were made."""

    action: Literal["go on", "roll back", "stop"]
    offending: list[Fault]
    reported: list[Fault]
    warning: str = ""


class FaultPolicy:
    """Decides, and counts.

    Args:
        loop: the section with ``on_nonfinite``, ``on_spike`` and ``max_rollbacks``.
        samples_per_step: samples of one step, over all ranks.

    Attributes:
        skipped_steps: steps of which no update was made; steps that a rollback repeats count again.
        spikes: of these, the spikes.
        rollbacks: how often the run went back.
        passed_over: where each batch begins that is not trained on again, in global samples.
        row: the steps skipped last, without one in between that was not.
    """

    def __init__(self, loop: LoopConfig, samples_per_step: int) -> None:
        self.loop = loop
        self.samples_per_step = samples_per_step
        self.skipped_steps = self.spikes = self.rollbacks = 0
        self.passed_over: list[int] = []
        self.row: list[Fault] = []
        self.norms = NormWatch()

    def judge(
        self, first_step: int, positions: Sequence[int], steps: Sequence[StepNumbers]
    ) -> Decision:
        """Decide about the steps that the host has not seen yet.

        Args:
            first_step: the number of the first of them.
            positions: global index of the first sample of each.
            steps: loss, norm and verdict of each.
        """
        found: list[Fault] = []
        warning = ""
        for number, (position, step) in enumerate(zip(positions, steps, strict=True), first_step):
            if step.verdict == FINE:
                self.row.clear()
                if usual := self.norms.update(step.norm):
                    warning = (
                        f"step {number}: the gradient explodes, its norm is {step.norm:.3g} and "
                        f"was {usual:.3g} on average; lower optim.lr, raise schedule.warmup_steps, "
                        "or set train.on_spike"
                    )
                continue
            kind = KINDS[step.verdict]
            fault = Fault(number, position, kind, step.loss, step.norm)
            self.skipped_steps += 1
            self.spikes += kind == "spike"
            self.row.append(fault)
            if kind != "overflow":
                found.append(fault)
        if fatal := [f for f in found if self._wish(f)[1] == "stop"]:
            return Decision("stop", fatal, found)
        if undone := [f for f in found if self._wish(f)[1] == "rollback"]:
            may = self.rollbacks < self.loop.max_rollbacks
            return Decision("roll back" if may else "stop", undone, found)
        if len(self.row) >= MAX_SKIPPED_IN_A_ROW:
            may = self.rollbacks < min(1, self.loop.max_rollbacks)
            return Decision("roll back" if may else "stop", list(self.row), found)
        return Decision("go on", [], found, warning)

    def _wish(self, fault: Fault) -> tuple[str, str]:
        """Return the key that decides about a fault, and its value."""
        name = "on_spike" if fault.kind == "spike" else "on_nonfinite"
        return name, getattr(self.loop, name)

    def rolled_back(self, offending: Sequence[Fault]) -> None:
        """Count a rollback; samples that are to blame are not trained on again."""
        self.rollbacks += 1
        blamed = (f.position for f in offending if not f.of_machine)
        self.passed_over = sorted({*self.passed_over, *blamed})
        self.row.clear()

    def reason(self, decision: Decision, loader: Loader) -> str:
        """Return why the run stops, in one line that names samples and remedies."""
        first, last = decision.offending[0], decision.offending[-1]
        ids = loader.sample_ids(first.position, self.samples_per_step).tolist()
        shown = ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")
        n = len(decision.offending)
        if decision.action == "roll back":
            why = "there is no checkpoint from before to go back to; set checkpoint.every_steps"
        elif self.rollbacks:
            why = f"the run went back to a checkpoint {counted(self.rollbacks, 'time')} already"
        elif n >= MAX_SKIPPED_IN_A_ROW:
            why = f"no step was good since, and train.max_rollbacks = {self.loop.max_rollbacks}"
        else:
            why = "train.{} = {!r}".format(*self._wish(first))
        if first.of_machine:
            return (
                f"{first}; {why}. No update was made of it: test this machine's memory and device; "
                "if an operation of this run is not deterministic, unset train.recheck_every_steps"
            )
        several = f" and {n - 1} more up to step {last.step}" if n > 1 else ""
        return (
            f"{first}{several}; {why}. The first one's batch holds the samples {shown}. No update "
            "was made of these steps: look at the samples, lower optim.lr, raise "
            "schedule.warmup_steps or use run.dtype=bf16"
        )

    def next_position(self, position: int) -> int:
        """Return the first global sample index from ``position`` on that is not passed over."""
        for start in self.passed_over:
            if start <= position < start + self.samples_per_step:
                position = start + self.samples_per_step
        return position

    def state(self) -> dict[str, Any]:
        """Return what resuming needs, for JSON."""
        return {
            "skipped_steps": self.skipped_steps,
            "spikes": self.spikes,
            "rollbacks": self.rollbacks,
            "passed_over": self.passed_over,
            "row": [(*f[:3], _json(f.loss), _json(f.norm)) for f in self.row],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.skipped_steps, self.spikes = state["skipped_steps"], state["spikes"]
        self.rollbacks, self.passed_over = state["rollbacks"], list(state["passed_over"])
        self.row = [
            Fault(step, position, kind, float(loss), float(norm))
            for step, position, kind, loss, norm in state["row"]
        ]


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def write_report(fault: Fault, loader: Loader, n_micro_batches: int, run_dir: Path) -> Path | None:
    """Write the samples of a bad step to ``run_dir/faults/step-N.jsonl``, one a line.

    Of several ranks each writes its own, those after the first to ``step-N-rank-R.jsonl``.

    They are read again: a step keeps no batch. With a tokenizer in the run folder each line has the
    text, else the token ids.

    Args:
        fault: the step.
        loader: of the run; it is not moved.
        n_micro_batches: micro-batches of a step.
        run_dir: the run folder.

    Returns:
        The file; None where the run has `MAX_REPORTS` already.

    Raises:
        OSError: the file cannot be written.
        DataError: the samples cannot be read.
    """
    folder = run_dir / "faults"
    folder.mkdir(exist_ok=True)
    of_rank = f"-rank-{loader.rank}" if loader.rank else ""
    path = folder / f"step-{fault.step:08d}{of_rank}.jsonl"
    if not path.exists() and len(list(folder.glob(f"step-????????{of_rank}.jsonl"))) >= MAX_REPORTS:
        return None
    tokenizer_path = run_dir / "tokenizer.json"
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path.exists() else None
    facts = {**fault._asdict(), "loss": _json(fault.loss), "norm": _json(fault.norm)}
    rows, stride = loader.micro_batch, loader.micro_batch * loader.world_size
    lines = []
    with loader.at(fault.position) as again:
        for m, batch in enumerate(islice(again, n_micro_batches)):
            first = fault.position + m * stride + loader.rank * rows
            ids = loader.sample_ids(first, rows).tolist()
            for row, sample in enumerate(ids):
                tokens = batch.tokens[row].tolist()
                content: dict[str, Any] = {"tokens": tokens}
                if tokenizer is not None:
                    content = {"text": tokenizer.decode(tokens, skip_special_tokens=False)}
                line = {**facts, "position": first + row, "sample": sample, **content}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


class Recovery:
    """What a run does with the verdicts on its steps.

    Args:
        trainer: the run.

    Attributes:
        policy: decides and counts.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.policy = FaultPolicy(trainer.config.train, trainer.samples_per_step)
        self._unseen: list[int] = []  # first samples of the steps whose numbers the host lacks
        self._alike_at = 0  # the last step at which the ranks' copies of the parameters were

    def advance(self) -> None:
        """Move the run's position behind the step just made and behind what is passed over."""
        trainer = self.trainer
        self._unseen.append(trainer.position)
        trainer.position += trainer.samples_per_step
        if self.policy.next_position(trainer.position) != trainer.position:
            self._move()

    def forget(self, n_steps: int) -> None:
        """Take back the last steps: the device has not made them."""
        trainer = self.trainer
        trainer.train_step.n_unread -= n_steps
        del self._unseen[len(self._unseen) - n_steps :]

    def look(self) -> Numbers | None:
        """Bring the numbers of the steps since the last look to the host, and face what they show.

        Returns:
            The numbers; None where the run went back to a checkpoint.

        Raises:
            FloatingPointError: the run has to stop.
        """
        trainer = self.trainer
        numbers, decision = self._judge()
        self._tell(decision)
        if decision.action == "go on":
            return numbers
        if decision.action == "roll back":
            first = decision.offending[0].step
            checkpoint = trainer.saver.go_back(before=first)
            if checkpoint is not None:
                self.policy.rolled_back(decision.offending)
                self._alike_at = trainer.step_count  # all have read the same files
                self._move()
                steps = counted(sum(not f.of_machine for f in decision.offending), "step")
                trainer.reporter.warn(
                    f"back at step {trainer.step_count}, as {checkpoint.path} holds it; training "
                    f"goes on without the samples of {steps} from step {first} on"
                )
                return None
        raise FloatingPointError(self.policy.reason(decision, trainer.train_loader))

    def check_copies(self) -> None:
        """Compare the ranks' copies of the parameters, where there are several.

        Raises:
            FloatingPointError: they differ; on all ranks alike.
        """
        trainer = self.trainer
        step = trainer.step_count
        if trainer.world.n_copies == 1:
            return
        odd = trainer.world.drifted(trainer.train_step.parameters)
        if not odd:
            self._alike_at = step
            return
        folder = trainer.run_dir / "checkpoints" if trainer.run_dir else None
        found = history(folder) if folder and folder.is_dir() else []
        kept = [path for path, manifest in found if manifest and manifest["step"] <= self._alike_at]
        remedy = (
            f"the newest checkpoint from before is {kept[0]}, go on with --resume {kept[0]}"
            if kept
            else "no checkpoint from before is left; begin anew, with checkpoint.every_steps and "
            "checkpoint.keep_last such that they reach back over distributed.check_every_steps"
        )
        several = "ranks {} hold" if odd[1:] else "rank {} holds"
        raise FloatingPointError(
            f"{several.format(', '.join(map(str, odd)))} other parameters than the other ranks' "
            f"copies at step {step}, and they were alike at step {self._alike_at}: a device or its "
            f"memory is faulty, there or, of two copies, on either rank; {remedy}"
        )

    def save_unless_bad(self, rng: dict[str, Tensor]) -> None:
        """Save now with these random states, in place of the thread that trains.

        Where the run is to go back, nothing is saved: from the last checkpoint on it meets the bad
        steps again, and there is time to.

        Raises:
            CheckpointError: it could not be saved.
            FloatingPointError: the run has to stop.
        """
        _, decision = self._judge()
        if decision.action == "go on":
            self.trainer.saver.save_now(rng)
        else:
            self.trainer.saver.close()  # what is being saved is from before the bad steps
        self._tell(decision)  # reads their samples, which may take long
        if decision.action == "stop":
            raise FloatingPointError(self.policy.reason(decision, self.trainer.train_loader))
        if decision.action == "roll back":
            self.trainer.reporter.warn("the steps since the last checkpoint are not saved")

    def _judge(self) -> tuple[Numbers, Decision]:
        """Bring the numbers of the steps since the last time to the host, and decide about them."""
        trainer = self.trainer
        with trainer.guard.opened():
            numbers = trainer.train_step.numbers()
        trainer.account.add("forward_backward", numbers.forward_backward_s)
        trainer.account.add("optimizer", numbers.optimizer_s)
        trainer.account.add("communication", numbers.communication_s)
        first_step = trainer.step_count - len(self._unseen) + 1
        decision = self.policy.judge(first_step, self._unseen, numbers.steps)
        self._unseen.clear()
        if decision.warning:
            trainer.reporter.warn(decision.warning)
        return numbers, decision

    def _tell(self, decision: Decision) -> None:
        for fault in decision.reported:
            told = f"{fault}; no update was made of it{self._write_down(fault)}"
            self.trainer.reporter.warn(told)

    def _move(self) -> None:
        """Put position and loader where the samples go on that are trained on."""
        trainer = self.trainer
        trainer.position = self.policy.next_position(trainer.position)
        with trainer.train_loader as loader:
            trainer.train_loader = loader.at(trainer.position)

    def _write_down(self, fault: Fault) -> str:
        trainer = self.trainer
        if trainer.run_dir is None or fault.of_machine:
            return ""
        try:
            path = write_report(fault, trainer.train_loader, trainer.accumulation, trainer.run_dir)
        except (OSError, DataError) as error:
            return f"; its samples could not be written down: {error}"
        return f"; its samples: {path}" if path else ""
