"""Occlusion, Kernel SHAP and LIME against Captum's."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from pathlib import Path

import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression, SkLearnRidge
from captum.attr import KernelShap, Lime, LimeBase, Occlusion, ShapleyValues
from PIL import Image
from torch import Tensor

from tests.agreement.test_captum import pearson
from tests.xai_core.tiny import pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, score_parts
from xai_core.attribution.perturbation.kernel_shap import KernelShapOptions, shapley_design, weighted_coalitions
from xai_core.models import Classifier, ModelSpec, load_classifier

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}
REAL = ("deit_tiny_patch16_224", "mobilenetv2_100")


def whole_quarters(count: int) -> Tensor:
    """Four parts that leave no pixel out: Captum's masks have no pixels of no part."""
    return quarters(1).expand(count, -1, -1).contiguous()


def probabilities(model: Classifier) -> Callable[[Tensor], Tensor]:
    return lambda images: model(images).softmax(1)


def real(name: str, shared_data: Path) -> tuple[Classifier, Tensor, Tensor]:
    """A trained model in float64, one photograph, and the class that it sees."""
    checkpoint = shared_data / "models" / f"{name}.safetensors"
    model = load_classifier(ModelSpec(name, pretrained=False, checkpoint=str(checkpoint)))
    model.module.double()
    path = min((shared_data / "imagenet-sample" / "images").glob("*/*.jpg"))
    images = model.preprocess(Image.open(path)).double().unsqueeze(0)
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize("scalar", ["logit", "probability"])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (10, 6), (7, 3)])
@pytest.mark.parametrize("family", MODELS)
def test_occlusion(family: str, window: int, stride: int, scalar: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(2)
    black = model.normalise(torch.zeros_like(images))
    forward = model.module if scalar == "logit" else probabilities(model)
    peer = Occlusion(forward).attribute(
        images, (3, window, window), (3, stride, stride), baselines=black, target=targets, perturbations_per_eval=8
    )
    options = {"window": window, "stride": stride, "scalar": scalar, "baseline": "black"}
    ours = attribute(model, images, targets, method="occlusion", options=options)
    torch.testing.assert_close(ours.double(), peer[:, 0].double(), rtol=1e-5, atol=1e-7)
    assert pearson(ours, peer[:, 0]) > 0.999999


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_occlusion_of_a_trained_model(name: str, shared_data: Path) -> None:
    model, images, targets = real(name, shared_data)
    peer = Occlusion(probabilities(model)).attribute(
        images, (3, 64, 64), (3, 40, 40), target=targets, perturbations_per_eval=25
    )
    ours = attribute(model, images, targets, method="occlusion", options={"window": 64, "stride": 40})
    assert pearson(ours, peer[:, 0]) > 0.99999
    torch.testing.assert_close(ours.double(), peer[:, 0].double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_kernel_shap_is_captums_exact_shapley_value(family: str) -> None:
    """Captum walks through all orders of the parts; the regression on all coalitions gives the same."""
    model = MODELS[family]()
    images, targets = pictures(2)
    parts = whole_quarters(2)
    peer = ShapleyValues(model.module).attribute(images, target=targets, feature_mask=parts.long().unsqueeze(1))
    ours = score_parts(model, images, targets, parts, method="kernel_shap").score
    torch.testing.assert_close(ours, by_part(peer, parts), rtol=1e-5, atol=1e-6)


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_kernel_shap_of_a_trained_model(name: str, shared_data: Path) -> None:
    model, images, targets = real(name, shared_data)
    parts = (torch.arange(224) * 3 // 224).view(1, -1, 1).expand(1, 224, 224).to(torch.uint8)
    mask = parts.long().unsqueeze(1)
    peer = ShapleyValues(model.module).attribute(
        images, target=targets, feature_mask=mask, perturbations_per_eval=3
    )
    ours = score_parts(model, images, targets, parts, method="kernel_shap").score
    torch.testing.assert_close(ours, by_part(peer, parts), rtol=1e-5, atol=1e-6)


def by_part(peer: Tensor, parts: Tensor) -> Tensor:
    """Captum paints a part's value on its pixels: the value at each part's first pixel."""
    rows = []
    for values, labels in zip(peer[:, 0], parts, strict=True):
        rows.append(torch.stack([values[labels == part][0] for part in range(int(labels.max()) + 1)]))
    return torch.stack(rows).detach().double()


def test_captums_kernel_shap_samples_what_is_exact_here() -> None:
    """Captum draws with replacement, without opposites, and holds the constraint by a large weight.

    So it only comes near: with 1500 draws of the 14 coalitions of four parts to three digits, where 16 passes
    give the values themselves.
    """
    model = tiny_cnn()
    images, targets = pictures(1)
    parts = whole_quarters(1)
    torch.manual_seed(0)
    peer = KernelShap(model.module).attribute(
        images, target=targets, feature_mask=parts.long().unsqueeze(1), n_samples=1500, perturbations_per_eval=64
    )
    ours = score_parts(model, images, targets, parts, method="kernel_shap").score
    theirs = by_part(peer, parts)
    assert pearson(ours, theirs) > 0.999
    assert float((ours - theirs).abs().max()) > 1e-7


@pytest.mark.parametrize("family", MODELS)
def test_kernel_shap_samples_are_fitted_as_captum_fits_them(family: str) -> None:
    """The same ten coalitions of four parts with the same weights, through Captum's own regression."""
    model = MODELS[family]()
    images, targets = pictures(1)
    parts = whole_quarters(1)
    options = KernelShapOptions(samples=10)
    design = shapley_design(4, options)
    coalitions, weights = weighted_coalitions(4, 8, seed=0)
    assert float(weights[0]) == pytest.approx(3 / (1 * 3) / comb(4, 1))
    kernel = dict(zip(map(tuple, coalitions.long().tolist()), weights.tolist(), strict=True))

    def draw(_original: Tensor, **_facts: object):  # type: ignore[no-untyped-def]
        yield from (row.long().unsqueeze(0) for row in design.coalitions)

    def weight(_original: Tensor, _perturbed: Tensor, row: Tensor, **_facts: object) -> Tensor:
        return torch.tensor([kernel.get(tuple(row[0].tolist()), 1e5)])

    peer = Lime(model.module, SkLearnLinearRegression(), similarity_func=weight, perturb_func=draw).attribute(
        images, target=targets, feature_mask=parts.long().unsqueeze(1), n_samples=10
    )
    ours = score_parts(model, images, targets, parts, method="kernel_shap", options=options).score
    theirs = by_part(peer, parts)
    assert pearson(ours, theirs) > 0.9999
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("family", MODELS)
def test_lime(family: str, distance: str) -> None:
    """Captum's regression on our draws, with the distance between 0/1 vectors as the lime package has it."""
    model = MODELS[family]()
    images, targets = pictures(2)
    parts = whole_quarters(2)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(80, 4, generator=generator, dtype=torch.float64) < 0.5
    drawn[0] = True

    def draw(_original: Tensor, **_facts: object):  # type: ignore[no-untyped-def]
        yield from (row.long().unsqueeze(0) for row in drawn)

    def weight(_original: Tensor, _perturbed: Tensor, row: Tensor, **_facts: object) -> Tensor:
        share = row.double().mean()
        far = 1 - share.sqrt() if distance == "cosine" else (4 * (1 - share)).sqrt()
        return torch.exp(-(far**2) / (2 * 0.6**2)).view(1)

    options = {
        "samples": 80, "distance": distance, "kernel_width": 0.6, "ridge": 0.1, "seed": 1, "baseline": "mean"
    }  # fmt: skip
    ours = score_parts(model, images, targets, parts, method="lime", options=options).score
    for b in range(2):
        peer = Lime(
            probabilities(model), SkLearnRidge(alpha=0.1), similarity_func=weight, perturb_func=draw
        ).attribute(
            images[b : b + 1], target=targets[b : b + 1], feature_mask=parts[b : b + 1].long().unsqueeze(1),
            n_samples=80, perturbations_per_eval=16,
        )  # fmt: skip
        theirs = by_part(peer, parts[b : b + 1])
        assert pearson(ours[b], theirs[0]) > 0.9999
        torch.testing.assert_close(ours[b], theirs[0], rtol=2e-3, atol=1e-6)


def test_captums_lime_measures_distance_in_pixels() -> None:
    """Its default kernel is on the pixels' cosine with width 1 and a LASSO: another weighting, other values."""
    model = tiny_cnn()
    images, targets = pictures(1)
    parts = whole_quarters(1)
    torch.manual_seed(0)
    peer = Lime(probabilities(model), SkLearnRidge(alpha=1.0)).attribute(
        images, target=targets, feature_mask=parts.long().unsqueeze(1), n_samples=200
    )
    ours = score_parts(model, images, targets, parts, method="lime", options={"baseline": "mean"}).score
    assert issubclass(Lime, LimeBase)
    theirs = by_part(peer, parts)
    assert float((ours - theirs).abs().max()) > 0.02 * float(theirs.abs().max())
