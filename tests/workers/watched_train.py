"""`python watched_train.py RUN.yaml ...`: runs iwm_fast.train in a process that tests can observe and slow down.

On SIGRTMIN it writes the stack of its main thread to the file of its rank in the folder IWM_TEST_STACKS.
IWM_TEST_DISK_S is the number of seconds by which fsync is delayed, and IWM_TEST_GRACE_S replaces the grace period.
"""

import faulthandler
import os
import signal
import time
from pathlib import Path

from iwm_fast.runtime import preemption
from iwm_fast.train import main

fsync = os.fsync


def slow_fsync(handle):
    time.sleep(float(os.environ["IWM_TEST_DISK_S"]))
    fsync(handle)


if __name__ == "__main__":
    if "IWM_TEST_STACKS" in os.environ:
        stacks = Path(os.environ["IWM_TEST_STACKS"]) / os.environ.get("RANK", "0")
        # The stacks of other threads would change while they are read.
        faulthandler.register(signal.SIGRTMIN, file=stacks.open("w"), all_threads=False)
    if "IWM_TEST_DISK_S" in os.environ:
        os.fsync = slow_fsync
    preemption.GRACE_PERIOD_S = float(os.environ.get("IWM_TEST_GRACE_S", preemption.GRACE_PERIOD_S))
    main()
