"""Worker processes keep the memory that they have freed."""

import resource

from iwm_fast.pipelines.worker_processes import worker_pool


def page_faults_of_images(count: int = 200) -> int:
    """Return how many pages the system had to provide for images that were written and freed one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        bytearray(b"\1" * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_memory_of_an_image_is_used_again_for_the_next():
    with worker_pool(1) as pool:
        pool.submit(page_faults_of_images).result()
        faults = pool.submit(page_faults_of_images).result()
    # A MiB has 256 pages.
    assert faults < 256 * 200 / 10
