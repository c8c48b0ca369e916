"""The fingerprint of a run: the settings that determine its result, and their hash."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from iwm_fast.config.loading import config_to_dict
from iwm_fast.config.run import RunConfig

FINGERPRINT_GROUPS = ("seed", "data", "views", "mask", "model", "objective", "optim")
# Names and prefixes of the entries that determine which samples are drawn, and not the networks.
_STREAM_PREFIXES = ("seed", "data.", "views.", "mask.", "optim.global_batch_size")

_LOCAL_PATHS = ("data.train", "data.val", "init_from")


def fingerprint(config: RunConfig, shards_digest: str) -> dict[str, Any]:
    """Return the settings that determine a run's result, as a flat dict from dotted names to values.

    Shards count by content, not by path, so that data can move; `shards_digest` is `ShardSet.content_digest`.
    """
    flat = dict(_flatten({name: value for name, value in config_to_dict(config).items() if name in FINGERPRINT_GROUPS}))
    del flat["data.val"], flat["data.restart_epoch"]
    flat["data.train"] = shards_digest
    # None equals a missing entry in comparisons, so checkpoints written before these settings existed can be resumed.
    flat["init_from"] = config.init_from or None
    flat["data.image"] = config.data.image or None
    return flat


def flat_settings(config: Any) -> dict[str, Any]:
    """Return all settings of a configuration that must be the same on all ranks, by dotted name.

    Paths of shards and initial weights may differ from machine to machine: only whether they are set is compared here,
    and their contents once they are read.
    """
    flat = dict(_flatten(config_to_dict(config)))
    return flat | {name: "set" if flat[name] else "unset" for name in _LOCAL_PATHS if name in flat}


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
