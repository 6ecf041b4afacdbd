"""Where rows of numbers go: ``metrics.jsonl``, CSV files, TensorBoard, Weights & Biases."""

import contextlib
import csv
import errno
import importlib.util
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, get_args

from fasttrain.command import tell
from fasttrain.config import TrainConfig, UserError, config_to_toml
from fasttrain.config.keys import refuse
from fasttrain.config.untrusted import json_object, open_own, read_regular, refuse_links
from fasttrain.log.metrics import json_line
from fasttrain.redact import redact
from fasttrain.storage import write_atomically

RowKind = Literal["train", "eval", "tasks"]
Row = Mapping[str, Any]
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_LINE = 1 << 20  # bytes: a longer line is taken as one that was cut off


class LogFile:
    """A text file that lines are appended to, handed to the system at once; made if missing.

    A full or broken disk does not end the run: lines wait in a buffer of 8 KiB and are written with
    the next that can be; what does not fit in it is lost, a line at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._failed = path, False
        self._file: TextIO | None = None

    def write(self, lines: str) -> None:
        """Append whole lines; also after `close`.

        Raises:
            UserError: a link or something else than a file lies there.
        """
        try:
            if self._file is None:
                descriptor = open_own(self.path, os.O_WRONLY | os.O_APPEND)
                self._file = open(descriptor, "a", 1, "utf-8")  # noqa: SIM115
            self._file.write(lines)
            self._failed = False
        except OSError as error:
            if not self._failed:
                full = error.errno in NO_SPACE
                remedy = "free some space on this disk" if full else "check the file system"
                with contextlib.suppress(OSError):  # standard error may lie on the same disk
                    tell(f"warning: {self.path}: {error.strerror}; {remedy} (training goes on)")
            self._failed = True

    def drop_after(self, step: int, step_of: Callable[[str], float | None]) -> None:
        """Drop lines of steps after ``step``, and one cut off by a crash; also on a full disk.

        ``step_of`` returns the step of a line, None where it goes on with that of the line before.
        """
        self.close()
        if not os.path.lexists(self.path):
            return
        at, n_kept = 0.0, 0  # the latter in bytes, up to the first line that is dropped
        dropped, later = False, list[str]()
        with open(open_own(self.path, os.O_RDWR), "r+b") as file:
            for line in iter(lambda: file.readline(MAX_LINE), b""):
                text = line.decode("utf-8", "replace")
                at = at if (its := step_of(text)) is None else its
                if at > step or not text.endswith("\n"):
                    dropped = True
                elif dropped:
                    later.append(text)  # a run leaves none
                else:
                    n_kept += len(line)
            if dropped:
                file.truncate(n_kept)
        if later:
            self.write("".join(later))
            self.close()

    def close(self) -> None:
        """Close the file. May be called twice."""
        with contextlib.suppress(OSError):  # the warning came when it was written
            if self._file is not None:
                self._file.close()
        self._file = None


class Sink(Protocol):
    """What rows of numbers are written to."""

    @property
    def name(self) -> str: ...  # for messages

    def write(self, kind: RowKind, row: Row) -> None: ...

    def drop_after(self, step: int) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """All that the rows of one run are written to: ``metrics.jsonl`` and what ``[log]`` asks for.

    ``made_by`` is the run's provenance, for ``metrics.jsonl``. Call `check_packages` before. What
    fails while the run goes on is closed with a warning, and gets no more rows of this session.
    """

    def __init__(self, config: TrainConfig, folder: Path, made_by: Row | None = None) -> None:
        self.all: list[Sink] = []
        if config.log.wandb_project:  # the only one that may refuse
            self.all.append(_Wandb(config, folder))
        self.all.append(JsonlLogger(folder / "metrics.jsonl", made_by))
        if config.log.csv:
            self.all.append(CsvLogger(folder))
        if config.log.tensorboard:
            self.all.append(_TensorBoard(folder))

    def write(self, kind: RowKind, row: Row) -> None:
        """Write a row of numbers, which names its ``step``."""
        for sink in tuple(self.all):
            with self._closing_if_it_fails(sink):
                sink.write(kind, row)

    def drop_after(self, step: int) -> None:
        """Forget rows of steps after ``step``: the run continues from there."""
        for sink in tuple(self.all):
            with self._closing_if_it_fails(sink):
                sink.drop_after(step)

    def close(self) -> None:
        """Write out what is left. May be called twice."""
        while self.all:
            sink = self.all.pop()
            with self._closing_if_it_fails(sink):
                sink.close()

    @contextlib.contextmanager
    def _closing_if_it_fails(self, sink: "Sink") -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of packages and disks; the run is worth more
            if sink in self.all:
                self.all.remove(sink)
            with contextlib.suppress(Exception):
                sink.close()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
            with contextlib.suppress(OSError):
                tell(f"warning: {sink.name} gets no more rows: {reason} (training goes on)")


def check_packages(config: TrainConfig) -> None:
    """Refuse a config that asks for what a package does that is not installed."""
    for key, wanted, package in (
        ("log.tensorboard", config.log.tensorboard, "tensorboard"),
        ("log.wandb_project", config.log.wandb_project, "wandb"),
        ("eval.tasks", config.eval.tasks, "lm_eval"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            remedy = f"install it with pip install {package}, or unset {key}"
            refuse(key, wanted, f"needs the package {package}; {remedy}")


class JsonlLogger:
    """Appends rows to ``metrics.jsonl``, one JSON object a line, handed to the system at once.

    A line before the first of these rows says what they are ``made_by``.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, made_by: Row | None = None) -> None:
        self._file, self._made_by = LogFile(path), made_by
        os.close(open_own(path, os.O_WRONLY))  # a run folder is known by it
        self._begin, self._has_head = 0, False  # the step that these rows begin after

    def write(self, kind: RowKind, row: Row) -> None:
        """Append a row with the time; a number that is not finite becomes null, as in JSON."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        rows = [{"kind": kind, "time": now, **row}]
        if self._made_by and not self._has_head:
            rows = [{"kind": "run", "time": now, "step": self._begin, **self._made_by}, *rows]
            self._has_head = True
        self._file.write("".join(map(json_line, rows)))

    def drop_after(self, step: int) -> None:
        """Drop rows of steps after ``step``: each stands once, as in an uninterrupted run."""
        self._file.drop_after(step, _step_of_row)
        if step <= self._begin or not self._has_head:
            self._begin, self._has_head = step, False

    def close(self) -> None:
        self._file.close()


def _step_of_row(line: str) -> float:
    row = json_object(line)
    if row is None or row.get("stopped") or type(at := row.get("step", 0)) is not int:
        return math.inf
    return at + (row.get("kind") == "run")  # a head says before which step


class CsvLogger:
    """Writes ``train.csv`` and ``eval.csv``; columns are the step and the keys of the first row."""

    name = "log.csv"

    def __init__(self, folder: Path) -> None:
        self._files = {kind: LogFile(folder / f"{kind}.csv") for kind in get_args(RowKind)}
        self._tables: dict[str, csv.DictWriter[str]] = {}

    def write(self, kind: RowKind, row: Row) -> None:
        """Append a row; a key that the first row lacked is left out, a missing one is empty."""
        if kind not in self._tables:
            file = self._files[kind]
            with open(open_own(file.path, os.O_RDWR), encoding="utf-8", errors="replace") as head:
                first_line = head.readline(MAX_LINE)
            columns = next(csv.reader([first_line] if first_line else []), ["step", *row])
            columns = list(dict.fromkeys(columns))
            table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            self._tables[kind] = table
            if not first_line:
                table.writeheader()
        self._tables[kind].writerow(row)

    def drop_after(self, step: int) -> None:
        """Drop rows of steps after ``step``."""
        self._tables.clear()
        for file in self._files.values():
            file.drop_after(step, _step_of_cells)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _step_of_cells(line: str) -> float:
    at = line.partition(",")[0].rstrip("\n")
    return int(at) if at.isdigit() else 0 if at == "step" else math.inf


class _TensorBoard:
    """TensorBoard's event files in ``<run>/tensorboard``."""

    name = "log.tensorboard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None
        self._purge_step: int | None = None

    def write(self, kind: RowKind, row: Row) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds of imports

            refuse_links(self._folder.parent, [self._folder.name])
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        for name, value in _numbers(kind, row).items():
            self._writer.add_scalar(name, value, row["step"])

    def drop_after(self, step: int) -> None:
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class _Wandb:
    """Weights & Biases; its files are in ``<run>/wandb``."""

    name = "log.wandb_project"

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import wandb

        id_file = folder / "wandb" / "run-id"
        refuse_links(folder, ["wandb", "wandb/run-id"])
        id_file.parent.mkdir(exist_ok=True)
        try:
            self._run: Any = wandb.init(
                project=config.log.wandb_project,
                name=folder.name,
                dir=str(folder),
                config=tomllib.loads(config_to_toml(config, redact)),
                mode=os.environ.get("WANDB_MODE") or config.log.wandb_mode,
                id=read_regular(id_file, 1024).decode() if id_file.exists() else None,
                resume="allow",
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            remedy = "log in with wandb login, or set log.wandb_mode=offline"
            problem = f"log.wandb_project: W&B could not begin ({error})"
            raise UserError(f"{problem}; {remedy}") from error
        write_atomically(id_file, self._run.id.encode())

    def write(self, kind: RowKind, row: Row) -> None:
        self._run.log({"step": row["step"], **_numbers(kind, row)})

    def drop_after(self, step: int) -> None:
        """W&B keeps what it was sent; later rows of a step stand beside the earlier."""

    def close(self) -> None:
        self._run.finish()


def _numbers(kind: RowKind, row: Row) -> dict[str, float]:
    numbers = ((k, v) for k, v in row.items() if k != "step" and isinstance(v, int | float))
    return {f"{kind}/{k}": v for k, v in numbers}
