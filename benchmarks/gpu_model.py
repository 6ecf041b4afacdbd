"""Predict a training step on GPUs from what `benchmarks.gpu_dry` counted, and assumed speeds.

    python -m benchmarks.gpu_model    # the table of docs/benchmarks.md, and the parts of a step

A micro-batch is matrix products, attention, the cross-entropy's pass over the logits, the bytes of
all generated kernels, gradients added to those of the micro-batches before, and a gap for each
launch; a step is its micro-batches, weights rounded for all of them, and AdamW. Nothing overlaps.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.harness import ROOT, Document, read_all, slug

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


class Shape(NamedTuple):
    """What of a config the prediction needs."""

    parameters: int
    matmul_parameters: int
    head_parameters: int  # of them
    flops_per_token: float
    vocab_size: int
    attention_width: int  # query heads times their width
    n_micro: int


def shape_of(name: str) -> Shape:
    """Return the shape of a config in the folder of configs, or of a case of it."""
    import torch

    from fasttrain.config import load_config
    from fasttrain.engine.schedule import step_shape
    from fasttrain.model.transformer import Transformer

    config = load_config(ROOT / "configs" / f"{name.split(',')[0]}.toml", [])
    seq_len = config.data.seq_len
    with torch.device("meta"):
        model = Transformer(config.model, seq_len=seq_len)
    return Shape(
        model.num_parameters(), model.num_matmul_parameters(), model.head_weight.numel(),
        model.flops_per_token(), model.vocab_size, config.model.n_heads * model.head_dim,
        step_shape(config.train, seq_len, 1).n_micro,
    )  # fmt: skip


def parts_ms(shape: Shape, counts: Document, device: Device, attention: str) -> dict[str, float]:
    """Return the milliseconds of the parts of a micro-batch; rounding and optimizer are a step's.

    ``counts`` is an entry of gpu_dry.json; ``attention`` is ``flash`` or ``cudnn``.
    """
    n_layers, seq_len = counts["layers"], counts["seq_len"]
    n_tokens = counts["rows"] * seq_len
    layer, rest = counts["layer"], counts["rest"]
    n_launches = sum(
        times * (part["launches"] + sum(part["extern"].values()))
        for times, part in ((n_layers, layer), (1, rest))
    )
    # Two products of T × T/2 keys forward, five backward.
    scores = 7 * n_layers * n_tokens * seq_len * shape.attention_width
    tb = 1e9 * device.memory  # bytes in a millisecond
    # In fp8 are all products of the layers, forward and backward, but not the head's.
    speed = FP8_SPEED if "_scaled_mm" in layer["extern"] else 1.0
    in_layers = shape.matmul_parameters - shape.head_parameters
    multiplied = shape.head_parameters + in_layers / speed
    rounded = n_layers * layer.get("rounded", 0)  # their gradients are added in bf16
    # Rounded, and gradients zeroed, so that the first are added, too; one micro-batch alone casts
    # matrices and their gradients in the graph.
    rounding = 12 * rounded if shape.n_micro == 1 else 4 * rounded + 16 * shape.parameters
    return {
        "products": 6 * multiplied * n_tokens / (1e9 * device.products),
        "attention": scores / (1e9 * getattr(device, attention)),
        "cross-entropy": 4 * n_tokens * shape.vocab_size / tb,
        "generated": (n_layers * layer["bytes"] + rest["bytes"]) / tb,
        "accumulation": (12 * shape.parameters - 2 * rounded) / tb,
        "gaps": n_launches * GAP_US / 1e3,
        "rounding": rounding / tb if rounded else 0.0,
        "optimizer": ADAMW_BYTES * shape.parameters / (ADAMW_SPEED * tb),
    }


def tokens_per_s(counts: Document, parts: Mapping[str, float], n_micro: int) -> float:
    """Return the tokens that a step of so many micro-batches trains in a second."""
    once_ms = parts["rounding"] + parts["optimizer"]
    micro_ms = sum(parts.values()) - once_ms
    step_ms = n_micro * micro_ms + once_ms - parts["accumulation"]
    return 1e3 * float(n_micro * counts["rows"] * counts["seq_len"]) / step_ms


def measured(documents: Sequence[Document], config: str, device: str) -> str:
    """Return the tokens/s that ``make gpu`` measured with one micro-batch a step, if it did."""
    suite = f"step-{slug(config)}-bf16"
    for document in (d for d in documents if d["suite"] == suite):
        if device in document["machine"]["device"]:
            for entry in document["benchmarks"]:
                if rates := entry.get("tokens_per_s"):
                    return f"{rates['fasttrain']:,.0f}"
    return "not measured"


def table(documents: Sequence[Document]) -> str:
    """Return predicted and measured tokens/s; nothing where nothing was counted."""
    counted = [d for d in documents if d["suite"] == "gpu_dry"]
    entries = {e["name"]: e for d in counted for e in d["benchmarks"] if "skipped" not in e}
    lines = [
        "<details><summary>One GPU, <b>predicted</b> from those counts and from assumed speeds "
        "(benchmarks/gpu_model.py); compiled, in bf16 or fp8; MFU is of the peak in bf16 for both. "
        "Not measured but for the last column</summary>\n",
        "| config | GPU | tokens/s, FlashAttention-2 | MFU | tokens/s, cuDNN's attention | MFU "
        "| one micro-batch a step, FlashAttention-2 | the same, measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for config in CONFIGS:
        if (counts := entries.get(config)) is None:
            continue
        shape = shape_of(config)
        for name, device in DEVICES.items():
            if config.endswith("fp8") and not device.has_fp8:
                continue
            cells = [config, name]
            for attention in ("flash", "cudnn"):
                parts = parts_ms(shape, counts, device, attention)
                rate = tokens_per_s(counts, parts, shape.n_micro)
                mfu = rate * shape.flops_per_token / (1e12 * device.peak)
                cells += [f"{rate:,.0f}", f"{mfu:.0%}"]
            alone = shape._replace(n_micro=1)
            single = tokens_per_s(counts, parts_ms(alone, counts, device, "flash"), 1)
            cells += [f"{single:,.0f}", measured(documents, config, name)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "\n</details>\n"]) if len(lines) > 3 else ""


def main() -> int:
    """Print the table, and the parts of a step on an H100."""
    documents = read_all()
    print(table(documents))
    entries: list[Any] = next(d["benchmarks"] for d in documents if d["suite"] == "gpu_dry")
    for counts in (e for e in entries if e["name"] in CONFIGS):
        parts = parts_ms(shape_of(counts["name"]), counts, DEVICES["H100"], "flash")
        shown = " · ".join(f"{name} {ms:.1f}" for name, ms in parts.items())
        print(f"{counts['name']}, H100, milliseconds: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
