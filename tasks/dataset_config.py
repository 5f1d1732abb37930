"""The config section ``dataset``: where images come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tasks.choices import Frozen


class DatasetConfig(Frozen):
    """Where images come from and in which order they are taken.

    ``classes`` is a CSV (index, folder, name) that says which of the model's classes a folder, or a label of a
    Parquet file, is: for folders that are a subset of them, and for files that name no classes themselves;
    ``masks`` is a folder that mirrors the images, for the parser ``masks``; ``order_seed`` null keeps the
    source's own order; ``images`` and ``seed`` are the demo's.
    """

    kind: Literal["folder", "parquet", "demo"] = "demo"
    path: str | None = None
    classes: str | None = None
    masks: str | None = None
    order_seed: int | None = 0
    limit: int | None = Field(default=None, ge=1)
    images: int = Field(default=64, ge=1)
    seed: int = 1

    @model_validator(mode="after")
    def _path_where_needed(self) -> DatasetConfig:
        if self.kind != "demo" and self.path is None:
            raise ValueError(f"kind {self.kind!r} needs a path: set dataset.path")
        if self.kind == "demo" and (self.path or self.classes or self.masks):
            raise ValueError("kind 'demo' draws its own images: remove path, classes and masks, or change kind")
        if self.kind == "parquet" and self.masks:
            raise ValueError("kind 'parquet' reads no masks: remove them, or use kind: folder")
        return self
