"""The parts around a training step: loader, text to tokens, saves; see docs/benchmarks.md."""

import json
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.utils.data import DataLoader

from benchmarks.bench_step import config_of
from benchmarks.harness import CUDA, DEVICE, OURS, rounds_within, seconds, turns
from fasttrain.checkpoint import CheckpointWriter
from fasttrain.config import config_to_toml
from fasttrain.data.format import open_dataset
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.data.tokenizer import FastBpe, train_bpe
from fasttrain.prepare import prepare

N_TOKENS, VOCAB_SIZE, BATCH, LENGTH = 100_000_000, 50_257, 64, 1024


@pytest.mark.figures("data")
def test_random_windows(tmp_path: Path, compare: Any) -> None:
    path = tmp_path / "train.bin"
    np.random.default_rng(0).integers(0, VOCAB_SIZE, N_TOKENS, dtype=np.uint16).tofile(path)
    about: Any = {"dtype": "uint16", "vocab_size": VOCAB_SIZE, "cache_dir": tmp_path / "cache"}
    dataset = open_dataset(tmp_path, "train", **about)

    def opened() -> np.ndarray:
        return sliding_window_view(np.memmap(path, np.uint16, "r"), LENGTH + 1)[::LENGTH]

    windows, rows = opened(), np.empty((BATCH, LENGTH + 1), np.uint16)
    order = np.random.default_rng(1).permutation(len(windows))
    batches = cycle(order[: len(order) // BATCH * BATCH].reshape(-1, BATCH).tolist())

    def stacked(windows: np.ndarray, indices: list[int]) -> Tensor:
        return torch.stack([torch.from_numpy(windows[i].astype(np.int64)) for i in indices])

    def split(ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids[:, :-1], ids[:, 1:]

    def raw_slicing() -> tuple[Tensor, Tensor]:
        for row, index in enumerate(next(batches)):
            rows[row] = windows[index]
        return split(torch.from_numpy(rows.astype(np.int64)))

    def get_batch() -> tuple[Tensor, Tensor]:  # it opens the file each time
        indices, parts = next(batches), opened()
        return stacked(parts[:, :-1], indices), stacked(parts[:, 1:], indices)

    def data_loader(workers: int) -> Callable[[], tuple[Tensor, Tensor]]:
        options: Any = {"shuffle": True, "drop_last": True, "num_workers": workers}
        options["collate_fn"] = partial(stacked, windows)
        found = chain.from_iterable(repeat(DataLoader(range(len(windows)), BATCH, **options)))
        return lambda: split(next(found))

    options = LoaderOptions(seq_len=LENGTH, micro_batch=BATCH)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each way converts on one core
    with Loader(dataset, options, device="cpu") as loader, ExitStack() as later:
        later.callback(torch.set_num_threads, threads)

        def ours() -> tuple[Tensor, Tensor]:
            batch = next(loader)
            return batch.tokens, batch.targets

        ways = {OURS: ours, "raw slicing": raw_slicing, "get_batch": get_batch}
        ways |= {"DataLoader": data_loader(0), "DataLoader, 2 workers": data_loader(2)}
        for name, way in ways.items():
            inputs, targets = way()
            assert (inputs.shape, inputs.dtype) == ((BATCH, LENGTH), torch.int64), name
            assert torch.equal(inputs[:, 1:], targets[:, :-1]), name
        # What was prefetched before a timing of 256 calls is 6 % of them.
        compare(ways, n_calls=256, per_call={"tokens_per_s": BATCH * LENGTH})


def source_texts(n_bytes: int) -> list[str]:
    """Return files of the standard library: real text, again and again until there is enough."""
    found = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    paths = [p for p in found if not {"site-packages", "dist-packages"} & set(p.parts)]
    texts = [path.read_text("utf-8", errors="ignore") for path in paths]
    once = sum(len(text.encode()) for text in texts)
    return (texts * (n_bytes // once + 1))[: len(texts) * n_bytes // once]


@pytest.mark.figures("data")
def test_data_wait(tmp_path: Path, compare: Any) -> None:
    """What a step of 5 ms waits for a batch: at an address with a warm cache, and on the disk."""
    (tmp_path / "in.txt").write_text("".join(source_texts(4 * 10**6)), "utf-8")
    given: Any = {"tokenizer": "bytes", "shard_tokens": 10**6, "note": [].append}
    prepare(tmp_path / "data", [str(tmp_path / "in.txt")], **given)
    places = {f"{OURS}, cache warm": f"file://{tmp_path}/data", "disk": str(tmp_path / "data")}

    def wait(loader: Loader) -> float:
        before = loader.wait_s
        for _ in range(n_batches := 64):
            next(loader)
            time.sleep(0.005)
        return (loader.wait_s - before) / n_batches

    with ExitStack() as stack:
        ways = {}
        for name, place in places.items():
            dataset = open_dataset(place, "train", cache_dir=tmp_path / "cache")
            dataset.read(0, dataset.n_tokens)  # fetches each shard
            loader = Loader(dataset, LoaderOptions(seq_len=LENGTH, micro_batch=BATCH), device="cpu")
            ways[name] = partial(wait, stack.enter_context(loader))
            next(loader)
        compare(ways, rounds=rounds_within(3.0))


@pytest.mark.figures("prepare")
@pytest.mark.parametrize("megabytes", [12, 48])
def test_prepare(compare: Any, tmp_path: Path, full: bool, megabytes: int) -> None:
    pytest.importorskip("tiktoken", reason="needs the optional package tiktoken")
    if megabytes > 12 and not full:
        pytest.skip("takes two minutes: --full")
    texts = source_texts(megabytes * 10**6)
    source, trained = tmp_path / "in.jsonl", str(tmp_path / "tokenizer.json")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    tokenizer = train_bpe(dict.fromkeys(texts), 32_768)
    tokenizer.save(trained)
    n_cores = len(os.sched_getaffinity(0))
    notes: list[str] = []

    def ours() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        options = {"tokenizer": trained, "workers": n_cores, "note": notes.append}
        prepare(tmp_path / "out", [str(source)], **options)

    def by_block(encode: Callable[[list[str]], object]) -> None:
        for start in range(0, len(texts), 500):
            encode(texts[start : start + 500])

    tiktoken = FastBpe(tokenizer)._tiktoken.encode_ordinary_batch
    encoders = {
        "encode_batch": tokenizer.encode_batch,
        "encode_batch_fast": tokenizer.encode_batch_fast,  # without offsets
        "tiktoken": partial(tiktoken, num_threads=n_cores),
    }
    ways = {"prepare": ours} | {key: partial(by_block, way) for key, way in encoders.items()}
    n_bytes = sum(len(text.encode()) for text in texts)
    compare(ways, warmup=0, per_call={"mb_per_s": n_bytes / 1e6})
    assert not any("not tiktoken" in note or "does not split" in note for note in notes)


@pytest.mark.figures("checkpoint")
@pytest.mark.filterwarnings("ignore::UserWarning")  # dcp: no process group
def test_stall_of_a_save(compare: Any, rehearse: bool, full: bool, tmp_path: Path) -> None:
    # Shaped as a GPT-2-like model: matrices of 4·dim × dim and small vectors.
    dim = 128 if rehearse else 1600 if full else 704
    shapes = [(4 * dim, dim)] * 12 + [(dim,)] * 48
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
    pending: list[Any] = []

    def plain_copy() -> None:
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)

    def async_save(stager: Callable[[], DefaultStager]) -> None:
        pending.append(dcp.async_save(groups, async_stager=stager(), **to_dcp))

    new_stager = partial(DefaultStager, StagingOptions(**options))
    kept = new_stager()

    calls: dict[str, Callable[[], object]] = {
        "save": partial(writer.save, 1, groups, {}, config_to_toml(config_of({}))),
        "torch.save": partial(torch.save, groups, tmp_path / "torch.pt"),
        "dcp.save": partial(dcp.save, groups, **to_dcp),
        "dcp.async_save": partial(async_save, new_stager),
        "dcp.async_save, stager kept": partial(async_save, lambda: kept),
        "plain copy": plain_copy,  # beside our save in most rounds: the same memory and disk
    }

    def stall(name: str) -> float:
        took_s = seconds(calls[name], flush=False)
        # Wait until all is written, and forget it.
        writer.wait()
        while pending:
            future = pending.pop()
            getattr(future, "upload_completion", future).result()
        (tmp_path / "torch.pt").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "dcp", ignore_errors=True)
        return took_s

    ways = {name: partial(stall, name) for name in calls}
    turns(ways, [0])  # allocates the buffers
    compare(ways, rounds=rounds_within(40.0 if full else 6.0))
