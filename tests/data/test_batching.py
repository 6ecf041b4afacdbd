"""Batching: every token or document once an epoch, whatever the mode, the mix and the batches."""

import itertools
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.data.dataset import TokenDataset, join
from fasttrain.data.format import open_dataset, write_dataset_json
from fasttrain.data.loader import IGNORE_INDEX, Loader
from fasttrain.data.order import GROUP, LoaderOptions, SampleOrder, document_rows, document_starts
from fasttrain.prepare.writer import ShardWriter
from fasttrain.storage import DataError

SEQ_LEN = 16
BATCHING = ("packed", "sliding", "padded", "bucketed")


def options_of(**others: object) -> LoaderOptions:
    return LoaderOptions(**{"seq_len": SEQ_LEN} | others)  # type: ignore[arg-type]


def make(dataset: TokenDataset, *, position: int = 0, **others: object) -> Loader:
    options = options_of(**{"seed": 5} | others)
    return Loader(dataset, options, device="cpu", position=position)


def write(folder: Path, sizes: list[int], first: int = 0, vocab_size: int = 30_000) -> TokenDataset:
    """A dataset of documents of these sizes; its tokens are first, first + 1, first + 2 …"""
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    ends = np.cumsum(sizes)
    with closing(ShardWriter(folder, "train", vocab_size=vocab_size, shard_tokens=700)) as writer:
        writer.write(first + np.arange(ends[-1]), ends)
    splits = {"train": (writer.shards, int(ends[-1]))}
    write_dataset_json(folder, vocab_size=vocab_size, end_of_text=0, splits=splits, source={})
    return open_dataset(folder, "train", cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def sizes() -> list[int]:
    rng = np.random.default_rng(0)
    return [1, 2, 17, 18, *np.minimum(rng.geometric(0.12, 500), 60).tolist(), 1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> TokenDataset:
    return write(tmp_path_factory.mktemp("batching") / "data", sizes)


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Two datasets as one: tokens below 1000 are of the first, the others of the second."""
    folder = tmp_path_factory.mktemp("mix")
    rng = np.random.default_rng(1)
    first = write(folder / "a", rng.multinomial(1000, [1 / 40] * 40).tolist())
    second = write(folder / "b", rng.multinomial(3000, [1 / 90] * 90).tolist(), first=1000)
    return join([first, second])


def test_documents_are_found_in_their_files(dataset: TokenDataset, sizes: list[int]) -> None:
    assert dataset.document_ends.tolist() == np.cumsum(sizes).tolist()


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    starts=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    length=st.integers(1, 40),
)
def test_document_starts_are_where_a_document_begins(
    sizes: list[int], starts: list[int], length: int
) -> None:
    ends = np.cumsum(sizes)
    found = document_starts(ends, np.array(starts), length)
    for row, start in zip(found, starts, strict=True):
        expected = [i == 0 or start + i in ends for i in range(length)]
        assert row.tolist() == expected


def test_document_rows_hold_every_target_of_every_document_once(dataset: TokenDataset) -> None:
    starts, counts = document_rows(dataset, SEQ_LEN)
    assert counts.min() == 2
    assert counts.max() == SEQ_LEN + 1
    targets = [t for s, c in zip(starts, counts, strict=True) for t in range(s + 1, s + c)]
    firsts = {0, *dataset.document_ends.tolist()}
    assert targets == [t for t in range(dataset.n_tokens) if t not in firsts]


@pytest.mark.parametrize("batching", BATCHING)
def test_R3_an_epoch_has_every_sample_once_and_the_next_another_order(
    dataset: TokenDataset, batching: str
) -> None:
    plan = SampleOrder(dataset, options_of(batching=batching, seed=3))
    n = plan.samples_per_epoch
    epochs = [plan.ids(epoch * n, n).tolist() for epoch in range(3)]
    for one, two in itertools.pairwise(epochs):
        assert sorted(one) == sorted(two) == list(range(n))
        assert one != two
    assert (
        epochs[0] != SampleOrder(dataset, options_of(batching=batching, seed=4)).ids(0, n).tolist()
    )


@settings(max_examples=15)
@given(
    batching=st.sampled_from(BATCHING),
    first=st.integers(0, 3000),
    cuts=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    weighted=st.booleans(),
)
def test_R28_any_stretch_of_the_order_is_that_of_the_whole(
    mix: TokenDataset, batching: str, first: int, cuts: list[int], weighted: bool
) -> None:
    weights = (0.3, 0.7) if weighted else ()
    plan = SampleOrder(mix, options_of(batching=batching, seed=1, weights=weights))
    ids, (starts, counts) = plan.ids(first, sum(cuts)), plan.rows(first, sum(cuts))
    at = 0
    for cut in cuts:
        here = slice(at, at + cut)
        assert plan.ids(first + at, cut).tolist() == ids[here].tolist()
        part_starts, part_counts = plan.rows(first + at, cut)
        assert part_starts.tolist() == starts[here].tolist()
        assert part_counts.tolist() == counts[here].tolist()
        at += cut


def test_sliding_windows_begin_every_stride(dataset: TokenDataset) -> None:
    for stride, expected in ((5, 5), (None, 8), (SEQ_LEN, SEQ_LEN)):
        plan = SampleOrder(dataset, options_of(batching="sliding", stride_tokens=stride))
        starts, counts = plan.rows(0, plan.samples_per_epoch)
        assert set(counts.tolist()) == {SEQ_LEN + 1}
        assert np.diff(np.sort(starts)).tolist() == [expected] * (len(starts) - 1)
        assert starts.max() + SEQ_LEN + 1 + plan.dropped_tokens == dataset.n_tokens
        assert plan.dropped_tokens < expected


def rows_of(dataset: TokenDataset, **options: object) -> list[list[int]]:
    """The tokens of all rows of an epoch, without padding; checks what padding is."""
    found, n_tokens = [], 0
    with make(dataset, **{"micro_batch": 6, "epochs": 1} | options) as loader:  # type: ignore[arg-type]
        for batch in loader:
            assert batch.tokens.shape == batch.targets.shape
            assert batch.tokens.is_contiguous()
            assert batch.targets.is_contiguous()
            n_tokens += batch.n_tokens
            counted = batch.targets != IGNORE_INDEX
            assert torch.equal(counted, counted.cummin(1).values)  # padding is at the end
            assert not batch.tokens[~counted].any()
            for tokens, targets, valid in zip(batch.tokens, batch.targets, counted, strict=True):
                n = int(valid.sum())
                if n:
                    assert torch.equal(tokens[1:n], targets[: n - 1])
                    found.append([*tokens[:n].tolist(), int(targets[n - 1])])
    if "world_size" not in options:  # else those of all ranks
        assert n_tokens == sum(len(row) - 1 for row in found)
    return found


@pytest.mark.parametrize("batching", ["padded", "bucketed"])
@pytest.mark.parametrize("micro_batch", [1, 6, 64, 100])
def test_a_row_is_a_document_cut_off_or_padded_and_each_comes_once(
    dataset: TokenDataset, sizes: list[int], batching: str, micro_batch: int
) -> None:
    found = rows_of(dataset, batching=batching, micro_batch=micro_batch)
    ends = np.cumsum(sizes).tolist()
    expected = [
        list(range(end - size, min(end, end - size + SEQ_LEN + 1)))
        for size, end in zip(sizes, ends, strict=True)
        if size > 1
    ]
    assert sorted(found) == expected


def test_bucketed_rows_come_with_their_like_and_in_few_shapes(dataset: TokenDataset) -> None:
    assert options_of(batching="bucketed", seq_len=1024).lengths == (128, 256, 512, 1024)
    assert options_of(batching="bucketed", seq_len=3).lengths == (1, 2, 3)
    assert options_of(batching="padded", seq_len=1024).lengths == (1024,)
    cost = {}
    for batching in ("padded", "bucketed"):
        with make(dataset, batching=batching, micro_batch=16, epochs=1) as loader:
            lengths = [batch.tokens.shape[1] for batch in loader]
        cost[batching] = sum(lengths)
        assert set(lengths) <= set(options_of(batching=batching).lengths)
        if batching == "bucketed":
            groups = [lengths[at : at + GROUP // 16] for at in range(0, len(lengths), GROUP // 16)]
            same = [len(set(group)) == 1 for group in groups]
            assert sum(same) >= len(same) - 4  # but for what fills no group, at the end
            assert len(set(lengths[:-8])) > 1
    assert cost["bucketed"] < 0.75 * cost["padded"]


@pytest.mark.parametrize("batching", BATCHING)
def test_R28_rows_do_not_depend_on_ranks_prefetch_or_micro_batch(
    mix: TokenDataset, batching: str
) -> None:
    options = {"batching": batching, "weights": (2.0, 1.0), "separate_documents": True}
    plain = rows_of(mix, micro_batch=1, **options)
    assert rows_of(mix, micro_batch=7, prefetch=1, **options) == plain
    ranks = [rows_of(mix, micro_batch=3, rank=r, world_size=2, **options) for r in range(2)]
    together = []
    for at in range(0, len(ranks[0]), 3):
        together += ranks[0][at : at + 3] + ranks[1][at : at + 3]
    assert together == plain
    with make(mix, rank=1, world_size=2, micro_batch=3, epochs=1, **options) as loader:  # type: ignore[arg-type]
        assert sum(batch.n_tokens for batch in loader) == sum(len(row) - 1 for row in plain)


def test_R3_kills_lose_and_repeat_nothing_in_any_mode(mix: TokenDataset) -> None:
    rng = np.random.default_rng(2)
    for batching in BATCHING:
        options = {"micro_batch": 4, "batching": batching, "weights": (0.25, 0.75)}
        with make(mix, **options) as loader:  # type: ignore[arg-type]
            expected = [batch.tokens for batch in itertools.islice(loader, 60)]
        seen, position = [], 0
        while len(seen) < 60:
            with make(mix, position=position, **options) as loader:  # type: ignore[arg-type]
                for batch in itertools.islice(loader, int(rng.integers(0, 12))):
                    seen.append(batch.tokens)
                    position = batch.position
                next(loader)  # trained on, not committed
        for one, two in zip(seen, expected, strict=False):
            assert torch.equal(one, two)


def test_a_mix_has_its_shares_exactly(mix: TokenDataset) -> None:
    with make(mix, micro_batch=10, weights=(0.9, 0.1)) as loader:
        assert loader.samples_per_epoch == 999 // SEQ_LEN + 2999 // SEQ_LEN
        for batch in itertools.islice(loader, 40):
            rows = batch.tokens
            assert ((rows < 1000).all(1) | (rows >= 1000).all(1)).all()  # none of both
            assert (rows[:, 0] < 1000).sum() == 9
    unweighted = rows_of(mix)  # all windows of both, once
    assert sorted(row[0] for row in unweighted) == list(range(0, 3999 - SEQ_LEN, SEQ_LEN))


@pytest.mark.parametrize("batching", ["packed", "sliding"])
def test_R27_batches_say_where_documents_begin(mix: TokenDataset, batching: str) -> None:
    starts = {0, *mix.document_ends.tolist()}
    options = {"seq_len": 50, "micro_batch": 5, "batching": batching}
    with make(mix, separate_documents=True, **options) as loader:  # type: ignore[arg-type]
        kept = list(itertools.islice(loader, 8))
        for _ in range(8):
            next(loader)
    for batch in kept:  # still theirs, after the ring went round
        assert batch.doc_starts is not None
        expected = [[t in starts for t in row] for row in batch.tokens.tolist()]
        for row in expected:
            row[0] = True
        assert batch.doc_starts.tolist() == expected
    with make(mix, **options) as loader:  # type: ignore[arg-type]
        assert next(loader).doc_starts is None


def test_what_cannot_be_batched_is_refused(tmp_path: Path) -> None:
    np.arange(1, 100, dtype="<u2").tofile(tmp_path / "train.bin")
    bare = open_dataset(tmp_path, "train", dtype="uint16", cache_dir=tmp_path / "cache")
    for options in ({"batching": "padded"}, {"batching": "packed", "separate_documents": True}):
        with pytest.raises(DataError, match=r"data\.end_of_text = 50256.*fasttrain\.prepare"):
            rows_of(bare, **options)
    ones = write(tmp_path / "ones", [1] * 20)
    with pytest.raises(DataError, match=r"data\.batching = 'bucketed'.*/ones\b.*'packed'"):
        SampleOrder(ones, options_of(batching="bucketed"))
