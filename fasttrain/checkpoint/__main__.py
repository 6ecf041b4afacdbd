"""``python -m fasttrain.checkpoint PATH`` lists and verifies a checkpoint, or all of a run."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fasttrain.checkpoint import CheckpointError, verify
from fasttrain.checkpoint import files as disk
from fasttrain.command import EXIT_DONE, EXIT_FAILED, command, make_parser
from fasttrain.config import config_to_toml
from fasttrain.printing import printable, say


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """List and verify; 0 if all is well, 1 if anything is damaged, 2 if there is nothing."""
    parser = make_parser("checkpoint", "List and verify a checkpoint, or all those of a run.")
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT_FOLDER")
    damaged, shown = False, False
    for path in disk.candidates(parser.parse_args(arguments).path):
        say(str(path))
        found, verdict = None, "every byte is as it was written; config and state can be resumed"
        try:
            found = verify(path)
        except CheckpointError as error:
            damaged, verdict = True, str(error)
        for file in sorted(path.iterdir()) if path.is_dir() else []:
            line = f"  {printable(file.name):<24} {file.lstat().st_size:>15,} bytes"
            if found and file.name in found.files:
                sizes = [tensor.numel() for tensor in disk.map_tensors(file).values()]
                line += f" {len(sizes):>7,} tensors {sum(sizes):>15,} parameters"
            say(line)
        say(f"  {'verified' if found else 'DAMAGED'}: {verdict}")
        if found and not shown:
            shown = True
            for parent in found.state.get("lineage", []):
                say("  branched off {run} at step {step}".format(**parent))
            for change in found.state.get("history", []):
                say("  changed at step {step}: {key}: {old} → {new} ({when})".format(**change))
            say(config_to_toml(found.config))
    return EXIT_FAILED if damaged else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
