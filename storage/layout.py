"""Which files a store consists of: what a name must look like to be one of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from storage.files import TEMPORARY

HEX = "[0-9a-f]"


class Kind(StrEnum):
    """What a file of the store is."""

    marker = "marker"
    record = "record"
    run = "run"
    data = "data"
    metadata = "metadata"
    group = "group"
    listing = "listing"
    compacted = "compacted"
    model = "model"
    attempt = "attempt"
    lock = "lock"
    server = "server"
    checkpoint = "checkpoint"
    temporary = "temporary"


# The first that fits decides. ``data`` are objects that a record vouches for.
PATTERNS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (Kind.temporary, rf"(.+/)?{re.escape(TEMPORARY)}.+"),
        (Kind.marker, r"vitrine\.json"),
        (Kind.server, r"prefect(-\d+)?/.+"),
        (Kind.lock, r"locks/(units/)?[^/]+\.lock"),
        (Kind.record, rf"commits/[^/]+/[^/]+/\d{{7}}-{HEX}{{24}}\.json"),
        (Kind.run, r"runs/[^/]+\.json"),
        (Kind.listing, rf"listings/{HEX}{{24}}((\.\d+)?\.json|\.parquet)"),
        (Kind.compacted, rf"compact/[^/]+/{HEX}{{24}}\.(json|parquet)"),
        (Kind.checkpoint, rf"work/{HEX}{{24}}\.checkpoint"),
        (Kind.attempt, rf"attempts/{HEX}{{24}}\.json"),
        (Kind.model, rf"models/{HEX}{{24}}\.json"),
        (Kind.data, rf"tables/[^/]+/[^/]+-\d{{7}}-{HEX}{{24}}\.parquet"),
        (Kind.data, rf"files/[^/]+/[^/]+-{HEX}{{24}}-[^/]+"),
        (Kind.data, r"arrays/[^/]+/[^/]+/[^/]+/c([./]\d+)+"),
        (Kind.metadata, r"arrays/[^/]+/[^/]+/[^/]+/zarr\.json"),
        (Kind.group, r"arrays/[^/]+/[^/]+/zarr\.json"),
    )
)


def kind_of(path: str) -> Kind | None:
    """What a file is, by its path in the store; None for one that no writer of ours would put there."""
    return next((kind for kind, pattern in PATTERNS if pattern.fullmatch(path)), None)


def walk(root: Path) -> Iterator[str]:
    """The paths of all files of a store, relative to it, in sorted order."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            yield Path(folder, name).relative_to(root).as_posix()
