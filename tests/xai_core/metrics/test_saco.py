"""SaCo against a slow numpy twin of the paper's algorithm, and where it has no value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.metrics.test_faithfulness_correlation import (
    contributions,
    linear_classifier,
    maps_of,
    without_head,
)
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn, tiny_vit
from xai_core.errors import UsageError
from xai_core.metrics.perturbation.saco import coefficient
from xai_core.models import Classifier


def probability(model: Classifier, image: Tensor, target: int) -> float:
    with torch.no_grad():
        return float(model(image[None]).softmax(dim=1)[0, target])


def slow(model: Classifier, image: Tensor, target: int, map_: Tensor, groups: int, use_sums: bool) -> float:
    """The paper's loops; ``use_sums`` has its sums of salience, which are means up to a factor if K divides d."""
    order = sorted(range(SIZE * SIZE), key=lambda pixel: (-float(map_.flatten()[pixel]), pixel))
    mean_pixel = image.flatten(1).mean(dim=1)
    clean = probability(model, image, target)
    salience, effect = [], []
    for group in range(groups):
        members = [pixel for rank, pixel in enumerate(order) if rank * groups // (SIZE * SIZE) == group]
        perturbed = image.clone()
        for pixel in members:
            perturbed[:, pixel // SIZE, pixel % SIZE] = mean_pixel
        total = sum(float(map_.flatten()[pixel]) for pixel in members)
        salience.append(total if use_sums else total / len(members))
        effect.append(clean - probability(model, perturbed, target))
    value = weights = 0.0
    for i in range(groups - 1):
        for j in range(i + 1, groups):
            weight = salience[i] - salience[j] if effect[i] >= effect[j] else -(salience[i] - salience[j])
            value += weight
            weights += abs(weight)
    return value / weights


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
@pytest.mark.parametrize(("groups", "use_sums"), [(8, True), (10, False), (3, False)])
def test_it_agrees_with_a_slow_twin(build, groups: int, use_sums: bool) -> None:  # type: ignore[no-untyped-def]
    model = build()
    images, targets = pictures(2)
    maps = maps_of(2)
    (values,) = evaluate(
        model, images, targets, maps, None, chosen("saco", groups=groups), batch_size=5
    ).values.values()
    for b in range(2):
        expected = slow(model, images[b], int(targets[b]), maps[b], groups, use_sums)
        assert float(values[b]) == pytest.approx(expected, abs=1e-9)


def test_coefficient_by_hand() -> None:
    salience = torch.tensor([[3.0, 1.0, 0.0]]).double().expand(5, -1)
    effect = torch.tensor(
        [[0.3, 0.2, 0.1], [0.1, 0.2, 0.3], [0.1, 0.2, 0.0], [0.1, 0.1, 0.2], [0.1, float("nan"), 0.2]]
    ).double()
    # Differences 2, 3 and 1 of the pairs (0, 1), (0, 2) and (1, 2); an equal effect is no contradiction.
    expected = torch.tensor([1.0, -1.0, (-2 + 3 + 1) / 6, (2 - 3 - 1) / 6, float("nan")]).double()
    torch.testing.assert_close(coefficient(salience, effect), expected, equal_nan=True)


def test_a_linear_models_contributions_are_perfectly_faithful() -> None:
    model = linear_classifier()
    images, _ = pictures(3)
    # Of two classes, one without weights, the probability moves with the other's logit alone.
    with torch.no_grad():
        model.module[1].weight[1:] = 0
    targets = torch.zeros(3, dtype=torch.long)
    exact = contributions(model, images - images.mean(dim=(2, 3), keepdim=True), targets)
    result = evaluate(model, images, targets, exact, None, chosen("saco", groups=8)).values
    torch.testing.assert_close(result["saco[groups=8]"], torch.ones(3, dtype=torch.float64), rtol=0, atol=0)
    opposite = evaluate(model, images, targets, -exact, None, chosen("saco", groups=8)).values
    torch.testing.assert_close(opposite["saco[groups=8]"], -torch.ones(3, dtype=torch.float64), rtol=0, atol=0)


def test_groups_of_unequal_size_keep_their_order() -> None:
    # 1024 pixels in 10 groups: by sums, a group of 103 would pass for more salient than one of 102 above it.
    model, (images, targets) = tiny_vit(), pictures(2)
    maps = maps_of(2).double()
    plain = evaluate(model, images, targets, maps, None, chosen("saco")).values["saco"]
    raised = evaluate(model, images, targets, maps + 1000, None, chosen("saco")).values["saco"]
    torch.testing.assert_close(raised, plain, rtol=0, atol=1e-9)
    by_sums = slow(model, images[0], int(targets[0]), maps[0] + 1000, 10, use_sums=True)
    assert abs(by_sums - float(plain[0])) > 0.1


def test_one_forward_a_group_and_one_for_the_image() -> None:
    model, (images, targets) = tiny_vit(), pictures(3)
    forwarded = []
    model.module.register_forward_hook(lambda _module, inputs, _output: forwarded.append(len(inputs[0])))
    evaluate(model, images, targets, maps_of(3), None, chosen("saco"), batch_size=4)
    assert sum(forwarded) == 3 * (10 + 1)
    assert max(forwarded) == 4


def test_null_reasons() -> None:
    model, (images, targets) = tiny_vit(), pictures(3)
    maps = maps_of(3)
    maps[1] = 0.3
    maps[2, 0, 0] = float("nan")
    result = evaluate(model, images, targets, maps, None, chosen("saco"))
    assert result.reasons["saco"] == (None, "the map is constant", "the map is not finite")
    assert result.values["saco"].isnan().tolist() == [False, True, True]
    deaf = evaluate(without_head(tiny_vit()), images[:1], targets[:1], maps[:1], None, chosen("saco"))
    assert deaf.reasons["saco"] == ("all groups have the same effect",)


def test_a_model_without_an_answer_is_broken_not_undefined() -> None:
    model, (images, targets) = tiny_vit(), pictures(2)
    images[1] = float("nan")
    result = evaluate(model, images, targets, maps_of(2), None, chosen("saco"))
    assert result.broken["saco"].tolist() == [False, True]
    assert result.reasons["saco"] == (None, None)


def test_options_are_checked() -> None:
    for groups in (1, 255):
        with pytest.raises(UsageError, match=f"groups: expected a number from 2 to 254, got {groups}"):
            chosen("saco", groups=groups)
    with pytest.raises(UsageError, match="groups: expected at most the image's 4 pixels, got 10"):
        evaluate(
            tiny_vit(), torch.zeros(1, 3, 2, 2), torch.zeros(1).long(), torch.zeros(1, 2, 2), None, chosen("saco")
        )
