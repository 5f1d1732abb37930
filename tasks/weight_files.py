"""The files that the weights of a model come from: what they hold is part of what it is, where they lay is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.config import ModelConfig

# Where timm is told of a file instead of its own download, in the arguments of a model or of its backbone.
OVERLAY, FILE = "pretrained_cfg_overlay", "file"

FileState = tuple[tuple[str, int, int], ...]


def weight_files(config: ModelConfig) -> tuple[Path, ...]:
    """The checkpoint and whatever else the config takes weights from, be it there or not."""
    checkpoint = () if config.checkpoint is None else (config.checkpoint,)
    return tuple(Path(one) for one in (*checkpoint, *_overlays(config.create_args)))


def file_state(config: ModelConfig) -> FileState:
    """Path, size and time of each of them: what says that one was written anew."""
    there = [path for path in weight_files(config) if path.is_file()]
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in there)


def without_files(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A model's arguments, free of where weights lay."""
    found = {}
    for name, one in arguments.items():
        if isinstance(one, Mapping):
            one = without_files(one)
            if name == OVERLAY:
                one.pop(FILE, None)
        found[name] = one
    return found


def _overlays(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, one in arguments.items():
        if isinstance(one, Mapping):
            yield from _overlays(one)
            if name == OVERLAY and isinstance(one.get(FILE), str):
                yield one[FILE]
