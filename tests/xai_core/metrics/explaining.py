"""Explained images for the metrics that ask the method again, and a model whose every answer is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.xai_core.measuring import chosen
from tests.xai_core.tiny import SIZE
from xai_core.attribution import explainer as explainers
from xai_core.metrics import Evaluation, Evidence
from xai_core.metrics import evaluate as measure
from xai_core.models import Classifier, ModelSpec
from xai_core.registry import build_options, methods, variant_id


def explained(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    method: str,
    parts: Tensor | None = None,
    batch_size: int = 32,
    **options: Any,
) -> Evidence:
    """Evidence whose maps, and scores where the method scores parts, come from its own explainer."""
    built = build_options(methods.get(method), options)
    explainer = explainers.Explainer(method, built, batch_size=batch_size)
    own = explainer.entry.output == "parts" and parts is not None
    return Evidence(
        model,
        images,
        targets,
        explainer.maps(model, images, targets, parts),
        parts=parts,
        part_scores=explainer.scores(model, images, targets, parts) if own and parts is not None else None,
        explainer=explainer,
        batch_size=batch_size,
    )


def measured(evidence: Evidence, name: str, **options: Any) -> tuple[Tensor, tuple[str | None, ...]]:
    """The values ``[B]`` of one metric, and the reasons."""
    result: Evaluation = measure(evidence, chosen(name, **options))
    (_, built) = chosen(name, **options)[0]
    assert not result.broken[variant_id(name, built)].any()
    return result.values[variant_id(name, built)], result.reasons[variant_id(name, built)]


class Linear(nn.Module):
    """Logits are inner products with the image."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_classes = len(weight)
        self.weight = nn.Parameter(weight)

    def forward_features(self, images: Tensor) -> Tensor:
        return images

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.flatten(1).T


class Corner(Linear):
    """Sees nothing but the first value of the image, through a function that is 0 where it is negative."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__(torch.zeros(2, 1, dtype=torch.float64))
        self.read = read

    def forward(self, images: Tensor) -> Tensor:
        seen = self.read(images[:, 0, 0, 0])
        return torch.stack([seen, torch.full_like(seen, -1.0)], dim=1)


def linear(classes: int = 3) -> Classifier:
    """A linear classifier in float64, of pictures of the tiny models' size."""
    generator = torch.Generator().manual_seed(5)
    return _built(Linear(torch.randn(classes, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)))


def corner(read: Callable[[Tensor], Tensor]) -> Classifier:
    """A classifier that no noise flips; by ``relu`` its gradient can be all 0, by ``root`` NaN."""
    return _built(Corner(read))


def root(values: Tensor) -> Tensor:
    """The root of the positive part (twice it); its derivative is NaN below 0."""
    return (values + values.abs()).sqrt()


def _built(module: nn.Module) -> Classifier:
    transform = {"input_size": (3, SIZE, SIZE), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return Classifier(module, ModelSpec("linear", False, transform=transform))


class Passes:
    """Notes how many images each forward pass of a classifier takes."""

    def __init__(self, model: Classifier) -> None:
        self.sizes: list[int] = []
        model.module.register_forward_pre_hook(lambda _module, inputs: self.sizes.append(len(inputs[0])))


def undecided(model: Classifier, images: Tensor) -> Classifier:
    """The same model with a head whose classes are as likely over these images, so that noise can flip it."""
    with torch.no_grad():
        model.module.get_classifier().bias -= model(images).mean(dim=0)
    return model
