"""What the report tells of concepts, from rows: the quality of dictionaries and the strongest concepts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from xai_core.concepts.dictionary import OVERCOMPLETENESS
from xai_core.errors import UsageError

# Two-sided 95 % of the normal distribution.
Z95 = 1.96

# A layer, an extractor, and the number of a concept in their dictionary.
ConceptKey = tuple[str, str, int]
Rows: TypeAlias = "pa.Table | Sequence[Mapping[str, Any]]"

COLUMNS = {
    "concepts": "layer extractor concept_id size atoms channels vectors rel_l2 l0_ratio",
    "concept_scores": "image_id layer extractor class_id concept_id rank attribution coefficient",
    "concept_edges": (
        "image_id extractor attribution_method source_layer target_layer source target class_id weight"
    ),
    "concept_exemplars": "layer extractor concept_id rank image_id row column score relevance",
    "sae_training": "layer extractor step vectors loss rel_l2 l0 dead learning_rate",
    "concept_insertion": (
        "image_id source_layer target_layer extractor attribution_method target insertion deletion"
    ),
    "concept_curves": "image_id extractor attribution_method target curve step alignment",
    "cafe": "image_id layer extractor concept_id attributor insertion locality",
}


def as_table(name: str, rows: Rows) -> pa.Table:
    """Rows of one of the concept tables; no rows are a table without rows.

    Raises:
        UsageError: a column of the table is missing.
    """
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([dict(row) for row in rows])
    needed = COLUMNS[name].split()
    missing = [column for column in needed if column not in table.column_names]
    if missing and table.num_rows:
        raise UsageError(
            f"{name}: expected the columns {', '.join(needed)}, got none named {', '.join(missing)}; "
            "give the rows as the store has them"
        )
    return table if not missing else pa.table({column: pa.array([], pa.null()) for column in needed})


@dataclass(frozen=True)
class DictionaryQuality:
    """One dictionary (iERF, Table III); margins are half the width of 95 % intervals, None where not known.

    ``best`` are the measures on which no other extractor of the layer is better.
    """

    layer: str
    extractor: str
    atoms: int
    used: int
    channels: int
    vectors: int
    rel_l2: float | None
    rel_l2_margin: float | None
    l0_ratio: float | None
    l0_ratio_margin: float | None
    note: str
    best: frozenset[str] = frozenset()


def dictionary_qualities(concepts: pa.Table) -> list[DictionaryQuality]:
    """A row for every layer and extractor, in the order of the rows.

    Standard errors are read from the columns ``rel_l2_error`` and ``l0_ratio_error`` where there are such.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in concepts.to_pylist():
        groups.setdefault((row["layer"], row["extractor"]), []).append(row)
    found = [_quality(rows) for rows in groups.values()]
    return [_marked(one, [other for other in found if other.layer == one.layer]) for one in found]


def _quality(rows: list[dict[str, Any]]) -> DictionaryQuality:
    first = rows[0]
    full = OVERCOMPLETENESS * first["channels"]
    return DictionaryQuality(
        layer=first["layer"],
        extractor=first["extractor"],
        atoms=first["atoms"],
        used=sum(row["size"] > 0 for row in rows),
        channels=first["channels"],
        vectors=first["vectors"],
        rel_l2=_scaled(first["rel_l2"]),
        rel_l2_margin=_scaled(first.get("rel_l2_error"), Z95),
        l0_ratio=_scaled(first["l0_ratio"]),
        l0_ratio_margin=_scaled(first.get("l0_ratio_error"), Z95),
        note="" if first["atoms"] == full else f"{OVERCOMPLETENESS} C would be {full:,}",
    )


def _scaled(value: float | None, factor: float = 1.0) -> float | None:
    return None if value is None or value != value else factor * value


def _marked(one: DictionaryQuality, of_layer: Sequence[DictionaryQuality]) -> DictionaryQuality:
    best = set()
    for name, sign in (("rel_l2", -1), ("l0_ratio", 1)):
        merits = [sign * value for other in of_layer if (value := getattr(other, name)) is not None]
        own = getattr(one, name)
        if len(merits) > 1 and own is not None and sign * own == max(merits):
            best.add(name)
    return replace(one, best=frozenset(best))


@dataclass(frozen=True)
class RankedConcept:
    """A concept with its mean attribution to a class (all classes: None) over ``images`` explained images.

    It was among the strongest of ``present`` of them; in the others it counts 0.
    """

    key: ConceptKey
    class_id: int | None
    attribution: float
    present: int
    images: int


def ranked_concepts(scores: pa.Table, extractor: str, class_id: int | None = None) -> list[RankedConcept]:
    """The concepts that images were explained by, by layer, the strongest mean attribution first.

    Only the strongest concepts of an image have rows, so that a mean over rows would favour what is rare: the
    mean is over all images explained by this extractor (for the class, if one is named).
    """
    chosen = scores.filter(pc.equal(scores["extractor"], extractor)) if scores.num_rows else scores
    if class_id is not None and chosen.num_rows:
        chosen = chosen.filter(pc.equal(chosen["class_id"], class_id))
    if not chosen.num_rows:
        return []
    images = pc.count_distinct(chosen["image_id"]).as_py()
    summed = chosen.group_by(["layer", "concept_id"], use_threads=False).aggregate(
        [("attribution", "sum"), ("image_id", "count_distinct")]
    )
    found = [
        RankedConcept(
            (row["layer"], extractor, row["concept_id"]),
            class_id,
            row["attribution_sum"] / images,
            row["image_id_count_distinct"],
            images,
        )
        for row in summed.to_pylist()
    ]
    place = {layer: index for index, layer in enumerate(dict.fromkeys(chosen["layer"].to_pylist()))}
    return sorted(found, key=lambda one: (place[one.key[0]], -one.attribution, one.key[2]))


def strongest(ranked: Iterable[RankedConcept], per_layer: int) -> list[RankedConcept]:
    """The first concepts of every layer."""
    counts: dict[str, int] = {}
    found = []
    for one in ranked:
        counts[one.key[0]] = counts.get(one.key[0], 0) + 1
        if counts[one.key[0]] <= per_layer:
            found.append(one)
    return found
