"""What keeps ranks together: decisions made at the same step, and an end to endless waits."""

import contextlib
import ctypes
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fasttrain.distributed.world import World
from fasttrain.printing import say

PR_SET_PDEATHSIG = 1  # of prctl(2)
LISTEN_EVERY_S = 0.5
_LONGEST_PAUSE_S = 2.0  # between two looks of a process that runs
# How long a job may be suspended: the timeouts of process groups, which count that time.
SUSPENDED_S = 7 * 86_400.0
AT_SAME_STEP_S = 60.0  # for the slowest rank to reach where it may be saved
_CALL, _STEP = "stop", "saves step of"


class Patience:
    """How long this process waits for others; time in which it was stopped does not count."""

    def __init__(self, seconds: float) -> None:
        self._left_s, self._then = seconds, time.monotonic()

    def is_over(self) -> bool:
        """Return whether the time is over; to be asked every second, or more often."""
        before, self._then = self._then, time.monotonic()
        self._left_s -= min(self._then - before, _LONGEST_PAUSE_S)
        return self._left_s < 0


def die_with_parent() -> None:
    """Have Linux send this process SIGTERM when torchrun's agent dies, however it dies.

    SIGUSR1 to torchrun kills the agent alone: its workers would run unsupervised.
    """
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def call_ranks(world: World) -> None:
    """Tell the other ranks at once that this one is to stop; from any thread.

    They learn it at the end of a step as well, but a step may last, as the first does, which
    compiles: then all must give it up, and save the state before it.
    """
    if world.store is not None:
        with contextlib.suppress(RuntimeError):  # the rank that keeps the store has ended
            world.store.set(_CALL, str(world.rank))


def differing_step(world: World, step: int) -> str | None:
    """Wait until all ranks said at which step they give up; return what prevents a common save.

    Once a process, from any thread: collectives belong to the training thread.
    """
    store, patience = world.store, Patience(AT_SAME_STEP_S)
    if store is None:
        return None
    try:
        store.set(f"{_STEP} {world.rank}", str(step))
        for rank in range(world.size):
            while not store.check([f"{_STEP} {rank}"]):
                if patience.is_over():
                    return f"rank {rank} did not come to an end within {AT_SAME_STEP_S:g} s"
                time.sleep(0.02)
            if (other := int(store.get(f"{_STEP} {rank}"))) != step:
                return f"rank {rank} is at step {other} and rank {world.rank} at step {step}"
    except RuntimeError:
        return "the rank that keeps the store has ended"
    return None


@contextlib.contextmanager
def hearing_ranks(world: World, heard: Callable[[int], None]) -> Iterator[None]:
    """Call ``heard`` once, in another thread, with the number of a rank that calls meanwhile."""
    store, over = world.store, threading.Event()
    if store is None:
        yield
        return

    def listen() -> None:
        with contextlib.suppress(RuntimeError):
            while not over.wait(LISTEN_EVERY_S):
                if store.check([_CALL]):
                    return heard(int(store.get(_CALL)))

    thread = threading.Thread(target=listen, name="fasttrain-calls", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LISTEN_EVERY_S)


class Lockstep:
    """Has the ranks of a run decide together, each time at the same step, and make progress.

    At each call every rank hands in a number, and all learn the maximum of the call before: the
    reduction runs on the hosts during the step. ``stop``: whether a rank, ``stopped_by``, was told
    to stop. ``time_over``: whether the time that a rank measured is over.

    A process without progress is ended, with every thread's stack on standard error: it would wait
    forever for a rank that is stopped or out of reach, or in a collective that does not match.
    torchrun then ends the other ranks.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        self.stop = self.time_over = False
        self.stopped_by = 0
        self.timeout_s = self.allowed_s = timeout_s
        self.deadline = math.inf  # on the clock that is below
        self._awake_s = 0.0  # how long the watchdog has run: a stopped process has no time
        self._world = world
        self._pending: tuple[Tensor, dist.Work | None] = torch.tensor(0, device="cpu"), None
        if world.size > 1:
            threading.Thread(target=self._watch, name="fasttrain-watchdog", daemon=True).start()

    def __call__(self, *, stop: bool, time_over: bool) -> None:
        """Hand in what holds for this rank; learn, on several one call late, what holds for all."""
        agreed = 2 + self._world.rank if stop else int(time_over)
        if group := self._world.control:
            mine, (before, work) = torch.tensor(agreed, device="cpu"), self._pending
            if work is not None:
                work.wait()
            agreed = int(before)
            self._pending = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group, async_op=True)
        self.beat()
        if agreed >= 2:
            self.stop, self.stopped_by = True, agreed - 2
        self.time_over |= agreed == 1

    def beat(self, timeout_s: float | None = None) -> None:
        """Note progress; the next is due in ``timeout_s`` (None: as set)."""
        self.allowed_s = timeout_s or self.timeout_s
        self.deadline = self._awake_s + self.allowed_s

    def _watch(self) -> None:
        # A job that is suspended, as by SIGSTOP or a laptop that sleeps, goes on when it wakes. A
        # rank that is stopped alone is found by the others.
        pause_s, then = min(self.timeout_s / 10, 1.0), time.monotonic()
        while self._awake_s <= self.deadline:
            time.sleep(pause_s)
            before, then = then, time.monotonic()
            self._awake_s += min(then - before, 2 * pause_s)
        message = (
            f"rank {self._world.rank}: no step has ended for {self.allowed_s:g} s "
            "(distributed.timeout_s; before the first step distributed.init_timeout_s): this rank "
            "hangs, or one that it waits for is stopped or out of reach. Where each thread is:\n"
        )
        say(message, end="", stream=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)
