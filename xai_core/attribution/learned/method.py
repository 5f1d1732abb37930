"""The method ``aha``: the map of a trained explainer, refined for the image where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attribution.learned.checkpoint import trained_decoder
from xai_core.attribution.learned.refinement import refined
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import changed, methods, refuse_unread
from xai_core.training.weights_file import checkpoint_id


@dataclass(frozen=True)
class AhaOptions:
    """Options of AHA.

    ``checkpoint``: the file that ``vitrine train explainer`` wrote for this model; there is none by default.
    ``refine``: gradient steps on each image's own scores; ``refine_rate``: their size, in deviations of the map.
    """

    checkpoint: str = ""
    refine: int = 0
    refine_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.refine < 0:
            raise UsageError(f"aha.refine: expected at least 0 steps, got {self.refine}")
        if not self.refine_rate > 0:
            raise UsageError(f"aha.refine_rate: expected a number > 0, got {self.refine_rate}")
        if self.refine == 0:
            refuse_unread(self, "without steps to refine", "refine_rate")

    def in_id(self) -> dict[str, Any]:
        """What stands in the id: what is off its default; the file by the digest of its content."""
        shown = changed(self)
        return {**shown, "checkpoint": checkpoint_id(self.checkpoint)} if self.checkpoint else shown


def has_its_explainer(model: Classifier, options: AhaOptions) -> str | None:
    """A checkpoint, trained for the model with just these weights."""
    if not options.checkpoint:
        return (
            "it explains by a decoder trained for the model; train one with `vitrine train explainer`, and name "
            "its file with the option 'checkpoint'"
        )
    try:
        trained_decoder(model, options.checkpoint)
    except UsageError as error:
        return str(error)
    return None


@methods.register(
    "aha",
    options=AhaOptions,
    paper="AHA, Learn to Rank: Visual Attribution by Learning Importance Ranking, 2026",
    needs=(has_its_explainer,),
    upsampling="bilinear",
    cost="1 forward + a light decoder; refined, + (steps + 1) x 2 (T - 1) forwards and gradients",
    gradient_free=False,
)
def aha(model: Classifier, images: Tensor, classes: Tensor, options: AhaOptions, batch_size: int) -> Tensor:
    """AHA: a decoder over the frozen model's features, trained on deletion and insertion themselves.

    What is learnt is an order: the decoder's zero means nothing. Here the least relevant place of a map has 0.
    """
    scores = _scores(model, images, classes, options, batch_size)
    return scores - scores.amin(dim=(2, 3), keepdim=True)


def _scores(model: Classifier, images: Tensor, classes: Tensor, options: AhaOptions, batch_size: int) -> Tensor:
    trained = trained_decoder(model, options.checkpoint)
    explainer = trained.bound(model)
    features, _ = explainer.read(images)
    together = max(1, batch_size // max(1, len(images)))
    maps = torch.cat(
        run_batches(
            lambda some: wide(explainer.maps(features, images, classes[:, some])), classes.shape[1], together
        ),
        dim=1,
    )
    if not options.refine:
        return maps
    image = torch.arange(len(images), device=images.device).repeat_interleave(classes.shape[1])
    targets, predicted = classes.flatten(), maps.to(images.dtype).flatten(0, 1)

    def refine(rows: slice) -> Tensor:
        return refined(
            model,
            images[image[rows]],
            targets[rows],
            predicted[rows],
            trained.options,
            grid=explainer.decoder.grid,
            steps=options.refine,
            rate=options.refine_rate,
            passes=batch_size,
        )

    return torch.cat(run_batches(refine, len(predicted), batch_size)).unflatten(0, classes.shape)
