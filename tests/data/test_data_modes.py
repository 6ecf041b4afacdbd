"""Training end to end on every kind of data: batching modes, mixes, other projects' token files."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttrain.config import load_config
from fasttrain.data.format import open_dataset, write_dataset_json
from fasttrain.data.loader import IGNORE_INDEX, Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.data.tokenizer import byte_tokenizer, end_of_text_id
from fasttrain.prepare.writer import ShardWriter
from fasttrain.train import main
from tests.support.toy import write_config

VOCAB, END = byte_tokenizer().get_vocab_size(), end_of_text_id(byte_tokenizer())
Run = Callable[..., list[dict[str, Any]]]


def write_documents(folder: Path, seed: int) -> Path:
    """A byte-level dataset of 150 documents to train on and 20 to validate on."""
    folder.mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(seed)
    words = [b"alpha ", b"beta ", b"gamma ", b"delta ", b"\n"]
    splits = {}
    for split, n in (("train", 150), ("val", 20)):
        with closing(ShardWriter(folder, split, vocab_size=VOCAB, shard_tokens=1500)) as writer:
            n_bytes = 0
            for _ in range(n):
                text = b"".join(words[i] for i in rng.integers(0, 5, rng.integers(1, 12)))
                writer.write(np.array([*text, END]), [len(text) + 1])
                n_bytes += len(text)
        splits[split] = (writer.shards, n_bytes)
    write_dataset_json(folder, vocab_size=VOCAB, end_of_text=END, splits=splits, source={})
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "data", 0)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train the toy config with overrides; return the run's lines of training and evaluation."""
    monkeypatch.chdir(tmp_path)
    if not (tmp_path / "data").exists():
        (tmp_path / "data").mkdir()
    config = write_config(tmp_path)

    def run(name: str, *arguments: str, check: int = 0) -> list[dict[str, Any]]:
        assert main([str(config), f"run.name={name}", *arguments]) == check
        log = tmp_path / "runs" / name / "metrics.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return run


def losses(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


MODES = {
    "separate": ["data.attention_across_documents=false", "eval.prompts=none"],
    "sliding": ["data.batching=sliding", "data.stride_tokens=5"],
    "padded": ["data.batching=padded", "data.seq_len=32"],
    "bucketed": ["data.batching=bucketed", "data.seq_len=64", "train.micro_batch=8"],
    "mix": [
        "data.path=none",
        'data.paths=["data", "other"]',
        "data.weights=[0.8, 0.2]",
        "data.batching=padded",
    ],
    "union": ["data.path=none", 'data.paths=["data", "other"]', "model.sliding_window_tokens=4"],
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_and_goes_on_exactly_where_it_stopped(
    data: Path, train: Run, tmp_path: Path, mode: str
) -> None:
    if mode in ("mix", "union"):
        write_documents(tmp_path / "other", 1)
    whole = train("whole", "train.steps=20", *MODES[mode])
    train("parts", "train.steps=20", "--stop-at-step", "7", *MODES[mode], check=75)
    parts = train("parts", "train.steps=20", "--resume", "auto", *MODES[mode])
    assert losses(parts) == losses(whole)
    values = [loss for _, loss in losses(whole)]
    assert values[-1] < 0.9 * values[0]
    (evaluation,) = (line for line in whole if line["kind"] == "eval")
    assert 0 < evaluation["val_loss"] < values[0]
    assert evaluation["val_bpb"] > 0
    if mode == "separate":  # samples go on from what the split has, which the run writes down
        prompts = load_config(tmp_path / "runs/whole/config.toml").eval.prompts
        val = open_dataset(data, "val")
        begins = [0, *val.document_ends[:-1].tolist()]
        texts = [
            bytes(val.read(begin, min(8, int(end) - 1 - begin)).tolist()).decode()
            for begin, end in zip(begins, val.document_ends, strict=True)
        ]
        assert prompts == tuple(dict.fromkeys(texts[n] for n in (0, 6, 12, 19)))
        assert f"--- step 20\n{prompts[0]}" in (tmp_path / "runs/whole/samples.txt").read_text()
    real = [64] * 20  # tokens of each step: 4 rows of 16
    log = (tmp_path / "runs/whole/train.log").read_text()
    if mode in ("padded", "bucketed"):
        config = load_config(tmp_path / "runs/parts/config.toml")
        options = LoaderOptions.of(config, micro_batch=config.train.micro_batch)
        with Loader(open_dataset(data, "train"), options, device="cpu") as loader:
            dropped = loader.order.dropped_tokens
            shown = re.search(rf"\({dropped} [^)]*\bleft over", log) is not None
            assert shown == (dropped > 0) == (mode == "padded")
            real = [int((batch.targets != IGNORE_INDEX).sum()) for batch in islice(loader, 20)]
    if mode != "mix":
        for run in (whole, parts):
            lines = [line for line in run if line["kind"] == "train"]
            assert [line["tokens"] for line in lines] == np.cumsum(real).tolist()
        per_step = [line["tokens_per_s"] * line["step_ms"] / 1000 for line in lines]
        assert per_step == pytest.approx(real)  # padding is neither counted nor fast


def test_R3_ten_stops_lose_and_repeat_no_sample_of_two_epochs(data: Path, train: Run) -> None:
    options = [
        "train.steps=none",
        "train.epochs=2",
        "data.seq_len=64",
        "eval.prompts=[]",
    ]
    whole = train("whole", *options)
    last = max(step for step, _ in losses(whole))
    stops = sorted(np.random.default_rng(0).choice(range(1, last), 10, replace=False).tolist())
    resume: list[str] = []
    for stop in stops:
        train("parts", *options, "--stop-at-step", str(stop), *resume, check=75)
        resume = ["--resume", "auto"]
    assert losses(train("parts", *options, *resume)) == losses(whole)


def test_a_nanogpt_folder_is_trained_on_as_it_is(
    data: Path, train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    for split in ("train", "val"):
        shards = sorted(data.glob(f"{split}_*.bin"))
        tokens = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in shards])
        tokens.tofile(folder / f"{split}.bin")
    options = ["data.path=nanogpt", "data.dtype=uint16", f"model.vocab_size={VOCAB}"]
    prepared = losses(train("prepared", f"model.vocab_size={VOCAB}"))
    assert losses(train("packed", *options)) == prepared
    capsys.readouterr()
    assert train("padded", *options, "data.batching=padded", check=2) == []
    assert "data.end_of_text = 50256" in capsys.readouterr().err
    padded = train("padded", *options, "data.batching=padded", f"data.end_of_text={END}")
    reference = train("reference", f"model.vocab_size={VOCAB}", "data.batching=padded")
    assert losses(padded) == losses(reference)


def test_llm_c_shards_are_trained_on_as_they_are(data: Path, train: Run, tmp_path: Path) -> None:
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    for path in data.glob("*.bin"):
        shutil.copy(path, folder / f"fineweb_{path.name}")
    options = ["data.path=fineweb10B", f"model.vocab_size={VOCAB}"]
    prepared = losses(train("prepared", f"model.vocab_size={VOCAB}"))
    assert losses(train("packed", *options)) == prepared
    separate = train(
        "separate", *options, "data.attention_across_documents=false", f"data.end_of_text={END}"
    )
    assert losses(separate)[-1][1] < losses(separate)[0][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.batching=bagged"], r'data\.batching = "bagged".* padded\?'),
        (["data.stride_tokens=4"], r"data\.stride_tokens = 4\b.*data\.batching=sliding"),
        (
            ["data.batching=sliding", "data.stride_tokens=17"],
            r"data\.stride_tokens = 17\b.*data\.seq_len = 16\b",
        ),
        (["data.path=a", "data.paths=['a', 'b']"], r"data\.paths = \[.*\bdata\.path\b"),
        (["data.path=none", "data.paths=['a']"], r"data\.paths = .*\bdata\.path=a\b"),
        (["data.weights=[1.0]"], r"data\.weights = \[1\.0\].*\bdata\.paths\b.*\b0\b"),
        (["data.path=none", "data.end_of_text=3"], r"data\.end_of_text = 3\b.*\bdata\.path\b"),
        (["data.end_of_text=3"], r"data\.end_of_text = 3\b.*dataset\.json\b.*data\.end_of_text"),
        (
            ["data.path=none", "data.paths=['data', 'missing']"],
            r"\bmissing\b.* fasttrain\.prepare missing --input",
        ),
    ],
)
def test_impossible_settings_are_refused_in_a_line(
    data: Path,
    train: Run,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert train("refused", *arguments, check=2) == []
    assert re.search(message, capsys.readouterr().err)
