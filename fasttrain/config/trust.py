"""What the own config of a resumed run may decide, which somebody else may have written."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fasttrain.config.keys import UserError, show
from fasttrain.config.schema import TrainConfig


def refuse_foreign_keys(
    config: TrainConfig, overrides: Sequence[str], where: Path | str, *, at_address: bool = False
) -> None:
    """Refuse keys of a run's own config that lead to code, or to places where it would write.

    A run folder may come from anybody. What it names is read and checked, such as ``data.path``,
    but it decides neither what is executed nor what is written outside of it, unless the user names
    the key again or passes ``--trust``.

    Args:
        config: the run's own, with the overrides of the command line.
        overrides: these, ``section.key=value`` each; what they set is the user's own choice.
        where: the run, for the message.
        at_address: the run comes from a mirror, and its ``run.out_dir`` decides where it goes.

    Raises:
        UserError: names the key, its value and the remedies.
    """
    chosen = {override.partition("=")[0].strip() for override in overrides}
    for name, value, why in _leading_elsewhere(config, at_address):
        if name not in chosen:
            raise UserError(
                f"{name} = {show(value)} {why}, and the own config of {where} names it, which "
                f"somebody else may have written; give the key yourself, as in {name}=…, unset it "
                f"({name}=none), or pass --trust if you trust that run"
            )


def _leading_elsewhere(config: TrainConfig, at_address: bool) -> Iterator[tuple[str, object, str]]:
    tasks = [name for name in config.eval.tasks if _is_file(name)]
    if config.eval.tasks_path is not None:
        yield "eval.tasks_path", config.eval.tasks_path, "holds task files, which are code"
    if tasks:
        yield "eval.tasks", tasks, "names task files, which are code"
    if config.data.cache_dir is not None and not _is_in_own_cache(config.data.cache_dir):
        yield "data.cache_dir", config.data.cache_dir, "holds compiled code"
    mirror = config.checkpoint.mirror
    if mirror is not None and "***" not in mirror:  # with which no run begins
        yield "checkpoint.mirror", mirror, "is written to"
    out_dir = Path(config.run.out_dir)
    if at_address and (out_dir.is_absolute() or ".." in out_dir.parts):
        yield "run.out_dir", config.run.out_dir, "is written to"


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) or "/" in task or os.sep in task or os.path.exists(task)


def _is_in_own_cache(folder: str) -> bool:
    """Return whether a folder is in this user's cache folder; runs are never unpacked there."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = Path(home, "fasttrain").resolve()
    return os.path.isabs(home) and Path(os.path.expanduser(folder)).resolve().is_relative_to(own)
