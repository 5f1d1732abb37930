"""Where images come from: a source lists items in a fixed order and reads any of them again."""

from storage.sources.base import ImageItem, ImageSource
from storage.sources.decode import MAX_PIXELS, decode_image
from storage.sources.folder import FolderSource
from storage.sources.parquet import ParquetSource

__all__ = ["MAX_PIXELS", "FolderSource", "ImageItem", "ImageSource", "ParquetSource", "decode_image"]
