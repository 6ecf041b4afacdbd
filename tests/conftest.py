"""Fixtures shared by all tests."""

import contextlib
import gc
import importlib
import os
import sys
import tempfile

# Of this process and of those that tests start: the cores are shared by several of them.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# Triton decides when a kernel is decorated whether it is interpreted. Where there is no GPU the
# kernels are decorated for the interpreter; the variable is then removed, so that a CPU tensor
# takes the Triton path only inside `triton_on_cpu()` and child processes see a normal environment.
import torch

# What was compiled for another kind of CPU computes wrongly here: see `keep_compiled`.
_kept = f"fasttrain-tests-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _kept))

_interpret = not torch.cuda.is_available()
if _interpret:
    os.environ["TRITON_INTERPRET"] = "1"
import fasttrain_kernels  # noqa: E402

if _interpret:  # what the interpreter imports at its first launch must see the variable too
    from dev.aot.traffic import mend_interpreter

    importlib.import_module("triton.experimental.gluon")
    mend_interpreter()
    del os.environ["TRITON_INTERPRET"]

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests.support.quick import (  # noqa: E402, F401
    pytest_addoption,
    pytest_cmdline_main,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_sessionfinish,
)
from tests.support.toy import end_started  # noqa: E402

with contextlib.suppress(ImportError):  # it needs expecttest, which a GPU machine may lack
    import torch.testing._internal.common_utils  # loads a hypothesis profile of its own

torch.set_num_threads(1)  # one thread a test process: reproducible sums, no oversubscription
settings.register_profile(
    "fasttrain",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fasttrain")


@pytest.fixture
def determinism(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what `make_deterministic` does to a process, after the test."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if config := sys.modules.get("torch._inductor.config"):
        config.deterministic = False


_freeze = gc.freeze


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_collected_once() -> Iterator[None]:
    """A Trainer looks through all objects when it begins: for 0.1 s, most of it in torch's modules.

    Those are set aside. The Trainer's own `gc.unfreeze` would bring them back.
    """
    importlib.import_module("torch._dynamo")  # which the first optimizer loads
    gc.collect()
    _freeze()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gc, "freeze", lambda: None)
        patched.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """The device on which the Triton kernels run here: the GPU, else the CPU by interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with fasttrain_kernels.triton_on_cpu():
        yield torch.device("cpu")


@pytest.fixture
def cpp_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU, where C++ takes the norm and makes AdamW's update also of few elements."""
    module = importlib.import_module("fasttrain_kernels.cpu.optimizer")
    if not module.computes_in(torch.float32):
        pytest.skip("needs a known CPU and a compiler")
    monkeypatch.setattr(module, "_LEAST", 0)
    return torch.device("cpu")


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symmetric products go through their kernel also where they are too small for it."""
    module = importlib.import_module("fasttrain_kernels.symmetric")
    monkeypatch.setattr(module, "_LEAST_ROWS", 8)
    monkeypatch.setattr(module, "_LEAST_ELEMENTS", 0)


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device on which each of the two paths of an op runs."""
    triton = request.param == "triton"
    return request.getfixturevalue("triton_device") if triton else torch.device("cpu")
