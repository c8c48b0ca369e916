"""The fingerprint of a run: the settings that determine its result, and their hash."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from iwm_fast.config.loading import config_to_dict
from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.config import MAX_PIXELS

FINGERPRINT_GROUPS = ("seed", "data", "views", "mask", "model", "objective", "optim")
# Names and prefixes of the entries that determine which samples are drawn, and not the networks.
_STREAM_PREFIXES = ("seed", "data.", "views.", "mask.", "optim.global_batch_size")


def fingerprint(config: RunConfig, shards_digest: str) -> dict[str, Any]:
    """Return the settings that determine a run's result, as a flat dict from dotted names to values.

    Shards count by content, not by path, so that data can move; `shards_digest` is `ShardSet.content_digest`.
    """
    flat = dict(_flatten({name: value for name, value in config_to_dict(config).items() if name in FINGERPRINT_GROUPS}))
    del flat["data.val"], flat["data.restart_epoch"]
    flat["data.train"] = shards_digest
    # None equals a missing entry in comparisons, so checkpoints written before these settings existed can be resumed.
    flat["init_from"] = config.init_from or None
    flat["data.max_pixels"] = None if config.data.max_pixels == MAX_PIXELS else config.data.max_pixels
    return flat


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
