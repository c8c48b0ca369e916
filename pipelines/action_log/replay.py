"""A logged step as a plan: the loaders render it again as they rendered it for training."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from iwm_fast.pipelines.action_log.schema import LogMetadata, column, draws_of
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.sampling.batch_plan import EndOfPlanError, Request
from iwm_fast.pipelines.sampling.masks import draw_masks, ragged_index

LARGEST = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplayPlan:
    """Rows of one step, cut into micro-batches in their order; ranks and micro-batches of the run do not matter."""

    head: LogMetadata
    rows: pa.Table
    """As `iwm_fast.pipelines.action_log.files.read_step` returns them, or some of them."""
    max_batch_size: int = LARGEST
    augment: None = None

    @property
    def views(self) -> ViewConfig:
        """How views were made."""
        return self.head.views

    def request(self, index: int) -> Request:
        """Return micro-batch number `index`; the last may be smaller.

        Raises:
            EndOfPlanError: behind the last row.
        """
        rows = self.rows.slice(index * self.max_batch_size, self.max_batch_size)
        if rows.num_rows == 0:
            raise EndOfPlanError(f"no micro-batch {index}: {self.rows.num_rows} rows end before it")
        step = int(column(rows, "step")[0])
        slots = column(rows, "slot").astype(np.int64)
        # masks are no rows: seed, step and slot fix them, and the whole step gives the total
        head = self.head
        masks = draw_masks(head.mask, head.grid, head.seed, step, np.arange(head.global_batch_size))
        return Request(
            step=step,
            slots=slots,
            samples=column(rows, "sample"),
            scheduled_samples=column(rows, "planned"),
            draws=draws_of(rows),
            context=ragged_index(masks.context[slots], int(masks.context.sum())),
            target=ragged_index(masks.target[slots], int(masks.target.sum())),
        )

    def fallback_samples(self, request: Request, image: int) -> Int64[np.ndarray, "samples"]:
        """Return none: training saw this sample and no other."""
        return np.empty(0, np.int64)
