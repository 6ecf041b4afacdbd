"""Compile every kernel ahead of time, without a GPU, and report what it costs.

    python -m dev.aot [--target sm_90 ...] [--no-bytes]
                                     [--markdown | --json | --write README.md]

The public functions are called on CPU tensors, with a driver in Triton's place that names a GPU
and a hook that takes each launch's specialisation away instead of launching it: what is compiled
is exactly what the launch would compile, alignment of the arguments included. Registers, stack and
local memory are those of the finished binary; access widths are read from PTX (NVIDIA) or from the
assembly (AMD); bytes an element are counted by `traffic` in a process of its own, instructions
an element by `issue` in the machine code.

This must run in a process without ``TRITON_INTERPRET``.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from fasttrain_kernels._dispatch import triton_on_cpu
from fasttrain_kernels.catalogue import CASES, Case, floor_bytes
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .issue import DEVICES, issue_of

TARGETS = {
    **{name: GPUTarget("cuda", int(name[3:]), 32) for name in DEVICES},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# What a program may use, in bytes: CUDA C Programming Guide, technical specifications by compute
# capability; CDNA3 ISA guide (LDS).
SHARED_LIMITS = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}


# Between these lines of a Markdown file ``--write`` puts the table.
BEGIN, END = "<!-- aot: begin -->", "<!-- aot: end -->"


class Launch(NamedTuple):
    """One distinct specialisation of a kernel, as a launch asked for it."""

    kernel: str
    case: Case
    function: Any  # the JITFunction
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, int]
    position: int  # of the launch in its case

    @property
    def flags(self) -> dict[str, Any]:
        """The compile-time arguments by name."""
        names = self.function.arg_names
        return {names[path[0]]: value for path, value in self.constants.items()}

    @property
    def configuration(self) -> str:
        """Warps, sizes and the options that are on, in few words."""
        parts = [f"warps={self.options['num_warps']}"]
        for name, value in self.flags.items():
            if name.isupper() and isinstance(value, bool):
                parts += [name] if value else []
            elif name.isupper():
                parts.append(f"{name}={value}")
        return " ".join(parts)


@dataclass(frozen=True)
class Report:
    """What one specialisation costs on one target; sizes in bytes, 0 where there are none."""

    kernel: str
    case: str
    configuration: str
    target: str
    registers: int
    shared: int
    spills: int  # instructions that access local memory, or spilled vector registers (AMD)
    local: int  # stack and local memory of a thread
    load: int  # widest global access of a thread
    store: int
    bytes: float | None  # an element, counted; every access
    distinct: float | None  # an element, counted; each address once
    floor: int | None
    aligned: bool
    narrow: tuple[str, ...]  # operands without a 64-bit offset
    doubles: bool  # whether any value is fp64
    instructions: float | None = None  # of a thread, for an element; None where bytes do not bound
    programs: int | None = None  # that a multiprocessor holds
    in_flight: int | None = None  # that they have requested at a time
    ceiling: float | None = None  # TB/s that issuing instructions allows; see `issue`


def stub_driver(target: GPUTarget, **more: Any) -> Any:
    """Return what stands in for Triton's driver: it names a target, and has no device."""
    answers = {"get_current_target": target, "get_current_device": 0, "get_current_stream": 0}
    return SimpleNamespace(**{k: lambda *_, v=v, **__: v for k, v in (answers | more).items()})


@contextmanager
def _captured(target: GPUTarget) -> Iterator[list[dict[str, Any]]]:
    """Collect what launches in the block would compile for ``target``, and launch nothing."""
    taken: list[dict[str, Any]] = []

    def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        taken.append({"function": fn.jit_function, **compile})
        return True  # Triton then neither compiles nor launches

    driver, before = triton.runtime.driver, triton.runtime.driver._active
    driver.set_active(stub_driver(target))
    hook, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, take
    try:
        yield taken
    finally:
        knobs.runtime.jit_cache_hook = hook
        driver.set_active(before)


def capture(target: GPUTarget, cases: Sequence[Case] = CASES) -> list[Launch]:
    """Return the distinct specialisations that the cases launch on a target."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("aot: kernels are decorated for the interpreter; unset TRITON_INTERPRET")
    launches: dict[str, Launch] = {}
    for case in cases:
        with _captured(target) as taken, triton_on_cpu():
            case.run()
        for index, entry in enumerate(taken):
            options = {name: entry[name] for name in ("num_warps", "num_stages", "num_ctas")}
            function = entry["function"]
            launch = Launch(
                function.__name__,
                case,
                function,
                entry["signature"],
                entry["constants"],
                entry["configs"][0],
                options,
                index,
            )
            key = (launch.kernel, *map(str, launch[3:7]))
            launches.setdefault(str(key), launch)
    return list(launches.values())


def _tool(name: str, *arguments: str) -> str:
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    result = subprocess.run([folder / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout


def _cuda_resources(cubin: bytes) -> tuple[int, int, int, str]:
    """Return registers, instructions on local memory, bytes of stack and local memory, and SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, stack, local = map(int, found.groups())
        sass = _tool("nvdisasm", "-c", "-ndf", file.name)  # whose data flow nobody needs
        spills = len(re.findall(r"\b(?:LDL|STL)\b", sass)) if stack + local else 0
    return registers, spills, stack + local, sass


def _ptx_width(ptx: str, access: str) -> int:
    """Return the widest ``ld`` or ``st`` of global memory in bytes."""
    pattern = rf"\b{access}\.global(?:\.[A-Za-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)\b"
    widths = [int(n or 1) * int(bits) // 8 for n, bits in re.findall(pattern, ptx)]
    tma = {"ld": r"shared::\w+\.global", "st": r"global\.shared"}[access]
    if re.search(rf"cp\.async\.bulk\.tensor\.\dd\.{tma}", ptx):
        widths.append(16)
    if access == "ld":
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x\w+|\d+)\b", ptx)
        widths += [int(size, 0) for size in copies]
    return max(widths, default=0)


_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def _amd_width(assembly: str, access: str) -> int:
    kinds = re.findall(rf"\b(?:global|buffer|flat)_{access}_([a-z]\w*)", assembly)
    return max(
        (_AMD_WIDTHS.get(k, 2 if "short" in k or "16" in k else 1) for k in kinds), default=0
    )


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Compile one specialisation; return the measured fields of its `Report`."""
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options)
    ttir = compiled.asm["ttir"]
    report: dict[str, Any] = {
        "shared": compiled.metadata.shared,
        "narrow": narrow_offsets(ttir),
        "doubles": re.search(r"\bf64\b|xf64\b", ttir) is not None,
        "floor": floor_bytes(launch.kernel, launch.signature, launch.flags),
    }
    if target.startswith("sm"):
        registers, spills, local, sass = _cuda_resources(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        load, store = _ptx_width(ptx, "ld"), _ptx_width(ptx, "st")
        if report["floor"]:
            columns = launch.flags.get("N_COLS") or launch.case.columns
            issue = issue_of(
                sass,
                launch.flags,
                launch.options["num_warps"],
                registers,
                report["shared"],
                columns,
                DEVICES[target],
                report["floor"],
            )
            report |= {
                **issue._asdict(),
                "ceiling": issue.ceiling(report["floor"], DEVICES[target]),
            }
    else:
        text = compiled.asm["amdgcn"]

        def entry(name: str) -> int:
            return sum(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)))

        registers = entry("vgpr_count")
        spills = entry("vgpr_spill_count")  # scalar registers spill to vector ones, not to memory
        local = entry("private_segment_fixed_size")
        load, store = _amd_width(text, "load"), _amd_width(text, "store")
    return {
        **report,
        "registers": registers,
        "spills": spills,
        "local": local,
        "load": load,
        "store": store,
    }


def narrow_offsets(ttir: str) -> tuple[str, ...]:
    """Return the pointer arguments that a load or store reaches by 32-bit offsets alone."""
    parent: dict[str, str] = {}
    wide: set[str] = set()
    narrow: set[str] = set()
    for line in ttir.splitlines():
        code = line.split(" loc(")[0]
        if found := re.search(r"(%\w+) = tt\.addptr (%\w+), %\w+ : (.*)", code):
            parent[found[1]] = found[2]
            if found[3].rstrip(">").endswith("i64"):
                wide.add(found[1])
        elif found := re.search(r"(%\w+) = tt\.(?:splat|broadcast|expand_dims) (%\w+)", code):
            parent[found[1]] = found[2]
        elif found := re.search(r"tt\.(?:load|store) (%\w+)", code):
            name, is_wide = found[1], False
            while name in parent:
                is_wide |= name in wide
                name = parent[name]
            if not is_wide:
                narrow.add(re.sub(r"_\d+$", "", name[1:]))
    return tuple(sorted(narrow))


_work: list[tuple[Launch, str]] = []  # inherited by the workers: a JITFunction cannot be pickled


def _compile_item(item: int) -> dict[str, Any]:
    return compile_launch(*_work[item])


def reports(
    targets: Sequence[str] = tuple(TARGETS),
    jobs: int = 2,
    cases: Sequence[Case] = CASES,
    *,
    count: bool = True,
) -> list[Report]:
    """Compile all launches of the cases for the targets, in ``jobs`` processes.

    Another process counts their bytes. There is a `Report` for each distinct specialisation and
    target.
    """
    torch.set_num_threads(1)  # the workers are forked, which threads would not survive
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", f"{__package__}.traffic", *(case.name for case in cases)]
    counting = None
    if count:
        counting = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    _work[:] = [(launch, name) for name in targets for launch in capture(TARGETS[name], cases)]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        measured = pool.map(_compile_item, range(len(_work)), chunksize=1)
    counts: dict[str, Any] = {}
    if counting is not None:
        output, _ = counting.communicate()
        if counting.returncode:
            raise RuntimeError("aot: counting bytes in the interpreter failed; see its error above")
        counts = json.loads(output)
    rows = []
    for (launch, target), found in zip(_work, measured, strict=True):
        every = distinct = None
        case = launch.case
        if case.name in counts:
            kernel, bulk, once, _ = counts[case.name][launch.position]
            assert kernel == launch.kernel, f"{case.name}: {kernel} is not {launch.kernel}"
            if found["floor"] is not None:
                every, distinct = bulk / case.elements, once / case.elements
        fields = {"bytes": every, "distinct": distinct, "aligned": case.aligned, **found}
        rows.append(Report(launch.kernel, case.name, launch.configuration, target, **fields))
    return rows


def _counted(row: Report) -> str:
    if row.bytes is None or row.distinct is None:
        return ""
    if row.bytes - row.distinct > 0.01:
        return f"{row.distinct:.4g} + {row.bytes - row.distinct:.4g} from L2"
    return f"{row.bytes:.4g}"


Columns = Mapping[str, Callable[[Report], object]]
_FIELDS = ("configuration", "target", "registers", "shared", "spills", "local", "load", "store")
COSTS: Columns = {
    "kernel": attrgetter("kernel"),
    "first seen in": attrgetter("case"),
    **{name: attrgetter(name) for name in _FIELDS},
    "bytes per element": _counted,
    "floor": lambda row: "" if row.floor is None else row.floor,
}
ISSUE: Columns = {name: COSTS[name] for name in ("kernel", "first seen in", "target")} | {
    "device": lambda row: DEVICES[row.target].name,
    "registers": lambda row: row.registers,
    "instructions per element": lambda row: f"{row.instructions:.1f}",
    "programs per SM": lambda row: row.programs,
    "KiB in flight per SM": lambda row: f"{(row.in_flight or 0) / 1024:.0f}",
    "ceiling TB/s": lambda row: f"{row.ceiling:.2f}",
    "memory TB/s": lambda row: DEVICES[row.target].memory,
}


def table(rows: Iterable[Report], columns: Columns = COSTS, *, markdown: bool = False) -> str:
    """Lay the reports out in columns, or as a Markdown table."""
    cells = [list(columns), *([str(text(row)) for text in columns.values()] for row in rows)]
    if markdown:
        cells.insert(1, ["---"] * len(columns))
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def issue_table(rows: Iterable[Report], *, markdown: bool = False) -> str:
    """Lay out how fast the kernels that memory should bound could issue their instructions."""
    bound = [row for row in rows if row.ceiling is not None]
    return table(bound, ISSUE, markdown=markdown)
