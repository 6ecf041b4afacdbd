"""What will hurt a run in the long term; what any run warns of is in `fasttrain.engine.plan`."""

import math
from collections.abc import Iterator

import torch

from fasttrain.config import TrainConfig
from fasttrain.config.keys import counted
from fasttrain.data.dataset import TokenDataset
from fasttrain.engine.plan import RunPlan

# Hoffmann et al. 2022 (arXiv:2203.15556): about 20 tokens a parameter are best for the compute
# spent. Muennighoff et al. 2023 (arXiv:2305.16264): up to 4 epochs are almost as good as new text.
# A first run of base.toml, of some minutes, has 2.6 tokens a parameter and needs no warning.
BEST_TOKENS, FEW_TOKENS, MANY_EPOCHS = 20.0, 2.5, 4.0
LONG_RUN_S = 3600.0


def warnings_of(
    config: TrainConfig,
    plan: RunPlan,
    train: TokenDataset | None,
    *,
    device: torch.device,
    dtype: str,
    seconds: float | None = None,
) -> Iterator[str]:
    """Yield what will hurt the run, each with the remedy.

    ``config`` has its vocabulary set; ``dtype`` is a name of `fasttrain.device.Precision`;
    ``seconds`` is how long the run will take, where that is known.
    """
    model, seq_len, warmup = config.model, config.data.seq_len, config.schedule.warmup_steps
    assert model.vocab_size is not None
    cuda, head_dim = device.type == "cuda", model.head_dim or model.dim // model.n_heads
    window, epochs = model.sliding_window_tokens, plan.epochs or 0.0
    # What is not known is no reason to warn.
    share = math.inf if plan.tokens is None else plan.tokens / plan.matmul_parameters
    steps, run = math.inf if plan.steps is None else plan.steps, counted(plan.steps or 0, "step")
    max_token, mean = -1, math.inf
    if train is not None:
        max_token, mean = train.max_token, train.n_tokens / (train.n_documents or 1)
    every = {s: getattr(config, s).every_steps or 0 for s in ("eval", "checkpoint", "log")}
    for wrong, said in (
        (model.vocab_size % 64,
         f"model.vocab_size = {model.vocab_size} is not a multiple of 64, which slows the head on "
         f"tensor cores; set {-(-model.vocab_size // 64) * 64}"),
        (cuda and (model.dim % 64 or head_dim % 8),
         f"model.dim = {model.dim} and head_dim = {head_dim}: tensor cores and flash attention "
         "want multiples of 64 and of 8"),
        (cuda and dtype == "fp32",
         "run.dtype = fp32 leaves the tensor cores idle; use bf16, fp16 or tf32"),
        (share < FEW_TOKENS,
         f"{share:.2g} tokens for each parameter in matrix products, and about {BEST_TOKENS:.0f} "
         "make the best of the compute: a smaller model will end better, or train for longer"),
        (epochs > MANY_EPOCHS,
         f"{epochs:.1f} epochs: beyond {MANY_EPOCHS:.0f} repeated text teaches less and less; add "
         "text, or watch the validation loss"),
        (warmup >= steps,
         f"schedule.warmup_steps = {warmup} is longer than the run of {run}: the peak learning "
         "rate is never reached; lower it"),
        (0.2 * steps < warmup < steps,
         f"schedule.warmup_steps = {warmup} is more than a fifth of the {run}"),
        *((n > steps, f"{s}.every_steps = {n} is longer than the run of {run}: only at its end")
          for s, n in every.items()),
        (config.checkpoint.every_steps is None and (seconds or 0.0) > LONG_RUN_S,
         "checkpoint.every_steps is unset: a crash loses the whole run; set it to some minutes' "
         "worth of steps"),
        (mean < seq_len / 2 and config.data.attention_across_documents,
         f"data.seq_len = {seq_len} is longer than the documents, {mean:.0f} tokens on average: "
         "most of what is attended to is another text; shorten it, or set "
         "data.attention_across_documents=false"),
        (window is not None and window >= seq_len,
         f"model.sliding_window_tokens = {window} has no effect below data.seq_len = {seq_len}"),
        (max_token >= model.vocab_size,
         f"the data hold token {max_token}, model.vocab_size is {model.vocab_size}"),
    ):  # fmt: skip
        if wrong:
            yield said
