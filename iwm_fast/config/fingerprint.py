"""The settings that decide a run's result, and a short name for them."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from iwm_fast.config.loading import to_tree
from iwm_fast.config.run import RunConfig

FINGERPRINTED = ("seed", "data", "views", "mask", "model", "objective", "optim")
# what of it decides the data stream and not the networks
_STREAM = ("seed", "data.", "views.", "mask.", "optim.global_batch_size")


def fingerprint(config: RunConfig, shards_digest: str) -> dict[str, Any]:
    """Return what decides the run's result, flat: dotted names and values, shards by content instead of by path."""
    flat = dict(_flatten({name: value for name, value in to_tree(config).items() if name in FINGERPRINTED}))
    del flat["data.val"], flat["data.restart_epoch"]
    flat["data.train"] = shards_digest
    # unset is as if there were no such setting: checkpoints from before it can be gone on from
    flat["init_from"] = config.init_from or None
    return flat


def defines_sample_stream(name: str) -> bool:
    """Return whether an entry of the fingerprint only decides which data comes: such may change with a new epoch."""
    return name.startswith(_STREAM)


def digest(flat: dict[str, Any]) -> str:
    """Return a short name of a fingerprint."""
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
