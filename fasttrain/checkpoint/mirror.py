"""Copies of a run's checkpoints at another address: in an object store, or on another mount.

    ADDRESS/base/  config.toml  metrics.jsonl  samples.txt  tokenizer.json
                   checkpoints/step-00001000-c7/   as on the disk; c7: the run's seventh commit

A copy counts once it has its manifest, which is written last and removed first. None is written
over: a step that is saved again is another commit. So an upload that is cut off, at whatever point,
leaves the copies that were whole as they were. What is brought back is hashed before it is used.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import MANIFEST, STEP, CheckpointError
from fasttrain.checkpoint.reading import resolve, verify
from fasttrain.config import UserError
from fasttrain.config.keys import counted
from fasttrain.data.files import STALL_S, DataError, file_system, remote, shown

# What else of its folder a run continues on another machine, or generates text with.
_BESIDE = {"metrics.jsonl", "samples.txt", "tokenizer.json"}
_SLOWEST = 1e6  # bytes/s: a slower transfer has failed


class Mirror:
    """The copies of one run's checkpoints, under ``address`` and the name of its folder.

    A thread makes them, keeps the last `keep_last` and the best, and tells `warn` what fails. The
    other methods raise DataError where the address fails.
    """

    def __init__(
        self, address: str, run_dir: Path, keep_last: int, warn: Callable[[str], None]
    ) -> None:
        self.address = f"{address.rstrip('/')}/{run_dir.name}"
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"
        self.keep_last, self._warn = keep_last, warn
        self.last_commit = self.failures = 0  # the former of all that are or were there
        self.copying: Path | None = None  # the checkpoint that may not be removed now
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._due = False
        fs, path = file_system(self.address)
        if "file" in fs.protocol and Path(path).resolve() == run_dir.resolve():
            raise UserError(
                f"checkpoint.mirror = {address}: the run itself is there; name a folder on another "
                "disk, and to resume from it: --resume auto"
            )

    def copies(self) -> dict[str, dict[str, Any] | None]:
        """Return manifests by folder, the newest commit first; of no copy yet {}, damaged None."""
        names = filter(STEP.fullmatch, names_at(f"{self.address}/checkpoints"))
        found = {name: self._manifest(name) for name in names}
        commits = {name: manifest["commit"] for name, manifest in found.items() if manifest}
        self.last_commit = max([self.last_commit, *commits.values()])
        return {n: found[n] for n in sorted(found, key=lambda n: -commits.get(n, 0))}

    def _manifest(self, name: str) -> dict[str, Any] | None:
        where = f"{self.address}/checkpoints/{name}"
        sizes = names_at(where)
        if MANIFEST not in sizes:
            return {}
        try:
            small = sizes[MANIFEST] <= disk.JSON_LIMIT
            text = remote(f"{where}/{MANIFEST}", "cat_file") if small else b""
            manifest = disk.parse_manifest(where, text)
        except CheckpointError:
            return None
        whole = all(sizes.get(file) == e["bytes"] for file, e in manifest["files"].items())
        return manifest if whole and name == _name(manifest) else None

    def fetch(self, note: Callable[[str], None]) -> None:
        """Bring the newest copy that verifies, if it is newer than what is here.

        With it come the best one and what else the run goes on with. Raises CheckpointError where
        nothing is here and of the copies there none verifies.
        """
        copies, last = self.copies(), 0
        with contextlib.suppress(CheckpointError):
            last = disk.read_manifest(resolve(self.folder, report=lambda _: None))["commit"]
        for name in [name for name, manifest in copies.items() if manifest is None]:
            self._pass_over(f"{self.address}/checkpoints/{name}: its manifest or a file is damaged")
        later = [name for name, m in copies.items() if m and m["commit"] > last]
        note(f"{counted(len(later), 'newer checkpoint')} in {shown(self.address)}")
        for name in later:
            if self._fetch(name, copies[name]):
                break
            copies[name] = None
        else:
            if not last and any(manifest != {} for manifest in copies.values()):
                raise CheckpointError(
                    f"{shown(self.address)}: none of its checkpoints verifies; start a new run "
                    "under another name"
                )
            return
        disk.point(self.folder / "latest", name)
        if (best := _best(copies)) and (best == name or self._fetch(best, copies[best])):
            disk.point(self.folder / "best", best)
        for file in names_at(self.address).keys() & _BESIDE:
            if not (self.run_dir / file).exists():
                remote(f"{self.address}/{file}", "get_file", str(self.run_dir / file))

    def _fetch(self, name: str, manifest: Any) -> bool:
        """Bring a copy; false, after a warning, if it is damaged."""
        where, part = f"{self.address}/checkpoints/{name}", self.folder / f".tmp-{name}"
        disk.remove(part)
        part.mkdir(parents=True)
        for file, entry in manifest["files"].items():
            target, n_bytes = part / file, entry["bytes"]
            check, timeout_s = partial(_check, target, n_bytes), _timeout_s(n_bytes)
            source = f"{where}/{file}"
            remote(source, "get_file", str(target), check=check, timeout_s=timeout_s)
        disk.write_file(part / MANIFEST, disk.seal(manifest))
        try:
            verify(part)
        except CheckpointError as error:
            self._pass_over(str(error).replace(str(part), where))
            disk.remove(part)
            return False
        disk.remove(self.folder / name)  # it is damaged, or it would not be fetched
        os.rename(part, self.folder / name)
        return True

    def _pass_over(self, problem: str) -> None:
        self._warn(f"passing over a damaged checkpoint: {shown(problem)}")

    # ---- the thread that copies ----------------------------------------------------------------

    def wake(self) -> None:
        """Have the newest and the best checkpoint copied; waits for nothing."""
        with self._lock:
            self._due = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def finish(self, patience_s: float, note: Callable[[str], None]) -> None:
        """Wait for what is being copied, at most so long, and say so."""
        if (thread := self._thread) is None:
            return
        what = f"the last checkpoint to {shown(self.address)}"
        note(f"copying {what}, for at most {patience_s:g} s")
        thread.join(patience_s)
        if thread.is_alive():
            self._thread = None
            self._warn(f"gave up copying {what}: it took longer; copies that were there still are")

    def _work(self) -> None:
        disk.give_way()
        while True:
            with self._lock:
                if not self._due:
                    self._thread = None
                    return
                self._due = False
            try:
                self._copy_new()
            except Exception as error:  # no failure here ends the run
                self.failures += 1
                self._warn(f"a checkpoint was not copied: {error} (the run goes on without it)")
            self.copying = None

    def _copy_new(self) -> None:
        copies, best = self.copies(), disk.pointed(self.folder / "best")
        saved = [(path, m) for path, m in disk.history(self.folder) if m]
        wanted = [(p, m) for p, m in saved if p == saved[0][0] or p.name == best]
        missing = [(p, m) for p, m in wanted if not copies.get(_name(m))]
        for self.copying, manifest in missing:
            self._copy(self.copying, manifest)
        # Nothing is removed unless what has come is seen there, of the sizes that it should have.
        copies = self.copies() if missing else copies
        if short := [_name(m) for _, m in missing if copies.get(_name(m), {}) is None]:
            raise CheckpointError(f"{shown(self.address)}: {short[0]} did not come there whole")
        whole = [name for name, manifest in copies.items() if manifest]
        for name in copies.keys() - {*whole[: self.keep_last], _best(copies)} if whole else ():
            self._remove(name)

    def _copy(self, path: Path, manifest: dict[str, Any]) -> None:
        """Copy a checkpoint, unless it is saved again or removed meanwhile: then another is due."""
        where, sealed, problem = f"checkpoints/{_name(manifest)}", disk.seal(manifest), None
        try:
            self._remove(_name(manifest))  # what was cut off
            for file, entry in manifest["files"].items():
                disk.read_file(path / file, entry)
                self.put(f"{where}/{file}", path / file)
            for file in _BESIDE:
                if (self.run_dir / file).is_file():
                    self.put(file, (self.run_dir / file).read_bytes())
        except (UserError, OSError) as error:
            problem = error
        if (path / MANIFEST).is_file() and (path / MANIFEST).read_bytes() == sealed:
            if problem is not None:
                raise problem
            self.put(f"{where}/{MANIFEST}", sealed)

    def put(self, name: str, content: Path | bytes) -> None:
        """Write a file under the address of the run."""
        fs, path = file_system(address := f"{self.address}/{name}")
        if not fs.async_impl:  # object stores have no folders, and would make a bucket
            remote(address.rpartition("/")[0], "makedirs", exist_ok=True)
        if isinstance(content, bytes):
            remote(address, "pipe_file", content)
        else:
            patience_s = _timeout_s(content.stat().st_size)
            remote(address, "put_file", before=(str(content),), timeout_s=patience_s)
        if "file" in fs.protocol:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            for folder in Path(path).parents[:2]:
                disk.fsync_folder(folder)

    def _remove(self, name: str) -> None:
        where = f"{self.address}/checkpoints/{name}"
        _if_there(f"{where}/{MANIFEST}", "rm_file")
        _if_there(where, "rm", recursive=True)


def config_at(address: str) -> str:
    """Return a file with the config of the run at an address; it goes when this process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    remote(f"{address}/config.toml", "get_file", file := f"{folder}/config.toml")
    return file


def names_at(address: str) -> dict[str, int]:
    """Return what lies in a folder at an address, with its bytes; nothing if it is missing."""
    file_system(address)[0].invalidate_cache()
    found = _if_there(address, "ls", detail=True) or ()
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in found}


def _if_there(address: str, operation: str, **options: Any) -> Any:
    """Return what the operation returns; None if there is nothing at the address."""
    try:
        return remote(address, operation, **options)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _name(manifest: dict[str, Any]) -> str:
    return f"step-{manifest['step']:08d}-c{manifest['commit']}"


def _best(copies: dict[str, dict[str, Any] | None]) -> str | None:
    """Return the name of the copy of the lowest metric, if any was evaluated."""
    rated = [(m["metric"], m["commit"], name) for name, m in copies.items() if m]
    return min((r for r in rated if r[0] is not None), default=(0, 0, None))[2]


def _timeout_s(n_bytes: int) -> float:
    return STALL_S + n_bytes / _SLOWEST


def _check(file: Path, n_bytes: int, _: object) -> None:
    if (size := file.stat().st_size) != n_bytes:
        raise OSError(f"{size} of {n_bytes} bytes came")
