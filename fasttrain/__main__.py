"""``python -m fasttrain``: which commands there are."""

import importlib.util
import sys

COMMANDS = {
    "train": "train a model as a TOML config says; --resume, --verify-resume",
    "prepare": "turn text into a dataset",
    "preflight": "parameters, memory and time of a run, before it",
    "generate": "text from a trained model",
    "report": "curves of runs as one HTML page",
    "checkpoint": "list and verify checkpoints",
    "hf": "import from and export to Hugging Face",
}


def main() -> int:
    """Print the usage; return 0, or 2 where a command was given that must follow a dot."""
    given = sys.argv[1] if len(sys.argv) > 1 else ""
    print("usage: python -m fasttrain.COMMAND --help\n")
    for name, meaning in COMMANDS.items():
        if importlib.util.find_spec(f"fasttrain.{name}"):
            print(f"  python -m fasttrain.{name:<12} {meaning}")
    if given in COMMANDS:
        print(f"\nwrite it with a dot: python -m fasttrain.{given} …", file=sys.stderr)
    return 0 if given in ("", "-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
