"""A run's state on two ranks, loaded by others bit for bit (R2); ranks killed in a save (R4)."""

import json
import os
from pathlib import Path

import pytest

from fasttrain.checkpoint import load, resolve
from tests.support.ranks import run_script

TWO_RANKS = """
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fasttrain.checkpoint import CheckpointWriter, load
from fasttrain.config import DistributedConfig, ModelConfig, OptimConfig
from fasttrain.distributed.world import World
from fasttrain.preflight.memory import measure_peak
from fasttrain.model.transformer import Transformer
from fasttrain.engine.optim import build_optimizers
from fasttrain.distributed.sharding import make_sharded, set_gradient_sync
from fasttrain.engine.saving import collect, restore
from fasttrain.engine.ema import Ema
from tests.support.toy_checkpoints import world_of

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
mesh = init_device_mesh("cpu", (2,))
# Odd sizes: a table of 33 rows, matrices of 40, and vectors that no two ranks share evenly.
shape = dict(vocab_size=33, dim=24, n_layers=2, n_heads=3, hidden_dim=40, norm="layer")
numbers = dict(
    loss=torch.zeros(()), state=lambda: {"grad_scale": torch.ones(())}, load=lambda state: None,
    ema=Ema(torch.nn.Module(), None),
)


def model_of(world, options):
    def make():
        return Transformer(ModelConfig(**options), seq_len=8)

    if not world.sharded:
        return make()
    return make_sharded(
        make, world, DistributedConfig(), device=torch.device("cpu")
    )


# Made in shards, a model holds the numbers that one process draws, and its rank never held more
# than its shards and about one whole parameter.
small = dict(vocab_size=33, dim=24, n_layers=3, n_heads=3, hidden_dim=40)
worlds = [World(), World(rank=rank, size=2, mode="fsdp", mesh=mesh)]
for options in (
    small | dict(norm="layer", bias=True, positions="learned", mlp="gelu"),
    small | dict(value_embeddings=True, bigram_vocab_size=50, qk_norm=True, tied_embeddings=False),
):
    made, states = [], []
    for world in worlds:
        torch.manual_seed(5)
        made.append(model_of(world, options))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    whole = dict([*made[0].named_parameters(), *made[0].named_buffers()])
    for name, tensor in [*made[1].named_parameters(), *made[1].named_buffers()]:
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert torch.equal(full, whole[name]), name
large, kept = dict(vocab_size=256, dim=64, n_layers=12, n_heads=4), []
peak = measure_peak(lambda: kept.append(model_of(worlds[1], large)), torch.device("cpu"))
own = sum(p.to_local().nbytes for p in kept[0].parameters())
largest = max(p.nbytes for p in kept[0].parameters())
assert own < peak < own + 2.5 * largest < 1.3 * own, (own, peak, largest)


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).square().mean()


class Run:
    def __init__(self, mode, seed):
        torch.manual_seed(seed)
        size = 1 if mode == "single" else 2
        self.world = World(rank=rank, size=size, mode=mode, mesh=mesh)
        self.model = model_of(self.world, shape)
        self.optimizers = build_optimizers(self.model, OptimConfig(name="muon", lr=0.02))
        self.net = Loss(self.model)
        if mode == "ddp":
            self.net = torch.nn.parallel.DistributedDataParallel(self.net)

    def step(self, seed):
        tokens = torch.randint(33, (2, 8), generator=torch.Generator().manual_seed(seed))
        own = tokens if self.world.size == 1 else tokens[rank : rank + 1]
        self.net(own).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def numbers(self):
        return SimpleNamespace(model=self.model, optimizers=self.optimizers, **numbers)

    def collect(self):
        own = 0 if self.world.size == 1 else rank
        return collect(self.numbers(), own)

    def whole(self):
        found = {}
        for group in ("model", "optimizer"):
            for name, tensor in self.collect()[group].items():
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                found[f"{group}.{name}"] = full.detach().clone()
        return found

    def save(self, name, asynchronous=True):
        writer = CheckpointWriter(
            folder / name, keep_last=1, asynchronous=asynchronous, patience_s=60,
            world=world_of(0 if self.world.size == 1 else rank, self.world.size, name),
        )
        path = writer.save(1, self.collect(), {"mode": self.world.mode}, "[train]\\nsteps = 1\\n")
        expected = self.whole()
        if asynchronous:
            self.step(77)  # a later update does not reach the snapshot
        writer.close()
        return path, expected

    def restore(self, path):
        restore(load(path), self.numbers(), rank)


def same(ours, theirs):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    return True


def moves(path, expected, mode, seed):
    run = Run(mode, seed)
    run.restore(path)
    same(run.whole(), expected)
    return run


# Sharded on two, to whole on one, to sharded on two.
first = Run("fsdp", 0)
first.step(1), first.step(2)
drawn = torch.get_rng_state()
path, expected = first.save("fsdp")
loaded = load(path)
same({n: t for n, t in loaded.tensors.items() if not n.startswith("trainer.")}, expected)
kinds = {n.partition("/")[2] for n in expected if n.startswith("optimizer.")}
assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}, kinds
assert loaded.tensors.keys() - expected.keys() == {
    "trainer.grad_scale", "trainer.cpu", "trainer.cpu@1"
}
alone = moves(path, expected, "single", 3)
if rank == 0:
    alone.save("one", asynchronous=False)
dist.barrier()
again = moves(folder / "one" / "step-00000001", expected, "fsdp", 4)
kept = moves(path, expected, "fsdp", 5)
again.step(6), kept.step(6)
same(again.whole(), kept.whole())  # and they go on alike

# Sharded to copied and back.
copied = moves(path, expected, "ddp", 7)
copied.step(8)
path_of_copies, expected = copied.save("ddp")
sharded = moves(path_of_copies, expected, "fsdp", 9)

# Ranks add up gradients of their own until the last micro-batch.
for run in (copied, sharded):
    network, alike = (run.net if run is copied else run.model), []
    for sync in (False, True):
        set_gradient_sync(network, run.world, sync=sync)
        run.net(torch.full((1, 8), rank)).backward()
        grad = next(run.model.parameters()).grad
        if run is copied:
            both = [torch.empty_like(grad), torch.empty_like(grad)]
            dist.all_gather(both, grad)
            alike.append(torch.equal(*both))
        else:
            alike.append(grad is not None)
    assert alike == [False, True], alike

# Random states: each rank its own; where there was none, one that rank 0's decides.
torch.manual_seed(10)
first.restore(path)
assert torch.equal(torch.get_rng_state(), drawn)
draws = []
for seed in (11, 12):
    torch.manual_seed(seed)
    first.restore(folder / "one" / "step-00000001")
    draws.append(torch.rand(4))
assert torch.equal(*draws)
both = [torch.empty(4), torch.empty(4)]
dist.all_gather(both, draws[0])
assert not torch.equal(*both)
dist.barrier()

# Once a run is under way, a rank that does not come is not waited for as long as at the start.
control = dist.new_group(backend="gloo")
World(rank=rank, size=2, control=control).set_timeout(1.15)
given_up = [folder / "given up", folder / "given up by control"]
for group, told in zip((None, control), given_up):
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError:
            told.touch()
while not all(told.exists() for told in given_up):
    time.sleep(0.01)
print("agreed", flush=True)
os._exit(0)
"""


def test_R2_state_moves_between_ranks_and_modes(tmp_path: Path) -> None:
    outputs = run_script(TWO_RANKS, str(tmp_path), size=2, folder=tmp_path)
    assert all(output.strip().endswith("agreed") for output in outputs), "\n".join(outputs)
    saved = resolve(tmp_path / "fsdp")
    sizes = [(saved / f"model.rank-0000{r}.safetensors").stat().st_size for r in range(2)]
    whole = (tmp_path / "one" / saved.name / "model.safetensors").stat().st_size
    assert max(sizes) < 0.65 * whole, "a rank wrote more than its slices"
    assert sorted(os.listdir(tmp_path / "ddp" / "step-00000001")) == [
        "config.toml", "manifest.json", "model.safetensors", "optimizer.safetensors",
        "rank-00000.json", "rank-00001.json", "state.json", "trainer.rank-00001.safetensors",
        "trainer.safetensors",
    ]  # fmt: skip
    assert load(saved).state == {"mode": "fsdp"}


# One process imports torch and forks two ranks a round; both save, step after step.
KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path

import torch

from fasttrain.checkpoint import CheckpointWriter, resolve
from fasttrain.distributed.sharding import cut
from tests.checkpoint.test_sharded_checkpoint import (
    CONFIG, is_intact, on_rank, save, values, writers,
)
from tests.support.toy_checkpoints import world_of
from tests.support.toy_kills import REAL, Stops

torch.set_num_threads(1)
folder, rounds = Path(sys.argv[1]) / "checkpoints", int(sys.argv[2])
random.seed(6)
assert save(writers(folder, 2), 1) == [None, None]
report = {"rounds": 0, "in_a_save": 0, "partials": 0, "saves": 0, "passed_over": []}
likes = [on_rank(values(1), 2, rank) for rank in (0, 1)]


def state(step, rank):
    whole = values(step)
    return {
        stem: {n: cut(whole[stem].get(n, t), t) for n, t in like.items()}
        for stem, like in likes[rank].items()
    }


for number in range(rounds):
    before = is_intact(resolve(folder), 2)
    told, tell = os.pipe()
    victims = ([0], [1], [0, 1])[number % 3]
    ranks = []
    for rank in (0, 1):
        ranks.append(os.fork())
        if ranks[rank] == 0:
            os.close(told)
            step = before
            world = world_of(rank, 2, f"s{number}")
            writer = CheckpointWriter(folder, keep_last=2, world=world)
            if rank == victims[0]:  # it stops at another operation of its saves each round
                Stops(1 + 13 * number % (24 if rank else 80))
            while True:
                step += 1
                REAL["write"](tell, b"%d %d begun\\n" % (rank, step))
                writer.save(step, state(step, rank), {"step": step}, CONFIG, metric=-step)
                writer.wait()
                REAL["write"](tell, b"%d %d saved\\n" % (rank, step))
    os.close(tell)
    _, status = os.waitpid(ranks[victims[0]], os.WUNTRACED)
    assert os.WIFSTOPPED(status), status
    for rank in victims:
        os.kill(ranks[rank], signal.SIGKILL)
    if len(victims) == 1:
        time.sleep(random.uniform(0, 0.02))  # the other goes on, or waits
        os.kill(ranks[1 - victims[0]], signal.SIGKILL)  # as torchrun would
    for pid in ranks:
        os.waitpid(pid, 0)
    with os.fdopen(told) as pipe:
        lines = [line.split() for line in pipe]
    *_, last = (what for rank, _, what in lines if int(rank) == victims[0])
    committed = max([before, *(int(step) for _, step, what in lines if what == "saved")])
    report["in_a_save"] += last == "begun"
    report["partials"] += any(name.startswith(".tmp-step") for name in os.listdir(folder))
    found = is_intact(resolve(folder, report=report["passed_over"].append), 2)
    assert found - committed in (0, 1), (found, committed)
    report["rounds"] += 1
    report["saves"] = found
print(json.dumps(report))
"""


@pytest.mark.parametrize("kills", [12, pytest.param(100, marks=pytest.mark.soak)])
def test_R4_one_rank_or_all_are_killed_in_the_middle_of_a_save(kills: int, tmp_path: Path) -> None:
    (output,) = run_script(KILLS, str(tmp_path), str(kills), size=1, folder=tmp_path)
    report = json.loads(output.splitlines()[-1])
    assert report["rounds"] == kills
    assert report["passed_over"] == []
    assert report["in_a_save"] == kills
    assert report["partials"] >= kills / 4
    assert report["saves"] > 1  # and after some the save was there
