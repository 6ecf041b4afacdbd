"""How the checkpoints of a run are written: snapshot, files, commit, and which are kept.

The protocol is described in `fasttrain.checkpoint`, that of several ranks in `ranks`.
"""

import contextlib
import json
import math
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import CheckpointError
from fasttrain.checkpoint.ranks import Ranks, SliceNumbers, own_slices
from fasttrain.checkpoint.reading import parse, verify
from fasttrain.command import tell
from fasttrain.distributed.world import World
from fasttrain.storage import sync_folder

if TYPE_CHECKING:
    from fasttrain.mirror import Mirror

_BULKY = 64 << 20  # bytes; fewer take some milliseconds, and are better written soon
_ALONE = World()


class _Save(NamedTuple):
    """What one save writes, beside the snapshots."""

    path: Path
    partial: Path
    facts: dict[str, Any]  # for the manifest
    texts: dict[str, bytes]
    slices: SliceNumbers
    copied: list[torch.cuda.Event]
    unchecked: frozenset[str]  # tensors that need not be finite


class CheckpointWriter:
    """Writes the checkpoints of one run folder; keeps the last `keep_last` verified and the best.

    Unless `asynchronous`, `save` returns after the commit. Of several ranks of a `world` each has a
    writer, made and called at the same steps; they wait `patience_s` for each other. `warn` is
    called, in any thread, if a checkpoint is complete but older ones could not be removed. A
    `mirror`, on rank 0, is told of each commit.

    Memory: one host copy of what is saved (pinned for CUDA tensors, unless the first save is
    synchronous), kept for the next save.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        asynchronous: bool = True,
        world: World = _ALONE,
        patience_s: float = 600.0,
        warn: Callable[[str], None] = tell,
        mirror: "Mirror | None" = None,
    ) -> None:
        self.folder, self.mirror = Path(folder), mirror
        self.keep_last, self.asynchronous = keep_last, asynchronous
        self._ranks, self._warn = Ranks(world, patience_s), warn
        self._n_begun = 0
        self._snapshots: dict[str, Snapshot] = {}  # by file
        self._in_flight: Future[None] | None = None
        self._verified: dict[Path, object] = {}  # with what `disk.signature` was then
        with disk.failing(f"cannot make the checkpoint folder {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)

    def save(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        config_toml: str,
        *,
        metric: float | None = None,
        unchecked: Collection[str] = (),
    ) -> Path:
        """Take a snapshot now and commit it in the background; later updates do not reach it.

        With several ranks, each takes its slice of every DTensor; any other tensor is taken by rank
        0, or by rank 3 if its name ends in `@3`. `state`, `config_toml` and `metric` are rank 0's.

        A save waits for the one before. `best` moves to the lowest `metric` of the checkpoints that
        verify. The folder that is returned exists once `wait` has returned. ``unchecked`` names
        tensors, as ``model.mask``, that need not be finite.

        Raises CheckpointError if the save before this one failed (then call again: this one was not
        begun), or this one, if it is synchronous or its arguments are unfit.
        """
        self.wait()
        refuse_unsavable(groups)
        self._n_begun += 1
        try:
            state_json = json.dumps(state, indent=1, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint: state is not JSON ({error}); use finite numbers, strings, lists and "
                "string-keyed dicts, null for what is unknown"
            ) from error
        metric = float(metric) if metric is not None and math.isfinite(metric) else None
        own, slices = own_slices(groups, self._ranks.rank)
        path = self.folder / f"step-{step:08d}"
        save = _Save(
            path,
            partial=self.folder / f".tmp-{path.name}{self._ranks.mark}{self._n_begun}",
            facts={"step": step, "metric": metric},
            texts={"state.json": state_json, "config.toml": config_toml.encode()},
            slices=slices,
            copied=self._snapshot(own),
            unchecked=frozenset(unchecked),
        )
        name = f"checkpoint of rank {self._ranks.rank}"
        thread = ThreadPoolExecutor(1, thread_name_prefix=name)  # a new one: priorities only fall
        self._in_flight = thread.submit(self._write, save)
        thread.shutdown(wait=False)
        if not self.asynchronous:
            self.wait()
        return path

    def wait(self) -> None:
        """Wait until the save in flight is committed; CheckpointError if it failed."""
        error = self._in_flight.exception() if self._in_flight else None
        self._in_flight = None
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

    def _snapshot(self, files: Mapping[str, Mapping[str, Tensor]]) -> list[torch.cuda.Event]:
        """Begin to copy; return what happens when that is done."""
        kept, self._snapshots = self._snapshots, {}
        for file, tensors in files.items():
            snapshot = kept.get(file)
            if snapshot is None or not snapshot.fits(tensors):
                snapshot = Snapshot(file.partition(".")[0], tensors, pinned=self.asynchronous)
            snapshot.copy_from(tensors)  # the next update, on the same stream, comes after it
            self._snapshots[file] = snapshot
        devices = {t.device for tensors in files.values() for t in tensors.values() if t.is_cuda}
        return [torch.cuda.current_stream(device).record_event() for device in devices]

    def _write(self, save: _Save) -> None:
        """Write what this rank writes of a checkpoint, in a thread of its own."""
        for event in save.copied:
            torch.cuda.set_device(event.device)  # waiting would open a context on another
            event.synchronize()
        n_bytes = sum(snapshot.content.nbytes for snapshot in self._snapshots.values())
        if self.asynchronous and n_bytes > _BULKY:
            disk.give_way()
        with disk.failing(f"{save.path} was not saved"):
            if self._ranks.rank == 0:
                self._commit(save)
            else:
                try:
                    self._write_part(save)
                except (OSError, CheckpointError) as error:
                    self._ranks.fail(save.partial, error)
                self._ranks.await_commit(save.partial, save.path)
        if self.mirror:
            self.mirror.wake()

    def _write_part(self, save: _Save) -> dict[str, Any]:
        """Write this rank's tensors; return the entries of their files."""
        save.partial.mkdir(exist_ok=True)  # another rank may have made it
        files = {}
        for file, snapshot in self._snapshots.items():
            group = file.partition(".")[0]
            if name := snapshot.first_nonfinite(group, save.unchecked):
                raise CheckpointError(
                    f"checkpoint: {group}.{name} is not finite at step "
                    f"{save.facts['step']}: not saved; resume from the last checkpoint with a "
                    "lower learning rate or other data"
                )
            files[file] = disk.write_file(save.partial / file, snapshot.content.numpy())
        if self._ranks.size > 1:
            self._ranks.hand_in(save.partial, files=files, slices=save.slices)
        return files

    def _commit(self, save: _Save) -> None:
        ranks, path, partial = self._ranks, save.path, save.partial
        old = self.folder / f".old-{path.name}"
        with contextlib.suppress(OSError):
            disk.sweep(self.folder, spare=ranks.mark)
        try:
            with disk.failing(f"{path} was not saved"):
                older = disk.history(self.folder)
                manifest = self._write_whole(save, older)
                if path.exists():
                    os.rename(path, old)
                    sync_folder(self.folder)
                os.rename(partial, path)
                sync_folder(self.folder)
        except CheckpointError as error:
            with contextlib.suppress(OSError):
                if old.exists() and not path.exists():
                    os.rename(old, path)
                disk.remove(partial)
            with contextlib.suppress(OSError):
                ranks.give_up(partial, error)
            raise
        try:  # it is saved, on the other ranks as well: no failure here is one of the save
            with disk.failing(f"{path} is complete, but tidying up failed"):
                self._verified[path] = disk.signature(path)
                disk.point(self.folder / "latest", path.name)
                self._retain([(path, manifest), *(found for found in older if found[0] != path)])
                # No rank waits any more for what failed earlier; some may have begun the next.
                disk.sweep(self.folder, spare=f"{ranks.mark}{self._n_begun + 1}")
        except CheckpointError as error:
            self._warn(str(error))

    def _write_whole(self, save: _Save, older: disk.History) -> dict[str, Any]:
        """Write all but what other ranks write, and check that a run could resume from it."""
        partial, files = save.partial, self._write_part(save)
        for name, text in save.texts.items():
            files[name] = disk.write_file(partial / name, text)
        commits = [m["commit"] for _, m in older if m]
        commits += [self.mirror.last_commit] if self.mirror else []
        manifest = {**disk.FORMAT, **save.facts, "commit": 1 + max(commits, default=0)}
        manifest["files"] = files
        if self._ranks.size > 1:
            files |= self._ranks.collect(partial, save.path)
            manifest |= {**disk.SEVERAL, "ranks": self._ranks.size, "save": partial.name}
        disk.write_file(partial / disk.MANIFEST, disk.seal(manifest))
        try:
            parse(partial, {file: snapshot.views for file, snapshot in self._snapshots.items()})
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{partial}{os.sep}")
            raise CheckpointError(
                f"{save.path} was not saved, because no run could resume from it: {reason}"
            ) from error
        sync_folder(partial)
        return manifest

    def _is_sound(self, path: Path) -> bool:
        """Hash a folder once; again only if the system has seen one of its files change."""
        now = disk.signature(path)
        with contextlib.suppress(CheckpointError):
            if self._verified.get(path) != now:
                verify(path)
                self._verified[path] = now
            return True
        return False

    def _retain(self, found: disk.History) -> None:
        """Move `best`, then discard what is older than the last `keep_last` verified ones."""
        good = [(path, m) for path, m in found if m and self._is_sound(path)]
        best = disk.best(dict(good))
        if best is not None and disk.pointed(self.folder / "best") != best.name:
            disk.point(self.folder / "best", best.name)
        if len(good) < self.keep_last:
            return
        spared = {best, self.mirror and self.mirror.copying}
        for path, _ in found[found.index(good[self.keep_last - 1]) + 1 :]:
            if path not in spared:
                # To be swept: a crash half-way leaves a stale partial folder, not a damaged one.
                os.rename(path, self.folder / f".tmp-removed-{path.name}")


def refuse_unsavable(groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise CheckpointError for what the groups of a checkpoint hold and no file of it can."""
    for stem, group in groups.items():
        for name, value in group.items():
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                remedy = "keep it in a buffer, or outside of the model's state"
            elif value.is_quantized or value.layout is not torch.strided:
                kind = (
                    "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
                )
                remedy = "convert it to an ordinary tensor, or register it with persistent=False"
            elif value.is_meta or value.dtype not in disk.DTYPE_NAMES:
                kind = "on meta" if value.is_meta else str(value.dtype).removeprefix("torch.")
                remedy = "convert it, or register it with persistent=False"
            else:
                continue
            raise disk.CheckpointError(
                f"checkpoint: {stem}.{name} is {kind}, which safetensors does not hold; {remedy}"
            )


class Snapshot:
    """One group of tensors in a reused host buffer, laid out as its safetensors file."""

    def __init__(self, stem: str, tensors: Mapping[str, Tensor], *, pinned: bool = True) -> None:
        header: dict[str, Any] = {}
        end = 0
        # Wide dtypes first, as the safetensors library orders them: every view is then aligned.
        for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
            tensor, begin = tensors[name], end
            end += tensor.numel() * tensor.element_size()
            dtype, shape = disk.DTYPE_NAMES[tensor.dtype], list(tensor.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)
        text = len(text).to_bytes(8, "little") + text
        size = len(text) + end
        self.cuda = any(t.is_cuda for t in tensors.values())
        if self.cuda and pinned:
            self.content = self._pinned(size)
        else:
            room = torch.empty(size + disk.PAGE, dtype=torch.uint8, device="cpu")
            self.content = room[-room.data_ptr() % disk.PAGE :][:size]
        self.content[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.views: dict[str, Tensor] = {}
        for name, entry in header.items():
            part = self.content[len(text) :][slice(*entry["data_offsets"])]
            self.views[name] = part.view(tensors[name].dtype).view_as(tensors[name])

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

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether these tensors can be copied into this buffer."""
        mine, theirs = (
            {name: (t.dtype, t.shape) for name, t in some.items()} for some in (self.views, tensors)
        )
        return mine == theirs and self.cuda == any(t.is_cuda for t in tensors.values())

    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        for name, view in self.views.items():
            view.copy_(tensors[name].detach(), non_blocking=self.cuda)

    def first_nonfinite(self, group: str = "", unchecked: Collection[str] = ()) -> str | None:
        """Return the name of a tensor that is not finite; releases the GIL, starts no thread.

        What ``unchecked`` names with its group, as ``model.mask``, is passed over.
        Apart from the sign, what is not finite has greater bits than the greatest finite number.
        """
        for name, view in self.views.items():
            view = torch.view_as_real(view) if view.is_complex() else view
            exempt = f"{group}.{name}" in unchecked
            if exempt or not view.is_floating_point() or not view.numel():
                continue
            # These have no infinities, and the bits of −0 for their only NaN.
            if str(view.dtype).endswith("fnuz"):
                if bool((view.flatten().view(torch.uint8).numpy() == 0x80).any()):
                    return name
                continue
            raw, size = view.flatten().view(torch.uint8).numpy(), view.element_size()
            largest = torch.finfo(view.dtype).max
            last = torch.tensor([largest], dtype=torch.float64, device="cpu").to(view.dtype)
            finite = int.from_bytes(last.view(torch.uint8).tolist(), sys.byteorder)
            positive, negative = int(raw.view(f"i{size}").max()), int(raw.view(f"u{size}").max())
            if positive > finite or negative > finite + (1 << 8 * size - 1):
                return name
        return None
