"""Every config compiles for an H100, in processes where gpu_dry.py stands in for one."""

import json
import os
import re
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
CODE = """
import json, sys
from benchmarks.gpu_dry import ATOMIC, compile_step, config_of

found = {case: {} for case in sys.argv[1:]}
for case, counts in found.items():
    try:
        program = compile_step(config_of(case, "model.n_layers=1"))
        counts["atomics"] = sum(source.count(ATOMIC) for source in program.sources.values())
        counts |= {"extern": list(program.extern), **program.counts()}
    except Exception as error:
        counts["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def apart() -> dict[str, str]:
    """Return the environment of a process in which kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return environment | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def compiled(cases: Sequence[str]) -> Found:
    """Compile cases with one layer in two processes; return what `CODE` says of each."""
    command = [sys.executable, "-c", CODE]
    processes = [
        subprocess.Popen(
            [*command, *cases[i::2]], stdout=subprocess.PIPE, text=True, env=apart(), cwd=ROOT
        )
        for i in range(2)
    ]
    found: Found = {}
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        found |= json.loads(output)
    return found


def test_the_command_takes_all_names_some_or_none_that_is_unknown() -> None:
    code = """
import sys
from benchmarks.gpu_dry import main
for names in ([], ["two"], ["three"]):
    sys.argv = ["command", *names]
    main("suite", ["one", "two"], lambda names: print(names) or [])
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=apart(), cwd=ROOT)
    assert result.stdout == "['one', 'two']\n['two']\n"
    assert re.search(r"error: .*\bthree\b.*\bone; two\n$", result.stderr)


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
def test_a_config_compiles_for_cuda_and_its_layers_move_no_more(case: str) -> None:
    check(case, of_configs()[case])
    assert not [name for name in of_configs()[case]["extern"] if "norm" in name]


@pytest.mark.parametrize(
    ("case", "dim", "limits"),
    [
        ("llama-1b", 2048, (14, 18)),
        ("gpt2-124m", 768, (14, 18)),
        ("llama-1b, bf16 residual", 2048, (8, 8)),
        ("gpt2-124m, bf16 residual", 768, (8, 8)),
    ],
)
def test_a_norm_costs_no_pass_of_its_own(case: str, dim: int, limits: tuple[int, int]) -> None:
    """Residual addition, norm and casts forward; backward, with the gradient of x and for `mm`."""
    entry = ENTRIES[case]
    n_elements = entry["rows"] * entry["seq_len"] * dim
    assert sum(entry["layer"]["extern"].values()) == 14  # 12 products, attention, its backward
    for graph, limit in zip(("forward", "backward"), limits, strict=True):
        kernels = [k for k in entry["kernels"] if k["graph"] == graph]
        norms = [k for k in kernels if re.search(r"mean|rsqrt|expand_.*sum", k["name"])]
        assert sum(k["launches"] for k in norms) >= 2 * 2 + 1  # two layers
        for kernel in (k for k in norms if k["a_layer"]):
            assert kernel["bytes"] <= (limit + 0.1) * n_elements, kernel
        assert not [k for k in kernels if k["name"].endswith("fused__to_copy_view")]  # its cast


@pytest.mark.parametrize("case", ["gpt2-124m", "llama-350m", "llama-1b"])
def test_no_weight_is_cast_nor_its_gradient_where_gradients_accumulate(case: str) -> None:
    kernels = [k for k in ENTRIES[case]["kernels"] if k["a_layer"]]
    casts = [k["bytes"] for k in kernels if re.search(r"fused__to_copy(_t)?$", k["name"])]
    assert sum(casts) < 1e5  # biases


def test_a_bias_is_summed_by_the_kernel_that_writes_its_gradient() -> None:
    """That of GELU, and that which lays the gradients of q, k and v side by side."""
    entry = ENTRIES["gpt2-124m"]
    n_elements = entry["rows"] * entry["seq_len"] * 768
    kernels = [k for k in entry["kernels"] if k["graph"] == "backward" and k["a_layer"]]
    for name, n_bytes in (("gelu_backward", 4 * 6), ("cat", 3 * 4)):
        found = [k["bytes"] for k in kernels if name in k["name"]]
        assert max(found) == pytest.approx(n_bytes * n_elements, rel=0.01), name
        assert sum(found) - max(found) < 0.01 * n_elements, f"{name}: {found}"


def test_no_pass_over_the_heads_gradient_multiplies_it() -> None:
    """What a table that is no head needs, zeros to add to, is all of that size."""
    entry = ENTRIES["llama-350m"]
    n_bytes = 4 * 32_000 * 1_024
    large = [k["name"] for k in entry["kernels"] if not k["a_layer"] and k["bytes"] % n_bytes < 1e3]
    assert large
    assert all("embedding_dense_backward" in name for name in large)


def test_a_deterministic_step_adds_nothing_by_atomics() -> None:
    assert of_configs()["gpt2-124m"]["atomics"] > 0
    exact = of_configs()[DETERMINISTIC]
    check(DETERMINISTIC, exact)
    assert exact["atomics"] == 0
    assert "fasttrain.embedding_backward" in exact["extern"]


def test_in_fp8_a_layer_multiplies_nothing_in_bf16() -> None:
    pytest.importorskip("torchao")
    for found in compiled(["gpt2-124m, fp8", "llama-1b, fp8"]).values():
        assert "error" not in found, found["error"]
        assert "_scaled_mm" in found["extern"]
        assert not {"mm", "addmm", "bmm"} & {*found["extern"]}


@pytest.mark.soak
def test_so_do_fp8_checkpointing_and_documents() -> None:
    pytest.importorskip("torchao")
    for case, found in compiled(sorted(ENTRIES.keys() - set(CONFIGS))).items():
        check(case, found)
        assert bool(found["atomics"]) != ("deterministic" in case)
        # The residual addition is part of a norm. As part of a product it would copy the stream.
        assert "addmm" not in found["extern"] or case.startswith("gpt2"), case
