"""Several ranks foreseen: memory against that of two processes, bytes against collectives."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fasttrain_kernels.grad_norm import local_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain.config import DistributedConfig, TrainConfig, config_from_dict
from fasttrain.data.loader import Batch
from fasttrain.device import Precision, resolve_precision
from fasttrain.distributed.sharding import shard
from fasttrain.distributed.world import World, choose_mode, start, stop
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.step import TrainStep
from fasttrain.model.transformer import Transformer
from fasttrain.preflight import memory
from fasttrain.preflight.__main__ import main as preflight_main
from fasttrain.preflight.memory import estimate_memory, measure_peak
from fasttrain.preflight.plan import scaling_lines, traffic
from fasttrain.resolve import resolve
from tests.support.ranks import once, run_script
from tests.support.toy import write_config

CPU = torch.device("cpu")
PRECISION = resolve_precision("fp32", CPU)
ROWS, SEQ_LEN = 4, 64
# mode, micro-batches of a rank
CASES = {"ddp": ("ddp", 1), "ddp, accumulated": ("ddp", 2), "fsdp": ("fsdp", 1)}
CASES |= {"fsdp, accumulated": ("fsdp", 2)}


def config_of(mode: str, n_micro: int, n_ranks: int = 2) -> TrainConfig:
    return config_from_dict(
        {
            "run": {"compile": "off", "dtype": "fp32", "device": "cpu"},
            "model": {"vocab_size": 1024, "dim": 128, "n_layers": 3, "n_heads": 4},
            "data": {"path": "unused", "seq_len": SEQ_LEN},
            "train": {
                "steps": 1,
                "micro_batch": ROWS,
                "tokens_per_step": n_ranks * n_micro * ROWS * SEQ_LEN,
            },
            "distributed": {"mode": mode},
        }
    )


def held_at_most(mode: str, n_micro: int) -> int:
    """Return the bytes that this process holds at most in a step."""
    config = config_of(mode, n_micro)
    world, _ = start(config.distributed, CPU)
    model = Transformer(config.model, seq_len=SEQ_LEN)
    world = choose_mode(config.distributed, world, 0, CPU)
    shard(model, world, config.distributed)
    optimizers = build_optimizers(model, config.optim)
    step = TrainStep(model, optimizers, resolve(config, CPU, world))
    ids = torch.zeros(ROWS, SEQ_LEN, dtype=torch.int64)
    batches = [Batch(ids, ids.clone(), None, 0)] * n_micro
    for _ in range(2):  # moments, and the buckets that DDP makes anew after its first step
        step(batches, 1e-3)
    states = [value for o in optimizers for s in o.state.values() for value in s.values()]
    held = [*model.parameters(), *model.buffers(), ids, ids, *states]
    total = sum(local_tensor(t).nbytes for t in held if isinstance(t, torch.Tensor))
    if mode == "ddp":  # its buckets are there before the step
        total += sum(p.nbytes for p in model.parameters())
    total += measure_peak(lambda: step(batches, 1e-3), CPU)
    stop(world)
    return total


MEASURE = """
import json
import torch
from tests.distributed.test_scaling import CASES, held_at_most

torch.manual_seed(0)
print(json.dumps({name: held_at_most(*case) for name, case in CASES.items()}))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = once(tmp_path_factory, "scaling", lambda to: run_script(MEASURE, size=2, folder=to))
    lines = (folder / "script-0.txt").read_text().splitlines()
    found: dict[str, int] = json.loads(lines[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_rank_is_within_a_tenth_of_what_two_processes_hold(
    measured: dict[str, int], name: str
) -> None:
    mode, n_micro = CASES[name]
    config = config_of(mode, n_micro)
    estimate = estimate_memory(config, device=CPU, n_ranks=2, mode=mode)
    assert estimate.total == pytest.approx(measured[name], rel=0.10)


def test_gradients_are_held_once_however_many_micro_batches(measured: dict[str, int]) -> None:
    assert measured["ddp, accumulated"] == pytest.approx(measured["ddp"], rel=0.01)


def test_more_ranks_hold_smaller_shards() -> None:
    def estimate(n_ranks: int) -> memory.StepMemory:
        config = config_of("fsdp", 1, n_ranks)
        return estimate_memory(config, device=CPU, n_ranks=n_ranks, mode="fsdp")

    two, eight = estimate(2), estimate(8)
    assert eight.parameters == pytest.approx(two.parameters / 4, rel=0.01)
    assert eight.optimizer == pytest.approx(two.optimizer / 4, rel=0.01)
    assert eight.activations == two.activations
    assert not dist.is_initialized()


class Sent(TorchDispatchMode):
    """Adds up what one rank sends with ring algorithms, from the collectives that torch calls."""

    def __init__(self, n_ranks: int) -> None:
        super().__init__()
        self.ring, self.bytes = (n_ranks - 1) / n_ranks, {"all_gather": 0.0, "reduce_scatter": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.bytes["all_gather"] += self.ring * args[0].nbytes
        elif name == "c10d::_reduce_scatter_base_":
            self.bytes["reduce_scatter"] += self.ring * args[1].nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reshard", [True, False])
def test_bytes_sent_are_those_of_the_collectives(reshard: bool) -> None:
    config = config_of("fsdp", 2, n_ranks=4)
    config = replace(
        config, distributed=DistributedConfig(mode="fsdp", reshard_after_forward=reshard)
    )
    with memory._pretended(config.distributed, 4, "fsdp") as world, Sent(4) as sent:
        trace = memory._trace(config, ROWS, 2, PRECISION, world)
    foreseen = traffic(config, trace.model, mode="fsdp", n_ranks=4, n_micro=2, width=4)
    assert sent.bytes["all_gather"] == pytest.approx(foreseen["all-gather"], rel=0.01)
    assert sent.bytes["reduce_scatter"] == pytest.approx(foreseen["reduce-scatter"], rel=0.01)


class Dtypes(TorchDispatchMode):
    """Notes the dtypes that operations on floating-point tensors are given and return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, tuple[torch.dtype, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.seen.add((str(func), tuple(x.dtype for x in tensors)))
        return result


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_shards_compute_in_the_dtypes_of_one_rank(norm: str) -> None:
    """Products in half precision; embeddings, the residual stream and norms in fp32."""
    config = config_of("fsdp", 1)
    options = {"norm": norm, "bias": True, "qk_norm": True, "mlp": "gelu"}
    config = replace(config, model=replace(config.model, **options))
    precision = Precision("bf16", torch.bfloat16, "cpu")

    def dtypes_of(world: World) -> set[tuple[str, tuple[torch.dtype, ...]]]:
        with Dtypes() as dtypes:
            memory._trace(config, ROWS, 1, precision, world)
        return dtypes.seen

    alone = dtypes_of(World())
    with memory._pretended(config.distributed, 2, "fsdp") as world:
        sharded = dtypes_of(world)
    assert alone - sharded == set()
    # What shards do besides gathers, reduces and copies, in fp32.
    assert {x for x in sharded - alone if torch.bfloat16 in x[1]} == set()


def test_shards_are_compiled_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph cannot gather what it needs."""
    monkeypatch.setattr("fasttrain.resolve._has_cpp_compiler", lambda: True)
    config = config_of("fsdp", 1)
    config = replace(config, run=replace(config.run, compile="default"))
    with memory._pretended(config.distributed, 2, "fsdp") as world:
        model = Transformer(config.model, seq_len=SEQ_LEN)
        shard(model, world, config.distributed)
        step = TrainStep(model, [], resolve(config, CPU, world))
        assert step.compile_mode == "blocks"


def test_formulas_of_the_other_modes() -> None:
    config = config_of("ddp", 1)
    model = Transformer(config.model, seq_len=SEQ_LEN)
    n, one = model.num_parameters(), {"n_micro": 1, "width": 2}
    assert traffic(config, model, mode="ddp", n_ranks=1, **one) == {"all-reduce": 0}
    assert traffic(config, model, mode="ddp", n_ranks=4, **one) == {"all-reduce": 2 * 0.75 * 4 * n}
    copies = replace(config, distributed=DistributedConfig(mode="hsdp", shard_ranks=4))
    hsdp = traffic(copies, model, mode="hsdp", n_ranks=8, **one)
    fsdp = traffic(config, model, mode="fsdp", n_ranks=4, **one)
    for kind in ("all-gather", "reduce-scatter"):
        assert hsdp[kind] == fsdp[kind]
    assert hsdp["all-reduce"] == 2 * 0.5 * 4 * n / 4
    muon = replace(config, optim=replace(config.optim, name="muon"))
    assert traffic(muon, model, mode="fsdp", n_ranks=4, **one)["muon"] > 0
    assert fsdp["muon"] == 0


@pytest.mark.parametrize(
    ("mode", "n_micro", "hidden"),
    [
        ("ddp", 1, "0.0%"),  # beside a backward pass of 0.08 s
        ("ddp", 2, "25.0%"),  # beside the last micro-batch's alone
        ("fsdp", 2, "0.0%"),
    ],
)
def test_what_sending_costs(mode: str, n_micro: int, hidden: str) -> None:
    sent = {"all-reduce": 1e9, "muon": 0.0}  # 8 Gbit: 0.08 s at 100 Gbit/s
    line, rate = scaling_lines(sent, 0.12, mode=mode, n_micro=n_micro, gbps=100)
    assert line.endswith(": all-reduce 953.7 MiB")
    sending = r"\b80\.0 ms .*\b100 Gbit/s .*\b120\.0 ms\b"
    assert re.search(rf"{sending}.* {re.escape(hidden)} .*\bMFU\b.* 40\.0%", rate)


def test_preflight_for_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    path = write_config(tmp_path)
    overrides = ["distributed.mode=fsdp", "train.tokens_per_step=512"]
    options = ["--world-size", "4", "--bandwidth-gbps", "10"]
    assert preflight_main([str(path), *overrides, *options]) == 0
    out = capsys.readouterr().out
    assert "512 tokens: 2 micro-batches × 4 sequences × 16 tokens on each of 4 ranks" in out
    assert "ranks        4, fsdp: distributed.mode = fsdp" in out
    assert "    gathered" in out
    assert "reduce-scatter" in out
    assert re.search(r" ms .*\b10 Gbit/s .* ms\b", out)
    assert "tokens/s" in out
    assert preflight_main([str(path), *overrides, "--world-size", "3"]) == 0
    out = capsys.readouterr().out
    assert "528 tokens: 11 micro-batches × 1 sequence × 16 tokens on each of 3 ranks" in out
    assert "tokens_per_step = 512 is not a whole number of sequences of data.seq_len = 16" in out
    with pytest.raises(SystemExit):
        preflight_main([str(path), "--world-size", "0"])
