"""Where a training run stands."""

from dataclasses import dataclass

from iwm_fast.pipelines.sampling.batch_plan import BEGINNING, StreamStart


@dataclass
class Progress:
    """Where a run stands: what a checkpoint keeps beside the weights."""

    step: int = 0
    """Optimiser steps attempted; drives the data."""
    applied_steps: int = 0
    """Those that changed the weights; drives schedules and teacher."""
    start: StreamStart = BEGINNING
    """Where the stream of samples began."""
    run_id: str = ""
    """Name of the run, the same however often it goes on."""
