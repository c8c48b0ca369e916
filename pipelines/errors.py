"""The errors that shards and images raise, and names from outside made safe to print."""

from collections.abc import Sequence


def printable(text: str) -> str:
    r"""Return a name from a file system or an archive with everything that is not printable written as an escape.

    Escape sequences would control the terminal, line feeds would forge lines of a log, and marks of writing direction
    would reorder them. Bytes that are not UTF-8 appear as escapes such as \udcff.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    """Return a text of one or several lines in printable characters."""
    return "\n".join(printable(line) for line in text.split("\n"))


def to_valid_unicode(text: str) -> str:
    r"""Return a file name as valid Unicode: bytes that are not UTF-8 are written as escapes, such as \xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class ShardError(Exception):
    """A shard, or one of its samples, cannot be used; the message names both and the remedy.

    `lines` follow the message, each on a line of its own.
    """

    def __init__(
        self, problem: str, *, shard: str = "", key: str = "", remedy: str = "", lines: Sequence[str] = ()
    ) -> None:
        address = f"{shard}: " if shard else ""
        address += f"sample {key!r}: " if key else ""
        message = address + problem + (f"; {remedy}" if remedy else "")
        super().__init__("\n".join(printable(line) for line in (message, *lines)))
        self.shard = shard
        self.key = key


class EmptyShardError(ShardError):
    """A shard holds no image that could be drawn; a set of shards leaves it out if others hold images."""


class ChangedError(OSError):
    """A remote file has changed since it was opened."""


class UndecodableImageError(ValueError):
    """An image file cannot be used; the message is the reason, such as "file is cut off ..."."""
