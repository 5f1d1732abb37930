"""pfv: pointwise feature vectors of named layers, sampled in proportion to their share in the target logit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tasks.concept_config import ReceptiveFieldsConfig
from tasks.stage import Context, Outcome, Stage
from tasks.targets import predicted_pictures, read_targets
from tasks.worker import Pictures, study_classifier
from xai_core.arithmetic import ratio
from xai_core.batching import Batches, try_batches
from xai_core.concepts import PfvSample, sample_pfvs
from xai_core.errors import ImageError, NotFinite
from xai_core.models import Classifier
from xai_core.precision import precision_context
from xai_core.receptive_fields import feature_vectors, receptive_fields
from xai_core.receptive_fields.attributors import choose


@dataclass(frozen=True)
class Sampled:
    """A batch's sample of one layer and, where wanted, the receptive fields ``[B, n, r, c]`` of its vectors."""

    sample: PfvSample
    fields: Tensor | None

    def finite(self) -> Tensor:
        """Which images have nothing but numbers, ``[B]``."""
        kinds = (self.sample.vectors, self.sample.relevance, self.fields)
        good = [values.isfinite().flatten(1).all(dim=1) for values in kinds if values is not None]
        return torch.stack(good).all(dim=0)


def run(context: Context) -> Outcome:
    """Arrays ``vectors``, ``positions``, ``relevance`` and ``receptive_fields`` of every layer for one shard.

    An image whose vectors are not finite in some layer is set aside in all: the layers share their ``valid``.
    """
    pictures = predicted_pictures(context)
    batches = _sample(context, pictures)
    failed = {**batches.failed, **_not_finite(batches)}
    finite = [position for position, row in enumerate(batches.rows) if row not in failed]
    kept = pictures.take([batches.rows[position] for position in finite])
    if len(kept):
        for layer in context.config.concepts.layers:
            _write_layer(context, layer, [samples[layer] for samples in batches.results], kept.rows, finite)
        context.write_valid(kept.rows)
    return Outcome(pictures.given, len(kept), (*pictures.bad, *pictures.as_bad(failed)))


def _sample(context: Context, pictures: Pictures) -> Batches[dict[str, Sampled]]:
    config = context.config
    model = study_classifier(context)
    targets = read_targets(context, pictures)
    seeds = [image_seed(config.run.seed, digest) for digest in pictures.digests]
    wanted = config.concepts.receptive_fields

    def sample(rows: slice) -> dict[str, Sampled]:
        inputs = pictures.inputs[rows]
        samples = sample_pfvs(
            model,
            inputs,
            targets[rows],
            list(config.concepts.layers),
            per_image=config.concepts.per_image,
            class_token=config.concepts.class_token,
            seeds=seeds[rows],
        )
        return {
            layer: Sampled(
                one, wanted and _fields(model, inputs, layer, one, wanted, batch_size=config.run.batch_size)
            )
            for layer, one in samples.items()
        }

    with precision_context(config.run.precision, context.device):
        return try_batches(sample, len(pictures), config.run.batch_size)


def _fields(
    model: Classifier,
    inputs: Tensor,
    layer: str,
    sample: PfvSample,
    wanted: ReceptiveFieldsConfig,
    *,
    batch_size: int,
) -> Tensor:
    """Receptive fields ``[B, n, r, c]`` of a sample's vectors, float16 shares of each one's largest magnitude.

    A share, since float16 would lose the small numbers of a field that is spread over many pixels.
    """
    images, draws, channels = sample.vectors.shape
    owner = torch.arange(images, device=inputs.device).repeat_interleave(draws)
    scalars = feature_vectors(layer, owner, sample.index.flatten(), sample.vectors.view(-1, channels))
    name, options = wanted.chosen
    fields = receptive_fields(
        model,
        inputs,
        scalars,
        attributor=name,
        options=options,
        batch_size=batch_size,
        size=_size(model, wanted),
    )
    largest = fields.abs().amax(dim=(1, 2), keepdim=True)
    return ratio(fields, largest).half().unflatten(0, (images, draws))


def _size(model: Classifier, wanted: ReceptiveFieldsConfig) -> tuple[int, int]:
    """Rows and columns of a stored field: those asked for, or the attributor's own where it has fewer."""
    entry, options = choose(model, *wanted.chosen)
    own: dict[str, Callable[[], tuple[int, int]]] = {
        "pixels": lambda: model.input_size,
        "patches": lambda: model.token_grid,
        "cells": lambda: (options.grid, options.grid),
    }
    rows, columns = own[entry.resolution]()
    return min(rows, wanted.size), min(columns, wanted.size)


def _not_finite(batches: Batches[dict[str, Sampled]]) -> dict[int, ImageError]:
    """The sampled pictures with a number that is NaN or infinite, in whichever layer."""
    found: dict[int, ImageError] = {}
    for layer in batches.results[0] if batches.results else ():
        finite = torch.cat([samples[layer].finite() for samples in batches.results]).tolist()
        for row, good in zip(batches.rows, finite, strict=True):
            if not good:
                found.setdefault(
                    row, NotFinite(f"vectors, relevance or fields are NaN or infinite in layer {layer}")
                )
    return found


def image_seed(seed: int, digest: str) -> int:
    """A seed from the run's seed and the image's content: sampling does not depend on shards or order."""
    content = hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=7).digest()
    return int.from_bytes(content, "big")


def _write_layer(
    context: Context, layer: str, sampled: list[Sampled], rows: np.ndarray, positions: list[int]
) -> None:
    """Writes the samples at some positions of the batches; ``rows`` are the rows of the shard that they are."""
    # Layers differ in width and in how many vectors they have, and in one data set a dimension has one size.
    vector = f"{layer}.vector"
    kinds = {
        "vectors": (torch.float32, (vector, f"{layer}.channel"), [one.sample.vectors for one in sampled]),
        "positions": (torch.int16, (vector, "axis"), [one.sample.positions for one in sampled]),
        "relevance": (torch.float32, (vector,), [one.sample.relevance for one in sampled]),
    }
    fields = [one.fields for one in sampled if one.fields is not None]
    if fields:
        kinds["receptive_fields"] = (torch.float16, (vector, f"{layer}.row", f"{layer}.column"), fields)
    size = list(sampled[0].sample.map_size)
    for name, (kind, dimensions, batches) in kinds.items():
        values = torch.cat(batches)[positions].to(kind).cpu().numpy()
        context.write_array(f"{layer}.{name}", rows, values, dimensions, map_size=size)


STAGE = Stage(
    name="pfv",
    version=3,
    run=run,
    reads=lambda study, variant: {
        **study.config.concepts.model_dump(
            mode="json", include={"layers", "per_image", "class_token", "receptive_fields"}
        ),
        "seed": study.config.run.seed,
        "precision": study.config.run.precision,
    },
    upstream=lambda study, variant: (("manifest", ""), ("predict", "")),
    variants=lambda study: ("",) if study.config.concepts.layers else (),
    summary="samples pointwise feature vectors by relevance",
)
