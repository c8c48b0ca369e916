"""`python watched_train.py RUN.yaml ...`: what iwm_fast.train does, by a process that shows where it stands.

At SIGUSR2 it writes what its main thread is doing into FOLDER/RANK, the folder given by IWM_TEST_STACKS. With
IWM_TEST_DISK_S its disk takes so many seconds to force a file down, with IWM_TEST_GRACE_S a stop may take so many.
"""

import faulthandler
import os
import signal
import time
from pathlib import Path

from iwm_fast.runtime import preemption
from iwm_fast.train import main

force = os.fsync


def force_slowly(handle):
    time.sleep(float(os.environ["IWM_TEST_DISK_S"]))
    force(handle)


if __name__ == "__main__":
    if "IWM_TEST_STACKS" in os.environ:
        stacks = Path(os.environ["IWM_TEST_STACKS"]) / os.environ.get("RANK", "0")
        # those of other threads change while they are read
        faulthandler.register(signal.SIGUSR2, file=stacks.open("w"), all_threads=False)
    if "IWM_TEST_DISK_S" in os.environ:
        os.fsync = force_slowly
    preemption.GRACE_S = float(os.environ.get("IWM_TEST_GRACE_S", preemption.GRACE_S))
    main()
