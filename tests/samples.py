"""Real photographs and plain tars for tests."""

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.shards import find_shards


def photograph(name: str) -> np.ndarray:
    """Return a bundled photograph as (H, W, 3) uint8."""
    return np.array(Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB"))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """Write a plain tar."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def encode(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    """Encode (H, W, 3) uint8 pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return file.getvalue()


@dataclass(frozen=True)
class TinyShards:
    """Three shards of 20, 17 and 11 crops of three photographs; the label is the photograph."""

    pattern: str
    folder: Path
    num_samples: int = 48


def samples_of(spec: str) -> list[dict]:
    """Read samples as the webdataset library does, but close the files, which it leaves open."""
    samples = []
    for path in find_shards(spec):
        with open(path, "rb") as stream:
            samples += group_by_keys(tar_file_expander([{"url": path, "stream": stream}]))
    return samples


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
