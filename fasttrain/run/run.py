"""One run from a config: dataset, model, optimizers, run folder, resuming, signals, exit status."""

import time
from collections.abc import Sequence
from pathlib import Path

from fasttrain_kernels._torch import spare_compiler

from fasttrain.command import EXIT_BAD_INPUT, EXIT_FAILED, record
from fasttrain.config import TrainConfig, UserError
from fasttrain.device import make_deterministic, resolve_device
from fasttrain.distributed.lockstep import die_with_parent
from fasttrain.distributed.world import SharedError, start, stop
from fasttrain.log.sinks import check_packages
from fasttrain.resolve import apply, resolve
from fasttrain.run.ending import show_start, train_to_end
from fasttrain.run.folder import RunFolder
from fasttrain.run.setup import make_loop
from fasttrain.run.signals import interruptible


def run(
    config: TrainConfig,
    *,
    name: str,
    resume: str | None = None,
    stop_at_step: int | None = None,
    allow_change: Sequence[str] = (),
    decay_from: str | None = None,
    config_path: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Train as ``config`` says and return the exit status.

    For ``name``, ``resume``, ``config_path`` and ``overwrite`` see `RunFolder`. ``allow_change``
    names keys that may differ from the resumed run's, beyond those that change no number.
    ``decay_from`` is a run or checkpoint folder: a new run continues from there, decaying.

    Raises:
        UserError: something is missing or does not fit; nothing was overwritten.
        KeyboardInterrupt: a signal came before the first step; nothing was overwritten.
    """
    started = time.perf_counter()
    folder: RunFolder | None = None
    try:
        if decay_from is not None and resume not in (None, "auto"):
            raise UserError(
                f"--decay-from begins a new run, and --resume {resume} goes on with another; "
                "leave one out (--resume auto goes on with the new run once it was saved)"
            )
        if config.run.deterministic:
            make_deterministic()
        with interruptible():
            # The process and its ranks
            world, device = start(config.distributed, resolve_device(config.run.device))
            if world.size > 1:
                die_with_parent()
            resolved = resolve(config, device, world)
            apply(resolved)
            if resolved.compile_mode in ("off", "c++"):
                spare_compiler()
            check_packages(config)
            # The run
            folder = RunFolder(
                config,
                name,
                resume,
                world,
                config_path=config_path,
                decay_from=Path(decay_from) if decay_from is not None else None,
                allow_change=allow_change,
                overwrite=overwrite,
            )
            config = folder.settled(config)
            loop = make_loop(config, world, device, folder, allow_change, stop_at_step)
            if stop_at_step is not None:
                if stop_at_step <= (step := loop.state.step):
                    problem = f"the run is at step {step}; name a later step"
                    raise UserError(f"--stop-at-step {stop_at_step}: {problem}")
                loop.request_stop(stop_at_step)
            if folder.console:
                show_start(folder, loop)
        status = train_to_end(loop, folder, started)
        if status != EXIT_FAILED:
            stop(world)
        return status
    except SharedError as error:  # rank 0 raises what the command line prints
        record(f"error: {error}")
        return EXIT_BAD_INPUT
    finally:
        if folder is not None:
            folder.close()
