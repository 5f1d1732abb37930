"""pfv: pointwise feature vectors of named layers, sampled in proportion to their share in the target logit."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from tasks.stage import Context, Outcome, Stage
from tasks.targets import predicted_pictures, read_targets
from tasks.worker import Pictures, study_classifier
from xai_core.batching import Batches, try_batches
from xai_core.concepts import PfvSample, sample_pfvs
from xai_core.errors import ImageError, NotFinite
from xai_core.precision import precision_context


def run(context: Context) -> Outcome:
    """Arrays ``vectors``, ``positions`` and ``relevance`` of every layer for one shard.

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


def _sample(context: Context, pictures: Pictures) -> Batches[dict[str, PfvSample]]:
    config = context.config
    targets = read_targets(context, pictures)
    seeds = [image_seed(config.run.seed, digest) for digest in pictures.digests]

    def sample(rows: slice) -> dict[str, PfvSample]:
        return sample_pfvs(
            study_classifier(context),
            pictures.inputs[rows],
            targets[rows],
            list(config.concepts.layers),
            per_image=config.concepts.per_image,
            seeds=seeds[rows],
        )

    with precision_context(config.run.precision, context.device):
        return try_batches(sample, len(pictures), config.run.batch_size)


def _not_finite(batches: Batches[dict[str, PfvSample]]) -> dict[int, ImageError]:
    """The sampled pictures with a vector or a relevance that is NaN or infinite, in whichever layer."""
    found: dict[int, ImageError] = {}
    for layer in batches.results[0] if batches.results else ():
        finite = torch.cat([_finite(samples[layer]) for samples in batches.results]).tolist()
        for row, good in zip(batches.rows, finite, strict=True):
            if not good:
                found.setdefault(row, NotFinite(f"vectors or relevance are NaN or infinite in layer {layer}"))
    return found


def _finite(sample: PfvSample) -> Tensor:
    """Which images have nothing but numbers, ``[b]``."""
    return sample.vectors.isfinite().flatten(1).all(dim=1) & sample.relevance.isfinite().all(dim=1)


def image_seed(seed: int, digest: str) -> int:
    """A seed from the run's seed and the image's content: sampling does not depend on shards or order."""
    content = hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=7).digest()
    return int.from_bytes(content, "big")


def _write_layer(
    context: Context, layer: str, samples: list[PfvSample], rows: np.ndarray, positions: list[int]
) -> None:
    """Writes the samples at some positions of the batches; ``rows`` are the rows of the shard that they are."""
    fields = {
        # Layers differ in width, and in one data set a dimension has one size.
        "vectors": (torch.float32, ("vector", f"{layer}.channel")),
        "positions": (torch.int16, ("vector", "axis")),
        "relevance": (torch.float32, ("vector",)),
    }
    for name, (kind, dimensions) in fields.items():
        values = torch.cat([getattr(sample, name) for sample in samples])[positions].to(kind).cpu().numpy()
        context.write_array(f"{layer}.{name}", rows, values, dimensions, map_size=list(samples[0].map_size))


STAGE = Stage(
    name="pfv",
    version=2,
    run=run,
    reads=lambda study, variant: {
        "layers": list(study.config.concepts.layers),
        "per_image": study.config.concepts.per_image,
        "seed": study.config.run.seed,
        "precision": study.config.run.precision,
    },
    upstream=lambda study, variant: (("manifest", ""), ("predict", "")),
    variants=lambda study: ("",) if study.config.concepts.layers else (),
    summary="samples pointwise feature vectors by relevance",
)
