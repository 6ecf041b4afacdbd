"""The table of docs/kernels-compiled.md is what was measured; one op is measured again."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, report

(TABLE,) = (d for d in harness.read_all() if d["suite"] == "kernel_peers")
ENTRIES = {(entry["op"], entry["peer"]): entry for entry in TABLE["benchmarks"]}


def test_the_table_in_the_readme_is_what_was_measured() -> None:
    found = re.search(report.PART.format("peers"), report.COMPILED.read_text("utf-8"), re.S)
    assert found is not None
    assert found[0] == report.kernels_table(TABLE), "run python -m benchmarks.report"
    ops = {op for op, _ in ENTRIES}
    assert {peer for _, peer in ENTRIES} == {
        "fasttrain_kernels",
        "Liger",
        "FlashAttention",
        "torch.compile",
    }
    assert all((op, "fasttrain_kernels") in ENTRIES for op in ops)
    assert all((op, "torch.compile") in ENTRIES for op in ops)


def test_what_is_better_than_ours_is_said() -> None:
    def entry(peer: str, memory: float, n_bytes: float, instructions: float) -> dict[str, object]:
        kernel = {"programs": 2, "registers": 32, "shared": 0, "spills": 0}
        return {
            **{"op": "swiglu", "peer": peer, "options": [], "dtypes": ["bf16"]},
            **{"memory": memory, "bytes": n_bytes},
            "kernels": [{**kernel, "instructions": instructions}],
        }

    entries = [entry("fasttrain_kernels", 6, 16, 9), entry("Liger", 4, 16, 6)]
    entries.append(entry("torch.compile", 6, 17, 9.1))
    text = report.kernels_table({**TABLE, "benchmarks": entries})
    better = next(line for line in text.splitlines() if line.startswith("Better than ours"))
    assert better == (
        "Better than ours: Liger, memory of swiglu (4, ours 6); "
        "Liger, instructions of swiglu (6, ours 9)."
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the device")
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs torch's build for CPU")
def test_an_op_is_measured_again_with_the_same_result(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.kernel_peers", "swiglu", "--results", tmp_path]
    subprocess.run(command, env=environment, cwd=harness.ROOT, check=True)
    (document,) = harness.read_all(tmp_path)
    found = {entry["peer"]: entry for entry in document["benchmarks"]}
    liger = ["Liger"] * (importlib.util.find_spec("liger_kernel") is not None)
    assert [*found] == ["fasttrain_kernels", *liger, "torch.compile"]
    for peer, entry in found.items():
        assert [kernel["spills"] for kernel in entry["kernels"]] == [0, 0]  # forward, backward
        assert entry["bytes"] == pytest.approx(16, rel=0.01)
        versions = [(d["machine"]["torch"], d["machine"]["triton"]) for d in (document, TABLE)]
        if peer != "Liger" and versions[0] == versions[1]:
            assert entry == ENTRIES["swiglu", peer]
