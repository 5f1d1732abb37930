"""The report's gallery: a few telling images, each with its parts, every method's overlay, and its contests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import SourceError
from storage.results import Results
from tasks.config import Choice
from tasks.predict import class_names
from tasks.report.contests import MOST_CLASSES, OTHER_TILES, Contest, contest_of, with_contests
from tasks.report.tiles import Rows, Tile, data_uri, map_tile, stored_map
from tasks.sources import open_source, read_listed
from tasks.stage import Context
from tasks.worker import study_classifier
from xai_core.render import is_signed, part_map

GALLERY_IMAGES = 12

# The listing is a shuffle, so its first shards are a fair sample; a large study's others stay unread.
GALLERY_SHARDS = 4

# Pictures in all: with many methods there are fewer images, so that the page stays small.
MOST_TILES = 240


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
class Card:
    """An image with its tiles: picture, parts, every method; and the contests of methods that kept theirs."""

    image: Chosen
    tiles: tuple[Tile, ...]
    contests: tuple[Contest, ...] = ()


def gallery(context: Context, results: Results) -> tuple[list[Card], int]:
    """The gallery's cards, and how many chosen pictures can no longer be read as they were listed."""
    methods = [choice.id for choice in context.config.methods]
    contests = with_contests(context.config.methods)
    tiles = len(methods) + 2 + len(contests) * (MOST_CLASSES + OTHER_TILES)
    count = max(1, min(GALLERY_IMAGES, MOST_TILES // tiles))
    first = results.select(shards=range(GALLERY_SHARDS))
    chosen = choose(_candidates(first), count)
    pictures = {image.image_id: _read_picture(context, image) for image in chosen}
    shown = [(image, picture) for image in chosen if (picture := pictures[image.image_id]) is not None]
    rows = Rows(first)
    signed = {
        method: any(is_signed(stored_map(context, rows, method, one.image_id)) for one, _ in shown)
        for method in methods
    }
    cards = [
        Card(
            image,
            tuple(_tiles(context, rows, image, picture, signed)),
            _contests(context, rows, contests, image, picture),
        )
        for image, picture in shown
    ]
    return cards, len(chosen) - len(shown)


def _contests(
    context: Context, rows: Rows, choices: Sequence[Choice], image: Chosen, picture: np.ndarray
) -> tuple[Contest, ...]:
    if not choices:
        return ()
    names = class_names(context, study_classifier(context))
    found = (
        contest_of(context, rows, choice, image.image_id, picture, names, _subject(image)) for choice in choices
    )
    return tuple(one for one in found if one is not None)


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
        listed = read_listed(open_source(context.config.dataset), image.path, image.sha256)
        inputs = model.preprocess(listed)
    except (OSError, SourceError):
        return None
    return model.as_pictures(inputs.unsqueeze(0))[0]


def _subject(image: Chosen) -> str:
    return f"image {image.image_id} ({image.path})"


def _tiles(
    context: Context, rows: Rows, image: Chosen, picture: np.ndarray, signed: dict[str, bool]
) -> list[Tile]:
    subject = _subject(image)
    tiles = [Tile("image", data_uri(picture), f"{subject} as the model saw it")]
    tiles.append(_part_tile(rows, image, picture, subject))
    for method, has_sign in signed.items():
        values = stored_map(context, rows, method, image.image_id)
        tiles.append(map_tile(method, values, picture, has_sign, subject))
    return tiles


def _part_tile(rows: Rows, image: Chosen, picture: np.ndarray, subject: str) -> Tile:
    labels = rows.row("parts/labels", image.image_id)
    if labels is None:
        return Tile("parts", None, f"no parts of {subject}", "no parts")
    return Tile("parts", data_uri(part_map(picture, labels.values)), f"parts of {subject}")
