"""The report's contests: which class claims which pixel, for methods that kept their class distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tasks.config import Choice, options_of
from tasks.report.tiles import Rows, Tile, data_uri, map_tile, stored_map
from tasks.stage import Context
from xai_core.registry import methods
from xai_core.render import is_signed, share_overlay

# Classes that are shown of a contest of many: the target and those that claim the most.
MOST_CLASSES = 12

# Beside the classes: the picture, the wrapped method's map and the contrasted one.
OTHER_TILES = 3


@dataclass(frozen=True)
class Contest:
    """One method's contest over one image; ``left_out`` classes are not among the tiles."""

    method: str
    tiles: tuple[Tile, ...]
    left_out: int


def with_contests(choices: Sequence[Choice]) -> list[Choice]:
    """The methods that hand out class distributions."""
    return [one for one in choices if "distributions" in methods.get(one.name).arrays(options_of(methods, one))]


def contest_of(
    context: Context,
    rows: Rows,
    choice: Choice,
    image_id: int,
    picture: np.ndarray,
    names: Sequence[str],
    subject: str,
) -> Contest | None:
    """A method's contest over a picture (uint8 ``[H, W, 3]``), or None where the image has none."""
    prefix = f"attribute/{choice.id}"
    found = [rows.row(f"{prefix}/{name}", image_id) for name in ("distributions", "classes", "base")]
    if any(one is None for one in found):
        return None
    distributions, classes, base = (one.values for one in found if one is not None)
    taking_part = classes >= 0
    shares, ids = distributions[taking_part].astype(np.float64), classes[taking_part].tolist()
    won = claimed(shares)
    # The first is the target.
    order = [0, *(1 + np.argsort(-won[1:], kind="stable")).tolist()][:MOST_CLASSES]
    inner = str(options_of(methods, choice).in_id()["of"])
    has_sign = is_signed(base)
    contrasted = map_tile(choice.id, stored_map(context, rows, choice.id, image_id), picture, has_sign, subject)
    tiles = [
        Tile("image", data_uri(picture), f"{subject} as the model saw it"),
        map_tile(inner, base, picture, has_sign, subject),
        replace(contrasted, name="contrasted"),
        *(
            _class_tile(names[ids[at]], shares[at], 1.0 / len(ids), _note(won[at], at == 0), picture, subject)
            for at in order
        ),
    ]
    return Contest(choice.id, tuple(tiles), len(ids) - len(order))


def claimed(shares: np.ndarray) -> np.ndarray:
    """The part of all pixels on which each class alone has the largest share: ``[K]`` of shares ``[K, H, W]``."""
    first = shares == shares.max(axis=0)
    return (first & (first.sum(axis=0) == 1)).mean(axis=(1, 2))


def _class_tile(name: str, share: np.ndarray, chance: float, note: str, picture: np.ndarray, subject: str) -> Tile:
    return Tile(name, data_uri(share_overlay(picture, share, chance)), f"share of {name} in {subject}", note)


def _note(won: float, is_target: bool) -> str:
    amount = f"claims {100 * won:.0f} %"
    return f"target, {amount}" if is_target else amount
