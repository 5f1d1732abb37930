"""The stream of exemplars against a sort of everything at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts import Dictionary, encode
from xai_core.concepts.cafe import ExemplarSearch, exemplars
from xai_core.concepts.cafe.exemplars import concept_scores
from xai_core.errors import UsageError


def _dictionary(atoms: Tensor, *, encoder: bool = False) -> Dictionary:
    mapping = {"weight": atoms, "bias": torch.full((len(atoms),), -1.5), "offset": torch.zeros(atoms.shape[1])}
    return Dictionary(atoms, torch.ones(len(atoms), dtype=torch.int64), mapping if encoder else {})


def _slow(dictionary: Dictionary, vectors: Tensor, images: list[int], count: int, distinct: bool) -> list[list]:
    """All scores of a concept in one list, sorted; the nearest of each image alone where they are to differ."""
    found = []
    for concept, atom in enumerate(dictionary.atoms.double()):
        rows = []
        for image, draws in zip(images, vectors.double(), strict=True):
            for draw, vector in enumerate(draws):
                if dictionary.encoder:
                    score = float(encode(dictionary, vector.float()[None])[0, concept])
                    usable = score > 0
                else:
                    score = float(torch.dot(vector, atom) / (vector.norm() * atom.norm()))
                    usable = bool(vector.any())
                if usable:
                    rows.append((-score, image, draw))
        rows.sort()
        if distinct:
            rows = [row for place, row in enumerate(rows) if row[1] not in {one[1] for one in rows[:place]}]
        found.append([(image, draw) for _, image, draw in rows[:count]])
    return found


def _pairs(search: ExemplarSearch) -> list[list]:
    found = search.found()
    return [
        [(image, draw) for image, draw in zip(of_image, of_draw, strict=True) if image >= 0]
        for of_image, of_draw in zip(found.image.tolist(), found.draw.tolist(), strict=True)
    ]


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("encoder", [True, False])
def test_streamed_exemplars_equal_a_sort_of_all(distinct: bool, encoder: bool) -> None:
    dictionary = _dictionary(normal(5, 4), encoder=encoder)
    vectors = normal(30, 3, 4, seed=1)
    vectors[4, 1] = 0
    images = [3 * index for index in range(30)]
    expected = _slow(dictionary, vectors, images, 7, distinct)
    assert any(len(rows) == 7 for rows in expected)
    for sizes in ([30], [1, 9, 20], [10, 10, 10]):
        search = ExemplarSearch(dictionary, 7, distinct_images=distinct)
        for some, numbers in zip(vectors.split(sizes), torch.tensor(images).split(sizes), strict=True):
            search.add(some, numbers)
        assert _pairs(search) == expected
    scores = search.found().score
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary, vectors = _dictionary(normal(6, 4)), normal(20, 2, 4, seed=1)

    def find() -> list[list]:
        search = ExemplarSearch(dictionary, 4)
        search.add(vectors, torch.arange(20))
        return _pairs(search)

    whole = find()
    monkeypatch.setattr(exemplars, "_CHUNK", 30)
    assert find() == whole


def test_equal_scores_go_to_the_smaller_image_in_any_order() -> None:
    dictionary = _dictionary(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    vectors = torch.tensor([[2.0, 0.0]]).expand(9, 2, 2)
    for order in (torch.arange(9), torch.arange(9).flip(0)):
        search = ExemplarSearch(dictionary, 3)
        for number in order.split(2):
            search.add(vectors[number], number)
        assert _pairs(search) == [[(0, 0), (1, 0), (2, 0)]] * 2
        torch.testing.assert_close(search.found().score, torch.tensor([[1.0] * 3, [-1.0] * 3]))


def test_scores_survive_their_keys_bit_by_bit() -> None:
    scores = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-38, -1e-38, 3e38, -3e38, 0.1, -0.1])
    number = torch.arange(10)
    keys = exemplars._keys(scores, number)
    assert exemplars._score(keys).tolist() == scores.tolist()
    expected = sorted(range(10), key=lambda one: (-float(scores[one]), one))
    assert keys.argsort(descending=True).tolist() == expected


def test_fewer_vectors_than_asked_for_leave_the_rest_empty() -> None:
    search = ExemplarSearch(_dictionary(normal(2, 3)), 5)
    assert (search.found().image == -1).all()
    search.add(torch.zeros(0, 4, 3), torch.zeros(0, dtype=torch.int64))
    search.add(normal(2, 4, 3), torch.tensor([7, 9]))
    found = search.found()
    assert found.image.shape == found.draw.shape == found.score.shape == (2, 5)
    assert sorted(found.image[0, :2].tolist()) == [7, 9]
    assert (found.image[:, 2:] == -1).all()
    assert (found.score[:, 2:] == -torch.inf).all()


def test_an_atom_of_zeros_and_a_latent_that_never_fires_have_no_exemplar() -> None:
    atoms = torch.cat([torch.zeros(1, 3), torch.eye(3)[:1]])
    assert (concept_scores(_dictionary(atoms), normal(4, 3))[:, 0] == -torch.inf).all()
    silent = _dictionary(atoms, encoder=True)
    assert (concept_scores(silent, 0.1 * normal(4, 3)) == -torch.inf).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 exemplar"):
        ExemplarSearch(_dictionary(normal(2, 3)), 0)
    search = ExemplarSearch(_dictionary(normal(2, 3)), 1)
    search.add(normal(2, 4, 3), torch.arange(2))
    with pytest.raises(UsageError, match="expected 4 an image as before, got 2"):
        search.add(normal(2, 2, 3), torch.arange(2))
    with pytest.raises(UsageError, match=r"got \(2, 4, 3\) and \(3,\)"):
        search.add(normal(2, 4, 3), torch.arange(3))
    for number in (-1, 2**30):
        with pytest.raises(UsageError, match="expected numbers from 0"):
            search.add(normal(1, 4, 3), torch.tensor([number]))
    search.add(normal(1, 4, 3), torch.tensor([2**30 - 1]))
    assert _pairs(search)[0][0][0] in (0, 1, 2**30 - 1)
