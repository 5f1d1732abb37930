"""A user's folder of concepts: one sub-folder of pictures each."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from storage.canonical import digest_file
from storage.errors import SourceError
from storage.sources import decode_image
from storage.sources.folder import SUFFIXES, open_file
from xai_core.errors import UsageError
from xai_core.models import Classifier


def concept_files(folder: Path) -> dict[str, list[str]]:
    """Digests of the pictures of each concept, sorted: another content is another key, another path is not.

    Raises:
        UsageError: no such folder, or no sub-folder with pictures.
    """
    return {name: sorted(_digest(path) for path in paths) for name, paths in _pictures(folder).items()}


def read_concepts(folder: Path, model: Classifier, most: int, seed: int) -> dict[str, Tensor]:
    """Pictures of each concept as model inputs ``[n, 3, H, W]``, at most so many, drawn by their content.

    Raises:
        UsageError: as :func:`concept_files`, or a picture that cannot be read.
    """
    concepts = {}
    for name, paths in _pictures(folder).items():
        drawn = sorted(paths, key=lambda path: hashlib.blake2b(f"{seed}:{_digest(path)}".encode()).digest())
        concepts[name] = torch.stack([_read(path, model) for path in drawn[:most]])
    return concepts


def _pictures(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise UsageError(f"concepts: expected a folder with one folder of pictures a concept, got {folder}")
    found = {
        one.name: sorted(path for path in one.iterdir() if _is_picture(path))
        for one in sorted(folder.iterdir())
        if one.is_dir() and not one.name.startswith(".")
    }
    empty = [name for name, paths in found.items() if not paths]
    if empty or not found:
        where = f"none in {folder / empty[0]}" if empty else f"no sub-folder in {folder}"
        raise UsageError(
            f"concepts: expected pictures ({', '.join(sorted(SUFFIXES))}) of every concept, got {where}"
        )
    return found


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read(path: Path, model: Classifier) -> Tensor:
    try:
        with open_file(path) as stream:
            return model.preprocess(decode_image(stream.read()))
    except (OSError, SourceError) as error:
        raise UsageError(f"concepts: expected a readable picture at {path}: {error}") from None


def _digest(path: Path) -> str:
    stat = path.stat()
    return _digest_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=10_000)
def _digest_of(path: Path, _size: int, _time: int) -> str:
    """A file's digest, read again when its size or time changed."""
    return digest_file(path)
