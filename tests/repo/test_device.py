"""Device, precision and compile choice, without the devices themselves."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend

from fasttrain import device as device_module
from fasttrain.config import UserError, config_from_dict
from fasttrain.device import resolve_attention, resolve_device, resolve_precision
from fasttrain.distributed.world import World
from fasttrain.engine.step import TrainStep
from fasttrain.model import runtime
from fasttrain.model.runtime import compile_function, resolve_compile
from fasttrain.model.transformer import Transformer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_cuda_device_always_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"cuda:2.*2 found"):
        resolve_device("cuda:2")


def test_without_cuda_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == CPU
    with pytest.raises(UserError, match=r"none found.*run\.device=cpu"):
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
def test_S3_the_kernel_of_attention_goes_by_the_gpu(
    order: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int], auto: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    firsts = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
    for name, chosen in {"cudnn": "cudnn", "flash": "flash", "auto": auto}.items():
        assert resolve_attention(name, CUDA, deterministic=False) == chosen
        assert order()[0] == firsts[chosen]
        assert {*firsts.values(), "EFFICIENT_ATTENTION", "MATH"} < {*order()}  # for other shapes
    assert resolve_attention("auto", CUDA, deterministic=True) == "flash"
    assert order()[0] == "FLASH_ATTENTION"


def test_S3_a_kernel_that_cannot_be_had_is_refused(order: Callable[[], list[str]]) -> None:
    assert resolve_attention("auto", CPU, deterministic=False) is None
    with pytest.raises(UserError, match=r'"flash" needs a CUDA device, got cpu; use auto'):
        resolve_attention("flash", CPU, deterministic=False)
    with pytest.raises(
        UserError, match=r'"fa3" cannot .*flash_attn_interface.*hopper.*or use auto'
    ):
        resolve_attention("fa3", CUDA, deterministic=False)
    for run, remedy in (
        ({"attention": "cudnn", "deterministic": True}, "use run.attention=flash or auto"),
        ({"attention": "flash", "device": "cpu"}, "use auto or run.device=cuda"),
    ):
        with pytest.raises(UserError, match=f"run.attention.*{remedy}"):
            config_from_dict({"run": run, "data": {"path": "unused"}, "train": {"steps": 1}})


def compile_mode(device: torch.device, n_layers: int = 4, compile: str = "auto") -> str:
    model = {"vocab_size": 64, "dim": 64, "n_layers": n_layers, "n_heads": 4}
    values = {"run": {"compile": compile}, "model": model, "train": {"steps": 1}}
    return resolve_compile(config_from_dict({**values, "data": {"path": "unused"}}), device)


def test_how_a_run_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_has_cpp_compiler", lambda: True)
    monkeypatch.setattr(runtime, "why_unfit", lambda config: None)
    assert compile_mode(CPU) == compile_mode(CPU, 40) == "c++"
    assert compile_mode(CUDA, 40) == "default"
    assert compile_mode(CPU, compile="default") == "default"
    assert compile_mode(CPU, compile="off") == "off"
    assert compile_mode(CPU, compile="c++") == "c++"
    assert compile_mode(CUDA, compile="c++") == "off"
    monkeypatch.setattr(runtime, "why_unfit", lambda config: "g++ is missing")
    assert compile_mode(CPU) == "default"
    assert compile_mode(CPU, compile="c++") == "off"
    assert compile_mode(CPU, 40) == "blocks"
    with pytest.raises(UserError, match="needs a CUDA device"):
        compile_mode(CPU, compile="max-autotune")
    monkeypatch.setattr(runtime, "_has_cpp_compiler", lambda: False)
    assert compile_mode(CPU) == "off"
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        compile_mode(CPU, compile="default")


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [("cuda-graphs", "default"), ("max-autotune", "max-autotune-no-cudagraphs")],
)
def test_C13_graphs_do_not_accumulate_gradients_that_ddp_holds(mode: str, remedy: str) -> None:
    config = config_from_dict(
        {
            "run": {"compile": mode, "dtype": "fp32"},
            "model": {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2},
            "data": {"path": "unused", "seq_len": 8},
            "train": {"steps": 1, "micro_batch": 2, "tokens_per_step": 64},
        }
    )
    model = Transformer(config.model, seq_len=8)
    with pytest.raises(UserError, match=f"does not accumulate.*'ddp'.*run.compile={remedy}$"):
        TrainStep(model, [], config, device=CUDA, world=World(size=2, mode="ddp"))


def test_C13_autotuning_goes_without_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(torch, "compile", lambda fn, **options: asked.update(options))
    compile_function(lambda: None, "max-autotune-no-cudagraphs")
    assert asked["mode"] == "max-autotune-no-cudagraphs"
    assert asked["mode"] in torch._inductor.list_mode_options()
