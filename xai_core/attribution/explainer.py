"""A method with everything it needs to explain again: other images, other classes, another model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xai_core.attribution.interface import attribute, attribute_classes, score_parts
from xai_core.models import Classifier
from xai_core.parts.labels import mean_inside_parts
from xai_core.precision import Precision
from xai_core.registry import MethodEntry, methods


@dataclass(frozen=True)
class Explainer:
    """A registered method bound to its options, what it learnt from data, and how it is computed."""

    method: str
    options: Any = None
    fitted: Mapping[str, Tensor] | None = None
    batch_size: int = 32
    precision: Precision = "fp32"

    @property
    def entry(self) -> MethodEntry:
        """What the registry says of the method."""
        return methods.get(self.method)

    @property
    def chosen(self) -> Any:
        """The method's options, its defaults where none were given."""
        return self.entry.options() if self.options is None else self.options

    def maps(self, model: Classifier, images: Tensor, targets: Tensor, parts: Tensor | None = None) -> Tensor:
        """Maps ``[B, H, W]`` of the targets ``[B]``; part methods need ``parts`` and paint them."""
        return attribute(model, images, targets, parts=parts, **self._how)

    def class_maps(self, model: Classifier, images: Tensor, classes: Tensor, parts: Tensor | None) -> Tensor:
        """Maps ``[B, K, H, W]`` of the classes ``[B, K]``; a method of pixels shares its passes among them."""
        if self.entry.output == "pixels":
            return attribute_classes(model, images, classes, **self._how)
        count = classes.shape[1]
        labels = None if parts is None else parts.repeat_interleave(count, dim=0)
        every = self.maps(model, images.repeat_interleave(count, dim=0), classes.flatten(), labels)
        return every.unflatten(0, classes.shape)

    def scores(self, model: Classifier, images: Tensor, targets: Tensor, parts: Tensor) -> Tensor:
        """Part scores ``[B, K]`` float64: a part method's own, or the mean of the map inside each part."""
        if self.entry.output == "parts":
            return score_parts(model, images, targets, parts, **self._how).score.double()
        return mean_inside_parts(self.maps(model, images, targets), parts)

    def reseeded(self, by: int) -> Explainer | None:
        """The same method with a seed so much further on, or None where chance plays no part in it."""
        options = _reseeded(self.chosen, by)
        return None if options is None else dataclasses.replace(self, options=options)

    @property
    def _how(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "options": self.options,
            "fitted": self.fitted,
            "batch_size": self.batch_size,
            "precision": self.precision,
        }


def _reseeded(options: Any, by: int) -> Any:
    """Options with another seed, their own or that of the method that they name; None without any."""
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.name == "seed":
            return dataclasses.replace(options, seed=value + by)
        if option.metadata.get("names") == methods.kind and "seed" in value:
            return dataclasses.replace(options, **{option.name: {**value, "seed": value["seed"] + by}})
    return None
