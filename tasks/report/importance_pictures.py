"""A few pictures with the importance that every evaluated network gives to their patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from storage.errors import SourceError
from storage.results import Results
from tasks.importance.networks import load_network, networks_of
from tasks.importance.stage import ACCURACY, STAGE
from tasks.report.tiles import LONGEST_SIDE, Rows, Tile, data_uri
from tasks.sources import open_source, read_listed
from tasks.stage import Context
from xai_core.models import Classifier
from xai_core.render import share_overlay

PICTURES = 6
# As in the gallery: the listing is a shuffle, so its first shards are a fair sample.
SHARDS = 4
JUDGED = {True: "right", False: "wrong"}


@dataclass(frozen=True)
class ImportanceCard:
    """A picture with its tiles: itself, and under each network's importance."""

    image_id: int
    path: str
    label: str
    tiles: tuple[Tile, ...]


def importance_cards(
    context: Context, results: Results, names: Mapping[str, str]
) -> tuple[list[ImportanceCard], int]:
    """The cards, one per class first, and how many chosen pictures can no longer be read as they were listed.

    Args:
        names: what each network is called, by its id.
    """
    first = results.select(shards=range(SHARDS))
    networks = {one.id: load_network(one) for one in networks_of(context.config) if one.id in names}
    rows, right = Rows(first), _right(first)
    cards = []
    chosen = _chosen(first)
    for row in chosen:
        try:
            picture = read_listed(open_source(context.config.dataset), row["path"], row["sha256"])
        except (OSError, SourceError):
            continue
        tiles = _tiles(picture, row["image_id"], networks, names, rows, right)
        cards.append(ImportanceCard(row["image_id"], row["path"], row["label_name"] or str(row["label"]), tiles))
    return cards, len(chosen) - len(cards)


def _chosen(results: Results) -> list[dict[str, Any]]:
    """One picture of every class, then others, in the order of their ids."""
    listed = results.table("manifest").sort_by("image_id").to_pylist()
    first = {row["label"]: row for row in reversed(listed)}
    wanted = sorted(first.values(), key=lambda row: row["image_id"])
    return list({row["image_id"]: row for row in [*wanted, *listed]}.values())[:PICTURES]


def _right(results: Results) -> dict[tuple[str, int], bool]:
    """Which networks, as they are, are right on which pictures."""
    own = results.select(STAGE.name).table(ACCURACY).filter(pc.field("direction") == "own")
    names = zip(own["network"].to_pylist(), own["image_id"].to_pylist(), strict=True)
    return dict(zip(names, own["correct"].to_pylist(), strict=True))


def _tiles(
    picture: Any,
    image_id: int,
    networks: Mapping[str, Classifier],
    names: Mapping[str, str],
    rows: Rows,
    right: Mapping[tuple[str, int], bool],
) -> tuple[Tile, ...]:
    tiles: list[Tile] = []
    for name, model in networks.items():
        seen = _enlarged(model.as_pictures(model.preprocess(picture).unsqueeze(0))[0])
        if not tiles:
            tiles.append(Tile("image", data_uri(seen), f"image {image_id} as {names[name]} sees it"))
        stored = rows.row(f"{STAGE.name}/{name}/importance", image_id)
        if stored is None:
            tiles.append(Tile(names[name], None, f"no importance by {name} of image {image_id}", "set aside"))
            continue
        importance = np.kron(stored.values, np.ones([side // len(stored) for side in seen.shape[:2]]))
        alternative = f"importance by {name} over image {image_id}"
        note = JUDGED[right[name, image_id]]
        tiles.append(Tile(names[name], data_uri(share_overlay(seen, importance, 0.0)), alternative, note))
    return tuple(tiles)


def _enlarged(picture: np.ndarray) -> np.ndarray:
    """A small picture so many times larger that its patches stay sharp in a tile."""
    times = max(1, LONGEST_SIDE // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)
