"""What a GPU runs, run without one: see tests/support/simulated_cuda."""

from pathlib import Path

import pytest

from tests.support.simulated_cuda.start import missing, run_tests

OWN = "tests/support/simulated_cuda"
# Of the tests that use a GPU where there is one, those that the interpreter can compute there.
OTHERS = (
    "kernels/test_kernel_launches",
    "kernels/test_kernel_traps",
    "data/test_loader",
    "tools/test_loop",
    "checkpoint/test_checkpoint",
    "log/test_metrics",
)
GROUPS = {
    "training": [f"{OWN}/training.py"],
    "others": [
        *(f"{OWN}/{name}.py" for name in ("memory", "streams", "waiting")),
        *(f"tests/{name}.py" for name in OTHERS),
        *("-k", "not cuda_graph"),
    ],
}


@pytest.mark.skipif(missing() != "", reason=missing())
@pytest.mark.parametrize("group", GROUPS)
def test_the_simulated_device_passes(group: str, tmp_path: Path) -> None:
    status, output = run_tests(*GROUPS[group], f"--basetemp={tmp_path / 'child'}")
    assert status == 0, output
