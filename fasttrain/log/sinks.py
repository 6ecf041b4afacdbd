"""Where rows of numbers go beside ``metrics.jsonl``: CSV files, TensorBoard, Weights & Biases."""

import csv
import importlib.util
import io
import json
import math
import os
import tomllib
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, Literal, Protocol

from fasttrain.config import TrainConfig, UserError, config_to_toml
from fasttrain.log.text import LogFile, keep_lines
from fasttrain.redact import redact

Kind = Literal["train", "eval"]


class Sink(Protocol):
    """What rows are written to."""

    def write(self, kind: Kind, row: Mapping[str, Any]) -> None:
        """Take a row of numbers; it names its ``step``."""

    def drop_after(self, step: int) -> None:
        """Forget rows of steps after ``step``: the run goes on from there."""

    def close(self) -> None:
        """Write out what is left. May be called twice."""


def check_packages(config: TrainConfig) -> None:
    """Refuse a config that asks for a logger whose package is not installed.

    Raises:
        UserError: names the package and the key.
    """
    for key, wanted, package in (
        ("log.tensorboard", config.log.tensorboard, "tensorboard"),
        ("log.wandb_project", config.log.wandb_project, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{key} = {wanted} needs the package {package}; install it with pip install "
                f"{package}, or unset {key}"
            )


class CsvLogger:
    """Writes ``train.csv`` and ``eval.csv``; the first row of each names the columns.

    Args:
        folder: where they are; continued where they exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[LogFile, list[str]]] = {}

    def write(self, kind: Kind, row: Mapping[str, Any]) -> None:
        """Append a row; a key that the first row lacked is left out, a missing one is empty."""
        if kind not in self._files:
            path = self._folder / f"{kind}.csv"
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            old = text.partition("\n")[0]
            columns = next(csv.reader([old])) if old else list(row)
            self._files[kind] = (LogFile(path), columns)
            if not old:
                self._files[kind][0].write(_csv_line(columns))
        file, columns = self._files[kind]
        file.write(_csv_line(["" if row.get(k) is None else row[k] for k in columns]))

    def drop_after(self, step: int) -> None:
        """Drop rows of steps after ``step``, as `JsonlLogger.drop_after`."""
        self.close()
        for kind in ("train", "eval"):
            path = self._folder / f"{kind}.csv"
            if path.exists():
                with path.open(encoding="utf-8", errors="replace") as file:
                    head = file.readline()
                keep_lines(path, partial(_is_kept, head=head, step=step))

    def close(self) -> None:
        """Close the files. May be called twice; a later row opens them again."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()


def _csv_line(values: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _is_kept(line: str, head: str, step: int) -> bool:
    """Return whether a line stays; none does that was cut off, or under a head that was."""
    names, cells = (text.rstrip("\n").split(",") for text in (head, line))
    if not (line.endswith("\n") and head.endswith("\n") and "step" in names):
        return False
    at = cells[names.index("step") :][:1]
    return line == head or (at != [] and at[0].isdigit() and int(at[0]) <= step)


class _TensorBoard:
    """TensorBoard's event files in ``<run>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None
        self._purge_step: int | None = None

    def write(self, kind: Kind, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds of imports

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        for key, value in _numbers(row).items():
            self._writer.add_scalar(f"{kind}/{key}", value, row["step"])

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
        self._config, self._folder = config, folder
        self._run: Any = None
        self._id_file = folder / "wandb" / "run-id"
        self._open()

    def _open(self) -> None:
        import wandb

        old = self._id_file.read_text(encoding="utf-8") if self._id_file.exists() else None
        self._id_file.parent.mkdir(exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or self._config.log.wandb_mode
        try:
            self._run = wandb.init(
                project=self._config.log.wandb_project,
                name=self._folder.name,
                dir=str(self._folder),
                config=tomllib.loads(config_to_toml(self._config, redact)),
                mode=mode,
                id=old,
                resume="allow",
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"log.wandb_project: W&B could not begin ({error}); log in with wandb login, or "
                "set log.wandb_mode=offline"
            ) from error
        self._id_file.write_text(self._run.id, encoding="utf-8")

    def write(self, kind: Kind, row: Mapping[str, Any]) -> None:
        numbers = {f"{kind}/{k}": v for k, v in _numbers(row).items()}
        self._run.log({"step": row["step"], **numbers})

    def drop_after(self, step: int) -> None:
        """W&B keeps what it was sent; later rows of a step stand beside the earlier."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


class Sinks:
    """All that the rows of one run are written to: ``metrics.jsonl`` and what ``[log]`` asks for.

    Args:
        config: of the run.
        folder: of the run.
        made_by: its provenance, for ``metrics.jsonl``.

    Raises:
        UserError: a package is missing, or W&B refuses to begin.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, made_by: Mapping[str, Any] | None = None
    ) -> None:
        check_packages(config)
        self.all: list[Sink] = []
        if config.log.wandb_project:  # the only one that may refuse
            self.all.append(_Wandb(config, folder))
        self.all.append(JsonlLogger(folder / "metrics.jsonl", made_by))
        if config.log.csv:
            self.all.append(CsvLogger(folder))
        if config.log.tensorboard:
            self.all.append(_TensorBoard(folder))

    def write(self, kind: Kind, row: Mapping[str, Any]) -> None:
        """Hand a row to all of them."""
        for sink in self.all:
            sink.write(kind, row)

    def drop_after(self, step: int) -> None:
        """Have each forget the rows after ``step``."""
        for sink in self.all:
            sink.drop_after(step)

    def close(self) -> None:
        """Close all of them. May be called twice."""
        for sink in self.all:
            sink.close()


class JsonlLogger:
    """Appends rows to ``metrics.jsonl``, one JSON object a line, handed to the system at once.

    Args:
        path: the file; created where missing, continued where not.
        made_by: what the rows are made by: a line before the first of them says so.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any] | None = None) -> None:
        self._path, self._made_by = path, made_by
        self._file = LogFile(path)
        self._head = ""  # that line, once it is in the file
        self._begin = 0  # the step that these rows begin after

    def write(self, kind: Literal["train", "eval"], row: Mapping[str, Any]) -> None:
        """Append a row and when that was; a number that is not finite becomes null, as in JSON."""
        lines = _line(kind, row)
        if self._made_by and not self._head:
            self._head = _line("run", {"step": self._begin, **self._made_by})
            lines = self._head + lines
        self._file.write(lines)

    def drop_after(self, step: int) -> None:
        """Drop rows of steps after ``step`` and lines cut off by a crash, for a run that goes on
        from a checkpoint of that step: each row then stands once. So go rows that an uninterrupted
        run does not have, and what a row was made by where no such row is left.
        """
        self._file.close()
        lines = [x.decode("utf-8", "replace") for x in self._path.read_bytes().splitlines(True)]
        kept = _kept(lines, step)
        if self._head not in compress(lines, kept):
            self._head = ""
        self._begin = step
        flags = iter(kept)
        keep_lines(self._path, lambda _: next(flags))
        self._file = LogFile(self._path)

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def _kept(lines: list[str], step: int) -> list[bool]:
    """Return which lines stay; one that says what made rows stays with the first of these."""
    kept: list[bool] = []
    has_rows = False  # behind the line
    for line in reversed(lines):
        try:
            row = json.loads(line) if line.endswith("\n") else None
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or row.get("stopped"):
            kept.append(False)
        elif row.get("kind") == "run":
            kept.append(has_rows)
            has_rows = False
        else:
            at = row.get("step", 0)
            kept.append(isinstance(at, int) and at <= step)
            has_rows |= kept[-1]
    return kept[::-1]


def _line(kind: str, row: Mapping[str, Any]) -> str:
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"kind": kind, "time": now, **finite}, allow_nan=False) + "\n"
