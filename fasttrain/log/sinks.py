"""Where rows of numbers go: ``metrics.jsonl``, CSV files, TensorBoard, Weights & Biases."""

import contextlib
import csv
import errno
import importlib.util
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import compress
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from fasttrain.command import redact, tell
from fasttrain.config import TrainConfig, UserError, config_to_toml
from fasttrain.config.keys import refuse
from fasttrain.config.untrusted import json_object
from fasttrain.log.metrics import json_line

Kind = Literal["train", "eval", "tasks"]
Row = Mapping[str, Any]
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LogFile:
    """A text file that lines are appended to, handed to the system at once; made if missing.

    A full disk does not end the run: lines wait in a buffer of 8 KiB and are written with the next
    that can be; what does not fit in it is lost, a line at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._full = path, False
        self._file: TextIO | None = None

    def write(self, lines: str) -> None:
        """Append whole lines; also after `close`."""
        try:
            self._file = self._file or open(self.path, "a", 1, "utf-8")  # noqa: SIM115
            self._file.write(lines)
            self._full = False
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            if not self._full:
                with contextlib.suppress(OSError):  # standard error may lie on the same disk
                    tell(f"warning: {self.path}: {error.strerror}; free some space on this disk")
            self._full = True

    def drop_after(self, step: int, step_of: Callable[[str], float | None]) -> None:
        """Drop lines of steps after ``step``, and one cut off by a crash; also on a full disk.

        ``step_of`` returns the step of a line, None where it goes on with that of the line before.
        """
        self.close()
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        texts = [line.decode("utf-8", "replace") for line in lines]
        at, kept = 0.0, []
        for text in texts:
            at = at if (its := step_of(text)) is None else its
            kept.append(at <= step and text.endswith(("\n", "\r")))
        n_first = [*kept, False].index(False)
        if n_first < len(lines):
            os.truncate(self.path, sum(map(len, lines[:n_first])))
            self.write("".join(compress(texts[n_first:], kept[n_first:])))  # a run leaves none
            self.close()

    def close(self) -> None:
        """Close the file. May be called twice."""
        with contextlib.suppress(OSError):  # the warning came when it was written
            if self._file is not None:
                self._file.close()
        self._file = None


class Sinks:
    """All that the rows of one run are written to: ``metrics.jsonl`` and what ``[log]`` asks for.

    ``made_by`` is the run's provenance, for ``metrics.jsonl``. Call `check_packages` before.
    """

    def __init__(self, config: TrainConfig, folder: Path, made_by: Row | None = None) -> None:
        self.all: list[JsonlLogger | CsvLogger | _TensorBoard | _Wandb] = []
        if config.log.wandb_project:  # the only one that may refuse
            self.all.append(_Wandb(config, folder))
        self.all.append(JsonlLogger(folder / "metrics.jsonl", made_by))
        if config.log.csv:
            self.all.append(CsvLogger(folder))
        if config.log.tensorboard:
            self.all.append(_TensorBoard(folder))

    def write(self, kind: Kind, row: Row) -> None:
        """Write a row of numbers, which names its ``step``."""
        for sink in self.all:
            sink.write(kind, row)

    def drop_after(self, step: int) -> None:
        """Forget rows of steps after ``step``: the run continues from there."""
        for sink in self.all:
            sink.drop_after(step)

    def close(self) -> None:
        """Write out what is left. May be called twice."""
        while self.all:
            self.all.pop().close()


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

    def __init__(self, path: Path, made_by: Row | None = None) -> None:
        self._file, self._made_by = LogFile(path), made_by
        path.touch()  # a run folder is known by it
        self._begin, self._has_head = 0, False  # the step that these rows begin after

    def write(self, kind: Kind, row: Row) -> None:
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

    def __init__(self, folder: Path) -> None:
        self._files = {kind: LogFile(folder / f"{kind}.csv") for kind in get_args(Kind)}
        self._tables: dict[str, csv.DictWriter[str]] = {}

    def write(self, kind: Kind, row: Row) -> None:
        """Append a row; a key that the first row lacked is left out, a missing one is empty."""
        if kind not in self._tables:
            file = self._files[kind]
            text = file.path.read_text("utf-8", "replace") if file.path.exists() else ""
            columns = next(csv.reader(text.splitlines()[:1]), list({"step": 0, **row}))
            table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            self._tables[kind] = table
            if not text:
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

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None
        self._purge_step: int | None = None

    def write(self, kind: Kind, row: Row) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds of imports

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        for name, value in _numbers(kind, row).items():
            self._writer.add_scalar(name, value, row["step"])

    def drop_after(self, step: int) -> None:
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Wandb:
    """Weights & Biases; its files are in ``<run>/wandb``."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import wandb

        id_file = folder / "wandb" / "run-id"
        id_file.parent.mkdir(exist_ok=True)
        try:
            self._run: Any = wandb.init(
                project=config.log.wandb_project,
                name=folder.name,
                dir=str(folder),
                config=tomllib.loads(config_to_toml(config, redact)),
                mode=os.environ.get("WANDB_MODE") or config.log.wandb_mode,
                id=id_file.read_text(encoding="utf-8") if id_file.exists() else None,
                resume="allow",
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            remedy = "log in with wandb login, or set log.wandb_mode=offline"
            problem = f"log.wandb_project: W&B could not begin ({error})"
            raise UserError(f"{problem}; {remedy}") from error
        id_file.write_text(self._run.id, encoding="utf-8")

    def write(self, kind: Kind, row: Row) -> None:
        self._run.log({"step": row["step"], **_numbers(kind, row)})

    def drop_after(self, step: int) -> None:
        """W&B keeps what it was sent; later rows of a step stand beside the earlier."""

    def close(self) -> None:
        self._run.finish()


def _numbers(kind: Kind, row: Row) -> dict[str, float]:
    numbers = ((k, v) for k, v in row.items() if k != "step" and isinstance(v, int | float))
    return {f"{kind}/{k}": v for k, v in numbers}
