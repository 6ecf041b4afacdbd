"""Signals: before training they interrupt; during it the first ends the run, a second at once.

Python runs a signal's handler in the main thread between two bytecodes: in the middle of whatever
that prints or locks, and not at all during a long call into C, as when it compiles or waits for a
disk. So while a run trains the handler does nothing. The system writes the number of each signal to
a pipe, and a thread that reads this pipe asks the run to stop.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_FORCED = 1
# A terminal's Ctrl-C and a scheduler signal torchrun and all ranks, and torchrun signals these too.
ECHO_S = 3.0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def interruptible(handler: Callable[[int, FrameType | None], None] = _interrupt) -> Iterator[None]:
    """Call ``handler`` in the main thread at a signal; by default raise KeyboardInterrupt."""
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def stop_signals(
    *,
    stop: Callable[[str], None],
    rescue: Callable[[], None],
    patience_s: Callable[[], float],
    echo_s: float = 0.0,
) -> Iterator[Callable[[str], None]]:
    """While this context lasts, signals end the run; a second one ends the process with status 1.

    ``stop`` is called at the first signal with its name, and must return at once. ``rescue`` is
    called if the run has not ended `patience_s()` after that; it ends the process if it can. Both
    run in other threads. Signals within ``echo_s`` of the first are its echo, and ignored.

    Yields a function that ends the run as a first signal does, for a reason and from any thread.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # as `signal.set_wakeup_fd` demands
    lock, first_s = threading.Lock(), math.inf
    late: threading.Timer | None = None

    def call(reason: str) -> None:
        nonlocal first_s, late
        with lock:
            if late is None:
                first_s = time.monotonic()
                stop(reason)
                late = threading.Timer(patience_s(), rescue)
                late.daemon = True
                late.start()

    def watch() -> None:
        while number := os.read(read_end, 1)[0]:
            if number in SIGNALS and time.monotonic() - first_s >= echo_s:
                end_at_once(EXIT_FORCED)  # checkpoints on disk stay whole
            elif number in SIGNALS:
                call(signal.Signals(number).name)

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        with interruptible(lambda *_: None):
            yield call
    finally:
        signal.set_wakeup_fd(previous_fd)
        os.write(write_end, b"\0")  # no signal has this number
        watcher.join()
        os.close(read_end)
        os.close(write_end)
        if late is not None:
            late.cancel()
            late.join()


def end_at_once(status: int) -> None:
    """End this process and all that it started; nothing is waited for or cleaned up."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")  # a progress bar hides the cursor
    for child in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
    os._exit(status)


def _descendants(ancestor: int) -> list[int]:
    """Return the processes that a process started, and those that they started; [] off Linux."""
    found = [ancestor]
    for pid in found:
        for file in Path(f"/proc/{pid}/task").glob("*/children"):  # by thread
            with contextlib.suppress(OSError):
                found += map(int, file.read_text().split())
    return found[1:]
