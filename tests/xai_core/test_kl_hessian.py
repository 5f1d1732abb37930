"""KL-Hessian against a slow twin written line by line from the paper's equations 1-11."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.tiny import pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attention import explicit_attention
from xai_core.attribution import score_parts
from xai_core.attribution.kl_hessian import GUARD, symmetric_kl
from xai_core.errors import UsageError
from xai_core.models import Classifier

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}


def score_of(model: Classifier, image: Tensor, target: int) -> Tensor:
    return model(image.unsqueeze(0))[0, target]


def gradient(model: Classifier, image: Tensor, target: int) -> Tensor:
    image = image.clone().requires_grad_(True)
    return torch.autograd.grad(score_of(model, image, target), image)[0]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def slow_twin(
    model: Classifier,
    image: Tensor,
    target: int,
    mask: Tensor,
    hessian: str,
    epsilon: float = 0.2,
    delta: float = 0.06,
    blend: float = 0.4,
    gamma: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One part of one image, one equation a line."""
    g = gradient(model, image, target)
    v = mask * g / ((mask * g).norm() + GUARD)  # (1)
    if hessian == "exact":
        with explicit_attention(model.module):
            h = torch.autograd.functional.hvp(lambda x: score_of(model, x, target), image, v)[1]  # (2)
    else:
        h = (gradient(model, image + delta * v, target) - gradient(model, image - delta * v, target)) / (
            2 * delta
        )  # (5)
    h_hat = mask * h / ((mask * h).norm() + GUARD)  # (3)
    u = (v + blend * h_hat) / ((v + blend * h_hat).norm() + GUARD)  # (4)
    with torch.no_grad():
        p0, plus, minus = (
            model(x.unsqueeze(0))[0].softmax(0) for x in (image, image + epsilon * u, image - epsilon * u)
        )  # (6)
    skl = [0.5 * (kl(p0, p) + kl(p, p0)) for p in (plus, minus)]  # (7)
    kl_sym = 0.5 * (skl[0] + skl[1])  # (8)
    curvature = (v * h).sum()  # (9)
    amplifier = 1 + gamma * max(curvature.item(), 0.0)  # (10)
    return kl_sym * amplifier, kl_sym, curvature  # (11)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("hessian", ["exact", "finite_difference"])
def test_agrees_with_the_formulas(family: str, hessian: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(3)
    parts = quarters(3)
    fast = score_parts(model, images, targets, parts, options={"hessian": hessian}, batch_size=5)
    for b in range(3):
        for k in range(4):
            if not (parts[b] == k).any():
                assert fast.score[b, k].isnan()
                continue
            mask = (parts[b] == k).double()
            score, kl_sym, curvature = slow_twin(model, images[b], int(targets[b]), mask, hessian)
            torch.testing.assert_close(fast.score[b, k], score, rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(fast.terms["kl_sym"][b, k], kl_sym, rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(fast.terms["curvature"][b, k], curvature, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("family", MODELS)
def test_finite_difference_tends_to_the_exact_product(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(2)
    parts = quarters(2)
    exact = score_parts(model, images, targets, parts, options={"hessian": "exact"}).terms["curvature"]
    errors = []
    for delta in (0.06, 0.006):
        near = score_parts(model, images, targets, parts, options={"delta": delta}).terms["curvature"]
        errors.append(float((near - exact).nan_to_num().abs().max()))
    # A symmetric difference is of second order: a tenth of the step leaves a hundredth of the error.
    assert errors[1] < errors[0] / 50
    assert float(exact.nan_to_num().abs().max()) > 1e-4


@pytest.mark.parametrize("family", MODELS)
def test_the_batch_size_changes_nothing(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(3)
    parts = quarters(3)
    whole = score_parts(model, images, targets, parts, batch_size=64).score
    single = score_parts(model, images, targets, parts, batch_size=1).score
    alone = torch.cat(
        [score_parts(model, images[i : i + 1], targets[i : i + 1], parts[i : i + 1]).score for i in (0, 2)]
    )
    torch.testing.assert_close(single, whole, equal_nan=True, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone, whole[[0, 2]], rtol=1e-9, atol=1e-12)


def test_ablations_are_the_terms_of_the_full_score() -> None:
    model = tiny_vit()
    images, targets = pictures(2)
    parts = quarters(2)
    full = score_parts(model, images, targets, parts)
    kl_only = score_parts(model, images, targets, parts, options={"score": "kl_only"})
    hessian_only = score_parts(model, images, targets, parts, options={"score": "hessian_only"})
    torch.testing.assert_close(kl_only.score, full.terms["kl_sym"], equal_nan=True)
    for scores, curvature in zip(hessian_only.score, full.terms["curvature"], strict=True):
        positive = curvature.clamp(min=0)
        largest = positive.nan_to_num().max()
        # An image without any positive curvature scores 0 everywhere instead of 0 / 0.
        expected = positive / largest if largest > 0 else positive
        torch.testing.assert_close(scores, expected, equal_nan=True)
    assert float(hessian_only.score.nan_to_num().max()) == 1


def test_symmetric_kl_is_zero_only_for_equal_distributions() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    p = logits.log_softmax(1)
    assert float(symmetric_kl(p, p + 0).abs().max()) == 0
    # Adding a constant to all logits moves no belief.
    torch.testing.assert_close(symmetric_kl(p, (logits + 3).log_softmax(1)), torch.zeros(4).double())
    assert float(symmetric_kl(p, p.roll(1, 0)).min()) > 0


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_vit()
    images, targets = pictures(1)
    before = [
        (name, module.training, getattr(module, "fused_attn", None), len(module._forward_hooks))
        for name, module in model.module.named_modules()
    ]
    score_parts(model, images, targets, quarters(1), options={"hessian": "exact"})
    with pytest.raises(UsageError), explicit_attention(model.module):
        score_parts(model, images, targets, quarters(1)[:, :7])
    after = [
        (name, module.training, getattr(module, "fused_attn", None), len(module._forward_hooks))
        for name, module in model.module.named_modules()
    ]
    assert before == after
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in model.module.parameters()
    )


def test_a_constant_score_gives_zeros_not_nan() -> None:
    model = tiny_vit()
    model.module.head.weight.zero_()
    images, targets = pictures(2)
    scores = score_parts(model, images, targets, quarters(2))
    assert float(scores.score.nan_to_num(0).abs().max()) == 0
    assert scores.score.isnan().sum() == 1  # the part that the second image has not


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epsilon": 0}, "epsilon"), ({"delta": -1}, "delta"), ({"gamma": -0.1}, "gamma"), ({"eps": 1}, "eps")],
)
def test_wrong_options_are_refused(options: dict[str, float], message: str) -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match=message):
        score_parts(tiny_vit(), images, targets, quarters(1), options=options)


def test_parts_of_another_size_are_refused() -> None:
    images, targets = pictures(2)
    with pytest.raises(UsageError, match=r"expected part labels \(2, 32, 32\), got \(2, 16, 32\)"):
        score_parts(tiny_vit(), images, targets, quarters(2)[:, :16])
