"""How a process ends whose output is no longer read."""

import os
import subprocess
import sys

import pytest

from fixtures.tar_files import encode, photograph, write_tar

PRINT_THEN_FAIL = """
import sys
from iwm_fast.runtime.process import run_and_exit

def fail():
    print("output")
    raise BrokenPipeError("connection to the store")

run_and_exit(fail)
"""


def run_with_closed_output(*command: str) -> tuple[int, str]:
    """Run Python with a standard output that nobody reads; return the exit code and what standard error received."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *command], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


# A short output, which is written only when the process ends, and a long one, whose printing fails.
@pytest.mark.parametrize("arguments", [("--version",), ("train", "--help")])
def test_a_command_whose_output_is_not_read_ends_silently(arguments):
    assert run_with_closed_output("-m", "iwm_fast", *arguments) == (141, "")
    assert run_with_closed_output("-u", "-m", "iwm_fast", *arguments) == (141, "")


def test_a_table_that_is_not_read_ends_the_command_silently(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", encode(photograph("coffee.png")[:40, :40]))])
    code, printed = run_with_closed_output("-m", "iwm_fast", "shards", "check", str(tmp_path / "a.tar"))
    assert code == 141 and "Traceback" not in printed and "error" not in printed


def test_a_broken_connection_is_not_taken_for_a_closed_output():
    done = subprocess.run([sys.executable, "-c", PRINT_THEN_FAIL], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "output\n", "error: connection to the store\n")
