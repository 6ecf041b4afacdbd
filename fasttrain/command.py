"""What all commands share: exit statuses, and errors that tell no secrets."""

import contextlib
import functools
import importlib.util
import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from fasttrain.config import UserError
from fasttrain.redact import redact

__all__ = [
    "EXIT_BAD_INPUT", "EXIT_DONE", "EXIT_FAILED", "EXIT_STOPPED", "check_system", "command", "prog",
    "record", "redacted", "tell",
]  # fmt: skip

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: can be resumed
EXIT_NOT_READ = 141  # as shells show an end by SIGPIPE
_OUT_OF_MEMORY = (
    "lower train.micro_batch (with train.tokens_per_step set the loss stays the same), let "
    'train.micro_batch="auto" choose it, or set train.activation_checkpointing=full'
)
P = ParamSpec("P")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Print what a command raises, without secrets, and return its exit status.

    A `UserError` is one line and status 2, any other exception a traceback and status 1. Where
    nobody reads on, as after ``| head``, it ends silently, with the status of other programs.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        with contextlib.suppress(AttributeError):  # a replaced stdout may lack it
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            status = main(*args, **kwargs)
            sys.stdout.flush()
            return status
        except UserError as error:
            if not record(f"error: {error}") or os.environ.get("RANK") == "0":
                tell(f"error: {error}")
            return EXIT_BAD_INPUT
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout.fileno()):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return EXIT_NOT_READ
            rank = os.environ.get("RANK")
            of_rank = f"rank {rank}: " if rank else ""
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
                tell(f"{of_rank}error: {error}\n{_OUT_OF_MEMORY}")
                return EXIT_FAILED
            tell(of_rank + traceback.format_exc().rstrip("\n"))
            return EXIT_FAILED

    return run


def _nobody_reads(file: int) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def record(line: str) -> bool:
    """Have torchrun's summary say this line of this rank, in place of a traceback.

    Returns:
        Whether it will; False where no torchrun started this process.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return False
    with contextlib.suppress(OSError):
        # torchrun may end this rank meanwhile, and itself fails of a file that is half written.
        with open(f"{file}.part", "w", encoding="utf-8") as part:
            json.dump({"message": redact(line), "timestamp": int(time.time())}, part)
        os.replace(f"{file}.part", file)
        return True
    return False


def check_system() -> None:
    """Refuse Windows, which lacks the file locks, reads and signals that runs and datasets need."""
    if importlib.util.find_spec("fcntl") is None:
        raise UserError(
            "this command needs Linux or macOS (on Windows: WSL); fasttrain.Trainer and "
            "fasttrain_kernels work here too"
        )


def prog(name: str) -> str:
    """Return how a command is called, for its usage: through the script, or as a module."""
    by_script = Path(sys.argv[0]).stem == "fasttrain"
    return f"fasttrain {name}" if by_script else f"python -m fasttrain.{name}"


def tell(text: str) -> None:
    """Print a line to standard error, without secrets."""
    print(redact(text), file=sys.stderr, flush=True)


def redacted(error: BaseException) -> Exception:
    """Return an exception that says the same at the same place, without secrets or causes."""
    told = RuntimeError(redact(f"{type(error).__name__}: {error}"))
    return told.with_traceback(error.__traceback__)
