"""`run.json`: the config that a run is of, when it began, where it branched off, whether it ended.

Folder names cannot tell: `llama-2` is the second run of `llama.toml` or the first of
`llama-2.toml`, and the number of a folder that was removed may be used again.
"""

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict, cast

from fasttrain.checkpoint.files import STEP, Parent
from fasttrain.config import UserError, misfit
from fasttrain.config.untrusted import can_be_path, json_object, open_regular, read_json
from fasttrain.redact import redact
from fasttrain.storage import if_there, write_atomically

RUN_JSON = "run.json"


class Record(TypedDict):
    """What `run.json` holds."""

    config: str  # absolute path of the config file that the run was started with, or its name
    began: str  # time in UTC, in ISO format
    parent: Parent | None  # None: the run began at step 0
    ended: bool  # whether it came to its own end


def read_record(run_dir: Path) -> Record | None:
    """Return the record of a run; None if it is damaged, or not there as in older versions."""
    with suppress(UserError):
        return _checked(read_json(run_dir / RUN_JSON, ""))
    return None


def record_at(address: str) -> Record | None:
    """Return the record of a run at an address in a mirror; None if it has none."""
    content = if_there(f"{address}/{RUN_JSON}", "cat_file")
    return None if content is None else _checked(json_object(content))


def _checked(value: object) -> Record | None:
    if misfit(Record, value):
        return None
    record = cast(Record, value)
    parent = record["parent"]
    sound = parent is None or (STEP.fullmatch(parent["checkpoint"]) and can_be_path(parent["run"]))
    return record if sound and can_be_path(record["config"]) else None


def encoded(record: Record) -> bytes:
    """Return the content of `run.json`, without secrets."""
    return (redact(json.dumps(record, indent=1)) + "\n").encode()


def write_record(run_dir: Path, record: Record) -> None:
    """Replace the record of a run."""
    write_atomically(run_dir / RUN_JSON, encoded(record))


def config_name(record: Record) -> str:
    """Return the name of a run's config; a bare name may hold dots, a file has an ending."""
    config = record["config"]
    return Path(config).stem if os.path.isabs(config) else config


def now() -> str:
    """Return the time as records hold it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def began(run_dir: Path, record: Record | None) -> float:
    """Return when a run began, in seconds since the epoch; 0 if neither record nor log say."""
    times = [record["began"]] if record else []
    with suppress(OSError, UserError), open_regular(run_dir / "metrics.jsonl") as lines:
        times.append(str((json_object(lines.readline(1 << 16)) or {}).get("time")))
    for time in times:
        with suppress(ValueError, OverflowError):
            return datetime.fromisoformat(time).timestamp()
    return 0.0


def parent_folder(run_dir: Path, recorded: str | Path) -> Path:
    """Return the folder of a branch's parent: as it was ``recorded``, if it is gone beside it."""
    named = Path(recorded)
    beside = run_dir.absolute().parent / named.name
    return beside if beside.is_dir() and not named.is_dir() else named
