"""Runs whose data are at an address: the bits of a run from disk, and what a missing shard does."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fasttrain import checkpoint
from fasttrain import storage as files
from fasttrain.data.format import open_dataset
from fasttrain.data.order import LoaderOptions, SampleOrder
from fasttrain.train import main
from tests.support.faulty_server import FaultyServer, folder_upstream, serving
from tests.support.ranks import Job
from tests.support.toy import write_config, write_dataset

pytest.importorskip("aiohttp", reason="needs the extra remote")
Capture = pytest.CaptureFixture[str]
SHARD_TOKENS = 250
# Three of 17 shards fit, beside the ends of their documents.
SMALL = f"data.cache_gib={3 * (1024 + 2 * SHARD_TOKENS) / 2**30}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """Serve the dataset of the toy run, which lies in `data`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "PAUSE_S", 0.01)
    write_dataset(tmp_path / "data", shard_tokens=SHARD_TOKENS)
    write_config(tmp_path)
    with serving(folder_upstream(tmp_path)) as server:
        yield server


def numbers(run: str) -> tuple[list[str], dict[str, str]]:
    """The losses of a run, and the hashes of the tensors of its last checkpoint."""
    rows = map(json.loads, Path(f"runs/{run}/metrics.jsonl").read_text().splitlines())
    losses = [float(row["loss"]).hex() for row in rows if row["kind"] == "train"]
    manifest = checkpoint.resolve(Path(f"runs/{run}"), which="latest") / "manifest.json"
    found = json.loads(manifest.read_text())["files"]
    names = ("model.safetensors", "optimizer.safetensors")
    return losses, {name: found[name]["sha256"] for name in names}


def late_shard(samples: int, of_rank: int | None = None) -> tuple[str, int]:
    """The shard that is needed last, and after how many steps of so many samples.

    With ``of_rank`` it is a shard that this of two ranks, with two rows in a batch, needs first.
    """
    dataset = open_dataset("data", "train", cache_dir=Path("cache"))
    starts, _ = SampleOrder(dataset, LoaderOptions(seq_len=16, seed=7)).rows(0, 12 * samples)
    uses: dict[int, list[int]] = {}
    for position, start in enumerate(starts.tolist()):
        for number in {start // SHARD_TOKENS, (start + 16) // SHARD_TOKENS}:
            uses.setdefault(number, []).append(position)
    found = []
    for number, positions in uses.items():
        step = positions[0] // samples
        ranks = {p % 4 // 2 for p in positions if p // samples == step}
        if of_rank is None or ranks == {of_rank}:
            found.append((step, f"train_{number:06d}.bin"))
    step, name = max(found)
    assert step > 0
    return name, step


def train(name: str, *arguments: str) -> int:
    return main(["toy.toml", f"run.name={name}", "data.cache_dir=cache", *arguments])


def test_a_run_has_the_bits_of_one_from_disk_and_either_continues_the_other(
    server: FaultyServer, capsys: Capture
) -> None:
    there = [f"data.path={server.url}/data", SMALL]
    assert train("disk") == 0
    server.faults[:] = ["500", "truncated", "short"]
    assert train("remote", *there) == 0
    assert len(server.happened) == 3
    assert numbers("remote") == numbers("disk")
    out = capsys.readouterr().out
    assert re.search(r"data\.cache_gib = .*\bshards\b.*data\.prefetch", out)
    assert train("mixed", "--stop-at-step", "4") == 75
    assert train("mixed", *there, "--stop-at-step", "8", "--resume=auto") == 75
    assert train("mixed", "--resume=auto") == 0
    assert numbers("mixed") == numbers("disk")


def test_a_missing_shard_ends_the_run_with_a_checkpoint(
    server: FaultyServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At exit status 1, and it continues once the shard is there."""
    there = [f"data.path={server.url}/data", "data.prefetch=1"]
    assert train("disk") == 0
    name, n_steps = late_shard(4)
    shutil.move(f"data/{name}", "elsewhere")
    capsys.readouterr()
    assert train("remote", *there) == 1
    out, err = capsys.readouterr()
    address = re.escape(f"{server.url}/data/{name}")
    assert re.search(f"warning: {address}: cat_file .*credentials", out)
    assert "Traceback" not in out + err
    saved = checkpoint.load(checkpoint.resolve(Path("runs/remote"), which="latest"))
    assert saved.step == n_steps, "those before it is needed"
    assert re.search(rf"saved.*{saved.path}$", out, re.MULTILINE)
    shutil.move("elsewhere", f"data/{name}")
    assert train("remote", *there, "--resume=auto") == 0
    assert numbers("remote") == numbers("disk")


def test_validation_data_that_are_missing_end_the_run_with_a_checkpoint(
    server: FaultyServer, capsys: Capture
) -> None:
    there = [f"data.path={server.url}/data", "eval.every_steps=5", "eval.prompts=[]"]
    assert train("disk", "eval.every_steps=5") == 0
    shutil.move("data/val_000000.bin", "elsewhere")
    assert train("remote", *there) == 1
    assert checkpoint.load(checkpoint.resolve(Path("runs/remote"), which="latest")).step == 5
    shutil.move("elsewhere", "data/val_000000.bin")
    assert train("remote", *there, "--resume=auto") == 0
    assert numbers("remote")[1] == numbers("disk")[1]


def test_an_address_without_a_dataset_is_bad_input(server: FaultyServer, capsys: Capture) -> None:
    assert train("remote", f"data.path={server.url}/nothing?token=hidden-from-all") == 2
    out, err = capsys.readouterr()
    assert f"error: {server.url}/nothing/dataset.json: cat_file " in err
    assert "hidden-from-all" not in out + err


def test_ranks_of_which_one_misses_a_shard_save_the_step_before_it(
    server: FaultyServer, tmp_path: Path
) -> None:
    keys = ["train.micro_batch=2", "train.tokens_per_step=128", "data.cache_dir=cache"]
    job = Job(tmp_path, *keys)
    try:
        job.torchrun("run.name=whole", "eval.sample_every_steps=none")
        assert job.ended() == [0], job.output()[-3000:]
        job.processes.clear()
        name, n_steps = late_shard(8, of_rank=1)
        shutil.move(f"data/{name}", "elsewhere")
        there = [f"data.path={server.url}/data", "data.prefetch=1", "eval.sample_every_steps=none"]
        job.torchrun("run.name=remote", *there)
        assert job.ended() != [0]
        assert f"{name}: cat_file " in job.output()
        found = checkpoint.load(checkpoint.resolve(Path("runs/remote"), which="latest"))
        assert found.step == n_steps
        job.processes.clear()
        shutil.move("elsewhere", f"data/{name}")
        job.torchrun("run.name=remote", "--resume=auto", *there)
        assert job.ended() == [0], job.output()[-3000:]
        assert numbers("remote")[1] == numbers("whole")[1]
    finally:
        job.close()
