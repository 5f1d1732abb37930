"""The report's gallery: a few telling images, each with its parts and every method's overlay."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xarray
from PIL import Image

from storage.canonical import digest_bytes
from storage.errors import SourceError
from storage.results import Results
from storage.sources import decode_image
from tasks.sources import open_source
from tasks.stage import Context
from tasks.worker import study_classifier
from xai_core.attribution import upsample_map
from xai_core.render import is_signed, overlay, part_map

GALLERY_IMAGES = 12

# The listing is a shuffle, so its first shards are a fair sample; a large study's others stay unread.
GALLERY_SHARDS = 4

# Pictures in all: with many methods there are fewer images, so that the page stays small.
MOST_TILES = 240
LONGEST_SIDE = 224
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Chosen:
    """An image of the gallery; ``correct`` is None where the label is not one of the model's classes."""

    image_id: int
    path: str
    sha256: str
    label: str | None
    predicted: str
    probability: float
    target: str
    correct: bool | None


@dataclass(frozen=True)
class Tile:
    """A picture as a data URI, or None where there is none; ``note`` says why."""

    name: str
    uri: str | None
    alternative: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """An image with its tiles: picture, parts, every method."""

    image: Chosen
    tiles: tuple[Tile, ...]


def gallery(context: Context, results: Results) -> tuple[list[Card], int]:
    """The gallery's cards, and how many chosen pictures can no longer be read as they were listed."""
    methods = [choice.id for choice in context.config.methods]
    count = max(1, min(GALLERY_IMAGES, MOST_TILES // (len(methods) + 2)))
    first = results.select(shards=range(GALLERY_SHARDS))
    chosen = choose(_candidates(first), count)
    pictures = {image.image_id: _read_picture(context, image) for image in chosen}
    shown = [image for image in chosen if pictures[image.image_id] is not None]
    rows = Rows(first)
    signed = {method: any(is_signed(_map(context, rows, method, one)) for one in shown) for method in methods}
    cards = [Card(image, tuple(_tiles(context, rows, image, pictures[image.image_id], signed))) for image in shown]
    return cards, len(chosen) - len(shown)


def choose(candidates: list[Chosen], count: int) -> list[Chosen]:
    """Up to a third of mistakes, the surest first, then one image per class, then whatever comes first."""
    mistakes = sorted(
        (one for one in candidates if one.correct is False), key=lambda one: (-one.probability, one.image_id)
    )
    others = [one for one in candidates if one.correct is not False]
    firsts = list({one.label or one.predicted: one for one in reversed(others)}.values())
    wanted = [*mistakes[: -(-count // 3)], *sorted(firsts, key=_by_id), *others, *mistakes]
    return list({one.image_id: one for one in wanted}.values())[:count]


def _by_id(image: Chosen) -> int:
    return image.image_id


def _candidates(results: Results) -> list[Chosen]:
    """The images that the model has seen, by id."""
    targets, top = _by_image(results.table("targets")), _by_image(_best(results.table("predictions")))
    return [
        Chosen(
            image_id=row["image_id"],
            path=row["path"],
            sha256=row["sha256"],
            label=row["label_name"],
            predicted=top[row["image_id"]]["class_name"],
            probability=top[row["image_id"]]["prob"],
            target=targets[row["image_id"]]["target_name"],
            correct=targets[row["image_id"]]["correct"],
        )
        for row in results.table("manifest").sort_by("image_id").to_pylist()
        if row["image_id"] in top
    ]


def _best(predictions: pa.Table) -> pa.Table:
    return predictions.filter(pc.field("rank") == 1)


def _by_image(rows: pa.Table) -> dict[int, dict[str, Any]]:
    return {row["image_id"]: row for row in rows.to_pylist()}


def _read_picture(context: Context, image: Chosen) -> np.ndarray | None:
    """The picture as the model saw it, uint8 ``[H, W, 3]``; None where it is gone or has changed."""
    model = study_classifier(context)
    try:
        content = open_source(context.config.dataset).read(image.path)
        if digest_bytes(content) != image.sha256:
            return None
        inputs = model.preprocess(decode_image(content))
    except (OSError, SourceError):
        return None
    shown = model.denormalise(inputs.unsqueeze(0))[0]
    return (shown.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()


class Rows:
    """Rows of committed arrays by image, each array opened once and read where it is asked for."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._names = frozenset(results.array_names())
        self._arrays: dict[str, xarray.DataArray] = {}

    def row(self, name: str, image_id: int) -> xarray.DataArray | None:
        """An image's row of an array, or None where it has none."""
        if name not in self._names:
            return None
        if name not in self._arrays:
            self._arrays[name] = self._results.xarray(name)
        rows = self._arrays[name]
        if image_id not in rows.indexes["image"]:
            return None
        row = rows.sel(image=image_id)
        return row if bool(row["valid"]) else None


def _map(context: Context, rows: Rows, method: str, image: Chosen) -> np.ndarray:
    """A method's map at input resolution ``[H, W]``, empty ``[0, 0]`` where the image has none."""
    values = rows.row(f"attribute/{method}/maps", image.image_id)
    scale = rows.row(f"attribute/{method}/scale", image.image_id)
    if values is None or scale is None:
        return np.zeros((0, 0))
    scaled = torch.from_numpy(values.values.astype(np.float32)) * float(scale)
    size = study_classifier(context).input_size
    return upsample_map(scaled.unsqueeze(0), size, values.attrs["upsampling"] or None)[0].numpy()


def _tiles(
    context: Context, rows: Rows, image: Chosen, picture: np.ndarray | None, signed: dict[str, bool]
) -> list[Tile]:
    if picture is None:
        return []
    subject = f"image {image.image_id} ({image.path})"
    tiles = [Tile("image", _uri(picture), f"{subject} as the model saw it")]
    tiles.append(_part_tile(rows, image, picture, subject))
    for method, has_sign in signed.items():
        values = _map(context, rows, method, image)
        tiles.append(_method_tile(method, values, picture, has_sign, subject))
    return tiles


def _part_tile(rows: Rows, image: Chosen, picture: np.ndarray, subject: str) -> Tile:
    labels = rows.row("parts/labels", image.image_id)
    if labels is None:
        return Tile("parts", None, f"no parts of {subject}", "no parts")
    return Tile("parts", _uri(part_map(picture, labels.values)), f"parts of {subject}")


def _method_tile(method: str, values: np.ndarray, picture: np.ndarray, has_sign: bool, subject: str) -> Tile:
    if values.size == 0:
        return Tile(method, None, f"no map by {method} of {subject}", "no map")
    note = "constant map" if values.min() == values.max() else ""
    uri = _uri(overlay(picture, values, signed=has_sign))
    return Tile(method, uri, f"relevance by {method} over {subject}", note)


def _uri(picture: np.ndarray) -> str:
    """A picture as a small JPEG inside a data URI."""
    stream = io.BytesIO()
    image = Image.fromarray(picture)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    image.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
