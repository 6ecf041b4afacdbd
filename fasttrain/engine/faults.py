"""What a run does about losses and gradients that are not finite, and about spikes.

The device has judged each step and made no update of a bad one. The verdicts reach the host with
the next log line, save or evaluation. Here the run decides whether to continue, to go back to a
checkpoint and continue behind the offending batches, or to stop; and it writes the batches down.
"""

import json
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from fasttrain.config.keys import counted
from fasttrain.data.loader import Loader
from fasttrain.data.tokenizer import load_tokenizer
from fasttrain.engine.saving import Saver
from fasttrain.engine.state import Fault, StateGuard, Tensors
from fasttrain.engine.step import FINE, StepNumbers
from fasttrain.log.metrics import NormWatch
from fasttrain.storage import DataError, write_atomically

# Steps in a row that may be skipped. An fp16 scale halves at each overflow, so that 2^16 is down to
# 1 after 16, and only then is a gradient to blame.
MAX_SKIPPED_IN_A_ROW = 20
MAX_REPORTS = 20  # of a run: each holds the text of a whole step
# By verdict
KINDS = ("fine", "overflow", "nonfinite", "spike", "transient", "persistent", "empty")


class Decision(NamedTuple):
    """What to do, about which steps, those to report; and a warning about steps that were made."""

    action: Literal["go on", "roll back", "stop"]
    offending: list[Fault]
    reported: list[Fault]
    warning: str = ""


def write_report(fault: Fault, loader: Loader, n_micro_batches: int, run_dir: Path) -> Path | None:
    """Write the samples of a bad step to ``run_dir/faults/step-N.jsonl``, one a line.

    Of several ranks each writes its own, those after the first to ``step-N-rank-R.jsonl``. They are
    read again: a step keeps no batch. With a tokenizer in the run folder each line has the text,
    else the token ids. None: the run has `MAX_REPORTS` already.
    """
    folder = run_dir / "faults"
    folder.mkdir(exist_ok=True)
    options = loader.options
    of_rank = f"-rank-{options.rank}" if options.rank else ""
    path = folder / f"step-{fault.step:08d}{of_rank}.jsonl"
    if not path.exists() and len(list(folder.glob(f"step-????????{of_rank}.jsonl"))) >= MAX_REPORTS:
        return None
    tokenizer_path = run_dir / "tokenizer.json"
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path.exists() else None
    rows, lines = options.micro_batch, list[str]()
    with loader.at(fault.position) as again:
        for m, batch in enumerate(islice(again, n_micro_batches)):
            first = fault.position + (m * options.world_size + options.rank) * rows
            ids = loader.sample_ids(first, rows).tolist()
            for row, (sample, tokens) in enumerate(zip(ids, batch.tokens.tolist(), strict=True)):
                line = {**fault.saved(), "position": first + row, "sample": sample}
                if tokenizer is None:
                    line["tokens"] = tokens
                else:
                    line["text"] = tokenizer.decode(tokens, skip_special_tokens=False)
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode())
    return path


class Recovery:
    """Acts on the verdicts on the steps of a run.

    The keys ``on_nonfinite``, ``on_spike`` and ``max_rollbacks`` decide.
    """

    def __init__(self, saver: Saver, guard: StateGuard) -> None:
        self.saver, self.reporter, self.guard = saver, saver.reporter, guard
        self.state, self.train_step, self.loop = saver.state, saver.train_step, saver.config.train
        self.norms = NormWatch()
        self.unseen: list[int] = []  # the first sample of each step whose verdict is not here yet
        self._alike_at = 0  # the last step at which the ranks' copies of the parameters were

    def look(self, loader: Loader) -> list[StepNumbers] | None:
        """Fetch the numbers of the steps since the last look, judge the steps, and act.

        Returns:
            The numbers; None if the run went back to a checkpoint.

        Raises:
            FloatingPointError: the run has to stop.
        """
        steps, decision = self._fetch_and_judge()
        self._report(decision, loader)  # reads the samples of bad steps, which may take long
        if decision.action == "go on":
            return steps
        if decision.action == "roll back" and self._go_back(decision.offending):
            return None
        raise FloatingPointError(self.reason(decision, loader))

    def look_and_save(self, loader: Loader, rng: Tensors) -> None:
        """Fetch and judge in a thread that ends the run in place of the one that trains; save.

        If the run is to go back, nothing is saved: the resumed run goes on from the last checkpoint
        and meets the bad steps again.

        Args:
            loader: of the training split, to write down the samples of bad steps.
            rng: the random states to save, at the beginning of what was being computed.

        Raises:
            FloatingPointError: the run had to stop.
        """
        _, decision = self._fetch_and_judge()
        if decision.action == "go on":
            self.saver.save_now(rng)
        else:
            self.saver.close()  # what is being saved is from before the bad steps
        self._report(decision, loader)
        if decision.action == "roll back":
            self.reporter.console.warn("the steps since the last checkpoint are not saved")
        elif decision.action == "stop":
            raise FloatingPointError(self.reason(decision, loader))

    def _fetch_and_judge(self) -> tuple[list[StepNumbers], Decision]:
        with self.guard.computing():
            steps, seconds = self.train_step.numbers(), self.train_step.clock.read()
        names = ("forward_backward", "optimizer", "communication")
        for name, spent_s in zip(names, seconds, strict=True):
            self.state.account.add(name, spent_s)
        decision = self.judge(self.state.step - len(self.unseen) + 1, self.unseen, steps)
        self.unseen.clear()
        return steps, decision

    def _go_back(self, offending: list[Fault]) -> bool:
        """Load the newest checkpoint from before the offending steps, if there is one."""
        first = offending[0].step
        checkpoint = self.saver.go_back(before=first)
        if checkpoint is None:
            return False
        self.state.faults.rolled_back(offending)
        self._alike_at = self.state.step  # all have read the same files
        blamed = counted(sum(not fault.of_machine for fault in offending), "step")
        self.reporter.console.warn(
            f"back at step {self.state.step}, as {checkpoint.path} holds it; training goes on "
            f"without the samples of {blamed}, from step {first} on"
        )
        return True

    def judge(self, first_step: int, positions: list[int], steps: list[StepNumbers]) -> Decision:
        """Decide about the steps from ``first_step`` on; ``positions``: their first samples."""
        counts, warning = self.state.faults, ""
        found: list[Fault] = []
        for number, (position, step) in enumerate(zip(positions, steps, strict=True), first_step):
            if step.verdict == FINE:
                counts.row.clear()
                if usual := self.norms.update(step.norm):
                    warning = (
                        f"step {number}: the gradient explodes, its norm is {step.norm:.3g} and "
                        f"was {usual:.3g} on average; lower optim.lr, raise schedule.warmup_steps, "
                        "or set train.on_spike"
                    )
                continue
            kind = KINDS[step.verdict]
            fault = Fault(number, position, kind, step.loss, step.norm)
            counts.skipped_steps += 1
            counts.spikes += kind == "spike"
            counts.row.append(fault)
            if kind != "overflow":
                found.append(fault)
        # The strictest wish holds; a row of skipped steps goes back even where none wishes it.
        limit = self.loop.max_rollbacks
        if fatal := [f for f in found if self._wish(f)[1] == "stop"]:
            return Decision("stop", fatal, found)
        undone = [f for f in found if self._wish(f)[1] == "rollback"]
        if not undone and len(counts.row) >= MAX_SKIPPED_IN_A_ROW:
            undone, limit = list(counts.row), min(1, limit)
        if undone:
            return Decision("roll back" if counts.rollbacks < limit else "stop", undone, found)
        return Decision("go on", [], found, warning)

    def _wish(self, fault: Fault) -> tuple[str, str]:
        """Return the key that decides about a fault, and its value; empty steps are skipped."""
        if fault.kind == "empty":
            return "on_nonfinite", "skip"
        name = "on_spike" if fault.kind == "spike" else "on_nonfinite"
        return name, getattr(self.loop, name)

    def reason(self, decision: Decision, loader: Loader) -> str:
        """Return why the run stops, in one line that names samples and remedies."""
        first, last = decision.offending[0], decision.offending[-1]
        n, n_rollbacks = len(decision.offending), self.state.faults.rollbacks
        if decision.action == "roll back":
            why = "there is no earlier checkpoint to go back to; set checkpoint.every_steps"
        elif n_rollbacks:
            why = f"the run went back to a checkpoint {counted(n_rollbacks, 'time')} already"
        elif n >= MAX_SKIPPED_IN_A_ROW:
            why = f"no later step was good, and train.max_rollbacks = {self.loop.max_rollbacks}"
        else:
            why = "train.{} = {!r}".format(*self._wish(first))
        several = f" and {n - 1} more up to step {last.step}" if n > 1 else ""
        if first.of_machine:
            remedy = (
                "test this machine's memory and device; if an operation of this run is not "
                "deterministic, unset train.recheck_every_steps"
            )
        else:
            ids = loader.sample_ids(first.position, self.state.samples_per_step).tolist()
            shown = ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")
            measures = "lower optim.lr, raise schedule.warmup_steps or use run.dtype=bf16"
            if first.kind == "empty":
                measures = "for documents of one token use data.batching=packed"
            remedy = f"the first batch holds the samples {shown}; look at them, {measures}"
        return f"{first}{several}; {why}. No update was made. Remedy: {remedy}"

    def check_copies(self) -> None:
        """Raise FloatingPointError on all ranks where their copies of the parameters differ."""
        step, world = self.state.step, self.train_step.world
        odd = world.drifted(self.train_step.parameters)
        if not odd:
            self._alike_at = step
            return
        kept = self.saver.kept(before=self._alike_at + 1)
        remedy = (
            f"the newest checkpoint from before is {kept[0]}, go on with --resume {kept[0]} "
            "--overwrite"
            if kept
            else "no checkpoint from before is left; begin anew, with checkpoint.every_steps and "
            "checkpoint.keep_last such that they reach back over distributed.check_every_steps"
        )
        several = "ranks {} hold" if odd[1:] else "rank {} holds"
        raise FloatingPointError(
            f"{several.format(', '.join(map(str, odd)))} other parameters than the other ranks' "
            f"copies at step {step}, and they were identical at step {self._alike_at}: a device or "
            f"its memory is faulty, there or, of two copies, on either rank; {remedy}"
        )

    def _report(self, decision: Decision, loader: Loader) -> None:
        """Warn of what is not sound, and write the samples of bad steps down."""
        if decision.warning:
            self.reporter.console.warn(decision.warning)
        for fault in decision.reported:
            where = ""
            if not fault.of_machine:
                n_micro, run_dir = self.train_step.n_micro, self.reporter.run_dir
                try:
                    path = write_report(fault, loader, n_micro, run_dir)
                    where = f"; its samples: {path}" if path else ""
                except (OSError, DataError) as error:
                    where = f"; its samples could not be saved: {error}"
            self.reporter.console.warn(f"{fault}; this step made no update{where}")
