"""A run of Hugging Face's Trainer as a process of its own: ``python -m benchmarks.hf_trainer``.

Prints the milliseconds of each step, from the end of the one before it, as a JSON list.
"""

import itertools
import json
import sys
import tempfile
import time

import numpy as np
import torch
import transformers


def main(tokens: str, *, model: dict[str, object], seq_len: int, rows: int, steps: int) -> None:
    """Train a model of those options on a headerless uint16 file and print the times."""
    config = transformers.AutoConfig.for_model(use_cache=False, **model)
    ids = torch.from_numpy(np.fromfile(tokens, np.uint16).astype(np.int64))
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=rows, max_steps=steps,
            learning_rate=1e-3, optim="adamw_torch_fused", max_grad_norm=1.0,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        transformers.Trainer(
            model=transformers.AutoModelForCausalLM.from_config(config),
            args=options,
            train_dataset=[{"input_ids": window, "labels": window} for window in windows],
            callbacks=[Clock()],
        ).train()
    print(json.dumps([1e3 * (b - a) for a, b in itertools.pairwise(ends)]))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
