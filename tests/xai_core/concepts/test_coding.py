"""Codes, and how well and how sparsely vectors are rebuilt from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts import (
    Dictionary,
    encode,
    evaluate,
    fit_dictionary,
    l0_ratio,
    reconstruction,
    rel_l2,
)
from xai_core.errors import UsageError


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_reconstruction_error_and_sparsity_equal_loops(count: int, atoms: int, seed: int) -> None:
    dictionary = Dictionary(atoms=normal(atoms, 3, seed=seed), sizes=torch.ones(atoms, dtype=torch.int64))
    vectors = normal(count, 3, seed=seed + 1)
    codes = normal(count, atoms, seed=seed + 2).relu()
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
    vectors = normal(80, 6)
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
        (lambda atoms: encode(atoms, normal(2, 7)), r"\[N, 3\] .* got \(2, 7\)"),
        (lambda atoms: encode(atoms, normal(2, 3), penalty=0), "positive number, got 0"),
    ],
)
def test_coding_refuses(request_codes: Callable[[Dictionary], Tensor], complaint: str) -> None:
    dictionary = Dictionary(atoms=normal(4, 3), sizes=torch.ones(4, dtype=torch.int64))
    with pytest.raises(UsageError, match=complaint):
        request_codes(dictionary)


def _with_encoder(**kind: Tensor) -> Dictionary:
    encoder = {"weight": normal(7, 4), "bias": normal(7, seed=1), "offset": normal(4, seed=2), **kind}
    return Dictionary(atoms=normal(7, 4, seed=3), sizes=torch.ones(7, dtype=torch.int64), encoder=encoder)


KINDS: dict[str, dict[str, Tensor]] = {
    "relu": {},
    "threshold": {"threshold": torch.tensor(0.7)},
    "thresholds": {"threshold": torch.linspace(0, 2, 7)},
    "top_k": {"top_k": torch.tensor(3)},
}


def _slow_codes(dictionary: Dictionary, x: Tensor) -> list[float]:
    encoder = {name: tensor.double() for name, tensor in dictionary.encoder.items()}
    before = [float(w @ x + b) for w, b in zip(encoder["weight"], encoder["bias"], strict=True)]
    if "threshold" in encoder:
        limits = encoder["threshold"].expand(7).tolist()
        return [value if value > limit else 0.0 for value, limit in zip(before, limits, strict=True)]
    kept = sorted(before, reverse=True)[: int(encoder.get("top_k", torch.tensor(7)))]
    return [value if value > 0 and value in kept else 0.0 for value in before]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_every_kind_of_encoder_equal_a_loop(kind: str) -> None:
    dictionary, vectors = _with_encoder(**KINDS[kind]), normal(30, 4, seed=9).double()
    expected = torch.tensor([_slow_codes(dictionary, x) for x in vectors], dtype=torch.float64)
    codes = encode(dictionary, vectors)
    torch.testing.assert_close(codes, expected)
    assert torch.equal(codes == 0, expected == 0)
    assert encode(dictionary, vectors.float()).dtype == encode(dictionary, vectors.half()).dtype == torch.float32
    rebuilt = codes @ dictionary.atoms.double() + dictionary.encoder["offset"].double()
    torch.testing.assert_close(reconstruction(dictionary, codes), rebuilt)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_an_encoder_have_the_gradient_of_the_latents_that_fire(kind: str) -> None:
    dictionary, vectors = _with_encoder(**KINDS[kind]), normal(5, 4, seed=8).double().requires_grad_()
    codes = encode(dictionary, vectors)
    chosen = normal(5, 7, seed=4).double()
    (gradient,) = torch.autograd.grad((codes * chosen).sum(), vectors)
    torch.testing.assert_close(gradient, (chosen * (codes != 0)) @ dictionary.encoder["weight"].double())


def test_an_autocast_around_it_does_not_round_the_codes() -> None:
    dictionary, vectors = _with_encoder(), normal(5, 4)
    expected = encode(dictionary, vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = encode(dictionary, vectors)
        assert torch.equal(reconstruction(dictionary, codes), reconstruction(dictionary, expected))
    assert torch.equal(codes, expected)


def test_an_encoder_refuses_a_penalty_that_it_would_not_read() -> None:
    with pytest.raises(UsageError, match=r"brings an encoder, got 0\.2"):
        encode(_with_encoder(), normal(5, 4), penalty=0.2)


def test_standard_errors_are_those_of_the_means() -> None:
    vectors = normal(40, 6)
    dictionary = fit_dictionary(vectors, atoms=9)
    quality = evaluate(dictionary, vectors)
    codes = encode(dictionary, vectors)
    errors = [float((x - u @ dictionary.atoms).norm() / x.norm()) for x, u in zip(vectors, codes, strict=True)]
    unused = [float((u == 0).float().mean()) for u in codes]
    assert quality.rel_l2_error == pytest.approx(np.std(errors, ddof=1) / 40**0.5, rel=1e-4)
    assert quality.l0_ratio_error == pytest.approx(np.std(unused, ddof=1) / 40**0.5, rel=1e-4)
    assert np.isnan(evaluate(dictionary, vectors[:1]).rel_l2_error)
