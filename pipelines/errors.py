"""Errors of shards that cannot be used, and of images that cannot be decoded."""


class ShardError(Exception):
    """A shard, or one of its samples, cannot be used; the message names both and the remedy."""

    def __init__(self, problem: str, *, shard: str = "", key: str = "", remedy: str = "") -> None:
        address = f"{shard}: " if shard else ""
        address += f"sample {key!r}: " if key else ""
        super().__init__(address + problem + (f"; {remedy}" if remedy else ""))
        self.shard = shard
        self.key = key


class UndecodableImageError(ValueError):
    """An image file cannot be used; the message is the reason, such as "file is cut off ..."."""
