"""exemplars: the sampled vectors nearest to each concept of a dictionary, over all shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from storage.commits import Unit
from storage.schema import rows_to_table
from tasks.dictionary import variants
from tasks.dictionary_file import SEPARATOR, committed_dictionary
from tasks.stage import Context, Outcome, Stage
from xai_core.concepts.cafe import Exemplars, ExemplarSearch


def run(context: Context) -> Outcome:
    """Rows of ``concept_exemplars`` for one layer and extractor; none where no dictionary could be fitted.

    The vectors are read shard by shard: memory does not grow with their number.
    """
    layer, extractor = context.work.unit.variant.split(SEPARATOR)
    dictionary = committed_dictionary(context, layer, extractor)
    if dictionary is None:
        return Outcome(0, 0)
    wanted = context.config.concepts.exemplars
    search = ExemplarSearch(dictionary, wanted.count, distinct_images=wanted.distinct_images)
    for unit, images, rows in _shards(context):
        vectors = _read(context, unit, f"{layer}.vectors", rows)
        search.add(vectors.to(context.device), images)
    _write(context, search.found())
    return Outcome(0, 0)


def _shards(context: Context) -> Iterator[tuple[Unit, torch.Tensor, np.ndarray]]:
    """The shards that hold samples: their unit, the ids of the images that have one, and these images' rows."""
    for unit in sorted(context.work.upstream, key=lambda unit: unit.shard):
        if unit.stage != "pfv":
            continue
        record = context.record(unit.stage, unit.variant, unit.shard)
        # A shard without a single image that could be sampled has no arrays.
        if "valid" in record.facts["arrays"]:
            rows = np.flatnonzero(context.store.read_array(record, "valid"))
            yield unit, torch.from_numpy(rows) + record.facts["arrays"]["valid"]["image"], rows


def _read(context: Context, unit: Unit, name: str, rows: np.ndarray) -> torch.Tensor:
    record = context.record(unit.stage, unit.variant, unit.shard)
    return torch.from_numpy(context.store.read_array(record, name)[rows])


def _write(context: Context, found: Exemplars) -> None:
    """The exemplars as rows, concept by concept, nearest first, with what the sample says of each."""
    layer, extractor = context.work.unit.variant.split(SEPARATOR)
    concept, rank = (found.image >= 0).cpu().nonzero(as_tuple=True)
    image, draw, score = (one.cpu()[concept, rank] for one in (found.image, found.draw, found.score))
    places = torch.zeros(len(image), 2, dtype=torch.int64)
    relevance = torch.zeros(len(image))
    for unit, images, rows in _shards(context):
        here = torch.isin(image, images)
        at = torch.searchsorted(images, image[here])
        places[here] = _read(context, unit, f"{layer}.positions", rows)[at, draw[here]].long()
        relevance[here] = _read(context, unit, f"{layer}.relevance", rows)[at, draw[here]]
    columns = {
        "layer": [layer] * len(image),
        "extractor": [extractor] * len(image),
        "concept_id": concept.numpy(),
        "rank": rank.numpy(),
        "image_id": image.numpy(),
        "row": places[:, 0].numpy(),
        "column": places[:, 1].numpy(),
        "score": score.numpy(),
        "relevance": relevance.numpy(),
    }
    context.commit.table("concept_exemplars", rows_to_table("concept_exemplars", columns))


STAGE = Stage(
    name="exemplars",
    version=1,
    run=run,
    reads=lambda study, variant: study.config.concepts.exemplars.model_dump(),
    upstream=lambda study, variant: (("pfv", ""), ("dictionary", variant)),
    variants=variants,
    sharded=False,
    summary="finds the vectors nearest to each concept",
)
