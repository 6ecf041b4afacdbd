"""The command line: ``python -m fasttrain.train CONFIG.toml [section.key=value …]``.

Only the config is loaded before it is known to be good; torch comes after.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fasttrain.config import UserError, help_text, load_config

__all__ = ["main"]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fasttrain.train",
        description="Train a language model as a TOML config says.",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="TOML file, such as configs/base.toml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values in place of the file's"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue a run: the newest sound checkpoint of this config's run (auto), or of a run "
        "or checkpoint folder",
    )
    parser.add_argument(
        "--stop-at-step",
        type=int,
        metavar="N",
        help="end after step N with a checkpoint and exit status 75",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="section.key",
        help="a key that may differ from the resumed run's; may be given several times",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 on bad input, 75 when stopped and resumable."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        from fasttrain.session import run

        return run(
            config,
            name=arguments.config.stem,
            resume=arguments.resume,
            stop_at_step=arguments.stop_at_step,
            allow_change=arguments.allow_change,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing to resume", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
