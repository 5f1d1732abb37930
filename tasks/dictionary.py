"""dictionary: concept vectors of a layer, fitted to the vectors that all shards sampled."""

from __future__ import annotations

import json

import numpy as np
import torch

from storage.commits import Unit
from storage.schema import rows_to_table
from tasks.config import Choice, options_of
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study
from xai_core.concepts import Dictionary, Evaluation, evaluate, fit_dictionary
from xai_core.registry import extractors

SEPARATOR = " / "

# A dictionary needs at least two vectors; fewer are left where (nearly) every image was set aside.
FEWEST_VECTORS = 2


def variants(study: Study) -> tuple[str, ...]:
    """One per layer and extractor."""
    concepts = study.config.concepts
    return tuple(
        f"{layer}{SEPARATOR}{extractor.id}" for layer in concepts.layers for extractor in concepts.extractors
    )


def run(context: Context) -> Outcome:
    """Rows of ``concepts`` and the dictionary as safetensors, for one layer and extractor.

    Where fewer than two vectors were sampled there is nothing to fit, and neither is written.
    """
    layer, extractor_id = context.work.unit.variant.split(SEPARATOR)
    config = context.config
    extractor = next(choice for choice in config.concepts.extractors if choice.id == extractor_id)
    sampled = _read_vectors(context, layer)
    if len(sampled) < FEWEST_VECTORS:
        return Outcome(0, 0, facts={"vectors": len(sampled)})
    vectors = torch.from_numpy(sampled).to(context.device)
    dictionary = fit_dictionary(
        vectors,
        extractor=extractor.name,
        options=options_of(extractors, extractor),
        atoms=config.concepts.atoms,
        seed=config.run.seed,
    )
    quality = evaluate(dictionary, vectors, seed=config.run.seed)
    _write(context, layer, extractor, dictionary, len(vectors), quality)
    return Outcome(0, 0, facts={"vectors": len(vectors)})


def _read_vectors(context: Context, layer: str) -> np.ndarray:
    """All sampled vectors of a layer ``[N, C]``, in image order."""
    shards = []
    for unit in sorted(context.work.upstream, key=_shard):
        record = context.record(unit.stage, unit.variant, unit.shard)
        if "valid" in record.facts["arrays"]:
            valid = context.store.read_array(record, "valid")
            shards.append(context.store.read_array(record, f"{layer}.vectors")[valid])
    sampled = [shard.reshape(-1, shard.shape[-1]) for shard in shards if len(shard)]
    return np.concatenate(sampled) if sampled else np.zeros((0, 0), np.float32)


def _shard(unit: Unit) -> int:
    return unit.shard


def _write(
    context: Context,
    layer: str,
    extractor: Choice,
    dictionary: Dictionary,
    vectors: int,
    quality: Evaluation,
) -> None:
    from safetensors.torch import save

    atoms, channels = dictionary.atoms.shape
    context.commit.table(
        "concepts",
        rows_to_table(
            "concepts",
            {
                "layer": [layer] * atoms,
                "extractor": [extractor.id] * atoms,
                "concept_id": list(range(atoms)),
                "size": dictionary.sizes.cpu().numpy(),
                "atoms": [atoms] * atoms,
                "channels": [channels] * atoms,
                "vectors": [vectors] * atoms,
                "rel_l2": [quality.rel_l2] * atoms,
                "l0_ratio": [quality.l0_ratio] * atoms,
            },
        ),
    )
    tensors = {"atoms": dictionary.atoms, "sizes": dictionary.sizes, **dictionary.encoder}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: the order of several differs from process to process, and with it the file.
    about = json.dumps({"layer": layer, "extractor": extractor.id})
    context.commit.file("dictionary", ".safetensors", save(tensors, {"concepts": about}))


STAGE = Stage(
    name="dictionary",
    version=2,
    run=run,
    reads=lambda study, variant: {
        "layer": variant.split(SEPARATOR)[0],
        "extractor": next(
            dict(choice.options)
            for choice in study.config.concepts.extractors
            if choice.id == variant.split(SEPARATOR)[1]
        ),
        "atoms": study.config.concepts.atoms,
        "seed": study.config.run.seed,
    },
    upstream=lambda study, variant: (("pfv", ""),),
    variants=variants,
    sharded=False,
    reads_model=False,
    summary="fits concept dictionaries",
)
