"""What a step sends between ranks, how long that takes, and what it costs in utilisation.

Bytes are those that one rank sends with ring algorithms over N ranks, the fewest possible: a
reduce-scatter and an all-gather of S bytes send S·(N − 1)/N each, an all-reduce is one after the
other. DDP all-reduces the fp32 gradients once a step. FSDP gathers the parameters in fp32 for each
micro-batch: all of them for the forward pass and, with ``distributed.reshard_after_forward``, those
of the blocks again for the backward pass; it reduce-scatters the fp32 gradients once a step. HSDP
all-reduces these shards over the copies. Muon gathers its matrices and scatters the updates.

Sources: Patarasuk and Yuan 2009, Bandwidth Optimal All-reduce Algorithms for Clusters of
Workstations (J. Parallel Distrib. Comput. 69); Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054).
"""

from collections.abc import Iterator

import torch
from torch import nn

from fasttrain.config import TrainConfig

FP32 = 4
# Of a step without accumulation the backward pass takes two thirds.
BACKWARD_SHARE = 2 / 3
Traffic = dict[str, float]  # bytes by kind of collective


def traffic(
    config: TrainConfig,
    model: nn.Module,
    *,
    mode: str,
    n_ranks: int,
    n_micro: int = 1,
    compute: torch.dtype = torch.float32,
) -> Traffic:
    """Return the bytes that one of ``n_ranks`` sends in a step of ``n_micro`` micro-batches.

    ``model`` is a Transformer on any device, also meta; ``mode`` is single, ddp, fsdp or hsdp.
    Muon gathers its matrices in ``compute``.
    """

    def ring(n: int) -> float:
        return (n - 1) / n

    total = sum(p.numel() for p in model.parameters())
    if mode == "single" or n_ranks == 1:
        return {}
    if mode == "ddp":
        return {"all-reduce": 2 * ring(n_ranks) * FP32 * total}
    # Of HSDP so many ranks share one copy of the parameters.
    inner = (config.distributed.shard_ranks if mode == "hsdp" else None) or n_ranks
    assert isinstance(model.blocks, nn.ModuleList)
    in_blocks = sum(p.numel() for p in model.blocks.parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    again = in_blocks if config.distributed.reshard_after_forward else 0
    width = torch.finfo(compute).bits // 8
    shards = 2 * ring(inner) * width * matrices / inner
    return {
        "all-gather": n_micro * ring(inner) * FP32 * (total + again),
        "reduce-scatter": ring(inner) * FP32 * total,
        "all-reduce": 2 * ring(n_ranks // inner) * FP32 * total / inner,
        "muon": shards if config.optim.name == "muon" else 0.0,
    }


def overhead(
    sent: float, step_s: float, *, mode: str, n_micro: int, bandwidth_gbps: float
) -> tuple[float, float, float]:
    """Return what sending so many bytes costs a step that takes ``step_s`` without that.

    Seconds without latencies, and the shares of the utilisation that are lost: where it overlaps
    with all computation that it can, the last micro-batch's backward pass for DDP and all for FSDP,
    and where it overlaps with none.
    """
    sending_s = 8 * sent / (1e9 * bandwidth_gbps)
    beside = step_s * BACKWARD_SHARE / n_micro if mode == "ddp" else step_s
    left = max(0.0, sending_s - beside)
    return sending_s, left / (step_s + left), sending_s / (step_s + sending_s)


def scaling_lines(
    sent: Traffic, step_s: float | None, *, mode: str, n_micro: int, bandwidth_gbps: float | None
) -> Iterator[str]:
    """Yield lines to show; ``step_s`` and ``bandwidth_gbps`` are None where they are not known."""
    kinds = ", ".join(f"{kind} {n / 2**20:,.1f} MiB" for kind, n in sent.items() if n)
    yield f"sent         by each rank in a step: {kinds}"
    if bandwidth_gbps is None:
        yield "             --bandwidth-gbps tells how long that takes"
        return
    total, alone_s = sum(sent.values()), step_s or 0.0
    sending_s, hidden, exposed = overhead(
        total, alone_s, mode=mode, n_micro=n_micro, bandwidth_gbps=bandwidth_gbps
    )
    line = f"             {1000 * sending_s:,.1f} ms at {bandwidth_gbps:g} Gbit/s"
    if step_s is not None:
        line += (
            f" of a step of {1000 * step_s:,.1f} ms: {hidden:.1%} of the MFU lost where it "
            f"overlaps with computation, {exposed:.1%} where it does not"
        )
    yield line
