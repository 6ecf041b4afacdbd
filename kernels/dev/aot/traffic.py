"""Bytes that each launch moves, counted in Triton's interpreter.

Every load and store is seen with its addresses and its mask. *Bulk* is what an operand as large as
the op's tensor moves (and what multi-tensor kernels reach through their tables of addresses),
*side* the rest: weights, per-row results, tables. *Distinct* counts an address once: a second pass
over a row finds it in L2, so the distinct bytes are what memory moves.

``TRITON_INTERPRET=1 python -m dev.aot.traffic [CASE ...]`` prints the counts of all
cases, or of those named, as JSON.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from fasttrain_kernels._dispatch import triton_on_cpu
from fasttrain_kernels.catalogue import CASES, Case
from torch import Tensor
from triton.runtime import interpreter


class LaunchTraffic:
    """The traffic of one launch.

    In ``bulk`` every access counts; in ``distinct`` an address counts once for loads and once for
    stores, and what the launch itself wrote and reads back is in the cache and does not count.
    ``side`` has the bytes of each operand that is smaller than the op's tensor.
    """

    def __init__(self, kernel: str, arguments: dict[str, Any], elements: int) -> None:
        self.kernel, self.arguments = kernel, arguments
        self.bulk = self.distinct = 0
        self.side: dict[str, int] = {}
        self._small: list[tuple[int, int, str]] = []
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.numel() < elements:
                start = value.data_ptr()
                spans = zip(value.shape, value.stride(), strict=True)
                extent = 1 + sum((n - 1) * stride for n, stride in spans)
                self._small.append((start, start + extent * value.element_size(), name))
        self._seen: dict[tuple[str, int], list[Tensor]] = {}
        self._written: list[Tensor] = []

    def add(self, kind: str, addresses: Tensor, size: int) -> None:
        """Count one access to the addresses that its mask lets through."""
        if addresses.numel() == 0:
            return
        lowest = int(addresses.min())
        for start, end, name in self._small:
            if start <= lowest < end:
                self.side[name] = self.side.get(name, 0) + addresses.numel() * size
                return
        self.bulk += addresses.numel() * size
        if kind == "load":
            highest = int(addresses.max())
            for written in self._written:
                if int(written[0]) <= highest and lowest <= int(written[-1]):
                    addresses = addresses[~torch.isin(addresses, written)]
        else:
            self._written.append(addresses.sort().values)
        self._seen.setdefault((kind, size), []).append(addresses)

    def close(self) -> None:
        """Count the distinct addresses."""
        for (_, size), parts in self._seen.items():
            self.distinct += torch.unique(torch.cat(parts)).numel() * size
        self._seen.clear()
        self._written.clear()


@contextmanager
def count_launches(elements: int) -> Iterator[list[LaunchTraffic]]:
    """Yield the list to which each launch is added; fewer ``elements`` make a side operand."""
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    launches: list[LaunchTraffic] = []
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def record(kind: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        chosen = torch.from_numpy(pointers.data[mask.data].astype("int64"))
        launches[-1].add(kind, chosen, size)

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        record("load", pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record("store", pointers, mask)
        return store(pointers, value, mask, *rest)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(LaunchTraffic(self.fn.__name__, arguments, elements))
        result = call(self, *args, **kwargs)
        launches[-1].close()
        return result

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    executor.__call__ = counted_call
    try:
        yield launches
    finally:
        del builder.create_masked_load, builder.create_masked_store
        executor.__call__ = call


def mend_interpreter() -> None:
    """Let loops of Triton 3.6's interpreter take a number where it gives them an array of one."""
    if [*map(int, triton.__version__.split(".")[:2])] >= [3, 7]:
        return
    patch = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_index


def traffic_of(case: Case) -> list[LaunchTraffic]:
    """Run a case in the interpreter and return the traffic of its launches."""
    with triton_on_cpu(), count_launches(case.smallest or case.elements) as launches:
        case.run()
    return launches


def main() -> None:
    """Print, for each case, (kernel, bulk, distinct, side) of its launches as JSON."""
    torch.set_num_threads(1)
    mend_interpreter()
    counts = {
        case.name: [
            (launch.kernel, launch.bulk, launch.distinct, sum(launch.side.values()))
            for launch in traffic_of(case)
        ]
        for case in CASES
        if case.elements and case.name in (sys.argv[1:] or [case.name])
    }
    json.dump(counts, sys.stdout)


if __name__ == "__main__":
    main()
