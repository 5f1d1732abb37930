"""Concepts: sampling, dictionaries and codes against slow twins and against what they promise."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xai_core.concepts import (
    Dictionary,
    check_layer,
    contribution,
    default_atoms,
    encode,
    evaluate,
    fit_dictionary,
    l0_ratio,
    lasso_codes,
    reconstruction,
    rel_l2,
    sample_pfvs,
)
from xai_core.concepts.bisecting_kmeans import member_means
from xai_core.concepts.pfv import _draw, _generator, _mass
from xai_core.concepts.sae import _Autoencoder, _unscaled
from xai_core.errors import UsageError
from xai_core.layers import activations_and_gradients
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.registry import extractors

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


def _random_model(name: str, **create_args: int) -> Classifier:
    spec = ModelSpec(name, pretrained=False, create_args=create_args, transform={"input_size": (3, 64, 64)})
    return load_classifier(spec)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# Sampling


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


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_contribution_equals_a_double_loop(batch: int, channels: int, side: int, seed: int) -> None:
    activation, gradient = _normal(2, batch, channels, side, side, seed=seed)
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


# Dictionaries


@pytest.mark.parametrize("strategy", ["biggest_inertia", "largest_cluster"])
def test_centroids_are_means_of_the_members_of_a_partition(strategy: str) -> None:
    vectors = _normal(90, 5)
    found = fit_dictionary(vectors, atoms=8, options={"bisecting_strategy": strategy, "max_iter": 1})
    assert found.atoms.shape == (8, 5)
    assert found.atoms.dtype == torch.float32
    assert int(found.sizes.sum()) == 90
    weighted = (found.atoms * found.sizes.unsqueeze(1)).sum(dim=0)
    torch.testing.assert_close(weighted, vectors.sum(dim=0), rtol=1e-4, atol=1e-4)


def test_member_means_equal_a_loop_over_clusters() -> None:
    points, labels = _normal(40, 3).double(), torch.randint(0, 9, (40,), generator=torch.Generator())
    means, sizes = member_means(points, labels)
    members = [points[labels == label] for label in range(9) if (labels == label).any()]
    assert sizes.tolist() == [len(group) for group in members]
    torch.testing.assert_close(means, torch.stack([group.mean(dim=0) for group in members]))


def test_bisecting_kmeans_finds_separate_clusters() -> None:
    centres = 20 * torch.eye(6)
    vectors = centres.repeat_interleave(15, dim=0) + 0.1 * _normal(90, 6)
    found = fit_dictionary(vectors, atoms=6, options={"n_init": 5})
    assert sorted(found.sizes.tolist()) == [15] * 6
    assert torch.cdist(centres, found.atoms).min(dim=1).values.max() < 0.2


def test_equal_vectors_make_fewer_atoms_not_empty_ones() -> None:
    found = fit_dictionary(_normal(3, 4).repeat(8, 1), atoms=7)
    assert found.sizes.tolist() == [8, 8, 8]


def _planted(channels: int, atoms: int, active: float, count: int) -> tuple[Tensor, Tensor]:
    directions = torch.nn.functional.normalize(_normal(atoms, channels), dim=1)
    generator = torch.Generator().manual_seed(3)
    on = torch.rand(count, atoms, generator=generator) < active / atoms
    return directions, (on * (0.5 + torch.rand(count, atoms, generator=generator))) @ directions


def test_sae_recovers_planted_directions() -> None:
    planted, vectors = _planted(channels=16, atoms=24, active=2, count=1500)
    found = fit_dictionary(vectors, extractor="sae", atoms=24)
    recovered = (planted @ found.atoms.T).max(dim=1).values
    assert recovered.mean() > 0.93
    assert (recovered > 0.9).float().mean() > 0.8
    torch.testing.assert_close(found.atoms.norm(dim=1), torch.ones(24))
    quality = evaluate(found, vectors)
    assert quality.rel_l2 < 0.4
    assert quality.l0_ratio > 0.7


def test_sae_dictionary_equals_the_autoencoder_on_scaled_vectors() -> None:
    vectors, scale = 7 * _normal(20, 5), torch.tensor(0.3)
    model = _Autoencoder(W_e=_normal(5, 9), b_e=_normal(9, seed=1), W_d=_normal(9, 5, seed=2), b_d=_normal(5))
    found = _unscaled(model, vectors, scale)
    u = model.encode(scale * vectors)
    codes = encode(found, vectors)
    torch.testing.assert_close(codes * scale, u)
    torch.testing.assert_close(reconstruction(found, codes) * scale, model.decode(u))
    assert found.sizes.tolist() == (u > 0).sum(dim=0).tolist()


def test_sae_trains_on_a_mean_norm_of_sqrt_c_whatever_the_scale() -> None:
    vectors = _normal(200, 8)
    options = {"steps": 40}
    found, scaled = (fit_dictionary(factor * vectors, extractor="sae", options=options) for factor in (1, 1024))
    scale = found.encoder["scale"]
    assert float((vectors * scale).norm(dim=1).mean()) == pytest.approx(8**0.5, rel=1e-5)
    torch.testing.assert_close(scaled.atoms, found.atoms, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(encode(scaled, 1024 * vectors), 1024 * encode(found, vectors), rtol=1e-2, atol=1)


@pytest.mark.parametrize(("extractor", "options"), [("sae", {"steps": 30}), ("bisecting_kmeans", {})])
def test_a_seed_fixes_the_dictionary(extractor: str, options: dict) -> None:
    def fit(seed: int) -> Dictionary:
        return fit_dictionary(_normal(120, 6), extractor=extractor, options=options, seed=seed)

    torch.manual_seed(5)
    first = fit(1)
    torch.manual_seed(6)
    again = fit(1)
    assert torch.equal(first.atoms, again.atoms)
    assert torch.equal(first.sizes, again.sizes)
    assert all(torch.equal(first.encoder[name], again.encoder[name]) for name in first.encoder)
    assert not torch.equal(first.atoms, fit(2).atoms)


def test_sae_trains_where_gradients_are_off() -> None:
    with torch.no_grad():
        found = fit_dictionary(_normal(30, 4), extractor="sae", options={"steps": 2})
    assert not any(tensor.requires_grad for tensor in (found.atoms, *found.encoder.values()))


def test_sae_says_early_that_it_diverged() -> None:
    with pytest.raises(UsageError, match=r"finite loss, got (nan|inf) at step 50 of .*learning_rate"):
        fit_dictionary(_normal(50, 4), extractor="sae", options={"learning_rate": 1e30})


@pytest.mark.parametrize(
    ("vectors", "channels", "atoms"), [(1000, 192, 250), (10_000, 192, 1536), (64, 96, 16), (3, 5, 1)]
)
def test_default_number_of_atoms(vectors: int, channels: int, atoms: int) -> None:
    assert default_atoms(vectors, channels) == atoms


@pytest.mark.parametrize("extractor", ["sae", "bisecting_kmeans"])
def test_vectors_of_zeros_are_left_out_and_counted(extractor: str) -> None:
    vectors = _normal(20, 4)
    padded = torch.cat([torch.zeros(3, 4), vectors, torch.zeros(2, 4)])
    options = {"steps": 20} if extractor == "sae" else {}
    with_zeros = fit_dictionary(padded, extractor=extractor, options=options)
    without = fit_dictionary(vectors, extractor=extractor, options=options)
    assert (with_zeros.zero_vectors, without.zero_vectors) == (5, 0)
    assert torch.equal(with_zeros.atoms, without.atoms)
    assert with_zeros.extractor == extractor
    assert evaluate(with_zeros, padded).vectors == 20


@pytest.mark.parametrize(
    ("vectors", "arguments", "complaint"),
    [
        (_normal(4, 3, 2), {}, r"\[N, C\], got \(4, 3, 2\)"),
        (torch.tensor([[1.0, float("nan")], [1.0, 2.0]]), {}, "NaN or infinity in 1 of 2"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), {}, "at least 2 .* got 1 of 2"),
        (_normal(5, 3), {"atoms": 6}, "1 to 5 .* got 6"),
        (_normal(5, 3), {"atoms": 0}, "got 0"),
        (_normal(5, 3), {"extractor": "kmeans"}, "bisecting_kmeans"),
        (_normal(5, 3), {"options": {"l1": 1}}, "no option 'l1'"),
        (_normal(5, 3), {"options": {"bisecting_strategy": "biggest"}}, "got 'biggest'"),
        (_normal(5, 3), {"options": {"n_init": 0}}, "at least 1, got 0"),
        (_normal(5, 3), {"extractor": "sae", "options": {"steps": 0}}, "steps >= 1"),
    ],
)
def test_fitting_refuses(vectors: Tensor, arguments: dict, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        fit_dictionary(vectors, **arguments)


# Codes


@given(st.integers(1, 12), st.floats(0.02, 0.8), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_lasso_codes_meet_the_optimality_conditions(count: int, penalty: float, seed: int) -> None:
    atoms = 3 * _normal(count, 6, seed=seed)
    vectors = 5 * _normal(4, 6, seed=seed + 1)
    codes = lasso_codes(atoms, vectors, penalty).double()
    for x, u in zip(vectors.double(), codes, strict=True):
        for atom, coefficient in zip(atoms.double(), u, strict=True):
            pull = torch.dot(atom, x - u @ atoms.double()) / (x.norm() * atom.norm())
            if coefficient == 0:
                assert abs(pull) <= penalty + 2e-3
            else:
                assert float(pull) == pytest.approx(penalty * float(coefficient.sign()), abs=2e-3)


def test_lasso_of_one_atom_is_soft_thresholding_on_the_original_scale() -> None:
    codes = lasso_codes(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 10.0], [10.0, 0.5], [0.0, -10.0]]))
    torch.testing.assert_close(codes, torch.tensor([[2.25], [0.0], [-2.25]]))


def test_zeros_have_codes_of_zero() -> None:
    codes = lasso_codes(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    torch.testing.assert_close(codes, torch.tensor([[0.0, 0.0], [0.0, 1.8]]))


def test_the_shapes_of_codes_survive_one_atom_and_one_vector() -> None:
    assert lasso_codes(_normal(1, 4), _normal(1, 4)).shape == (1, 1)
    assert lasso_codes(_normal(3, 4), _normal(1, 4)).shape == (1, 3)
    assert lasso_codes(_normal(1, 4), _normal(3, 4)).shape == (3, 1)
    assert lasso_codes(_normal(2, 4), _normal(0, 4)).shape == (0, 2)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_reconstruction_error_and_sparsity_equal_loops(count: int, atoms: int, seed: int) -> None:
    dictionary = Dictionary(atoms=_normal(atoms, 3, seed=seed), sizes=torch.ones(atoms, dtype=torch.int64))
    vectors = _normal(count, 3, seed=seed + 1)
    codes = _normal(count, atoms, seed=seed + 2).relu()
    errors, zeros = [], []
    for x, u in zip(vectors, codes, strict=True):
        rebuilt = sum((u[k] * dictionary.atoms[k] for k in range(atoms)), torch.zeros(3))
        errors.append(float((x - rebuilt).square().sum().sqrt() / x.square().sum().sqrt()))
        zeros.append(1 - sum(float(u[k]) != 0 for k in range(atoms)) / atoms)
    assert rel_l2(vectors, reconstruction(dictionary, codes)) == pytest.approx(np.mean(errors), rel=1e-4)
    assert l0_ratio(codes) == pytest.approx(np.mean(zeros), abs=1e-6)


def test_relative_error_leaves_out_vectors_of_zeros() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert rel_l2(vectors, torch.zeros(2, 2)) == 1
    assert np.isnan(rel_l2(vectors[:1], torch.zeros(1, 2)))


def test_evaluation_is_a_seeded_sample_of_what_it_measures() -> None:
    vectors = _normal(80, 6)
    dictionary = fit_dictionary(vectors)
    whole = evaluate(dictionary, vectors, evaluation_vectors=999)
    codes = encode(dictionary, vectors)
    assert whole.vectors == 80
    assert whole.rel_l2 == pytest.approx(rel_l2(vectors, reconstruction(dictionary, codes)), rel=1e-5)
    assert whole.l0_ratio == pytest.approx(l0_ratio(codes), abs=1e-6)
    part = evaluate(dictionary, vectors, evaluation_vectors=10, seed=4)
    assert part.vectors == 10
    assert part == evaluate(dictionary, vectors, evaluation_vectors=10, seed=4)
    assert part != evaluate(dictionary, vectors, evaluation_vectors=10, seed=5)


@pytest.mark.parametrize(
    ("request_codes", "complaint"),
    [
        (lambda atoms: encode(atoms, _normal(2, 7)), r"\[N, 3\] .* got \(2, 7\)"),
        (lambda atoms: encode(atoms, _normal(2, 3), penalty=0), "positive number, got 0"),
    ],
)
def test_coding_refuses(request_codes: Callable[[Dictionary], Tensor], complaint: str) -> None:
    dictionary = Dictionary(atoms=_normal(4, 3), sizes=torch.ones(4, dtype=torch.int64))
    with pytest.raises(UsageError, match=complaint):
        request_codes(dictionary)


# The room


def test_both_extractors_are_registered_with_their_paper() -> None:
    for name in ("bisecting_kmeans", "sae"):
        entry = extractors.get(name)
        assert "iERF" in entry.paper
        assert entry.summary


def test_scikit_learn_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, xai_core.concepts; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
