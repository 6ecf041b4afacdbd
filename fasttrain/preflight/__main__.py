"""The command line: ``python -m fasttrain.preflight CONFIG.toml [section.key=value …]``.

``--diagnose`` runs the checklist of `fasttrain.diagnosis` on the first batch, ``--kernels`` tries
each fused operation on this device. Nothing is written but the caches.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from fasttrain.command import EXIT_DONE, EXIT_FAILED, check_system, command, prog
from fasttrain.config import load_config


def _count(text: str) -> int:
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{n} is no number of processes; give 1 or more")
    return n


def _rate(text: str) -> float:
    if not 0 < (rate := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no rate; give more than 0")
    return rate


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog("preflight"),
        description="Tell what a run takes before it takes it, and what will hurt it.",
    )
    add = parser.add_argument
    add("config", type=Path, nargs="?", help="as fasttrain.train takes it")
    add("overrides", nargs="*", metavar="section.key=value", help="values in place of the file's")
    add("--no-probe", action="store_true", help="do not run a step: no time, no measured memory")
    add(
        "--world-size", type=_count, default=1, metavar="N", help="tell it for a run of N processes"
    )
    add("--bandwidth-gbps", type=_rate, metavar="G", help="gigabits a second that a rank sends")
    add(
        "--diagnose",
        action="store_true",
        help="run the checklist for a loss that does not fall, on the first batch",
    )
    add(
        "--kernels",
        action="store_true",
        help="check each fused operation on this device and time its paths; takes no config",
    )
    add("--device", default="auto", help="device of --kernels: auto, cpu, cuda or cuda:N")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when all is well, 1 when not, 2 on bad input."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.kernels:
        from fasttrain.preflight.kernels import show_kernels

        return EXIT_DONE if show_kernels(arguments.device) else EXIT_FAILED
    if arguments.config is None:
        parser.error("give a config file, or --kernels")
    config = load_config(arguments.config, arguments.overrides)
    check_system()
    from fasttrain.preflight.plan import diagnose_run, preflight  # torch comes after the config

    if arguments.diagnose:
        return EXIT_DONE if diagnose_run(config) else EXIT_FAILED
    n_ranks, gbps = arguments.world_size, arguments.bandwidth_gbps
    fits = preflight(config, probe=not arguments.no_probe, n_ranks=n_ranks, bandwidth_gbps=gbps)
    return EXIT_DONE if fits else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
