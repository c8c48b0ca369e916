"""Processes that decode images keep the memory that they have freed."""

import inspect
import resource
import subprocess
import sys

from fixtures.paths import PROJECT
from iwm_fast.pipelines.worker_processes import worker_pool

# A tenth of the pages of 200 images of 1 MiB.
FEW = 256 * 200 / 10


def page_faults_of_images(count: int = 200) -> int:
    """Return how many pages the system had to provide for images that were written and freed one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        bytearray(b"\1" * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_workers_use_the_memory_of_an_image_again():
    with worker_pool(1) as pool:
        pool.submit(page_faults_of_images).result()
        assert pool.submit(page_faults_of_images).result() < FEW


def test_commands_use_the_memory_of_an_image_again():
    program = (
        "import resource\nfrom iwm_fast.runtime.process import run_and_exit\n"
        f"{inspect.getsource(page_faults_of_images)}\n"
        "run_and_exit(lambda: print(page_faults_of_images(), page_faults_of_images()))\n"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    assert int(printed.split()[1]) < FEW
