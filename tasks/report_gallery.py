"""The report's gallery: a few telling images, each with its parts and every method's overlay."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from storage.canonical import digest_bytes
from storage.commits import CommitRecord
from storage.errors import SourceError
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


def gallery(context: Context) -> tuple[list[Card], int]:
    """The gallery's cards, and how many chosen pictures can no longer be read as they were listed."""
    methods = [choice.id for choice in context.config.methods]
    count = max(1, min(GALLERY_IMAGES, MOST_TILES // (len(methods) + 2)))
    chosen = choose(_candidates(context), count)
    pictures = {image.image_id: _read_picture(context, image) for image in chosen}
    shown = [image for image in chosen if pictures[image.image_id] is not None]
    read = _reader(context)
    signed = {method: any(is_signed(_map(context, read, method, one)) for one in shown) for method in methods}
    cards = [Card(image, tuple(_tiles(context, read, image, pictures[image.image_id], signed))) for image in shown]
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


def _candidates(context: Context) -> list[Chosen]:
    """The images that the model has seen, of the first shards, by id."""
    found = []
    for shard in _shards(context)[:GALLERY_SHARDS]:
        predict = context.record("predict", shard=shard)
        top = {
            row["image_id"]: row
            for row in context.store.read_table(predict, "predictions").to_pylist()
            if row["rank"] == 1
        }
        targets = {row["image_id"]: row for row in context.store.read_table(predict, "targets").to_pylist()}
        manifest = context.store.read_table(context.record("manifest", shard=shard), "manifest").to_pylist()
        found += [
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
            for row in manifest
            if row["image_id"] in top
        ]
    return sorted(found, key=_by_id)


def _shards(context: Context) -> list[int]:
    return sorted(unit.shard for unit in context.work.upstream if unit.stage == "predict")


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


Reader = Callable[[CommitRecord, str], np.ndarray]


def _reader(context: Context) -> Reader:
    """Reads arrays of records and keeps the last ones: the images of a shard come one after the other."""

    @lru_cache(maxsize=16)
    def read(stage: str, variant: str, shard: int, name: str) -> np.ndarray:
        return context.store.read_array(context.record(stage, variant, shard), name)

    return lambda record, name: read(record.unit.stage, record.unit.variant, record.unit.shard, name)


def _place(context: Context, stage: str, variant: str, image: Chosen) -> tuple[CommitRecord, int]:
    """The record that holds an image's result, and the image's row in it."""
    shard, row = divmod(image.image_id, context.config.run.shard_size)
    return context.record(stage, variant, shard), row


def _map(context: Context, read: Reader, method: str, image: Chosen) -> np.ndarray:
    """A method's map at input resolution ``[H, W]``, empty ``[0, 0]`` where the image has none."""
    record, row = _place(context, "attribute", method, image)
    if "maps" not in record.facts["arrays"] or not read(record, "valid")[row]:
        return np.zeros((0, 0))
    values = torch.from_numpy(read(record, "maps")[row].astype(np.float32)) * float(read(record, "scale")[row])
    rule = context.store.array_attributes(record, "maps")["upsampling"] or None
    size = study_classifier(context).input_size
    return upsample_map(values.unsqueeze(0), size, rule)[0].numpy()


def _tiles(
    context: Context, read: Reader, image: Chosen, picture: np.ndarray | None, signed: dict[str, bool]
) -> list[Tile]:
    if picture is None:
        return []
    subject = f"image {image.image_id} ({image.path})"
    tiles = [Tile("image", _uri(picture), f"{subject} as the model saw it")]
    tiles.append(_part_tile(context, read, image, picture, subject))
    for method, has_sign in signed.items():
        values = _map(context, read, method, image)
        tiles.append(_method_tile(method, values, picture, has_sign, subject))
    return tiles


def _part_tile(context: Context, read: Reader, image: Chosen, picture: np.ndarray, subject: str) -> Tile:
    record, row = _place(context, "parts", "", image)
    if "labels" not in record.facts["arrays"] or not read(record, "valid")[row]:
        return Tile("parts", None, f"no parts of {subject}", "no parts")
    labels = read(record, "labels")[row]
    return Tile("parts", _uri(part_map(picture, labels)), f"parts of {subject}")


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
