# ruff: noqa: E402
"""What a training step launches on an H100 and what its generated kernels move, without a GPU.

    python -m benchmarks.gpu_dry [CASE ...] [--results DIR]

Forward and backward of a config are compiled for sm_90 as a run compiles them: `TrainStep`, Dynamo,
the min-cut partitioner, Inductor. Every generated Triton kernel is shown with its bytes, as
Inductor counts them (each operand once), its launches, registers and spills; calls of others are
counted. A layer is the difference of a model with two layers and one with one.

To import this makes torch's CPU build compile for an H100, in this process. Tensors are fake ones,
without memory; a guard and hooks for autograd are in fake_gpu.cpp, answers of ``torch.cuda`` and of
Triton's driver here, and FlashAttention, which SDPA chooses on an H100. Nothing can be run.
"""

import argparse
import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

NAME, CAPABILITY = "NVIDIA H100 80GB HBM3", (9, 0)


def _load_device() -> None:
    if shutil.which("g++") is None:
        sys.exit("compiling for a GPU without one needs g++; install it")
    assert "torch" not in sys.modules, "import benchmarks.gpu_dry before torch"
    folder = Path(importlib.util.find_spec("torch").origin).parent
    if (folder / "lib" / "libtorch_cuda.so").exists():
        sys.exit("compiling for a GPU without one needs torch's build for CPU, in which no CUDA is")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as made:
        library, source = f"{made}/fake_gpu.so", Path(__file__).with_name("fake_gpu.cpp")
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{folder / 'include'}"]
        subprocess.run(["g++", *options, str(source), "-o", library], check=True)
        ctypes.CDLL(library)


_load_device()

import torch
import torch._dynamo.device_interface
import torch._inductor.async_compile
import torch._inductor.config as inductor
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.runtime.triton_helpers as triton_helpers
import torch.nn.functional as F
import triton
from dev.aot import _cuda_resources, stub_driver
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from benchmarks import harness
from fasttrain.config import TrainConfig, UserError, load_config
from fasttrain.device import make_deterministic
from fasttrain.engine.step import TrainStep
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import apply_numerics, resolve

# ---- a device that is not there ------------------------------------------------------------------

DEVICE = torch.device("cuda", 0)


class Launched(Exception):
    """Compiled code has begun to run; there is nothing to run it on."""


class _Properties:
    name, major, minor, type, gcnArchName = NAME, *CAPABILITY, "cuda", ""
    multi_processor_count, warp_size, max_threads_per_block = 132, 32, 1024
    max_threads_per_multi_processor, regs_per_multiprocessor = 2048, 65536
    shared_memory_per_block, shared_memory_per_block_optin = 48 << 10, 227 << 10
    total_memory, L2_cache_size, is_integrated = 80 << 30, 50 << 20, False


class _Generator(torch.Generator):
    device = DEVICE

    def clone_state(self) -> torch.Generator:
        return self


class _OnCpu(TorchDispatchMode):
    """Makes new tensors on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here = {"device": torch.device("cpu")} if kwargs and kwargs.get("device") else {}
        return func(*args, **(kwargs or {}) | here)


def _flash(q: Any, k: Any, v: Any, *, attn_mask: None, dropout_p: float, **options: Any) -> Any:
    assert attn_mask is None
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    attention: Any = torch.ops.aten._scaled_dot_product_flash_attention
    return attention(q, k, v, dropout_p, options["is_causal"])[0]


def _answer(place: Any, **answers: Any) -> None:
    for name, value in answers.items():
        function = value if callable(value) else lambda *_, value=value, **__: value
        setattr(place, name, staticmethod(function) if isinstance(place, type) else function)


_known = {
    "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
    "synchronize": None, "is_bf16_supported": True, "get_device_properties": lambda *_: _Properties,
}  # fmt: skip
_answer(
    torch.cuda, **_known, get_device_capability=CAPABILITY, get_device_name=NAME, _lazy_init=None,
    is_initialized=True, set_rng_state=None, is_current_stream_capturing=False,
    get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
)  # fmt: skip
torch.cuda.default_generators = (_Generator(),)
torch.cuda.device = torch.cuda._DeviceGuard = nullcontext  # type: ignore[assignment,misc]
_interface: Any = torch._dynamo.device_interface.CudaInterface
_answer(
    _interface, **_known, get_compute_capability=90, get_raw_stream=0, exchange_device=0,
    maybe_exchange_device=0,
)  # fmt: skip
_answer(_interface.Worker, get_device_properties=lambda *_: _Properties, current_device=0)
_answer(torch._C, _cuda_getCurrentRawStream=0)
# The first thing that compiled code does, forward and backward being compiled by then.
torch._C._dynamo.guards._empty_strided_cuda = Mock(side_effect=Launched)
torch._functorch.config.force_non_lazy_backward_lowering = True
_launch = SimpleNamespace(run=Mock(side_effect=Launched))  # the sources are read instead
_answer(torch._inductor.async_compile.AsyncCompile, triton=_launch)
_answer(triton_helpers, set_driver_to_gpu=None)
_more = {"get_active_torch_device": DEVICE, "get_device_interface": torch.cuda}
triton.runtime.driver.set_active(stub_driver(GPUTarget("cuda", 90, 32), **_more))
F.scaled_dot_product_attention = _flash
torch._subclasses.FakeTensorMode.avoid_device_init = property(lambda _: True)
inductor.compile_threads = 1  # where the threads are processes they know nothing of this
# What a cache has is not written, and so not read.
inductor.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
inductor.use_static_triton_launcher = False  # whose kernels do not show their code
inductor.benchmark_kernel = True  # which writes the bytes of a kernel into its source

_folder = joint_graph.UniformValueConstantFolder
_fold = _folder._deduce_value


def _fold_on_cpu(self: Any, node: Any) -> Any:
    with _OnCpu():  # the value of a constant is computed, with memory
        return _fold(self, node)


_folder._deduce_value = _fold_on_cpu

# ---- what is compiled for it ---------------------------------------------------------------------

# Of configs that name none, the vocabulary. They compile blocks in C++, which are a CPU's; on a
# GPU, `auto` is what goes with everything.
VOCAB_SIZES = {"base": 2048, "speedrun": 2048, "chars": 256}
OPTIONS = {
    "documents": "data.attention_across_documents=false",
    "full": "train.activation_checkpointing=full",
    "selective": "train.activation_checkpointing=selective",
    "bf16 residual": "model.residual_in_fp32=false",
    "fp8": "run.fp8=true",
    "deterministic": "run.deterministic=true",
}
CASES = [*VOCAB_SIZES, "gpt2-124m", "llama-350m", "llama-1b", "gpt2-124m, documents"]
CASES += ["llama-1b, full", "llama-1b, selective", "gpt2-124m, bf16 residual"]
CASES += ["llama-350m, bf16 residual", "llama-1b, bf16 residual", "gpt2-124m, fp8"]
CASES += ["llama-1b, fp8", "gpt2-124m, deterministic", "gpt2-124m, deterministic, documents"]
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
    rounded: int = 0  # parameters that are rounded once a step, which it does not count

    def counts(self) -> Counter[str]:
        """Return what all launches of generated kernels move, and how many they are."""
        moved = sum(kernel.bytes * n for kernel, n in self.launches.items())
        return Counter(bytes=moved, launches=self.launches.total(), rounded=self.rounded)


def config_of(case: str, *overrides: str) -> TrainConfig:
    """Return the config of a case, with its accumulation."""
    config, *options = case.split(", ")
    given = [OPTIONS[option] for option in options]
    if config in VOCAB_SIZES:
        given += ["run.compile=auto", f"model.vocab_size={VOCAB_SIZES[config]}"]
    given += ["data.path=none-needed", *overrides]
    return load_config(harness.ROOT / "configs" / f"{config}.toml", given)


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
            scale = torch.empty((), dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters())  # what no optimizer holds does not train
        resolved = resolve(config, DEVICE)
        apply_numerics(resolved)
        step = TrainStep(model, [optimizer], resolved)
        documents = None if config.data.attention_across_documents else starts
        written = written_by(lambda: step.loss_fn(tokens, tokens, documents, scale))
    assert len(written) == 2, f"{len(written)} graphs, not one forward and one backward"
    return read(written)._replace(rounded=sum(c.numel() for c in step.gradients.copies.values()))


def written_by(call: Callable[[], Any]) -> list[str]:
    """Return the programs that Inductor writes for what is compiled in a call."""
    written: list[str] = []
    keep = patch("torch._inductor.graph.GraphLowering.save_output_code", written.append)
    with keep, suppress(Launched):
        call()
    return written


def read(written: Sequence[str]) -> Program:
    """Count what the programs, forward and backward if there is one, launch."""
    program = Program(Counter(), Counter(), {})
    for graph, text in zip(("forward", "backward"), written, strict=False):
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


def compile_kernel(source: str) -> list[Any]:
    """Compile a generated kernel as a run would, in each of the configurations that it tries."""
    module = torch._inductor.codecache.PyCodeCache.load(source)
    (kernel,) = (x for x in vars(module).values() if hasattr(x, "compile_results"))
    kernel.precompile(warm_cache_only=True)
    return list(kernel.compile_results)


def resources(source: str) -> dict[str, int]:
    """Return what a generated kernel needs in the configuration that spills least.

    Registers of a thread, instructions that access local memory, warps, atomic additions.
    """
    made = compile_kernel(source)
    used = [(*_cuda_resources(x.kernel.asm["cubin"])[1::-1], x.config.num_warps) for x in made]
    spills, registers, warps = min(used)
    atomics = source.count(ATOMIC)
    return {"registers": registers, "spills": spills, "warps": warps, "atomics": atomics}


def entry_of(case: str) -> dict[str, Any]:
    """Return what a layer of a case adds to a step, the rest of it, and every kernel."""
    try:
        one, two = (compile_step(config_of(case, f"model.n_layers={n}")) for n in (1, 2))
    except UserError as error:  # fp8 without torchao
        return {"name": case, "skipped": str(error)}
    layer, rest = two.counts(), one.counts()
    layer.subtract(one.counts())
    rest.subtract(layer)
    in_layer = two.extern - one.extern
    config = config_of(case)
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


def main(suite: str, names: Sequence[str], entries_of: Callable[[Any], Any], **given: Any) -> None:
    """Print what is known of the names on the command line, all by default, and write a file."""
    about = sys.modules["__main__"].__doc__ or ""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(names))
    parser.add_argument("--results", type=Path, help="folder for a JSON file of all", **given)
    arguments, entries = parser.parse_args(), []
    if unknown := set(arguments.names) - set(names):  # `choices` rejects no names before 3.12
        parser.error(f"no such name: {'; '.join(sorted(unknown))}; there are {'; '.join(names)}")
    for entry in entries_of(arguments.names or names):
        print(json.dumps(entry, indent=1), flush=True)
        entries.append(entry)
    if arguments.results:
        machine = harness.machine() | {"device": "NVIDIA H100, compiled", "kind": "compiled"}
        harness.save(arguments.results, harness.document(suite, entries, machine, {}))


if __name__ == "__main__":
    main("gpu_dry", CASES, partial(map, entry_of))
