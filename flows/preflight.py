"""Everything that can be refused is refused here, before any work."""

from __future__ import annotations

from pathlib import Path

from flows.preflight_concepts import check_cafe, check_graph
from flows.preflight_importance import check_networks
from flows.preflight_training import check_files, check_training
from flows.preflight_truth import check_mask_folder, check_truth
from tasks.concept_folder import concept_files
from tasks.config import Choice, ConceptsConfig, ModelConfig, StudyConfig, options_of
from tasks.predict import names_of_classes
from tasks.study import Study
from tasks.truth import known_needs, reads_truth
from tasks.worker import classifier, resolve_device
from xai_core.attribution.interface import check_method
from xai_core.concepts import check_layer
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.precision import Precision
from xai_core.receptive_fields.attributors import choose
from xai_core.registry import methods, metrics

# What metrics can need of a data set, and what to add to it.
REMEDIES = {
    "mask": "to know which pixels are the object's: set truth.masks to a folder of PNG masks or truth.boxes to a "
    "CSV, or dataset.kind to demo",
    "effects": "the true effects of parts, which only the demo's pictures have: set dataset.kind to demo",
}


def check_study(study: Study) -> None:
    """Checks a study's model, training, networks, layers, methods, metrics, target and what its images show.

    Raises:
        UsageError: naming the config key, what was expected and what was got.
    """
    config = study.config
    _check_needs(config)
    device = resolve_device(config.run.device)
    model = classifier(config.model.model_dump_json(), "cpu")
    check_training(study, model)
    check_networks(study)
    _check_concepts(config.concepts, model)
    for position, choice in enumerate(config.methods):
        _name_key(f"methods.{position}", lambda choice=choice: _check_method(model, choice, config.run.precision))
    _check_backbone(config.parts.backbone)
    _check_precision(config, device)
    if config.target == "label" and not study.labels_are_classes:
        raise UsageError(
            f"target: 'label' needs labels that are the model's {model.num_classes} classes; this data set's are "
            "not known to be: set dataset.classes to a CSV (index, folder, name), or target: top1"
        )
    if config.parts.parser.name == "masks":
        _check_masks(study)
    if reads_truth(config) and config.dataset.kind != "demo":
        check_truth(study, names_of_classes(config.dataset, model, study.labels_are_classes))


def _check_concepts(concepts: ConceptsConfig, model: Classifier) -> None:
    for layer in concepts.layers:
        _name_key("concepts.layers", lambda layer=layer: check_layer(model, layer))
    if not concepts.layers:
        return
    if concepts.receptive_fields is not None:
        chosen = concepts.receptive_fields.chosen
        _name_key("concepts.receptive_fields.attributor", lambda: choose(model, *chosen))
    if concepts.graph is not None:
        _name_key("concepts.graph", lambda: check_graph(model, concepts))
    if concepts.cafe is not None:
        _name_key("concepts.cafe", lambda: check_cafe(model, concepts))


def _check_method(model: Classifier, choice: Choice, precision: Precision) -> None:
    options = options_of(methods, choice)
    check_files(model, methods.get(choice.name), options)
    check_method(methods.get(choice.name), model, options, precision)
    folder = getattr(options, "concepts", None)
    if methods.get(choice.name).fit is not None and folder is not None:
        concept_files(Path(folder))


def _check_backbone(backbone: ModelConfig | None) -> None:
    if backbone is not None:
        _name_key("parts.backbone", lambda: classifier(backbone.model_dump_json(), "cpu"))


def _check_precision(config: StudyConfig, device: str) -> None:
    if config.run.precision == "tf32" and device == "cpu":
        raise UsageError("run.precision: tf32 is a GPU's arithmetic; this run is on the CPU: use fp32 or bf16")


def _check_needs(config: StudyConfig) -> None:
    for position, choice in enumerate(config.metrics):
        for need in metrics.get(choice.name).all_needs(options_of(metrics, choice)):
            if need in REMEDIES and need not in known_needs(config):
                raise UsageError(f"metrics.{position}: metric {choice.id!r} needs {REMEDIES[need]}")


def _name_key(key: str, check) -> None:  # type: ignore[no-untyped-def]
    try:
        check()
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None


def _check_masks(study: Study) -> None:
    dataset = study.config.dataset
    if dataset.kind != "folder":
        raise UsageError(
            f"parts.parser: 'masks' reads files beside an image folder, got dataset.kind {dataset.kind}"
        )
    check_mask_folder("dataset.masks", Path(str(dataset.masks)), dataset)
