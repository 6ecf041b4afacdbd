"""What all commands share: exit statuses, and errors as one line. Standard library only."""

import argparse
import contextlib
import errno
import functools
import importlib.util
import json
import math
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from fasttrain.config import UserError
from fasttrain.printing import say
from fasttrain.redact import redact

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: can be resumed
EXIT_INTERRUPTED, EXIT_NOT_READ = 130, 141  # as shells show an end by SIGINT, and by SIGPIPE
# How often an OpenMP thread that waits looks again before it sleeps. GCC's own 300,000 keep the
# core from other processes; without spinning, a run that is alone is slower
# (benchmarks/EXPERIMENTS.md). A run stops spinning while others use its cores:
# `fasttrain.device.CoreWatch`.
SPINS = "10000"
_OUT_OF_MEMORY = (
    "lower train.micro_batch (with train.tokens_per_step set the loss stays the same), let "
    'train.micro_batch="auto" choose it, or set train.activation_checkpointing=full'
)
# Errors of the system of which the name of a file or folder is the cause.
_OF_NAMES = {
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENXIO, errno.EILSEQ),
}
# Errors of a disk, and their remedies.
DISK_REMEDIES = {
    errno.ENOSPC: "free some space on this disk",
    errno.EDQUOT: "raise the disk quota or free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: "check the disk",
}
P = ParamSpec("P")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Print what a command raises, without secrets, and return its exit status.

    A `UserError` is one line and status 2, and so are a name that the system refuses and a full
    disk; Ctrl-C is one and 130, any other exception a traceback and status 1. If the reader of its
    output has gone, as after ``| head``, it ends silently.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        _open_closed_streams()
        with contextlib.suppress(AttributeError):  # a replaced stdout may lack it
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors on a CPU
        try:
            status = main(*args, **kwargs)
            sys.stdout.flush()
            return status
        except UserError as error:
            return _refused(error)
        except KeyboardInterrupt as error:
            tell(f"\ninterrupted{error}")
            return EXIT_INTERRUPTED
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads(out := sys.stdout.fileno()):
                os.dup2(os.open(os.devnull, os.O_WRONLY), out)
                return EXIT_NOT_READ
            if isinstance(error, OSError) and error.filename and error.errno in _OF_NAMES:
                named = os.fsdecode(error.filename)
                return _refused(UserError(f"{named}: {error.strerror}; name another place"))
            if isinstance(error, OSError) and (remedy := DISK_REMEDIES.get(error.errno or 0)):
                named = f"{os.fsdecode(error.filename)}: " if error.filename else ""
                return _refused(UserError(f"{named}{error.strerror}; {remedy}"))
            rank = os.environ.get("RANK")
            shown = traceback.format_exc().rstrip("\n")
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
                shown = f"error: {error}\n{_OUT_OF_MEMORY}"
            record(shown)
            tell(f"rank {rank}: {shown}" if rank else shown)
            return EXIT_FAILED

    return run


def _open_closed_streams() -> None:
    """Lead standard streams that were closed, as by ``>&-``, to the null device.

    Else the next files that are opened would have their numbers, and receive what C code prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        mode = "w" if number else "r"
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _refused(error: UserError) -> int:
    if not record(f"error: {error}") or os.environ.get("RANK") == "0":
        tell(f"error: {error}")
    return EXIT_BAD_INPUT


def _nobody_reads(file: int) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def record(text: str) -> bool:
    """Have torchrun's summary of a failed job show this; return whether it will."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            # torchrun may end this rank meanwhile, and itself fails on a file that is half written.
            with open(f"{file}.part", "w", encoding="utf-8") as part:
                json.dump({"message": redact(text), "timestamp": int(time.time())}, part)
            os.replace(f"{file}.part", file)
            return True
    return False


def check_system() -> None:
    """Refuse Windows, which lacks the file locks, reads and signals that runs and datasets need."""
    if importlib.util.find_spec("fcntl") is None:
        others = "fasttrain.Trainer and fasttrain_kernels work here too"
        raise UserError(f"this command needs Linux or macOS (on Windows: WSL); {others}")


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: by its affinity and by its control groups.

    A quota of 1.5 cores, as by ``docker run --cpus 1.5``, counts as two.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = float(cores or 1)
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
            groups = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            for group in (groups / path[1:], *(groups / path[1:]).parents):
                with contextlib.suppress(OSError, ValueError):  # "max" or -1: no limit
                    text = " ".join((group / name).read_text() for name in files)
                    used, period = map(int, text.split())
                    quota = min(quota, used / period if used > 0 else quota)
    return max(1, math.ceil(quota))


def make_parser(name: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return the parser of a command's arguments; its usage names the script or the module."""
    by_script = Path(sys.argv[0]).stem == "fasttrain"
    prog = f"fasttrain {name}" if by_script else f"python -m fasttrain.{name}"
    return argparse.ArgumentParser(prog=prog, description=description, **options)


def tell(text: str) -> None:
    """Print text to standard error, without secrets and control characters."""
    say(redact(text), stream=sys.stderr)
