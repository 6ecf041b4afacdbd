"""Systems other than Linux, by hiding what they lack: macOS has no Triton, Windows much less."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fasttrain_kernels import cpu

from tests.support.toy import ENV, write_config

NOT_ON_MACOS = """
import os, sys
sys.modules["triton"] = None
for name in ("sched_getaffinity", "O_DIRECT"):
    if hasattr(os, name):
        delattr(os, name)
"""
NOT_ON_WINDOWS = f"""{NOT_ON_MACOS}
import asyncio, select, signal  # asyncio's part for Unix asks for sysconf
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in (
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fork", "getgid", "getuid", "geteuid",
    "getpgid", "killpg", "pread", "preadv", "pwrite", "set_blocking", "setpriority", "setsid",
    "statvfs", "sysconf",
):
    delattr(os, name)
for name in ("ALRM", "CHLD", "HUP", "KILL", "PIPE", "QUIT", "USR1", "USR2"):
    delattr(signal, "SIG" + name)
del select.poll
"""
SYSTEMS = {"macOS": NOT_ON_MACOS, "Windows": NOT_ON_WINDOWS}

LIBRARY = """
import fasttrain, fasttrain_kernels as kernels, torch
from fasttrain.config import LoopConfig, TrainConfig
for package in (fasttrain, kernels):
    for name in package.__all__:
        assert getattr(package, name) is not None

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 16)
        self.norm = kernels.RMSNorm(16)
        self.up, self.head = torch.nn.Linear(16, 32), torch.nn.Linear(16, 32, bias=False)

    def forward(self, input_ids):
        gate, up = self.up(self.norm(self.embedding(input_ids))).chunk(2, -1)
        return self.head(kernels.swiglu(gate, up))

torch.manual_seed(0)
model = Model()
tokens = torch.arange(64).view(4, 16) % 32
batches = [{"input_ids": tokens, "target_ids": tokens.roll(-1, 1)}] * 5
adamw = kernels.FusedAdamW(model.parameters(), lr=1e-2)
options = {"log_interval": 1, "device": "cpu", "quiet": True}
losses = fasttrain.train_loop(model, batches, adamw, 2, **options)["losses"]
assert losses[-1] < losses[0]

def trainer(steps):
    matrices = [model.up.weight, model.head.weight]
    muon = kernels.Muon(matrices, lr=1e-2)
    config = TrainConfig(train=LoopConfig(steps=steps))
    return fasttrain.Trainer(model, muon, config=config, run_dir="run", quiet=True)

trainer(4).train(batches)
second = trainer(6)
second.load_checkpoint()
assert second.step == 4
second.train(batches)
x = torch.randn(8, 16, requires_grad=True)
hidden, targets = kernels.relu_squared(x), torch.arange(8)
loss = kernels.linear_cross_entropy(hidden, model.head.weight, targets)
torch.testing.assert_close(loss, kernels.cross_entropy(hidden @ model.head.weight.T, targets))
loss.backward()
assert kernels.grad_norm([x.grad]).norm > 0
q, ones = torch.randn(1, 4, 2, 8), torch.ones(4, 4)
kernels.apply_rope(q, q, ones, ones)
kernels.symmetric_matmul(x.detach()[None])
try:
    with kernels.triton_on_cpu():
        kernels.relu_squared(x)
except RuntimeError as error:
    assert "needs Triton, which is not installed; pip install triton" in str(error)
    print("fine")
"""
TRAIN = "from fasttrain.train import main\nsys.exit(main(sys.argv[1:]))"


def run(script: str, cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    env = ENV | {"LOGNAME": "somebody"}  # as Windows has USERNAME; without, torch asks for the uid
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("hiding", SYSTEMS.values(), ids=SYSTEMS)
def test_the_library_and_the_kernels_work_on_a_cpu(hiding: str, tmp_path: Path) -> None:
    done = run(hiding + LIBRARY, tmp_path)
    assert done.stdout == "fine\n", done.stderr


def test_a_run_trains_on_macos(tmp_path: Path) -> None:
    done = run(NOT_ON_MACOS + TRAIN, tmp_path, write_config(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/toy/checkpoints/step-00000012/manifest.json").exists()


def test_a_run_on_windows_ends_with_one_line(tmp_path: Path) -> None:
    done = run(NOT_ON_WINDOWS + TRAIN, tmp_path, "base")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"error: .*\bLinux\b.*\bmacOS\b.*\bWSL\b", done.stderr)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


FOLDER = Path(cpu.__file__).parent
SOURCES = {
    "blocks": ("product.h", "attention.cpp", "blocks.cpp"),
    "loss": ("product.h", "linear_cross_entropy.cpp"),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-g++", "clang++"])
def test_the_cpp_of_a_cpu_compiles_for_arm_and_with_clang(
    tmp_path: Path, compiler: str, sources: tuple[str, ...], dtype: str
) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    text = "".join((FOLDER / name).read_text("utf-8") for name in sources)
    flags = ["-c", "-o", str(tmp_path / "built.o"), "-x", "c++", "-"]
    flags += ["-DBF16"] if dtype == "bf16" else []
    command = [compiler, *(f for f in cpu.FLAGS if not f.startswith(("-L", "-l"))), *flags]
    command.remove("-shared")
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "built.o").stat().st_size > 1000
