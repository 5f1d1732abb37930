"""cafe: latents of sparse autoencoders explained by what drives them, and how well each attributor finds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from storage.schema import rows_to_table
from tasks.chosen_pictures import listed_rows, read_inputs
from tasks.config import options_of
from tasks.dictionary import variants
from tasks.dictionary_file import SEPARATOR, committed_dictionary
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study
from tasks.worker import study_classifier
from xai_core.concepts.cafe import ACTIVATION, explain_latents, latent_insertion, locality
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.sae.variants import VARIANTS
from xai_core.precision import precision_context
from xai_core.receptive_fields.attributors import attributors

Pair = dict[str, Any]


def sae_variants(study: Study) -> tuple[str, ...]:
    """One per layer and extractor that brings an encoder of its own: only these have latents."""
    if study.config.concepts.cafe is None:
        return ()
    named = {choice.id: choice.name for choice in study.config.concepts.extractors}
    return tuple(one for one in variants(study) if named[one.split(SEPARATOR)[1]] in VARIANTS)


def run(context: Context) -> Outcome:
    """Rows of ``cafe``: each chosen latent on its strongest images, by attributor and by activation alone."""
    variant = context.work.unit.variant
    layer, extractor = variant.split(SEPARATOR)
    dictionary = committed_dictionary(context, layer, extractor)
    if dictionary is None:
        return Outcome(0, 0)
    rows = [
        row
        for images, pairs in _batches(context, _pairs(context, variant))
        for row in _measure(context, layer, dictionary, images, pairs)
    ]
    columns = {
        "image_id": [row["image_id"] for row in rows],
        "layer": [layer] * len(rows),
        "extractor": [extractor] * len(rows),
        **{name: [row[name] for row in rows] for name in MEASURED},
    }
    context.commit.table("cafe", rows_to_table("cafe", columns))
    return Outcome(0, 0)


MEASURED = ("concept_id", "attributor", "value", "insertion", "locality")


def _pairs(context: Context, variant: str) -> list[Pair]:
    """Latents drawn by the run's seed among those with exemplars, each with its strongest images."""
    config = context.config.concepts.cafe_or_default
    table = context.store.read_table(context.record("exemplars", variant, 0), "concept_exemplars")
    found = table.select(["concept_id", "rank", "image_id"]).to_pylist()
    alive = sorted({row["concept_id"] for row in found})
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(context.config.run.seed))
    drawn = {alive[position] for position in order[: config.latents].tolist()}
    return [row for row in found if row["concept_id"] in drawn and row["rank"] < config.images]


def _batches(context: Context, pairs: list[Pair]) -> Iterator[tuple[Tensor, list[Pair]]]:
    """Pictures, so many that memory does not grow with their number, and the pairs that are of them."""
    wanted = sorted({pair["image_id"] for pair in pairs})
    size = context.config.run.batch_size
    for first in range(0, len(wanted), size):
        listed = listed_rows(context, wanted[first : first + size])
        images, kept = read_inputs(context, listed)
        place = {row["image_id"]: position for position, row in enumerate(kept)}
        here = [{**pair, "owner": place[pair["image_id"]]} for pair in pairs if pair["image_id"] in place]
        if here:
            yield images.to(context.device), here


def _measure(
    context: Context, layer: str, dictionary: Dictionary, images: Tensor, pairs: list[Pair]
) -> Iterator[Pair]:
    """Every pair by every attributor and by its activation alone."""
    config, size = context.config.concepts.cafe_or_default, context.config.run.batch_size
    owner, latents = (
        torch.tensor([pair[name] for pair in pairs], device=images.device) for name in ("owner", "concept_id")
    )
    of = (study_classifier(context), images, owner, layer, dictionary, latents)
    with precision_context("fp32", context.device):
        explained = explain_latents(*of, pooling=config.pooling, batch_size=size)
        apart = locality(explained.activation, explained.receptive_field).distance
        curves = latent_insertion(
            *of,
            attributors={choice.name: options_of(attributors, choice) for choice in config.attributors},
            pooling=config.pooling,
            steps=config.steps,
            batch_size=size,
        )
    names = {choice.name: choice.id for choice in config.attributors}
    for name, curve in curves.items():
        values = zip(pairs, explained.value.tolist(), curve.area.tolist(), apart.tolist(), strict=True)
        for pair, value, area, distance in values:
            yield {
                **pair,
                "attributor": names.get(name, ACTIVATION),
                "value": value,
                "insertion": None if area != area else area,
                "locality": None if distance != distance else distance,
            }


STAGE = Stage(
    name="cafe",
    version=1,
    run=run,
    reads=lambda study, variant: {
        "cafe": study.config.concepts.cafe_or_default.model_dump(mode="json"),
        "seed": study.config.run.seed,
    },
    upstream=lambda study, variant: (("manifest", ""), ("dictionary", variant), ("exemplars", variant)),
    variants=sae_variants,
    sharded=False,
    summary="explains latents by their receptive fields",
)
