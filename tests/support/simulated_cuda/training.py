"""Runs on the simulated device compute what they compute on the CPU."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from fasttrain_kernels import FusedAdamW
from torch import Tensor, nn

from fasttrain import TrainConfig, Trainer, train_loop
from fasttrain.config import LogConfig, LoopConfig, RunConfig
from fasttrain.device import resolve_precision
from fasttrain.generate import main as generate
from fasttrain.preflight import kernels as kernel_check
from fasttrain.preflight.__main__ import main as preflight
from fasttrain.train import main
from tests.support.toy import ROOT, write_dataset

CUDA = torch.device("cuda", 0)
TINY = (
    *("run.compile=off", "data.seq_len=8", "train.micro_batch=2", "train.tokens_per_step=32"),
    *("train.steps=3", "schedule.warmup_steps=1", "log.every_steps=1"),
    *("model.dim=16", "model.n_layers=1", "model.n_heads=2", "model.hidden_dim=32"),
    *("eval.every_steps=none", "eval.sample_every_steps=none", "eval.batch_size=16"),
    *("eval.prompts=[]", "checkpoint.every_steps=none"),
)
RUNS = {
    "base": ("base", "model.bigram_vocab_size=64"),
    "chars": ("chars", "model.bigram_vocab_size=64"),
    "gpt2": ("gpt2-124m", "model.vocab_size=none"),
    "llama": ("llama-1b", "model.vocab_size=none", "model.n_heads=4", "model.n_kv_heads=2"),
    "options": (
        *("llama-1b", "model.vocab_size=none", "model.n_heads=4", "model.n_kv_heads=2"),
        *("train.ema_decay=0.9", "train.on_spike=skip", "train.max_grad_value=1.0"),
        *("data.batching=padded", "data.attention_across_documents=false"),
        *("train.activation_checkpointing=full", "train.z_loss=1e-4"),
    ),
    "documents, sliding window": (
        *("llama-1b", "model.vocab_size=none", "model.n_heads=4", "model.n_kv_heads=2"),
        *("data.attention_across_documents=false", "model.sliding_window_tokens=5"),
    ),
    "odd sizes, deterministic": (
        *("llama-350m", "model.vocab_size=none", "model.dim=24", "model.n_heads=3"),
        *("model.n_kv_heads=1", "model.head_dim=8", "model.hidden_dim=40", "data.seq_len=13"),
        *("train.micro_batch=3", "train.tokens_per_step=78", "run.deterministic=true"),
    ),
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tokens", n_val=100)


def train(data: Path, folder: Path, config: str, *overrides: str, status: int = 0) -> list[float]:
    """Train, and return the losses of the run so far."""
    arguments = [str(ROOT / f"configs/{config}.toml"), f"data.path={data}", f"run.out_dir={folder}"]
    assert main([*arguments, *TINY, *overrides]) == status
    (log,) = folder.glob("*/metrics.jsonl")
    rows = map(json.loads, log.read_text().splitlines())
    return [
        row.get("loss", row.get("val_loss")) for row in rows if row["kind"] in ("train", "eval")
    ]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_losses_of_one_on_a_cpu(data: Path, tmp_path: Path, name: str) -> None:
    config, *overrides = RUNS[name]
    found = {
        device: train(
            *(data, tmp_path / device, config),
            *("run.dtype=fp32", *overrides, f"run.device={device}"),
        )
        for device in ("cpu", "cuda")
    }
    assert len(found["cpu"]) == 4
    assert found["cuda"] == pytest.approx(found["cpu"], rel=2e-5)


@pytest.mark.parametrize(
    ("name", "override", "shown"),
    [
        ("base", "run.attention=auto", "cuDNN attention"),
        ("base", "run.attention=flash", "FlashAttention"),
        ("documents, sliding window", "run.attention=auto", "FlexAttention"),
    ],
)
def test_the_header_names_the_kernel_of_attention(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, override: str,
    shown: str,
) -> None:  # fmt: skip
    config, *overrides = RUNS[name]
    train(data, tmp_path, config, *overrides, override, "run.device=cuda")
    line = next(line for line in capsys.readouterr().out.splitlines() if "· eager" in line)
    assert f"· eager · {shown}" in line


def test_fp16_scales_its_loss_and_skips_an_overflow(data: Path, tmp_path: Path) -> None:
    config, *overrides = RUNS["options"]
    half = train(data, tmp_path / "half", config, "run.dtype=fp16", *overrides)
    assert half == pytest.approx(train(data, tmp_path / "full", config, *overrides), rel=2e-3)


def test_a_resumed_run_a_generated_text_and_the_checks_before_a_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(data, tmp_path / "whole", "gpt2-124m", *RUNS["gpt2"][1:])
    where = (data, tmp_path / "parts", "gpt2-124m", *RUNS["gpt2"][1:])
    assert train(*where, "--stop-at-step=2", status=75) == whole[:2]
    assert train(*where, "--resume=auto", "eval.prompts=['a']", "eval.sample_tokens=2") == whole
    (run,) = (tmp_path / "parts").iterdir()
    assert "sample, step 3" in capsys.readouterr().out
    texts = []
    for device in ("cuda", "cpu"):
        options = ["--prompt", "alpha", "--greedy", "--max-tokens", "4", "--device", device]
        assert generate([str(run), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]

    arguments = [str(ROOT / "configs/gpt2-124m.toml"), f"data.path={data}", *TINY]
    arguments += ["model.vocab_size=none", "train.micro_batch=auto"]
    assert preflight([*arguments]) == 0
    assert preflight([*arguments, "--diagnose"]) == 0
    shown = capsys.readouterr().out
    assert 'train.micro_batch = "auto": 4 sequences, 1 micro-batch per step' in shown


def test_every_operation_passes_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "_median_ms", lambda run: 1.0)
    monkeypatch.setattr(kernel_check, "device_memory", lambda device: 1 << 20)
    fp32 = resolve_precision("fp32", CUDA)  # of 16 rows, whose errors do not cancel in bf16
    monkeypatch.setattr(kernel_check, "resolve_precision", lambda *_: fp32)
    n_ops = len(kernel_check.CHOICES) - 1  # the last is AdamW's step of four million parameters
    reports = list(islice(kernel_check.check_kernels(CUDA), n_ops))
    assert [report for report in reports if not report.error <= report.tolerance] == []


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).cumsum(1))


def test_the_library_trains_a_model_of_ones_own(tmp_path: Path) -> None:
    ids = torch.randint(17, (8, 6), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": i, "labels": i} for i in ids.split(4)]
    pairs = [(i[:, :-1], i[:, 1:]) for i in ids.split(4)]
    found = []
    for device in ("cpu", "cuda"):
        model = Custom()
        config = TrainConfig(
            run=RunConfig(device=device, dtype="fp32"),
            train=LoopConfig(steps=3),
            log=LogConfig(every_steps=1),
        )
        trainer = Trainer(
            model,
            FusedAdamW(model.parameters(), lr=0.1),
            config=config,
            run_dir=tmp_path / device,
        )
        trainer.train(batches, batches)
        other = Custom()
        loop = train_loop(other, pairs, FusedAdamW(other.parameters(), lr=0.1), 2, device=device)
        found.append([*trainer.metrics.values("loss"), *loop["losses"]])
        assert next(model.parameters()).device.type == device
    assert found[1] == pytest.approx(found[0], rel=1e-5)
