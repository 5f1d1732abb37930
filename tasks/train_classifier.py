"""Training a classifier of one's own on a data set, where there are no weights to explain."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import Field, model_validator
from torch import Tensor

from storage.files import publish
from storage.listing import build_listing
from storage.sources import decode_image
from tasks.config import DatasetConfig, Frozen, ModelConfig
from tasks.sources import open_source
from xai_core.errors import UsageError
from xai_core.models import Classifier, load_classifier
from xai_core.training import Recipe, accuracy, train_classifier

#: Told what happens: a stage's name, how far it is, of how much, and a remark.
Tell = Callable[[str, int, int, str], None]


class ClassifierTraining(Frozen):
    """A model (its weights are where training starts), what it learns from, what it is tested on, and how."""

    name: str = "classifier"
    dataset: DatasetConfig
    test: DatasetConfig | None = None
    model: ModelConfig
    training: Recipe = Field(default_factory=Recipe)

    @model_validator(mode="after")
    def _without_masks(self) -> ClassifierTraining:
        for key in ("dataset", "test"):
            config = getattr(self, key)
            if config is not None and config.masks is not None:
                raise ValueError(f"{key}.masks: training reads no masks: remove them")
        return self


@dataclass(frozen=True)
class Trained:
    """Where the weights went, and the shares of pictures that they are right on."""

    path: Path
    test_accuracy: float | None


def run_training(config: ClassifierTraining, output: Path, device: str, tell: Tell) -> Trained:
    """Trains and writes the weights as safetensors, their recipe beside them in the file.

    All pictures are held in memory as bytes at the model's input size.

    Raises:
        UsageError: pictures without labels, labels that the model has no logit for, or a loss that is no number.
    """
    from safetensors.torch import save_file

    model = load_classifier(config.model.spec(), device)
    pictures, labels = _pictures(config.dataset, model, tell)
    test = None if config.test is None else _pictures(config.test, model, tell)
    train_classifier(
        model.module,
        pictures,
        labels,
        model.normalise,
        config.training,
        lambda epoch, loss: tell("training", epoch, config.training.epochs, f"loss {loss:.3f}"),
    )
    score = None if test is None else accuracy(model.module, *test, model.normalise)
    about = {"recipe": asdict(config.training), "model": config.model.model_dump(mode="json"), "accuracy": score}
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.module.state_dict().items()}
    publish(output, lambda path: save_file(weights, path, {"training": json.dumps(about, sort_keys=True)}))
    return Trained(output, score)


def _pictures(dataset: DatasetConfig, model: Classifier, tell: Tell) -> tuple[Tensor, Tensor]:
    """A data set's pictures as bytes ``[N, 3, H, W]`` through the model's own geometry, and their labels.

    They are those that a study of the data set would take: in its order, up to its limit.
    """
    source = open_source(dataset)
    with TemporaryDirectory() as folder:
        listing = build_listing(source, Path(folder), dataset.order_seed)
        items = listing.slice(0, dataset.limit or listing.rows)
    wrong = [item for item in items if item["label"] is None or not 0 <= item["label"] < model.num_classes]
    if wrong or not items:
        got = f"{wrong[0]['label']} for {wrong[0]['reference']}" if wrong else "no pictures"
        raise UsageError(
            f"dataset: expected pictures with labels from 0 to {model.num_classes - 1}, got {got}; set "
            "num_classes in model.create_args"
        )
    pictures = torch.empty(len(items), 3, *model.input_size, dtype=torch.uint8)
    for position, item in enumerate(items):
        image = model.preprocess(decode_image(source.read(item["reference"])))
        pictures[position] = torch.from_numpy(model.as_pictures(image.unsqueeze(0))[0]).permute(2, 0, 1)
        if (position + 1) % 1000 == 0 or position + 1 == len(items):
            tell("reading", position + 1, len(items), "")
    labels = torch.tensor([item["label"] for item in items])
    return pictures.to(model.device), labels.to(model.device)
