"""The folder of a run: a new one that overwrites nothing, the one to resume, its lock, its disk.

Of several ranks the first finds and locks it; the others are told.
"""

import fcntl
import glob
import os
import shutil
import socket
from pathlib import Path
from typing import TextIO

from fasttrain import checkpoint
from fasttrain.command import tell
from fasttrain.config import TrainConfig, UserError
from fasttrain.distributed.world import World
from fasttrain.log.console import Console

__all__ = ["RunFolder", "check_disk", "lock_run_dir", "new_run_dir", "run_dir_of"]


class RunFolder:
    """The folder of this run, until `close`.

    Args:
        config: the configuration.
        name: of a new folder where ``run.name`` is unset.
        resume: ``auto``: the newest checkpoint of this config's run, or a new run where there was
            none yet; or the path of a run or checkpoint folder; None: a new run.
        world: the ranks of the run. Where torchrun has restarted them it is ``auto`` for the folder
            that they had.

    Attributes:
        path: the folder.
        source: the verified checkpoint to go on from, or None.
        new: whether this process made the folder.
        console: where a person looks; None on all ranks but the first.

    Raises:
        UserError: there is none to resume, it cannot be written, or another run has it.
    """

    def __init__(self, config: TrainConfig, name: str, resume: str | None, world: World) -> None:
        self.world = world
        self.console: Console | None = None
        self._lock: TextIO | None = None
        self.new = False
        found: tuple[str, str | None] | None = None
        try:
            with world.failing_together():
                if world.leads:
                    found = self._claim(config, name, resume)
        except BaseException:
            self.close()
            raise
        path, source = world.share(found)
        self.path, self.source = Path(path), source and Path(source)

    def _claim(self, config: TrainConfig, name: str, resume: str | None) -> tuple[str, str | None]:
        path = _restarted_run_dir(config, name)
        if path is not None:
            resume = "auto"
        elif resume is None:
            path = new_run_dir(config, name)
        else:
            path = run_dir_of(config, name, resume)
        self.new = not path.exists()
        self._lock = lock_run_dir(path, new=self.new)
        self.console = Console(log_file=path / "train.log")
        if resume is None:
            return str(path), None
        if resume != "auto" or _was_saved(path):
            target = path if resume == "auto" else Path(resume)
            return str(path), str(checkpoint.resolve(target, report=self.warn))
        how = "starting a new run" if self.new else "starting over in this folder"
        self.note(f"nothing to resume, {path} holds no checkpoint yet: {how}")
        return str(path), None

    def note(self, text: str) -> None:
        """Print a remark, once for all ranks."""
        if self.console:
            self.console.note(text)

    def warn(self, text: str) -> None:
        """Print a warning of any rank."""
        if self.console:
            self.console.warn(text)
        else:
            tell(f"rank {self.world.rank}: {text}")

    def remove_unused(self) -> None:
        """Remove the folder of a new run that never began."""
        log = self.path / "metrics.jsonl"
        if self.new and not (log.exists() and log.stat().st_size):
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Give console and folder back."""
        if self.console:
            self.console.close()
        if self._lock:
            self._lock.close()


def new_run_dir(config: TrainConfig, name: str) -> Path:
    """Return a folder that does not exist yet; an explicit ``run.name`` is never altered."""
    out_dir = Path(config.run.out_dir)
    if config.run.name is not None:
        run_dir = out_dir / config.run.name
        if run_dir.exists():
            raise UserError(
                f"{run_dir} exists already; continue it with --resume auto, or set another run.name"
            )
        return run_dir
    n = 1
    while (run_dir := out_dir / (name if n == 1 else f"{name}-{n}")).exists():
        n += 1
    return run_dir


def run_dir_of(config: TrainConfig, name: str, resume: str) -> Path:
    """Return the run folder that ``--resume`` means: of a path, or of this config's newest run.

    ``auto`` with no ``run.name``: of ``NAME``, ``NAME-2``, … the last that was saved; where none
    was, the last that there is, or ``NAME``.
    """
    if resume != "auto":
        path = Path(resume)
        if not path.exists():
            raise UserError(f"--resume {path}: no such folder; name a run or checkpoint folder")
        for run_dir in (path, path.parent, path.parent.parent):
            if (run_dir / "checkpoints").is_dir():
                return run_dir
        raise UserError(f"--resume {path}: not a run or checkpoint folder; name one of those")
    out_dir = Path(config.run.out_dir)
    found = [out_dir / (config.run.name or name)]
    while config.run.name is None and (path := out_dir / f"{name}-{len(found) + 1}").exists():
        found.append(path)
    return next(filter(_was_saved, reversed(found)), found[-1])


def _was_saved(run_dir: Path) -> bool:
    """Return whether a run has or had a checkpoint; a first save that was cut off is none."""
    folder = run_dir / "checkpoints"
    if folder.is_dir():
        return any(not path.name.startswith(".tmp-") for path in folder.iterdir())
    log = run_dir / "metrics.jsonl"  # the folder is made before the first row: it was removed
    return log.is_file() and log.stat().st_size > 0


def _job() -> str | None:
    """Return what the processes that one torchrun starts and restarts have in common."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without a name of one's own it is "none", and the agent is on one node.
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


def _restarted_run_dir(config: TrainConfig, name: str) -> Path | None:
    """Return the run folder of this very job where torchrun restarts it, else None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    name = config.run.name or name
    locks = list(Path(config.run.out_dir).glob(f"{glob.escape(name)}*/.lock"))
    locks.sort(key=lambda lock: lock.stat().st_mtime, reverse=True)
    return next((x.parent for x in locks if x.read_text(encoding="utf-8") == _job()), None)


def lock_run_dir(run_dir: Path, *, new: bool) -> TextIO:
    """Make the run folder this process's own until it ends, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=not new)
        lock = open(run_dir / ".lock", "a", encoding="utf-8")  # noqa: SIM115
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
            f"{run_dir} is in use by another trainer; wait for it or set another run.name "
            "(of fasttrain.Trainer: run_dir)"
        ) from error
    lock.truncate(0)
    lock.write(_job() or "")
    lock.flush()
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
