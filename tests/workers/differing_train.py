"""A rank of test_rank_agreement.py: trains, and rank 1 has the further settings of the variable IWM_RANK_1."""

import os
import sys

from iwm_fast.train import main

if __name__ == "__main__":
    sys.argv += os.environ["IWM_RANK_1"].split("\n") if os.environ["RANK"] == "1" else []
    main()
