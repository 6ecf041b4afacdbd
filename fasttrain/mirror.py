"""Copies of a run's checkpoints at another address: in an object store, or on another mount.

    ADDRESS/base/  config.toml  metrics.jsonl  samples.txt  tokenizer.json
                   mirror.json                     the copies that a mirror made
                   checkpoints/step-00001000-c7/   as on the disk; c7: the run's seventh commit

A copy counts once it has its manifest, which is written last and removed first. None is written
over: a step that is saved again is another commit. So an upload that is cut off at any point leaves
all complete copies unchanged. What is brought back is hashed before it is used. Nothing is removed
but copies that ``mirror.json`` names: the rest was put there by others.
"""

import contextlib
import json
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import MANIFEST, STEP, CheckpointError
from fasttrain.checkpoint.reading import resolve, verify
from fasttrain.config import UserError, counted
from fasttrain.config.untrusted import json_object, read_regular, refuse_links
from fasttrain.storage import (
    TRANSFER_S,
    file_system,
    if_there,
    names_at,
    put,
    remote,
    shown,
    sync,
    sync_folder,
)

# What else of its folder a run continues on another machine, or generates text with.
_BESIDE = {"metrics.jsonl", "samples.txt", "tokenizer.json"}
RECORD = "mirror.json"
_COPY = re.compile(r"step-\d{8,18}-c\d+")

_Tell = Callable[[str], None]
_Copies = dict[str, dict[str, Any] | None]  # manifests by folder; {}: cut off; None: damaged


class Mirror:
    """The copies of one run's checkpoints, under ``address`` and the name of its folder.

    A thread makes them and keeps the last ``keep_last`` and the best; what fails there is told to
    ``warn``. Elsewhere an address that fails raises DataError.
    """

    def __init__(
        self, address: str, run_dir: Path, keep_last: int, *, note: _Tell, warn: _Tell
    ) -> None:
        name = run_dir.resolve().name  # a link to a run is not another run
        self.address, self.run_dir = f"{address.rstrip('/')}/{name}", run_dir
        self.folder, self.keep_last = run_dir / "checkpoints", keep_last
        self.shown, self._note, self._warn = shown(self.address), note, warn
        self.last_commit = self.failures = 0  # the former of all that are or were there
        self.copying: Path | None = None  # the checkpoint that may not be removed now
        self._due, self._lock = False, threading.Lock()
        self._thread: threading.Thread | None = None
        self._own: set[str] = set()  # the copies that a mirror made, of this session or before
        self._mark = ""  # of this session, in the record; "": it was not written yet
        fs, path = file_system(self.address)
        if "file" in fs.protocol:
            if _is_same(Path(path), run_dir):
                raise UserError(f"checkpoint.mirror = {address}: is run.out_dir; name another disk")
            refuse_links(Path(path).parent, [name, f"{name}/checkpoints"])

    def copies(self) -> _Copies:
        """Return the copies, the newest commit first."""
        found: _Copies = {}
        listed = names_at(f"{self.address}/checkpoints")
        for name in (name for name in listed if STEP.fullmatch(name) and name[0] != "."):
            sizes = names_at(where := f"{self.address}/checkpoints/{name}")
            found[name] = None if MANIFEST in sizes else {}
            if sizes.get(MANIFEST, disk.JSON_LIMIT + 1) <= disk.JSON_LIMIT:
                with contextlib.suppress(CheckpointError):
                    text = remote(f"{where}/{MANIFEST}", "cat_file")
                    files = (manifest := disk.parse_manifest(where, text))["files"]
                    whole = all(sizes.get(file) == entry["bytes"] for file, entry in files.items())
                    # Without its commit in its name, a checkpoint was copied there by others.
                    known = name in (_name(manifest), _name(manifest).partition("-c")[0])
                    found[name] = manifest if whole and known else None
        commits = {name: manifest["commit"] for name, manifest in found.items() if manifest}
        self.last_commit = max([self.last_commit, *commits.values()])
        return {n: found[n] for n in sorted(found, key=lambda n: -commits.get(n, 0))}

    def fetch(self) -> None:
        """Bring the newest copy that verifies, if none here that verifies is as new.

        With it come the best one and what else the run goes on with. Raises CheckpointError where
        all copies are damaged and so is all that is here.
        """
        copies, last = self.copies(), 0
        with contextlib.suppress(CheckpointError):
            last = disk.read_manifest(resolve(self.folder, report=lambda _: None))["commit"]
        for name in [name for name, manifest in copies.items() if manifest is None]:
            problem = f"{self.shown}/checkpoints/{name}: its manifest or a file is damaged"
            self._warn(f"passing over a damaged checkpoint: {problem}")
        newer = [name for name, m in copies.items() if m and m["commit"] > last]
        self._note(f"{self.shown} holds {counted(len(newer), 'newer checkpoint')}")
        newest = next((name for name in newer if self._fetch(name, copies)), None)
        if newest is None:
            if not last and None in copies.values():
                raise CheckpointError(f"{self.shown}: no checkpoint verifies; use another run.name")
            return
        pointers = {"latest": newest}
        if (best := disk.best(copies)) and (best == newest or self._fetch(best, copies)):
            pointers = {"best": best, **pointers}
        for name in names_at(self.address).keys() & _BESIDE:
            disk.remove(part := self.folder / f".tmp-{name}")  # which may be a link
            remote(f"{self.address}/{name}", "get_file", str(part))
            os.replace(part, self.run_dir / name)
        # The newest comes last: cut off before it, all of this is done again.
        for pointer, name in pointers.items():
            if (part := self.folder / f".tmp-{name}").exists():
                disk.remove(self.folder / name)  # it is damaged, or it would not be fetched
                os.rename(part, self.folder / name)
            disk.point(self.folder / pointer, name)

    def _fetch(self, name: str, copies: _Copies) -> bool:
        """Bring a copy to ``.tmp-…``; if it is damaged warn, mark it and return false."""
        where, part = f"{self.address}/checkpoints/{name}", self.folder / f".tmp-{name}"
        disk.remove(part)
        part.mkdir(parents=True)
        manifest = copies[name] or {}
        for file, entry in manifest["files"].items():
            check = partial(_check, target := part / file, entry["bytes"])
            remote(f"{where}/{file}", "get_file", str(target), check=check, timeout_s=TRANSFER_S)
        disk.write_file(part / MANIFEST, disk.seal(manifest))
        try:
            verify(part)
        except CheckpointError as error:
            problem = shown(str(error).replace(str(part), where))
            self._warn(f"passing over a damaged checkpoint: {problem}")
            disk.remove(part)
            copies[name] = None
        return copies[name] is not None

    def drop_newer(self, commit: int) -> None:
        """Remove the copies that are newer than a commit, so that they are not brought back.

        Raises UserError where others put one there.
        """
        self._begin_record()
        for name, manifest in self.copies().items():
            if manifest and manifest["commit"] > commit:
                where = f"{self.shown}/checkpoints/{name}"
                if name not in self._own:
                    raise UserError(f"{where}: is newer, and no mirror made it; remove it yourself")
                self._note(f"--overwrite: {where} is dropped")
                self._remove(name)

    def wake(self) -> None:
        """Have the newest and the best checkpoint copied; waits for nothing."""
        if not self._due:
            self._due = True
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()

    def finish(self, patience_s: float) -> None:
        """Wait for what is being copied, at most so long, and say so."""
        thread, self._thread = self._thread, None
        if thread and thread.is_alive():
            self._note(f"copying the last checkpoint to {self.shown}, at most {patience_s:g} s")
            thread.join(patience_s)
            if thread.is_alive():
                self._warn(f"gave up copying the last checkpoint: what {self.shown} held it holds")

    def _work(self) -> None:
        disk.give_way()
        with self._lock:  # one upload at a time; during it at most one other thread waits
            self._due = False
            try:
                self._copy_new()
            except Exception as error:  # no failure here ends the run
                self.failures += 1
                self._warn(f"a checkpoint was not copied: {error} (the run goes on without it)")
            self.copying = None

    def _copy_new(self) -> None:
        if not self._mark:
            self._begin_record()
        copies, best = self.copies(), disk.pointed(self.folder / "best")
        saved = [(path, m) for path, m in disk.history(self.folder) if m]
        wanted = [(path, m) for path, m in saved if path == saved[0][0] or path.name == best]
        missing = [(path, m) for path, m in wanted if copies.get(_name(m)) != m]
        for self.copying, manifest in missing:
            self._copy(self.copying, manifest)
        # Nothing is removed unless what has come is seen there, of the sizes that it should have.
        copies = self.copies() if missing else copies
        if short := [_name(m) for _, m in missing if copies.get(_name(m), {}) is None]:
            raise CheckpointError(f"{self.shown}: {short[0]} did not come there whole")
        whole = [name for name, manifest in copies.items() if manifest]
        spared = {*whole[: self.keep_last], disk.best(copies)}
        for name in (copies.keys() & self._own) - spared if whole else ():
            self._remove(name)

    def _copy(self, path: Path, manifest: dict[str, Any]) -> None:
        """Copy a checkpoint, unless it is saved again or removed meanwhile: then another is due."""
        name, sealed, problem = _name(manifest), disk.seal(manifest), None
        where = f"checkpoints/{name}"
        try:
            if name in self._own:
                self._remove(name)  # what was cut off
            elif names_at(f"{self.address}/{where}"):
                remedy = "remove it or name another checkpoint.mirror"
                raise UserError(f"{self.shown}/{where}: is there, and no mirror made it; {remedy}")
            self._own.add(name)
            self._write_record()
            for file, entry in manifest["files"].items():
                disk.read_file(path / file, entry)
                self.put(f"{where}/{file}", path / file)
            for beside in filter(Path.is_file, map(self.run_dir.joinpath, _BESIDE)):
                self.put(beside.name, beside.read_bytes())
        except (UserError, OSError) as error:
            problem = error
        if (path / MANIFEST).is_file() and (path / MANIFEST).read_bytes() == sealed:
            if problem is not None:
                raise problem
            self.put(f"{where}/{MANIFEST}", sealed)

    def put(self, name: str, content: Path | bytes) -> None:
        """Write a file under the address of the run."""
        fs, path = file_system(address := f"{self.address}/{name}")
        put(address, content)
        if "file" in fs.protocol:
            with open(path, "rb") as file:
                sync(file.fileno(), Path(path))
            for folder in Path(path).parents[:2]:
                sync_folder(folder)

    def _begin_record(self) -> None:
        """Read which copies a mirror has made; refuse an address that is the run folder itself."""
        text = b""
        if 0 < names_at(self.address).get(RECORD, 0) <= disk.JSON_LIMIT:
            text = remote(f"{self.address}/{RECORD}", "cat_file")
        record = json_object(text) or {}
        named = record.get("copies")
        known = [name for name in named if isinstance(name, str)] if type(named) is list else []
        self._own |= set(filter(_COPY.fullmatch, known))
        self._mark = secrets.token_hex(8)
        self._write_record()
        # By another mount it may have another device. What was written there is then here as well.
        with contextlib.suppress(OSError, UserError):
            here = json_object(read_regular(self.run_dir / RECORD, disk.JSON_LIMIT)) or {}
            if here.get("mark") == self._mark:
                disk.remove(self.run_dir / RECORD)
                self._mark = ""
        if not self._mark:
            raise UserError(f"{self.shown} is the run folder itself; name another disk")

    def _write_record(self) -> None:
        record = {"mark": self._mark, "copies": sorted(self._own)}
        self.put(RECORD, json.dumps(record, indent=1).encode())

    def _remove(self, name: str) -> None:
        if_there(f"{self.address}/checkpoints/{name}/{MANIFEST}", "rm_file")
        if_there(f"{self.address}/checkpoints/{name}", "rm", recursive=True)


@contextlib.contextmanager
def config_at(address: str) -> Iterator[str]:
    """Yield the path of a copy of the config of the run at an address."""
    with tempfile.TemporaryDirectory() as folder:
        remote(f"{address}/config.toml", "get_file", path := os.path.join(folder, "config.toml"))
        yield path


def _is_same(path: Path, run_dir: Path) -> bool:
    """Return whether two paths are one folder, by whatever names and mounts, or will be."""
    with contextlib.suppress(OSError):
        if path.exists() and run_dir.exists():
            return path.samefile(run_dir)
        return path.name == run_dir.name and path.parent.samefile(run_dir.parent)
    return path.resolve() == run_dir.resolve()


def _name(manifest: dict[str, Any]) -> str:
    return f"step-{manifest['step']:08d}-c{manifest['commit']}"


def _check(file: Path, n_bytes: int, _: object) -> None:
    if (size := file.stat().st_size) != n_bytes:
        raise OSError(f"{size} of {n_bytes} bytes came")
