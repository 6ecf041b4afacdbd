"""How the checkpoints of a run are written: snapshot, files, commit, and which are kept.

The protocol is described in `fasttrain.checkpoint`, that of several ranks in `ranks`.
"""

import contextlib
import json
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import CheckpointError
from fasttrain.checkpoint.mirror import Mirror
from fasttrain.checkpoint.ranks import Ranks, SliceNumbers, own_slices
from fasttrain.checkpoint.reading import parse, verify
from fasttrain.command import tell

_BULKY = 64 << 20  # bytes; fewer take some milliseconds, and are better written soon


@dataclass(frozen=True, kw_only=True, slots=True)
class _Save:
    """What one save writes, beside the snapshots."""

    step: int
    path: Path
    partial: Path
    names: dict[str, str]  # of this rank's files, by group
    slices: SliceNumbers
    texts: dict[str, bytes]
    metric: float | None
    copied: list[torch.cuda.Event]


class CheckpointWriter:
    """Writes the checkpoints of one run folder; keeps the last `keep_last` verified and the best.

    Unless `asynchronous`, `save` returns after the commit. With several ranks each has a writer,
    all with one new `session`; they save at the same steps, and wait `patience_s` for each other.
    `warn` is called, in any thread, if a checkpoint is complete but older ones could not be
    removed. A `mirror`, on rank 0, is told of each commit.

    Memory: one host copy of what is saved (pinned for CUDA tensors), kept for the next save.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        asynchronous: bool = True,
        rank: int = 0,
        world_size: int = 1,
        session: str = "",
        patience_s: float = 600.0,
        warn: Callable[[str], None] = tell,
        mirror: Mirror | None = None,
    ) -> None:
        self.folder, self.mirror = Path(folder), mirror
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self._ranks = Ranks(self.folder, rank, world_size, session, patience_s)
        self.pinned = True  # buffers for CUDA tensors; else copies to them take longer
        self._warn = warn
        self._n_begun = 0
        self._snapshots: dict[str, Snapshot] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._verified: dict[Path, object] = {}  # with what `disk.signature` was then
        with disk.failing(f"cannot make the checkpoint folder {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            disk.fsync_folder(self.folder.parent)

    def save(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        config_toml: str,
        *,
        metric: float | None = None,
    ) -> Path:
        """Take a snapshot now and commit it in the background; later updates do not reach it.

        With several ranks, each takes its slice of every DTensor; any other tensor is taken by rank
        0, or by rank 3 if its name ends in `@3`. `state`, `config_toml` and `metric` are rank 0's.

        A save waits for the one before. `best` moves to the lowest `metric` of the checkpoints that
        verify. The folder that is returned exists once `wait` has returned.

        Raises CheckpointError if the save before this one failed (then call again: this one was not
        begun), or this one, if it is synchronous or its arguments are unfit.
        """
        self.wait()
        self._n_begun += 1
        try:
            state_json = json.dumps(state, indent=1, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint: state is not JSON ({error}); use finite numbers, strings, lists and "
                "string-keyed dicts, null for what is unknown"
            ) from error
        rank = self._ranks.rank
        own, slices = own_slices(groups, rank)
        if rank:
            own = {stem: tensors for stem, tensors in own.items() if tensors}
        mark = f".rank-{rank:05d}"
        names = {s: f"{s}{mark if rank or slices[s] else ''}.safetensors" for s in own}
        path = self.folder / f"step-{step:08d}"
        save = _Save(
            step=step,
            path=path,
            partial=self._ranks.partial(path, self._n_begun),
            names=names,
            slices={name: slices[stem] for stem, name in names.items() if slices[stem]},
            texts={"state.json": state_json, "config.toml": config_toml.encode()},
            metric=float(metric) if metric is not None and math.isfinite(metric) else None,
            copied=self._snapshot(own),
        )
        if self.asynchronous:
            run, name = self._write_in_background, f"checkpoint of rank {rank}"
            self._thread = threading.Thread(target=run, args=(save,), name=name)
            self._thread.start()
        else:
            self._write(save)
        return path

    def wait(self) -> None:
        """Wait until the save in flight is committed; CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def abandon(self) -> None:
        """Wait for other ranks no more: the run ends by an error, and they may be gone."""
        self._ranks.abandoned.set()

    def close(self) -> None:
        """Wait as `wait` does, and free the buffers."""
        try:
            self.wait()
        finally:
            self._snapshots.clear()

    def _snapshot(self, groups: Mapping[str, Mapping[str, Tensor]]) -> list[torch.cuda.Event]:
        for stem, tensors in groups.items():
            kept = self._snapshots.get(stem)
            if kept is None or kept.signature != Snapshot.describe(tensors):
                self._snapshots[stem] = Snapshot(stem, tensors, pinned=self.pinned)
        devices = {t.device for group in groups.values() for t in group.values() if t.is_cuda}
        with contextlib.ExitStack() as stack:
            for device in devices - self._streams.keys():
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for device in devices:
                self._streams[device].wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(self._streams[device]))
            for stem, tensors in groups.items():
                self._snapshots[stem].copy_from(tensors)
        events = [self._streams[device].record_event() for device in devices]
        for event, device in zip(events, devices, strict=True):
            # The next update may not overwrite what is still being copied.
            torch.cuda.current_stream(device).wait_event(event)
        return events

    def _write_in_background(self, save: _Save) -> None:
        try:
            for device in self._streams:  # to wait in another's context would open one there
                torch.cuda.set_device(device)
            if sum(self._snapshots[stem].content.nbytes for stem in save.names) > _BULKY:
                disk.give_way()
            self._write(save)
        except BaseException as error:
            self._error = error

    def _write(self, save: _Save) -> None:
        for event in save.copied:
            event.synchronize()
        if self._ranks.rank == 0:
            self._commit(save)
            if self.mirror:
                self.mirror.wake()
            return
        with disk.failing(f"{save.path} was not saved"):
            try:
                self._write_part(save)
            except FileNotFoundError:
                pass  # rank 0 has given up, and says why
            except (OSError, CheckpointError) as error:
                with contextlib.suppress(OSError):
                    for name in save.names.values():
                        disk.remove(save.partial / name)
                with contextlib.suppress(OSError):
                    save.partial.mkdir(exist_ok=True)
                    self._ranks.hand_in(save.partial, error=str(error))
                raise
        self._ranks.await_commit(save.partial, save.path)

    def _write_part(self, save: _Save) -> dict[str, dict[str, Any]]:
        """Write this rank's tensors."""
        for stem in save.names:
            if name := self._snapshots[stem].first_nonfinite():
                raise CheckpointError(
                    f"checkpoint: {stem}.{name} is not finite at step {save.step}: not saved; "
                    "resume from the last checkpoint with a lower learning rate or other data"
                )
        save.partial.mkdir(exist_ok=self._ranks.size > 1)  # another rank may have made it
        files = {
            name: disk.write_file(save.partial / name, self._snapshots[stem].content.numpy())
            for stem, name in save.names.items()
        }
        self._ranks.hand_in(save.partial, files=files, slices=save.slices)
        return files

    def _commit(self, save: _Save) -> None:
        path, partial = save.path, save.partial
        old = self.folder / f".old-{path.name}"
        try:
            with disk.failing(f"{path} was not saved"):
                self._write_whole(save)
                if path.exists():
                    os.rename(path, old)
                    disk.fsync_folder(self.folder)
                os.rename(partial, path)
                disk.fsync_folder(self.folder)
        except CheckpointError as error:
            with contextlib.suppress(OSError):
                self._ranks.give_up(partial, error)
            with contextlib.suppress(OSError):
                if old.exists() and not path.exists():
                    os.rename(old, path)
            with contextlib.suppress(OSError):
                disk.remove(partial)
            raise
        try:  # it is saved, on the other ranks as well: no failure here is one of the save
            with disk.failing(f"{path} is complete, but tidying up failed"):
                self._verified[path] = disk.signature(path)
                disk.point(self.folder / "latest", path.name)
                self._retain(path)
                disk.remove(old)
                self._ranks.committed()
        except CheckpointError as error:
            self._warn(str(error))

    def _write_whole(self, save: _Save) -> None:
        """Write all but what other ranks write, and check that a run could resume from it."""
        partial = save.partial
        disk.sweep(self.folder, spare=self._ranks.spared(partial))
        files = self._write_part(save)
        for name, text in save.texts.items():
            files[name] = disk.write_file(partial / name, text)
        commits = [m["commit"] for _, m in disk.history(self.folder) if m]
        commits += [self.mirror.last_commit] if self.mirror else []
        manifest = {
            **disk.FORMAT,
            "commit": 1 + max(commits, default=0),
            "step": save.step,
            "metric": save.metric,
            "files": files,
        }
        if self._ranks.size > 1:
            files |= self._ranks.collect(partial, save.path)
            manifest |= {**disk.SEVERAL, "ranks": self._ranks.size, "save": partial.name}
        disk.write_file(partial / disk.MANIFEST, disk.seal(manifest))
        try:
            parse(partial)
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{partial}{os.sep}")
            raise CheckpointError(
                f"{save.path} was not saved, because no run could resume from it: {reason}"
            ) from error
        disk.fsync_folder(partial)

    def _is_sound(self, path: Path) -> bool:
        """Hash a folder once; again only if the system has seen one of its files change."""
        now = disk.signature(path)
        if self._verified.get(path) != now:
            try:
                verify(path)
            except CheckpointError:
                return False
            self._verified[path] = now
        return True

    def _retain(self, newest: Path) -> None:
        """Move `best`, then remove what is older than the last `keep_last` verified ones."""
        found = disk.history(self.folder)
        good = [(path, m) for path, m in found if m and self._is_sound(path)]
        best = disk.best(dict(good))
        if best is not None and disk.pointed(self.folder / "best") != best.name:
            disk.point(self.folder / "best", best.name)
        if len(good) < self.keep_last:
            return
        kept = {path for path, _ in good[: self.keep_last]} | {newest, best}
        kept |= {self.mirror.copying} if self.mirror else set()
        paths = [path for path, _ in found]
        for path in paths[paths.index(good[self.keep_last - 1][0]) :]:
            if path not in kept:
                # Renamed first: a crash half-way leaves a stale partial folder, not a damaged one.
                doomed = self.folder / f".tmp-removed-{path.name}"
                os.rename(path, doomed)
                disk.remove(doomed)


class Snapshot:
    """One group of tensors in a reused host buffer, laid out as its safetensors file."""

    def __init__(self, stem: str, tensors: Mapping[str, Tensor], *, pinned: bool = True) -> None:
        self.signature = self.describe(tensors)
        # Wide dtypes first, as the safetensors library orders them: every view is then aligned.
        self.names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
        header: dict[str, Any] = {}
        end = 0
        for name in self.names:
            tensor, begin = tensors[name], end
            if tensor.dtype not in disk.DTYPE_NAMES:
                raise disk.CheckpointError(
                    f"checkpoint: {stem}.{name} has dtype {tensor.dtype}, which safetensors does "
                    "not hold; convert it before saving"
                )
            end += tensor.numel() * tensor.element_size()
            dtype, shape = disk.DTYPE_NAMES[tensor.dtype], list(tensor.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)
        text = len(text).to_bytes(8, "little") + text
        self.cuda = any(t.is_cuda for t in tensors.values())
        size = len(text) + end
        pinned = self.cuda and pinned
        self.content = self._pinned(size) if pinned else torch.empty(size, dtype=torch.uint8)
        self.content[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.buffer = self.content[len(text) :]
        parts = [self.buffer[slice(*header[name]["data_offsets"])] for name in self.names]
        like = [tensors[name] for name in self.names]
        self.views = [p.view(t.dtype).view_as(t) for p, t in zip(parts, like, strict=True)]

    def _pinned(self, size: int) -> Tensor:
        """Return pinned memory, or ordinary memory if it cannot be pinned.

        Torch's allocator of pinned memory rounds up to a power of two, 17 GiB to 32. Here the pages
        themselves are registered, for as long as this object lives.
        """
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room = torch.frombuffer(pages, dtype=torch.uint8)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(room.data_ptr(), size, 0)) == 0:
            release = weakref.finalize(self, runtime.cudaHostUnregister, room.data_ptr())
            release.atexit = False  # the system does it, and CUDA may be gone
        else:  # copies then make the device wait, and the next launch reports the error again
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda")
        return room

    @staticmethod
    def describe(tensors: Mapping[str, Tensor]) -> object:
        return [(n, t.dtype, t.shape, t.is_cuda) for n, t in sorted(tensors.items())]

    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        for name, view in zip(self.names, self.views, strict=True):
            view.copy_(tensors[name].detach(), non_blocking=self.cuda)

    def first_nonfinite(self) -> str | None:
        """Return the name of a tensor that is not finite; releases the GIL, starts no thread.

        Apart from the sign, what is not finite has greater bits than the greatest finite number.
        """
        for name, view in zip(self.names, self.views, strict=True):
            if not view.is_floating_point() or not view.numel():
                continue
            raw, size = view.flatten().view(torch.uint8).numpy(), view.element_size()
            last = torch.tensor([torch.finfo(view.dtype).max], dtype=torch.float64).to(view.dtype)
            finite = int.from_bytes(last.view(torch.uint8).tolist(), sys.byteorder)
            positive, negative = int(raw.view(f"i{size}").max()), int(raw.view(f"u{size}").max())
            if positive > finite or negative > finite + (1 << 8 * size - 1):
                return name
        return None
