"""The files that the weights of a model come from: what they hold is part of what it is, where they lay is not."""

from __future__ import annotations

from pathlib import Path

from tasks.config import ModelConfig
from xai_core import create_args

FileState = tuple[tuple[str, int, int], ...]


def weight_files(config: ModelConfig) -> tuple[Path, ...]:
    """The checkpoint and whatever else the config takes weights from, be it there or not."""
    checkpoint = () if config.checkpoint is None else (config.checkpoint,)
    named = (path for _, path in create_args.weight_files(config.create_args))
    return tuple(Path(one) for one in (*checkpoint, *named))


def file_state(config: ModelConfig) -> FileState:
    """Path, size and time of each of them: what says that one was written anew."""
    there = [path for path in weight_files(config) if path.is_file()]
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in there)
