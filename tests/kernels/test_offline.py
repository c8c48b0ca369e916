"""Every shipped setting, compiled for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.offline import SHARED_LIMIT

PROJECT = Path(__file__).parent.parent.parent


def run_compiler(*arguments: str) -> list[dict]:
    # interpreted functions have no compiler behind them, and this process may have imported them so
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROJECT / "tests/kernels/compile_shipped.py"), *arguments]
    environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_setting_compiles_without_spills_into_tensor_core_products(architecture):
    compiled = run_compiler("figures", str(architecture))
    assert len(compiled) > 80
    for figures in compiled:
        assert figures["spill_bytes"] == 0, figures
        assert figures["shared_bytes"] <= SHARED_LIMIT[architecture], figures
        if is_product(figures["name"]):
            # float32 becomes three tf32 products, for which the fast instructions have no tiles small enough
            assert figures["matrix_products" if "float32" in figures["name"] else "fast_products"] > 0, figures


def is_product(name: str) -> bool:
    return name.startswith(("attention", "second layer", "third layer"))


def test_other_lengths_batches_and_heads_take_the_same_binaries():
    (counted,) = run_compiler("binaries")
    assert counted["binaries"] == counted["settings"] == 2
