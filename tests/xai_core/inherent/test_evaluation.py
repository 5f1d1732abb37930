"""Tables 4 and 5, sparsity, semanticity and reproducibility against slow twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.xai_core.inherent.small import GRID, PATCH, SIDE, built, bytes_of, labels_of
from xai_core.errors import UsageError
from xai_core.inherent.evaluation import THRESHOLDS, evaluate
from xai_core.inherent.reproducibility import reproducibility

ARGUMENTS: dict[str, dict[str, object]] = {"ia": {}, "ea": {}, "pa": {"threshold": 0.4}}


@pytest.mark.parametrize("kind", ["ia", "ea", "pa"])
def test_accuracy_by_threshold_one_patch_and_picture_at_a_time(kind: str) -> None:
    model = built(kind, **ARGUMENTS[kind])
    pictures, labels = bytes_of(9), labels_of(9)
    thresholds = (0.0, 0.3, 0.6, 1.0)
    found = {
        (row.direction, row.threshold): row
        for row in evaluate(model, pictures, labels, thresholds=thresholds, batch_size=4).thresholds
    }
    assert len(found) == 9
    differing = set()
    for direction in ("insertion", "deletion"):
        for threshold in thresholds:
            right = hidden = 0
            for picture, label in zip(pictures, labels.tolist(), strict=True):
                image = model.normalise(picture[None].float() / 255)
                with torch.no_grad():
                    importance, values = model.module.weigh(image)
                    masked, side = values.clone(), values.shape[-1] // GRID
                    for row in range(GRID):
                        for column in range(GRID):
                            a = float(importance[0, row, column])
                            if a < threshold if direction == "insertion" else a >= threshold:
                                hidden += 1
                                rows = slice(side * row, side * (row + 1))
                                masked[0, :, rows, side * column : side * (column + 1)] = 0
                    right += int(model.module.decide(masked).argmax()) == label
            got = found[direction, threshold]
            assert got.images == 9
            assert got.accuracy == pytest.approx(right / 9)
            assert got.masked == pytest.approx(hidden / 9 / GRID**2)
            differing.add(got.masked)
    assert len(differing) > 4
    with torch.no_grad():
        own = (model(model.normalise(pictures.float() / 255)).argmax(dim=1) == labels).double().mean()
    assert found["own", None].accuracy == pytest.approx(float(own))
    assert (found["own", None].masked > 0) == (kind == "pa")


def test_both_directions_hide_complements_and_batches_change_nothing() -> None:
    model = built("ea")
    one, two = (evaluate(model, bytes_of(7), labels_of(7), batch_size=size) for size in (3, 64))
    assert one.thresholds == two.thresholds
    torch.testing.assert_close(one.importance, two.importance)
    inserted, deleted = one.thresholds[1:12], one.thresholds[12:]
    assert [row.threshold for row in inserted] == [row.threshold for row in deleted] == list(THRESHOLDS)
    for shown, hidden in zip(inserted, deleted, strict=True):
        assert shown.masked + hidden.masked == pytest.approx(1)
    assert inserted[0] == type(inserted[0])("insertion", 0.0, one.thresholds[0].accuracy, 0.0, 7)


def slow_semanticity(importance: Tensor, masks: Tensor) -> tuple[float, float]:
    """d and the macro IoU, patch by patch."""
    difference, overlaps = 0.0, []
    for a, mask in zip(importance, masks, strict=True):
        hits = {True: [0, 0], False: [0, 0]}
        for row in range(GRID):
            for column in range(GRID):
                patch = mask[PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
                share = float((patch == 1).sum()) / float((patch != 255).sum())
                difference += abs(share - float(a[row, column]))
                for inside in (True, False):
                    pair = (float(a[row, column]) >= 0.5) == inside, (share >= 0.5) == inside
                    hits[inside][0] += all(pair)
                    hits[inside][1] += any(pair)
        overlaps.append(sum(both / either for both, either in hits.values()) / 2)
    return difference / len(masks) / GRID**2, sum(overlaps) / len(masks)


@pytest.mark.parametrize("kind", ["ia", "pa"])
def test_sparsity_and_semanticity_from_their_equations(kind: str) -> None:
    model = built(kind, **ARGUMENTS[kind])
    generator = torch.Generator().manual_seed(6)
    masks = torch.randint(0, 2, (7, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    masks[:, :6, :9] = 1
    masks[:, 9:, 5:] = 0
    masks[:, 3, 3] = 255
    found = evaluate(model, bytes_of(7), labels_of(7), masks, batch_size=3)
    rows = {row.metric: row for row in found.semanticity}
    importance = found.importance.double()
    with torch.no_grad():
        blank = model.module.weigh(torch.zeros(1, 3, SIDE, SIDE))[0].double().expand_as(importance)
    assert rows["sparsity"].value == pytest.approx(float(importance.mean()))
    for prefix, maps in (("", importance), ("blank_", blank)):
        difference, overlap = slow_semanticity(maps, masks)
        assert rows[f"{prefix}segmentation_difference"].value == pytest.approx(difference)
        assert rows[f"{prefix}macro_iou"].value == pytest.approx(overlap)
        assert rows[f"{prefix}macro_iou"].images == 7
    alike = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(importance, blank, strict=True)]
    assert rows["blank_correlation"].value == pytest.approx(np.mean(alike))
    assert -0.9 < np.mean(alike) < 0.999
    assert rows["macro_iou"].value != pytest.approx(rows["blank_macro_iou"].value)


def test_an_importance_without_a_highest_place_correlates_with_nothing() -> None:
    model = built("ia")
    with torch.no_grad():
        for name, parameter in model.module.importance_net.named_parameters():
            if name.startswith("fc"):
                parameter.zero_()
    found = evaluate(model, bytes_of(2), labels_of(2))
    assert torch.equal(found.importance, torch.full_like(found.importance, 0.5))
    assert found.scores["blank_correlation"].isnan().all()
    assert set(found.reasons["blank_correlation"]) == {
        "the importance of the picture or of a blank one is the same everywhere"
    }


def test_reproducibility_is_the_mean_deviation_between_trainings() -> None:
    runs = [
        evaluate(built("ia", seed=seed, lively=False), bytes_of(4), labels_of(4)).importance for seed in (0, 1, 2)
    ]
    total = 0.0
    for values in torch.stack(runs, dim=-1).view(-1, 3).double():
        mean = sum(values) / 3
        total += float((sum((value - mean) ** 2 for value in values) / 2) ** 0.5)
    assert reproducibility(runs) == pytest.approx(total / runs[0].numel())
    assert reproducibility([runs[0], runs[0]]) == 0
    assert reproducibility(runs) > 0
    with pytest.raises(UsageError, match="at least 2 trainings, got 1"):
        reproducibility(runs[:1])
    with pytest.raises(UsageError, match="the same patches"):
        reproducibility([runs[0], runs[0][:2]])


def test_what_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(UsageError, match=r"PA\(p, 0\) has none"):
        evaluate(built("pa"), bytes_of(), labels_of())
    with pytest.raises(UsageError, match="threshold: expected a number from 0 to 1, got 2"):
        evaluate(built("ia"), bytes_of(), labels_of(), thresholds=(0.5, 2))
