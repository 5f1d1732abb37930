"""What every image source offers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ImageItem:
    """One image of a source before it is opened.

    ``reference`` finds it again, ``fingerprint`` changes when its content may have (size and time of a
    file), ``label`` counts from 0 or is None.
    """

    reference: str
    fingerprint: str
    label: int | None
    label_name: str | None


class ImageSource(Protocol):
    """A set of labelled images: lists them one by one, reads them by reference."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, where the source knows them."""

    def items(self) -> Iterator[ImageItem]:
        """All images in the source's own order; memory does not grow with their number."""

    def read(self, reference: str) -> bytes:
        """The encoded bytes of one image."""
