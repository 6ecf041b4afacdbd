"""The command ``fasttrain``, also ``python -m fasttrain``: `fasttrain.NAME` is its command NAME."""

import difflib
import importlib
import sys
from typing import Any

from fasttrain import __version__

COMMANDS = {
    "train": "train a model as a TOML config says; --resume, --verify-resume",
    "prepare": "turn text into a dataset",
    "preflight": "parameters, memory and time of a run, before it",
    "generate": "text from a trained model",
    "report": "curves of runs as one HTML page",
    "checkpoint": "list and verify checkpoints",
    "hf": "import from and export to Hugging Face",
}


def _usage() -> str:
    lines = [f"  {name:<12} {meaning}" for name, meaning in COMMANDS.items()]
    usage = "usage: fasttrain COMMAND …, or python -m fasttrain.COMMAND …"
    return "\n".join([usage, "", *lines, "", "fasttrain COMMAND --help says more; --version"])


def module_of(name: str) -> Any:
    """Return the module of a command: of a package its ``__main__``."""
    module = importlib.import_module(f"fasttrain.{name}")
    return (
        importlib.import_module(f"{module.__name__}.__main__")
        if hasattr(module, "__path__")
        else module
    )


def main() -> int:
    """Run the command that is named first; its exit status, or 2 where there is none such."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"fasttrain {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: fasttrain {name}: there is no such command; {hint}", file=sys.stderr)
        return 2
    module = module_of(name)
    status: int = module.main(arguments)
    if hasattr(module, "leave"):  # a rank that failed does not wait for the others
        module.leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
