"""Evaluation: the whole split, in rows as training has them, and the sums it should have."""

import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fasttrain.config import DataConfig, EvalConfig, LoopConfig, ModelConfig, TrainConfig
from fasttrain.data.dataset import TokenDataset
from fasttrain.data.format import open_dataset
from fasttrain.data.loader import IGNORE_INDEX, evaluation_batches
from fasttrain.data.order import LoaderOptions
from fasttrain.device import resolve_precision
from fasttrain.distributed.world import World
from fasttrain.engine.evaluation import evaluate
from fasttrain.model.runtime import prepare_blocks
from fasttrain.model.transformer import Transformer
from tests.support.toy_data import write_tokens

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)
SIZES = [1, 9, 2, 30, 17, 1, 5]


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    """65 tokens, none twice, in seven documents."""
    ends = torch.tensor(SIZES).cumsum(0).tolist()
    return write_tokens(tmp_path / "data", list(range(1, 66)), ends)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=100, dim=32, n_layers=2, n_heads=2, bigram_vocab_size=50)
    model = Transformer(config, seq_len=16)
    assert model.bigram_embedding is not None
    torch.nn.init.normal_(model.bigram_embedding.weight)
    for block in model.blocks:  # so that the logits depend on what is attended to
        torch.nn.init.normal_(block.attention.out.weight)
    return model


def config_of(batch_size: int, **data: Any) -> TrainConfig:
    loop = LoopConfig(steps=1, micro_batch=batch_size)
    return TrainConfig(train=loop, data=DataConfig(seq_len=16, **data))


def evaluated(
    model: Transformer, data: TokenDataset, config: TrainConfig, mode: str = "off", **options: Any
) -> dict[str, Any]:
    facts = {"loss": torch.zeros(()), "precision": FP32, "compile_mode": mode, "world": World()}
    step: Any = SimpleNamespace(model=model, **facts)
    return evaluate(step, data, config, **options)


def pieces(dataset: TokenDataset, batching: str, across: bool) -> list[tuple[int, int]]:
    """The stretches (first, end) that the model sees by themselves, each but its last token."""
    windows = [(s, min(s + 16, 64) + 1) for s in range(0, 64, 16)]
    ends = [0, *dataset.document_ends.tolist()]
    documents = [(a, b) for a, b in itertools.pairwise(ends) if b - a > 1]
    if batching == "packed" and across:
        return windows
    if batching == "packed":  # the end of a document predicts the start of the next
        cut = [(max(a, s), min(b + 1, e)) for s, e in windows for a, b in itertools.pairwise(ends)]
        return [(a, b) for a, b in cut if b - a > 1]
    return [(s, min(s + 17, b)) for a, b in documents for s in range(a, b - 1, 16)]


@pytest.mark.parametrize(
    ("batching", "across"),
    [("packed", True), ("packed", False), ("padded", True), ("bucketed", True)],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_is_that_of_each_stretch_by_itself(
    dataset: TokenDataset, model: Transformer, batching: str, across: bool, batch_size: int
) -> None:
    loss_sum, n_right, n_targets = 0.0, 0, 0
    tokens = torch.from_numpy(dataset.read(0, 65).astype("int64"))
    with torch.no_grad():
        for first, end in pieces(dataset, batching, across):
            logits = model(tokens[None, first : end - 1])[0]
            targets = tokens[first + 1 : end]
            loss_sum += F.cross_entropy(logits, targets, reduction="sum").item()
            n_right += int((logits.argmax(-1) == targets).sum())
            n_targets += len(targets)
    assert n_targets == (64 if batching == "packed" else 65 - len(SIZES))
    config = config_of(batch_size, batching=batching, attention_across_documents=across)
    found = evaluated(model.train(), dataset, config)
    assert model.training
    assert found["val_loss"] == pytest.approx(loss_sum / n_targets, rel=1e-5)
    assert found["val_ppl"] == pytest.approx(math.exp(loss_sum / n_targets), rel=1e-4)
    assert found["val_bpb"] == pytest.approx(loss_sum / math.log(2) / 10, rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(n_right / n_targets)


@pytest.mark.parametrize("batching", ["padded", "bucketed"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_documents_are_evaluated_once_over_all_ranks(
    dataset: TokenDataset, batching: str, world_size: int
) -> None:
    options = LoaderOptions(seq_len=16, micro_batch=2, batching=batching, world_size=world_size)
    per_rank = [
        list(evaluation_batches(dataset, replace(options, rank=rank), CPU))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    found = [b.targets[b.targets != IGNORE_INDEX] for batches in per_rank for b in batches]
    firsts = {1, *(dataset.document_ends + 1).tolist()}
    assert sorted(torch.cat(found).tolist()) == [t for t in range(1, 66) if t not in firsts]


def test_it_stops_between_batches_when_told_to(dataset: TokenDataset, model: Transformer) -> None:
    asked = []

    def should_stop() -> bool:
        asked.append(model.training)
        return len(asked) == 3

    assert evaluated(model, dataset, config_of(1), should_stop=should_stop) == {}
    assert asked == [False, False, False]
    assert model.training


def test_imports_have_no_bits_per_byte(tmp_path: Path, model: Transformer) -> None:
    torch.arange(1, 66).numpy().astype("<u2").tofile(tmp_path / "val.bin")
    dataset = open_dataset(tmp_path, "val", dtype="uint16", cache_dir=tmp_path / "cache")
    found = evaluated(model, dataset, config_of(2))
    assert found["val_bpb"] is None
    assert found["val_loss"] > 0


@pytest.mark.parametrize("batching", ["packed", "sliding", "padded", "bucketed"])
@pytest.mark.parametrize("n_tokens", [1, 20, 40, 64, 1000])
def test_a_part_of_the_split_is_spread_over_it_and_always_the_same(
    dataset: TokenDataset, batching: str, n_tokens: int
) -> None:
    def targets(n_tokens: int | None, world_size: int = 1) -> list[int]:
        found = []
        for rank in range(world_size):
            options = LoaderOptions(
                seq_len=4, micro_batch=2, batching=batching, rank=rank, world_size=world_size,
                stride_tokens=3 if batching == "sliding" else None,
            )  # fmt: skip
            for batch in evaluation_batches(dataset, options, CPU, n_tokens=n_tokens):
                found += batch.targets[batch.targets != IGNORE_INDEX].tolist()
        return sorted(found)

    part, whole = targets(n_tokens), targets(None)
    assert len(set(part)) == len(part)
    assert set(part) <= set(whole)
    assert part == targets(n_tokens) == targets(n_tokens, 2)
    if n_tokens >= len(whole):
        assert part == whole
        return
    assert n_tokens - 4 <= len(part) <= n_tokens + 4  # to a row
    gaps = np.diff([0, *part, 66])
    assert gaps.max() <= 3 * max(len(whole) / n_tokens, 1) + 30  # 30: the longest document


def test_bits_per_byte_of_a_part_are_those_of_its_share(
    model: Transformer, dataset: TokenDataset
) -> None:
    config = config_of(2)
    dataset.n_bytes = 130
    results = [
        evaluated(model, dataset, replace(config, eval=EvalConfig(tokens=tokens)))
        for tokens in (None, 64, 16)
    ]
    assert results[0]["val_loss"] == results[1]["val_loss"] != results[2]["val_loss"]
    for result in results:  # two bytes a token
        loss, bits = result["val_loss"], result["val_bpb"]
        assert bits == pytest.approx(loss / math.log(2) / 2, rel=0.02)


@pytest.mark.parametrize(("mode", "graphs"), [("default", 1), ("blocks", 1), ("off", 0)])
def test_evaluation_is_compiled_where_training_is(
    model: Transformer,
    dataset: TokenDataset,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    graphs: int,
) -> None:
    """One graph for all batches of all evaluations; of blocks one for all blocks."""
    compiled: list[object] = []

    def compile_eagerly(function: Any, mode: str) -> Any:
        def backend(graph: torch.fx.GraphModule, _: object) -> Any:
            compiled.append(graph)
            return graph.forward

        return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)

    monkeypatch.setattr("fasttrain.engine.evaluation._compiled", functools.cache(compile_eagerly))
    monkeypatch.setattr("fasttrain.model.runtime.compile_function", compile_eagerly)
    for module in ("engine.evaluation", "model.runtime"):  # as on CUDA
        monkeypatch.setattr(f"fasttrain.{module}.compiles_evaluation", lambda device: True)
    torch._dynamo.reset()
    expected = evaluated(model, dataset, config_of(2))
    prepare_blocks(model, activation_checkpointing="none", mode=mode, sharded=False)
    for _ in range(2):
        found = evaluated(model, dataset, config_of(2), mode)
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    assert len(compiled) == graphs
