"""Start what a GPU machine starts first, as if packages of the training extra were not installed.

python start_without_packages.py FOLDER     collect the tests of kernels, then run a tiny made-up training step
"""

import os
import sys

import pytest

LACKING = ("nvidia.dali", "deepspeed", "webdataset", "omegaconf", "beartype", "braceexpand")


def main(folder: str) -> None:
    # Python then says that there is no such module.
    sys.modules.update(dict.fromkeys(LACKING))
    os.environ["TRITON_INTERPRET"] = "1"
    # First, because pytest warns of plugins that are imported already.
    assert pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/kernels"]) == 0

    from benchmarks import gpu_check
    from benchmarks.kernels import __main__ as kernels
    from benchmarks.train_step import __main__ as train_step

    for command in (kernels, gpu_check):
        with pytest.raises(SystemExit) as end:
            command.main(["--help"])
        assert end.value.code == 0
    assert train_step.main(["--synthetic", "--quick", "--only", "engines", "--out", folder]) == 0
    assert all(sys.modules[name] is None for name in LACKING)
    print("started")


if __name__ == "__main__":
    main(sys.argv[1])
