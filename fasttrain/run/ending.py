"""How a run ends: done, stopped by a signal, given up in the middle of a step, or failed."""

import contextlib
import time

from fasttrain import checkpoint
from fasttrain.command import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, redacted
from fasttrain.config import UserError
from fasttrain.distributed.lockstep import call_ranks, hearing_ranks
from fasttrain.distributed.world import record_failure
from fasttrain.engine.trainer import Outcome, Trainer
from fasttrain.run.folder import RunFolder
from fasttrain.run.signals import StopSignals, end_at_once
from fasttrain.run.summary import show_end

__all__ = ["train_to_end"]

# Seconds from a signal to the moment from which the step under way is given up. The first step
# compiles for as long as a minute; later ones, batches of evaluation and samples take less.
PATIENCE_COMPILING_S, PATIENCE_S = 1.0, 8.0
# A terminal's Ctrl-C and a scheduler signal torchrun and all ranks, and torchrun signals these too.
ECHO_S = 3.0


def train_to_end(trainer: Trainer, folder: RunFolder, started: float) -> int:
    """Train to the end or to a signal; say how it ended and return the exit status.

    Args:
        trainer: the run.
        folder: its folder, with the console.
        started: when this process began, by `time.perf_counter`.
    """
    before = (trainer.step_count, trainer.trained_s, trainer.reporter.n_tokens)
    several = trainer.world.size > 1

    def end(outcome: Outcome) -> int:
        if folder.console:
            wall_s = time.perf_counter() - started
            show_end(trainer, folder.console, outcome, wall_s, *before)
        if outcome == "stopped":
            return EXIT_STOPPED
        return EXIT_DONE if trainer.saver.saved_at == trainer.step_count else EXIT_FAILED

    def rescue() -> None:
        """Save the state before a step that does not end, and end the process."""
        status = EXIT_FAILED
        try:
            if not trainer.save_unfinished():
                return  # it ended after all
            folder.note(f"{trainer.stop_reason}: the step under way was given up")
            status = end("stopped")
            folder.close()
        except Exception as error:
            folder.warn(str(error))
        end_at_once(status)

    def told_to_stop(reason: str) -> None:
        trainer.stop_for(reason)
        call_ranks(trainer.world)

    def called(rank: int) -> None:
        signals.call(f"rank {rank} is to stop")

    signals = StopSignals(
        stop=told_to_stop,
        rescue=rescue,
        patience_s=lambda: PATIENCE_COMPILING_S if trainer.compiling else PATIENCE_S,
        echo_s=ECHO_S if several else 0.0,
    )
    try:
        with signals, hearing_ranks(trainer.world, called):
            outcome = trainer.fit()
            try:
                trainer.close()
            except checkpoint.CheckpointError as error:
                if outcome == "done":
                    raise
                folder.warn(str(error))  # it can be resumed from an older one, if there is any
            # torchrun ends all ranks when the first ends, by a signal: they end together.
            statuses = trainer.world.gather(end(outcome)) if several else [end(outcome)]
        return EXIT_FAILED if EXIT_FAILED in statuses else statuses[0]
    except (UserError, FloatingPointError, OSError) as error:  # of a run that had begun: no input
        record_failure(redacted(error))
        folder.warn(str(error))
        return EXIT_FAILED
    finally:
        with contextlib.suppress(Exception):  # of an end that failed: what it failed of was said
            trainer.close()
