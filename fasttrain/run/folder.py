"""The folder of a run: a new one that overwrites nothing, the one to resume, its lock, its disk.

With several ranks the first one finds and locks it, and shares its path.
"""

import contextlib
import glob
import itertools
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fasttrain import checkpoint
from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import Parent
from fasttrain.command import tell
from fasttrain.config import TrainConfig, UserError, load_config
from fasttrain.config.untrusted import read_regular, refuse_links
from fasttrain.distributed.world import World
from fasttrain.log.console import Console
from fasttrain.run.record import (
    RUN_JSON,
    Record,
    began,
    config_name,
    encoded,
    now,
    parent_folder,
    read_record,
    record_at,
    write_record,
)
from fasttrain.run.resume import same_settings
from fasttrain.storage import NoLocks, lock, names_at

if TYPE_CHECKING:
    from fasttrain.mirror import Mirror

# In a run folder; files are opened without following links.
WRITTEN_FOLDERS = ("checkpoints", "faults", "profile", "tensorboard", "wandb")


class RunFolder:
    """The folder of this run, until `close`.

    ``resume`` is one of

    - ``auto``: continue the newest unfinished run of this config, here or in its mirror, or begin a
      new run if there is none yet;
    - the path of a run folder, or of its newest checkpoint: continue that run in its folder;
    - the path of an older checkpoint, or either with another ``run.name``: begin a *branch*, a new
      run that starts from this checkpoint and leaves its parent as it is;
    - None: begin a new run, which branches off ``decay_from`` if that is set.

    A new run lies in ``run.name``, or where that is unset in ``name``, ``name-2``, … ``overwrite``
    continues from an older checkpoint in the folder of its run, and drops what is newer there.
    Ranks that torchrun restarts keep their folder.

    Args:
        config: the run's; see ``run.name``, ``run.out_dir`` and ``checkpoint.mirror``.
        name: of the folder where ``run.name`` is unset.
        resume: see above.
        world: the ranks of the run. The first one finds and locks the folder.
        config_path: the config file; None: the run's own was read.
        decay_from: a run or checkpoint folder that a new run branches off.
        allow_change: keys in which the config may differ from that of the run that is continued.
        overwrite: see above.
    """

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        resume: str | None,
        world: World,
        *,
        config_path: Path | None = None,
        decay_from: Path | None = None,
        allow_change: Sequence[str] = (),
        overwrite: bool = False,
    ) -> None:
        self.world = world
        self.console: Console | None = None  # on rank 0 only, like the mirror
        self.mirror: Mirror | None = None
        self._held = contextlib.ExitStack()  # its lock and its console
        self._config_path = config_path
        self._own_name = config.run.name or name
        self.new = False  # whether this process made the folder
        self.path = Path()
        self.source: Path | None = None  # the verified checkpoint that is continued in this folder
        self.origin: Path | None = None  # the verified checkpoint that a new folder branches off
        self.decays = False  # whether the branch decays its learning rate from there
        self.overwrites = overwrite
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            with world.failing_together():
                if world.leads:
                    self._claim(config, name, resume, decay_from, allow_change)
            failed.pop_all()
        found = (self.path, self.source, self.origin, self.decays)
        self.path, self.source, self.origin, self.decays = world.share(found)

    def _claim(
        self,
        config: TrainConfig,
        name: str,
        resume: str | None,
        decay_from: Path | None,
        allow_change: Sequence[str],
    ) -> None:
        address, keep_last = config.checkpoint.mirror or "", config.checkpoint.keep_last
        if "***" in address:
            raise UserError(
                f"checkpoint.mirror = {address}: a config that was saved has *** in place of "
                "secrets; give the whole address, as in checkpoint.mirror=…"
            )
        remarks: list[str] = []  # until there is a console
        source = origin = None
        if restarted := _restarted_run_dir(config, name):
            path, resume = restarted, "auto"
        elif resume == "auto":
            path = newest_run_dir(config, name, self._config_path, decay_from, allow_change)
        elif resume is not None:
            path, source, origin = self._named(config, Path(resume), name, remarks.append)
        elif decay_from is not None:
            path = self._branch_dir(config, run_dir_above(decay_from, "--decay-from"), name)
        else:
            path = new_run_dir(config, name, self._config_path)
        if address:
            from fasttrain.mirror import Mirror

            self.mirror = Mirror(address, path, keep_last, note=self.note, warn=self.warn)
        new = not path.exists()
        self._held.enter_context(lock_run_dir(path))
        self.path, self.new = path, new
        self.console = Console(path / "train.log")
        self._held.callback(self.console.close)
        for remark in remarks:
            self.warn(remark)
        self._refuse_mirror_of_another()
        if resume == "auto" and self.mirror and not restarted:
            self.mirror.fetch()
            if read_record(path) is None and (kept := record_at(self.mirror.address)):
                write_record(path, kept)
        elif resume and origin is None and self.mirror and not (restarted or self.overwrites):
            self.mirror.fetch()
            if source is not None and (newer := newer_checkpoint(path, source)):
                raise UserError(
                    f"--resume {resume}: {self.mirror.shown} held a newer checkpoint, which is now "
                    f"{newer}; continue it with --resume auto, or branch off with another run.name"
                )
        record = read_record(path)
        if resume not in (None, "auto") and source is None and origin is None:
            source = checkpoint.resolve(path, report=self.warn)
        if resume == "auto" and _was_saved(path):
            source = checkpoint.resolve(path, report=self.warn)
            if not restarted and _ended(path, record):
                also = "" if config.run.name else ", and no run of this config is unfinished"
                self.note(f"{path} has come to its end{also}")
        elif resume == "auto":
            how = "starting a new run" if new else "starting over in this folder"
            self.note(f"nothing to resume, {path} holds no checkpoint yet: {how}")
        if source is None and origin is None:
            origin, self.decays = decay_from, decay_from is not None
            if origin is None and record and (parent := record["parent"]):  # it was cut off early
                folder, self.decays = parent_folder(path, parent["run"]), parent["decays"]
                origin = folder / "checkpoints" / parent["checkpoint"]
                if not origin.is_dir():
                    raise UserError(
                        f"{path} branches off {origin}, which is gone, and has no checkpoint of "
                        "its own; start another run"
                    )
            origin = origin and checkpoint.resolve(origin, report=self.warn)
        self.source, self.origin = source, origin

    def _refuse_mirror_of_another(self) -> None:
        """Refuse copies of another run, which had this name before: they began at other times."""
        if not self.mirror or not (own := read_record(self.path)):
            return
        mirrored = record_at(self.mirror.address)
        if mirrored and mirrored["began"] != own["began"]:
            raise UserError(
                f"{self.mirror.shown} holds copies of another run than {self.path}, one that began "
                f"{mirrored['began']} and not {own['began']}; rename this folder, or name another "
                "checkpoint.mirror"
            )

    def _named(
        self, config: TrainConfig, named: Path, name: str, warn: Callable[[str], None]
    ) -> tuple[Path, Path | None, Path | None]:
        """Return the folder for ``--resume PATH``; the checkpoint to continue, or to branch off."""
        run_dir = run_dir_above(named)
        own_name = run_dir.resolve().name
        given = config.run.name
        moves = given not in (None, own_name)
        if self.overwrites and moves:
            raise UserError(
                f"--overwrite drops what is newer in {run_dir}, and run.name = {given} names "
                "another run; leave one out"
            )
        is_checkpoint = (named / disk.MANIFEST).exists() or disk.STEP.fullmatch(named.name)
        if not moves and not is_checkpoint:
            return run_dir, None, None  # its newest one, once the folder is locked
        source = checkpoint.resolve(named, report=warn)
        if not moves and (self.overwrites or not newer_checkpoint(run_dir, source)):
            return run_dir, source, None
        return self._branch_dir(config, run_dir, name), None, source

    def _branch_dir(self, config: TrainConfig, parent: Path, name: str) -> Path:
        """Return the folder of a branch; one with its parent's name gets a number as well."""
        if config.run.name == (own_name := parent.resolve().name):
            config, name = replace(config, run=replace(config.run, name=None)), own_name
        return new_run_dir(config, name, self._config_path)

    def settled(self, config: TrainConfig) -> TrainConfig:
        """Return the config with the name of the folder: a branch may not have its parent's."""
        if config.run.name in (None, self.path.name):
            return config
        return replace(config, run=replace(config.run, name=self.path.name))

    def parent(self, step: int) -> Parent:
        """Return what to record of the checkpoint, of ``step``, that this branch starts from."""
        assert self.origin is not None
        run = os.path.abspath(run_dir_above(self.origin))
        return Parent(run=run, checkpoint=self.origin.name, step=step, decays=self.decays)

    def begin_record(self, step: int) -> None:
        """Record which config this run is of, and the ``step`` where it branched off, if it did."""
        record = read_record(self.path)
        if record is None:
            config = self._own_name
            if self._config_path is not None:
                config = os.path.abspath(self._config_path)
            elif self.origin and (parent := read_record(run_dir_above(self.origin))):
                config = parent["config"]  # its own config was read
            start = began(self.path, None)
            time = now() if not start else datetime.fromtimestamp(start, UTC).isoformat()
            record = Record(config=config, began=time, parent=None, ended=False)
        record["ended"] = False
        if self.source is None:
            record["parent"] = self.parent(step) if self.origin is not None else None
        self._record(record)

    def end_record(self) -> None:
        """Record that this run has come to its end."""
        if record := read_record(self.path):
            record["ended"] = True
            try:
                self._record(record)
            except (UserError, OSError) as error:  # the next session finds nothing left to train
                self.warn(f"{self.path / RUN_JSON} was not written: {error}")

    def _record(self, record: Record) -> None:
        write_record(self.path, record)
        if self.mirror:
            self.mirror.put(RUN_JSON, encoded(record))

    def drop_newer(self) -> None:
        """With ``overwrite``: remove the checkpoints of this run that are newer than its source."""
        if not self.overwrites or self.source is None:
            return
        if self.mirror:
            self.mirror.drop_newer(disk.read_manifest(self.source)["commit"])
        for path, _ in disk.history(self.path / "checkpoints"):
            if path.name == self.source.name:
                return
            self.note(f"--overwrite: {path} is dropped")
            disk.remove(path)

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
        failed = isinstance(sys.exception(), UserError | OSError | KeyboardInterrupt)
        if failed and self.new and not logged_bytes(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
        self._held.close()


def new_run_dir(config: TrainConfig, name: str, config_path: Path | None = None) -> Path:
    """Return a folder for a new run: ``run.name``, or where that is unset ``name``, ``name-2``, …

    The number is above those of the config's other runs, so that the last is the newest.
    """
    out_dir = Path(config.run.out_dir)
    if (given := config.run.name) is not None:
        path = out_dir / given
        if path.exists() or given in _in_mirror(config):
            raise UserError(
                f"{path} exists already{'' if path.exists() else ' in checkpoint.mirror'}; "
                "continue it with --resume auto, or set another run.name"
            )
        return path
    numbers = _numbered(config, name)
    own = _own(config, numbers, config_path)
    if not own and 1 not in numbers:
        return out_dir / name
    free = (n for n in itertools.count(max(own, default=1) + 1) if n not in numbers)
    return out_dir / f"{name}-{next(free)}"


def newest_run_dir(
    config: TrainConfig,
    name: str,
    config_path: Path | None = None,
    decay_from: Path | None = None,
    allow_change: Sequence[str] = (),
) -> Path:
    """Return the folder of the newest unfinished run of this config, or one for a new run.

    The newest is the one that began last, of those with a checkpoint; a copy is not newer. If there
    is none, it is the last one that ended or was cut off before its first checkpoint. A branch
    counts if it has the settings of ``config``, but for the keys in ``allow_change``; one that
    ``decay_from`` began if that is named again.
    """
    out_dir = Path(config.run.out_dir)
    if (given := config.run.name) is not None:
        record = _record(config, given)
        if (
            decay_from
            and record
            and not _continues(out_dir / given, record, config, decay_from, allow_change)
        ):
            raise UserError(
                f"{out_dir / given} exists already and does not decay from {decay_from}; name that "
                "run alone to continue it, or set another run.name"
            )
        return out_dir / given
    address, mirrored = config.checkpoint.mirror, _in_mirror(config)
    ages: dict[tuple[float, int], str] = {}
    unfinished: dict[tuple[float, int], str] = {}
    numbers = _numbered(config, name)
    for number, record in _own(config, numbers, config_path).items():
        run_name = numbers[number]
        path = out_dir / run_name
        if not _continues(path, record, config, decay_from, allow_change):
            continue
        start = began(path, record)
        age = (start, -number if start else number)  # of equal times, one is a copy of the first
        ages[age] = run_name
        copies = run_name in mirrored and names_at(f"{address}/{run_name}/checkpoints")
        if (copies or _was_saved(path)) and not _ended(path, record):
            unfinished[age] = run_name
    candidates = unfinished or ages
    if candidates:
        return out_dir / candidates[max(candidates)]
    return new_run_dir(config, name, config_path)


def newer_checkpoint(run_dir: Path, source: Path) -> Path | None:
    """Return a checkpoint of a run that is intact and newer than ``source``; None: it is newest."""
    for path in disk.candidates(run_dir):
        if path.name == source.name:
            return None
        with contextlib.suppress(checkpoint.CheckpointError):
            return checkpoint.verify(path).path
    return None


def _in_mirror(config: TrainConfig) -> Collection[str]:
    """Return the names of the runs in the config's mirror."""
    address = config.checkpoint.mirror
    return names_at(address).keys() if address else ()


def _numbered(config: TrainConfig, name: str) -> dict[int, str]:
    """Return the runs, here or in the mirror, that are called ``name`` or ``name-N``, by N."""
    out_dir = Path(config.run.out_dir)
    here = [path.name for path in out_dir.iterdir()] if out_dir.is_dir() else []
    pattern = re.compile(rf"{re.escape(name)}(?:-([2-9]|[1-9]\d+))?")
    found = filter(None, map(pattern.fullmatch, {*here, *_in_mirror(config)}))
    return {int(match[1] or 1): match[0] for match in found}


def _record(config: TrainConfig, run_name: str) -> Record | None:
    """Return the record of a run, here or in the config's mirror."""
    path, address = Path(config.run.out_dir, run_name), config.checkpoint.mirror
    if path.exists() or not address:
        return read_record(path)
    return record_at(f"{address}/{run_name}")


def _own(
    config: TrainConfig, numbers: Mapping[int, str], config_path: Path | None
) -> dict[int, Record | None]:
    """Return the records of those runs, named by number, that are of a config file.

    A run without a record, or with a name in place of a file there, is told by its name. Those of a
    file that is gone, which was moved or lies on another machine, are too, where no other run is of
    this file.
    """
    records = {number: _record(config, run_name) for number, run_name in numbers.items()}
    if config_path is None:
        return records
    own: dict[int, Record | None] = {}
    gone: dict[int, Record | None] = {}
    for number, record in records.items():
        if record is None:
            own[number] = record
        elif config_name(record) == config_path.stem:
            path = Path(record["config"])
            if not path.is_absolute():
                own[number] = record
            elif not path.exists():
                gone[number] = record
            elif path.samefile(config_path):
                own[number] = record
    return own if any(own.values()) else own | gone


def _continues(
    run_dir: Path,
    record: Record | None,
    config: TrainConfig,
    decay_from: Path | None,
    allow_change: Sequence[str],
) -> bool:
    """Return whether ``--resume auto`` may mean a run of this config, if it is a branch."""
    parent = record["parent"] if record else None
    if decay_from is not None:
        return bool(parent and parent["decays"] and _is_named(parent, decay_from, run_dir))
    if parent is None or parent["decays"]:
        return parent is None
    with contextlib.suppress(UserError):
        return same_settings(config, load_config(run_dir / "config.toml"), allow_change)
    return True  # its config is in the mirror, or was never written


def _is_named(parent: Parent, path: Path, branch: Path) -> bool:
    """Return whether a run or checkpoint folder, which may be gone, is a branch's parent."""
    whole = Path(os.path.abspath(path))
    is_checkpoint = disk.STEP.fullmatch(whole.name)
    if is_checkpoint and whole.name != parent["checkpoint"]:
        return False
    named = whole.parent if is_checkpoint else whole
    named = named.parent if named.name == "checkpoints" else named
    folder = parent_folder(branch, parent["run"])
    if folder.is_dir() and named.is_dir():
        return folder.samefile(named)
    return folder.name == named.name  # it was moved or removed


def _ended(run_dir: Path, record: Record | None) -> bool:
    """Return whether a run has come to its end; of one without a record its last state tells."""
    if record is not None:
        return record["ended"]
    with contextlib.suppress(checkpoint.CheckpointError):
        for path, manifest in disk.history(run_dir / "checkpoints"):
            if manifest:
                file = path / "state.json"
                state = disk.parse_json(file, disk.read_file(file))
                total, step = state.get("total_steps"), manifest["step"]
                return type(total) is int and step >= total and not state.get("eval_due")
    return False


def run_dir_above(path: Path, option: str = "--resume") -> Path:
    """Return the run folder of a run or checkpoint folder; ``option`` is for the message.

    It has a name, also where it is the current folder.
    """
    whole = path.resolve() if ".." in path.parts else path.absolute()
    for up, run_dir in enumerate((whole, *whole.parents[:2])):
        if (run_dir / "checkpoints").is_dir():
            is_named = ".." not in path.parts and len(path.parts) > up
            return Path(*path.parts[: len(path.parts) - up]) if is_named else run_dir
    remedy = "name one of those, or auto or the run's address if it lies in checkpoint.mirror"
    raise UserError(f"{option} {path}: not a run or checkpoint folder; {remedy}")


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


def holds_run(run_dir: Path) -> bool:
    """Return whether rows or checkpoints of a run lie in a folder."""
    return logged_bytes(run_dir) > 0 or any((run_dir / "checkpoints").glob("*step-*"))


@contextlib.contextmanager
def next_run_dir(run_dir: Path) -> Iterator[Path]:
    """Lock the next free folder after that of an earlier run: ``own-2`` after ``own``; yield it.

    As in `new_run_dir`, its number is the highest, so that the last is the newest. A folder that
    holds no run yet, of a training that failed before its first row, is free.
    """
    base = run_dir if run_dir.name not in ("", "..") else run_dir.resolve()
    pattern = re.compile(rf"{re.escape(base.name)}-([2-9]|[1-9]\d+)")
    matches = [pattern.fullmatch(path.name) for path in base.parent.iterdir()]
    newest = max((int(match[1]) for match in matches if match), default=2)
    with contextlib.ExitStack() as held:
        for number in itertools.count(newest):
            path = base.with_name(f"{base.name}-{number}")
            if path.exists() and not path.is_dir():
                continue
            try:
                held.enter_context(lock_run_dir(path))
            except UserError as error:
                if isinstance(error.__cause__, BlockingIOError):  # another trainer was faster
                    continue
                raise
            if not holds_run(path):
                yield path
                return
            held.close()


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
    ours = [file for file in locks if _content(file) == _job().encode()]
    return max(ours, key=lambda file: file.stat().st_mtime).parent if ours else None


def _content(file: Path) -> bytes | None:
    with contextlib.suppress(OSError, UserError):
        return read_regular(file, 1 << 16)
    return None


@contextlib.contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Make the run folder and lock it in this block, at most until this process ends.

    On Windows and on a file system without locks it is only made.
    """
    descriptor = None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        refuse_links(run_dir, WRITTEN_FOLDERS)
        with contextlib.suppress(ImportError, NoLocks):
            descriptor = lock(run_dir / ".lock")
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
        (run_dir / ".lock").write_text(_job(), encoding="utf-8")
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
    try:
        disk_space = shutil.disk_usage(run_dir)
    except OSError:
        return  # the file system does not say
    if not disk_space.total:  # nor does this one
        return
    free = disk_space.free + sum(file.stat().st_size for file in files)
    if free < checkpoint_bytes * (keep_last + 2):
        raise UserError(
            f"{run_dir}: {free / 2**30:.2f} GiB of disk for checkpoints, but {keep_last + 2} of "
            f"{checkpoint_bytes / 2**30:.2f} GiB may lie there at once; free some space, set "
            "run.out_dir to another disk or lower checkpoint.keep_last"
        )
