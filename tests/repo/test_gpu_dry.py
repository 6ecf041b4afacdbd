"""Every config compiles for an H100, in processes where gpu_dry.py stands in for one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))
TABLE: dict[str, Any] = json.loads(
    (ROOT / "benchmarks/results/nvidia-h100-compiled/gpu_dry.json").read_text("utf-8")
)
ENTRIES: dict[str, Any] = {e["name"]: e for e in TABLE["benchmarks"] if "skipped" not in e}
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the device"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs torch's build for CPU"),
]


DETERMINISTIC = "gpt2-124m, deterministic"
Found = dict[str, dict[str, Any]]


def compiled(cases: Sequence[str]) -> Found:
    """Compile cases with one layer in two processes; return what `one_layer` says of each."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    code = "import json, sys; from benchmarks.gpu_dry import one_layer; "
    code += "print(json.dumps({case: one_layer(case) for case in sys.argv[1:]}))"
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(
            [*command, *cases[i::2]], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        for i in range(2)
    ]
    found: Found = {}
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        found |= json.loads(output)
    return found


@cache
def of_configs() -> Found:
    return compiled([*CONFIGS, DETERMINISTIC])


def check(case: str, found: dict[str, Any]) -> None:
    """Compare with the table, where it is of this torch: each generates code of its own."""
    assert "error" not in found, found["error"]
    if torch.__version__ == TABLE["machine"]["torch"]:
        layer, rest = ENTRIES[case]["layer"]["bytes"], ENTRIES[case]["rest"]["bytes"]
        grown = (found["bytes"] - layer - rest) / layer
        assert grown < 0.02, f"a layer of {case} moves {grown:.1%} more; make gpu-dry, and say why"


@pytest.mark.parametrize("case", CONFIGS)
def test_S1_a_config_compiles_for_cuda_and_its_layers_move_no_more(case: str) -> None:
    check(case, of_configs()[case])


def test_C1_a_deterministic_step_adds_nothing_by_atomics() -> None:
    assert of_configs()["gpt2-124m"]["atomics"] > 0
    exact = of_configs()[DETERMINISTIC]
    check(DETERMINISTIC, exact)
    assert exact["atomics"] == 0
    assert "fasttrain.embedding_backward" in exact["extern"]


@pytest.mark.soak
def test_S1_so_do_fp8_checkpointing_and_documents() -> None:
    pytest.importorskip("torchao")
    for case, found in compiled(sorted(ENTRIES.keys() - set(CONFIGS))).items():
        check(case, found)
        assert bool(found["atomics"]) != ("deterministic" in case)  # C1
