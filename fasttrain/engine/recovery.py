"""Faces bad steps: tells of them, goes back to a checkpoint, continues behind their samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fasttrain.checkpoint.files import history
from fasttrain.config.keys import counted
from fasttrain.data.files import DataError
from fasttrain.engine.faults import Decision, Fault, FaultPolicy, write_report

if TYPE_CHECKING:
    from torch import Tensor

    from fasttrain.engine.step import Numbers
    from fasttrain.engine.trainer import Trainer

__all__ = ["Recovery"]


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
