"""``python -m fasttrain.checkpoint PATH``: what is in checkpoints, and whether it is all there."""

import math
import sys
from pathlib import Path

from fasttrain import checkpoint_files as disk
from fasttrain.checkpoint_files import CheckpointError

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """List and verify; 0 if all is well, 1 if anything is damaged, 2 if there is nothing."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m fasttrain.checkpoint RUN_OR_CHECKPOINT_FOLDER")
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        paths = disk.candidates(Path(arguments[0]))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    damaged = 0
    for path in paths:
        print(path)
        try:
            disk.verify(path)
            _print_files(path, intact=True)
        except CheckpointError as error:
            damaged += 1
            _print_files(path, intact=False)
            print(f"  DAMAGED: {error}")
        else:
            print("  verified: every byte is as it was written")
            if path == paths[0]:
                _print_history(path)
                print((path / "config.toml").read_text())
    return 1 if damaged else 0


def _print_files(path: Path, *, intact: bool) -> None:
    for file in sorted(path.iterdir()):
        size = file.lstat().st_size
        line = f"  {file.name:<24} {size:>15,} bytes"
        if intact and file.suffix == ".safetensors":
            with file.open("rb") as stream:
                raw = stream.read(8)
                raw += stream.read(min(int.from_bytes(raw, "little"), disk.JSON_LIMIT))
            layout = disk.read_layout(file, memoryview(raw), size)
            parameters = sum(math.prod(shape) for _, shape, _, _ in layout.values())
            line += f" {len(layout):>7,} tensors {parameters:>15,} parameters"
        print(line)


def _print_history(path: Path) -> None:
    """Print what was changed on purpose when the run was resumed."""
    file = path / "state.json"
    for change in disk.parse_json(file, file.read_bytes()).get("history", []):
        print(
            f"  changed at step {change['step']}: {change['key']}: {change['old']} → "
            f"{change['new']} ({change['when']})"
        )
