"""fit: what a method learns from a study's images before it explains any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.commits import Unit
from tasks.chosen_pictures import read_inputs
from tasks.concept_folder import concept_files, read_concepts
from tasks.config import StudyConfig, options_of
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study
from tasks.worker import study_classifier
from xai_core.attribution import fit_method
from xai_core.attribution.interface import fitting_entry
from xai_core.errors import UsageError
from xai_core.registry import MethodEntry, methods, variant_id

Learners = dict[str, tuple[MethodEntry, Any]]


def learners(config: StudyConfig) -> Learners:
    """The methods of a study that learn from data, with their options, by id."""
    found = (fitting_entry(methods.get(one.name), options_of(methods, one)) for one in config.methods)
    return {variant_id(entry.name, options): (entry, options) for entry, options in filter(None, found)}


def fit_of(config: StudyConfig, variant: str) -> str | None:
    """The variant of this stage that a method's variant reads, or None where the method learns nothing."""
    choice = next(choice for choice in config.methods if choice.id == variant)
    found = fitting_entry(methods.get(choice.name), options_of(methods, choice))
    return None if found is None else variant_id(found[0].name, found[1])


def read_fitted(context: Context) -> Mapping[str, Tensor] | None:
    """What the method of an attribute unit has learnt, or None where it learns nothing."""
    from safetensors.torch import load_file

    variant = fit_of(context.config, context.work.unit.variant)
    if variant is None:
        return None
    return load_file(context.store.read_file(context.record(STAGE.name, variant, 0), "fitted"))


def run(context: Context) -> Outcome:
    """The named tensors that a method learnt, as safetensors.

    They are learnt from ``fit_images`` images of all that have what the method reads, drawn by their content and
    the run's seed: the draw depends neither on shards nor on the order of the images.
    """
    variant = context.work.unit.variant
    entry, options = learners(context.config)[variant]
    config = context.config.run
    model = study_classifier(context)
    drawn = _draw(_candidates(context), options.fit_images, config.seed)
    images, kept = read_inputs(context, drawn)
    if not kept:
        raise UsageError(f"{variant}: expected images to learn from, got none that could be read and parsed")
    folder = getattr(options, "concepts", None)
    concepts = None if folder is None else read_concepts(Path(folder), model, options.examples, config.seed)
    state = fit_method(
        model,
        images.to(context.device),
        torch.tensor([one["target"] for one in kept], device=context.device),
        method=entry.name,
        options=options,
        parts=_labels(context, kept) if _reads_parts(entry, options) else None,
        concepts=concepts,
        batch_size=config.batch_size,
        seed=config.seed,
        precision=config.precision,
    )
    _write(context, state, sorted(concepts or ()))
    return Outcome(0, 0, facts={"fitted_to": len(kept)})


def _candidates(context: Context) -> list[dict[str, Any]]:
    """Rows of all images that have a target, and parts where the method reads them."""
    found = []
    for unit in sorted(context.work.upstream, key=lambda unit: unit.shard):
        if unit.stage == "manifest":
            found += _of_shard(context, unit.shard)
    return found


def _of_shard(context: Context, shard: int) -> list[dict[str, Any]]:
    rows = context.store.read_table(context.record("manifest", "", shard), "manifest").to_pylist()
    table = context.store.read_table(context.record("predict", "", shard), "targets")
    targets = dict(zip(table["image_id"].to_pylist(), table["target"].to_pylist(), strict=True))
    first = shard * context.config.run.shard_size
    valid = None
    if Unit("parts", "", shard) in context.work.upstream:
        record = context.record("parts", "", shard)
        # A shard without a single readable image has no arrays.
        valid = context.store.read_array(record, "valid") if "valid" in record.facts["arrays"] else ()
    return [
        {**row, "target": targets[row["image_id"]], "shard": shard, "row": row["image_id"] - first}
        for row in rows
        if row["image_id"] in targets and (valid is None or (len(valid) and valid[row["image_id"] - first]))
    ]


def _draw(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """So many rows by the digest of seed and content; of pictures that are the same, by path."""

    def lot(row: dict[str, Any]) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{row['sha256']}".encode()).digest(), row["path"]

    return sorted(rows, key=lot)[:count]


def _labels(context: Context, rows: list[dict[str, Any]]) -> Tensor:
    shards = {row["shard"] for row in rows}
    labels = {shard: context.store.read_array(context.record("parts", "", shard), "labels") for shard in shards}
    return torch.stack([torch.from_numpy(labels[row["shard"]][row["row"]]) for row in rows]).to(context.device)


def _reads_parts(entry: MethodEntry, options: Any) -> bool:
    """Whether concepts come from the study's parts; a user's folder takes their place for pixel maps."""
    return entry.output == "parts" or getattr(options, "concepts", None) is None


def _write(context: Context, state: Mapping[str, Tensor], names: list[str]) -> None:
    from safetensors.torch import save

    # One entry: the order of several differs from process to process, and with it the file.
    about = json.dumps({"method": context.work.unit.variant, "concepts": names})
    context.commit.file("fitted", ".safetensors", save(dict(state), {"fit": about}))


def reads(study: Study, variant: str) -> dict[str, Any]:
    """The method's options, what a user's folder of concepts holds, and how many images are drawn from."""
    entry, options = learners(study.config)[variant]
    folder = getattr(options, "concepts", None)
    return {
        "method": entry.name,
        "options": asdict(options),
        "concepts": None if folder is None else concept_files(Path(folder)),
        "images": study.images,
        "seed": study.config.run.seed,
        "precision": study.config.run.precision,
    }


def upstream(study: Study, variant: str) -> tuple[tuple[str, str], ...]:
    """Images and targets, and parts where concepts are found in them."""
    always = (("manifest", ""), ("predict", ""))
    return (*always, ("parts", "")) if _reads_parts(*learners(study.config)[variant]) else always


STAGE = Stage(
    name="fit",
    version=1,
    run=run,
    reads=reads,
    upstream=upstream,
    variants=lambda study: tuple(learners(study.config)),
    sharded=False,
    summary="fits methods that learn from data",
)
