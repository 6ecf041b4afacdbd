"""Device, precision and compile choice, without the devices themselves."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from fasttrain import device as device_module
from fasttrain import resolve as settings
from fasttrain.command import usable_cores
from fasttrain.config import UserError, config_from_dict
from fasttrain.device import (
    CoreWatch,
    prefer_attention_kernel,
    resolve_attention,
    resolve_device,
    resolve_precision,
)
from fasttrain.distributed.world import World
from fasttrain.model.runtime import compile_function
from fasttrain.resolve import resolve, resolve_compile

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_cuda_device_always_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"run\.device = .*cuda:2\b.*\b2\b.*run\.device=cpu"):
        resolve_device("cuda:2")


def test_without_cuda_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == CPU
    with pytest.raises(UserError, match=r"run\.device = .*cuda\b.*\bnone\b.*run\.device=cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_on_a_cpu_is_what_it_multiplies_natively(
    monkeypatch: pytest.MonkeyPatch, native: bool, name: str
) -> None:
    monkeypatch.setattr(device_module, "native_bf16", lambda device: native)
    assert resolve_precision("auto", CPU).name == name
    with pytest.raises(UserError, match="tf32"):
        resolve_precision("tf32", CPU)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """How SDPA orders its kernels on an H100; another capability is to be patched in."""
    before = torch._C._get_sdp_priority_order()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    names = {backend.value: name for name, backend in SDPBackend.__members__.items()}
    yield lambda: [names[number] for number in torch._C._get_sdp_priority_order()]
    torch._C._set_sdp_priority_order(before)


@pytest.mark.parametrize(
    ("capability", "auto"),
    [
        *(((7, 5), "flash"), ((8, 0), "flash"), ((8, 9), "flash"), ((9, 0), "cudnn")),
        *(((10, 0), "cudnn"), ((12, 0), "flash")),
    ],
)
def test_the_kernel_of_attention_goes_by_the_gpu(
    order: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int], auto: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    firsts = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
    for name, chosen in {"cudnn": "cudnn", "flash": "flash", "auto": auto}.items():
        assert resolve_attention(name, CUDA, deterministic=False) == chosen
        prefer_attention_kernel(chosen)
        assert order()[0] == firsts[chosen]
        assert {*firsts.values(), "EFFICIENT_ATTENTION", "MATH"} < {*order()}  # for other shapes
    assert resolve_attention("auto", CUDA, deterministic=True) == "flash"


def test_a_kernel_that_cannot_be_had_is_refused(order: Callable[[], list[str]]) -> None:
    assert resolve_attention("auto", CPU, deterministic=False) is None
    with pytest.raises(UserError, match=r'"flash" .*\bCUDA\b.*\bcpu\b.*\bauto\b'):
        resolve_attention("flash", CPU, deterministic=False)
    with pytest.raises(UserError, match=r'"fa3" .*flash_attn_interface.*hopper.*\bauto\b'):
        prefer_attention_kernel(resolve_attention("fa3", CUDA, deterministic=False))
    for run, remedy in (
        ({"attention": "cudnn", "deterministic": True}, r"run\.attention=flash .*\bauto\b"),
        ({"attention": "flash", "device": "cpu"}, r"\bauto\b.*run\.device=cuda"),
    ):
        with pytest.raises(UserError, match=rf"run\.attention.*{remedy}"):
            config_from_dict({"run": run, "data": {"path": "unused"}, "train": {"steps": 1}})


def compile_mode(device: torch.device, n_layers: int = 4, compile: str = "auto") -> str:
    model = {"vocab_size": 64, "dim": 64, "n_layers": n_layers, "n_heads": 4}
    values = {"run": {"compile": compile}, "model": model, "train": {"steps": 1}}
    return resolve_compile(config_from_dict({**values, "data": {"path": "unused"}}), device)


def test_how_a_run_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_has_cpp_compiler", lambda: True)
    monkeypatch.setattr(settings, "why_unfit", lambda config: None)
    assert compile_mode(CPU) == compile_mode(CPU, 40) == "c++"
    assert compile_mode(CUDA, 40) == "default"
    assert compile_mode(CPU, compile="default") == "default"
    assert compile_mode(CPU, compile="off") == "off"
    assert compile_mode(CPU, compile="c++") == "c++"
    assert compile_mode(CUDA, compile="c++") == "off"
    monkeypatch.setattr(settings, "why_unfit", lambda config: "g++ is missing")
    assert compile_mode(CPU) == "default"
    assert compile_mode(CPU, compile="c++") == "off"
    assert compile_mode(CPU, 40) == "blocks"
    with pytest.raises(UserError, match=r"run\.compile .*max-autotune.*\bCUDA\b"):
        compile_mode(CPU, compile="max-autotune")
    monkeypatch.setattr(settings, "_has_cpp_compiler", lambda: False)
    assert compile_mode(CPU) == "off"
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        compile_mode(CPU, compile="default")


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [("cuda-graphs", "default"), ("max-autotune", "max-autotune-no-cudagraphs")],
)
def test_graphs_do_not_accumulate_gradients_that_ddp_holds(mode: str, remedy: str) -> None:
    config = config_from_dict(
        {
            "run": {"compile": mode, "dtype": "fp32"},
            "model": {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2},
            "data": {"path": "unused", "seq_len": 8},
            "train": {"steps": 1, "micro_batch": 2, "tokens_per_step": 64},
        }
    )
    with pytest.raises(
        UserError,
        match=rf"run\.compile = '{mode}' .*'ddp'.*train\.micro_batch.*run\.compile={remedy}$",
    ):
        resolve(config, CUDA, World(size=2, mode="ddp"))


def test_autotuning_goes_without_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(torch, "compile", lambda fn, **options: asked.update(options))
    compile_function(lambda: None, "max-autotune-no-cudagraphs")
    assert asked["mode"] == "max-autotune-no-cudagraphs"
    assert asked["mode"] in torch._inductor.list_mode_options()


# ---- cores that other processes use --------------------------------------------------------------


def run_python(program: str, **env: str) -> list[float]:
    """Run a program that begins with this process's path; return the numbers that it prints."""
    program = f"import os, subprocess, sys, time\nsys.path[:0] = {sys.path!r}\n{program}"
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, capture_output=True, check=True, env=os.environ | env)
    return [float(word) for word in printed.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's schedstat")
def test_a_process_beside_another_on_one_core_waits_for_it() -> None:
    ran, waited = run_python("""
from fasttrain.device import core_seconds
from fasttrain import resolve as settings
from fasttrain.resolve import resolve, resolve_compile
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
busy = subprocess.Popen([sys.executable, "-c", "while 1: pass"])
before, end = core_seconds(), time.monotonic() + 2
while time.monotonic() < end:
    pass
print(*(now - then for now, then in zip(core_seconds(), before)))
busy.kill()
""")
    assert 0 < ran < 2.1
    assert waited > 0.2
    assert ran + waited == pytest.approx(2, rel=0.2)


@pytest.mark.skipif(usable_cores() < 2, reason="with one core threads never spin")
def test_threads_sleep_while_other_processes_use_their_cores() -> None:
    """Seconds of a core that a pause of 0.5 s takes: before, while cores are shared, and after."""
    before, shared, after = run_python(
        """
import torch
from fasttrain import device
seconds = iter([(0, 0), (1, 1), (2, 1), (3, 1)])
device.core_seconds = lambda: next(seconds)
device.CoreWatch.EVERY_S = 0
torch.set_num_threads(len(os.sched_getaffinity(0)))
watch, many = device.CoreWatch(), torch.empty(2**22)
for n in range(3):
    if n:
        watch.look()
        time.sleep(0.5)
    many.fill_(0)
    started = time.process_time()
    time.sleep(0.5)
    print(time.process_time() - started)
""",
        GOMP_SPINCOUNT="30000000000",
        OMP_NUM_THREADS="",
        OMP_WAIT_POLICY="",
    )
    assert shared < 0.05
    assert min(before, after) > 2 * shared + 0.02


def test_a_change_is_told_once_and_undone_when_the_cores_are_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Seconds that threads have run and waited, of the time since the last 0, 50, 40, 5, 25 and 50 %
    seconds = iter([(0, 0), (9, 0), (10, 1), (16, 5), (35, 6), (38, 7), (39, 8), (41, 10)])
    monkeypatch.setattr(device_module, "core_seconds", lambda: next(seconds))
    monkeypatch.setattr(CoreWatch, "EVERY_S", 0)
    threads = 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    watch, n_before = CoreWatch(), threading.active_count()
    found = [(watch.look(), threading.active_count() - n_before) for _ in range(3)]
    assert found == [(None, 0), (0.5, 1), (None, 1)]
    idle = next(t for t in threading.enumerate() if "_idle" in t.name)
    assert watch.look() is None
    idle.join(10)
    assert not idle.is_alive()
    threads = 1  # has none to wait for
    assert (watch.look(), threading.active_count()) == (None, n_before)
    threads = 2  # they sleep again, which is not told
    assert (watch.look(), threading.active_count()) == (None, n_before + 1)
    watch.close()
    monkeypatch.setattr(CoreWatch, "EVERY_S", 1e9)
    assert watch.look() is None  # without a look: the seconds of the next are still there
    assert next(seconds) == (41, 10)
