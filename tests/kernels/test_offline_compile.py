"""Every shipped setting, compiled for GPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest
import triton

from benchmarks.harness import records, results
from fixtures.paths import PROJECT, WORKERS
from iwm_fast.kernels.offline_compile import SHARED_LIMIT, Compiled

COMMITTED_TRITON = records.read(results.OFFLINE)[0].machine["triton"]


def run_compiler(*arguments: str) -> list[dict]:
    # interpreted functions have no compiler behind them, and this process may have imported them so
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(WORKERS / "compile_shipped.py"), *arguments]
    environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# compiling all of them takes five minutes; what the committed figures were made from is compiled in samples
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("extent", ["sample", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_setting_compiles_without_spills_into_tensor_core_products(architecture, extent):
    settings = run_compiler("figures", str(architecture), extent)
    assert len(settings) > 80
    for figures in settings:
        assert figures["spill_bytes"] == 0, figures
        assert figures["shared_bytes"] <= SHARED_LIMIT[architecture], figures
        if is_product(figures["name"]):
            # float32 becomes three tf32 products, for which the fast instructions have no tiles small enough
            assert figures["matrix_products" if "float32" in figures["name"] else "fast_products"] > 0, figures
        # another version of the compiler has no committed figures
        if figures["committed"] is not None or triton.__version__ == COMMITTED_TRITON:
            assert figures["committed"] == {name: figures[name] for name in Compiled._fields}, (
                "run env -u TRITON_INTERPRET python -m benchmarks.kernels --only offline --arch 80 90 100 --write"
            )


def is_product(name: str) -> bool:
    return name.startswith(("attention", "second layer", "third layer"))


def test_other_lengths_batches_and_heads_take_the_same_binaries():
    (counted,) = run_compiler("binaries")
    assert counted["binaries"] == counted["settings"] == 2
