"""Everything that can be refused is refused here, before any work."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from PIL import Image

from storage.sources.decode import upright_size
from storage.sources.folder import open_file, path_of
from tasks.concept_folder import concept_files
from tasks.config import Choice, ModelConfig, StudyConfig, options_of
from tasks.parts import mask_path
from tasks.sources import open_source
from tasks.study import Study
from tasks.worker import classifier, resolve_device
from xai_core.attribution.interface import check_method
from xai_core.concepts import check_layer
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.precision import Precision
from xai_core.registry import methods

# Masks whose size is compared with their image's before the run; the rest are checked as they are read.
MASKS_CHECKED = 10_000


def check_study(study: Study) -> None:
    """Checks a study's model, layers, methods, target and masks.

    Raises:
        UsageError: naming the config key, what was expected and what was got.
    """
    config = study.config
    device = resolve_device(config.run.device)
    model = classifier(config.model.model_dump_json(), "cpu")
    for layer in config.concepts.layers:
        _name_key("concepts.layers", lambda layer=layer: check_layer(model, layer))
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


def _check_method(model: Classifier, choice: Choice, precision: Precision) -> None:
    options = options_of(methods, choice)
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
    folder = Path(str(dataset.masks))
    if not folder.is_dir():
        raise UsageError(f"dataset.masks: expected a folder that mirrors dataset.path, got {folder}")
    for item in islice(open_source(dataset).items(), MASKS_CHECKED):
        _check_mask(folder, Path(str(dataset.path)), item.reference)


def _check_mask(folder: Path, images: Path, reference: str) -> None:
    path = mask_path(folder, reference)
    if not path.is_file():
        raise UsageError(f"dataset.masks: expected a mask for every image, got none at {path}")
    try:
        with open_file(images / path_of(reference)) as stream, Image.open(stream) as picture:
            expected = upright_size(picture)
    except Exception:
        return  # A broken image is set aside when it is read; its mask is not to blame.
    try:
        with Image.open(path) as mask:
            size = mask.size
    except OSError as error:
        raise UsageError(f"dataset.masks: expected a mask at {path}, got something else: {error}") from None
    if size != expected:
        raise UsageError(
            f"dataset.masks: expected {path} of size {expected[0]} x {expected[1]} like its image, "
            f"got {size[0]} x {size[1]}"
        )
