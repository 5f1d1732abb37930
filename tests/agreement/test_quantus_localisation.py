"""Agreement with Quantus on localisation, and each difference in what it calls by the same name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import quantus
import torch
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn
from xai_core.attribution.explainer import Explainer
from xai_core.metrics import Evaluation, Truth
from xai_core.metrics.localisation.mosaics import arrange, shrink

# What Quantus says of its own sizes and empty masks.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
MODEL = tiny_cnn()
#: Options under which Quantus measures the positive part of one map, as the papers do.
POSITIVE = {"abs": False, "positive_attributions": True}


def explained(count: int = 4) -> Tensor:
    """Random maps whose highest magnitude is 1."""
    maps = torch.randn(count, SIZE, SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return maps / maps.abs().amax(dim=(1, 2), keepdim=True)


def objects(count: int = 4) -> Tensor:
    """Masks of one rectangle each, of different sizes."""
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    for index, mask in enumerate(masks):
        mask[2 : 12 + 4 * index, 3 : 20 + index] = 1
    return masks


def theirs(metric: type, maps: Tensor, masks: Tensor, **options: Any) -> np.ndarray:
    images, targets = pictures(len(maps))
    peer = metric(**options, disable_warnings=True, display_progressbar=False)
    batch = {"x_batch": images.numpy(), "y_batch": targets.numpy(), "a_batch": maps.unsqueeze(1).numpy()}
    scores = peer(model=MODEL.module, **batch, s_batch=masks.unsqueeze(1).numpy(), channel_first=True)
    return np.array(scores, dtype=np.float64)


def ours(name: str, maps: Tensor, masks: Tensor, **options: Any) -> Evaluation:
    images, targets = pictures(len(maps))
    return evaluate(MODEL, images, targets, maps, None, chosen(name, **options), truth=Truth(mask=masks))


def values(name: str, maps: Tensor, masks: Tensor, **options: Any) -> np.ndarray:
    (found,) = ours(name, maps, masks, **options).values.values()
    return found.numpy()


def reasons(name: str, maps: Tensor, masks: Tensor, **options: Any) -> tuple[str | None, ...]:
    (told,) = ours(name, maps, masks, **options).reasons.values()
    return told


def test_pointing_game_without_tolerance_agrees() -> None:
    maps, masks = explained(40), objects().repeat(10, 1, 1)
    hits = theirs(quantus.PointingGame, maps, masks)
    assert 0 < hits.mean() < 1
    np.testing.assert_array_equal(values("pointing_game", maps, masks, tolerance=0), hits)


def test_attribution_localisation_agrees_on_the_positive_part() -> None:
    maps, masks = explained(), objects()
    # They add 1e-9 to the sum of all relevance.
    np.testing.assert_allclose(
        values("attribution_localisation", maps, masks),
        theirs(quantus.AttributionLocalisation, maps, masks, **POSITIVE),
        rtol=1e-9,
    )


def test_relevance_mass_accuracy_is_attribution_localisation_of_positive_maps() -> None:
    maps, masks = explained().abs(), objects()
    mass = theirs(quantus.RelevanceMassAccuracy, maps, masks)
    np.testing.assert_allclose(values("attribution_localisation", maps, masks), mass, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 50, 600])
def test_top_k_intersection_agrees(k: int) -> None:
    maps, masks = explained(), objects()
    top = theirs(quantus.TopKIntersection, maps, masks, k=k)
    np.testing.assert_allclose(values("top_k_intersection", maps, masks, k=k), top, rtol=1e-12)


def test_relevance_rank_accuracy_is_top_k_intersection_with_the_objects_size() -> None:
    maps, masks = explained(), objects()
    rank = theirs(quantus.RelevanceRankAccuracy, maps, masks)
    for index in range(len(maps)):
        one, k = slice(index, index + 1), int(masks[index].sum())
        assert values("top_k_intersection", maps[one], masks[one], k=k)[0] == pytest.approx(rank[index], rel=1e-12)


def test_focus_is_the_share_of_the_grid_pointing_game() -> None:
    """On our mosaics and maps of them; Focus makes none."""
    images, targets = pictures(8)
    explainer = Explainer("input_x_gradient")
    maps = torch.zeros(8, SIZE, SIZE)
    wanted = chosen("grid_pointing_game", confidence=0.0)
    (found,) = evaluate(MODEL, images, targets, maps, None, wanted, explainer=explainer).values.values()
    mosaics = arrange(torch.ones(8, dtype=torch.bool), targets, (SIZE, SIZE), 2, 0)
    pixels = mosaics.assemble(lambda rows, size: shrink(images[rows], size))
    explained = explainer.class_maps(MODEL, pixels, targets[mosaics.members], None)
    for index, members in enumerate(mosaics.members):
        peer = quantus.Focus(disable_warnings=True, display_progressbar=False)(
            model=MODEL.module,
            x_batch=pixels[index : index + 1].repeat(4, 1, 1, 1).numpy(),
            y_batch=targets[members].numpy(),
            a_batch=explained[index].unsqueeze(1).double().numpy(),
            custom_batch=np.eye(4),
            channel_first=True,
        )
        np.testing.assert_allclose(found[members].numpy(), np.array(peer), rtol=1e-8)


def test_an_empty_mask_is_a_hit_in_their_pointing_game() -> None:
    """They write NaN into an array of truth values, where NaN is true."""
    maps, masks = explained(), objects()
    masks[2] = 0
    assert theirs(quantus.PointingGame, maps, masks)[2] == 1.0
    assert np.isnan(values("pointing_game", maps, masks, tolerance=0)[2])
    assert reasons("pointing_game", maps, masks, tolerance=0)[2] == "the mask is empty"


def test_a_constant_map_is_a_hit_in_their_pointing_game() -> None:
    """Any of the highest pixels will do for them; constant maps are refused where the whole batch is constant."""
    maps, masks = explained(3), objects(3)
    maps[0], maps[1, 20:] = 0.5, 0.0
    maps[1, :20] = 1.0
    assert theirs(quantus.PointingGame, maps, masks)[:2].tolist() == [1.0, 1.0]
    assert reasons("pointing_game", maps, masks, tolerance=0)[:2] == ("the map is constant", None)
    assert values("pointing_game", maps, masks, tolerance=0)[1] == pytest.approx(14 * 18 / 640)
    with pytest.raises(AssertionError, match="uniformly distributed"):
        theirs(quantus.PointingGame, maps[:1], masks[:1])


def test_their_pointing_game_knows_no_tolerance() -> None:
    maps, masks = torch.zeros(1, SIZE, SIZE, dtype=torch.float64), objects(1)
    maps[0, 4, 22] = 1.0
    assert theirs(quantus.PointingGame, maps, masks).tolist() == [0.0]
    assert values("pointing_game", maps, masks, tolerance=3).tolist() == [1.0]


def test_their_weighted_pointing_game_cannot_run() -> None:
    maps, masks = objects().double(), objects()
    with pytest.raises(TypeError, match="boolean array indexing assignment"):
        theirs(quantus.PointingGame, maps, masks, weighted=True)


def test_their_attribution_localisation_counts_what_speaks_against() -> None:
    """The absolute value is their default: relevance against the class on the object counts for it."""
    masks = objects(1)
    maps = torch.where(masks == 1, -3.0, 1.0).double()
    inside, outside = 170.0, SIZE * SIZE - 170.0
    assert theirs(quantus.AttributionLocalisation, maps, masks) == pytest.approx(
        3 * inside / (3 * inside + outside)
    )
    assert values("attribution_localisation", maps, masks).tolist() == [0.0]


def test_their_attribution_localisation_depends_on_the_other_maps() -> None:
    """They scale by the highest magnitude of the batch and add 1e-9: a faint map beside a strong one loses."""
    maps, masks = explained(2), objects(2)
    faint = maps * torch.tensor([1e-12, 1.0]).view(2, 1, 1)
    alone = theirs(quantus.AttributionLocalisation, faint[:1], masks[:1], **POSITIVE)[0]
    beside = theirs(quantus.AttributionLocalisation, faint, masks, **POSITIVE)[0]
    assert beside < 0.5 * alone
    found = values("attribution_localisation", faint, masks)
    assert found[0] == pytest.approx(alone, rel=1e-6)
    assert found[0] == pytest.approx(values("attribution_localisation", maps, masks)[0], rel=1e-12)


def test_their_weight_is_the_objects_share_of_all_images_but_two() -> None:
    """The size is taken of ``x_batch[2:]``, the images from the third on: it grows with the batch, 0 for two."""
    maps, masks = explained(), objects()
    shares = theirs(quantus.AttributionLocalisation, maps, masks, **POSITIVE)
    weighted = theirs(quantus.AttributionLocalisation, maps, masks, weighted=True, **POSITIVE)
    pixels = masks.flatten(1).sum(dim=1).numpy()
    np.testing.assert_allclose(weighted / shares, pixels / (2 * 3 * SIZE * SIZE), rtol=1e-9)
    two = theirs(quantus.AttributionLocalisation, maps[:2], masks[:2], weighted=True, **POSITIVE)
    assert np.isinf(two).all()


def test_a_map_of_zeros_is_wrong_to_them_and_nothing_to_us() -> None:
    maps, masks = explained(3), objects(3)
    maps[0] = 0.0
    assert theirs(quantus.AttributionLocalisation, maps, masks)[0] == 0.0
    assert reasons("attribution_localisation", maps, masks)[0] == "the map has no positive relevance"


def test_their_mass_accuracy_of_signed_maps_is_no_share() -> None:
    """Relevance for and against cancels in the denominator."""
    masks = objects(1)
    maps = torch.where(masks == 1, 6.0, -1.0).double()
    inside, outside = 170.0, SIZE * SIZE - 170.0
    mass = theirs(quantus.RelevanceMassAccuracy, maps, masks)
    assert mass == pytest.approx(6 * inside / (6 * inside - outside))
    assert mass > 1
    assert values("attribution_localisation", maps, masks).tolist() == [1.0]


def test_their_top_k_breaks_ties_by_position() -> None:
    """Five pixels stand out and none is on the object; the other 45 places go to wherever the sort puts them."""
    maps = torch.zeros(2, SIZE, SIZE, dtype=torch.float64)
    maps[:, 16, 10:15] = 1.0
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    masks[0, :16], masks[1, 17:] = 1, 1
    above, below = theirs(quantus.TopKIntersection, maps, masks, k=50)
    assert abs(above - below) > 0.1
    even = 45 / 50 * masks.flatten(1).sum(dim=1).numpy() / (SIZE * SIZE - 5)
    np.testing.assert_allclose(values("top_k_intersection", maps, masks, k=50), even)


def test_a_constant_map_has_a_top_in_their_top_k_intersection() -> None:
    maps, masks = explained(3), objects(3)
    maps[0] = 0.5
    assert np.isfinite(theirs(quantus.TopKIntersection, maps, masks, k=50)).all()
    assert reasons("top_k_intersection", maps, masks, k=50) == ("the map is constant", None, None)


def test_they_know_no_unknown_pixels() -> None:
    """Whoever measures by Quantus has to call them object or background, and gets two other numbers."""
    maps, masks = explained(2).abs(), objects(2)
    masks[:, 14:20] = 255
    with pytest.raises(AssertionError, match="should contain only"):
        theirs(quantus.RelevanceMassAccuracy, maps, masks)
    as_background = theirs(quantus.RelevanceMassAccuracy, maps, masks * (masks != 255))
    as_object = theirs(quantus.RelevanceMassAccuracy, maps, (masks != 0).to(masks))
    found = values("attribution_localisation", maps, masks)
    assert (as_background < found).all()
    assert (found < as_object).all()


@pytest.mark.parametrize("peer", [quantus.AttributionLocalisation, quantus.TopKIntersection])
def test_an_empty_mask_is_no_number_elsewhere_either(peer: type) -> None:
    maps, masks = explained(2), objects(2)
    masks[1] = 0
    options = {"k": 50} if peer is quantus.TopKIntersection else {}
    assert np.isnan(theirs(peer, maps, masks, **options)).tolist() == [False, True]
