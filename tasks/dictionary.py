"""dictionary: concept vectors of a layer, fitted to the vectors that all shards sampled."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from typing import Any

import torch

from storage.schema import rows_to_table
from tasks.checkpoint import Checkpoint
from tasks.config import Choice, options_of
from tasks.dictionary_file import SEPARATOR, dictionary_bytes
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study
from tasks.vector_stream import VectorStream, chosen_vectors, sampled_vectors
from xai_core.concepts import Dictionary, Evaluation, evaluate, fit_dictionary
from xai_core.concepts.sae import VARIANTS, LogRow, Training
from xai_core.registry import extractors

# A dictionary needs at least two vectors; fewer are left where (nearly) every image was set aside.
FEWEST_VECTORS = 2
# So many vectors say how well a dictionary codes them, the same for every extractor.
EVALUATION_VECTORS = 512


def variants(study: Study) -> tuple[str, ...]:
    """One per layer and extractor."""
    concepts = study.config.concepts
    return tuple(
        f"{layer}{SEPARATOR}{extractor.id}" for layer in concepts.layers for extractor in concepts.extractors
    )


def run(context: Context) -> Outcome:
    """Rows of ``concepts`` and the dictionary as safetensors, for one layer and extractor.

    Where fewer than two vectors were sampled there is nothing to fit, and neither is written. Sparse autoencoders
    are trained on a stream, in memory that does not grow with the vectors, and log into ``sae_training``; one that
    was killed goes on from its last checkpoint. Other extractors need all vectors at once, 4 bytes a number.
    """
    layer, extractor_id = context.work.unit.variant.split(SEPARATOR)
    extractor = next(choice for choice in context.config.concepts.extractors if choice.id == extractor_id)
    stream = sampled_vectors(context, layer)
    if stream.count < FEWEST_VECTORS:
        return Outcome(0, 0, facts={"vectors": stream.count})
    facts: dict[str, Any] = {"vectors": stream.count}
    if extractor.name in VARIANTS:
        dictionary, log, facts["resumed_at"] = _train(context, extractor, stream)
        _write_log(context, layer, extractor_id, log)
    else:
        dictionary = fit_dictionary(torch.cat(list(stream)).to(context.device), **_settings(context, extractor))
    quality = _evaluate(context, dictionary, stream)
    _write(context, layer, extractor_id, dictionary, stream.count, quality)
    # The record is all that is left to write: were it lost, the training would be done again, to the same end.
    Checkpoint(context.store, context.work.key).remove()
    return Outcome(0, 0, facts=facts)


def _settings(context: Context, extractor: Choice) -> dict[str, Any]:
    return {
        "extractor": extractor.name,
        "options": options_of(extractors, extractor),
        "atoms": context.config.concepts.atoms,
        "seed": context.config.run.seed,
    }


def _train(context: Context, extractor: Choice, stream: VectorStream) -> tuple[Dictionary, list[LogRow], int]:
    """The dictionary, the log, and the step that the training began at: that of its checkpoint, else 0."""
    checkpoint = Checkpoint(context.store, context.work.key)
    settings = _settings(context, extractor)
    training = Training(stream, **settings, device=context.device, state=checkpoint.read())
    begun = training.step
    while not training.done:
        training.advance(settings["options"].log_every)
        if checkpoint.due:
            checkpoint.write(training.state())
    return training.dictionary(), training.log, begun


def _evaluate(context: Context, dictionary: Dictionary, stream: VectorStream) -> Evaluation:
    seed = context.config.run.seed
    count = stream.count - dictionary.zero_vectors
    positions = sorted(random.Random(seed).sample(range(count), min(count, EVALUATION_VECTORS)))
    vectors = chosen_vectors(stream, positions).to(context.device)
    return evaluate(dictionary, vectors, evaluation_vectors=EVALUATION_VECTORS, seed=seed)


def _write_log(context: Context, layer: str, extractor: str, log: list[LogRow]) -> None:
    rows = [{"layer": layer, "extractor": extractor, **asdict(row)} for row in log]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    context.commit.table("sae_training", rows_to_table("sae_training", columns))


def _write(
    context: Context,
    layer: str,
    extractor: str,
    dictionary: Dictionary,
    vectors: int,
    quality: Evaluation,
) -> None:
    atoms, channels = dictionary.atoms.shape
    context.commit.table(
        "concepts",
        rows_to_table(
            "concepts",
            {
                "layer": [layer] * atoms,
                "extractor": [extractor] * atoms,
                "concept_id": list(range(atoms)),
                "size": dictionary.sizes.cpu().numpy(),
                "atoms": [atoms] * atoms,
                "channels": [channels] * atoms,
                "vectors": [vectors] * atoms,
                "rel_l2": [quality.rel_l2] * atoms,
                "l0_ratio": [quality.l0_ratio] * atoms,
                "rel_l2_error": [_number(quality.rel_l2_error)] * atoms,
                "l0_ratio_error": [_number(quality.l0_ratio_error)] * atoms,
            },
        ),
    )
    content = dictionary_bytes(dictionary, layer=layer, extractor=extractor, weights=_weights(context))
    context.commit.file("dictionary", ".safetensors", content)


def _weights(context: Context) -> str:
    """The digest of the weights of the model that the vectors come from."""
    unit = next(iter(context.work.upstream))
    model = context.record(unit.stage, unit.variant, unit.shard).ingredients["model"]
    return str(model["weights"])


def _number(value: float) -> float | None:
    """A standard error, or null where too few vectors have none."""
    return value if math.isfinite(value) else None


STAGE = Stage(
    name="dictionary",
    version=3,
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
