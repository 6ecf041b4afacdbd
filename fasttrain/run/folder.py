"""The folder of a run: a new one that overwrites nothing, the one to resume, its lock, its disk.

With several ranks the first one finds and locks it, and shares its path.
"""

import contextlib
import glob
import itertools
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from fasttrain import checkpoint
from fasttrain.checkpoint.mirror import Mirror
from fasttrain.command import tell
from fasttrain.config import TrainConfig, UserError
from fasttrain.config.untrusted import refuse_links
from fasttrain.data.files import lock, names_at
from fasttrain.distributed.world import World
from fasttrain.log.console import Console

# In a run folder; files are opened without following links.
WRITTEN_FOLDERS = ("checkpoints", "faults", "profile", "tensorboard", "wandb")


class RunFolder:
    """The folder of this run, until `close`.

    ``resume`` is ``auto``: continue the newest checkpoint of this config's run, here or in its
    mirror, or begin a new run if there is none yet; the path of a run or checkpoint folder; or
    None: begin a new run, in a folder called ``name`` if ``run.name`` is unset. Ranks that torchrun
    restarts keep their folder.
    """

    def __init__(self, config: TrainConfig, name: str, resume: str | None, world: World) -> None:
        self.world = world
        self.console: Console | None = None  # of the first rank alone, as is the mirror
        self.mirror: Mirror | None = None
        self._held = contextlib.ExitStack()  # its lock and its console
        self.new = False  # whether this process made the folder
        self.path = Path()
        self.source: Path | None = None  # the verified checkpoint that is continued
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            with world.failing_together():
                if world.leads:
                    self._claim(config, name, resume)
            failed.pop_all()
        self.path, self.source = world.share((self.path, self.source))

    def _claim(self, config: TrainConfig, name: str, resume: str | None) -> None:
        address, keep_last = config.checkpoint.mirror or "", config.checkpoint.keep_last
        if "***" in address:
            raise UserError(
                f"checkpoint.mirror = {address}: a config that was saved has *** in place of "
                "secrets; give the whole address, as in checkpoint.mirror=…"
            )
        if restarted := _restarted_run_dir(config, name):
            path, resume = restarted, "auto"
        else:
            path = run_dir_of(config, name, resume)
        if address:
            self.mirror = Mirror(address, path, keep_last, note=self.note, warn=self.warn)
        new = not path.exists()
        self._held.enter_context(lock_run_dir(path))
        self.path = path
        self.console = Console(path / "train.log")
        self._held.callback(self.console.close)
        if resume == "auto" and self.mirror and not restarted:
            self.mirror.fetch()
        if resume == "auto" and not _was_saved(path):
            how = "starting a new run" if new else "starting over in this folder"
            self.note(f"nothing to resume, {path} holds no checkpoint yet: {how}")
        elif resume is not None:
            target = path if resume == "auto" else Path(resume)
            self.source = checkpoint.resolve(target, report=self.warn)
        self.new = new

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

    def close(self) -> None:
        """Give console and folder back; remove the folder of a new run that never began."""
        failed = isinstance(sys.exception(), UserError | KeyboardInterrupt)
        if failed and self.new and not logged_bytes(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
        self._held.close()


def run_dir_of(config: TrainConfig, name: str, resume: str | None) -> Path:
    """Return the run folder that a path lies in, of this config's newest run (auto), or a new one.

    A config's runs lie in ``run.name``, or where that is unset in ``name``, ``name-2``, … The
    newest is the last with a checkpoint; if none has one, the last that exists, or the first.
    """
    if resume not in (None, "auto"):
        return run_dir_above(Path(resume))
    given, out_dir = config.run.name, Path(config.run.out_dir)
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    paths = map(out_dir.joinpath, names if given is None else [given])
    address = config.checkpoint.mirror
    there = names_at(address) if address else {}

    def exists(path: Path) -> bool:
        return path.exists() or path.name in there

    def was_saved(path: Path) -> bool:
        copies = path.name in there and names_at(f"{address}/{path.name}/checkpoints")
        return bool(copies) or _was_saved(path)

    found = [next(paths), *itertools.takewhile(exists, paths)]
    if resume == "auto":
        return next(filter(was_saved, reversed(found)), found[-1])
    if not exists(found[0]):
        return found[0]
    if given is not None:
        raise UserError(
            f"{found[0]} exists already{'' if found[0].exists() else ' in checkpoint.mirror'}; "
            "continue it with --resume auto, or set another run.name"
        )
    return out_dir / f"{name}-{len(found) + 1}"


def run_dir_above(path: Path) -> Path:
    """Return the run folder of a run or checkpoint folder."""
    for run_dir in (path, path.parent, path.parent.parent):
        if (run_dir / "checkpoints").is_dir():
            return run_dir
    remedy = "name one of those, or auto or the run's address if it lies in checkpoint.mirror"
    raise UserError(f"--resume {path}: not a run or checkpoint folder; {remedy}")


def _was_saved(run_dir: Path) -> bool:
    """Return whether a run has or had a checkpoint; a first save that was cut off is none."""
    folder = run_dir / "checkpoints"
    if folder.is_dir():
        return any(not path.name.startswith(".tmp-") for path in folder.iterdir())
    return logged_bytes(run_dir) > 0  # the folder is made before the first row: it was removed


def logged_bytes(run_dir: Path) -> int:
    """Return how much a run has logged."""
    rows = run_dir / "metrics.jsonl"
    return rows.stat().st_size if rows.is_file() else 0


def _job() -> str:
    """Return what the processes that one torchrun starts and restarts have in common."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # If the user gives no name it is "none", and the agent is on one node.
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


def _restarted_run_dir(config: TrainConfig, name: str) -> Path | None:
    """Return the run folder of this job if torchrun has restarted it, else None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    locks = Path(config.run.out_dir).glob(f"{glob.escape(config.run.name or name)}*/.lock")
    ours = [file for file in locks if file.read_text(encoding="utf-8") == _job()]
    return max(ours, key=lambda file: file.stat().st_mtime).parent if ours else None


@contextlib.contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Make the run folder and lock it in this block, at most until this process ends.

    On Windows, which has no such locks, it is only made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        refuse_links(run_dir, WRITTEN_FOLDERS)
        descriptor = lock(run_dir / ".lock")
    except ImportError:
        descriptor = None
    except BlockingIOError as error:
        raise UserError(
            f"{run_dir} is in use by another trainer; wait for it or set another run.name "
            "(of fasttrain.Trainer: run_dir)"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write to {run_dir}: {error.strerror}; set run.out_dir to a writable folder"
        ) from error
    if descriptor is None:
        yield
        return
    import fcntl

    with open(descriptor, "w", encoding="utf-8") as file:
        file.truncate(0)
        file.write(_job())
        file.flush()
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # processes that a loader started have it open too


def check_disk(run_dir: Path, checkpoint_bytes: int, keep_last: int) -> None:
    """Refuse a run whose checkpoints cannot fit: the last ``keep_last``, the best and a new one.

    What its checkpoints take already counts as free.
    """
    files = (run_dir / "checkpoints").rglob("*.safetensors")
    free = shutil.disk_usage(run_dir).free + sum(file.stat().st_size for file in files)
    if free < checkpoint_bytes * (keep_last + 2):
        raise UserError(
            f"{run_dir}: {free / 2**30:.2f} GiB of disk for checkpoints, but {keep_last + 2} of "
            f"{checkpoint_bytes / 2**30:.2f} GiB may lie there at once; free some space, set "
            "run.out_dir to another disk or lower checkpoint.keep_last"
        )
