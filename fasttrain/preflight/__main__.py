"""The command line: ``python -m fasttrain.preflight CONFIG.toml [section.key=value …]``.

``--diagnose`` runs the checklist of `fasttrain.preflight.diagnosis` on the first batch.
``--kernels`` tries each fused operation on this device. Only caches are written.
"""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fasttrain.command import EXIT_DONE, EXIT_FAILED, check_system, command, make_parser
from fasttrain.config import load_config


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when all is well, 1 when not, 2 on bad input."""
    what = "Report what a run needs before it starts, and which settings may harm it."
    parser = make_parser("preflight", what)
    add = parser.add_argument
    add("config", type=Path, nargs="?", help="as for fasttrain.train")
    add("overrides", nargs="*", metavar="section.key=value", help="values that override the file's")
    add("--no-probe", action="store_true", help="do not run a step or measure time and memory")
    add("--world-size", type=int, default=1, metavar="N", help="plan for a run of N processes")
    add("--bandwidth-gbps", type=float, metavar="G", help="send bandwidth per rank, Gbit/s")
    checklist = "run the checklist for a loss that does not fall, on the first batch"
    add("--diagnose", action="store_true", help=checklist)
    kernels = "check and time each fused operation on this device; takes no config"
    add("--kernels", action="store_true", help=kernels)
    add("--device", default="auto", help="device of --kernels: auto, cpu, cuda or cuda:N")
    arguments = parser.parse_intermixed_args(argv)
    n_ranks, gbps = arguments.world_size, arguments.bandwidth_gbps
    if n_ranks < 1:
        parser.error(f"--world-size {n_ranks}: no number of processes; give 1 or more")
    if gbps is not None and not 0 < gbps < math.inf:
        parser.error(f"--bandwidth-gbps {gbps}: no rate; give more than 0")
    if arguments.kernels:
        from fasttrain.preflight.kernels import show_kernels

        return EXIT_DONE if show_kernels(arguments.device) else EXIT_FAILED
    if arguments.config is None:
        parser.error("give a config file, or --kernels")
    config = load_config(arguments.config, arguments.overrides)
    check_system()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the profiler
    from fasttrain.preflight.plan import diagnose_run, preflight  # torch comes after the config

    if arguments.diagnose:
        return EXIT_DONE if diagnose_run(config) else EXIT_FAILED
    fits = preflight(config, probe=not arguments.no_probe, n_ranks=n_ranks, gbps=gbps)
    return EXIT_DONE if fits else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
