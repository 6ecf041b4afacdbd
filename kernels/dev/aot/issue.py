"""How fast a compiled kernel could be if instructions alone bound it, from its machine code.

A multiprocessor issues four instructions of 32 threads a clock. So a kernel that moves b bytes an
element with i instructions an element cannot move more than b / i · 128 bytes a clock and
multiprocessor, however fast memory is. Instructions are those of the loops that load the op's
tensors, or of the whole program where there are none; what runs once a row is not counted in loops.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Device(NamedTuple):
    """A GPU of a compute capability: data sheet and CUDA C Programming Guide."""

    name: str
    multiprocessors: int
    ghz: float  # boost
    memory: float  # TB/s
    threads: int  # resident on a multiprocessor, at most; programs; bytes of shared memory
    programs: int
    shared: int


DEVICES = {
    "sm_75": Device("T4", 40, 1.59, 0.32, 1024, 16, 64 << 10),
    "sm_80": Device("A100", 108, 1.41, 2.04, 2048, 32, 164 << 10),
    "sm_86": Device("RTX 3090", 82, 1.70, 0.94, 1536, 16, 100 << 10),
    "sm_89": Device("RTX 4090", 128, 2.52, 1.01, 1536, 24, 100 << 10),
    "sm_90": Device("H100", 132, 1.755, 3.35, 2048, 32, 228 << 10),
    "sm_100": Device("B200", 148, 1.965, 8.0, 2048, 32, 228 << 10),
    "sm_120": Device("RTX 5090", 170, 2.41, 1.79, 1536, 24, 100 << 10),
}


class Issue(NamedTuple):
    """What bounds a kernel, apart from memory."""

    instructions: float  # of a thread, for an element of the op's tensor
    programs: int  # that a multiprocessor holds
    in_flight: int  # bytes that these have requested from memory at a time, at most

    def ceiling(self, floor: int, device: Device) -> float:
        """Return the TB/s at ``floor`` bytes an element that issuing instructions allows."""
        lanes = 128 * device.multiprocessors * device.ghz * 1e9
        return floor / self.instructions * lanes / 1e12


def _regions(sass: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the instructions of each loop without those of loops in it, and those outside."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1])
    loops = set()
    for end, text in enumerate(code):
        target = re.search(r"\bBRA\b.*?(\.L_\w+)", text)
        if target is not None and labels[target[1]] < end:  # not the idle loop after the end
            loops.add((labels[target[1]], end))
    owner: dict[int, tuple[int, int]] = {}
    for loop in sorted(loops, key=lambda loop: loop[0] - loop[1]):  # inner ones come last
        owner.update(dict.fromkeys(range(loop[0], loop[1] + 1), loop))
    inside = [[code[i] for i in sorted(owner) if owner[i] == loop] for loop in sorted(loops)]
    return inside, [[text for i, text in enumerate(code) if i not in owner and text != "NOP"]]


def _loaded(code: list[str], no_addresses: bool) -> list[int]:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    names = (re.search(r"\bLDG(\S*)", text) for text in code)
    widths = [
        next((sizes[part] for part in name[1].split(".") if part in sizes), 4)
        for name in names
        if name
    ]
    return [width for width in widths if not (no_addresses and width == 8)]


def issue_of(
    sass: str,
    flags: Mapping[str, Any],
    warps: int,
    registers: int,
    shared: int,
    columns: int,
    device: Device,
    floor: int = 0,
) -> Issue:
    """Read machine code as nvdisasm prints it, of a kernel that moves ``floor`` bytes an element.

    ``flags`` are the compile-time arguments: a program processes BLOCK_* elements at once.
    ``columns`` are those of a row that is read in blocks of BLOCK_N; 0: no block is partly empty.
    """
    threads = 32 * warps
    tile = 2 if "HALF" in flags else 1  # RoPE turns both halves of a row
    for name, value in flags.items():
        tile *= value if name.startswith("BLOCK") else 1
    # Multi-tensor kernels load addresses, of 8 bytes, from their tables.
    chunk = flags.get("CHUNK", 0)
    loops, outside = ([(part, _loaded(part, chunk > 0)) for part in p] for p in _regions(sass))
    widest = max((size for _, loaded in [*loops, *outside] for size in loaded), default=0)
    bulk = [(part, loaded.count(widest)) for part, loaded in loops if widest in loaded]
    if not bulk:
        bulk = [(part, loaded.count(widest)) for part, loaded in outside]
    if chunk:  # of the loops over whole blocks and over the last one, the former
        bulk = [min(bulk, key=lambda found: len(found[0]) / found[1])]
        # The four blocks of a chunk may be unrolled.
        wide = sum(bool(re.search(r"\b(?:LDG|STG)\S*\.128", text)) for text in bulk[0][0])
        tile = max(tile, wide * 16 * threads // floor)
    block = flags.get("BLOCK_N", 1)
    rest = flags.get("REST", block)  # how much of a row its last block covers
    used = columns / ((columns - 1) // block * block + rest) if columns else 1.0
    of_registers = 65536 // (-(-registers // 8) * 8 * threads)
    of_shared = device.shared // (shared + 1024)
    programs = min(of_registers, of_shared, device.threads // threads, device.programs)
    lengths = [len(part) for part, _ in bulk]
    if "REST" in flags and not flags.get("SINGLE_PASS"):
        # A pass over the row is a loop, or two where it is unrolled. Class weights are fp32, and
        # as wide as the logits where the row begins as they do.
        tile, weights = threads * flags["ALIGN"], flags["ALIGN"] // 4
        loads = 1 + weights * (flags.get("HAS_CLASS_WEIGHT", 0) > flags.get("HAS_EDGES", 0))
        rates = ((len(part) / n * loads, "STG" in " ".join(part)) for part, n in bulk)
        lengths = list({stores: rate for rate, stores in sorted(rates, reverse=True)}.values())
    instructions = sum(lengths) / (tile / threads * used)
    in_flight = max(count for _, count in bulk) * widest * threads * programs
    return Issue(instructions, programs, in_flight)
