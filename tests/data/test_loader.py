"""Batches: the right windows in the right order, whoever asks, and errors that arrive.

Those of the held-out split too: every target once, in order, after its context.
"""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.data import loader as loader_module
from fasttrain.data.dataset import Shard
from fasttrain.data.format import DataError, TokenDataset, open_dataset
from fasttrain.data.loader import IGNORE_INDEX, Batch, Loader, Stored, evaluation_batches
from fasttrain.data.order import LoaderOptions
from fasttrain.model.attention import attention_mask
from fasttrain.prepare.writer import ShardWriter

N_TOKENS = 1000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Tokens 0 … 999 in three shards, so that a token says where it lies."""
    folder = tmp_path_factory.mktemp("data")
    with closing(ShardWriter(folder, "train", vocab_size=N_TOKENS, shard_tokens=400)) as writer:
        writer.write(np.arange(N_TOKENS))
    return open_dataset(folder, "train", vocab_size=N_TOKENS, cache_dir=folder / "cache")


def make(
    dataset: TokenDataset, *, position: int = 0, device: str = "cpu", **others: object
) -> Loader:
    if isinstance(end := others.pop("end", None), int):  # before which sample, of epochs of 99
        others["epochs"] = Fraction(end, (N_TOKENS - 1) // 10)
    options = LoaderOptions(**{"seq_len": 10, "micro_batch": 4, "seed": 7} | others)  # type: ignore[arg-type]
    return Loader(dataset, options, device=device, position=position)


def no_threads_left() -> bool:
    return not any(t.name == "fasttrain-loader" for t in threading.enumerate())


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    yield
    assert no_threads_left()


def test_rows_are_the_windows_that_the_order_names(dataset: TokenDataset) -> None:
    with make(dataset) as loader:
        assert loader.samples_per_epoch == 99
        assert loader.order.dropped_tokens == N_TOKENS - 1 - 99 * 10
        for number in range(60):  # into the third epoch
            batch = next(loader)
            assert batch.tokens.dtype == batch.targets.dtype == torch.int64
            assert batch.tokens.shape == batch.targets.shape == (4, 10)
            assert batch.tokens.is_contiguous()
            assert batch.targets.is_contiguous()
            ids = torch.from_numpy(loader.sample_ids(4 * number, 4))
            expected = ids[:, None] * 10 + torch.arange(11)
            assert torch.equal(batch.tokens, expected[:, :-1])
            assert torch.equal(batch.targets, expected[:, 1:])
            assert batch.position == loader.position == 4 * (number + 1)
        assert loader.wait_s > 0


def test_R3_each_token_is_a_target_once_an_epoch(dataset: TokenDataset) -> None:
    with make(dataset, micro_batch=5, end=2 * 99) as loader:
        targets = torch.cat([batch.targets.flatten() for batch in loader])
        counts = torch.bincount(targets[targets != IGNORE_INDEX], minlength=N_TOKENS)
    assert counts[0] == 0
    assert torch.equal(counts[1:991], torch.full((990,), 2))
    assert not counts[991:].any()  # the dropped tail


@settings(max_examples=25)
@given(
    ranks=st.sampled_from([1, 2, 3]),
    micro_batch=st.integers(1, 7),
    prefetch=st.integers(1, 12),
    position=st.integers(0, 400),
    seed=st.integers(0, 2**31),
)
def test_R28_order_is_independent_of_ranks_prefetch_and_micro_batch(
    dataset: TokenDataset, ranks: int, micro_batch: int, prefetch: int, position: int, seed: int
) -> None:
    options = {"micro_batch": micro_batch, "prefetch": prefetch, "position": position, "seed": seed}
    loaders = [make(dataset, rank=r, world_size=ranks, **options) for r in range(ranks)]
    first = []
    for _ in range(5):
        for loader in loaders:  # the order that the rows of a global micro-batch have
            first += (next(loader).tokens[:, 0] // 10).tolist()
    for loader in loaders:
        assert loader.position == position + len(first)
        loader.close()
    with make(dataset, micro_batch=1, seed=seed) as plain:
        assert first == plain.sample_ids(position, len(first)).tolist()


def test_R3_ten_random_kills_lose_and_repeat_nothing(dataset: TokenDataset) -> None:
    rng = np.random.default_rng(0)
    seen: list[int] = []
    position = 0
    for _ in range(10):  # each start knows nothing but the integer of the last committed step
        with make(dataset, position=position) as loader:
            for _ in range(int(rng.integers(0, 12))):
                batch = next(loader)
                seen += (batch.tokens[:, 0] // 10).tolist()
                position = batch.position
            for _ in range(int(rng.integers(0, 3))):
                next(loader)  # trained on, not committed
    with make(dataset) as loader:
        assert seen == loader.sample_ids(0, len(seen)).tolist()
    assert len(seen) > 99


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_beyond_the_end_have_no_targets_and_the_shape_stays(
    dataset: TokenDataset, world_size: int
) -> None:
    valid, batches = 0, []
    for rank in range(world_size):
        with make(dataset, end=21, rank=rank, world_size=world_size) as loader:
            mine = list(loader)
            with pytest.raises(StopIteration):
                next(loader)
        batches.append(len(mine))
        for batch in mine:
            assert batch.targets.shape == (4, 10)
            rows = (batch.targets != IGNORE_INDEX).all(dim=1)
            assert torch.equal(rows, (batch.targets != IGNORE_INDEX).any(dim=1))
            assert rows.tolist() == sorted(rows.tolist(), reverse=True)
            valid += int(rows.sum())
        assert mine[-1].position == 24
    assert valid == 21
    assert batches == ([6] if world_size == 1 else [3, 3])


def test_a_loader_at_or_after_its_end_is_empty(dataset: TokenDataset) -> None:
    for position in (20, 24):
        with make(dataset, position=position, end=20) as loader:
            assert list(loader) == []


def test_a_batch_is_never_overwritten(dataset: TokenDataset) -> None:
    with make(dataset, prefetch=2) as loader:
        kept = [next(loader) for _ in range(30)]
        copies = [(batch.tokens.clone(), batch.targets.clone()) for batch in kept]
        for _ in range(30):
            next(loader)
    for batch, (tokens, targets) in zip(kept, copies, strict=True):
        assert torch.equal(batch.tokens, tokens)
        assert torch.equal(batch.targets, targets)
        assert torch.equal(batch.tokens + 1, batch.targets)


class Watched:
    """A dataset that notes how many windows each call reads, or fails."""

    def __init__(self, dataset: TokenDataset, error: BaseException | None = None) -> None:
        self.dataset, self.error = dataset, error
        self.reads: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.dataset, name)

    def read_windows(self, starts: np.ndarray, *rest: object) -> None:
        self.reads.append(len(starts))
        if self.error is not None:
            raise self.error
        self.dataset.read_windows(starts, *rest)

    def settled(self, at_least: int) -> list[int]:
        """The reads, once there are so many, and as many as there will be."""
        deadline = time.monotonic() + 120
        while len(self.reads) < at_least and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        return list(self.reads)


def test_the_thread_works_ahead_but_not_further_than_prefetch(dataset: TokenDataset) -> None:
    watched = Watched(dataset)
    with make(watched, prefetch=3) as loader:  # type: ignore[arg-type]
        assert watched.settled(4) == 4 * [4]  # three ready and one in hand
        next(loader)
        assert watched.settled(5) == 5 * [4]


def test_half_of_the_batches_ahead_are_read_together(dataset: TokenDataset) -> None:
    watched = Watched(dataset)
    with make(watched, prefetch=8, end=4 * 12 + 1) as loader:  # type: ignore[arg-type]
        assert watched.settled(3) == [16, 16, 16]
        positions = [batch.position for batch in loader]
        assert positions == list(range(4, 4 * 13 + 1, 4))  # the last one has one row
    assert watched.reads == [16, 16, 16, 4]


def own_copy(dataset: TokenDataset, folder: Path) -> TokenDataset:
    with closing(ShardWriter(folder, "train", vocab_size=N_TOKENS)) as writer:
        writer.write(dataset.read(0, N_TOKENS))
    return open_dataset(folder, "train", vocab_size=N_TOKENS, cache_dir=folder / "cache")


@pytest.mark.parametrize("damage", ["truncate", "replace"])
def test_R23_a_shard_changed_mid_run_is_a_typed_error(
    dataset: TokenDataset, tmp_path: Path, damage: str
) -> None:
    mine = own_copy(dataset, tmp_path)
    path = tmp_path / "train_000000.bin"
    with make(mine) as loader:
        next(loader)
        if damage == "truncate":
            with path.open("r+b") as file:
                file.truncate(1200)
        else:
            (tmp_path / "other").write_bytes(bytes(path.stat().st_size))
            (tmp_path / "other").replace(path)
        with pytest.raises(DataError, match=r"train_000000\.bin: .*truncated"):
            list(itertools.islice(loader, 50))
        with pytest.raises(DataError, match=r"train_000000\.bin"):  # and again, no hang
            next(loader)


def test_R9_a_hung_read_is_named_and_fatal_within_its_deadline(
    dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = own_copy(dataset, tmp_path)
    hang = threading.Event()
    read = Shard.read

    def slow(shard: Shard, pieces: Iterable[tuple[int, memoryview]]) -> None:
        hang.wait(300)
        read(shard, pieces)

    monkeypatch.setattr(Shard, "read", slow)
    monkeypatch.setattr(loader_module, "DEADLINE_S", 0.3)
    loader = make(mine)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"train_000000\.bin: .*\b0\.3 s\b"):
        next(loader)
    assert time.monotonic() - begin < 250
    hang.set()
    loader.close()


def test_an_error_of_any_kind_in_the_thread_arrives(dataset: TokenDataset) -> None:
    watched = Watched(dataset, MemoryError("no room for a batch"))
    with make(watched) as loader, pytest.raises(MemoryError, match="no room"):  # type: ignore[arg-type]
        next(loader)


def test_close_ends_the_thread_and_the_batches(dataset: TokenDataset) -> None:
    loader = make(dataset)
    next(loader)
    loader.close()
    assert no_threads_left()
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_the_interpreter_ends_cleanly_without_close(dataset: TokenDataset) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from fasttrain.data.format import open_dataset\n"
        "from fasttrain.data.loader import Loader\n"
        "from fasttrain.data.order import LoaderOptions\n"
        "data = open_dataset(sys.argv[1], 'train', cache_dir=Path(sys.argv[1]) / 'cache')\n"
        "loader = Loader(data, LoaderOptions(seq_len=10, micro_batch=4), device='cpu')\n"
        "print(next(loader).position)\n"
    )
    folder = str(dataset.shards[0].path.parent)
    result = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=400
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "4\n", "")


def test_a_sequence_longer_than_the_data_is_refused(dataset: TokenDataset) -> None:
    with make(dataset, seq_len=999) as loader:
        assert (loader.samples_per_epoch, loader.order.dropped_tokens) == (1, 0)
    with pytest.raises(DataError, match=r"data\.seq_len = 1000\b.*\bdata\.seq_len\b.*\b999\b"):
        make(dataset, seq_len=1000)


def test_a_loader_moves_to_any_position_of_its_order(dataset: TokenDataset) -> None:
    options = {"world_size": 2, "rank": 1, "end": 150, "seed": 3}
    with make(dataset, **options) as whole, whole.at(104) as moved:
        rest = [batch for batch in whole if batch.position > 104]
        for expected, batch in zip(rest, moved, strict=True):
            assert batch.position == expected.position
            assert torch.equal(batch.tokens, expected.tokens)
            assert torch.equal(batch.targets, expected.targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies on a side stream")
@pytest.mark.parametrize(("vocab_size", "prefetch"), [(1000, 16), (70_000, 1)])
def test_batches_on_the_gpu_equal_those_on_the_cpu(
    tmp_path: Path, vocab_size: int, prefetch: int
) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab_size, 50_000)
    with closing(ShardWriter(tmp_path, "train", vocab_size=vocab_size)) as writer:
        writer.write(tokens)
    data = open_dataset(tmp_path, "train", vocab_size=vocab_size, cache_dir=tmp_path / "cache")
    epochs = Fraction(2 * 390 + 3, 390)
    options = {"seq_len": 128, "micro_batch": 8, "epochs": epochs, "prefetch": prefetch}
    with make(data, **options) as here, make(data, device="cuda", **options) as there:
        kept = list(there)
        for expected, batch in zip(here, kept, strict=True):
            assert batch.tokens.is_cuda
            assert (batch.position, batch.n_tokens) == (expected.position, expected.n_tokens)
            assert torch.equal(batch.tokens.cpu(), expected.tokens)
            assert torch.equal(batch.targets.cpu(), expected.targets)


@pytest.mark.parametrize("seq_len", [1, 10, 27, 37, 999, 1000, 5000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_covers_every_target_once_in_order(
    dataset: TokenDataset, seq_len: int, world_size: int
) -> None:
    batch_size = 100 if seq_len == 1 else 4
    per_rank = [
        list(
            evaluation_batches(
                dataset,
                LoaderOptions(
                    seq_len=seq_len, micro_batch=batch_size, rank=rank, world_size=world_size
                ),
                "cpu",
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    targets = []
    for batches in zip(*per_rank, strict=True):
        for batch in batches:
            assert batch.tokens.shape == batch.targets.shape == (batch_size, seq_len)
            valid = batch.targets != IGNORE_INDEX
            assert torch.equal(batch.tokens[valid] + 1, batch.targets[valid])
            assert not batch.tokens[~valid].any()
            targets += batch.targets[valid].tolist()
    assert targets == list(range(1, N_TOKENS))


@pytest.mark.parametrize(("seq_len", "stride"), [(10, 10), (10, 3), (64, 16), (1000, 1), (5000, 7)])
def test_overlapping_windows_have_every_target_once_after_its_context(
    dataset: TokenDataset, seq_len: int, stride: int
) -> None:
    options = LoaderOptions(seq_len=seq_len, micro_batch=4, stride_tokens=stride)
    batches = evaluation_batches(dataset, options, "cpu")
    targets = []
    for tokens, row in ((t, r) for b in batches for t, r in zip(b.tokens, b.targets, strict=True)):
        valid = row != IGNORE_INDEX
        assert torch.equal(tokens[valid] + 1, row[valid])
        if valid.any() and targets:
            n_before = int(valid.nonzero()[0])
            assert n_before == seq_len - stride
            assert torch.equal(tokens[: n_before + 1].diff(), torch.ones(n_before).long())
        targets += row[valid].tolist()
    assert targets == list(range(1, N_TOKENS))


def test_evaluation_needs_something_to_predict(tmp_path: Path) -> None:
    with closing(ShardWriter(tmp_path, "val", vocab_size=5)) as writer:
        writer.write(np.array([1]))
    single = open_dataset(tmp_path, "val", vocab_size=5, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"\b1 token.*--val-fraction"):
        evaluation_batches(single, LoaderOptions(seq_len=4, micro_batch=2), "cpu")


STORED = torch.arange(2 * 13).reshape(2, 13).to(torch.uint16)


def of_twelve(starts_at: tuple[int, ...]) -> Batch:
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, list(starts_at)] = True
    return Stored(STORED, torch.tensor([12, 5]), starts, 12, padded=True, position=7).batch()


def test_a_cut_batch_has_the_same_targets_in_shorter_rows() -> None:
    whole = of_twelve((3, 9))
    cut = whole.cut(4)
    assert cut.tokens.shape == cut.targets.shape == (6, 4)
    assert cut.position == 7
    assert torch.equal(cut.tokens[:3].flatten(), torch.arange(12))
    assert torch.equal(cut.targets[:3], cut.tokens[:3] + 1)
    assert cut.targets[3:].flatten().tolist() == [*range(14, 19), *7 * [IGNORE_INDEX]]
    assert cut.tokens.data_ptr() == whole.tokens.data_ptr()
    assert cut.doc_starts is not None
    assert cut.doc_starts.nonzero().tolist() == [[0, 0], [0, 3], [2, 1], [3, 0]]
    assert Batch(whole.tokens, whole.targets, None, 7).cut(6).doc_starts is None


def test_attention_in_a_piece_without_a_start_is_that_of_one_document() -> None:
    """A piece that begins inside a document has no mark there, and needs none."""
    starts = of_twelve((3, 9)).cut(4).doc_starts
    assert starts is not None
    marked = starts.clone()
    marked[:, 0] = True
    mask, expected = (
        attention_mask(s, start=0, window=None, doc_starts=s, flex=False) for s in (starts, marked)
    )
    assert isinstance(mask, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(mask, expected)
    assert not torch.equal(mask[0], mask[1])
