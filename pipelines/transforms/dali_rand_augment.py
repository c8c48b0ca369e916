"""The DALI graph of finetuning: encoded bytes and draws in, one crop changed by RandAugment out.

DALI's operations, our draws: which operation and in which direction enters as data, so that a batch is a function of
(seed, step, slot) here, too.
"""

# DALI's graph nodes are typed too loosely to check
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false

import warnings
from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.auto_aug.core import select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.pipeline import Pipeline

from iwm_fast.pipelines.config import RandAugmentConfig
from iwm_fast.pipelines.transforms.dali_graph import (
    GraphSettings,
    crop_window_nodes,
    decode_window,
    fed,
    normalize_nodes,
    to_square,
)
from iwm_fast.pipelines.transforms.parameters import NUM_OPERATIONS, AugmentDraws, Draws

_INPUTS = {
    "encoded": (types.UINT8, 1),
    "crop": (types.FLOAT, 1),
    "flip": (types.INT32, 0),
    "operation": (types.INT32, 1),
    "is_negated": (types.INT32, 1),
}
# as the suite's own magnitudes: 31 steps; shifts go up to 100 of 224 pixels
_NUM_MAGNITUDES, _LARGEST_SHIFT = 31, 100 / 224
_FILL = 128


def augment_parameters(draws: Draws, augment: AugmentDraws) -> tuple[np.ndarray, ...]:
    """Lay out what is drawn for one batch in the order the graph takes it, behind the encoded images."""
    return draws.crop, draws.flip.astype(np.int32), augment.operation, augment.is_negated


def build_augment_graph(
    settings: GraphSettings, augment: RandAugmentConfig, next_inputs: Callable[[], tuple[Any, ...]]
) -> Pipeline:
    """Build the pipeline; it is fed and read like that of `build_graph`, and both views are the same."""
    # DALI's suite calls operators of its own library by their former names, and no filter hides that
    with warnings.catch_warnings(record=True) as caught:
        graph = _augmented_view(next_inputs, settings, augment, **settings.of_pipeline)
    for other in (warning for warning in caught if warning.category is not DeprecationWarning):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    graph.build()
    return graph


@pipeline_def(enable_conditionals=True)
@no_type_check  # DALI rewrites the function's code and wants it bare
def _augmented_view(next_inputs, settings, augment):
    data = fed(_INPUTS, next_inputs)
    window = crop_window_nodes(data["crop"], fn.peek_image_shape(data["encoded"], dtype=types.FLOAT))
    pixels = decode_window(data["encoded"], window, settings)
    view = fn.flip(to_square(pixels, settings.views.size), horizontal=data["flip"])
    suite = get_rand_augment_suite(max_translate_abs=round(settings.views.size * _LARGEST_SHIFT))
    assert len(suite) == NUM_OPERATIONS, f"this DALI has {len(suite)} operations of RandAugment"
    for number in range(augment.num_operations):
        view = select(
            suite,
            data["operation"][number],
            data=view,
            magnitude_bin=signed_bin(augment.magnitude, random_sign=data["is_negated"][number]),
            num_magnitude_bins=_NUM_MAGNITUDES,
            fill_value=_FILL,
        )
    if settings.output == "normalized":
        view = normalize_nodes(view)
    return view, view, window, window
