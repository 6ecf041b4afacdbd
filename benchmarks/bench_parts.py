"""The parts around a training step: the loader, text to tokens, saves, and the start of a run.

``test_random_windows``: ways to cut random windows out of 100M uint16 tokens in page cache, batches
of 64 windows of 1,025, each ending at int64 tokens and targets. The loader's order and its handing
over from another thread are part of its time; raw slicing and ``get_batch`` (nanoGPT's) get their
positions for nothing; DataLoader is torch's.

``test_prepare``: the whole of `fasttrain.prepare` on 12 MB of Python source in JSON lines (with
``--full`` also 48), from the file to shards and hashes on disk, against bare encoders, which get
the texts in memory and drop what they return, a thread for each core.

``test_stall_of_a_save``: how long a save of parameters and two moments holds the training thread,
0.3 GB or with ``--full`` 1.5 GB, each after the one before has written all its bytes. The yardstick
is a plain copy of the bytes into memory that is there already. ``slowdown`` is the time of a step
(two matrix products on every thread of a CPU) while our thread writes, over its time without.

``test_first_step``: from ``python`` to the line of the first step of configs/base.toml, dataset
cached and nothing compiled, beside an import of torch.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.utils.data import DataLoader

from benchmarks.harness import CUDA, DEVICE, OURS, comparison, rounds_within, run, seconds, turns
from benchmarks.steps import BASE, config_of, dataset_of
from benchmarks.store import ENV, ROOT
from fasttrain.checkpoint import CheckpointWriter
from fasttrain.config import config_to_toml
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.data.tokenizer import TEXT_PATTERN, FastBpe, train_bpe
from fasttrain.prepare import prepare

# ---- the loader ----------------------------------------------------------------------------------

N_TOKENS, VOCAB_SIZE, BATCH, LENGTH = 100_000_000, 50_257, 64, 1024


class Windows:
    """A dataset for DataLoader, and what the others slice."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, np.uint16, "r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def slice(self, index: int, shift: int = 0, length: int = LENGTH + 1) -> np.ndarray:
        return self.tokens[index * LENGTH + shift :][:length]

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.slice(index).astype(np.int64))


def loader_ways(path: Path) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Return ways to get a batch of tokens and targets."""
    windows = Windows(path)
    rows = np.empty((BATCH, LENGTH + 1), np.uint16)

    def at_random() -> Iterator[list[int]]:
        order = np.random.default_rng(1).permutation(len(windows))
        return cycle(order[: len(order) // BATCH * BATCH].reshape(-1, BATCH).tolist())

    def split(ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids[:, :-1], ids[:, 1:]

    def raw_slicing(batches: Iterator[list[int]]) -> tuple[Tensor, Tensor]:
        for row, index in enumerate(next(batches)):
            rows[row] = windows.slice(index)
        return split(torch.from_numpy(rows.astype(np.int64)))

    def get_batch(batches: Iterator[list[int]]) -> tuple[Tensor, Tensor]:
        indices, opened = next(batches), Windows(path)

        def stacked(shift: int) -> Tensor:
            parts = (opened.slice(i, shift, LENGTH).astype(np.int64) for i in indices)
            return torch.stack([torch.from_numpy(part) for part in parts])

        return stacked(0), stacked(1)

    def data_loader(workers: int) -> Callable[[], tuple[Tensor, Tensor]]:
        loader: Any = DataLoader(
            windows, BATCH, shuffle=True, drop_last=True, num_workers=workers
        )  # fmt: skip
        batches = chain.from_iterable(repeat(loader))
        return lambda: split(next(batches))

    return {
        "raw slicing": partial(raw_slicing, at_random()),
        "get_batch": partial(get_batch, at_random()),
        "DataLoader": data_loader(0),
        "DataLoader, 2 workers": data_loader(2),
    }


@pytest.mark.figures("data")
def test_random_windows(tmp_path: Path, compare: Any) -> None:
    random = np.random.default_rng(0).integers(0, VOCAB_SIZE, N_TOKENS, dtype=np.uint16)
    dataset = dataset_of(tmp_path, random, VOCAB_SIZE)
    options = LoaderOptions(seq_len=LENGTH, micro_batch=BATCH)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each way converts on one core
    try:
        with Loader(dataset, options, device="cpu") as loader:
            ways: dict[str, Any] = {
                OURS: lambda: next(loader),
                **loader_ways(tmp_path / "train.bin"),
            }
            for name, way in ways.items():
                batch = way()
                inputs, targets = (batch.tokens, batch.targets) if name == OURS else batch
                assert (inputs.shape, inputs.dtype) == ((BATCH, LENGTH), torch.int64), name
                assert torch.equal(inputs[:, 1:], targets[:, :-1]), name
            # What was prefetched before a timing of 256 calls is 6 % of them.
            compare(ways, n_calls=256, per_call={"tokens_per_s": BATCH * LENGTH})
    finally:
        torch.set_num_threads(threads)


# ---- text to tokens ------------------------------------------------------------------------------


def source_texts(n_bytes: int) -> list[str]:
    """Source files of the standard library, again and again until there is enough."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts: list[str] = []
    for path in [p for p in paths if not {"site-packages", "dist-packages"} & set(p.parts)]:
        with suppress(OSError, UnicodeDecodeError):
            texts.append(path.read_text())
    once = sum(len(text.encode()) for text in texts)
    return (texts * (n_bytes // once + 1))[: len(texts) * n_bytes // once]


@pytest.mark.figures("prepare")
@pytest.mark.parametrize("megabytes", [12, 48])
def test_prepare(compare: Any, tmp_path: Path, full: bool, megabytes: int) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs the optional package tiktoken")
    if megabytes > 12 and not full:
        pytest.skip("takes two minutes: --full")
    texts = source_texts(megabytes * 10**6)
    source, trained = tmp_path / "in.jsonl", str(tmp_path / "tokenizer.json")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    tokenizer = train_bpe(dict.fromkeys(texts), 32_768)
    tokenizer.save(trained)
    words, _ = FastBpe.ranks(json.loads(tokenizer.to_str())["model"])
    ranks = {word: rank for rank, word in enumerate(words)}
    ranked = tiktoken.Encoding(
        "bench", pat_str=TEXT_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    n_cores = len(os.sched_getaffinity(0))
    notes: list[str] = []

    def ours() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        options = {"tokenizer": trained, "workers": n_cores, "note": notes.append}
        prepare(tmp_path / "out", [str(source)], **options)

    def by_block(encode: Callable[[list[str]], object]) -> None:
        for start in range(0, len(texts), 500):
            encode(texts[start : start + 500])

    encoders = {
        "encode_batch": tokenizer.encode_batch,
        "encode_batch_fast": tokenizer.encode_batch_fast,  # without offsets
        "tiktoken": partial(ranked.encode_ordinary_batch, num_threads=n_cores),
    }
    ways = {"prepare": ours} | {key: partial(by_block, way) for key, way in encoders.items()}
    n_bytes = sum(len(text.encode()) for text in texts)
    compare(ways, warmup=0, per_call={"mb_per_s": n_bytes / 1e6})
    assert not any("not tiktoken" in note or "does not split" in note for note in notes)


# ---- saves ---------------------------------------------------------------------------------------

N_STEPS = 20  # a few of them take a second


@pytest.mark.figures("checkpoint")
@pytest.mark.filterwarnings("ignore::UserWarning")  # dcp: no process group
def test_stall_of_a_save(
    benchmark: Any, rehearse: bool, full: bool, budget_s: float, tmp_path: Path
) -> None:
    # Shaped as a GPT-2-like model: matrices of 4·dim × dim and small vectors.
    dim, n_matrices = (128, 16) if rehearse else (1600, 12) if full else (704, 12)
    shapes = [(4 * dim, dim)] * n_matrices + [(dim,)] * 48
    model = {f"w{i}": torch.randn(shape, device=DEVICE) for i, shape in enumerate(shapes)}
    moments = {f"{n}.{m}": t.square() for n, t in model.items() for m in ("exp_avg", "exp_avg_sq")}
    groups = {"model": model, "optimizer": moments}
    tensors = [*model.values(), *moments.values()]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=CUDA) for t in tensors]
    writer = CheckpointWriter(tmp_path / "checkpoints", keep_last=1)
    to_dcp: dict[str, Any] = {"checkpoint_id": tmp_path / "dcp", "no_dist": True}
    # Of its options those of which none needs a GPU, or all.
    options = dict.fromkeys(("use_pinned_memory", "use_non_blocking_copy"), CUDA)
    options |= {"use_shared_memory": False, "use_async_staging": False}
    kept, pending = DefaultStager(StagingOptions(**options)), []

    def plain_copy() -> None:
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)

    def async_save(stager: DefaultStager | None = None) -> None:
        stager = stager or DefaultStager(StagingOptions(**options))
        pending.append(dcp.async_save(groups, async_stager=stager, **to_dcp))

    calls: dict[str, Callable[[], object]] = {
        "save": partial(writer.save, 1, groups, {}, config_to_toml(config_of({}))),
        "torch.save": partial(torch.save, groups, tmp_path / "torch.pt"),
        "dcp.save": partial(dcp.save, groups, **to_dcp),
        "dcp.async_save": async_save,
        "dcp.async_save, stager kept": partial(async_save, kept),
        "plain copy": plain_copy,  # beside our save in most rounds: the same memory and disk
    }
    slowdowns: list[float] = []
    timed = partial(seconds, flush=False)
    a = torch.randn(1024, 1024, device=DEVICE)

    def step() -> None:
        torch.mm(torch.mm(a, a), a)

    def finish() -> None:
        """Wait until all is written, and forget it."""
        writer.wait()
        while pending:
            future = pending.pop()
            getattr(future, "upload_completion", future).result()
        (tmp_path / "torch.pt").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "dcp", ignore_errors=True)

    def stall(name: str) -> float:
        if name == "save":  # steps while it writes, against those before and after
            alone = [timed(step) for _ in range(N_STEPS)]
            calls[name]()
            thread, during = writer._thread, []
            while len(during) < 2 * N_STEPS and thread.is_alive():
                during.append(timed(step))
            finish()
            alone += [timed(step) for _ in range(N_STEPS)]
            slowdowns.append(statistics.median(during or alone) / statistics.median(alone))
        took = timed(calls[name])
        finish()
        return took

    ways = {name: partial(stall, name) for name in calls}
    turns(ways, [0])  # allocates the buffers
    slowdowns.clear()
    times = benchmark.pedantic(turns, args=(ways, rounds_within(2 * budget_s)))
    gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
    slowdown = statistics.median(slowdowns)
    benchmark.extra_info.update(comparison(times), gigabytes=gigabytes, slowdown=slowdown)


# ---- the start of a run --------------------------------------------------------------------------


def first_step(folder: Path) -> None:
    """Start a process and wait for its line for step 1."""
    command = [sys.executable, "-m", "fasttrain.train", str(BASE)]
    command += ["run.compile=off", f"run.out_dir={folder}", "log.every_steps=1"]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ENV, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            lines.append(line)
            if line.split()[:2] == ["step", "1"]:
                process.kill()
                return
    pytest.fail("no step was reported:\n" + "".join(lines))


@pytest.mark.figures("startup")
def test_first_step(compare: Any, benchmark: Any, budget_s: float, tmp_path: Path) -> None:
    first_step(tmp_path)  # makes the dataset where it is not cached
    ways = {
        OURS: partial(first_step, tmp_path),
        "import of torch": partial(run, "-c", "import torch"),
    }
    median_s = compare(ways, budget_s=3 * budget_s, warmup=0)
    benchmark.extra_info["first_step_s"] = median_s[OURS]
