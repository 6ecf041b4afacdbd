"""Signals: before training they interrupt; during it the first ends the run, a second at once.

Python runs a signal's handler in the main thread between two bytecodes: in the middle of whatever
that prints or locks, and not at all during a long call into C, as when it compiles or waits for a
disk. So while a run trains the handler does nothing. The system writes the number of each signal to
a pipe, and a thread that reads this pipe asks the run to stop.
"""

import contextlib
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
_OVER, _CALLED = 0, 255  # no signals have these numbers


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
    called_for = ""

    def call(reason: str) -> None:
        nonlocal called_for
        called_for = reason
        with contextlib.suppress(OSError):  # the run is over
            os.write(write_end, bytes([_CALLED]))

    def watch() -> None:
        first_s = 0.0
        late: threading.Timer | None = None
        while True:
            for number in os.read(read_end, 64):
                if number == _OVER:
                    if late is not None:
                        late.cancel()
                        late.join()
                    return
                if number not in (*SIGNALS, _CALLED):
                    continue
                if late is not None:
                    if number != _CALLED and time.monotonic() - first_s >= echo_s:
                        end_at_once(EXIT_FORCED)  # checkpoints on disk stay whole
                    continue
                first_s = time.monotonic()
                stop(called_for if number == _CALLED else signal.Signals(number).name)
                late = threading.Timer(patience_s(), rescue)
                late.daemon = True
                late.start()

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        with interruptible(lambda *_: None):
            yield call
    finally:
        signal.set_wakeup_fd(previous_fd)
        os.write(write_end, bytes([_OVER]))
        watcher.join()
        os.close(read_end)
        os.close(write_end)


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
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # pid (command) state ppid …, where the command may hold spaces and parentheses
            rest = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            parents[int(folder.name)] = int(rest[1])
    found = [ancestor]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]
