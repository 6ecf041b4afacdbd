"""From a splitter's pieces to a dataset on disk, with a place to resume from every few seconds.

A dataset OUT is built in `.OUT.partial` beside it:

    dataset/       what will be OUT: finished shards, tokenizer.json, and the shard being written
    progress.json  what was asked for, and how far everything in dataset/ can be trusted
    lock           held by the process at work

`progress.json` is replaced only when everything that it names is on disk. To resume, the input is
read again from its beginning, which takes little, and not encoded up to there. OUT keeps what was
asked for in `prepared.json`.

What is to lie at an address is made on this machine and copied when it is complete. `prepared.json`
goes first: by it a repeated copy knows that the files there are its own. `dataset.json` goes last,
and makes a dataset of them: what was cut off is never taken for one.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from fasttrain import storage as store
from fasttrain.config.untrusted import misfit, read_json
from fasttrain.data.dataset import HEADER_BYTES, KINDS, MAX_SHARD_TOKENS, ShardInfo, dtype_for
from fasttrain.data.format import DATASET_JSON, SPLITS, fetch_description, read_dataset_json
from fasttrain.data.remote import beside
from fasttrain.storage import DataError, is_address, remote, sha256_of, shown, write_atomically

PREPARED_JSON = "prepared.json"
ANEW = "start anew without --resume"
Note = Callable[[str], None]  # called with each line that a user should see


class Asked(TypedDict):
    """All that shapes a dataset, as `prepared.json` and `progress.json` keep it."""

    source: dict[str, Any]  # the options
    files: list[list[Any]]  # of each its name, and what identifies its content
    tokenizer_sha256: str
    recipe: list[Any]


class _WriterState(TypedDict):
    shards: list[ShardInfo]
    in_shard: tuple[int, int]
    n_bytes: int


class _Done(TypedDict, total=False):  # in `progress.json`, what an interrupted run has done
    batches: int
    lost: int
    exact: bool
    splits: dict[str, _WriterState]


class _PartSource(TypedDict):
    shard_tokens: int
    val_fraction: float | Literal["auto"]


class _PartRecord(TypedDict):  # what `merge` uses of a part's `prepared.json`
    source: _PartSource


class _Problems(TypedDict):
    problems: dict[str, int]
    n_documents: NotRequired[int]  # as the input has them, of which some may be in both splits


class _PartDescription(TypedDict):  # the same of its `dataset.json`
    source: _Problems


class ShardWriter:
    """Writes one split as shards `<split>_000000.bin` …, with the ends of documents beside each.

    Documents run on over the border of two shards; an end lies beside the shard in which its
    document ends, in `<split>_000000.ends`: the uint64 offset of the token after the last one.

    With the `state` of a writer that is gone, it continues from there; else it removes what is in
    the folder of the split.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        vocab_size: int,
        shard_tokens: int = 100_000_000,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 < shard_tokens <= MAX_SHARD_TOKENS:
            raise DataError(f"shard_tokens must be 1 to {MAX_SHARD_TOKENS}, got {shard_tokens}")
        self.folder, self.split, self.vocab_size = Path(folder), split, vocab_size
        self.dtype, self.shard_tokens = dtype_for(vocab_size), shard_tokens
        for path in self.folder.glob(f"{split}_*") if not state else ():
            path.unlink()
        state = state or {"shards": [], "in_shard": (0, 0), "n_bytes": 0}
        self.shards: list[ShardInfo] = list(state["shards"])
        # Of the shard that is being written.
        self._tokens, self._documents = map(int, state["in_shard"])
        self.n_bytes = state["n_bytes"]  # of the text
        sizes = (HEADER_BYTES + self._tokens * self.dtype.itemsize, 8 * self._documents)
        for path, size in zip(self._paths(), sizes, strict=True) if self._tokens else ():
            if not path.is_file() or path.stat().st_size < size:
                raise DataError(f"{path}: missing or cut short; {ANEW}")
            os.truncate(path, size)

    @property
    def n_tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + self._tokens

    @property
    def n_documents(self) -> int:
        return sum(shard["documents"] for shard in self.shards) + self._documents

    def _paths(self) -> tuple[Path, Path]:
        name = f"{self.split}_{len(self.shards):06d}"
        return self.folder / f"{name}.bin", self.folder / f"{name}.ends"

    def state(self) -> dict[str, Any]:
        """Put everything on disk and return how far that is, for a later writer."""
        for path in self._paths() if self._tokens else ():
            _sync(path)
        in_shard = (self._tokens, self._documents)
        return {"shards": self.shards, "in_shard": in_shard, "n_bytes": self.n_bytes}

    def write(
        self, tokens: NDArray[Any], ends: Sequence[int] | NDArray[Any] = (), n_bytes: int = 0
    ) -> None:
        """Append tokens of `n_bytes` of text, and ends of documents, ascending offsets in them."""
        self.n_bytes += n_bytes
        ids, stops = np.asarray(tokens), np.asarray(ends, dtype=np.int64)
        if ids.size and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            first = int(np.flatnonzero((ids >= self.vocab_size) | (ids < 0))[0])
            number, offset = divmod(self.n_tokens + first, self.shard_tokens)
            raise DataError(
                f"{self.folder / self.split}_{number:06d}.bin: token {int(ids[first])} at offset "
                f"{offset} is outside the vocabulary of {self.vocab_size}; use the tokenizer that "
                "the vocabulary belongs to"
            )
        done = 0
        while done < ids.size:
            path, ends_path = self._paths()
            mode = "ab" if self._tokens else "wb"
            with path.open(mode) as file, ends_path.open(mode) as ends_file:
                if not self._tokens:
                    file.write(bytes(HEADER_BYTES))
                part = ids[done : done + self.shard_tokens - self._tokens]
                here = stops[(stops > done) & (stops <= done + part.size)]
                file.write(np.ascontiguousarray(part, dtype=self.dtype).data)
                ends_file.write((here - done + self._tokens).astype("<u8").tobytes())
            done += part.size
            self._tokens += part.size
            self._documents += here.size
            if self._tokens == self.shard_tokens:
                self.close()

    def close(self) -> list[ShardInfo]:
        """Finish the shard that is being written; return all that were written, in order."""
        if self._tokens:
            path, ends_path = self._paths()
            magic = next(m for m, (_, dtype) in KINDS.items() if dtype == self.dtype)
            with path.open("r+b") as file:
                file.write(np.array([magic, KINDS[magic][0], self._tokens], "<i4").tobytes())
            self.state()
            self.shards.append(
                ShardInfo(
                    file=path.name,
                    tokens=self._tokens,
                    sha256=sha256_of(path),
                    documents=self._documents,
                    ends_file=ends_path.name,
                    ends_sha256=sha256_of(ends_path),
                )
            )
            self._tokens = self._documents = 0
        return self.shards


class Partial:
    """The folder in which a dataset is built.

    `asked` is everything that shapes the output, input files included; `out` holds nothing yet.
    """

    def __init__(self, out: Path, asked: Asked) -> None:
        self.out, self.folder = out, out.parent / f".{out.name}.partial"
        self.dataset = self.folder / "dataset"  # what will be `out`
        self._progress, self.asked = self.folder / "progress.json", asked
        self.state: dict[str, Any] = {}  # of the last `save`

    @contextmanager
    def held(self, *, resume: bool, note: Note) -> Iterator[None]:
        """Hold the folder, for this process alone; remove it unless it can be resumed from."""
        self._make_folders_of_its_own()
        with ExitStack() as stack:
            try:
                stack.callback(os.close, store.lock(self.folder / "lock"))
            except BlockingIOError:
                raise DataError(f"{self.out}: another process is preparing it; wait") from None
            except store.NoLocks:
                pass
            if self._progress.exists() and resume:
                left = read_json(self._progress, ANEW, DataError)
                if other := other_than(left.get("asked"), self.asked, self._progress):
                    problem = f"the interrupted run had {other}"
                    raise DataError(f"--resume: {problem}; repeat its command, or {ANEW}")
                self.state = left.get("done", {})  # an earlier fasttrain kept another one
                if damage := misfit(_Done, self.state):
                    raise DataError(f"{self._progress}: damaged ({damage}); {ANEW}")
                note(f"Continuing with what an interrupted run left in {self.folder}")
            elif self._progress.exists():
                also = "(--resume would have continued it)"
                note(f"Starting anew: {self.folder} of an interrupted run is replaced {also}")
            elif resume:
                note(f"Nothing to resume: no interrupted run left {self.folder}; starting")
            if not self.state:
                shutil.rmtree(self.dataset, ignore_errors=True)
                self._progress.unlink(missing_ok=True)
            self.dataset.mkdir(exist_ok=True)
            for path in self.dataset.glob(".*"):  # files that were being written
                path.unlink()
            try:
                yield
            finally:
                if not self.state:
                    shutil.rmtree(self.folder, ignore_errors=True)

    def _make_folders_of_its_own(self) -> None:
        """Make the folder; refuse one that leads elsewhere or that another user can change."""
        for path in (self.folder, self.dataset):
            if path.is_symlink():
                raise DataError(f"{path}: is a symbolic link; remove it, or name another output")
        self.folder.mkdir(parents=True, exist_ok=True)
        if hasattr(os, "geteuid") and self.folder.stat().st_uid != os.geteuid():
            raise DataError(f"{self.folder}: belongs to another user; name another output")

    def save(self, **state: Any) -> None:
        """Record how far the work is; all of that must be on disk already."""
        self.state |= state
        content = json.dumps({"asked": self.asked, "done": self.state})
        write_atomically(self._progress, content.encode())

    def publish(self) -> None:
        """Give the finished dataset its name."""
        write_atomically(self.dataset / PREPARED_JSON, json.dumps(self.asked).encode())
        store.sync_folder(self.dataset)
        os.rename(self.dataset, self.out)
        store.sync_folder(self.out.parent)
        self.state = {}


@contextmanager
def building(place: str, asked: Asked, *, resume: bool, note: Note) -> Iterator[Partial | None]:
    """Yield the folder in which to build what was asked for; None: it is complete.

    Behind that, what was built for an address is copied there.
    """
    folder, at_address = Path(place), is_address(place)
    if at_address:
        folder = store.beneath(store.cache_folder() / "prepare", place)
        there = _is_there(place, asked, resume)
        if there or not resume:  # what was copied, or never was
            shutil.rmtree(folder, ignore_errors=True)
        if there:
            note(f"{shown(place)} is complete already")
            yield None
            return
    partial = Partial(folder, asked)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            check_made(folder, asked, resume=resume, name=str(folder))
            note(f"{folder} is complete already")
            shutil.rmtree(partial.folder, ignore_errors=True)  # of what was killed at its end
            yield None
        else:
            with partial.held(resume=resume, note=note):
                yield partial
        if at_address:
            note(f"Copying it to {shown(place)}")
            _copy(folder, place)
            shutil.rmtree(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error


def described(address: str, cache: Path) -> Path:
    """Return a folder of this machine with all of a dataset at an address but its tokens."""
    folder = fetch_description(address, cache)
    if (record := store.if_there(beside(address, PREPARED_JSON), "cat_file")) is not None:
        write_atomically(folder / PREPARED_JSON, record)
    return folder


def _is_there(address: str, asked: Asked, resume: bool) -> bool:
    """Return whether a dataset made as asked is at an address; refuse to write over others."""
    if "https" in store.file_system(address)[0].protocol:
        raise DataError(f"{shown(address)}: cannot be written to; name a folder or a bucket")
    there = store.names_at(address)
    with tempfile.TemporaryDirectory() as cache:
        try:
            folder = described(address, Path(cache))
        except DataError:  # there is none, or it was cut off
            if there and not resume:
                problem = "exists already and is not empty; --resume continues an interrupted copy"
                remedy = "else name a new folder or remove it"
                raise DataError(f"{shown(address)}: {problem}, {remedy}") from None
            return False
        check_made(folder, asked, resume=resume, name=shown(address))
    return True


def _copy(folder: Path, address: str) -> None:
    """Copy a dataset to an address, less what an earlier copy of the same has left there."""
    order = {PREPARED_JSON: 0, DATASET_JSON: 2}
    try:
        there = store.names_at(address)
        if there.keys() - {f"{PREPARED_JSON}.part"}:  # the first, cut off
            same = PREPARED_JSON in there and remote(beside(address, PREPARED_JSON), "cat_file")
            if same != (folder / PREPARED_JSON).read_bytes():
                raise DataError(f"{shown(address)}: holds something else; remove it")
        for path in sorted(folder.iterdir(), key=lambda path: (order.get(path.name, 1), path)):
            if there.get(path.name) != path.stat().st_size:
                store.put(beside(address, path.name), path)
    except DataError as error:
        raise DataError(f"{error}; --resume continues the copy of {folder}") from error


def parts_of(place: str) -> tuple[list[str], list[Path], list[dict[str, Any]], Asked]:
    """Return all parts of one dataset in a folder or at an address, in order; refuse a mixed set.

    Their places, local folders and `dataset.json`, and the options of the whole dataset.
    """
    if is_address(place):
        names = [n for n in store.names_at(place) if DATASET_JSON in store.names_at(f"{place}/{n}")]
    else:
        names = [path.name for path in Path(place).glob("*")]
    found = sorted(name for name in names if re.fullmatch(r"\d+-of-\d+", name))
    wanted = [f"{number}-of-{len(found)}" for number in range(1, len(found) + 1)]
    if not found or set(found) != set(wanted):
        raise DataError(
            f"{shown(place)}: has {', '.join(found) or 'no parts'}, not 1-of-N to N-of-N; make "
            "what is missing (--resume continues an interrupted part), remove what is too many"
        )
    parts = [f"{place}/{name}" for name in wanted]
    folders = [described(p, store.cache_folder()) if is_address(p) else Path(p) for p in parts]
    metas = [read_dataset_json(folder) for folder in folders]
    asked: list[Any] = [read_json(f / PREPARED_JSON, "make it anew", DataError) for f in folders]
    for number, (folder, part, meta) in enumerate(zip(folders, asked, metas, strict=True), 1):
        other = other_than(part, asked[0], folder / PREPARED_JSON)
        for file, kind, value in (
            (PREPARED_JSON, _PartRecord, part),
            (DATASET_JSON, _PartDescription, meta),
        ):
            if problem := misfit(kind, value):
                raise DataError(f"{folder / file}: damaged ({problem}); make it anew")
        for name in ("tokenizer", "vocab_size", "end_of_text"):
            if not other and meta[name] != metas[0][name]:
                other = f"another {name}"
        if missing := sorted(set(SPLITS) - meta["splits"].keys()):
            raise DataError(f"{folder / DATASET_JSON}: lists no split {missing[0]}; make it anew")
        if not other and (name := part["source"].get("part")) != f"{number}/{len(folders)}":
            other = f"part = {name}"
        if other:
            raise DataError(f"{folder}: not of the dataset of {folders[0].name}: it had {other}")
    del asked[0]["source"]["part"]
    return parts, folders, metas, asked[0]


def check_made(folder: Path, asked: Asked, *, resume: bool, name: str) -> None:
    """Refuse a folder that holds something, unless the run that made it as asked is resumed."""
    if not (folder / DATASET_JSON).is_file():
        raise DataError(f"{name}: exists already and is not empty; name a new folder or remove it")
    record, other = folder / PREPARED_JSON, ""
    if resume and not record.exists():  # made by an earlier fasttrain
        other = " that has no record of the files it was made of"
    elif resume:
        other = other_than(read_json(record, ANEW, DataError), asked, record)
        other = other and f" made of something else: it had {other}"
    if other or not resume:
        remedy = "train on it as it is, remove it, or name a new folder"
        raise DataError(f"{name}: exists already and holds a dataset{other}; {remedy}")


def other_than(before: Any, asked: Asked, path: Path) -> str:
    """Return what was asked for `before`, in the file `path`, and is not in `asked`, in words."""
    if problem := misfit(Asked, before):
        raise DataError(f"{path}: damaged ({problem}); {ANEW}")
    old, new = _facts(before), _facts(asked)
    for name in new | old:
        was, now = old.get(name, "nothing"), new.get(name, "nothing")
        if was != now:
            return f"{name} = {was!r}, this one has {now!r}"
    return ""


def _facts(asked: Asked) -> dict[str, Any]:
    """Return what shapes a dataset, by name."""
    options = {k: v for k, v in asked["source"].items() if k not in ("n_files", "n_bytes", "part")}
    files: dict[str, list[Any]] = {}
    for name, *facts in asked["files"]:  # addresses may differ in what is not kept of them
        files.setdefault(f"file {name}", []).extend(facts)
    others = {"fasttrain and tokenizers": asked["recipe"]}
    return options | files | {"tokenizer's SHA-256": asked["tokenizer_sha256"]} | others


def _sync(path: Path) -> None:
    """Have a file survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        store.sync(descriptor, path)
    finally:
        os.close(descriptor)
