"""What a GPU runs, run without one: see tests/support/simulated_cuda."""

from pathlib import Path

import pytest

from tests.support.simulated_cuda.start import missing, run_tests

HERE = "tests/support/simulated_cuda"


@pytest.mark.skipif(missing() != "", reason=missing())
@pytest.mark.parametrize("tests", ["training", "waiting", "streams"])
def test_the_simulated_device_passes(tests: str, tmp_path: Path) -> None:
    status, output = run_tests(f"{HERE}/{tests}.py", f"--basetemp={tmp_path / 'child'}")
    assert status == 0, output
