"""Predict a training step on GPUs from what `benchmarks.gpu_dry` counted, and assumed speeds.

    python -m benchmarks.gpu_model    # the table of docs/benchmarks.md, and the parts of a step

A micro-batch is matrix products, attention, the cross-entropy's pass over the logits, the bytes of
all generated kernels, gradients added to those of the micro-batches before, and a gap for each
launch; a step is its micro-batches, weights rounded for all of them, and AdamW. Nothing overlaps.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.harness import ROOT, Document, folded, read_all, slug
from fasttrain.config import load_config
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import step_shape

CONFIGS = [
    name + option
    for name in ("gpt2-124m", "llama-350m", "llama-1b")
    for option in ("", ", bf16 residual", ", fp8")
]
# All assumed, none measured here: microseconds between two launches; what AdamW and the gradient
# norm move of a parameter, bytes, and at which part of the speed of a generated kernel.
GAP_US, ADAMW_BYTES, ADAMW_SPEED = 1.5, 32, 0.81
# How much faster products are in fp8 than in bf16. On an H100 of 500 W 1,083 to 1,141 TFLOP/s where
# bf16 had 546 to 585 (pytorch/FBGEMM, pull request 2546): 1.9. Two thirds of them, those of the
# backward pass, without fast accumulation, where torchao leaves it out: 1.2 times as long
# (pytorch/ao, issue 2377). Those were 3,584 wide and wider; narrower ones gain less.
FP8_SPEED = 1.9 / (1 / 3 + 2 / 3 * 1.2)


class Device(NamedTuple):
    """What a GPU is assumed to reach: TFLOP/s in bf16, TB/s."""

    peak: float  # the datasheet's, which MFU refers to
    products: float  # cuBLAS: 57 % of the peak, as on an H100 at its power limit; A100: 75 %
    flash: float  # FlashAttention-2 forward and backward, half of the scores counted
    cudnn: float  # cuDNN's attention, which an A100 is assumed not to profit from
    memory: float  # generated kernels: 84 % of the datasheet's, as 2.8 of 3.35
    has_fp8: bool = True


DEVICES = {
    "A100": Device(312.0, 234, 120, 120, 1.7, has_fp8=False),
    "H100": Device(989.5, 565, 212, 415, 2.8),
    "H200": Device(989.5, 565, 212, 415, 4.0),
    "B200": Device(2250.0, 1280, 300, 900, 6.7),
}


def model_of(name: str) -> tuple[Transformer, int]:
    """Return the model of a config or of a case of it, without memory, and its micro-batches."""
    config = load_config(ROOT / "configs" / f"{name.split(',')[0]}.toml", [])
    seq_len = config.data.seq_len
    with torch.device("meta"):
        model = Transformer(config.model, seq_len=seq_len)
    return model, step_shape(config.train, seq_len, 1).n_micro


def parts_ms(
    model: Transformer, n_micro: int, counts: Document, device: Device, attention: str
) -> dict[str, float]:
    """Return the milliseconds of the parts of a micro-batch; rounding and optimizer are a step's.

    ``counts`` is an entry of gpu_dry.json; ``attention`` is ``flash`` or ``cudnn``.
    """
    n_layers, seq_len = counts["layers"], counts["seq_len"]
    n_tokens = counts["rows"] * seq_len
    layer, rest = counts["layer"], counts["rest"]
    in_layer, around = (p["launches"] + sum(p["extern"].values()) for p in (layer, rest))
    # Two products of T × T/2 keys forward, five backward.
    scores = 7 * n_layers * n_tokens * seq_len * model.config.n_heads * model.head_dim
    tb = 1e9 * device.memory  # bytes in a millisecond
    # In fp8 are all products of the layers, forward and backward, but not the head's.
    speed = FP8_SPEED if "_scaled_mm" in layer["extern"] else 1.0
    head = model.head_weight.numel()
    multiplied = head + (model.num_matmul_parameters() - head) / speed
    rounded = n_layers * layer.get("rounded", 0)  # their gradients are added in bf16
    # Rounded, and gradients zeroed, so that the first are added, too; one micro-batch alone casts
    # matrices and their gradients in the graph.
    rounding = 12 * rounded if n_micro == 1 else 4 * rounded + 16 * model.num_parameters()
    return {
        "products": 6 * multiplied * n_tokens / (1e9 * device.products),
        "attention": scores / (1e9 * getattr(device, attention)),
        "cross-entropy": 4 * n_tokens * model.vocab_size / tb,
        "generated": (n_layers * layer["bytes"] + rest["bytes"]) / tb,
        "accumulation": (12 * model.num_parameters() - 2 * rounded) / tb,
        "gaps": (n_layers * in_layer + around) * GAP_US / 1e3,
        "rounding": rounding / tb if rounded else 0.0,
        "optimizer": ADAMW_BYTES * model.num_parameters() / (ADAMW_SPEED * tb),
    }


def tokens_per_s(counts: Document, parts: Mapping[str, float], n_micro: int) -> float:
    """Return the tokens that a step of so many micro-batches trains in a second."""
    once_ms = parts["rounding"] + parts["optimizer"]
    micro_ms = sum(parts.values()) - once_ms
    step_ms = n_micro * micro_ms + once_ms - parts["accumulation"]
    return 1e3 * float(n_micro * counts["rows"] * counts["seq_len"]) / step_ms


def counted(documents: Sequence[Document]) -> dict[str, Any]:
    """Return what `benchmarks.gpu_dry` counted, by case."""
    found = (e for d in documents if d["suite"] == "gpu_dry" for e in d["benchmarks"])
    return {entry["name"]: entry for entry in found if "skipped" not in entry}


def measured(documents: Sequence[Document], config: str, device: str) -> str:
    """Return the tokens/s that ``make gpu`` measured with one micro-batch a step, if it did."""
    for document in (d for d in documents if d["suite"] == f"run-{slug(config)}-bf16"):
        if device in document["machine"]["device"]:
            for entry in document["benchmarks"]:
                if rate := entry.get("tokens_per_s"):
                    return f"{rate:,.0f}"
    return "not measured"


def table(documents: Sequence[Document]) -> str:
    """Return predicted and measured tokens/s; nothing where nothing was counted."""
    entries = counted(documents)
    rows = []
    for config in (name for name in CONFIGS if name in entries):
        (model, n_micro), counts = model_of(config), entries[config]
        for name, device in DEVICES.items():
            if config.endswith("fp8") and not device.has_fp8:
                continue
            parts = [parts_ms(model, n_micro, counts, device, way) for way in ("flash", "cudnn")]
            rates = [tokens_per_s(counts, part, n_micro) for part in parts]
            cells = [config, name]
            for rate in rates:
                mfu = rate * model.flops_per_token() / (1e12 * device.peak)
                cells += [f"{rate:,.0f}", f"{mfu:.0%}"]
            alone = parts_ms(model, 1, counts, device, "flash")
            single = tokens_per_s(counts, alone, 1)
            rows.append([*cells, f"{single:,.0f}", measured(documents, config, name)])
    summary = (
        "One GPU, <b>predicted</b> from these counts and assumed speeds "
        "(benchmarks/gpu_model.py); compiled, in bf16 or fp8; MFU is relative to the bf16 peak. "
        "Only the last column is measured"
    )
    head = ("config", "GPU", "tokens/s, FlashAttention-2", "MFU", "tokens/s, cuDNN's attention")
    head += ("MFU", "one micro-batch per step, FlashAttention-2", "the same, measured")
    return folded(summary, head, rows) if rows else ""


def main() -> None:
    """Print the table, and the parts of a step on an H100."""
    documents = read_all()
    print(table(documents))
    for name, counts in counted(documents).items():
        if name in CONFIGS:
            parts = parts_ms(*model_of(name), counts, DEVICES["H100"], "flash")
            shown = " · ".join(f"{part} {ms:.1f}" for part, ms in parts.items())
            print(f"{name}, H100, milliseconds: {shown}")


if __name__ == "__main__":
    main()
