"""All launch configurations, compiled for GPUs that this machine need not have."""

import json
import os
import subprocess
import sys

import pytest
import triton

from benchmarks.harness import results
from fixtures.paths import PROJECT, WORKERS
from iwm_fast.kernels.offline_compile import MAX_SHARED_BYTES, CompilationReport

HAS_COMMITTED = results.offline(triton.__version__).exists()
"""Whether there are committed figures of this version of the compiler."""


def run_compiler(*arguments: str) -> list[dict]:
    # A process of its own: in this one, kernels may have been decorated for the interpreter, which compiles nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(WORKERS / "compile_shipped.py"), *arguments]
    environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *filter(None, [environment.get("PYTHONPATH")])])
    process = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


# Compiling all takes five minutes. By default only a sample is compiled of those whose committed figures are current.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("extent", ["sample", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_launches_compile_without_spills_to_tensor_core_instructions(architecture, extent):
    launches = run_compiler("figures", str(architecture), extent)
    assert len(launches) > 60
    for figures in launches:
        assert figures["spill_bytes"] == 0, figures
        assert figures["shared_bytes"] <= MAX_SHARED_BYTES[architecture], figures
        if has_matrix_product(figures["name"]):
            assert figures["fast_products"] > 0, figures
        if HAS_COMMITTED:
            assert figures["committed"] == {name: figures[name] for name in CompilationReport._fields}, (
                "run env -u TRITON_INTERPRET python -m benchmarks.kernels --only offline --arch 80 90 100 --write"
            )


def has_matrix_product(name: str) -> bool:
    return name.startswith("attention")


def test_other_lengths_batch_sizes_and_heads_use_the_same_binaries():
    (counted,) = run_compiler("binaries")
    assert counted["binaries"] == counted["settings"] == 2


def test_figures_stay_current_when_a_kernel_moves_to_another_line():
    (printed,) = run_compiler("digest")
    before, moved, changed = printed["digests"]
    assert before == moved != changed
