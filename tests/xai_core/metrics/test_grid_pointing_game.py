"""Grid pointing game: what maps of mosaics score, and which images have no score."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.metrics.test_mosaics import in_cell, mosaics_of, slow_mosaic
from tests.xai_core.tiny import SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attribution import attribute
from xai_core.attribution.explainer import Explainer
from xai_core.errors import UsageError
from xai_core.metrics import Evaluation, Truth
from xai_core.metrics.localisation.grid_pointing_game import SCORES
from xai_core.metrics.localisation.mosaics import arrange
from xai_core.metrics.localisation.regions import Region
from xai_core.models import Classifier, ModelSpec, load_classifier

HALF = SIZE // 2
NO_OTHERS = "too few images of other classes are left"


@pytest.fixture(scope="module")
def cnn() -> Classifier:
    return tiny_cnn()


def game(model: Classifier, count: int, method: str = "input_x_gradient", **options: Any) -> Evaluation:
    """The game on random pictures, by default whatever the model thinks of them; classes come in turn."""
    images, targets = pictures(count)
    targets, parts = options.pop("targets", targets), options.pop("parts", None)
    batch_size, mask = options.pop("batch_size", 32), options.pop("mask", None)
    return evaluate(
        model,
        images,
        targets,
        torch.zeros(count, SIZE, SIZE),
        parts,
        chosen("grid_pointing_game", **{"confidence": 0.0, **options}),
        explainer=Explainer(method, batch_size=batch_size),
        batch_size=batch_size,
        truth=Truth(mask=mask),
    )


def only(evaluation: Evaluation) -> Tensor:
    (value,) = evaluation.values.values()
    return value


def reasons(evaluation: Evaluation) -> tuple[str | None, ...]:
    (told,) = evaluation.reasons.values()
    return told


@pytest.mark.parametrize("method", ["input_x_gradient", "gradient"])
def test_agrees_with_its_slow_twin(cnn: Classifier, method: str) -> None:
    """One mosaic at a time, one class at a time."""
    images, targets = pictures(8)
    values = only(game(cnn, 8, method))
    members = mosaics_of(8).members
    assert members.shape == (2, 4)
    for mosaic in members.tolist():
        picture = torch.from_numpy(slow_mosaic(images[mosaic].numpy()))[None]
        for cell, image in enumerate(mosaic):
            map_ = attribute(cnn, picture, targets[image : image + 1], method=method)[0].double().numpy()
            positive = np.where(map_ > 0, map_, 0)
            if positive.sum():
                expected = positive[in_cell(cell)].sum() / positive.sum()
                assert float(values[image]) == pytest.approx(expected, abs=1e-4)
            else:
                assert values[image].isnan()
    assert values.isfinite().sum() >= 6


def test_a_class_agnostic_map_scores_exactly_a_quarter() -> None:
    values = only(game(tiny_vit(), 20, "attention_rollout"))
    members = mosaics_of(20).members
    assert values.isfinite().all()
    assert len(values.unique()) > 4
    torch.testing.assert_close(values[members].mean(dim=1), torch.full((5,), 0.25, dtype=torch.float64))


def test_a_class_agnostic_map_scores_exactly_a_ninth_in_nine_cells(cnn: Classifier) -> None:
    """Nine cells do not divide 32 pixels: their sizes differ, and what they share still adds up."""
    classes = torch.arange(18) % 9
    mosaics = arrange(torch.ones(18, dtype=torch.bool), classes, (SIZE, SIZE), 3, 0)
    assert torch.bincount(mosaics.cells.flatten()).tolist() == [100, 110, 110, 110, 121, 121, 110, 121, 121]
    map_ = torch.rand(1, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inside = mosaics.cells == torch.arange(9).view(-1, 1, 1)
    shares = SCORES["share"](map_.expand(9, -1, -1), Region(inside, ~inside))
    assert float(shares.mean()) == pytest.approx(1 / 9, abs=1e-15)


def test_a_constant_positive_map_scores_a_quarter_on_every_image() -> None:
    inside = mosaics_of(4).cells == torch.arange(4).view(-1, 1, 1)
    ones = torch.full((4, SIZE, SIZE), 3.7, dtype=torch.float64)
    for name in ("share", "region_attribution", "precision", "iou"):
        torch.testing.assert_close(SCORES[name](ones, Region(inside, ~inside)), torch.full((4,), 0.25).double())


def test_batch_size_changes_nothing(cnn: Classifier) -> None:
    for batch_size in (1, 3):
        torch.testing.assert_close(
            only(game(cnn, 9, batch_size=batch_size)), only(game(cnn, 9)), rtol=1e-5, atol=1e-6, equal_nan=True
        )


def test_the_seed_decides_who_stands_beside_whom(cnn: Classifier) -> None:
    again, other = only(game(cnn, 12)), only(game(cnn, 12, seed=1))
    torch.testing.assert_close(again, only(game(cnn, 12)), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(again.nan_to_num(), other.nan_to_num())
    assert not torch.equal(mosaics_of(12).members, mosaics_of(12, seed=1).members)


def test_images_without_a_mosaic_are_told_why(cnn: Classifier) -> None:
    left_over = game(cnn, 7)
    assert Counter(reasons(left_over))[NO_OTHERS] == 3
    assert reasons(game(cnn, 6, targets=torch.tensor([0, 1, 2, 0, 1, 2]))) == (NO_OTHERS,) * 6
    nobody = game(cnn, 8, confidence=1.0)
    assert set(reasons(nobody)) == {"the model is not confident in the target"}
    assert only(nobody).isnan().all()
    for score in SCORES:
        assert only(game(cnn, 3, score=score)).isnan().all()


def test_only_confident_images_play(cnn: Classifier) -> None:
    images, targets = pictures(30)
    with torch.no_grad():
        prob = cnn(images).softmax(1).gather(1, targets.view(-1, 1)).squeeze(1)
    threshold = float(prob.quantile(0.3))
    told = reasons(game(cnn, 30, confidence=threshold))
    shy = [one == "the model is not confident in the target" for one in told]
    assert shy == (prob < threshold).tolist()
    assert sum(shy) == 9
    assert told.count(None) > 8


def test_a_target_is_the_label_or_the_prediction_but_always_distinct(cnn: Classifier) -> None:
    targets = torch.tensor([0, 0, 0, 1, 2, 3])
    told = reasons(game(cnn, 6, targets=targets))
    assert sorted(told[:3], key=str).count(NO_OTHERS) == 2
    assert NO_OTHERS not in told[3:]


def test_part_methods_explain_the_parts_of_all_cells(cnn: Classifier) -> None:
    values = only(game(cnn, 8, "kl_hessian", parts=quarters(8)))
    assert values.isfinite().all()
    assert ((values > 0) & (values < 1)).all()
    members = mosaics_of(8).members
    # Without parts every image is one: what is scored are whole cells.
    whole = only(game(cnn, 8, "kl_hessian"))
    assert whole[members].isfinite().all()
    assert not torch.equal(whole, values)


def test_more_parts_than_can_be_named(cnn: Classifier) -> None:
    row, column = torch.arange(SIZE).view(-1, 1) // 4, torch.arange(SIZE).view(1, -1) // 2
    crowded = (row * 16 + column).repeat(8, 1, 1)
    members = mosaics_of(8).members
    parts = quarters(8).long()
    parts[members[0]] = crowded[members[0]]
    result = game(cnn, 8, "kl_hessian", parts=parts)
    assert {reasons(result)[image] for image in members[0]} == {"the mosaic has more than 254 parts"}
    assert {reasons(result)[image] for image in members[1]} == {None}
    assert set(reasons(game(cnn, 4, "kl_hessian", parts=crowded[:4]))) == {"the mosaic has more than 254 parts"}


def test_a_map_without_positive_relevance_is_no_answer() -> None:
    """The third class has the same logit everywhere, so that nothing speaks for it."""
    model = tiny_cnn()
    with torch.no_grad():
        model.module.fc.weight[2].fill_(0.0)
    told = reasons(game(model, 8))
    expected = "the map has no positive relevance"
    assert told == (None, None, expected, None, None, None, None, expected)


def test_a_model_that_gives_no_number_is_not_confident() -> None:
    model = tiny_cnn()
    with torch.no_grad():
        model.module.fc.weight[3].fill_(torch.nan)
    told = reasons(game(model, 4, targets=torch.tensor([0, 1, 2, 4])))
    assert set(told) == {"the model is not confident in the target"}


def test_a_mosaic_whose_map_is_not_finite_has_no_score() -> None:
    """Finite logits, and a gradient of one class beyond what the maps' float32 can hold."""
    model = tiny_cnn()
    with torch.no_grad():
        model.module.fc.weight[3].mul_(1e200)
    assert reasons(game(model, 4)) == (None, None, None, "the map is not finite")


def masks_of(count: int) -> Tensor:
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    masks[:, 8:24, 4:20], masks[:, 24:28] = 1, 255
    return masks


def test_the_object_inside_its_cell(cnn: Classifier) -> None:
    """Part-Quad: the region is the object; what is unknown in its own cell is left out, other cells are not."""
    images, targets = pictures(4)
    masks = masks_of(4)
    masks[1] = 0
    result = game(cnn, 4, "input_x_gradient", region="object", mask=masks)
    (members,) = mosaics_of(4).members.tolist()
    picture = torch.from_numpy(slow_mosaic(images[members].numpy()))[None]
    for cell, image in enumerate(members):
        if image == 1:
            assert reasons(result)[image] == "the mask is empty"
            continue
        map_ = attribute(cnn, picture, targets[image : image + 1], method="input_x_gradient")[0].double()
        positive = map_.clamp(min=0).numpy()
        own = positive[in_cell(cell)]
        known = positive.sum() - own[12:14].sum()
        assert float(only(result)[image]) == pytest.approx(own[4:12, 2:10].sum() / known, abs=1e-4)


def test_scores_of_one_game_share_its_explanations(cnn: Classifier) -> None:
    images, targets = pictures(8)
    model = tiny_cnn()
    passes: list[int] = []
    model.module.register_forward_hook(lambda _module, given, _out: passes.append(len(given[0])))
    game(model, 8)
    alone = sum(passes)
    wanted = [one for score in SCORES for one in chosen("grid_pointing_game", confidence=0.0, score=score)]
    maps = torch.zeros(8, SIZE, SIZE)
    result = evaluate(model, images, targets, maps, None, wanted, explainer=Explainer("input_x_gradient"))
    # Eight clean images and two mosaics.
    assert alone == 8 + 2
    assert sum(passes) == 2 * alone
    share = result.values["grid_pointing_game[confidence=0.0]"]
    ra = result.values["grid_pointing_game[confidence=0.0,score=region_attribution]"]
    assert float((share - ra).abs().nan_to_num().max()) > 0
    assert len(result.values) == len(SCORES)
    precision, recall, f1, iou = (
        result.values[f"grid_pointing_game[confidence=0.0,score={name}]"].nan_to_num()
        for name in ("precision", "recall", "f1", "iou")
    )
    torch.testing.assert_close(f1 * (precision + recall), 2 * precision * recall)
    torch.testing.assert_close(iou * (2 - f1), f1)


def test_options_and_needs_are_checked(cnn: Classifier) -> None:
    images, targets = pictures(4)
    maps = torch.zeros(4, SIZE, SIZE)
    with pytest.raises(UsageError, match="needs the method itself"):
        evaluate(cnn, images, targets, maps, None, chosen("grid_pointing_game"))
    with pytest.raises(UsageError, match="needs masks of objects: give Evidence a Truth with a mask"):
        game(cnn, 4, region="object")
    for options, message in (
        ({"side": 1}, "side: expected at least 2 cells, got 1"),
        ({"confidence": 1.5}, "confidence: expected a probability, got 1.5"),
        ({"region": "quad"}, "region: expected cell or object, got 'quad'"),
        ({"score": "mass"}, "score: expected share or region_attribution or"),
    ):
        with pytest.raises(UsageError, match=message):
            chosen("grid_pointing_game", **options)


@pytest.mark.shared
def test_real_pictures_are_found_in_their_cells(shared_data: Path) -> None:
    """Grad-CAM of a trained network finds the right photograph far more often than chance would."""
    spec = ModelSpec(
        "mobilenetv2_100",
        pretrained=False,
        checkpoint=str(shared_data / "models" / "mobilenetv2_100.safetensors"),
        create_args={"pad_type": "same"},
        transform={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"},
    )
    model = load_classifier(spec)
    prepare = create_transform(**model.data_config, is_training=False)
    files = sorted((shared_data / "imagenet-sample" / "images").glob("*/*.jpg"))[::62]
    images = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        targets = model(images).argmax(1)
    result = evaluate(
        model,
        images,
        targets,
        torch.zeros(len(images), *images.shape[2:]),
        None,
        chosen("grid_pointing_game"),
        explainer=Explainer("grad_cam"),
    )
    found = only(result)[only(result).isfinite()]
    assert len(found) >= 8
    assert float(found.mean()) > 0.45
