"""The error of a shard that cannot be used."""


class ShardError(Exception):
    """A shard cannot be used as it is; the message says where and what to do."""

    def __init__(self, what: str, *, shard: str = "", key: str = "", remedy: str = "") -> None:
        address = f"{shard}: " if shard else ""
        address += f"sample {key!r}: " if key else ""
        super().__init__(address + what + (f"; {remedy}" if remedy else ""))
        self.shard, self.key = shard, key
