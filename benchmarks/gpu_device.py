"""One stage of `benchmarks.gpu`: what the device is, and its ceilings."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, store


def facts() -> dict[str, Any]:
    """Return the device's properties that a reader of the figures wants."""
    if not torch.cuda.is_available():
        return {"name": "device"}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": "device",
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": found.total_memory / 2**30,
        "l2_mib": found.L2_cache_size / 2**20,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the ceilings and write them."""
    parser = argparse.ArgumentParser(description="The device and its ceilings.")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args(argv)
    document = store.document("device", [facts()], measure.machine(), measure.ceilings())
    store.write(arguments.results / store.folder_of(document["machine"]) / "device.json", document)
    print(document["machine"], document["ceilings"], facts(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
