"""A plan made from a logged step: a loader renders the step's views again as they were rendered for training."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from iwm_fast.pipelines.action_log.schema import LogMetadata, column, read_draws
from iwm_fast.pipelines.sampling.batch_plan import EndOfPlanError, Request
from iwm_fast.pipelines.sampling.masks import draw_masks, ragged_index
from iwm_fast.pipelines.transforms.composition import ViewConfig

MAX_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplayPlan:
    """Plan with the rows of a logged step, in order; independent of the ranks and micro-batches of the logged run."""

    head: LogMetadata
    """Settings that the rows were logged with."""
    rows: pa.Table
    """Rows of one step, or some of them, as `iwm_fast.pipelines.action_log.files.read_step` returns them."""
    max_batch_size: int = MAX_BATCH_SIZE
    world_size: int = 1
    """Number of ranks that share the rows: one, because each rank has a plan with rows of its own."""
    augment: None = None

    @property
    def views(self) -> ViewConfig:
        """Settings of the views in the logged run."""
        return self.head.views

    def request(self, index: int) -> Request:
        """Return the request of micro-batch number `index`; the last micro-batch may be smaller.

        Raises:
            EndOfPlanError: if the rows end before that micro-batch.
        """
        rows = self.rows.slice(index * self.max_batch_size, self.max_batch_size)
        if rows.num_rows == 0:
            raise EndOfPlanError(f"no micro-batch {index}: {self.rows.num_rows} rows end before it")
        step = int(column(rows, "step")[0])
        slots = column(rows, "slot").astype(np.int64)
        # Masks are not logged, because they are a function of seed, step and slot. Those of the complete global batch
        # are drawn for `RaggedIndex.total`.
        metadata = self.head
        masks = draw_masks(metadata.mask, metadata.grid, metadata.seed, step, np.arange(metadata.global_batch_size))
        return Request(
            step=step,
            slots=slots,
            samples=column(rows, "sample"),
            scheduled_samples=column(rows, "planned"),
            draws=read_draws(rows, self.views),
            context=ragged_index(masks.context[slots], int(masks.context.sum())),
            target=ragged_index(masks.target[slots], int(masks.target.sum())),
        )

    def fallback_samples(self, request: Request, image: int) -> Int64[np.ndarray, "samples"]:
        """Return no sample: another sample would not show what training received."""
        return np.empty(0, np.int64)
