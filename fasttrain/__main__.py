"""The command ``fasttrain``, also ``python -m fasttrain``: `fasttrain.NAME` is its command NAME."""

import difflib
import runpy
import sys

from fasttrain import __version__
from fasttrain.printing import say

COMMANDS = {
    "train": "train a model from a TOML config; --resume, --verify-resume",
    "prepare": "turn text into a dataset",
    "preflight": "report a run's parameters, memory and time before it starts",
    "generate": "generate text with a trained model",
    "evaluate": "score a trained model on tasks of lm-evaluation-harness",
    "report": "draw the curves of runs as one HTML page",
    "checkpoint": "list and verify checkpoints",
    "hf": "import from and export to Hugging Face",
}


def main() -> int:
    """Run the command that is named first, and exit as it does; 2 where there is none such."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        say("usage: fasttrain COMMAND …, or python -m fasttrain.COMMAND …\n")
        say("\n".join(f"  {name:<12} {meaning}" for name, meaning in COMMANDS.items()))
        say("\nAlso: fasttrain COMMAND --help; --version")
        return 0
    if name == "--version":
        say(f"fasttrain {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        say(f"error: fasttrain {name}: there is no such command; {hint}", stream=sys.stderr)
        return 2
    sys.argv[1:] = arguments
    runpy.run_module(f"fasttrain.{name}", run_name="__main__")  # it exits
    return 0


if __name__ == "__main__":
    sys.exit(main())
