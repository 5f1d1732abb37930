"""Sampling of pointwise feature vectors against slow twins and against what it promises."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts import check_layer, contribution, sample_pfvs
from xai_core.concepts import vectors as layer_vectors
from xai_core.concepts.pfv import _draw, _generator, _mass, _sample_layer
from xai_core.errors import UsageError
from xai_core.layers import activations_and_gradients
from xai_core.models import Classifier, ModelSpec, load_classifier

LAST_NORM = "blocks.1.norm1"


@pytest.fixture(scope="module")
def vit() -> Classifier:
    """Two blocks, a class token and 4 x 4 patches."""
    return _random_model("vit_tiny_patch16_224", img_size=64, depth=2)


@pytest.fixture(scope="module")
def resnet() -> Classifier:
    return _random_model("resnet18")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def targets() -> Tensor:
    return torch.tensor([1, 20, 300, 4, 555, 6])


def _random_model(name: str, **create_args: int | str) -> Classifier:
    spec = ModelSpec(name, pretrained=False, create_args=create_args, transform={"input_size": (3, 64, 64)})
    return load_classifier(spec)


def _chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_positions_are_drawn_in_proportion_to_their_positive_contribution(
    vit: Classifier, images: Tensor, targets: Tensor
) -> None:
    draws, batch = 2400, 240
    image, target = images[:1], targets[:1]
    every = sample_pfvs(vit, image, target, [LAST_NORM], per_image=16, seeds=[0])[LAST_NORM]
    cells = every.positions[0, :, 0] * 4 + every.positions[0, :, 1]
    mass = torch.zeros(16).index_put((cells,), every.relevance[0]).clamp(min=0)
    drawn = torch.cat(
        [
            sample_pfvs(
                vit,
                image.expand(batch, -1, -1, -1),
                target.expand(batch),
                [LAST_NORM],
                seeds=range(start, start + batch),
            )[LAST_NORM].positions[:, 0]
            for start in range(0, draws, batch)
        ]
    )
    counts = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16)
    assert counts[mass == 0].sum() == 0
    fed = mass > 0
    assert 2 <= fed.sum() < 16
    # 0.1 % quantile of chi-square with 15 degrees of freedom, the most there can be.
    assert _chi_square(counts[fed], draws * mass[fed] / mass.sum()) < 37.7


def test_second_draw_follows_the_mass_that_the_first_left() -> None:
    mass = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).expand(20_000, -1)
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=mass.shape))
    pairs = _draw(mass, noise, 2)
    counts = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).view(4, 4)
    share = mass[0] / mass[0].sum()
    expected = len(pairs) * share[:, None] * share[None, :] / (1 - share[:, None])
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    assert counts.diagonal().sum() == 0
    # 0.1 % quantile of chi-square with 11 degrees of freedom.
    assert _chi_square(counts[off_diagonal], expected[off_diagonal]) < 31.3


def test_relevance_and_vectors_equal_a_loop_over_positions_in_float64(
    vit: Classifier, resnet: Classifier, images: Tensor, targets: Tensor
) -> None:
    for model, layer, prefix in ((vit, "blocks.0", 1), (resnet, "layer3", 0)):
        sample = sample_pfvs(model, images, targets, [layer], per_image=16, seeds=range(6))[layer]
        precise = Classifier(copy.deepcopy(model.module).double(), model.spec)
        outputs, gradients = activations_and_gradients(precise, images.double(), targets, [layer])
        for index in range(len(images)):
            total = 0.0
            for draw, (row, column) in enumerate(sample.positions[index].tolist()):
                place = (index, prefix + row * 4 + column) if prefix else (index, slice(None), row, column)
                vector, gradient = outputs[layer][place], gradients[layer][place]
                product = float(torch.dot(vector, gradient))
                total += product
                assert float(sample.relevance[index, draw]) == pytest.approx(product, rel=2e-3, abs=1e-5)
                torch.testing.assert_close(sample.vectors[index, draw].double(), vector, rtol=1e-3, atol=1e-4)
            assert float(sample.relevance[index].sum()) == pytest.approx(total, rel=1e-3, abs=1e-5)


def test_prefix_tokens_are_never_drawn(vit: Classifier, images: Tensor, targets: Tensor) -> None:
    sample = sample_pfvs(vit, images, targets, ["blocks.0"], per_image=99, seeds=range(6))["blocks.0"]
    class_tokens = activations_and_gradients(vit, images, targets, ["blocks.0"])[0]["blocks.0"][:, :1]
    assert sample.map_size == (4, 4)
    assert sample.vectors.shape == (6, 16, 192)
    assert torch.cdist(sample.vectors, class_tokens).min() > 1e-2
    for positions in sample.positions.tolist():
        assert sorted(map(tuple, positions)) == [(row, column) for row in range(4) for column in range(4)]


def test_a_draw_does_not_depend_on_its_batch_or_on_the_other_layers(
    resnet: Classifier, images: Tensor, targets: Tensor
) -> None:
    layers = ["layer2", "layer3"]
    seeds = torch.tensor([9, 8, 7, 6, 5, -4])
    together = sample_pfvs(resnet, images, targets, layers, per_image=3, seeds=seeds)
    for index in range(len(images)):
        one = slice(index, index + 1)
        for layer in layers:
            alone = sample_pfvs(resnet, images[one], targets[one], [layer], per_image=3, seeds=seeds[one])[layer]
            assert torch.equal(alone.positions, together[layer].positions[one])
            torch.testing.assert_close(alone.vectors, together[layer].vectors[one], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(alone.relevance, together[layer].relevance[one], rtol=1e-3, atol=1e-5)


def test_a_smaller_sample_is_the_beginning_of_a_larger_one(
    vit: Classifier, images: Tensor, targets: Tensor
) -> None:
    few, many = (
        sample_pfvs(vit, images, targets, [LAST_NORM], per_image=count, seeds=range(6))[LAST_NORM]
        for count in (2, 7)
    )
    assert torch.equal(few.positions, many.positions[:, :2])
    assert torch.equal(few.vectors, many.vectors[:, :2])
    assert few.vectors.dtype == few.relevance.dtype == torch.float32
    assert few.positions.dtype == torch.int64


def test_seeds_and_layers_have_streams_of_their_own() -> None:
    draws = {
        (seed, layer): tuple(_generator(seed, layer).gumbel(size=4))
        for seed in (0, 1, -1, 2**63 - 1)
        for layer in ("layer1", "layer2")
    }
    assert len(set(draws.values())) == len(draws)
    assert tuple(_generator(1, "layer2").gumbel(size=4)) == draws[1, "layer2"]


def test_positions_without_mass_come_last_and_uniformly() -> None:
    mass = torch.tensor([[0.0, 1e-300, 0.0, 5.0, 0.0]], dtype=torch.float64).expand(3000, -1)
    order = _draw(mass, torch.from_numpy(np.random.default_rng(0).gumbel(size=mass.shape)), 99)
    assert set(order[:, :2].flatten().tolist()) == {1, 3}
    counts = torch.bincount(order[:, 2], minlength=5)[[0, 2, 4]]
    # 0.1 % quantile of chi-square with 2 degrees of freedom.
    assert _chi_square(counts, torch.full((3,), 1000.0)) < 13.8


def test_mass_falls_back_to_the_absolute_contribution_of_that_image_only() -> None:
    relevance = torch.tensor([[-1.0, 2.0, 0.0], [-1.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    assert _mass(relevance).tolist() == [[0.0, 2.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_layer_that_feeds_no_logit_yields_zero_relevance(
    vit: Classifier, images: Tensor, targets: Tensor
) -> None:
    sample = sample_pfvs(vit, images, targets, ["blocks.1"], per_image=4, seeds=range(6))["blocks.1"]
    assert not sample.relevance.any()
    assert sample.positions.unique(dim=0).shape == (6, 4, 2)


def test_the_class_token_comes_last_and_changes_no_draw(vit: Classifier, images: Tensor, targets: Tensor) -> None:
    layers = ["blocks.0", LAST_NORM, "patch_embed.proj"]
    drawn, more = (
        sample_pfvs(vit, images, targets, layers, per_image=3, class_token=token, seeds=range(6))
        for token in (False, True)
    )
    precise = Classifier(copy.deepcopy(vit.module).double(), vit.spec)
    outputs, gradients = activations_and_gradients(precise, images.double(), targets, layers)
    for layer in layers[:2]:
        torch.testing.assert_close(more[layer].vectors[:, :3], drawn[layer].vectors)
        assert torch.equal(more[layer].positions[:, :3], drawn[layer].positions)
        torch.testing.assert_close(more[layer].relevance[:, :3], drawn[layer].relevance)
        assert more[layer].positions[:, 3].tolist() == [[-1, 0]] * 6
        for index in range(6):
            token, gradient = outputs[layer][index, 0], gradients[layer][index, 0]
            torch.testing.assert_close(more[layer].vectors[index, 3].double(), token, rtol=1e-3, atol=1e-4)
            share = float(torch.dot(token, gradient))
            assert float(more[layer].relevance[index, 3]) == pytest.approx(share, rel=2e-3, abs=1e-5)
    # Before the tokens are joined by the class token there is none.
    assert more[layers[2]].vectors.shape == drawn[layers[2]].vectors.shape


def test_models_without_a_class_token_add_nothing(images: Tensor, targets: Tensor, resnet: Classifier) -> None:
    registers = _random_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, class_token=False, reg_tokens=2, global_pool="avg"
    )
    for model, layer in ((registers, "blocks.0"), (resnet, "layer3")):
        sample = sample_pfvs(model, images, targets, [layer], per_image=2, class_token=True, seeds=range(6))[layer]
        assert sample.vectors.shape[1] == 2
        assert (sample.positions >= 0).all()


def test_a_class_token_that_is_not_finite_leaves_no_relevance() -> None:
    activation, gradient, token, of_token = (
        normal(3, 4, 2, 2),
        normal(3, 4, 2, 2, seed=1),
        normal(3, 4),
        normal(3, 4),
    )
    of_token[1, 2] = torch.nan
    generators = [_generator(seed, "layer") for seed in range(3)]
    sample = _sample_layer(activation, gradient, (token, of_token), generators, 2, 1)
    assert sample.relevance.isnan().all(dim=1).tolist() == [False, True, False]
    assert sample.relevance.isnan().any(dim=1).tolist() == [False, True, False]
    assert torch.equal(sample.vectors[:, 2], token)


@pytest.mark.parametrize(("model", "layer"), [("vit", "blocks.0"), ("resnet", "layer3")])
def test_the_index_of_a_position_finds_its_vector(
    model: str, layer: str, images: Tensor, targets: Tensor, request: pytest.FixtureRequest
) -> None:
    classifier: Classifier = request.getfixturevalue(model)
    sample = sample_pfvs(classifier, images, targets, [layer], per_image=5, class_token=True, seeds=range(6))[
        layer
    ]
    activation = activations_and_gradients(classifier, images, targets, [layer])[0][layer]
    vectors = layer_vectors.to_vectors(classifier, activation, layer)
    assert sample.prefix == layer_vectors.prefix(classifier, activation)
    found = vectors.gather(1, sample.index.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
    torch.testing.assert_close(found, sample.vectors)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_contribution_equals_a_double_loop(batch: int, channels: int, side: int, seed: int) -> None:
    activation, gradient = normal(2, batch, channels, side, side, seed=seed)
    fast = contribution(activation, gradient)
    for index in np.ndindex(batch, side, side):
        image, row, column = index
        slow = sum(
            float(activation[image, channel, row, column]) * float(gradient[image, channel, row, column])
            for channel in range(channels)
        )
        assert float(fast[index]) == pytest.approx(slow, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("layer", ["patch_embed.proj", "blocks.0", "blocks.0.attn", LAST_NORM])
def test_check_layer_passes_what_can_be_sampled(vit: Classifier, layer: str) -> None:
    check_layer(vit, layer)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        ("blocks.9", "did you mean 'blocks.1'"),
        ("blocks.1", "use 'blocks.1.norm1'"),
        ("blocks.1.mlp", "use 'blocks.1.norm1'"),
        ("norm", "use 'blocks.1.norm1'"),
        ("head", "such as 'blocks.1.norm1'"),
        ("blocks.0.attn.q_norm", "spatial positions of one image"),
        ("blocks.0.attn.attn_drop", "runs in the forward pass"),
    ],
)
def test_check_layer_refuses_and_names_a_layer_that_works(vit: Classifier, layer: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        check_layer(vit, layer)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        ("global_pool", "such as 'layer4'"),
        ("global_pool.pool", "use 'layer4'"),
        ("bn1", "overwrites in place"),
    ],
)
def test_check_layer_refuses_pooled_and_overwritten_maps(resnet: Classifier, layer: str, complaint: str) -> None:
    check_layer(resnet, "layer4")
    with pytest.raises(UsageError, match=complaint):
        check_layer(resnet, layer)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layers": []}, "at least one module name"),
        ({"layers": "layer3"}, "list of at least one"),
        ({"per_image": 0}, "at least 1, got 0"),
        ({"seeds": [1]}, "1 seeds"),
        ({"targets": torch.tensor([1])}, "targets \\(1,\\)"),
    ],
)
def test_sampling_refuses(
    resnet: Classifier, images: Tensor, targets: Tensor, change: dict, complaint: str
) -> None:
    request = {"targets": targets, "layers": ["layer3"], "seeds": range(6), **change}
    with pytest.raises(UsageError, match=complaint):
        sample_pfvs(resnet, images, **request)
