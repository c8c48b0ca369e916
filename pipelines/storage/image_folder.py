"""The image files below folders: each real file once, and everything that stands in the way of reading one."""

import logging
import os
import stat
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

from iwm_fast.pipelines.config import IMAGE_EXTENSIONS
from iwm_fast.pipelines.errors import UndecodableImageError, printable
from iwm_fast.pipelines.image_header import probe
from iwm_fast.pipelines.storage.foreign_files import recognise_text

log = logging.getLogger(__name__)

Group = TypeVar("Group")

# Folders that systems and file servers add to those of their users. Names that begin with a dot are hidden, too.
_SYSTEM_FOLDERS = ("@eaDir", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "System Volume Information")
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name belongs to the system and not to a data set."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def is_image_name(name: str) -> bool:
    """Return whether a file name has the extension of an image."""
    return Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def find_images(source: Path) -> list[Path]:
    """Return the image files that a setting `images` names: a file, or all below a folder, sorted.

    What cannot be used is left out with a warning.

    Raises:
        FileNotFoundError: if there is no such file or folder, or the folder holds no images.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"images={source} must be an image file or a folder of images, which does not exist")
    found = ImageFolders({source: source})
    for problem in found.problems:
        log.warning("%s; it is left out", problem)
    if not found.images[source]:
        raise FileNotFoundError(f"{source} holds no images: accepted extensions are {', '.join(IMAGE_EXTENSIONS)}")
    return found.images[source]


def refuse_image(content: bytes, max_pixels: int) -> str:
    """Return why the content of a file is not accepted as an image of up to `max_pixels`, empty if it is."""
    if not content:
        return "is empty"
    foreign = recognise_text(content)
    if foreign:
        return f"{foreign.problem}; {foreign.remedy}"
    try:
        probe(content, max_pixels)
    except UndecodableImageError as error:
        return str(error)
    return ""


class ImageFolders(Generic[Group]):
    """The images below several folders, each of which is a group, such as a class.

    Links are followed, because a subset of a data set is often a folder of links. A file that is reached on several
    paths counts once, with its own path rather than that of a link. Hidden files and folders are left out.
    """

    def __init__(self, folders: Mapping[Group, Path]) -> None:
        """Search the folders. Files are listed, but not read."""
        self.images: dict[Group, list[Path]] = {group: [] for group in folders}
        """Paths of the images of each group, sorted."""
        self.problems: list[str] = []
        """Files and folders that cannot be used, in printable characters."""
        self.num_other: int = 0
        """Number of files that are not images by their extension."""
        self.first_other: Path | None = None
        """The first of them."""
        self.num_repeated: int = 0
        """Number of links to files and folders that are reached on another path as well."""
        self._first: dict[tuple[int, int], tuple[Group | None, Path]] = {}
        self._links: deque[tuple[Group, Path]] = deque()
        # A link may lead back to a folder that contains the group's folder.
        for folder in {folder.parent.resolve() for folder in folders.values()}:
            for parent in (folder, *folder.parents):
                self._first[_identity(parent.stat())] = (None, parent)
        for group, folder in folders.items():
            # A class folder that is a link is followed last, as all links are.
            self._links.append((group, folder)) if folder.is_symlink() else self._search(group, folder)
        while self._links:
            self._follow(*self._links.popleft())
        for paths in self.images.values():
            paths.sort()

    def _search(self, group: Group, folder: Path) -> None:
        """Collect the images of a folder and its subfolders; links are kept for later."""
        folders = [folder]
        while folders:
            current = folders.pop()
            try:
                if not self._is_first(group, current, current.stat()):
                    continue
                with os.scandir(current) as entries:
                    visible = [entry for entry in entries if not is_hidden(entry.name)]
            except OSError as error:
                self._report(current, f"cannot be read ({error.strerror})")
                continue
            for entry in sorted(visible, key=lambda entry: entry.name):
                if entry.is_symlink():
                    self._links.append((group, Path(entry.path)))
                elif entry.is_dir():
                    folders.append(Path(entry.path))
                else:
                    self._add(group, Path(entry.path))

    def _follow(self, group: Group, link: Path) -> None:
        try:
            is_folder = stat.S_ISDIR(link.stat().st_mode)
        except OSError as error:
            self._report(link, f"is a link that cannot be followed, to {os.readlink(link)} ({error.strerror})")
            return
        (self._search if is_folder else self._add)(group, link)

    def _add(self, group: Group, path: Path) -> None:
        if not is_image_name(path.name):
            self.num_other += 1
            self.first_other = self.first_other or path
            return
        try:
            status = path.stat()
        except OSError as error:
            self._report(path, f"cannot be read ({error.strerror})")
            return
        kind = _SPECIAL.get(stat.S_IFMT(status.st_mode))
        if kind:
            self._report(path, f"is {kind}, not a file")
        elif self._is_first(group, path, status):
            self.images[group].append(path)

    def _is_first(self, group: Group, path: Path, status: os.stat_result) -> bool:
        """Return whether a file or folder is reached for the first time, and remember it."""
        first_group, first = self._first.setdefault(_identity(status), (group, path))
        if first is path:
            return True
        self.num_repeated += 1
        if first_group not in (None, group):
            self._report(path, f"is the same as {printable(str(first))}, which belongs to another class or set")
        return False

    def _report(self, path: Path, problem: str) -> None:
        self.problems.append(printable(f"{path} {problem}"))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
