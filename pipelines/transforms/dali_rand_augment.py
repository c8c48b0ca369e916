"""The DALI graph of finetuning: it takes encoded images and random parameters, and returns crops with RandAugment.

The operations are DALI's. Which operations are applied, and in which direction, are inputs of the graph, so that a
batch is a function of (seed, step, slot) as in pretraining.
"""

# DALI's graph nodes are typed too loosely to be checked.
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
from iwm_fast.pipelines.transforms.composition import Draws
from iwm_fast.pipelines.transforms.dali_graph import (
    CROP_INPUTS,
    GraphSettings,
    crop_parameters,
    decode_crop,
    input_nodes,
    normalize_nodes,
    resize_to_square,
)
from iwm_fast.pipelines.transforms.geometry import Windows
from iwm_fast.pipelines.transforms.rand_augment import NUM_OPERATIONS, AugmentDraws

_INPUTS = CROP_INPUTS | {
    "flip": (types.INT32, 0),
    "operation": (types.INT32, 1),
    "is_negated": (types.INT32, 1),
}
# The defaults of DALI's `rand_augment`: magnitudes 0 .. 30, and translations of up to 100 pixels in a 224 pixel image.
_NUM_MAGNITUDES, _MAX_SHIFT = 31, 100 / 224
# Grey value of the pixels that a geometric operation uncovers.
_FILL = 128


def augment_parameters(draws: Draws, windows: Windows, augment: AugmentDraws) -> tuple[np.ndarray, ...]:
    """Return the parameters of a batch in the order of the graph's inputs, which begin with the encoded images."""
    return *crop_parameters(windows), draws.flip.astype(np.int32), augment.operation, augment.is_negated


def build_augment_graph(
    settings: GraphSettings, augment: RandAugmentConfig, next_inputs: Callable[[], tuple[Any, ...]]
) -> Pipeline:
    """Build the pipeline. It calls `next_inputs` once per batch, and may do so up to `prefetch` batches ahead.

    Its outputs are the view twice, as source and target view.
    """
    # DALI's suite calls operators by their deprecated names. The warnings cannot be filtered by module, so they are
    # recorded, and all others are issued again.
    with warnings.catch_warnings(record=True) as caught:
        graph = _augmented_view(next_inputs, settings, augment, **settings.pipeline_arguments)
    for warning in caught:
        if warning.category is not DeprecationWarning:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    graph.build()
    return graph


@pipeline_def(enable_conditionals=True)
@no_type_check  # DALI compiles the function's source code again, which a wrapper would hide.
def _augmented_view(next_inputs, settings, augment):
    data = input_nodes(_INPUTS, next_inputs)
    view = fn.flip(resize_to_square(decode_crop(data, settings), settings.views.size), horizontal=data["flip"])
    suite = get_rand_augment_suite(max_translate_abs=round(settings.views.size * _MAX_SHIFT))
    assert len(suite) == NUM_OPERATIONS, f"this version of DALI has {len(suite)} RandAugment operations"
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
        view = normalize_nodes(view, settings)
    return view, view
