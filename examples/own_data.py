"""Text files (a folder or a glob) → a dataset → a trained model → text.

Run: python examples/own_data.py [TEXTS [FOLDER]]   (default: the source of Python's json)
"""

import json
import sys
from pathlib import Path

from fasttrain import generate, prepare, train

CONFIG = """
[run]
out_dir = "{folder}/runs"
name = "own"
device = "auto"
compile = "off"
[model]
dim = 48
n_layers = 2
n_heads = 2
[data]
path = "{folder}/data"
seq_len = 64
[optim]
lr = 3e-3
[schedule]
warmup_steps = 5
[train]
steps = 40
micro_batch = 8
[eval]
prompts = ["def "]
sample_tokens = 32
"""


def main(texts: str, folder: Path) -> int:
    """Run prepare, train and generate, as their command lines would."""
    folder.mkdir(parents=True, exist_ok=True)
    status = prepare.main([str(folder / "data"), "--tokenizer", "bytes", "--input", texts])
    if status:
        return status
    config = folder / "own.toml"
    config.write_text(CONFIG.format(folder=folder))
    if status := train.main([str(config)]):
        return status
    return generate.main([str(folder / "runs/own"), "--prompt", "def ", "--max-tokens", "64"])


if __name__ == "__main__":
    arguments = [*sys.argv[1:], f"{Path(json.__file__).parent}/**/*.py", "own_data"]
    sys.exit(main(arguments[0], Path(arguments[1 if len(sys.argv) > 2 else -1])))
