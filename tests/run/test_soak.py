"""R29: a long run under random faults ends at the bits of the same run without them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.toy import ENV, ROOT, write_config


def soak(folder: Path, steps: int, n_faults: int, timeout_s: float) -> dict[str, Any]:
    write_config(folder)
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.toy_soak", str(folder), str(steps), str(n_faults)],
        cwd=ROOT, env=ENV, capture_output=True, text=True, check=False, timeout=timeout_s,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("steps", "n_faults"),
    [
        (300, 8),
        pytest.param(10_000, 60, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_R29_random_faults_change_nothing(steps: int, n_faults: int, tmp_path: Path) -> None:
    report = soak(tmp_path, steps, n_faults, timeout_s=3600.0)
    assert report["equal"], report
    assert report["steps"] == steps
    assert report["skipped_steps"] > steps / 200  # the data had batches without a finite loss
    assert sum(report["faults"].values()) >= n_faults / 2, report["faults"]
    assert all(report["faults"].values()), report["faults"]
    assert report["passed_over"] > 0  # a flipped bit was found and reported
    assert report["failed_saves"] > 0  # and a disk was full
    assert report["rollbacks_on_a_full_disk"] > 0
    at, n_files, memory = zip(*report["measured"], strict=True)
    assert at[-1] >= steps  # those that were gone back behind count twice
    half = len(at) // 2  # some are open while a checkpoint is written, and there are many of these
    assert max(n_files[half:]) <= max(n_files[:half]) + 3
    assert min(n_files[half:]) <= max(n_files[:half])
    settled = half if steps < 1000 else len(at) // 5  # all caches filled
    assert memory[-1] < 1.02 * memory[settled]
