"""Occlusion and RISE against slow twins written from their definitions, and what all masking methods share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.xai_core.tiny import CLASSES, SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes, score_parts
from xai_core.attribution.perturbation.occlusion import OcclusionOptions, covered
from xai_core.attribution.perturbation.rise import RiseOptions, SmallMasks
from xai_core.baselines import gaussian_blur
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import build_options, methods

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}
BUDGETS = {
    "occlusion": {"window": 10, "stride": 6},
    "rise": {"masks": 23},
    "kernel_shap_patches": {"grid": 3, "samples": 40},
    "kernel_shap": {"samples": 12},
    "lime": {"samples": 30},
}


def probability(model: Classifier, picture: Tensor, target: int) -> float:
    with torch.no_grad():
        return float(model(picture.unsqueeze(0))[0].softmax(0)[target])


def hidden_by(model: Classifier, image: Tensor, baseline: str) -> Tensor:
    if baseline == "blur":
        return gaussian_blur(image.unsqueeze(0), 3.0)[0]
    return torch.zeros_like(image) if baseline == "mean" else model.normalise(torch.zeros_like(image)[None])[0]


def shown(baseline: str) -> dict:
    return {"baseline": baseline, **({"sigma": 3.0} if baseline == "blur" else {})}


@pytest.mark.parametrize("baseline", ["mean", "black", "blur"])
@pytest.mark.parametrize("family", MODELS)
def test_occlusion_from_its_definition(family: str, baseline: str) -> None:
    """Window 10 and stride 6 leave the last window two pixels short at the border of 32."""
    model = MODELS[family]()
    images, targets = pictures(2)
    options = {"window": 10, "stride": 6, **shown(baseline)}
    maps = attribute(model, images, targets, method="occlusion", options=options, batch_size=7)
    for image, target, got in zip(images, targets.tolist(), maps, strict=True):
        behind = hidden_by(model, image, baseline)
        clean = probability(model, image, target)
        total, times = torch.zeros(SIZE, SIZE).double(), torch.zeros(SIZE, SIZE).double()
        for top in (0, 6, 12, 18, 24):
            for left in (0, 6, 12, 18, 24):
                picture = image.clone()
                picture[:, top : top + 10, left : left + 10] = behind[:, top : top + 10, left : left + 10]
                drop = clean - probability(model, picture, target)
                total[top : top + 10, left : left + 10] += drop
                times[top : top + 10, left : left + 10] += 1
        torch.testing.assert_close(got.double(), total / times, rtol=1e-6, atol=1e-9)


def test_occlusion_of_a_linear_model_gives_the_windows_own_sums() -> None:
    """With tiles that do not overlap, a tile's pixels all hold the tile's share of the logit."""
    model = tiny_cnn()
    weights = torch.randn(CLASSES, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(3)).double()

    class Linear(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) @ weights.T

    model.module = Linear()
    images, targets = pictures(2)
    options = {"window": 8, "stride": 8, "scalar": "logit"}
    entry = methods.get("occlusion")
    maps = entry.function(model, images, targets.view(-1, 1), build_options(entry, options), 5)
    shares = (weights[targets].view_as(images) * images).sum(1)
    tiles = F.avg_pool2d(shares.unsqueeze(1), 8) * 64
    torch.testing.assert_close(maps, F.interpolate(tiles, SIZE, mode="nearest"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "window", "stride"), [(224, 32, 16), (32, 5, 2), (30, 7, 7), (9, 9, 4), (5, 8, 3)]
)
def test_windows_cover_every_pixel_and_start_inside(size: int, window: int, stride: int) -> None:
    rows = covered(size, window, stride)
    assert rows.any(0).all()
    assert rows.any(1).all()
    assert rows[:-1].sum(1).eq(window).all()


def test_occlusions_defaults_follow_the_input() -> None:
    assert OcclusionOptions().pixels(224, 224) == (32, 16)
    assert OcclusionOptions().pixels(32, 48) == (5, 2)
    assert OcclusionOptions(window=9).pixels(32, 32) == (9, 4)
    assert OcclusionOptions().pixels(3, 3) == (1, 1)


@pytest.mark.parametrize("baseline", ["mean", "blur"])
@pytest.mark.parametrize("family", MODELS)
def test_rise_from_its_formula(family: str, baseline: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(2)
    options = RiseOptions(masks=19, grid=5, keep=0.3, seed=4, **shown(baseline))
    maps = attribute(model, images, targets, method="rise", options=options, batch_size=6)
    draw = SmallMasks.draw(options, (SIZE, SIZE), torch.device("cpu"))
    for image, target, got in zip(images, targets.tolist(), maps, strict=True):
        behind = hidden_by(model, image, baseline)
        expected = torch.zeros(SIZE, SIZE).double()
        for cells, down, right in zip(draw.cells, draw.down, draw.right, strict=True):
            large = F.interpolate(cells.double()[None, None], size=(42, 42), mode="bilinear")[0, 0]
            mask = large[down : down + SIZE, right : right + SIZE]
            expected += probability(model, mask * image + (1 - mask) * behind, target) * mask
        torch.testing.assert_close(got.double(), expected / (19 * 0.3), rtol=1e-6, atol=1e-9)


def test_rises_draw_is_the_seeds_alone() -> None:
    options = RiseOptions(masks=2000, grid=5, keep=0.3, seed=4)
    draw = SmallMasks.draw(options, (32, 48), torch.device("cpu"))
    torch.rand(3)
    again = SmallMasks.draw(options, (32, 48), torch.device("cpu"))
    other = SmallMasks.draw(RiseOptions(masks=2000, grid=5, keep=0.3, seed=5), (32, 48), torch.device("cpu"))
    assert torch.equal(draw.cells, again.cells) and torch.equal(draw.down, again.down)
    assert not torch.equal(draw.cells, other.cells)
    assert abs(float(draw.cells.double().mean()) - 0.3) < 0.02
    assert (int(draw.down.min()), int(draw.down.max())) == (0, 6)
    assert (int(draw.right.min()), int(draw.right.max())) == (0, 9)
    masks = draw.enlarge(slice(0, 50))
    assert masks.shape == (50, 32, 48)
    assert float(masks.min()) >= 0 and float(masks.max()) <= 1
    torch.testing.assert_close(draw.enlarge(slice(40, 50)), masks[40:])


def test_rise_of_an_indifferent_model_is_the_mean_mask() -> None:
    """Where no mask changes the probability, the map is that probability times the masks' mean over p."""
    model = tiny_cnn()
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)
    targets = torch.tensor([2])
    options = RiseOptions(masks=40)
    got = attribute(model, images, targets, method="rise", options=options)[0].double()
    masks = SmallMasks.draw(options, (SIZE, SIZE), torch.device("cpu")).enlarge(slice(0, 40))
    torch.testing.assert_close(got, probability(model, images[0], 2) * masks.mean(0) / 0.5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", BUDGETS)
def test_neither_batch_nor_neighbours_change_a_result(family: str, method: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(3)
    parts = quarters(3)
    given = {"method": method, "options": BUDGETS[method], "parts": parts}
    whole = attribute(model, images, targets, batch_size=64, **given)
    for size in (1, 2, 7):
        some = attribute(model, images, targets, batch_size=size, **given)
        torch.testing.assert_close(some, whole, rtol=1e-6, atol=1e-9)
    given["parts"] = parts[1:2]
    alone = attribute(model, images[1:2], targets[1:2], batch_size=5, **given)
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "pictures_an_image"), [("occlusion", 26), ("rise", 23), ("kernel_shap_patches", 40)]
)
def test_classes_share_passes_that_hold_no_more_than_the_batch(method: str, pictures_an_image: int) -> None:
    model = tiny_vit()
    images, _ = pictures(3)
    classes = torch.tensor([[0, 1, 2], [3, 4, 0], [1, 1, 4]])
    held: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda _module, inputs: held.append(len(inputs[0])))
    try:
        maps = attribute_classes(model, images, classes, method=method, options=BUDGETS[method], batch_size=8)
    finally:
        handle.remove()
    assert maps.shape == (3, 3, SIZE, SIZE)
    assert max(held) <= 8
    assert 0.9 * 3 * pictures_an_image <= sum(held) <= 3 * pictures_an_image
    assert len(held) <= sum(held) / 8 + 3
    for column in range(3):
        alone = attribute(
            model, images, classes[:, column].contiguous(), method=method, options=BUDGETS[method], batch_size=8
        )
        torch.testing.assert_close(alone, maps[:, column], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", BUDGETS)
def test_passes_record_no_graph_and_keep_fused_attention(method: str) -> None:
    model = tiny_vit()
    images, targets = pictures(2)
    seen: set[tuple[bool, bool]] = set()
    attention = model.module.blocks[0].attn
    handle = attention.register_forward_hook(
        lambda module, _inputs, output: seen.add((module.fused_attn, output.requires_grad))
    )
    try:
        with torch.enable_grad():
            attribute(model, images, targets, method=method, options=BUDGETS[method], parts=quarters(2))
    finally:
        handle.remove()
    assert seen == {(True, False)}
    assert methods.get(method).gradient_free
    assert methods.get(method).fused_attention == "kept"


@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_picture_has_a_finite_map(method: str, value: float) -> None:
    model = tiny_cnn()
    images = torch.full((2, 3, SIZE, SIZE), value, dtype=torch.float64)
    targets = torch.tensor([0, 1])
    maps = attribute(model, images, targets, method=method, options=BUDGETS[method], parts=quarters(2))
    assert maps.isfinite().all()
    if value == 0 and method != "rise":
        torch.testing.assert_close(maps, torch.zeros_like(maps), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("occlusion", {"window": 0}, r"occlusion\.window: expected at least 1 pixel, got 0"),
        ("occlusion", {"window": 4, "stride": 5}, r"occlusion\.stride: expected at most the window's 4 pixels"),
        ("occlusion", {"window": 33}, "32 x 32 pixels, smaller than the window of 33"),
        ("occlusion", {"stride": 6}, "a stride of 6 pixels skips some behind a window of 5"),
        ("occlusion", {"baseline": "grey"}, r"occlusion\.baseline: expected one of mean, black, blur, got 'grey'"),
        ("occlusion", {"sigma": 3.0}, "sigma: nothing reads it with baseline 'mean'; leave it out"),
        ("occlusion", {"sigma": 0.0}, r"occlusion\.sigma: expected a number of pixels > 0, got 0"),
        ("occlusion", {"scalar": "loss"}, r"occlusion\.scalar: expected one of probability, logit, got 'loss'"),
        ("rise", {"masks": 0}, r"rise\.masks: expected at least 1, got 0"),
        ("rise", {"keep": 1.0}, r"rise\.keep: expected a probability between 0 and 1, got 1\.0"),
        ("rise", {"grid": 33}, "32 pixels a side, too few for 33 cells"),
        ("rise", {"baseline": "part_mean"}, r"rise\.baseline: expected one of mean, black, blur"),
        ("kernel_shap", {"samples": 1}, r"kernel_shap\.samples: expected at least 2, got 1"),
        ("kernel_shap", {"samples": 9}, r"kernel_shap\.samples: expected at least 10 for an image of 4 parts"),
        ("kernel_shap_patches", {"samples": 99}, r"kernel_shap_patches\.samples: expected at least 100 for 49"),
        ("kernel_shap_patches", {"grid": 33, "samples": 9999}, "too few for 33 cells"),
        ("lime", {"distance": "l1"}, r"lime\.distance: expected one of cosine, euclidean, got 'l1'"),
        ("lime", {"kernel_width": 0.0}, r"lime\.kernel_width: expected a number > 0, got 0"),
        ("lime", {"ridge": 0.0}, r"lime\.ridge: expected a number > 0, got 0"),
    ],
)
def test_wrong_options_are_refused_by_name(method: str, options: dict[str, object], message: str) -> None:
    images, targets = pictures(2)
    with pytest.raises(UsageError, match=message):
        attribute(tiny_cnn(), images, targets, method=method, options=options, parts=quarters(2))


@pytest.mark.parametrize("method", ["kernel_shap", "lime"])
def test_parts_of_another_shape_are_refused(method: str) -> None:
    images, targets = pictures(2)
    with pytest.raises(UsageError, match=rf"{method}: expected part labels \(2, 32, 32\), got \(2, 16, 32\)"):
        score_parts(tiny_cnn(), images, targets, quarters(2)[:, :16], method=method)
