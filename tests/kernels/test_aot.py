"""Kernels compiled without a GPU: all launch configurations for sm_90, a few for other targets.

With ``-m soak`` all for all. They are compiled in a process of their own, where the kernels are
decorated for the compiler and not for the interpreter; all tests here read its report.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from dev import aot
from dev.aot.issue import DEVICES, issue_of

ROOT = Path(__file__).parents[2]
# The first test of a run waits for all to be compiled: a minute, with -m soak ten.
pytestmark = pytest.mark.timeout(3600)

Row = dict[str, Any]

# Kernels that write no tensor of the op's size: sums, losses without a gradient, tables.
SMALL_OUTPUT = {"_sum_partials_kernel", "_sum_squares_kernel", "_finish_kernel", "advance_kernel"}
# Kernels that read nothing large: a few numbers for each tensor, or for each program.
SMALL_INPUT = {"_finish_kernel", "advance_kernel"}
# (target, kernel, case, least width): where operands would allow 16 bytes and the launch has less.
NARROWER = [
    # A row of 131 logits, spread over the 64 threads of one wavefront, leaves a thread 4 of them.
    ("gfx942", "cross_entropy_kernel", "bf16 V=131 ", 8),
    # Blocks of 4,096, with options, over the 1,024 threads of 16 wavefronts.
    ("gfx942", "cross_entropy_kernel", "every option", 8),
]
# (pattern of the target, kernel, case): known spills of at most 6 instructions or registers.
# sm_90, for which the configurations are chosen, has none, and may have none.
SPILLS = [
    ("sm_75|sm_8.|sm_100|sm_120", "cross_entropy_kernel", "every option"),
    ("sm_80", "cross_entropy_kernel", "fp32 V=32000"),  # by Triton 3.9
    ("sm_75", "cross_entropy_kernel", "fp32 V=32000"),  # 2: a row of the lowest float stays finite
    ("sm_8.", "_rms_norm_bwd_kernel", "D=32768 residual"),
    ("sm_100", "cross_entropy_kernel", "fp16 V=50257"),
    ("sm_100", "_rms_norm_bwd_kernel", "D=32768 residual"),  # by Triton 3.8, not by 3.7
]
MANY_SPILLS = [
    ("sm_75", "cross_entropy_kernel", "fp32 V=50257 every option"),  # 9
    ("sm_120", "_rms_norm_bwd_kernel", "fp32 D=8192 residual"),  # 18
]
# (target or "", kernel, pattern of the case, least ceiling as a share of the memory's speed, why):
# what issuing instructions keeps under 1.2 times the speed of memory.
ISSUE_BOUND = [
    (
        "",
        "cross_entropy_kernel",
        r" V=131 ",
        0.15,
        "131 logits are all prologue, and not many bytes",
    ),
    (
        "sm_100",
        "cross_entropy_kernel",
        " V=16(001|384) ",
        0.85,
        "a row in the registers of a program",
    ),
    ("", "cross_entropy_kernel", "every option", 0.2, "a capped logit costs a tanh, twice"),
    (
        "sm_100",
        "cross_entropy_kernel",
        "fp32 V=8001 forward",
        1.19,
        "a row of the lowest float stays finite, for 3 % more instructions",
    ),
    (
        "sm_100",
        "_rms_norm_.*",
        "fp32 D=131",
        0.87,
        "rows that start anywhere are read 4 bytes at a time; Triton 3.6 gives 0.873",
    ),
    ("sm_100", "_rope_kernel", "bf16|fp16", 0.9, "addresses of two tensors, and masks"),
]
if version("triton").startswith("3.6."):
    why = "1.178 by Triton 3.6; later ones give 1.2"
    ISSUE_BOUND.append(("sm_100", "cross_entropy_kernel", " V=32000 ", 1.17, why))
# What is compiled for others than sm_90, for which the configurations are chosen.
FEW = (
    "cross_entropy bf16 V=50257",
    "rms_norm bf16 D=768 residual",
    "swiglu bf16",
    "FusedAdamW bf16 stochastic",
    "Muon fp32",
    "grad_norm bf16",
)
# The vocabularies of language models that two passes read, compiled for more targets.
VOCABULARIES = [
    "cross_entropy bf16 V=32000 forward",
    "cross_entropy bf16 V=50257",
    "cross_entropy bf16 V=50304 forward",
    "cross_entropy bf16 V=128256",
]
# Operands reached by 32-bit offsets: they have an element a column, a row, a tensor or a program.
# Everything else is as large as the op's tensors and must be reached by 64-bit offsets.
SMALL_OPERANDS = {
    "cross_entropy_kernel": {"class_weight_ptr", "class_weight_sum_ptr", "scale_ptr"},
    "_scale_kernel": {"factor_ptr"},
    "_rms_norm_fwd_kernel": {"weight_ptr", "rstd_ptr"},
    "_rms_norm_bwd_kernel": {"weight_ptr", "rstd_ptr"},
    "_sum_partials_kernel": {"dw_ptr"},
    "adamw_kernel": {
        "pointers_ptr", "lengths_ptr", "chunks_ptr", "coefs_ptr", "found_inf_ptr",
    },
    "muon_direction_kernel": {"pointers_ptr", "chunks_ptr", "clip_ptr", "found_inf_ptr"},
    "muon_apply_kernel": {"pointers_ptr", "chunks_ptr", "lr_ptr", "found_inf_ptr"},
    "_sum_squares_kernel": {"pointers_ptr", "lengths_ptr", "chunks_ptr", "partial_ptr"},
    "_finish_kernel": {"partial_ptr", "out_ptr"},
    "advance_kernel": {
        "hyper_ptr", "lr_pointers_ptr", "group_ptr", "step_pointers_ptr", "coefs_ptr", "clip_ptr",
        "scale_ptr", "found_inf_ptr", "step_ptr", "lr_on_device",
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.soak)])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """What is compiled costs."""
    others = FEW if request.param == "few" else [case.name for case in aot.CASES]
    code = f"""
import json
from dataclasses import asdict
from dev import aot
few = [case for case in aot.CASES if case.name in {others}]
rows = aot.reports(["sm_90"], count=False)
rows += aot.reports([name for name in aot.TARGETS if name != "sm_90"], 2, few, count=False)
more = [case for case in aot.CASES if case.name in {VOCABULARIES} and case not in few]
rows += aot.reports(["sm_100", "sm_120"], 2, more, count=False)
print(json.dumps([asdict(row) for row in rows]))
"""
    rows: list[Row] = json.loads(run_aot("-c", code, folder=tmp_path_factory.mktemp("aot")))
    return rows


def run_aot(*arguments: str, folder: Path) -> str:
    """Run Python where the kernels are decorated for the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, *arguments]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def label(row: Row) -> str:
    return " | ".join(str(row[key]) for key in ("target", "kernel", "case", "configuration"))


def is_listed(row: Row, entries: list[Any]) -> bool:
    return any(
        re.fullmatch(entry[0], row["target"])
        and row["kernel"] == entry[1]
        and entry[2] in row["case"]
        for entry in entries
    )


def test_every_kernel_compiles_for_every_target(rows: list[Row]) -> None:
    package = ROOT / "kernels/fasttrain_kernels"
    source = "\n".join(path.read_text("utf-8") for path in package.glob("*.py"))
    defined = set(re.findall(r"@triton\.jit\s+def (\w+_kernel)\(", source))
    assert len(defined) >= 14
    targets = {row["target"] for row in rows}
    assert targets == set(aot.TARGETS)
    complete = len({row["case"] for row in rows if row["target"] == "sm_80"}) > len(FEW)
    for target in targets:
        mine = [row for row in rows if row["target"] == target]
        expected = defined if target == "sm_90" else defined - {"_symmetric_kernel"}  # for TMA
        assert {row["kernel"] for row in mine} == expected or not (complete or target == "sm_90")
        assert len(mine) == len({str(row) for row in mine}), "a specialisation is there twice"


def test_the_cases_reach_every_configuration_of_the_cross_entropy(rows: list[Row]) -> None:
    """Every (passes, block, warps) that the launcher can choose for wide rows is compiled."""
    found = set()
    for row in rows:
        if row["kernel"] == "cross_entropy_kernel" and row["target"] == "sm_90":
            warps, block = re.match(r"warps=(\d+) BLOCK_N=(\d+)", row["configuration"]).groups()
            found.add(("SINGLE_PASS" in row["configuration"], int(block), int(warps)))
    assert found >= {
        (True, 256, 1), (True, 8192, 16), (True, 16384, 16),
        (False, 4096, 16), (False, 8192, 16), (False, 8192, 8),
    }  # fmt: skip


def test_no_spills_and_no_local_memory_on_sm_90(rows: list[Row]) -> None:
    for row in rows:
        if row["target"] == "sm_90":
            assert (row["spills"], row["local"]) == (0, 0), label(row)


def test_spills_elsewhere_are_few_and_known(rows: list[Row]) -> None:
    for row in rows:
        if (row["spills"] or row["local"]) and not is_listed(row, MANY_SPILLS):
            assert is_listed(row, SPILLS), label(row)
            assert row["spills"] <= 6, label(row)
            assert row["local"] <= 16, label(row)


def test_accesses_are_16_bytes_wide(rows: list[Row]) -> None:
    for row in rows:
        least = 16
        if is_listed(row, NARROWER):
            least = next(e[3] for e in NARROWER if is_listed(row, [e]))
        if not row["aligned"]:
            continue
        if row["kernel"] not in SMALL_INPUT:
            assert row["load"] >= least, label(row)
        reads_only = row["kernel"] == "cross_entropy_kernel" and (
            "WRITE_GRAD" not in row["configuration"]
        )
        if row["kernel"] not in SMALL_OUTPUT and not reads_only:
            assert row["store"] >= least, label(row)


def test_the_gpt2_vocabulary_has_no_cliff(rows: list[Row]) -> None:
    """V=50257, where others access 2 bytes at a time and spill: 16 bytes, and no stack."""
    odd = [r for r in rows if "V=50257" in r["case"] and "HAS_EDGES" in r["configuration"]]
    assert {row["target"] for row in odd} == set(aot.TARGETS)
    assert {row["case"].split()[1] for row in odd} == {"bf16", "fp16", "fp32"}
    for row in odd:
        assert row["load"] >= 16, label(row)
        assert row["target"] != "sm_90" or row["local"] == 0, label(row)


def test_instructions_leave_memory_its_speed(rows: list[Row]) -> None:
    """Issuing instructions allows 1.2 times the speed of memory, or a reason is listed."""
    bound = [row for row in rows if row["floor"] and row["target"] in DEVICES]
    assert bound
    for row in bound:
        assert row["programs"] > 0, label(row)
        assert row["in_flight"] > 0, label(row)
        shares = [
            least for target, kernel, case, least, _ in ISSUE_BOUND
            if target in ("", row["target"])
            and re.fullmatch(kernel, row["kernel"]) and re.search(case, row["case"])
        ]  # fmt: skip
        least = max(shares[:1], default=1.2) * DEVICES[row["target"]].memory
        assert row["ceiling"] >= least, f"{label(row)}: {row['ceiling']:.2f} of {least:.2f} TB/s"


def test_a_logit_costs_few_instructions(rows: list[Row]) -> None:
    """28.8 instructions a logit were 4.1 TB/s on an H100; one program an SM on the later ones."""
    costs: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["case"] in VOCABULARIES and "COMPUTE_LOSS WRITE_GRAD" in row["configuration"]:
            costs.setdefault(row["target"], {})[row["case"]] = row
    for target, least in {"sm_90": 5.0, "sm_100": 6.0, "sm_120": 1.2 * 1.79}.items():
        assert sorted(costs[target]) == sorted(VOCABULARIES)
        for row in costs[target].values():
            assert row["instructions"] <= 20, label(row)
            assert row["ceiling"] >= least, label(row)
            assert row["programs"] >= 2, label(row)
        _, odd, even, _ = (costs[target][case]["instructions"] for case in VOCABULARIES)
        assert odd <= 1.05 * even


def test_instructions_are_counted_in_the_loops_that_load() -> None:
    """Of nested loops each has its own; what surrounds them or only stores is left out."""
    load, store, add = "LDG.E.128 R1, [R2]", "STG.E.128 [R2], R1", "FADD R1, R1, R2"
    lines = [add, ".L_x_0:", store, "@P0 BRA `(.L_x_0)", add]
    lines += [".L_x_1:", add, ".L_x_2:", load, load, add, "@P0 BRA `(.L_x_2)", "@P1 BRA `(.L_x_1)"]
    lines += ["EXIT", ".L_x_3:", "BRA `(.L_x_3)"]
    sass = "\n".join(x if x.endswith(":") else f"/*0000*/ {x} ;" for x in lines)
    h100 = DEVICES["sm_90"]
    found = issue_of(sass, {"BLOCK_N": 512}, 2, 40, 0, 0, h100)
    assert found == (4 / 8, min(65536 // (40 * 64), 32), 32 * 64 * 25)
    assert found.ceiling(2, h100) == pytest.approx(4 * 128 * 132 * 1.755e-3)
    half_empty = issue_of(sass, {"BLOCK_N": 512}, 2, 40, 0, 768, h100)
    assert half_empty.instructions == pytest.approx(0.5 / 0.75)
    # The loop is one of two passes, unrolled: 2 loads of 8 logits a thread, whatever a block has.
    unrolled = issue_of(sass, {"BLOCK_N": 512, "REST": 256, "ALIGN": 8}, 2, 40, 0, 768, h100)
    assert unrolled.instructions == 4 / 16


def test_stochastic_rounding_costs_few_instructions(rows: list[Row]) -> None:
    """183 an element and 168 registers, one program an SM, with three calls of Philox each."""
    (row,) = (
        row for row in rows
        if (row["kernel"], row["case"]) == ("adamw_kernel", "FusedAdamW bf16 stochastic")
        and row["target"] == "sm_90"
    )  # fmt: skip
    assert row["instructions"] <= 60, label(row)
    assert row["registers"] <= 64, label(row)
    assert row["programs"] >= 4, label(row)


def test_symmetric_products_use_tma_and_the_widest_wgmma(tmp_path: Path) -> None:
    code = """
import triton
from dev import aot
cases = [case for case in aot.CASES if "symmetric" in case.name]
for launch in aot.capture(aot.TARGETS["sm_90"], cases):
    source = triton.compiler.ASTSource(*launch[2:6])
    print(triton.compile(source, target=aot.TARGETS["sm_90"], options=launch.options).asm["ptx"])
"""
    ptx = run_aot("-c", code, folder=tmp_path)
    assert len(set(re.findall(r"wgmma\.mma_async\.\S+\.m64n256k16\S+", ptx))) == 2  # bf16, fp16
    assert not re.search(r"\bld\.global|mma\.sync|cp\.async\.c[ag]", ptx)
    assert re.search(r"cp\.async\.bulk\.tensor\.3d\.shared\S+\.global", ptx)
    assert re.search(r"cp\.async\.bulk\.tensor\.3d\.global\.shared", ptx)


def test_no_arithmetic_is_in_fp64(rows: list[Row]) -> None:
    """Python floats are fp32 in the kernels, also where a caller's compiler passes doubles."""
    assert not [label(row) for row in rows if row["doubles"]]


def test_shared_memory_fits(rows: list[Row]) -> None:
    assert max(row["shared"] for row in rows) > 16384, "the matrix products use shared memory"
    for row in rows:
        assert row["shared"] <= aot.SHARED_LIMITS[row["target"]], label(row)


def test_a_program_fits_the_registers_of_a_multiprocessor(rows: list[Row]) -> None:
    for row in rows:
        if row["target"].startswith("sm"):
            warps = int(re.match(r"warps=(\d+)", row["configuration"])[1])
            assert row["registers"] * 32 * warps <= 65536, label(row)


def test_offsets_into_tensors_are_64_bits_wide(rows: list[Row]) -> None:
    for row in rows:
        assert set(row["narrow"]) <= SMALL_OPERANDS.get(row["kernel"], set()), label(row)


def test_counted_bytes_are_joined_to_the_launches(tmp_path: Path) -> None:
    """One case, with its three launches; test_bytes counts all of them."""
    code = (
        "from dev import aot; import json\n"
        "cases = [c for c in aot.CASES if c.name == 'rms_norm bf16 D=64']\n"
        "rows = aot.reports(['sm_90'], 1, cases)\n"
        "print(json.dumps([(r.kernel, r.bytes, r.distinct, r.floor) for r in rows]))\n"
        "print(aot.table(rows, markdown=True))"
    )
    counts, *lines = run_aot("-c", code, folder=tmp_path).splitlines()
    assert json.loads(counts) == [
        ["_rms_norm_fwd_kernel", 4.0, 4.0, 4],
        ["_rms_norm_bwd_kernel", 6.0, 6.0, 6],
        ["_sum_partials_kernel", None, None, None],
    ]
    assert len(lines) == 2 + 3
    assert all(line.count(" | ") == 11 for line in lines)


def test_offsets_are_told_apart() -> None:
    """The reader of TTIR finds a pointer that no 64-bit offset leads to."""
    ttir = """
    %a = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#l)
    %b = tt.addptr %a, %cols : tensor<64x!tt.ptr<f32>>, tensor<64xi32> loc(#l)
    %c = tt.load %b, %mask, %cst : tensor<64x!tt.ptr<f32>> loc(#l)
    %d = tt.addptr %y_ptr, %row : !tt.ptr<f32>, i64 loc(#l)
    %e = tt.splat %d : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#l)
    %f = tt.addptr %e, %cols : tensor<64x!tt.ptr<f32>>, tensor<64xi32> loc(#l)
    tt.store %f, %c, %mask : tensor<64x!tt.ptr<f32>> loc(#l)
    """
    assert aot.narrow_offsets(ttir) == ("x_ptr",)


def test_widths_are_read_from_ptx() -> None:
    ptx = """
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    @%p2 st.global.v2.b32 [ %rd3 + 0 ], { %r1, %r2 };
    """
    assert (aot._ptx_width(ptx, "ld"), aot._ptx_width(ptx, "st")) == (16, 8)
    copies = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"
    assert aot._ptx_width(copies, "ld") == 16


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        aot.capture(aot.TARGETS["sm_90"])


def test_the_page_lists_what_is_compiled(rows: list[Row]) -> None:
    page = (ROOT / "docs/kernels-compiled.md").read_text("utf-8")
    assert page.count(aot.BEGIN) == page.count(aot.END) == 1
    lines = page.split(aot.BEGIN)[1].split(aot.END)[0].strip().splitlines()[2:]
    listed = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines}
    expected = {
        (row["kernel"], row["case"], row["configuration"])
        for row in rows
        if row["target"] == "sm_90"
    }
    assert listed == expected, (
        "cd kernels && python -m dev.aot --target sm_90 --write ../docs/kernels-compiled.md"
    )
