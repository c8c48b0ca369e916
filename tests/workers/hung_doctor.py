"""`iwm doctor` on two ranks, the second of which never joins the collective; the argument is output.folder."""

import os
import sys
import threading

from iwm_fast.cli import main
from iwm_fast.commands import doctor

doctor.TIMEOUT_S = 10.0
if os.environ["RANK"] == "1":
    doctor._all_reduce_bandwidth = lambda *_: threading.Event().wait()
sys.argv = ["iwm", "doctor", f"output.folder={sys.argv[1]}", "runtime.device=cpu", "runtime.engine=plain"]
main()
