"""Visual-TCAV: where a network recognises concepts, weighted by what these add to the class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xai_core.arithmetic import ratio
from xai_core.attribution.concept_methods.concept_examples import (
    Examples,
    clustered_examples,
    folder_source,
    over_rows,
    patch_source,
)
from xai_core.attribution.fitting import FitSamples
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.layers import as_map, captured, per_class
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.registry import methods, refuse_unread
from xai_core.replay import Behind, network_behind


@dataclass(frozen=True)
class VisualTcavOptions:
    """Options of Visual-TCAV.

    ``layer``: a module's name, by default :func:`concept_layer`. ``steps`` of the path from zero features.
    ``concepts``: a folder with one sub-folder of pictures a concept (``random`` is none); by default concepts are
    ``concept_count`` clusters of patches around the parts of ``fit_images`` images of the study. ``examples``: the
    most pictures that are read from a sub-folder.
    """

    layer: str | None = None
    steps: int = 50
    concepts: str | None = None
    concept_count: int = 10
    fit_images: int = 64
    examples: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "concept_count", "fit_images", "examples"):
            if getattr(self, name) < 1:
                raise UsageError(f"visual_tcav.{name}: expected at least 1, got {getattr(self, name)}")
        if self.concepts is None:
            refuse_unread(self, "without a folder of concepts", "examples")
        else:
            refuse_unread(self, "where concepts come from a folder", "concept_count", "fit_images")


def layer_for_concepts(model: Classifier, options: VisualTcavOptions) -> str | None:
    """A feature map, or a transformer block before the last one."""
    if options.layer is not None or model.family == "cnn" or len(getattr(model.module, "feature_info", ())) > 1:
        return None
    return "it has no block before its last one; name a layer with the option 'layer'"


@dataclass(frozen=True)
class ConceptAttribution:
    """``maps`` ``[B, M, h, w]`` in [0, 1], where each concept is seen; ``scores`` ``[B, K, M]``, what it adds."""

    maps: Tensor
    scores: Tensor


def fit_visual_tcav(
    model: Classifier, samples: FitSamples, options: VisualTcavOptions, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Concept activation vectors ``directions`` ``[M, C]``, and ``emblems`` ``[M, 2]``: low and high map value."""
    layer = options.layer or concept_layer(model)

    def pooled(pictures: Tensor) -> Tensor:
        return _feature_map(model, pictures, layer).mean(dim=(2, 3))

    examples = _examples(model, samples, options, batch_size, seed, pooled)
    rows = torch.arange(examples.count)
    vectors = examples.vectors
    middle = vectors[examples.others].mean(dim=0)
    directions = torch.stack([vectors[one].mean(dim=0) for one in examples.members]) - middle
    on_device = directions.to(model.device)

    def emblems(pictures: Tensor) -> Tensor:
        return contraharmonic_mean(raw_concept_maps(_feature_map(model, pictures, layer), on_device))

    values = over_rows(model, examples.read, rows, batch_size, emblems)
    high = [values[one, concept].quantile(0.5) for concept, one in enumerate(examples.members)]
    low = values[examples.others].quantile(0.5, dim=0)
    return {"directions": directions, "emblems": torch.stack([low, torch.stack(high)], dim=1)}


@methods.register(
    "visual_tcav",
    options=VisualTcavOptions,
    paper="De Santis et al. 2024, Visual-TCAV",
    equation="1-9",
    needs=(layer_for_concepts,),
    upsampling="bilinear",
    cost="1 forward + steps x (forward and gradient of the layers behind the map)",
    fit=fit_visual_tcav,
)
def visual_tcav(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    options: VisualTcavOptions,
    batch_size: int,
    *,
    fitted: Mapping[str, Tensor],
) -> Tensor:
    """Visual-TCAV: concept maps weighted by each concept's attribution to the class, summed over the concepts."""

    def saliency(rows: slice) -> Tensor:
        found = concept_attributions(model, images[rows], classes[rows], options, batch_size, fitted)
        with full_precision(images.device):
            return torch.einsum("bkm,bmhw->bkhw", found.scores, found.maps)

    # Gradients of the path are kept for every class: fewer images at once keep them within a batch's size.
    together = max(1, batch_size // classes.shape[1])
    return torch.cat(run_batches(saliency, len(images), together))


def concept_attributions(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    options: VisualTcavOptions,
    batch_size: int,
    fitted: Mapping[str, Tensor],
) -> ConceptAttribution:
    """Concept maps and attributions of a few images for each of their classes ``[B, K]``."""
    layer = options.layer or concept_layer(model)
    behind = network_behind(model, images, layer)
    behind = replace(behind, activation=behind.activation.detach().to(images.dtype))
    features = as_map(model, behind.activation, behind.layer)
    gradients, logits, empty = _path_gradients(model, behind, classes, options.steps, batch_size)
    with full_precision(images.device):
        maps = concept_maps(features, fitted["directions"], fitted["emblems"])
        positive = (gradients * features.unsqueeze(1)).relu()
        shares = ratio(positive, positive.sum(dim=(2, 3, 4), keepdim=True))
        gains = (logits - empty).relu()
        strength = ratio(gains.gather(1, classes), gains.amax(dim=1, keepdim=True))
        # A channel that is negative where the concept is seen counts by how far the concept lies below it.
        signs = torch.where(torch.einsum("bchw,bmhw->bmc", features, maps) < 0, -1.0, 1.0)
        channels = (fitted["directions"] * signs).relu()
        channels = ratio(channels, channels.amax(dim=2, keepdim=True))
        scores = torch.einsum("bkchw,bmhw,bmc->bkm", shares, maps, channels) * strength.unsqueeze(2)
    return ConceptAttribution(maps, scores)


def concept_layer(model: Classifier) -> str | None:
    """The layer that concepts are looked for in: the last feature map (None), or what enters the last block.

    Behind the last attention patch tokens no longer reach a class token. A norm inside that block, as the CAM
    family reads, would not do: without it the residual stream still holds the logit, and nothing is attributed.
    """
    return None if model.family == "cnn" else str(model.module.feature_info[-2]["module"])


def raw_concept_maps(features: Tensor, directions: Tensor) -> Tensor:
    """ReLU of the channels ``[B, C, h, w]`` weighted by each concept's vector ``[M, C]``: ``[B, M, h, w]``."""
    with full_precision(features.device):
        return torch.einsum("bchw,mc->bmhw", features, directions).relu()


def concept_maps(features: Tensor, directions: Tensor, emblems: Tensor) -> Tensor:
    """Raw maps clipped to, and as shares of, the range between the emblems; zero where that is empty."""
    low, high = (value.view(1, -1, 1, 1) for value in emblems.unbind(1))
    span = high - low
    clipped = raw_concept_maps(features, directions).clamp(min=low).minimum(high) - low
    return ratio(clipped, span)


def contraharmonic_mean(maps: Tensor) -> Tensor:
    """Sum of squares over sum, over the positions of non-negative maps ``[B, M, h, w]``; 0 where empty."""
    return ratio(maps.square().sum(dim=(2, 3)), maps.sum(dim=(2, 3)))


def _examples(
    model: Classifier,
    samples: FitSamples,
    options: VisualTcavOptions,
    batch_size: int,
    seed: int,
    pooled: Callable[[Tensor], Tensor],
) -> Examples:
    if samples.concepts is None and options.concepts is not None:
        raise UsageError(
            f"visual_tcav.concepts: expected the pictures in {options.concepts}, got none; a study reads them, "
            "fit_method takes them as concepts={name: pictures}"
        )
    if samples.concepts is None:
        read, count = patch_source(samples)
        vectors = over_rows(model, read, torch.arange(count), batch_size, pooled)
        return clustered_examples(read, vectors, options.concept_count, seed)
    read, members, others = folder_source(samples)
    vectors = over_rows(model, read, torch.arange(int(others[-1]) + 1), batch_size, pooled)
    return Examples(read, vectors, members, others)


def _feature_map(model: Classifier, images: Tensor, layer: str | None) -> Tensor:
    """A layer's output as a map ``[B, C, h, w]``; None is the final features."""
    if layer is None:
        return as_map(model, model.module.forward_features(images), "forward_features").to(images.dtype)
    with captured(model, [layer]) as outputs:
        model(images)
    return as_map(model, outputs[layer], layer).to(images.dtype)


def _path_gradients(
    model: Classifier, behind: Behind, classes: Tensor, steps: int, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean gradients ``[B, K, C, h, w]`` on the path from zero features, and the logits of both its ends."""
    activation = behind.activation
    count, sort = len(activation), {"dtype": activation.dtype, "device": activation.device}
    shape = as_map(model, activation, behind.layer).shape[1:]
    total = torch.zeros(count, classes.shape[1], *shape, **sort)
    share = torch.linspace(0, 1, steps + 1, **sort)
    weight = torch.full_like(share, 1 / steps)
    weight[[0, -1]] /= 2
    image = torch.arange(count, device=activation.device).repeat_interleave(steps + 1)
    step = torch.arange(steps + 1, device=activation.device).repeat(count)

    def walk(rows: slice) -> Tensor:
        of, at = image[rows], step[rows]
        with torch.enable_grad():
            leaf = (activation[of] * share[at].view(-1, *[1] * (activation.ndim - 1))).requires_grad_(True)
            logits = behind.run(leaf, of)
        gradients = per_class(logits, classes[of], [leaf], lambda found: as_map(model, found[0], behind.layer))
        total.index_add_(0, of, gradients * weight[at].view(-1, 1, 1, 1, 1))
        return logits.detach().to(activation.dtype)

    logits = torch.cat(run_batches(walk, len(image), batch_size)).unflatten(0, (count, steps + 1))
    return total, logits[:, -1], logits[:, 0]
