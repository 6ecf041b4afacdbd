"""A run of configs/base.toml or speedrun.toml, whole process and all, as a figure."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, store
from benchmarks.store import ROOT

SHOWN = ("tokens_per_s", "step_ms", "data_wait_ms", "mfu", "peak_memory_gib", "loss")


def figures(rows: Sequence[dict[str, Any]], wall_s: float, name: str) -> dict[str, Any]:
    """Return what the rows of a ``metrics.jsonl`` say of the run's end."""
    last = [row for row in rows if row["kind"] == "train"][-1]
    end = ([row for row in rows if row["kind"] == "eval"] or [{}])[-1]
    entry: dict[str, Any] = {"name": name, "wall_s": wall_s, "steps": last["step"]}
    entry |= {key: last.get(key) for key in SHOWN}
    entry["tokens_per_s"] = {"fasttrain": last["tokens_per_s"]}
    return entry | {key: end.get(key) for key in ("val_loss", "val_bpb")}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, then write the figures."""
    parser = argparse.ArgumentParser(description="A run of a config, measured.")
    parser.add_argument("--config", choices=("base", "speedrun"), default="base")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--results", type=Path, required=True, help="folder of all devices")
    arguments = parser.parse_intermixed_args(argv)
    name, suite = f"{arguments.config}.toml", f"run-{arguments.config}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fasttrain.train", str(ROOT / "configs" / name)]
        command += [f"run.out_dir={folder}", "run.name=run", *arguments.overrides]
        started = time.perf_counter()
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        wall_s = time.perf_counter() - started
        if status:
            return status
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    entry = figures([json.loads(line) for line in lines], wall_s, name)
    machine, ceilings = harness.machine(), harness.ceilings()
    store.save(arguments.results, store.document(suite, [entry], machine, ceilings))
    print(json.dumps(entry, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
