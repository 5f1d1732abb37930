"""pfv: pointwise feature vectors of named layers, sampled in proportion to their share in the target logit."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from tasks.stage import Context, Outcome, Stage
from tasks.targets import read_targets
from tasks.worker import load_pictures, study_classifier
from xai_core.concepts import PfvSample, sample_pfvs
from xai_core.precision import precision_context


def run(context: Context) -> Outcome:
    """Arrays ``vectors``, ``positions`` and ``relevance`` of every layer for one shard."""
    pictures = load_pictures(context)
    config = context.config
    targets = read_targets(context, pictures).to(context.device)
    seeds = [image_seed(config.run.seed, digest) for digest in pictures.digests]
    samples: dict[str, list[PfvSample]] = {layer: [] for layer in config.concepts.layers}
    with precision_context(config.run.precision, context.device):
        for first in range(0, len(pictures), config.run.batch_size):
            some = slice(first, first + config.run.batch_size)
            sampled = sample_pfvs(
                study_classifier(context),
                pictures.inputs[some],
                targets[some],
                list(config.concepts.layers),
                per_image=config.concepts.per_image,
                seeds=seeds[some],
            )
            for layer, sample in sampled.items():
                samples[layer].append(sample)
    if len(pictures):
        for layer, parts in samples.items():
            _write_layer(context, layer, parts, pictures.rows)
        context.write_valid(pictures.rows)
    return Outcome(len(pictures) + len(pictures.bad), len(pictures), pictures.bad)


def image_seed(seed: int, digest: str) -> int:
    """A seed from the run's seed and the image's content: sampling does not depend on shards or order."""
    content = hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=7).digest()
    return int.from_bytes(content, "big")


def _write_layer(context: Context, layer: str, samples: list[PfvSample], rows: np.ndarray) -> None:
    fields = {
        # Layers differ in width, and in one data set a dimension has one size.
        "vectors": (torch.float32, ("vector", f"{layer}.channel")),
        "positions": (torch.int16, ("vector", "axis")),
        "relevance": (torch.float32, ("vector",)),
    }
    for name, (kind, dimensions) in fields.items():
        values = torch.cat([getattr(sample, name) for sample in samples]).to(kind).cpu().numpy()
        context.write_array(f"{layer}.{name}", rows, values, dimensions, map_size=list(samples[0].map_size))


STAGE = Stage(
    name="pfv",
    version=1,
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
