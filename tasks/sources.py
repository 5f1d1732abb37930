"""Opening the source that a config names."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import PIL.Image
from PIL.Image import Image

from storage.canonical import digest_bytes
from storage.errors import SourceError
from storage.sources import FolderSource, ImageItem, ImageSource, ParquetSource, decode_image
from tasks.config import DatasetConfig


class DemoSource:
    """The built-in synthetic pictures, drawn on demand and encoded as PNG."""

    def __init__(self, images: int, seed: int) -> None:
        self._images = images
        self._seed = seed

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the demo's classes."""
        from xai_core.synthetic import CLASS_NAMES

        return CLASS_NAMES

    def items(self) -> Iterator[ImageItem]:
        """Pictures 0 to n - 1; nothing is drawn."""
        from xai_core.synthetic import sample_scene

        for index in range(self._images):
            label = sample_scene(self._seed, index).label
            yield ImageItem(f"demo/{self._seed}/{index}", "drawn", label, self.class_names[label])

    def read(self, reference: str) -> bytes:
        """The picture as PNG."""
        from xai_core.synthetic import render

        _, seed, index = reference.split("/")
        stream = io.BytesIO()
        PIL.Image.fromarray(render(int(seed), int(index)).image).save(stream, "PNG", compress_level=1)
        return stream.getvalue()


def _folder(config: DatasetConfig) -> ImageSource:
    return FolderSource(Path(str(config.path)), _classes(config))


def _parquet(config: DatasetConfig) -> ImageSource:
    return ParquetSource(Path(str(config.path)), _classes(config))


def _classes(config: DatasetConfig) -> Path | None:
    return Path(config.classes) if config.classes else None


SOURCES: dict[str, Callable[[DatasetConfig], ImageSource]] = {
    "demo": lambda config: DemoSource(config.images, config.seed),
    "folder": _folder,
    "parquet": _parquet,
}


def read_listed(source: ImageSource, path: str, sha256: str) -> Image:
    """A picture of a source, if it is still the one that was listed.

    Raises:
        SourceError: it changed, or is no picture any more; OSError: it cannot be read.
    """
    content = source.read(path)
    if digest_bytes(content) != sha256:
        raise SourceError("the image changed after it was listed; run again to take the new one")
    return decode_image(content)


@lru_cache(maxsize=2)
def open_source(config: DatasetConfig) -> ImageSource:
    """The source of a config; kept open in this process, since it caches what it has read."""
    return SOURCES[config.kind](config)
