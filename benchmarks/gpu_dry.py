"""What a training step launches on an H100 and what its generated kernels move, without a GPU.

    python -m benchmarks.gpu_dry [CASE ...] [--set section.key=value ...] [--results DIR]

Forward and backward of a config are compiled for sm_90 as a run compiles them: `TrainStep`, Dynamo,
the min-cut partitioner, Inductor. Every generated Triton kernel is shown with its bytes, as
Inductor counts them (each operand once), its launches, and the registers and spills of the
configurations that a run would choose from; calls of other kernels (products, attention, our own
ops) are counted. A layer is the difference of a model with two layers and one with one.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks import fake_gpu, harness
from benchmarks.fake_gpu import DEVICE, GraphLowering, torch
from fasttrain.config import TrainConfig, UserError, load_config
from fasttrain.device import make_deterministic, resolve_precision
from fasttrain.engine.step import TrainStep
from fasttrain.model.transformer import Transformer

# Configs that name none train with the vocabulary of their data. Compiled blocks in C++ are a
# CPU's; on a GPU, `auto` is what goes with everything.
_SMALL = ("run.compile=auto", "model.vocab_size=2048")
_EXACT, _DOCUMENTS = "run.deterministic=true", "data.attention_across_documents=false"
CASES: dict[str, tuple[str, ...]] = {
    "base": _SMALL,
    "speedrun": _SMALL,
    "chars": ("run.compile=auto", "model.vocab_size=256"),
    "gpt2-124m": (),
    "llama-350m": (),
    "llama-1b": (),
    "gpt2-124m, documents": (_DOCUMENTS,),
    "llama-1b, full": ("train.activation_checkpointing=full",),
    "llama-1b, selective": ("train.activation_checkpointing=selective",),
    "llama-1b, fp8": ("run.fp8=true",),
    "gpt2-124m, deterministic": (_EXACT,),
    "gpt2-124m, deterministic, documents": (_EXACT, _DOCUMENTS),
}


ATOMIC = "tl.atomic_add("  # adds in no fixed order


class Kernel(NamedTuple):
    """A generated kernel; those that differ in the number of their name alone are one."""

    graph: str  # forward | backward
    name: str
    bytes: int


class Program(NamedTuple):
    """What a model with some number of layers launches in a step, and the kernels' sources."""

    launches: Counter[Kernel]
    extern: Counter[str]
    sources: dict[Kernel, str]

    def counts(self) -> Counter[str]:
        """Return what all launches of generated kernels move, and how many they are."""
        moved = sum(kernel.bytes * n for kernel, n in self.launches.items())
        return Counter(bytes=moved, launches=self.launches.total())


def config_of(case: str, *overrides: str) -> TrainConfig:
    """Return the config of a case; accumulation, which changes nothing compiled, is left out."""
    path = harness.ROOT / "configs" / f"{case.split(',')[0]}.toml"
    given = [*CASES[case], "train.tokens_per_step=none", "data.path=none-needed", *overrides]
    return load_config(path, given)


def compile_step(config: TrainConfig) -> Program:
    """Compile forward and backward of a training step."""
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    torch._inductor.config.deterministic = False
    if config.run.deterministic:
        make_deterministic()
    shape = (config.train.micro_batch, config.data.seq_len)
    with torch._subclasses.FakeTensorMode():
        with DEVICE:
            model = Transformer(config.model, seq_len=config.data.seq_len).train()
            tokens = torch.empty(shape, dtype=torch.int64)
            starts = torch.empty(shape, dtype=torch.bool)
        precision = resolve_precision(config.run.dtype, DEVICE)
        step = TrainStep(model, [], config, device=DEVICE, precision=precision)
        documents = None if config.data.attention_across_documents else starts
        written: list[str] = []
        keep = patch.object(GraphLowering, "save_output_code", written.append)
        with keep, suppress(fake_gpu.Launched):
            step.loss_fn(tokens, tokens, documents)
    return read(written)


def read(written: Sequence[str]) -> Program:
    """Count what the programs, forward and backward, launch."""
    assert len(written) == 2, f"{len(written)} graphs, not one forward and one backward"
    program = Program(Counter(), Counter(), {})
    for graph, text in zip(("forward", "backward"), written, strict=True):
        generated = r"async_compile\.(\w+)\('(\w+)', '''(.*?)''', device_str"
        calls = re.sub(generated, "", text, flags=re.S)
        for kind, name, source in re.findall(generated, text, re.S):
            assert kind == "triton", f"{name} is {kind}, not Triton"
            gigabytes = re.search(r"'kernel_num_gb': ([\d.e+-]+)", source)
            n_bytes = round(1e9 * float(gigabytes[1])) if gigabytes else 0
            kernel = Kernel(graph, re.sub(r"_\d+$", "", name), n_bytes)
            program.launches[kernel] += len(re.findall(rf"\b{name}\.run\(", calls))
            program.sources.setdefault(kernel, source)
        extern = re.findall(r"(?:extern_kernels\.|torch\.ops\.)([\w.]+)\(", calls)
        program.extern.update(name.removesuffix(".default") for name in extern)
    return program


def resources(source: str) -> dict[str, int]:
    """Compile a kernel as a run would; of the configurations it tries, what spills least counts.

    Returns registers of a thread, instructions that access local memory, warps, atomic additions.
    """
    from fasttrain_kernels.aot import _cuda_resources  # which imports torch

    module = torch._inductor.codecache.PyCodeCache.load(source)
    (kernel,) = (x for x in vars(module).values() if hasattr(x, "compile_results"))
    kernel.precompile(warm_cache_only=True)
    found = []
    for result in kernel.compile_results:
        registers, spills, *_ = _cuda_resources(result.kernel.asm["cubin"])
        found.append((spills, registers, result.config.num_warps))
    spills, registers, warps = min(found)
    atomics = source.count(ATOMIC)
    return {"registers": registers, "spills": spills, "warps": warps, "atomics": atomics}


def entry_of(case: str, *overrides: str) -> dict[str, Any]:
    """Return what a layer of a case adds to a step, the rest of it, and every kernel."""
    one, two = (compile_step(config_of(case, *overrides, f"model.n_layers={n}")) for n in (1, 2))
    layer, rest = two.counts(), one.counts()
    layer.subtract(one.counts())
    rest.subtract(layer)
    in_layer = two.extern - one.extern
    config = config_of(case, *overrides)
    return {
        "name": case,
        "rows": config.train.micro_batch,
        "seq_len": config.data.seq_len,
        "layers": config.model.n_layers,
        "layer": {**layer, "extern": dict(in_layer)},
        "rest": {**rest, "extern": dict(one.extern - in_layer)},
        "kernels": [
            {**kernel._asdict(), "launches": n, "a_layer": n - one.launches[kernel]}
            | resources(two.sources[kernel])
            for kernel, n in two.launches.items()
        ],
    }


def one_layer(case: str) -> dict[str, Any]:
    """Return bytes and atomic additions of a model with one layer, or why it does not compile."""
    try:
        program = compile_step(config_of(case, "model.n_layers=1"))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    atomics = sum(source.count(ATOMIC) for source in program.sources.values())
    return {"atomics": atomics, "extern": list(program.extern), **program.counts()}


def main() -> None:
    """Compile the cases and print what they launch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(map(repr, CASES)))
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--results", type=Path, help="folder for the JSON file of all cases")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - CASES.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    entries: list[dict[str, Any]] = []
    for case in arguments.cases or CASES:
        try:
            entries.append(entry_of(case, *arguments.set))
        except UserError as error:  # fp8 without torchao
            entries.append({"name": case, "skipped": str(error)})
        print(json.dumps(entries[-1], indent=1), flush=True)
    if arguments.results:
        machine = harness.machine() | {"device": "NVIDIA H100, compiled", "kind": "compiled"}
        harness.save(arguments.results, harness.document("gpu_dry", entries, machine, {}))


if __name__ == "__main__":
    main()
