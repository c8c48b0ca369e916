"""The image files below folders: each real file once, and everything that stands in the way of reading one."""

import csv
import json
import logging
import os
import stat
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

from iwm_fast.pipelines.config import IMAGE_EXTENSIONS, require
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


def read_image_table(path: Path) -> dict[str, dict[str, str]]:
    """Read a CSV table of images: the fields of each line by its column `file`, in the order of the table.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a table: without the column, with a line of another length, a path that leads out
            of the image folder, or a file that is listed twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"labels={path} must be a CSV table, which does not exist")
    rows: dict[str, dict[str, str]] = {}
    with path.open(encoding="utf-8", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            columns = reader.fieldnames or []
            require("file" in columns and all(columns) and len(set(columns)) == len(columns), f"the header of {path}",
                    columns, "name each column once, and have one named file")  # fmt: skip
            for row in reader:
                place, file = f"{path}, line {reader.line_num}", row.pop("file")
                require(None not in row and None not in row.values(), place, row, f"have {len(columns)} columns")
                is_inside = bool(file) and not Path(file).is_absolute() and ".." not in Path(file).parts
                require(is_inside, f"{place}: file", file, "be the path of an image in the image folder")
                require(file not in rows, f"{place}: file", file, "be listed only once")
                require(row.get("class") != "", f"{place}: class", "", "name a class")
                rows[file] = row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"labels={path} must be a CSV table in UTF-8 with a header: {error}") from error
    return rows


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


def refuse_file(path: Path, max_pixels: int, map_path: Path | None = None) -> str:
    """Return why an image file, or its segmentation map, cannot be packed; empty if they can be."""
    if not is_image_name(path.name):
        return "does not have the extension of an image"
    try:
        image = path.read_bytes()
        refusal = refuse_image(image, max_pixels)
        if refusal or map_path is None:
            return refusal
        if not map_path.is_file():
            return f"has no segmentation map {map_path}"
        content = map_path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    refusal = refuse_image(content, max_pixels)
    if refusal:
        return f"has a segmentation map, {map_path}, which {refusal}"
    size, map_header = probe(image, max_pixels).upright_size, probe(content, max_pixels)
    if map_header.container != "PNG" or map_header.upright_size != size:
        is_like = "{} x {} pixels".format(*map_header.upright_size)
        return f"needs a segmentation map of {size[0]} x {size[1]} pixels in PNG, but {map_path} is {is_like}"
    return ""


def folder_classes(source: Path, classes_path: str) -> list[str]:
    """Return the classes in the order of their numbers, none if the images lie in the folder itself."""
    if not source.is_dir():
        raise FileNotFoundError(f"image folder {source} does not exist or is not a folder")
    entries = sorted(entry for entry in source.iterdir() if not is_hidden(entry.name))
    loose_images = [entry.name for entry in entries if is_image_name(entry.name) and not entry.is_dir()]
    # A link to the source or a folder around it is not a class. A link to nothing may be meant as one, and is reported.
    parents = (source.resolve(), *source.resolve().parents)
    names = [
        entry.name
        for entry in entries
        if (entry.is_dir() and entry.resolve() not in parents)
        or (not entry.exists() and entry.name not in loose_images)
    ]
    if loose_images and (names or classes_path):
        problem = f"{len(loose_images)} images lie in {source} itself, the first is {loose_images[0]}"
        raise ValueError(f"{problem}; either all images must lie in class folders, {source}/CLASS/IMAGE, or none")
    if not classes_path:
        return names
    return known_classes(names, classes_path, f"class folders of {source}")


def known_classes(names: list[str], classes_path: str, origin: str) -> list[str]:
    """Return the classes of a classes.json, which must list these names."""
    classes = _read_class_names(Path(classes_path))
    unlisted = [name for name in names if name not in classes]
    if unlisted:
        raise ValueError(
            f"{origin} must be listed in classes={classes_path}, which lists {len(classes)} classes, got {unlisted}"
        )
    return classes


def _read_class_names(path: Path) -> list[str]:
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"classes={path} must hold a JSON list of names, as packing writes it ({error})") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes={path} must hold a JSON list of names, as packing writes it")
    return classes


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
