"""Concepts to look at: exemplars from rows, and cards of small pictures for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.report.concept_rows import ConceptKey, RankedConcept
from tasks.report.tiles import JPEG_QUALITY, Tile
from xai_core.render.concept_sheet import Exemplars, concept_tiles

# Of each concept on the page; a sheet of its own may show more.
EXEMPLARS = 6

TILE_SIDE = 128
THUMBNAIL_SIDE = 76


@dataclass(frozen=True)
class ConceptCard:
    """A concept with its exemplars' evidence; ``anchor`` is the id of its element."""

    anchor: str
    key: ConceptKey
    note: str
    tiles: tuple[Tile, ...]


def exemplars_of(
    rows: pa.Table,
    keys: Iterable[ConceptKey],
    pictures: Callable[[int], np.ndarray | None],
    fields: Callable[[Mapping[str, Any]], np.ndarray | None],
    grids: Mapping[str, tuple[int, int]],
    class_names: Mapping[int, str],
    most: int = EXEMPLARS,
) -> dict[ConceptKey, Exemplars]:
    """The exemplars of some concepts from rows of ``concept_exemplars``, best first.

    An exemplar without its picture or its receptive field is left out, and a concept without exemplars.

    Args:
        pictures: the picture ``[3, H, W]`` in [0, 1] of an image id, None where it cannot be read.
        fields: the receptive field ``[r, c]`` of a row, None where there is none.
        grids: rows and columns of each layer; class_names: the class of an image id, for the caption.
    """
    wanted = set(keys)
    groups: dict[ConceptKey, list[dict[str, Any]]] = {}
    for row in rows.to_pylist():
        key = (row["layer"], row["extractor"], row["concept_id"])
        if key in wanted:
            groups.setdefault(key, []).append(row)
    found = {}
    for key, members in groups.items():
        best = sorted(members, key=lambda row: row["rank"])[:most]
        read = [(row, pictures(row["image_id"]), fields(row)) for row in best]
        shown = [
            (row, picture, field) for row, picture, field in read if picture is not None and field is not None
        ]
        if shown:
            found[key] = Exemplars(
                np.stack([picture for _, picture, _ in shown]),
                np.stack([field for _, _, field in shown]),
                np.array([(row["row"], row["column"]) for row, _, _ in shown]),
                grids[key[0]],
                [_caption(row, class_names) for row, _, _ in shown],
            )
    return found


def _caption(row: Mapping[str, Any], class_names: Mapping[int, str]) -> str:
    name = class_names.get(row["image_id"], "")
    place = "" if row["row"] >= 0 else "class token"
    return "\n".join(one for one in (f"image {row['image_id']}", name, f"score {row['score']:.3g}", place) if one)


def cards_of(
    ranked: Sequence[RankedConcept],
    exemplars: Mapping[ConceptKey, Exemplars],
    sizes: Mapping[ConceptKey, int],
    class_names: Mapping[int, str],
) -> list[ConceptCard]:
    """A card for every concept that has exemplars, in the order given; each concept once."""
    of_key: dict[ConceptKey, list[RankedConcept]] = {}
    for one in ranked:
        of_key.setdefault(one.key, []).append(one)
    return [
        ConceptCard(anchor_of(key), key, _note(members, sizes.get(key), class_names), _tiles(key, exemplars[key]))
        for key, members in of_key.items()
        if key in exemplars
    ]


def anchor_of(key: ConceptKey) -> str:
    """The id of a concept's element: letters, digits and hyphens, different for different concepts."""
    layer, extractor, concept = ("".join(_safe(one) for one in str(part)) for part in key)
    return f"concept-{layer}-{extractor}-{concept}"


def _safe(character: str) -> str:
    return character if character.isascii() and character.isalnum() else f"_{ord(character):x}_"


def _note(members: Sequence[RankedConcept], size: int | None, class_names: Mapping[int, str]) -> str:
    told = [] if size is None else [f"{size:,} {'vector' if size == 1 else 'vectors'}"]
    for one in members:
        to = "" if one.class_id is None else f" to {class_names.get(one.class_id, f'class {one.class_id}')}"
        told.append(f"attribution{to} {one.attribution:.3g}, in {one.present} of {one.images} images")
    return "; ".join(told)


def _tiles(key: ConceptKey, exemplars: Exemplars) -> tuple[Tile, ...]:
    pictures = concept_tiles(exemplars, side=TILE_SIDE)
    return tuple(
        Tile(caption.splitlines()[0], jpeg_uri(picture), _told(key, caption), _rest(caption))
        for picture, caption in list(zip(pictures, exemplars.captions, strict=True))[:EXEMPLARS]
    )


def _told(key: ConceptKey, caption: str) -> str:
    return f"evidence for concept {key[2]} of {key[0]} in {', '.join(caption.splitlines())}"


def _rest(caption: str) -> str:
    return ", ".join(caption.splitlines()[1:])


def thumbnails(exemplars: Mapping[ConceptKey, Exemplars]) -> dict[ConceptKey, str]:
    """The evidence of each concept's best exemplar as a very small picture, without lines."""
    return {
        key: jpeg_uri(concept_tiles(one.first(1), side=THUMBNAIL_SIDE, lines=False)[0])
        for key, one in exemplars.items()
    }


def jpeg_uri(picture: np.ndarray) -> str:
    """A picture as a JPEG inside a data URI, as large as it is."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
