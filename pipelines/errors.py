"""The error that a shard which cannot be used raises."""


class ShardError(Exception):
    """A shard, or one of its samples, cannot be used; the message names both and the remedy."""

    def __init__(self, problem: str, *, shard: str = "", key: str = "", remedy: str = "") -> None:
        address = f"{shard}: " if shard else ""
        address += f"sample {key!r}: " if key else ""
        super().__init__(address + problem + (f"; {remedy}" if remedy else ""))
        self.shard = shard
        self.key = key
