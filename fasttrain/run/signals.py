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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_FORCED = 1
_OVER, _CALLED = 0, 255  # no signals have these numbers


class Interrupted(KeyboardInterrupt):
    """A signal came before training had begun."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextlib.contextmanager
def interruptible(handler: Callable[[int, FrameType | None], None] = _raise) -> Iterator[None]:
    """Call ``handler`` in the main thread when a signal comes; by default raise `Interrupted`."""
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@dataclass(kw_only=True)
class StopSignals:
    """While this context lasts, signals end the run; a second one ends the process with status 1.

    ``stop`` is called at the first signal with its name, and must return at once. ``rescue`` is
    called if the run has not ended `patience_s()` after that; it ends the process if it can. Both
    run in other threads. Signals within ``echo_s`` of the first are its echo, and ignored.
    """

    stop: Callable[[str], None]
    rescue: Callable[[], None]
    patience_s: Callable[[], float]
    echo_s: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event, init=False)
    _reason: str = field(default="", init=False)

    def __enter__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)  # as `signal.set_wakeup_fd` demands
        self._threads = [threading.Thread(target=self._watch, name="signals", daemon=True)]
        self._threads[0].start()
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._write_end, bytes([_OVER]))
        for thread in self._threads:
            thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    def call(self, reason: str) -> None:
        """End the run as a first signal does, from any thread; ignored after one."""
        self._reason = reason
        with contextlib.suppress(OSError):  # it is over
            os.write(self._write_end, bytes([_CALLED]))

    def _watch(self) -> None:
        first_s: float | None = None
        while True:
            for number in os.read(self._read_end, 64):
                if number == _OVER:
                    return
                if number not in (*SIGNALS, _CALLED):
                    continue
                if first_s is not None:
                    if number != _CALLED and time.monotonic() - first_s >= self.echo_s:
                        end_at_once(EXIT_FORCED)  # checkpoints on disk stay whole
                    continue
                first_s = time.monotonic()
                self.stop(self._reason if number == _CALLED else signal.Signals(number).name)
                late = threading.Thread(target=self._wait, name="rescue", daemon=True)
                self._threads.append(late)
                late.start()

    def _wait(self) -> None:
        if not self._over.wait(self.patience_s()):
            self.rescue()


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
