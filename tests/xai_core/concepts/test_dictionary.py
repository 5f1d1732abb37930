"""Dictionaries of concept vectors against slow twins and against what they promise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts import (
    Dictionary,
    default_atoms,
    evaluate,
    fit_dictionary,
    lasso_codes,
)
from xai_core.concepts.bisecting_kmeans import member_means
from xai_core.errors import UsageError
from xai_core.registry import extractors


@pytest.mark.parametrize("strategy", ["biggest_inertia", "largest_cluster"])
def test_centroids_are_means_of_the_members_of_a_partition(strategy: str) -> None:
    vectors = normal(90, 5)
    found = fit_dictionary(vectors, atoms=8, options={"bisecting_strategy": strategy, "max_iter": 1})
    assert found.atoms.shape == (8, 5)
    assert found.atoms.dtype == torch.float32
    assert int(found.sizes.sum()) == 90
    weighted = (found.atoms * found.sizes.unsqueeze(1)).sum(dim=0)
    torch.testing.assert_close(weighted, vectors.sum(dim=0), rtol=1e-4, atol=1e-4)


def test_member_means_equal_a_loop_over_clusters() -> None:
    points, labels = normal(40, 3).double(), torch.randint(0, 9, (40,), generator=torch.Generator())
    means, sizes = member_means(points, labels)
    members = [points[labels == label] for label in range(9) if (labels == label).any()]
    assert sizes.tolist() == [len(group) for group in members]
    torch.testing.assert_close(means, torch.stack([group.mean(dim=0) for group in members]))


def test_bisecting_kmeans_finds_separate_clusters() -> None:
    centres = 20 * torch.eye(6)
    vectors = centres.repeat_interleave(15, dim=0) + 0.1 * normal(90, 6)
    found = fit_dictionary(vectors, atoms=6, options={"n_init": 5})
    assert sorted(found.sizes.tolist()) == [15] * 6
    assert torch.cdist(centres, found.atoms).min(dim=1).values.max() < 0.2


def test_equal_vectors_make_fewer_atoms_not_empty_ones() -> None:
    found = fit_dictionary(normal(3, 4).repeat(8, 1), atoms=7)
    assert found.sizes.tolist() == [8, 8, 8]


@pytest.mark.parametrize(("extractor", "options"), [("sae", {"steps": 30}), ("bisecting_kmeans", {})])
def test_a_seed_fixes_the_dictionary(extractor: str, options: dict) -> None:
    def fit(seed: int) -> Dictionary:
        return fit_dictionary(normal(120, 6), extractor=extractor, options=options, seed=seed)

    torch.manual_seed(5)
    first = fit(1)
    torch.manual_seed(6)
    again = fit(1)
    assert torch.equal(first.atoms, again.atoms)
    assert torch.equal(first.sizes, again.sizes)
    assert all(torch.equal(first.encoder[name], again.encoder[name]) for name in first.encoder)
    assert not torch.equal(first.atoms, fit(2).atoms)


@pytest.mark.parametrize(
    ("vectors", "channels", "atoms"), [(1000, 192, 250), (10_000, 192, 1536), (64, 96, 16), (3, 5, 1)]
)
def test_default_number_of_atoms(vectors: int, channels: int, atoms: int) -> None:
    assert default_atoms(vectors, channels) == atoms


@pytest.mark.parametrize("extractor", ["sae", "bisecting_kmeans"])
def test_vectors_of_zeros_are_left_out_and_counted(extractor: str) -> None:
    vectors = normal(20, 4)
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
        (normal(4, 3, 2), {}, r"\[N, C\], got \(4, 3, 2\)"),
        (torch.tensor([[1.0, float("nan")], [1.0, 2.0]]), {}, "NaN or infinity in 1 of 2"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), {}, "at least 2 .* got 1 of 2"),
        (normal(5, 3), {"atoms": 6}, "1 to 5 .* got 6"),
        (normal(5, 3), {"atoms": 0}, "got 0"),
        (normal(5, 3), {"extractor": "kmeans"}, "bisecting_kmeans"),
        (normal(5, 3), {"options": {"l1": 1}}, "no option 'l1'"),
        (normal(5, 3), {"options": {"bisecting_strategy": "biggest"}}, "got 'biggest'"),
        (normal(5, 3), {"options": {"n_init": 0}}, "at least 1, got 0"),
        (normal(5, 3), {"extractor": "dictionary_learning", "options": {"alpha": 0}}, "alpha > 0"),
        (normal(5, 3), {"extractor": "dictionary_learning", "options": {"batch_size": 0}}, "batch_size >= 1"),
    ],
)
def test_fitting_refuses(vectors: Tensor, arguments: dict, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        fit_dictionary(vectors, **arguments)


def test_dictionary_learning_recovers_planted_directions() -> None:
    planted = torch.nn.functional.normalize(normal(12, 16), dim=1)
    generator = torch.Generator().manual_seed(3)
    on = torch.rand(800, 12, generator=generator) < 2 / 12
    vectors = 7 * (on * (0.5 + torch.rand(800, 12, generator=generator))) @ planted
    options = {"batch_size": 16, "max_iter": 30}
    found = fit_dictionary(vectors, extractor="dictionary_learning", atoms=12, options=options)
    torch.testing.assert_close(found.atoms.norm(dim=1), torch.ones(12))
    assert (planted @ found.atoms.T).abs().max(dim=1).values.mean() > 0.94
    used = vectors[vectors.any(dim=1)]
    assert found.sizes.dtype == torch.int64
    assert torch.equal(found.sizes, lasso_codes(found.atoms, used).count_nonzero(dim=0))


def test_dictionary_learning_is_fixed_by_its_seed_and_not_by_the_scale() -> None:
    def fit(seed: int, scale: float = 1.0) -> Tensor:
        return fit_dictionary(scale * normal(60, 5), extractor="dictionary_learning", atoms=8, seed=seed).atoms

    assert torch.equal(fit(1), fit(1))
    assert not torch.equal(fit(1), fit(2))
    torch.testing.assert_close(fit(1), fit(1, 100.0), rtol=1e-3, atol=1e-4)


def test_dictionary_learning_obeys_its_penalty() -> None:
    dense, sparse = (
        fit_dictionary(normal(100, 6), extractor="dictionary_learning", atoms=10, options={"alpha": alpha})
        for alpha in (0.02, 0.5)
    )
    assert dense.sizes.sum() > 2 * sparse.sizes.sum()
    assert not torch.allclose(dense.atoms, sparse.atoms, atol=0.01)


def test_extractors_are_registered_with_their_paper() -> None:
    for name in ("bisecting_kmeans", "dictionary_learning", "sae"):
        entry = extractors.get(name)
        assert "iERF" in entry.paper
        assert entry.summary


def test_scikit_learn_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, xai_core.concepts; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
