"""The fingerprint of a run: the settings that determine its result, and their hash."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from iwm_fast.config.loading import config_to_dict
from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.config import IMAGENET, MAX_PIXELS
from iwm_fast.pipelines.transforms.composition import implied_settings

FINGERPRINT_GROUPS = ("seed", "data", "views", "mask", "model", "objective", "optim")
# Names and prefixes of the entries that determine which samples are drawn, and not the networks.
_STREAM_PREFIXES = ("seed", "data.", "views.", "mask.", "optim.global_batch_size")

_LOCAL_PATHS = ("data.train", "data.val", "init_from")

ADJUSTABLE = (
    "optim.lr",
    "optim.lr_start",
    "optim.lr_end",
    "optim.warmup_epochs",
    "optim.weight_decay",
    "optim.teacher_momentum",
    "optim.clip_norm",
    "optim.epochs",
)
"""Entries that may change when a run is resumed with `resume=adjust`; they affect later steps only."""


IMAGES_PER_FORWARD = "ranks * runtime.micro_batch_size"
"""Entry that only runs with VICReg's terms have; checkpoints of earlier versions lack it."""


def fingerprint(config: RunConfig, shards_digest: str, *, images_per_forward: int | None = None) -> dict[str, Any]:
    """Return the settings that determine a run's result, as a flat dict from dotted names to values.

    Args:
        config: settings of the run.
        shards_digest: `ShardSet.sources_digest`: shards count by content, not by path, so that data can move.
        images_per_forward: images of all ranks in one forward pass, over which VICReg's terms are computed.
    """
    flat = dict(_flatten({name: value for name, value in config_to_dict(config).items() if name in FINGERPRINT_GROUPS}))
    del flat["data.val"], flat["data.restart_epoch"]
    flat |= _mixture(flat["data.train"]) | {"data.train": shards_digest}
    # None equals a missing entry in comparisons, so checkpoints written before these settings existed can be resumed.
    flat |= dict.fromkeys(implied_settings(config.views))
    flat["init_from"] = config.init_from or None
    flat["data.image"] = config.data.image or None
    flat["data.max_pixels"] = None if config.data.max_pixels == MAX_PIXELS else config.data.max_pixels
    for name, default in (("data.pixel_mean", IMAGENET.mean), ("data.pixel_std", IMAGENET.std)):
        flat[name] = None if tuple(flat[name]) == default else flat[name]
    if images_per_forward and has_vicreg_terms(config):
        flat[IMAGES_PER_FORWARD] = images_per_forward
    return flat


def has_vicreg_terms(config: RunConfig) -> bool:
    """Return whether a run's loss has VICReg's terms, which depend on the number of images in a forward pass."""
    return any(config.objective.vicreg_weights(is_identity=config.model.predictor.depth == 0))


def flat_settings(config: Any) -> dict[str, Any]:
    """Return all settings of a configuration that must be the same on all ranks, by dotted name.

    Paths of shards and initial weights may differ from machine to machine: only whether they are set is compared here,
    and their contents once they are read.
    """
    flat = dict(_flatten(config_to_dict(config)))
    return (
        flat
        | _mixture(flat.get("data.train"))
        | {name: "set" if flat[name] else "unset" for name in _LOCAL_PATHS if name in flat}
    )


def _mixture(train: Any) -> dict[str, Any]:
    """Return the entry with names and weights of the sources in a value of data.train; none if it is not a mixture."""
    if not isinstance(train, list):
        return {}
    return {"data.mixture": [[source["name"], source["weight"]] for source in train]}


def defines_sample_stream(name: str) -> bool:
    """Return whether a fingerprint entry affects only the samples that are drawn.

    Such entries may change when a resumed run restarts its epoch.
    """
    return name.startswith(_STREAM_PREFIXES)


def fingerprint_digest(flat: dict[str, Any]) -> str:
    """Return a hash of a fingerprint, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
