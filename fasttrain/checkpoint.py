"""Checkpoints that are whole or absent, verified to the last byte, and never executed.

A checkpoint is a folder of safetensors and text files, sealed by `manifest.json`:

    step-00001000/  model.safetensors  optimizer.safetensors …   one file a group of tensors
                    state.json  config.toml
                    manifest.json   bytes and SHA-256 of each file, and of the manifest itself

Commit protocol: every file is written into `.tmp-…` beside its place and fsynced; so is the folder;
then it is renamed, the parent is fsynced, and only then do the pointers `latest` and `best` (text
files with a folder's name) move, each by write, fsync, rename, fsync. A step that is saved again
moves the older folder to `.old-…` for that moment; readers take it where its successor is missing.

The training thread is held for one copy of the tensors into reused host buffers that are laid out
as the files are, so that the background thread hashes and writes them as they lie.

`python -m fasttrain.checkpoint PATH` lists and verifies a checkpoint or all those of a run.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain import checkpoint_files as disk
from fasttrain.checkpoint_files import CheckpointError, Snapshot, verify
from fasttrain.checkpoint_listing import main

__all__ = ["Checkpoint", "CheckpointError", "CheckpointWriter", "load", "main", "resolve", "verify"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A verified checkpoint. `tensors` are named `group.name`, as in `model.head.weight`."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    config_toml: str

    def group(self, stem: str) -> dict[str, Tensor]:
        """The tensors of one file, by the names they were saved under."""
        prefix = f"{stem}."
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


class CheckpointWriter:
    """Writes the checkpoints of one run folder and keeps the last few and the best.

    Args:
        folder: `<run>/checkpoints`; made if missing. One process at a time may write to it.
        keep_last: how many verified checkpoints to keep beside the best, at least 1.
        asynchronous: write in a background thread; otherwise `save` returns after the commit.

    Raises:
        CheckpointError: the folder cannot be made.

    Memory: one host copy of what is saved (pinned for CUDA tensors), kept for the next save.
    """

    def __init__(self, folder: Path, *, keep_last: int, asynchronous: bool = True) -> None:
        if keep_last < 1:
            raise CheckpointError(f"checkpoint.keep_last must be at least 1, got {keep_last}")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self.stall_s = 0.0
        self._snapshots: dict[str, Snapshot] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._verdicts: dict[Path, tuple[object, bool]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            disk.fsync_folder(self.folder.parent)
        except OSError as error:
            raise disk.failure(f"cannot make the checkpoint folder {self.folder}", error) from error

    def save(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        config_toml: str,
        *,
        metric: float | None = None,
    ) -> Path:
        """Takes a snapshot now and commits it in the background; later updates do not reach it.

        One save is in flight at a time: a second waits for the first. `stall_s` is then the time
        for which the caller was held.

        Args:
            step: optimizer updates done so far; the folder is named after it. A step that was
                saved before is replaced.
            groups: file stem → tensors, of any device.
            state: what JSON can hold, finite numbers only.
            config_toml: the resolved configuration.
            metric: validation loss; `best` moves to the lowest of the checkpoints that verify.

        Returns:
            The folder, which exists once `wait` has returned.

        Raises:
            CheckpointError: the save before this one failed (then this one was not begun: call
                again), or this one, if it is synchronous or its arguments are unfit.
        """
        started = time.perf_counter()
        self.wait()
        try:
            state_json = json.dumps(state, indent=1, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint: state is not JSON ({error}); use finite numbers, strings, lists and "
                "string-keyed dicts, null for what is unknown"
            ) from error
        if bad := [s for s in groups if "." in s or not disk.FILE.fullmatch(s)]:
            raise CheckpointError(f"checkpoint: group {bad[0]!r} cannot name a file")
        copied = self._snapshot(groups)
        texts = {"state.json": state_json, "config.toml": config_toml.encode()}
        rated = float(metric) if metric is not None and math.isfinite(metric) else None
        arguments = (step, tuple(groups), texts, rated, copied)
        if self.asynchronous:
            self._thread = threading.Thread(
                target=self._write_in_background, args=arguments, name="checkpoint"
            )
            self._thread.start()
        else:
            self._write(*arguments)
        self.stall_s = time.perf_counter() - started
        return self._path(step)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def wait(self) -> None:
        """Returns when the save in flight is committed; raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits as `wait` does and frees the buffers."""
        try:
            self.wait()
        finally:
            self._snapshots.clear()

    def _snapshot(self, groups: Mapping[str, Mapping[str, Tensor]]) -> list[torch.cuda.Event]:
        for stem, tensors in groups.items():
            kept = self._snapshots.get(stem)
            if kept is None or kept.signature != Snapshot.describe(tensors):
                self._snapshots[stem] = Snapshot(stem, tensors)
        devices = {t.device for group in groups.values() for t in group.values() if t.is_cuda}
        with contextlib.ExitStack() as stack:
            for device in devices:
                if device not in self._streams:
                    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                    self._streams[device] = stream
                side = self._streams[device]
                side.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(side))
            for stem, tensors in groups.items():
                self._snapshots[stem].copy_from(tensors)
        events = [self._streams[device].record_event() for device in devices]
        for event, device in zip(events, devices, strict=True):
            # The next update may not overwrite what is still being copied.
            torch.cuda.current_stream(device).wait_event(event)
        return events

    def _write_in_background(self, *arguments: Any) -> None:
        try:
            if sys.platform == "linux":  # there a thread has a priority of its own: training first
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            self._write(*arguments)
        except BaseException as error:
            self._error = error

    def _write(
        self,
        step: int,
        stems: tuple[str, ...],
        texts: dict[str, bytes],
        metric: float | None,
        copied: list[torch.cuda.Event],
    ) -> None:
        path = self._path(step)
        for event in copied:
            event.synchronize()
        for stem in stems:
            if name := self._snapshots[stem].first_nonfinite():
                raise CheckpointError(
                    f"checkpoint: {stem}.{name} is not finite at step {step}: not saved; resume "
                    "from the last checkpoint with a lower learning rate or other data"
                )
        partial = self.folder / f".tmp-{path.name}-{os.getpid()}"
        old = self.folder / f".old-{path.name}"
        committed = False
        try:
            disk.sweep(self.folder)
            older = disk.history(self.folder)
            os.mkdir(partial)
            files = {
                f"{stem}.safetensors": disk.write_file(
                    partial / f"{stem}.safetensors",
                    self._snapshots[stem].header,
                    self._snapshots[stem].buffer.numpy(),
                )
                for stem in stems
            }
            files |= {name: disk.write_file(partial / name, text) for name, text in texts.items()}
            manifest = {
                **disk.FORMAT,
                "commit": 1 + max((m["commit"] for _, m in older if m), default=0),
                "step": step,
                "metric": metric,
                "files": files,
            }
            disk.write_file(partial / disk.MANIFEST, disk.seal(manifest))
            disk.fsync_folder(partial)
            if path.exists():
                os.rename(path, old)
                disk.fsync_folder(self.folder)
            os.rename(partial, path)
            disk.fsync_folder(self.folder)
            committed = True
            self._verdicts[path] = (disk.signature(path), True)
            disk.point(self.folder / "latest", path.name)
            self._retain(path)
            disk.remove(old)
        except OSError as error:
            if not committed:
                with contextlib.suppress(OSError):
                    if old.exists() and not path.exists():
                        os.rename(old, path)
                with contextlib.suppress(OSError):
                    disk.remove(partial)
            done = "is complete, but tidying up failed" if committed else "was not saved"
            raise disk.failure(f"{path} {done}", error) from error

    def _verified(self, path: Path) -> bool:
        """Hashes a folder once; again only when the system has seen one of its files change."""
        now = disk.signature(path)
        seen, verdict = self._verdicts.get(path, (None, False))
        if seen != now:
            verdict = True
            try:
                verify(path)
            except CheckpointError:
                verdict = False
            self._verdicts[path] = (now, verdict)
        return verdict

    def _retain(self, newest: Path) -> None:
        """Moves `best`, then removes what lies behind the last `keep_last` verified ones."""
        found = disk.history(self.folder)
        good = [(path, m) for path, m in found if m and self._verified(path)]
        rated = [(m["metric"], m["commit"], path) for path, m in good if m["metric"] is not None]
        best = min(rated)[2] if rated else None
        if best is not None and disk.pointed(self.folder / "best") != best.name:
            disk.point(self.folder / "best", best.name)
        if len(good) < self.keep_last:
            return
        kept = {path for path, _ in good[: self.keep_last]} | {newest, best}
        paths = [path for path, _ in found]
        for path in paths[paths.index(good[self.keep_last - 1][0]) :]:
            if path not in kept:
                # Renamed first: a crash half-way leaves a stale partial folder, not a damaged one.
                doomed = self.folder / f".tmp-removed-{path.name}"
                os.rename(path, doomed)
                disk.remove(doomed)


def load(
    path: Path, *, map_location: str | torch.device = "cpu", only: Collection[str] | None = None
) -> Checkpoint:
    """Reads a checkpoint folder, verifying every byte as it is read; nothing in it is executed.

    Args:
        path: a checkpoint folder, as `resolve` returns it.
        map_location: the device of the tensors.
        only: the groups to keep (all are verified); all of them if None.

    Raises:
        CheckpointError: anything in the folder is missing, additional, damaged or malformed.

    Memory: CPU tensors are views into one buffer a file, which lives as long as any of them.
    """
    path = Path(path)
    manifest = disk.read_manifest(path)
    tensors: dict[str, Tensor] = {}
    texts: dict[str, bytes] = {}
    for name, entry in manifest["files"].items():
        stem, _, kind = name.rpartition(".")
        wanted = kind != "safetensors" or only is None or stem in only
        data = disk.read_file(path / name, entry, keep=wanted)
        if data is None:
            continue
        if kind == "safetensors":
            for key, tensor in disk.as_tensors(path / name, data).items():
                tensors[f"{stem}.{key}"] = tensor.to(map_location)
        else:
            texts[name] = data.numpy().tobytes()
    state = disk.parse_json(path / "state.json", texts["state.json"])
    config_toml = texts["config.toml"].decode(errors="replace")
    return Checkpoint(
        path=path, step=manifest["step"], tensors=tensors, state=state, config_toml=config_toml
    )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def resolve(
    run_or_checkpoint: Path, which: str = "auto", *, report: Callable[[str], None] = _to_stderr
) -> Path:
    """The verified checkpoint folder that a run folder, its `checkpoints` or a checkpoint names.

    Args:
        run_or_checkpoint: a checkpoint folder is taken as it is, whatever `which` says.
        which: `auto`: the newest that verifies; `latest`, `best`: that one or an error.
        report: called with a line for each checkpoint that `auto` passes over.

    Raises:
        CheckpointError: there is none, or the one that was named does not verify.
    """
    path = Path(run_or_checkpoint)
    if which not in ("auto", "latest", "best"):
        raise CheckpointError(f"checkpoint: which must be auto, latest or best, got {which!r}")
    found = disk.candidates(path)
    if found == [path]:
        verify(path)
        return path
    if which != "auto":
        name = disk.pointed(found[0].parent / which)
        named = next((p for p in found if p.name.removeprefix(".old-") == name), None)
        if named is None:
            raise CheckpointError(f"{path}: has no {which!r} checkpoint; use 'auto' for the newest")
        verify(named)
        return named
    for candidate in found:
        try:
            verify(candidate)
        except CheckpointError as error:
            report(f"WARNING: passing over a damaged checkpoint: {error}")
        else:
            return candidate
    raise CheckpointError(
        f"{path}: none of its {len(found)} checkpoints verifies; restore one from a copy, or "
        "start a new run under another name"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
