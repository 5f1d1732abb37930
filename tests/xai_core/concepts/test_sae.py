"""Sparse autoencoders against what they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts import encode, evaluate, fit_dictionary, reconstruction
from xai_core.concepts.sae import VARIANTS, Training
from xai_core.concepts.sae.model import Autoencoder, initial, unscaled
from xai_core.concepts.sae.options import MatryoshkaOptions, TopKOptions
from xai_core.concepts.sae.survey import geometric_median, survey
from xai_core.errors import UsageError
from xai_core.registry import extractors

SHORT: dict[str, Any] = {"steps": 40, "batch_size": 32, "log_every": 10}


def planted(channels: int, atoms: int, active: float, count: int) -> tuple[Tensor, Tensor]:
    directions = torch.nn.functional.normalize(normal(atoms, channels), dim=1)
    generator = torch.Generator().manual_seed(3)
    on = torch.rand(count, atoms, generator=generator) < active / atoms
    return directions, (on * (0.5 + torch.rand(count, atoms, generator=generator))) @ directions


@pytest.mark.parametrize(
    ("extractor", "options", "mean", "found_share", "error"),
    [
        ("sae", {}, 0.93, 0.8, 0.4),
        ("sae_top_k", {"k": 2}, 0.95, 0.85, 0.4),
        ("sae_batch_top_k", {"k": 2}, 0.93, 0.85, 0.4),
        # Its first prefixes have to do with few latents: these are not to be the planted directions.
        ("sae_matryoshka", {"k": 3, "prefixes": (0.5, 1.0)}, 0.85, 0.5, 0.5),
    ],
)
def test_planted_directions_are_recovered(
    extractor: str, options: dict[str, Any], mean: float, found_share: float, error: float
) -> None:
    directions, vectors = planted(channels=16, atoms=24, active=2, count=1500)
    found = fit_dictionary(vectors, extractor=extractor, atoms=24, options=options)
    recovered = (directions @ found.atoms.T).max(dim=1).values
    assert recovered.mean() > mean
    assert (recovered > 0.9).float().mean() > found_share
    torch.testing.assert_close(found.atoms.norm(dim=1), torch.ones(24))
    quality = evaluate(found, vectors)
    assert quality.rel_l2 < error
    assert quality.l0_ratio > 0.7


def test_the_first_prefix_of_a_matryoshka_rebuilds_better_than_as_many_latents_of_a_plain_one() -> None:
    _, vectors = planted(channels=16, atoms=24, active=3, count=800)
    errors = {}
    for prefixes in ((0.25, 1.0), (1.0,)):
        options = {**SHORT, "steps": 400, "k": 4, "prefixes": prefixes}
        found = fit_dictionary(vectors, extractor="sae_matryoshka", atoms=24, options=options)
        codes = encode(found, vectors)
        codes[:, 6:] = 0
        errors[len(prefixes)] = (vectors - reconstruction(found, codes)).square().sum()
    assert errors[2] < 0.9 * errors[1]


@pytest.mark.parametrize("extractor", VARIANTS)
def test_the_dictionary_codes_vectors_as_the_training_did(extractor: str) -> None:
    vectors = 7 * normal(300, 6) + 3
    options = {**SHORT} if extractor == "sae" else {**SHORT, "k": 3}
    training = Training([vectors], extractor=extractor, options=options, atoms=20)
    training.advance()
    found = training.dictionary()
    learner, scale = training._learner, training._scale
    model = learner.model
    activations = (vectors * scale - model.b_d.detach()) @ model.W_e.detach().T + model.b_e.detach()
    least = {"sae": 0.0, "sae_top_k": activations.sort(dim=1).values[:, -4:-3].clamp(min=0)}
    u = activations * (activations > least.get(extractor, learner.threshold))
    codes = encode(found, vectors)
    torch.testing.assert_close(codes * scale, u, rtol=1e-3, atol=1e-4)
    rebuilt = u @ model.W_d.detach() + model.b_d.detach()
    torch.testing.assert_close(reconstruction(found, codes) * scale, rebuilt, rtol=1e-3, atol=1e-3)
    assert found.sizes.tolist() == (codes > 0).sum(dim=0).tolist()
    assert found.sizes.sum() > 0
    if extractor != "sae":
        assert float((codes > 0).sum(dim=1).float().mean()) == pytest.approx(3, rel=0.2)


def test_the_threshold_is_in_the_units_of_the_vectors() -> None:
    model = Autoencoder(normal(9, 5), normal(9, seed=1), normal(9, 5, seed=2), normal(5))
    found = unscaled(model, torch.tensor(0.25), {"threshold": torch.tensor(2.0), "top_k": torch.tensor(3)})
    assert found.encoder["threshold"] == 8
    assert found.encoder["top_k"].dtype == torch.int64
    assert found.encoder["top_k"] == 3
    torch.testing.assert_close(found.encoder["offset"], 4 * model.b_d)


@pytest.mark.parametrize("extractor", VARIANTS)
def test_training_is_on_a_mean_norm_of_sqrt_c_whatever_the_scale(extractor: str) -> None:
    vectors = normal(200, 8)
    found, scaled = (fit_dictionary(factor * vectors, extractor=extractor, options=SHORT) for factor in (1, 1024))
    scale = found.encoder["scale"]
    assert float((vectors * scale).norm(dim=1).mean()) == pytest.approx(8**0.5, rel=1e-5)
    torch.testing.assert_close(scaled.atoms, found.atoms, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(encode(scaled, 1024 * vectors), 1024 * encode(found, vectors), rtol=1e-2, atol=1)


@pytest.mark.parametrize("extractor", VARIANTS)
def test_training_depends_on_none_of_the_callers_modes(extractor: str) -> None:
    expected = fit_dictionary(normal(60, 4), extractor=extractor, options=SHORT)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = fit_dictionary(normal(60, 4), extractor=extractor, options=SHORT)
    assert torch.equal(found.atoms, expected.atoms)
    assert not any(tensor.requires_grad for tensor in (found.atoms, *found.encoder.values()))


def test_codes_of_a_dictionary_are_differentiable_by_the_vectors() -> None:
    for extractor in VARIANTS:
        found = fit_dictionary(normal(200, 6), extractor=extractor, options=SHORT)
        vectors = normal(4, 6, seed=5).requires_grad_()
        codes = encode(found, vectors)
        (gradient,) = torch.autograd.grad(codes[0].sum(), vectors)
        torch.testing.assert_close(gradient[0], found.encoder["weight"][codes[0] > 0].sum(dim=0))
        assert not gradient[1:].any()


def test_dead_latents_are_fewer_with_the_auxiliary_loss_and_with_resampling() -> None:
    _, vectors = planted(channels=12, atoms=100, active=2, count=2000)
    dead: dict[str, list[float]] = {}
    # So fast that latents die.
    common = {"steps": 800, "batch_size": 64, "dead_after": 1000, "learning_rate": 0.2}
    for extractor, options in (
        ("sae_top_k", {"k": 2, "auxiliary": 0.0}),
        ("sae_top_k", {"k": 2, "auxiliary": 1.0}),
        ("sae", {"l1": 0.3, "resample_at": ()}),
        ("sae", {"l1": 0.3}),
    ):
        training = Training([vectors], extractor=extractor, options={**common, **options}, atoms=96)
        training.advance()
        # What the penalty keeps from firing dies again after the last resampling, at step 400.
        dead.setdefault(extractor, []).append(min(row.dead for row in training.log if row.step >= 400))
    for without, handled in dead.values():
        assert without > 0.1
        assert handled < 0.75 * without


def test_the_start_is_the_geometric_median_or_the_mean() -> None:
    vectors = torch.cat([normal(99, 3), 1000 * torch.ones(9, 3)])
    seen = survey([vectors], atoms=5, seed=0)
    median = geometric_median(seen.sample)
    # At the median unit vectors towards the points cancel.
    away = vectors.double() - median
    assert (away / away.norm(dim=1, keepdim=True)).sum(dim=0).norm() < 1e-3
    torch.testing.assert_close(seen.mean, vectors.double().mean(dim=0))
    starts = {
        centre: Training([vectors], extractor="sae", options={"centre": centre}, atoms=5)._learner.model.b_d
        for centre in ("geometric_median", "mean")
    }
    scale = 3**0.5 / vectors.norm(dim=1).mean()
    torch.testing.assert_close(starts["geometric_median"].detach(), (median * scale).float())
    torch.testing.assert_close(starts["mean"].detach(), vectors.mean(dim=0) * scale)


def test_a_survey_draws_every_vector_alike_and_none_twice() -> None:
    vectors = torch.arange(1.0, 9001).unsqueeze(1)
    sample = survey([vectors], atoms=None, seed=0).sample[:, 0]
    assert len(sample.unique()) == len(sample) == 4096
    assert float(sample.mean()) == pytest.approx(4500, rel=0.03)
    assert not torch.equal(sample, sample.sort().values)
    assert torch.equal(sample, survey(vectors.split(11), atoms=None, seed=0).sample[:, 0])
    assert not torch.equal(sample, survey([vectors], atoms=None, seed=1).sample[:, 0])
    assert len(survey([vectors], atoms=5000, seed=0).sample) == 5000


def test_a_vector_at_the_centre_starts_in_some_direction() -> None:
    model = initial(torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.ones(2), -0.5, seed=0)
    torch.testing.assert_close(model.W_d.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(model.W_d[1], torch.tensor([1.0, 0.0]))


def test_equal_vectors_are_rebuilt_without_a_latent() -> None:
    found = fit_dictionary(torch.ones(20, 4), extractor="sae", options=SHORT, atoms=3)
    codes = encode(found, torch.ones(1, 4))
    torch.testing.assert_close(reconstruction(found, codes), torch.ones(1, 4), rtol=0.05, atol=0.05)
    assert found.atoms.isfinite().all()


def test_the_default_number_of_active_latents_fits_the_atoms() -> None:
    assert [TopKOptions().active(atoms) for atoms in (1, 3, 8, 100, 128, 5000)] == [1, 1, 2, 25, 32, 32]
    assert TopKOptions(k=5).active(5) == 5


def test_prefixes_of_few_atoms_are_fewer() -> None:
    assert MatryoshkaOptions().bounds(1536) == (48, 144, 336, 720, 1536)
    assert MatryoshkaOptions().bounds(3) == (1, 3)
    assert MatryoshkaOptions().bounds(1) == (1,)


def test_every_variant_is_registered_with_its_paper() -> None:
    for name, variant in VARIANTS.items():
        entry = extractors.get(name)
        assert entry.paper
        assert entry.summary
        assert entry.options is variant.options


@pytest.mark.parametrize(
    ("extractor", "options", "complaint"),
    [
        ("sae", {"steps": 0}, "steps: expected at least 1, got 0"),
        ("sae", {"batch_size": 0}, "batch_size: expected at least 1"),
        ("sae", {"buffer": 1}, "buffer: expected at least 2"),
        ("sae", {"log_every": 0}, "log_every: expected at least 1"),
        ("sae", {"dead_after": 0}, "dead_after: expected at least 1"),
        ("sae", {"learning_rate": 0}, "learning_rate: expected a positive number"),
        ("sae", {"warm_up": 1.5}, "warm_up: expected a share"),
        ("sae", {"centre": "median"}, "centre: expected one of geometric_median, mean, got 'median'"),
        ("sae", {"l1": -1}, "l1: expected 0 or more"),
        ("sae", {"resample_at": (0.5, 1.0)}, "resample_at: expected shares"),
        ("sae", {"k": 3}, "no option 'k'"),
        ("sae_top_k", {"k": 0}, "k: expected at least 1, got 0"),
        ("sae_top_k", {"k": 9}, r"k: expected at most 8 \(the number of atoms\), got 9"),
        ("sae_batch_top_k", {"k": 9}, "k: expected at most 8"),
        ("sae_top_k", {"auxiliary": -1}, "auxiliary: expected 0 or more"),
        ("sae_top_k", {"auxiliary_k": 0}, "auxiliary_k: expected at least 1"),
        ("sae_top_k", {"auxiliary": 0, "auxiliary_k": 4}, "auxiliary_k: nothing reads it while auxiliary is 0"),
        ("sae_matryoshka", {"prefixes": (0.5, 0.25, 1.0)}, "prefixes: expected rising shares"),
        ("sae_matryoshka", {"prefixes": (0.5,)}, "of which the last is 1"),
        ("sae_matryoshka", {"prefixes": ()}, "prefixes: expected rising shares"),
    ],
)
def test_options_refuse(extractor: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        fit_dictionary(normal(40, 4), extractor=extractor, options=options, atoms=8)


@pytest.mark.parametrize(
    ("chunks", "arguments", "complaint"),
    [
        ([normal(5, 3)], {"atoms": 6}, r"1 to 5 \(the number of non-zero vectors\), got 6"),
        ([normal(5, 3), torch.zeros(9, 3)], {"atoms": 6}, "1 to 5 .* got 6"),
        ([normal(5, 3)], {"atoms": 0}, "got 0"),
        ([torch.zeros(7, 3)], {}, "at least 2 that are not all zero, got 0 of 7"),
        ([torch.zeros(7, 3), normal(1, 3)], {}, "got 1 of 8"),
        ([normal(5, 3), normal(5, 4)], {}, "expected 3 channels as in the first chunk, got 4"),
        ([normal(5, 3), torch.tensor([[1.0, float("nan"), 1.0]])], {}, "NaN or infinity in 1 of the 6"),
        ([normal(5, 3, 2)], {}, r"\[n, C\], got \(5, 3, 2\)"),
        ([normal(5, 3)], {"extractor": "sea"}, "unknown sparse autoencoder 'sea'.*did you mean 'sae'"),
    ],
)
def test_streams_that_cannot_be_trained_on_are_refused(
    chunks: list[Tensor], arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        Training(chunks, **{"extractor": "sae", **arguments})
