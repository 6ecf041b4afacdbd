"""The folder of a run: a new one that overwrites nothing, the one to resume, its lock, its disk."""

import fcntl
import shutil
from pathlib import Path
from typing import TextIO

from fasttrain.config import TrainConfig, UserError

__all__ = ["check_disk", "lock_run_dir", "new_run_dir", "run_dir_of"]


def new_run_dir(config: TrainConfig, name: str) -> Path:
    """Return a folder that does not exist yet; an explicit ``run.name`` is never altered."""
    out_dir = Path(config.run.out_dir)
    if config.run.name is not None:
        run_dir = out_dir / config.run.name
        if run_dir.exists():
            held = any((run_dir / "checkpoints").glob("step-*"))
            raise UserError(
                f"{run_dir} exists already; continue it with --resume auto, or set another run.name"
                if held
                else f"{run_dir} exists already and holds no checkpoint; remove it, or set another "
                "run.name"
            )
        return run_dir
    n = 1
    while (run_dir := out_dir / (name if n == 1 else f"{name}-{n}")).exists():
        n += 1
    return run_dir


def run_dir_of(config: TrainConfig, name: str, resume: str) -> Path:
    """Return the run folder that ``--resume`` means: of this config's newest run, or of a path."""
    if resume != "auto":
        path = Path(resume)
        if not path.exists():
            raise UserError(f"--resume {path}: no such folder; name a run or checkpoint folder")
        for run_dir in (path, path.parent, path.parent.parent):
            if (run_dir / "checkpoints").is_dir():
                return run_dir
        raise UserError(f"--resume {path}: not a run or checkpoint folder; name one of those")
    out_dir = Path(config.run.out_dir)
    run_dir = out_dir / (config.run.name or name)
    if config.run.name is None:
        n = 2
        while (out_dir / f"{name}-{n}").exists():
            if any((out_dir / f"{name}-{n}" / "checkpoints").glob("step-*")):
                run_dir = out_dir / f"{name}-{n}"
            n += 1
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(
            f"--resume auto: nothing to resume in {run_dir}; leave --resume out to start a new run"
        )
    return run_dir


def lock_run_dir(run_dir: Path, *, new: bool) -> TextIO:
    """Make the run folder this process's own until it ends, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=not new)
        lock = open(run_dir / ".lock", "w", encoding="utf-8")  # noqa: SIM115
    except FileExistsError as error:
        if run_dir.is_dir():
            raise UserError(f"{run_dir} was made by another run just now; start again") from error
        raise UserError(f"{run_dir} is a file; set run.out_dir to a folder") from error
    except OSError as error:
        raise UserError(
            f"cannot write to {run_dir}: {error.strerror}; set run.out_dir to a writable folder"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UserError(
            f"{run_dir} is in use by another trainer; wait for it or set another run.name"
        ) from error
    return lock


def check_disk(run_dir: Path, checkpoint_bytes: int, keep_last: int) -> None:
    """Refuse a run whose checkpoints cannot fit: the last ``keep_last``, the best and a new one.

    Args:
        run_dir: the run folder; what its checkpoints take already counts as free.
        checkpoint_bytes: size of one.
        keep_last: ``checkpoint.keep_last``.
    """
    files = (run_dir / "checkpoints").rglob("*.safetensors")
    free = shutil.disk_usage(run_dir).free + sum(file.stat().st_size for file in files)
    if free < checkpoint_bytes * (keep_last + 2):
        raise UserError(
            f"{run_dir}: {free / 2**30:.2f} GiB of disk for checkpoints, but {keep_last + 2} of "
            f"{checkpoint_bytes / 2**30:.2f} GiB may lie there at once; free some space, set "
            "run.out_dir to another disk or lower checkpoint.keep_last"
        )
