"""Interlayer concept insertion and deletion against a loop that removes concept after concept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.concepts.graphs import ATOMS, IMAGES, Case, alignment, case
from tests.xai_core.tiny import pictures
from xai_core.concepts.graph import NO_CONCEPT, Alignment, Attribution, InterlayerCurves, interlayer_curves
from xai_core.errors import UsageError

NAMES = ("cnn", "vit")
TARGETS = torch.tensor([[2, 0], [1, NO_CONCEPT], [0, 4]])


def _curves(
    one: Case, steps: int, batch_size: int = 32, **attributions: dict | None
) -> dict[str, InterlayerCurves]:
    return interlayer_curves(
        one.model,
        pictures(IMAGES)[0],
        *one.layers,
        one.dictionaries,
        attributions,
        targets=TARGETS,
        steps=steps,
        batch_size=batch_size,
    )


def _twin(
    one: Case, question: Alignment, image: int, target: int, ranking: Tensor, steps: int
) -> tuple[list, list]:
    """Curves of one image and target: every step's concepts set to 0 in the codes, through the network by hand."""
    source, atom = question.source, question.target.atoms[int(TARGETS[image, target])]
    present = source.active[image].nonzero().flatten().tolist()
    present.sort(key=lambda concept: -float(ranking[concept]))

    def alignment_with(kept: list[int]) -> float:
        codes = torch.zeros_like(source.codes[image])
        codes[:, kept] = source.codes[image][:, kept]
        reached = one.between(codes @ source.atoms + source.offset)
        return max(float(torch.cosine_similarity(vector, atom, dim=0)) for vector in reached)

    baseline = alignment_with(present)
    deletion, insertion = [], []
    for step in range(steps + 1):
        taken = [concept for rank, concept in enumerate(present) if rank * steps < step * len(present)]
        rest = [concept for concept in present if concept not in taken]
        deletion.append(alignment_with(rest) / baseline)
        insertion.append(alignment_with(taken) / baseline)
    return deletion, insertion


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 4, 12])
def test_curves_equal_a_loop_over_steps(name: str, steps: int) -> None:
    one = case(name)
    found = _curves(one, steps, gradient_x_input=None)["gradient_x_input"]
    question = alignment(one, TARGETS)
    ranking = Attribution.of("gradient_x_input")(question, None, 32)
    assert found.deletion.shape == found.insertion.shape == (IMAGES, 2, steps + 1)
    for image in range(IMAGES):
        for target in range(2):
            if TARGETS[image, target] == NO_CONCEPT:
                assert found.undefined[image, target] and found.deletion[image, target].isnan().all()
                continue
            assert not found.undefined[image, target]
            twin = _twin(one, question, image, target, ranking[image, :, target], steps)
            for curve, expected in zip((found.deletion, found.insertion), twin, strict=True):
                torch.testing.assert_close(curve[image, target], torch.tensor(expected, dtype=torch.float64))
    assert found.deletion[0, 0, 0] == 1 and found.insertion[0, 0, -1] == 1


def test_areas_are_the_trapezoidal_means() -> None:
    found = _curves(case("cnn"), 4, gradient_x_input=None)["gradient_x_input"]
    for curve, area in ((found.deletion, found.deletion_area), (found.insertion, found.insertion_area)):
        expected = ((curve[..., 1:] + curve[..., :-1]) / 2).mean(dim=2)
        torch.testing.assert_close(area, expected, equal_nan=True)


def test_attributions_share_targets_and_do_not_depend_on_the_batch() -> None:
    wanted = {"integrated_gradients": {"steps": 3}, "kernel_shap": {"samples": 30}, "lrp": None}
    whole, small = _curves(case("vit"), 5, 64, **wanted), _curves(case("vit"), 5, 1, **wanted)
    assert list(whole) == list(wanted)
    for name in wanted:
        for one, other in zip(vars(whole[name]).values(), vars(small[name]).values(), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
    assert torch.equal(whole["lrp"].deletion[0, 0, 0], whole["kernel_shap"].deletion[0, 0, 0])


def test_a_number_of_targets_means_those_with_the_largest_coefficients() -> None:
    one = case("cnn")
    images, attributions = pictures(IMAGES)[0], {"lrp": None}
    found = interlayer_curves(one.model, images, *one.layers, one.dictionaries, attributions, targets=2, steps=2)[
        "lrp"
    ]
    strength = alignment(one, TARGETS).target.codes.sum(dim=1)
    expected = strength.argsort(dim=1, descending=True)[:, :2]
    present = found.targets != NO_CONCEPT
    assert present.any()
    assert torch.equal(found.targets[present], expected[present])
    assert (strength.gather(1, expected)[~present] <= 0).all()


def test_a_target_that_the_image_does_not_align_with_is_undefined() -> None:
    one = case("cnn")
    against = -alignment(one, TARGETS).between.reached.flatten(2).mean(dim=(0, 2))
    atoms = torch.cat([one.dictionaries["layer2"].atoms, against[None].float() * 100])
    away = {**one.dictionaries, "layer2": type(one.dictionaries["layer2"])(atoms, torch.ones(len(atoms)).long())}
    images = pictures(IMAGES)[0]
    found = interlayer_curves(
        one.model,
        images,
        *one.layers,
        away,
        {"gradient_x_input": None},
        targets=torch.tensor([[len(atoms) - 1, 0]] * IMAGES),
        steps=2,
    )["gradient_x_input"]
    undefined = found.undefined[:, 0]
    assert torch.equal(found.deletion[:, 0].isnan().all(dim=1), undefined)
    assert torch.equal(found.insertion_area[:, 0].isnan(), undefined)
    assert undefined.any() and not found.undefined[:, 1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "expected at least 1 step"),
        ({"attributions": {}}, "expected at least 1 step and 1 attribution"),
        ({"attributions": {"shap": None}}, "unknown attribution of coefficients 'shap'"),
        ({"targets": 0}, "targets: expected at least 1 concept"),
        ({"targets": torch.full((IMAGES, 1), ATOMS)}, f"targets: expected concepts .* below {ATOMS}"),
        ({"targets": torch.zeros(1, 1).long()}, "targets: expected concepts"),
        ({"target": "layer1", "source": "layer2"}, "expected a layer behind 'layer2'"),
        ({"target": "layer3"}, "dictionaries: expected one for each layer, got none for layer3"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict, message: str) -> None:
    one = case("cnn")
    request = {"source": "layer1", "target": "layer2", "attributions": {"lrp": None}, **change}
    with pytest.raises(UsageError, match=message):
        interlayer_curves(one.model, pictures(IMAGES)[0], dictionaries=one.dictionaries, **request)
