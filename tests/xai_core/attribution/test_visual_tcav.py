"""Visual-TCAV against loops written from the paper, and what it must do whatever the network."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.xai_core.tiny import SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attribution import FitSamples, attribute, attribute_classes, fit_method
from xai_core.attribution.concept_methods.concept_examples import clustered_examples, crop, patch_source
from xai_core.attribution.concept_methods.visual_tcav import (
    VisualTcavOptions,
    concept_attributions,
    contraharmonic_mean,
)
from xai_core.errors import UsageError
from xai_core.models import Classifier

STEPS = 5
MODELS = {"cnn": tiny_cnn, "vit": tiny_vit}
every_model = pytest.mark.parametrize("family", MODELS)


def concept_pictures() -> dict[str, Tensor]:
    """Two concepts and pictures of none, three and four of each."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64) + shift
        for name, count, shift in (("bright", 3, 1.0), ("dark", 4, -1.0), ("random", 4, 0.0))
    }


def slow_features(model: Classifier, image: Tensor) -> np.ndarray:
    """The feature map of one image, [C, h, w]: what comes before pooling, or before the last block."""
    with torch.no_grad():
        if model.family == "cnn":
            return model.module.forward_features(image[None])[0].numpy()
        tokens = model.module.norm_pre(model.module._pos_embed(model.module.patch_embed(image[None])))
        tokens = model.module.blocks[0](tokens)[0, 1:]
        return tokens.T.reshape(-1, 4, 4).numpy()


def slow_logits(model: Classifier, image: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Logits with the features scaled, and the scaled features as the leaf of their graph."""
    with torch.enable_grad():
        if model.family == "cnn":
            leaf = (share * model.module.forward_features(image[None])).detach().requires_grad_(True)
            return model.module.forward_head(leaf)[0], leaf
        net = model.module
        first = net.blocks[0](net.norm_pre(net._pos_embed(net.patch_embed(image[None]))))
        leaf = (share * first).detach().requires_grad_(True)
        return net.forward_head(net.norm(net.blocks[1](leaf)))[0], leaf


def contraharmonic(values: np.ndarray) -> float:
    return float((values**2).sum() / values.sum()) if values.sum() > 0 else 0.0


def slow_fit(model: Classifier, concepts: dict[str, Tensor]) -> tuple[list[np.ndarray], list[tuple[float, float]]]:
    """Equations 1-4: centroids' differences and the medians of the maps' contraharmonic means."""
    maps = {name: [slow_features(model, image) for image in images] for name, images in concepts.items()}
    centre = {name: np.mean([one.mean(axis=(1, 2)) for one in found], axis=0) for name, found in maps.items()}
    directions, emblems = [], []
    for name in ("bright", "dark"):
        direction = centre[name] - centre["random"]
        directions.append(direction)

        def median(of: str, direction: np.ndarray = direction) -> float:
            raw = [np.maximum(np.tensordot(direction, one, axes=1), 0) for one in maps[of]]
            return float(np.median([contraharmonic(one) for one in raw]))

        emblems.append((median("random"), median(name)))
    return directions, emblems


def slow_concepts(
    model: Classifier, image: Tensor, target: int, directions: list[np.ndarray], emblems: list[tuple[float, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Equations 5-9 for one image and class: concept maps [M, h, w] and attributions [M], position by position."""
    features = slow_features(model, image)
    channels, rows, columns = features.shape
    gradients = []
    for step in range(STEPS + 1):
        logits, leaf = slow_logits(model, image, step / STEPS)
        (gradient,) = torch.autograd.grad(logits[target], leaf)
        found = gradient[0].numpy() if model.family == "cnn" else gradient[0, 1:].numpy().T.reshape(-1, 4, 4)
        gradients.append(found)
    mean = np.mean([(a + b) / 2 for a, b in pairwise(gradients)], axis=0)
    gain = np.maximum((slow_logits(model, image, 1.0)[0] - slow_logits(model, image, 0.0)[0]).detach().numpy(), 0)
    positive = np.maximum(mean * features, 0)
    share = positive / positive.sum() * gain[target] / gain.max()
    maps, scores = [], []
    for direction, (low, high) in zip(directions, emblems, strict=True):
        seen = np.zeros((rows, columns))
        for y in range(rows):
            for x in range(columns):
                raw = max(0.0, float(direction @ features[:, y, x]))
                seen[y, x] = (min(max(raw, low), high) - low) / (high - low) if high > low else 0.0
        weight = np.zeros(channels)
        for channel in range(channels):
            sign = -1.0 if (features[channel] * seen).sum() < 0 else 1.0
            weight[channel] = max(0.0, sign * direction[channel])
        weight /= weight.max()
        maps.append(seen)
        scores.append(sum(weight[c] * (share[c] * seen).sum() for c in range(channels)))
    return np.stack(maps), np.array(scores)


@every_model
def test_concept_maps_and_attributions_are_the_papers(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(3)
    concepts = concept_pictures()
    fitted = fit_method(model, images, targets, method="visual_tcav", concepts=concepts)
    directions, emblems = slow_fit(model, concepts)
    np.testing.assert_allclose(fitted["directions"], directions, rtol=1e-9)
    np.testing.assert_allclose(fitted["emblems"], emblems, rtol=1e-9)
    classes = torch.stack([targets, (targets + 2) % 5], dim=1)
    found = concept_attributions(model, images, classes, VisualTcavOptions(steps=STEPS), 4, fitted)
    assert (found.scores > 0).any()
    for index, image in enumerate(images):
        for position, target in enumerate(classes[index].tolist()):
            maps, scores = slow_concepts(model, image, target, directions, emblems)
            np.testing.assert_allclose(found.maps[index], maps, rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(found.scores[index, position], scores, rtol=1e-6, atol=1e-12)
    saliency = attribute_classes(
        model, images, classes, method="visual_tcav", options={"steps": STEPS}, fitted=fitted, native=True
    )
    expected = torch.einsum("bkm,bmhw->bkhw", found.scores, found.maps)
    torch.testing.assert_close(saliency, expected.float())


def test_patches_that_no_longer_reach_the_head_have_no_gradient() -> None:
    from xai_core.attribution.concept_methods.visual_tcav import _path_gradients
    from xai_core.replay import network_behind

    model = tiny_vit()
    images, targets = pictures(2)
    with torch.no_grad():
        behind = network_behind(model, images, "blocks.1")
        classes = targets.view(-1, 1)
        gradients, logits, empty = _path_gradients(model, behind, classes, 400, 64)
        rise = (logits - empty).gather(1, classes)
    patches = behind.activation[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    # The last block's patch tokens do not reach the head, and its class token has no place on the map.
    assert not (gradients[:, 0] * patches).any()
    assert rise.abs().max() > 0.1


def test_on_a_linear_head_the_attributions_before_masking_are_complete() -> None:
    from xai_core.attribution.concept_methods.visual_tcav import _path_gradients
    from xai_core.replay import network_behind

    model = tiny_cnn()
    images, targets = pictures(2)
    classes = targets.view(-1, 1)
    with torch.no_grad():
        behind = network_behind(model, images, None)
        gradients, logits, empty = _path_gradients(model, behind, classes, 3, 2)
    summed = (gradients[:, 0] * behind.activation).sum(dim=(1, 2, 3))
    torch.testing.assert_close(summed, (logits - empty).gather(1, classes).squeeze(1))


@every_model
def test_classes_together_are_classes_one_by_one_in_any_batch(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(3)
    fitted = fit_method(model, images, targets, method="visual_tcav", parts=quarters(3))
    shared = {"method": "visual_tcav", "options": {"steps": 3}, "fitted": fitted}
    classes = torch.stack([targets, (targets + 1) % 5, (targets + 3) % 5], dim=1)
    together = attribute_classes(model, images, classes, **shared, batch_size=7)
    for position in range(3):
        alone = attribute(model, images, classes[:, position], **shared, batch_size=1)
        torch.testing.assert_close(together[:, position], alone, rtol=0, atol=1e-6)


def test_a_fit_depends_on_the_seed_and_the_samples_and_not_on_the_batch() -> None:
    model = tiny_cnn()
    images, targets = pictures(4)
    fits = [
        fit_method(model, images, targets, method="visual_tcav", parts=quarters(4), batch_size=size)
        for size in (1, 32)
    ]
    assert fits[0].keys() == {"directions", "emblems"}
    assert fits[0]["directions"].shape == (10, 16)
    for name in fits[0]:
        torch.testing.assert_close(fits[0][name], fits[1][name])
    fewer = fit_method(model, images[:1], targets[:1], method="visual_tcav", parts=quarters(1))
    assert fewer["directions"].shape == (4, 16)  # No more concepts than patches.


def test_patches_are_the_parts_boxes_enlarged() -> None:
    images, targets = pictures(2)
    read, count = patch_source(FitSamples(images, targets, quarters(2)))
    assert count == 7  # The second image has three parts.
    half = SIZE // 2
    found = read(torch.tensor([0, 3, 5]))
    boxes = [images[0, :, :half, :half], images[0, :, half:, half:], images[1, :, :half, half:]]
    for patch, box in zip(found, boxes, strict=True):
        expected = torch.nn.functional.interpolate(box[None], (SIZE, SIZE), mode="bilinear", align_corners=False)[
            0
        ]
        # Inside the box's rim both read the same pixels; on it one looks at the neighbours.
        torch.testing.assert_close(patch[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1])


def test_a_whole_image_as_its_box_is_the_image() -> None:
    images, _ = pictures(2)
    torch.testing.assert_close(crop(images, torch.tensor([[0, 0, SIZE, SIZE]] * 2)), images)


def test_clusters_are_concepts_and_patches_without_finite_activations_belong_to_none() -> None:
    vectors = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.1, 0.0], [torch.nan, 0.0], [9.0, 9.1]])
    found = clustered_examples(lambda rows: rows, vectors, 2, 0)
    members = {tuple(found.read(rows).tolist()) for rows in found.members}
    assert members == {(0, 2), (1, 4)}
    assert found.read(found.others).tolist() == [0, 1, 2, 4]


def test_contraharmonic_mean_of_an_empty_map_is_zero() -> None:
    maps = torch.tensor([[[[0.0, 0.0]], [[1.0, 3.0]]]])
    torch.testing.assert_close(contraharmonic_mean(maps), torch.tensor([[0.0, 2.5]]))


@every_model
def test_a_concept_that_random_pictures_show_as_much_adds_nothing(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(2)
    same = concept_pictures()["random"]
    fitted = fit_method(model, images, targets, method="visual_tcav", concepts={"a": same, "random": same})
    maps = attribute(model, images, targets, method="visual_tcav", options={"steps": 2}, fitted=fitted)
    assert maps.shape == (2, SIZE, SIZE)
    assert not maps.any()


def test_without_random_pictures_the_images_stand_for_them() -> None:
    model = tiny_cnn()
    images, targets = pictures(3)
    concepts = concept_pictures()
    shared = {"method": "visual_tcav"}
    own = fit_method(model, images, targets, **shared, concepts={"bright": concepts["bright"]})
    named = {"bright": concepts["bright"], "random": images}
    given = fit_method(model, images, targets, **shared, concepts=named)
    torch.testing.assert_close(own["directions"], given["directions"])


def test_refusals_say_what_to_do() -> None:
    model = tiny_cnn()
    images, targets = pictures(2)
    with pytest.raises(
        UsageError, match=r"learns from data before it explains: expected fitted, got none; .*fit_me"
    ):
        attribute(model, images, targets, method="visual_tcav")
    with pytest.raises(UsageError, match=r"'grad_cam' learns nothing from data"):
        fit_method(model, images, targets, method="grad_cam")
    with pytest.raises(UsageError, match=r"'grad_cam' learns nothing from data: expected no fitted"):
        attribute(model, images, targets, method="grad_cam", fitted={})
    with pytest.raises(UsageError, match=r"expected parts \[N, H, W\], or concepts; got none"):
        fit_method(model, images, targets, method="visual_tcav")
    with pytest.raises(UsageError, match=r"visual_tcav.concepts: expected the pictures in /there, got none"):
        fit_method(model, images, targets, method="visual_tcav", options={"concepts": "/there"})
    with pytest.raises(UsageError, match=r"pictures of every concept, got none of 'b'"):
        fit_method(model, images, targets, method="visual_tcav", concepts={"a": images, "b": images[:0]})
    with pytest.raises(UsageError, match="examples: nothing reads it without a folder of concepts"):
        VisualTcavOptions(examples=3)
    with pytest.raises(UsageError, match="concept_count: nothing reads it where concepts come from a folder"):
        VisualTcavOptions(concepts="/there", concept_count=3)
    with pytest.raises(UsageError, match=r"visual_tcav.steps: expected at least 1, got 0"):
        VisualTcavOptions(steps=0)


def test_a_transformer_of_one_block_is_refused_unless_a_layer_is_named() -> None:
    from xai_core.models import ModelSpec, load_classifier

    arguments = {"img_size": 32, "depth": 1, "num_classes": 5}
    model = load_classifier(ModelSpec("vit_tiny_patch16_224", False, create_args=arguments))
    images, targets = pictures(2)
    shared = {"method": "visual_tcav", "parts": quarters(2)}
    with pytest.raises(UsageError, match=r"no block before its last one; name a layer with the option 'layer'"):
        fit_method(model, images.float(), targets, **shared)
    named = fit_method(model, images.float(), targets, **shared, options={"layer": "blocks.0.norm1"})
    assert named["directions"].shape[1] == 192
