"""Run compiled PTX without a GPU: numpy, all threads of a launch in lock step, races reported.

Inside `emulated`, launches on CPU tensors are compiled as for a GPU and their PTX is run here, on
the tensors' own memory. A launch raises `Fault` where it touches bytes that belong to none of its
tensors, is misaligned, reads shared memory that nobody wrote, or where two warps that no barrier
separates, or two blocks, touch the same bytes, one of them storing. Registers that were not written
hold NaN; what ``cp.async`` and TMA copy arrives, and what ``wgmma`` multiplies is read, as late as
it may.

Legend: n threads of the blocks that run side by side, 32 of them a warp; m of them that are active.
"""

import ctypes
import gc
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from dev import aot
from fasttrain_kernels import symmetric, triton_on_cpu
from torch import Tensor
from torch.nn import Parameter
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.support import kernel_ops
from tests.support.ptx_values import (
    FUNCTIONS,
    REDUCTIONS,
    ROUNDINGS,
    Array,
    compare,
    decode,
    dtype_of,
    encode,
    flushed,
)

Mask = Array | None  # of threads, None: all
MOST_THREADS = 8192  # that run side by side
UNIT = 2  # bytes, the least that a kernel accesses: who touched what is noted for so many
NOBODY, MANY_BLOCKS = -1, -2
PER_BLOCK, MANY_WARPS = 64, 63  # a warp is known as block * 64 + warp, several of a block as 63


class Fault(Exception):
    """Compiled code does what no GPU program may do."""


# Memory: the tensors of a launch and the shared memory of its blocks, in one array.


class Memory:
    """Bytes that a launch may touch, and who touched each of them last."""

    def __init__(self, tensors: Sequence[Tensor], shared: int, n_blocks: int) -> None:
        spans: list[list[int]] = []
        for tensor in sorted(tensors, key=Tensor.data_ptr):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((n - 1) * step for n, step in steps) if tensor.numel() else 0
            start = tensor.data_ptr()
            end = start + extent * tensor.element_size()
            if spans and start < spans[-1][1]:
                spans[-1][1] = max(end, spans[-1][1])
            elif start < end:
                spans.append([start, end])
        self.starts, self.ends = np.array(spans, np.int64).reshape(-1, 2).T
        # Each begins on a page of its own, so that addresses keep their alignment.
        pages = -(-(self.ends - self.starts // 256 * 256) // 256)
        self.shared_base = int(pages.sum()) * 256
        self.bases = (np.cumsum(pages) - pages) * 256 + self.starts % 256
        self.shared = -(-shared // 256) * 256
        self.bytes = np.zeros(self.shared_base + n_blocks * self.shared, np.uint8)
        for real, ours in self._pairs():
            ours[:] = real
        units = self.bytes.size // UNIT
        self.writer, self.reader = np.full(units, NOBODY), np.full(units, NOBODY)
        self.written, self.read = np.zeros(units, np.int64), np.zeros(units, np.int64)

    def _pairs(self) -> Iterator[tuple[Array, Array]]:
        for base, start, end in zip(self.bases, self.starts, self.ends, strict=True):
            real = (ctypes.c_uint8 * int(end - start)).from_address(int(start))
            yield np.frombuffer(real, np.uint8), self.bytes[base : base + end - start]

    def write_back(self) -> None:
        """Give the tensors what was stored."""
        for real, ours in self._pairs():
            real[:] = ours

    def find(self, addresses: Array, size: int) -> Array:
        """Return the positions of global addresses in `bytes`."""
        span = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (span < 0) | (addresses + size > self.ends[span])
        if outside.any():
            raise Fault(f"{outside.sum()} threads touch what belongs to no tensor")
        return addresses - self.starts[span] + self.bases[span]

    def access(
        self, at: Array, size: int, warp: Array, epoch: Array, stored: Array | None = None
    ) -> Array:
        """Load or store, and compare with who touched the same bytes before.

        Warps that give the same bytes of shared memory the same value do not race.

        Args:
            at: (m,) positions in `bytes`.
            size: bytes of each, at least two.
            warp: (m,) who, as block * 64 + warp.
            epoch: (m,) barriers that its block has passed.
            stored: (m, size / 2) what it stores, two bytes a number; None for a load.

        Returns:
            (m, size / 2) what is there now.
        """
        if (at % size).any():
            raise Fault(f"misaligned: an address is not a multiple of {size}")
        n_units = size // UNIT
        unit = (at[:, None] // UNIT + np.arange(n_units)).ravel()
        who, when = np.repeat(warp, n_units), np.repeat(epoch, n_units)
        block, in_shared = who // PER_BLOCK, unit >= self.shared_base // UNIT

        def is_shared_with(by: Array, then: Array) -> Array:
            other = (by // PER_BLOCK != block) | ((by != who) & (then == when))
            return (by != NOBODY) & other

        writer, reader = self.writer[unit], self.reader[unit]
        held = self.bytes.view(np.uint16)
        raced = is_shared_with(writer, self.written[unit])
        together = is_shared_with(reader, self.read[unit])
        if stored is not None:
            new = stored.ravel()
            raced &= ~in_shared | (held[unit] != new)
            held[unit] = new
            self.writer[unit], self.written[unit] = who, when
            # Two warps with this one instruction.
            raced |= together | ((self.writer[unit] != who) & (~in_shared | (held[unit] != new)))
        else:
            if ((writer == NOBODY) & in_shared).any():
                raise Fault("reads shared memory that nobody wrote")
            several = block * PER_BLOCK + MANY_WARPS
            merged = np.where(reader // PER_BLOCK == block, several, MANY_BLOCKS)
            last = np.where(together, merged, who)
            self.reader[unit], self.read[unit] = last, when
            now = self.reader[unit]  # where several read a unit with this one instruction
            merged = np.where(now // PER_BLOCK == block, several, MANY_BLOCKS)
            self.reader[unit[now != last]] = merged[now != last]
        if raced.any():
            raise Fault(f"race on {raced.sum() * UNIT} bytes")
        return held[unit].reshape(at.size, n_units)


# A tensor as TMA knows it, and what Triton has it do: which box is moved, how that is swizzled.
Described = tuple[TensorDescriptor, dict[str, Any]]


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived, and the bytes that they have announced."""

    count: int  # that arrive in a phase
    arrived: int = 0
    announced: int = 0
    phase: int = 0
    copies: list[tuple[Array, Array]] = field(default_factory=list)  # positions, what arrives there


def swizzled(address: Array, bits: int) -> Array:
    """Permute 16-byte pieces of 16 << ``bits`` as TMA and wgmma do, by the number of their line."""
    return address ^ (address >> 7 & (1 << bits) - 1) << 4


# Programs.


class Instruction(NamedTuple):
    """One statement: ``@!%p1 add.s32 %r1, %r2, 3`` is guarded by %p1, negated."""

    guard: str
    negated: bool
    opcode: list[str]
    operands: list[str]
    text: str


class Program:
    """The entry of a PTX module, taken apart."""

    def __init__(self, ptx: str) -> None:
        ptx = re.sub(r"//[^\n]*", "", ptx)
        head, body = ptx[ptx.index(".visible .entry") :].split("\n{", 1)
        body = body.rsplit("\n}", 1)[0]
        self.name = re.findall(r"\.entry (\w+)", head)[0]
        self.parameters = re.findall(r"\.param \.(\w+)[^\n]*?(\w+_param_\d+)", head)
        self.threads = int(re.findall(r"\.reqntid (\d+)", head)[0])
        self.widths = {name: kind for kind, name in re.findall(r"\.reg \.(\w+)\s+(%\w+)<", body)}
        for kind, name in {*re.findall(r"\.reg \.(\w+) (\w+);", body)}:  # of blocks in braces
            body = re.sub(rf"\b{name}\b", f"%{name}", body)
            self.widths[f"%{name}"] = kind
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}  # of those in braces the last; none is jumped to here
        lines = (line for line in body.splitlines() if not line.lstrip().startswith("."))
        for statement in re.sub(r"(?m)^\s*([$\w]+):", r"\1:;", "\n".join(lines)).split(";"):
            text = " ".join(statement.split()).lstrip("{} ")
            if text.endswith(":"):
                self.labels[text[:-1]] = len(self.instructions)
            elif text:
                found = re.fullmatch(r"(?:@(!?)(%\w+) )?(\S+) ?(.*)", text)
                assert found is not None, text
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[4])
                self.instructions.append(
                    Instruction(found[2], found[1] == "!", found[3].split("."), operands, text)
                )


def _names(vector: str) -> list[str]:
    return re.findall(r"[%\w]+", vector)


class Machine:
    """Blocks of a program that run side by side."""

    def __init__(
        self, program: Program, memory: Memory, values: Sequence[int], blocks: Array, grid: int,
        descriptors: Sequence[Described],
    ) -> None:  # fmt: skip
        self.program, self.memory, self.descriptors = program, memory, descriptors
        self.blocks, self.threads = blocks, program.threads
        thread, block = np.tile(np.arange(self.threads), len(blocks)), blocks.repeat(self.threads)
        self.n = thread.size
        self.lane = thread % 32
        self.special = {
            "%tid.x": thread, "%ctaid.x": block, "%nctaid.x": np.array([grid]),
            "global_smem": np.zeros(1, np.int64),
        }  # fmt: skip
        names = [name for _, name in program.parameters]
        self.values = dict(itertools.zip_longest(names, values, fillvalue=0))
        self.special |= {  # the address of a descriptor is its number
            name: np.array([self.values[name]]) for kind, name in program.parameters
            if kind == "align"
        }  # fmt: skip
        self.registers: dict[str, Array] = {}
        self.who = block * PER_BLOCK + thread // 32
        self.epoch = np.zeros(self.n, np.int64)
        self.shared_at = memory.shared_base + block * memory.shared
        self.on = np.ones(self.n, bool)  # threads of the blocks that are at this instruction
        self.merges = False  # whether blocks that are elsewhere must keep their registers
        self.copying: list[tuple[Array, Array, Array]] = []  # positions, threads, what is copied
        self.groups: list[list[tuple[Array, Array, Array]]] = []
        self.barriers: dict[int, Barrier] = {}  # by position
        self.storing: list[tuple[int, Array, Array, Array]] = []  # threads, boxes
        # Of wgmma, with its operands; blocks that have some in flight are at the same instruction
        self.products: list[tuple[Instruction, Array, Array]] = []
        self.product_groups: list[list[tuple[Instruction, Array, Array]]] = []

    def run(self) -> None:
        """Run all blocks to their end."""
        end = len(self.program.instructions)
        at = np.zeros(len(self.blocks), np.int64)  # where each block is
        with np.errstate(all="ignore"):
            while (here := int(at.min())) < end:
                now = at == here
                self.on = now.repeat(self.threads)
                self.merges = bool((~now & (at < end)).any())
                stop = min(at[~now], default=end)
                while here < stop:
                    instruction = self.program.instructions[here]
                    here += 1
                    if instruction.opcode[0] in ("bra", "ret"):
                        target = self.program.labels.get((instruction.operands or [""])[-1], end)
                        at[now] = np.where(self._decide(instruction)[now], target, here)
                        break
                    try:
                        self._step(instruction)
                    except Fault as fault:
                        raise Fault(f"{self.program.name}: {fault}: {instruction.text}") from None
                else:
                    at[now] = here

    def _decide(self, instruction: Instruction) -> Array:
        """Return for each block whether it jumps, which its threads must agree on."""
        guard = self._guard(instruction)
        jumps = np.ones(self.n, bool) if guard is None else guard
        each = jumps.reshape(len(self.blocks), -1)
        if (each.any(1) != each.all(1))[self.on.reshape(each.shape)[:, 0]].any():
            raise Fault(f"{self.program.name}: threads of a block part: {instruction.text}")
        return each[:, 0]

    def _guard(self, instruction: Instruction) -> Mask:
        if not instruction.guard:
            return None
        return np.broadcast_to(self.get(instruction.guard, "pred") ^ instruction.negated, self.n)

    def get(self, name: str, kind: str) -> Array:
        """Return an operand as a PTX type: (n,), or (1,) where all threads have the same."""
        if name in self.special:
            return self.special[name].astype(dtype_of(kind))
        if name.startswith("%"):
            if name not in self.registers:  # NaN in every width, and no address
                bits = dtype_of(self._width(name))
                self.registers[name] = np.array([0x7FFF7FFF7FFF7FFF], np.uint64).astype(bits)
            return decode(self.registers[name], kind)
        is_float = name[:2] in ("0f", "0d")
        number = int(name[2:], 16) if is_float else int(name, 0)
        if kind == "pred":
            return np.array([number != 0])
        size = f"b{kind[1:].replace('f', '')}" if "x2" not in kind else "b32"
        bits = np.array([number & (1 << 64) - 1], np.uint64).astype(dtype_of(size))
        return decode(bits, kind)

    def _width(self, name: str) -> str:
        return self.program.widths[name.rstrip("0123456789")]

    def put(self, name: str, value: Array, mask: Mask) -> None:
        """Set a register where the mask is on; what is narrower is extended as its sign asks."""
        name = name.split("|")[0]
        if name == "_":
            return
        to = dtype_of(self._width(name))
        if value.dtype.kind == "i":
            value = value.astype(f"i{to.itemsize}").view(to)
        elif value.dtype.kind == "f":
            value = value.view(to)
        elif value.dtype != to:
            value = value.astype(to)
        if self.merges:
            mask = self.on if mask is None else mask & self.on
        if mask is not None:
            value = np.where(mask, value, self.get(name, self._width(name)))
        self.registers[name] = value

    def _step(self, instruction: Instruction) -> None:
        root = instruction.opcode[0]
        mask = self._guard(instruction)
        special = getattr(self, f"_{root}", None)
        if special is not None:
            special(instruction, mask)
        elif root in FUNCTIONS:
            self._compute(instruction, mask)
        elif root not in ("createpolicy", "fence"):
            raise NotImplementedError(f"PTX: {instruction.text}")

    def _compute(self, instruction: Instruction, mask: Mask) -> None:
        opcode, (to, *operands) = instruction.opcode, instruction.operands
        root, kind = opcode[0], opcode[-1]
        function, out = FUNCTIONS[root], kind
        kinds = [kind] * len(operands)
        if root == "cvt":
            out = opcode[-2]
            if out.endswith("x2"):  # the first operand is the upper half
                low_high = [self.get(name, kind) for name in reversed(operands)]
                self.put(to, encode(np.stack(np.broadcast_arrays(*low_high)), out), mask)
                return
            if out[0] in "su" and kind[0] == "f":
                function = next(ROUNDINGS[mode] for mode in opcode if mode in ROUNDINGS)
        elif root == "setp" and kind.endswith("x2"):  # p|q: of the lower and the upper half
            halves = compare(opcode[1], *(self.get(name, kind) for name in operands))
            for name, half in zip(to.split("|"), halves, strict=True):
                self.put(name, half, mask)
            return
        elif root == "setp":
            function, out = partial(compare, opcode[1]), "pred"
        elif root == "selp":
            kinds[2] = "pred"
        elif root in ("shl", "shr", "bfe"):
            kinds[1:] = ["u32"] * len(kinds[1:])
        elif root in ("max", "min") and "NaN" in opcode:
            function = {"max": np.maximum, "min": np.minimum}[root]
        elif "wide" in opcode or "hi" in opcode:
            out = f"{kind[0]}{2 * int(kind[1:])}"
            kinds[2:] = [out] * len(kinds[2:])
        values = [self.get(name, each) for name, each in zip(operands, kinds, strict=True)]
        if out != kind and root in ("mul", "mad"):
            values = [value.astype(dtype_of(out)) for value in values]
        elif root in ("shl", "shr"):
            values[1] = values[1].astype(values[0].dtype)
        if "ftz" in opcode:
            values = [flushed(value) for value in values]
        result = function(*values)
        if "ftz" in opcode:
            result = flushed(result)
        if "hi" in opcode:
            result, out = result >> int(kind[1:]), kind
        self.put(to, encode(result, out), mask)

    def _mov(self, instruction: Instruction, mask: Mask) -> None:
        to, source = instruction.operands
        bits = 0 if instruction.opcode[-1] == "pred" else int(instruction.opcode[-1][1:])
        if to.startswith("{"):
            names = _names(to)
            part, whole = bits // len(names), self.get(source, f"u{bits}")
            for i, name in enumerate(names):
                self.put(name, (whole >> part * i).astype(f"u{part // 8}"), mask)
        elif source.startswith("{"):
            names = _names(source)
            part = bits // len(names)
            parts = [self.get(name, f"u{part}").astype(f"u{bits // 8}") for name in names]
            self.put(to, sum(p << (part * i) for i, p in enumerate(parts)), mask)  # type: ignore[arg-type]
        else:
            self._compute(instruction, mask)

    # What the 32 threads of a warp do together.

    def _elect(self, instruction: Instruction, mask: Mask) -> None:
        leader, elected = instruction.operands[0].split("|")
        self.put(leader, np.zeros(1, np.uint32), mask)
        self.put(elected, self.lane == 0, mask)

    def _shfl(self, instruction: Instruction, mask: Mask) -> None:
        to, source, by, *_ = instruction.operands
        value = np.broadcast_to(self.get(source, "u32"), self.n).reshape(-1, 32)
        lane, how = np.arange(32), instruction.opcode[2]
        offset = int(by, 0) if by[0] != "%" else self.get(by, "s32").reshape(-1, 1)
        other = {"bfly": lane ^ offset, "idx": lane * 0 + offset, "down": lane + offset,
                 "up": lane - offset}[how]  # fmt: skip
        other = np.broadcast_to(np.where((other < 0) | (other > 31), lane, other), value.shape)
        self.put(to, np.take_along_axis(value, other, 1).ravel(), mask)

    def _redux(self, instruction: Instruction, mask: Mask) -> None:
        to, source, _ = instruction.operands
        value = np.broadcast_to(self.get(source, instruction.opcode[-1]), self.n).reshape(-1, 32)
        self.put(to, REDUCTIONS[instruction.opcode[2]](value, 1).repeat(32), mask)

    def _fragments(self, names: str, kind: str) -> Array:
        """Return registers of two 16-bit floats as (warps, registers, 8, 4, 2) fp32."""
        bits = [np.broadcast_to(self.get(name, "b32"), self.n) for name in _names(names)]
        pairs = decode(np.stack(bits, 1), f"{kind}x2")  # (2, n, registers)
        return pairs.reshape(2, -1, 8, 4, len(bits)).transpose(1, 4, 2, 3, 0)

    def _mma(self, instruction: Instruction, mask: Mask) -> None:
        shape, kind = instruction.opcode[3], instruction.opcode[-2]
        if shape != "m16n8k16" or instruction.opcode[-1] != "f32":
            raise NotImplementedError(f"PTX: {instruction.text}")
        to, a, b, c = instruction.operands
        # A's four registers are quarters, those below each other first; B's and C's lie in order.
        a_parts = self._fragments(a, kind).reshape(-1, 2, 2, 8, 8)  # (warps, right, below, 8, 8)
        left = a_parts.transpose(0, 2, 3, 1, 4).reshape(-1, 16, 16)
        right = self._fragments(b, kind).reshape(-1, 2, 8, 8).transpose(0, 1, 3, 2)
        product = left @ right.reshape(-1, 16, 8)  # (warps, 16, 8)
        parts = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, self.n)
        for name, added, part in zip(_names(to), _names(c), parts, strict=True):
            self.put(name, self.get(added, "f32") + part, mask)

    def _wgmma(self, instruction: Instruction, mask: Mask) -> None:
        """Multiply tiles in shared memory, four warps together, when they are waited for."""
        how, operands = instruction.opcode[1], instruction.operands
        if how == "mma_async":
            a, b = (np.broadcast_to(self.get(name, "u64"), self.n) for name in operands[1:3])
            self.products.append((instruction, a, b))
        elif how == "commit_group":
            self.product_groups.append(self.products)
            self.products = []
        elif how == "wait_group":
            done = max(len(self.product_groups) - int(operands[0], 0), 0)
            for product in itertools.chain(*self.product_groups[:done]):
                self._multiply(*product)
            self.product_groups = self.product_groups[done:]

    def _multiply(self, instruction: Instruction, a: Array, b: Array) -> None:
        _, _, _, _, shape, out, *kinds = instruction.opcode
        names, _, _, scale, *signs = instruction.operands
        n_cols = int(re.fullmatch(r"m64n(\d+)k16", shape)[1])  # type: ignore[index]
        if out != "f32" or len({*kinds}) != 1 or signs != ["1", "1", "0", "0"]:
            raise NotImplementedError(f"PTX: {instruction.text}")
        left, right = (self._tile(x, n, kinds[0]) for x, n in ((a, 64), (b, n_cols)))
        product = left @ right.swapaxes(1, 2)
        # A warp has 16 rows, a thread two of them 8 apart, and of 8 columns two.
        parts = product.reshape(-1, 4, 2, 8, n_cols // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        whole = np.zeros((n_cols // 2, self.n), np.float32)
        whole[:, self.on] = parts.reshape(len(whole), -1)
        kept = self.get(scale, "pred")
        for name, part in zip(_names(names), whole, strict=True):
            self.put(name, np.where(kept, self.get(name, "f32"), np.float32(0)) + part, None)

    def _tile(self, descriptor: Array, n_rows: int, kind: str) -> Array:
        """Return (groups of four warps, rows, 16) fp32; rows lie in lines of 128 bytes."""
        first = np.flatnonzero(self.on)[::128]
        bits, row = descriptor[first].astype(np.int64)[:, None, None], np.arange(n_rows)[:, None]
        if (bits >> 62 & 3 != 1).any() or (bits >> 49 & 7).any():
            raise NotImplementedError("PTX: an operand of wgmma without the swizzle of 128 bytes")
        eights = (bits >> 32 & 0x3FFF) << 4  # bytes from 8 rows to the next
        at = ((bits & 0x3FFF) << 4) + row // 8 * eights + row % 8 * 128 + np.array([0, 16])
        at, each = swizzled(at, 3).reshape(len(first), -1), 2 * n_rows
        where = self._shared(at.ravel(), 16, first.repeat(each))
        who = self.who[first].repeat(each) // PER_BLOCK * PER_BLOCK + MANY_WARPS
        found = self.memory.access(where, 16, who, self.epoch[first].repeat(each))
        return decode(found, kind).reshape(-1, n_rows, 16)

    # Memory.

    def _access(
        self, operand: str, space: str, size: int, threads: Array, stored: Array | None = None
    ) -> Array:
        """Load or store at ``[register + offset]``; see `Memory.access`."""
        at = self._positions(operand, space, size, threads)
        return self.memory.access(at, size, self.who[threads], self.epoch[threads], stored)

    def _positions(self, operand: str, space: str, size: int, threads: Array) -> Array:
        base, offset = re.findall(r"\[ ?([%\w]+) ?(?:\+ ?(-?\w+) ?)?\]", operand)[0]
        address = np.broadcast_to(self.get(base, "u64"), self.n)[threads].astype(np.int64)
        address = address + int(offset or "0", 0)
        if space == "global":
            return self.memory.find(address, size)
        return self._shared(address, size, threads)

    def _shared(self, address: Array, size: int, threads: Array) -> Array:
        if ((address < 0) | (address + size > self.memory.shared)).any():
            raise Fault("an address is not in shared memory")
        return address + self.shared_at[threads]

    def _active(self, mask: Mask) -> Array:
        return np.flatnonzero(self.on if mask is None else self.on & mask)

    def _ld(self, instruction: Instruction, mask: Mask) -> None:
        opcode, (to, source, *_) = instruction.opcode, instruction.operands
        kind, names, threads = opcode[-1], _names(to), self._active(mask)
        dtype = dtype_of(f"u{kind[1:]}")
        if opcode[1] == "param":
            value = np.array([self.values[_names(source)[0]]], np.uint64)
            self.put(to, decode(value.astype(dtype), kind), mask)
            return
        found = self._access(source, opcode[1], dtype.itemsize * len(names), threads).view(dtype)
        for name, column in zip(names, found.T, strict=True):
            value = np.zeros(self.n, dtype)
            value[threads] = column
            self.put(name, decode(value, kind), mask)

    def _st(self, instruction: Instruction, mask: Mask) -> None:
        opcode, (to, source, *_) = instruction.opcode, instruction.operands
        kind, names, threads = f"u{opcode[-1][1:]}", _names(source), self._active(mask)
        dtype = dtype_of(kind)
        values = [np.broadcast_to(self.get(name, kind), self.n)[threads] for name in names]
        stored = np.stack(values, 1).view(np.uint16)
        self._access(to, opcode[1], dtype.itemsize * len(names), threads, stored)

    def _bar(self, instruction: Instruction, mask: Mask) -> None:
        if instruction.opcode[1] == "sync":  # not bar.warp: threads of a warp are in lock step
            self.epoch += self.on

    def _cp(self, instruction: Instruction, mask: Mask) -> None:
        """Copy asynchronously: NaN is there at once, and what was copied when it is waited for."""
        how, operands = instruction.opcode[2], instruction.operands
        if how == "bulk":
            self._bulk(instruction, mask)
        elif how == "commit_group":
            self.groups.append(self.copying)
            self.copying = []
        elif how == "wait_group":
            arrived = max(len(self.groups) - int(operands[0], 0), 0)
            for at, threads, found in itertools.chain(*self.groups[:arrived]):
                who, epoch = self.who[threads], self.epoch[threads]
                self.memory.access(at, UNIT * found.shape[1], who, epoch, found)
            self.groups = self.groups[arrived:]
        else:
            size, threads = int(operands[2], 0), self._active(mask)
            wanted = self.get(operands[3], "u32") if operands[3:] else np.array([size])
            reads = np.broadcast_to(wanted, self.n)[threads]
            if not np.isin(reads, (0, size)).all():
                raise NotImplementedError(f"PTX: {instruction.text}, a part of it")
            found = np.zeros((threads.size, size // UNIT), np.uint16)
            found[reads > 0] = self._access(operands[1], "global", size, threads[reads > 0])
            self._access(operands[0], "shared", size, threads, np.full_like(found, 0x7FFF))
            at = self._positions(operands[0], "shared", size, threads)
            self.copying.append((at, threads, found))

    def _bulk(self, instruction: Instruction, mask: Mask) -> None:
        """Move boxes of tensors; TMA reads shared memory, and fills it, as late as it may."""
        how, operands = instruction.opcode[3], instruction.operands
        if how == "tensor":
            for thread in self._active(mask):
                if instruction.opcode[-1] == "bulk_group":
                    self.storing.append((thread, *self._box(operands[0], operands[1], thread)))
                    continue
                shared, outside, inside = self._box(operands[1], operands[0], thread)
                found = np.zeros((shared.size, 8), np.uint16)
                found[inside] = self._moved(thread, outside)
                self._moved(thread, shared, np.full_like(found, 0x7FFF))
                at = self._positions(operands[2], "shared", 8, np.array([thread]))
                self.barriers[int(at[0])].copies.append((shared, found))
        elif how == "wait_group":
            for thread, shared, outside, inside in self.storing:
                self._moved(thread, outside, self._moved(thread, shared)[inside])
            self.storing.clear()

    def _moved(self, thread: int, at: Array, stored: Array | None = None) -> Array:
        """Load or store pieces of 16 bytes for one thread."""
        who, epoch = np.full(at.size, self.who[thread]), np.full(at.size, self.epoch[thread])
        return self.memory.access(at, 16, who, epoch, stored)

    def _box(self, box: str, to: str, thread: int) -> tuple[Array, Array, Array]:
        """Return positions of a box's pieces in shared memory and the tensor's, which may end.

        The last of the three tells which pieces are inside of the tensor; only they have a second.
        """
        names = [*_names(box), *_names(to)]
        number, *at, start = (
            int(np.broadcast_to(self.get(name, "s32"), self.n)[thread]) for name in names
        )
        tensor, how = self.descriptors[number]
        assert tensor.base.element_size() == 2
        assert all(step % 8 == 0 for step in (*tensor.shape[-1:], *tensor.strides[:-1]))
        *rest, row = how["block_size"]
        index = np.indices([*rest, row // 8]).reshape(len(rest) + 1, -1)
        index[-1] *= 8
        index += np.array(at[::-1])[:, None]
        inside = ((index >= 0) & (index < np.array(tensor.shape)[:, None])).all(0)
        offset = 2 * np.array(tensor.strides) @ index[:, inside]
        shared = swizzled(start + 16 * np.arange(inside.size), how["swizzle"])
        threads = np.full(inside.size, thread)
        outside = self.memory.find(tensor.base.data_ptr() + offset, 16)
        return self._shared(shared, 16, threads), outside, inside

    def _mbarrier(self, instruction: Instruction, mask: Mask) -> None:
        how, operands, threads = instruction.opcode[1], instruction.operands, self._active(mask)
        place = next(operand for operand in operands if operand.startswith("["))
        for at in self._positions(place, "shared", 8, threads).tolist():
            if how == "init":
                self.barriers[at] = Barrier(int(operands[1], 0))
            elif how == "inval":
                del self.barriers[at]
            elif how == "arrive":
                self.barriers[at].arrived += 1
                self.barriers[at].announced += int(operands[2], 0)
        if how == "try_wait":
            parity = np.broadcast_to(self.get(operands[2], "u32"), self.n)[threads]
            at = self._positions(place, "shared", 8, threads)
            for here, of in np.unique(np.stack([at, parity]), axis=1).T.tolist():
                self._finish_phase(self.barriers[here], of)
            self.put(operands[0], np.array([True]), mask)

    def _finish_phase(self, barrier: Barrier, parity: int) -> None:
        """Let what is under way arrive, unless the phase of this parity has ended before."""
        if barrier.phase % 2 != parity:
            return
        n_bytes = sum(found.nbytes for _, found in barrier.copies)
        if (barrier.arrived, n_bytes) != (barrier.count, barrier.announced):
            raise Fault("waits for what does not arrive")
        for at, found in barrier.copies:
            self.memory.bytes.view(np.uint16)[at[:, None] // UNIT + np.arange(8)] = found
        barrier.arrived, barrier.announced, barrier.phase = 0, 0, barrier.phase + 1
        barrier.copies.clear()

    def _rows(self, instruction: Instruction) -> Array:
        """Return the threads that address rows of the 8x8 matrices, (warps * matrices * 8,)."""
        return np.flatnonzero(self.on & (self.lane < 8 * int(instruction.opcode[4][1:])))

    def _ldmatrix(self, instruction: Instruction, mask: Mask) -> None:
        to, source = instruction.operands
        names = _names(to)
        found = self._access(source, "shared", 16, self._rows(instruction))
        matrices = found.reshape(-1, len(names), 8, 8)
        if "trans" in instruction.opcode:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # (warps, matrices, 8, 4)
        for name, value in zip(names, pairs.swapaxes(0, 1), strict=True):
            whole = np.zeros(self.n, np.uint32)
            whole[self.on] = value.ravel()
            self.put(name, whole, mask)

    def _stmatrix(self, instruction: Instruction, mask: Mask) -> None:
        to, source = instruction.operands
        values = [np.broadcast_to(self.get(n, "u32"), self.n)[self.on] for n in _names(source)]
        pairs = np.stack(values).reshape(len(values), -1, 8, 4).swapaxes(0, 1)
        matrices = np.ascontiguousarray(pairs).view(np.uint16)  # (warps, matrices, 8, 8)
        if "trans" in instruction.opcode:
            matrices = matrices.swapaxes(2, 3)
        self._access(to, "shared", 16, self._rows(instruction), matrices.reshape(-1, 8))


# Launches.


def tensors_at(addresses: Sequence[int]) -> list[Tensor]:
    """Return the tensors that a table of addresses points to; of several, the smallest."""
    wanted = set(addresses)
    found: dict[int, Tensor] = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, Parameter) and item.data_ptr() in wanted:
            known = found.setdefault(item.data_ptr(), item)
            if 0 < item.nbytes < known.nbytes:
                found[item.data_ptr()] = item
    return list(found.values())


def _bits(value: Any, kind: str) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind.startswith("fp"):
        return int(np.float32(value).view(np.uint32))
    return int(value) & (1 << 64) - 1


@contextmanager
def emulated(
    target: str = "sm_90", edit: Callable[[str], str] = lambda ptx: ptx
) -> Iterator[list[str]]:
    """Run launches on CPU tensors as compiled for ``target``.

    Args:
        target: a name of `aot.TARGETS`.
        edit: changes the PTX before it runs.

    Yields:
        The names of the kernels launched.
    """
    launched: list[str] = []
    original = JITFunction.run

    def launch(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(function, *args, grid=grid, warmup=True, **options)
        named = {**dict(zip(function.arg_names, args, strict=False)), **options}
        kinds = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
        program = Program(edit(kernel.asm["ptx"]))
        n_blocks, *others = grid
        assert set(others) <= {1}, "blocks are numbered along one axis"
        described = [x for x in map(named.get, kinds) if isinstance(x, TensorDescriptor)]
        moved = getattr(kernel.metadata, "tensordesc_meta", None) or []
        descriptors = [*zip(described, moved, strict=True)]
        tensors = [named[name] for name in kinds if isinstance(named[name], Tensor)]
        tensors += [x.base for x in described]
        tables = [named[name] for name in kinds if "pointers" in name]
        tensors += tensors_at([address for table in tables for address in table.flatten().tolist()])
        memory = Memory(tensors, kernel.metadata.shared, n_blocks)
        values, numbers = list[int](), itertools.count()
        for name, kind in kinds.items():
            if isinstance(x := named[name], TensorDescriptor):
                values += [next(numbers), *x.shape, *x.strides]
            else:
                values.append(_bits(x, kind))
        side_by_side = max(1, MOST_THREADS // program.threads)
        for first in range(0, n_blocks, side_by_side):
            blocks = np.arange(first, min(first + side_by_side, n_blocks))
            Machine(program, memory, values, blocks, n_blocks, descriptors).run()
        memory.write_back()
        launched.append(program.name)
        return kernel

    before, JITFunction.run = driver._active, launch  # type: ignore[method-assign]
    gpu = aot.TARGETS[target]  # Triton keeps kernels by device
    driver.set_active(aot.stub_driver(gpu, get_current_device=int(gpu.arch)))
    try:
        with triton_on_cpu():
            yield launched
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
        driver.set_active(before)


def run_op(name: str, kernel: str = "", pattern: str = "", to: str = "") -> list[str]:
    """Run an operation of `kernel_ops` as compiled and compare it with fp64.

    Args:
        name: of the operation.
        kernel: whose PTX is changed.
        pattern: is replaced there, wherever it is found.
        to: by this.

    Returns:
        The names of the kernels launched.
    """
    found = not kernel

    def edit(ptx: str) -> str:
        nonlocal found
        if f".entry {kernel}(" not in ptx:
            return ptx
        edited, times = re.subn(pattern, to, ptx)
        found |= times > 0
        return edited

    op = kernel_ops.op_named(name)
    any_size = patch.multiple(symmetric, _LEAST_ROWS=8, _LEAST_ELEMENTS=0)
    with any_size, emulated("sm_90", edit) as launched:
        kernel_ops.compare(name, op, kernel_ops.results(op.ours, op))
    assert found, f"{kernel}: {pattern} is not there"
    return launched
