"""HU-MCD: its clustering, its masking and its completeness relation against loops written from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from tests.xai_core.tiny import SIZE, pictures, quarters, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.attribution import attribute, fit_method, score_parts
from xai_core.attribution.concept_methods import segment_masking
from xai_core.attribution.concept_methods.hu_mcd import HuMcdOptions, segment_relevance
from xai_core.attribution.concept_methods.segment_masking import (
    head_weights,
    pad_from_neighbours,
    segment_features,
)
from xai_core.concepts.subspaces import (
    Subspaces,
    completeness,
    decompose,
    find_subspaces,
    principal_directions,
    self_representation,
)
from xai_core.errors import UsageError

MODELS = {"cnn": tiny_cnn, "relu_cnn": tiny_relu_cnn, "vit": tiny_vit}
every_model = pytest.mark.parametrize("family", MODELS)
OPTIONS = {"min_size": 2, "concept_count": 3}


def planted(members: int = 12) -> tuple[Tensor, Tensor]:
    """Vectors in two planes of a space of six dimensions, and the plane of each."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.zeros(2 * members, 6, dtype=torch.float64)
    vectors[:members, :2] = torch.randn(members, 2, generator=generator, dtype=torch.float64)
    vectors[members:, 3:5] = torch.randn(members, 2, generator=generator, dtype=torch.float64)
    return vectors, torch.arange(2).repeat_interleave(members)


def oblique() -> Subspaces:
    """Two concepts, of two directions and of one, that are not orthogonal to each other."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.nn.functional.normalize(torch.randn(3, 6, generator=generator, dtype=torch.float64), dim=1)
    return Subspaces(basis, torch.tensor([0, 0, 1]))


def test_self_representation_is_the_lasso_of_each_vector_in_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(9, 5, generator=generator, dtype=torch.float64), dim=1)
    codes = self_representation(unit, 20.0)
    assert not codes.diagonal().any()
    for index in range(9):
        rest = [other for other in range(9) if other != index]
        penalty = (unit[rest] @ unit[index]).abs().max().item() / 20
        lasso = Lasso(alpha=penalty / 5, fit_intercept=False, tol=1e-12, max_iter=100_000)
        expected = lasso.fit(unit[rest].T.numpy(), unit[index].numpy()).coef_
        np.testing.assert_allclose(codes[index, rest], expected, atol=1e-5)


def test_planted_subspaces_are_found() -> None:
    vectors, plane = planted()
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(1))
    found = find_subspaces(vectors[order], concepts=2, sparsity=50.0, variance=0.99, min_size=5, seed=0)
    assert found.count == 2
    assert len(found.basis) == 4
    for concept in range(2):
        used = found.basis[found.owner == concept].abs().sum(dim=0) > 1e-9
        assert used.tolist() in (
            [True, True, False, False, False, False],
            [False, False, False, True, True, False],
        )
    lengths = decompose(vectors, found).components.norm(dim=2)
    assert len({tuple(pair) for pair in torch.stack([lengths.argmax(dim=1), plane], dim=1).tolist()}) == 2


def test_small_clusters_and_clusters_of_one_vector_are_no_concepts() -> None:
    vectors, _ = planted(4)
    shared = {"concepts": 2, "sparsity": 50.0, "variance": 0.8, "seed": 0}
    assert find_subspaces(vectors, **shared, min_size=5).count == 0
    same = torch.ones(6, 4, dtype=torch.float64)
    assert find_subspaces(same, **shared, min_size=2).count == 0
    bad = torch.cat([vectors, torch.full((2, 6), torch.nan, dtype=torch.float64), torch.zeros(2, 6)])
    assert find_subspaces(bad, **shared, min_size=2).count == find_subspaces(vectors, **shared, min_size=2).count


def test_principal_directions_hold_the_share_of_the_variance() -> None:
    points = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    points = torch.cat([points, -points])  # Variances as 9 : 4 : 1.
    assert [len(principal_directions(points, share)) for share in (0.5, 0.64, 0.65, 0.93, 1.0)] == [1, 1, 2, 3, 3]


def test_a_decomposition_is_the_solution_of_the_whole_system_and_adds_up() -> None:
    subspaces = oblique()
    generator = torch.Generator().manual_seed(6)
    vectors = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    found = decompose(vectors, subspaces)
    torch.testing.assert_close(found.components.sum(dim=1) + found.complement, vectors)
    torch.testing.assert_close(found.complement @ subspaces.basis.T, torch.zeros(4, 3, dtype=torch.float64))
    beyond = np.linalg.svd(subspaces.basis.numpy())[2][3:]
    system = np.concatenate([subspaces.basis.numpy(), beyond])
    for index in range(4):
        coefficients = np.linalg.solve(system.T, vectors[index].numpy())
        for concept in range(2):
            rows = (subspaces.owner == concept).numpy()
            expected = coefficients[:3][rows] @ subspaces.basis.numpy()[rows]
            np.testing.assert_allclose(found.components[index, concept], expected, rtol=1e-9)


def test_completeness_is_one_inside_the_span_and_zero_across() -> None:
    subspaces = oblique()
    inside = subspaces.basis[0] - 2 * subspaces.basis[2]
    across = decompose(torch.ones(1, 6, dtype=torch.float64), subspaces).complement[0]
    half = inside / inside.norm() + across / across.norm()
    shares = completeness(torch.stack([inside, across, half]), subspaces)
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))


@every_model
def test_relevances_complement_and_bias_add_up_to_the_masked_images_logit(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(4)
    fitted = fit_method(model, images, targets, method="hu_mcd", options=OPTIONS, parts=quarters(4))
    subspaces = Subspaces(fitted["basis"], fitted["owner"])
    assert subspaces.count > 0
    masks = quarters(4) == 1
    with torch.no_grad():
        features, logits = segment_features(model, images, masks)
    weights, bias = head_weights(model)
    assert bias is not None
    found = segment_relevance(features, weights[targets], subspaces)
    total = found.relevance.sum(dim=1) + found.complement + bias[targets]
    torch.testing.assert_close(total, logits.gather(1, targets.view(-1, 1)).squeeze(1))
    assert ((fitted["completeness"] >= 0) & (fitted["completeness"] <= 1)).all()


@every_model
def test_a_mask_of_everything_masks_nothing(family: str) -> None:
    model = MODELS[family]()
    images, _ = pictures(2)
    with torch.no_grad():
        _, logits = segment_features(model, images, torch.ones(2, SIZE, SIZE, dtype=torch.bool))
        torch.testing.assert_close(logits, model(images))


@pytest.mark.parametrize("family", ["cnn", "relu_cnn"])
def test_pixels_outside_a_segment_change_nothing(family: str) -> None:
    model = MODELS[family]()
    images, _ = pictures(2)
    masks = quarters(2) == 2
    others = torch.where(masks.unsqueeze(1), images, images.flip(0) * 3 + 1)
    with torch.no_grad():
        features, _ = segment_features(model, images, masks)
        torch.testing.assert_close(segment_features(model, others, masks)[0], features)
        assert not torch.allclose(segment_features(model, images, quarters(2) == 1)[0], features)


def test_masked_attention_is_a_transformer_of_the_segments_tokens_alone() -> None:
    model = tiny_vit()
    images, _ = pictures(2)
    masks = quarters(2) == 0
    with torch.no_grad():
        features, _ = segment_features(model, images, masks)
        net = model.module
        for index in range(2):
            tokens = net._pos_embed(net.patch_embed(images[index : index + 1]))
            kept = [0] + [1 + 4 * row + column for row in range(2) for column in range(2)]
            tokens = tokens[:, kept]
            for block in net.blocks:
                tokens = block(tokens)
            torch.testing.assert_close(features[index], net.norm(tokens)[0, 0])


def test_neighbour_padding_ring_by_ring() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(1, 2, 6, 6, generator=generator, dtype=torch.float64)
    inside = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    inside[..., 1:3, 1:4] = True
    expected = {(y, x): values[0, :, y, x] for y in range(6) for x in range(6) if inside[0, 0, y, x]}
    for _ in range(2):
        ring = {}
        for y in range(6):
            for x in range(6):
                near = [
                    expected[y + a, x + b] for a in (-1, 0, 1) for b in (-1, 0, 1) if (y + a, x + b) in expected
                ]
                if (y, x) not in expected and near:
                    ring[y, x] = torch.stack(near).mean(dim=0)
        expected |= ring
    found = pad_from_neighbours(values, inside, 2)
    for y in range(6):
        for x in range(6):
            torch.testing.assert_close(
                found[0, :, y, x], expected.get((y, x), torch.zeros(2, dtype=torch.float64))
            )


@pytest.mark.parametrize(
    ("module", "reach"),
    [
        (torch.nn.Conv2d(1, 1, 1), 0),
        (torch.nn.Conv2d(1, 1, 3), 1),
        (torch.nn.Conv2d(1, 1, 3, dilation=2), 2),
        (torch.nn.Conv2d(1, 1, 7, stride=2), 4),
        (torch.nn.MaxPool2d(3, 2), 2),
    ],
)
def test_windows_reach_over_the_border_as_far_as_they_are_wide(module: torch.nn.Module, reach: int) -> None:
    assert segment_masking._reach(module) == reach


def test_every_convolution_reads_the_segment_padded_from_its_neighbours() -> None:
    model = tiny_cnn()
    images, _ = pictures(2)
    masks = quarters(2) == 1
    read: list[Tensor] = []
    handle = model.layer("conv1.0").register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0]))
    with torch.no_grad():
        segment_features(model, images, masks)
        model(images)
    handle.remove()
    torch.testing.assert_close(read[-2], pad_from_neighbours(images, masks.unsqueeze(1), 2))
    assert torch.equal(read[-1], images)  # The masking ends with its pass.


def test_the_head_pools_the_inside_alone() -> None:
    model = tiny_cnn()
    masks = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    masks[:, :12, :20] = True
    features = torch.arange(4.0, dtype=torch.float64).view(1, 1, 2, 2).expand(1, 16, 2, 2)
    inside = segment_masking.inside_at(masks, (2, 2))
    assert inside.flatten().tolist() == [True, True, False, False]
    pooled = segment_masking._fill_outside(model, features, masks).mean(dim=(2, 3))
    torch.testing.assert_close(pooled, torch.full((1, 16), 0.5, dtype=torch.float64))


def test_hooks_are_gone_after_an_error() -> None:
    model = tiny_cnn()
    images, _ = pictures(1)
    masks = quarters(1) == 0
    handle = model.layer("layer4").register_forward_hook(lambda *_given: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        segment_features(model, images, masks)
    handle.remove()
    hooked = [one for one in model.module.modules() if one._forward_pre_hooks or one._forward_hooks]
    assert hooked == []


@every_model
def test_scores_are_the_mean_relevance_of_the_parts_concept_in_its_image(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(4)
    parts = quarters(4)
    fitted = fit_method(model, images, targets, method="hu_mcd", options=OPTIONS, parts=parts)
    found = score_parts(
        model, images, targets, parts, method="hu_mcd", options=OPTIONS, fitted=fitted, batch_size=3
    )
    weights, _ = head_weights(model)
    basis, owner = fitted["basis"].numpy(), fitted["owner"].numpy()
    for index in range(4):
        concept, relevance = {}, {}
        for part in range(4):
            mask = parts[index : index + 1] == part
            if not mask.any():
                assert found.score[index, part].isnan()
                continue
            with torch.no_grad():
                feature = segment_features(model, images[index : index + 1], mask)[0][0].numpy()
            coefficients = np.linalg.lstsq(basis.T, feature, rcond=None)[0]
            pieces = [coefficients[owner == one] @ basis[owner == one] for one in range(owner.max() + 1)]
            concept[part] = int(np.argmax([np.linalg.norm(piece) for piece in pieces]))
            relevance[part] = float(pieces[concept[part]] @ weights[targets[index]].numpy())
        for part, own in concept.items():
            fellows = [relevance[other] for other in concept if concept[other] == own]
            assert found.score[index, part].item() == pytest.approx(np.mean(fellows), rel=1e-6)
            assert found.terms["relevance"][index, part].item() == pytest.approx(relevance[part], rel=1e-6)
            assert found.terms["concept"][index, part].item() == own


def test_without_a_concept_every_part_scores_zero() -> None:
    model = tiny_cnn()
    images, targets = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64), torch.tensor([0, 1])
    fitted = fit_method(model, images[:1], targets[:1], method="hu_mcd", parts=quarters(1))
    assert fitted["basis"].shape == (0, 16)
    scores = score_parts(model, images, targets, quarters(2), method="hu_mcd", fitted=fitted)
    assert not scores.score.nan_to_num(0).any()
    assert scores.terms["complement"][0].isfinite().all()
    assert not attribute(model, images, targets, method="hu_mcd", parts=quarters(2), fitted=fitted).any()


def test_a_fit_does_not_depend_on_the_batch() -> None:
    model = tiny_vit()
    images, targets = pictures(4)
    shared = {"method": "hu_mcd", "options": OPTIONS, "parts": quarters(4)}
    fits = [fit_method(model, images, targets, **shared, batch_size=size) for size in (2, 32)]
    assert torch.equal(fits[0]["owner"], fits[1]["owner"])
    torch.testing.assert_close(fits[0]["completeness"], fits[1]["completeness"])


def test_refusals_say_what_is_missing() -> None:
    model = tiny_cnn()
    images, targets = pictures(2)
    with pytest.raises(UsageError, match=r"hu_mcd finds its concepts in parts: expected labels"):
        fit_method(model, images, targets, method="hu_mcd")
    with pytest.raises(UsageError, match=r"expected at least one, got labels without any"):
        fit_method(
            model, images, targets, method="hu_mcd", parts=torch.full((2, SIZE, SIZE), 255, dtype=torch.uint8)
        )
    with pytest.raises(UsageError, match=r"hu_mcd.sparsity: expected above 1"):
        HuMcdOptions(sparsity=1.0)
    with pytest.raises(UsageError, match=r"hu_mcd.variance: expected a share"):
        HuMcdOptions(variance=0.0)
    with pytest.raises(UsageError, match=r"learns from data before it explains"):
        score_parts(model, images, targets, quarters(2), method="hu_mcd")


def test_a_head_of_two_layers_is_refused() -> None:
    from xai_core.models import ModelSpec, load_classifier

    arguments = {"img_size": 32, "depth": 1, "num_classes": 5}
    model = load_classifier(ModelSpec("deit_tiny_distilled_patch16_224", False, create_args=arguments))
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(UsageError, match=r"not one linear layer of one feature vector, but 2 layers"):
        fit_method(
            model, images, torch.tensor([0]), method="hu_mcd", parts=torch.zeros(1, 32, 32, dtype=torch.uint8)
        )
