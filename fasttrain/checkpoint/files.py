"""What a checkpoint is made of on disk: safetensors laid out in memory, sealed manifests, durable
writes and reads that trust nothing.

Every write goes through `os.open`, `os.write`, `os.fsync`, `os.rename`, `os.replace`, `os.unlink`,
`os.mkdir` and `os.rmdir`, so that a test can crash at each of them.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NotRequired, TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fasttrain.command import DISK_REMEDIES
from fasttrain.config import UserError, misfit, untrusted
from fasttrain.storage import LACKING, sync, sync_folder

MANIFEST = "manifest.json"
FORMAT = {"format": "fasttrain-checkpoint", "version": 1}
SEVERAL = {**FORMAT, "version": 2}  # of several ranks: tensors may lie in slices
PAGE = 4096  # to which writes past the page cache are aligned, in memory and in the file
_LARGE = 4 << 20  # bytes of a file that is hashed in a thread and written past the cache
_WRITE = 16 << 20  # bytes handed to the disk at once
# On a core that training keeps busy, Linux gives a thread of this priority 3.4 % (of 10: 9.7 %),
# and all that training leaves idle. To hash a GB takes 0.7 s, so that it is written in half a
# minute at the latest.
_NICE = 15
JSON_LIMIT = 4 << 20  # bytes; 30,000 tensors or shards: a hostile one takes 24 times that, parsed
STEP = re.compile(r"(?:\.old-)?step-(\d{8,18})(?:-c\d+)?")  # -c7: a copy of the seventh commit
# What saves and mirrors leave where they are cut off; with the mark of the process, if it is new.
LEFTOVER = re.compile(
    r"\.old-step-\d{8,18}(?:-c\d+)?"
    r"|\.tmp-(?:latest|best|metrics\.jsonl|samples\.txt|tokenizer\.json"
    r"|(?:removed-)?step-\d{8,18}(?:-c\d+)?(?:-(?:([0-9a-f]{24})|[0-9a-z]+))?(?:-\d+)?"
    r"|(?:\.tmp-)?failed-[0-9a-z]+-\d+)"
)
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
# Windows lacks some of these flags, and opens files as text without its own.
_READING, _CREATING = (
    sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_BINARY", *names))
    for names in (("O_RDONLY", "O_NOFOLLOW", "O_NONBLOCK"), ("O_WRONLY", "O_CREAT", "O_EXCL"))
)
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
History = list[tuple[Path, dict[str, Any] | None]]
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_REMEDIES = DISK_REMEDIES | {
    errno.EROFS: "remount the file system writable",
    errno.EACCES: "make the folder writable",
}


class CheckpointError(UserError):
    """A checkpoint was not written, is damaged, or is none; its cause is the system's, if any."""


def candidates(path: Path) -> list[Path]:
    """The checkpoint itself, or those of a run folder, last commit first."""
    refuse_foreign(path)
    if (path / MANIFEST).exists() or STEP.fullmatch(path.name):
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if found := history(folder):
        return [checkpoint for checkpoint, _ in found]
    for child in sorted(path.iterdir()):
        refuse_pickle(child)
    raise CheckpointError(f"{path}: holds no checkpoint; name another folder or start a new run")


def history(folder: Path) -> History:
    """Return checkpoint folders, newest commit first, with their manifests (None: damaged).

    By commit, not by step: a run that went back to an older step must not resume its old future.
    """
    with failing(f"cannot read {folder}"):
        names = {name for name in os.listdir(folder) if STEP.fullmatch(name)}
    manifests: dict[Path, dict[str, Any] | None] = {}
    for path in map(folder.joinpath, names - {f".old-{name}" for name in names}):
        manifests[path] = None
        with contextlib.suppress(CheckpointError):
            manifests[path] = read_manifest(path)
    commits = [(m["step"], m["commit"]) for m in manifests.values() if m]

    def age(path: Path) -> tuple[float, int]:
        manifest, step = manifests[path], int(cast(re.Match[str], STEP.fullmatch(path.name))[1])
        before = max((c for s, c in commits if s < step), default=0)
        return (manifest["commit"] if manifest else before + 0.5, step)

    return [(path, manifests[path]) for path in sorted(manifests, key=age, reverse=True)]


def best(manifests: Mapping[Any, dict[str, Any] | None]) -> Any:
    """Return the key of the lowest metric, of the oldest if several have it; None without one."""
    rated = [(m["metric"], m["commit"], key) for key, m in manifests.items() if m]
    return min((r for r in rated if r[0] is not None), default=(0, 0, None))[2]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest if it is intact and the folder holds exactly the files it lists."""
    refuse_foreign(path)
    file = path / MANIFEST
    manifest = parse_manifest(file, read_file(file))
    if (named := STEP.fullmatch(path.name)) and int(named[1]) != manifest["step"]:
        raise CheckpointError(f"{file}: of step {manifest['step']}: folders or files were swapped")
    expected = {MANIFEST, *manifest["files"]}
    with os.scandir(path) as entries:
        regular = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    found = {name for name, is_file in regular.items() if is_file or name not in expected}
    if odd := sorted(expected ^ found):
        problem = "missing, or no file" if odd[0] in expected else "does not belong here; remove it"
        raise CheckpointError(f"{path / odd[0]}: {problem}")
    return manifest


def parse_manifest(file: Path | str, text: bytes) -> dict[str, Any]:
    """Return the manifest that lies in ``file``; CheckpointError unless it is sealed and sound."""
    manifest = parse_json(file, text)
    manifest.pop("sha256", None)
    if seal(manifest) != text:
        raise CheckpointError(f"{file}: damaged: it does not match its own SHA-256")
    made_by = SEVERAL if "ranks" in manifest else FORMAT
    if not made_by.items() <= manifest.items():
        raise CheckpointError(
            f"{file}: written by another version; use the fasttrain that wrote it"
        )
    problem = misfit(Manifest, manifest)
    files = {} if problem else manifest["files"]
    if odd := [name for name in files if not FILE.fullmatch(name)]:
        problem = f"{odd[0]!r} cannot name a file"
    elif not problem and (lost := {"state.json", "config.toml"} - files.keys()):
        problem = f"it lists no {min(lost)}"
    if problem:
        raise CheckpointError(f"{file}: malformed: {problem}")
    return manifest


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the one valid spelling of a manifest, with its own SHA-256: no byte can change."""
    body = json.dumps(manifest, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def parse_json(file: Path | str, text: bytes) -> dict[str, Any]:
    remedy = "fasttrain did not write this"
    return untrusted.parse_json(text, f"{file}: damaged", remedy, CheckpointError)


def refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLES and path.is_file():
        raise CheckpointError(
            f"{path}: a {path.suffix} file is a pickle, which can run code when it is loaded; if "
            "you trust it, convert it: safetensors.torch.save_file(torch.load(path, "
            "weights_only=True), 'model.safetensors')"
        )


def refuse_foreign(path: Path) -> None:
    if not path.is_dir():
        refuse_pickle(path)
        problem = "not a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {problem}; name a run or checkpoint folder")


def read_file(path: Path, entry: dict[str, Any] | None = None) -> bytes:
    """Check a file against its entry in the manifest; return its text, nothing if it is tensors."""
    # A link could lead out of the folder, and opening a pipe would block.
    with failing(f"{path}: cannot be read"), open(os.open(path, _READING), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if entry is not None and size != entry["bytes"]:
            raise CheckpointError(f"{path}: damaged: {size} bytes, should be {entry['bytes']}")
        if path.suffix == ".safetensors":
            text, digest = b"", hashlib.file_digest(file, "sha256")
        elif size > JSON_LIMIT:
            raise CheckpointError(f"{path}: {size} bytes, at most {JSON_LIMIT} are credible")
        else:
            text = file.read(JSON_LIMIT)
            digest = hashlib.sha256(text)
    if entry is not None and digest.hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one in {MANIFEST}")
    return text


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, whose bytes are read when they are used."""
    with failing(f"{path}: cannot be read"), open(path, "rb") as raw:
        if (length := int.from_bytes(raw.read(8), "little")) > JSON_LIMIT:
            raise CheckpointError(f"{path}: damaged: header of {length} bytes")
        try:
            with safe_open(_utf8_path(path, raw), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for tensor in tensors.values():
                torch.empty(tensor.shape, device="meta")  # refuses (0, 2**62, 2**62), as models do
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path}: damaged: {error}") from error
    return tensors


def _utf8_path(path: Path, opened: BinaryIO) -> str | Path:
    """Return a path that safetensors can take, which knows UTF-8 alone, of a file that is open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return f"/dev/fd/{opened.fileno()}"
    return path


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write and fsync a new file, hashing it meanwhile; return its entry in the manifest."""
    rest = view = memoryview(content)
    digest, large = hashlib.sha256(), len(view) >= _LARGE
    # It releases the GIL for all of it; a priority that was lowered is inherited.
    hashing = threading.Thread(target=digest.update, args=(view,), name="checkpoint hash")
    (hashing.start if large else hashing.run)()
    descriptor = os.open(path, _CREATING, 0o666)
    try:
        if large and hasattr(os, "O_DIRECT"):
            rest = _write_past_cache(descriptor, rest)
        while len(rest):
            rest = rest[os.write(descriptor, rest[:_WRITE]) :]
        sync(descriptor, path)
    finally:
        os.close(descriptor)
        if large:
            hashing.join()
    return {"bytes": len(view), "sha256": digest.hexdigest()}


def _write_past_cache(descriptor: int, view: memoryview) -> memoryview:
    """Write whole pages past the page cache, if the file system can do it; return what is left.

    On a virtual machine whose host had to find the pages, 1 GB took 0.1 s of a core so, and through
    the cache 0.5 to 3.4 s. And the data set keeps its place there.
    """
    import fcntl  # Windows has none

    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
        while len(view) >= PAGE:
            view = view[os.write(descriptor, view[: min(_WRITE, len(view)) // PAGE * PAGE]) :]
    except OSError as error:
        if error.errno not in LACKING:  # it cannot, or its blocks are larger than ours
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
    return view


def give_way() -> None:
    """Lower the priority of this thread: on Linux, where a thread has its own."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def point(pointer: Path, name: str) -> None:
    partial = pointer.with_name(f".tmp-{pointer.name}")
    remove(partial)
    write_file(partial, f"{name}\n".encode())
    os.replace(partial, pointer)
    sync_folder(pointer.parent)


def pointed(pointer: Path) -> str:
    with contextlib.suppress(OSError, UserError):
        return untrusted.read_regular(pointer, JSON_LIMIT).decode(errors="replace").strip()
    return ""


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            remove(child)
        os.rmdir(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def signature(path: Path) -> object:
    """Return a value that changes whenever the system has seen a file of the folder change."""
    with os.scandir(path) as entries:
        stats = sorted((e.name, e.stat(follow_symlinks=False)) for e in entries)
    return [(name, s.st_size, s.st_ctime_ns, s.st_ino) for name, s in stats]


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    """Make an error of the system a CheckpointError that says what failed, and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the file system")
        raise CheckpointError(f"{what}: {error}; {remedy}") from error


def sweep(folder: Path, spare: str) -> None:
    """Remove what saves left unfinished, but names that hold ``spare``; put back what was moved.

    Files with other names are kept: the folder may hold files that are not ours. So are those of a
    process that runs.
    """
    for name in sorted(os.listdir(folder)):
        target = folder / name.removeprefix(".old-")
        if name[0] == "." and STEP.fullmatch(name) and not target.exists():
            os.rename(folder / name, target)
        elif (match := LEFTOVER.fullmatch(name)) and spare not in name and not _runs(match[1]):
            remove(folder / name)


def new_mark() -> str:
    """Return what the temporary names of one writer have in common: its host, process, a number."""
    return f"{_host()}{os.getpid():08x}{secrets.token_hex(6)}"


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]


def _runs(mark: str | None) -> bool:
    """Return whether another process of this machine, which does, made names with this mark."""
    if mark is None or mark[:4] != _host() or (pid := int(mark[4:12], 16)) == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


# What JSON of a checkpoint has to hold.
FaultKind = Literal["overflow", "nonfinite", "spike", "transient", "persistent"]
Number = float | Literal["nan", "inf", "-inf"]  # JSON has none that is not finite


class Entry(TypedDict):  # a file in the manifest
    bytes: int
    sha256: str


class Manifest(TypedDict):
    step: int
    commit: int
    metric: float | None
    files: dict[str, Entry]
    ranks: NotRequired[int]


class RankRecord(TypedDict):  # rank-00000.json
    slices: dict[str, dict[str, list[int]]]  # by file and tensor: dim, begin, end, shape


class Change(TypedDict):  # of a setting, on purpose, when the run was resumed
    when: str
    step: int
    key: str
    old: str
    new: str


class Faults(TypedDict):  # what `engine.state.FaultCounts` keeps
    skipped_steps: int
    spikes: int
    rollbacks: int
    passed_over: list[int]
    row: list[tuple[int, int, FaultKind, Number, Number]]


class Parent(TypedDict):  # the checkpoint that a branch starts from
    run: str  # absolute path of its folder, as it was named then
    checkpoint: str  # name of the checkpoint's folder
    step: int
    decays: bool  # whether the branch was begun with --decay-from


class SavedModel(TypedDict, total=False):  # state.json of parameters that belong to no run
    history: list[Change]
    lineage: list[Parent]  # the checkpoints that the run branched off, the first one first
    provenance: dict[str, str | bool | None]


class SavedRun(SavedModel):  # state.json of `fasttrain.train`
    step: int
    position: int
    total_steps: int | None
    eval_due: bool
    trained_s: float
    best_val_loss: float | None
    loss_ema: float | None
    faults: Faults
    tokens: NotRequired[int]  # this and those below are not in all checkpoints of version 1
    samples_per_step: NotRequired[int]
    regular: NotRequired[bool]
    val_losses: NotRequired[list[float | None]]
    data: NotRequired[dict[str, dict[str, Any]]]


class SavedLibraryRun(SavedModel):  # state.json of `fasttrain.Trainer`, but for torch's classes
    step: int
    epoch: int
    batch_in_epoch: int
    skipped_steps: int
    library: dict[str, Any]
