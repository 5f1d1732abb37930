"""Explained latents and their insertion curves against loops over latents and patches, on tiny networks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from tests.xai_core.tiny import pictures, tiny_relu_cnn, tiny_vit
from xai_core.baselines import Baseline, make_baseline
from xai_core.concepts import Dictionary, encode
from xai_core.concepts.cafe import (
    ACTIVATION,
    InsertionCurve,
    explain_latents,
    insertion,
    latent_insertion,
    locality,
    most_non_localised,
    rank_by_distance,
)
from xai_core.concepts.cafe.locality import Locality
from xai_core.concepts.vectors import to_vectors
from xai_core.errors import UsageError
from xai_core.layers import captured
from xai_core.models import Classifier
from xai_core.receptive_fields import feature_vectors, latents, receptive_fields

LAYERS = {"vit": "blocks.0", "cnn": "layer2"}
CHANNELS = {"vit": 24, "cnn": 8}
IMAGES = pictures(3)[0]
OWNER = torch.tensor([2, 0, 1, 0, 2])
LATENT = torch.tensor([0, 1, 2, 3, 4])


@pytest.fixture(scope="module")
def models() -> dict[str, Classifier]:
    return {"vit": tiny_vit(), "cnn": tiny_relu_cnn()}


def _dictionary(kind: str, atoms: int = 6) -> Dictionary:
    """Latents that fire somewhere in each picture, but for the last one, which never does."""
    # Behind a ReLU, weights that are as often negative as positive would leave some of them silent.
    weight = normal(atoms, CHANNELS[kind], seed=3) + {"vit": 0.0, "cnn": 0.4}[kind]
    weight[-1] = 0
    encoder = {"weight": weight, "bias": torch.zeros(atoms), "offset": torch.zeros(CHANNELS[kind])}
    return Dictionary(weight, torch.ones(atoms, dtype=torch.int64), encoder, "sae")


def _codes(model: Classifier, kind: str, image: Tensor) -> Tensor:
    """Codes ``[P, K]`` of one image, from a whole pass."""
    with torch.no_grad(), captured(model, [LAYERS[kind]]) as outputs:
        model(image[None])
    return encode(_dictionary(kind), to_vectors(model, outputs[LAYERS[kind]], LAYERS[kind])[0])


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_values_and_activations_equal_a_whole_pass_of_each_image(models: dict[str, Classifier], kind: str) -> None:
    model, before = models[kind], {"vit": 1, "cnn": 0}[kind]
    for pooling in ("max", "sum"):
        found = explain_latents(
            model, IMAGES, OWNER, LAYERS[kind], _dictionary(kind), LATENT, pooling=pooling, batch_size=2
        )
        assert found.activation.shape == (5, 4, 4)
        for index, (image, latent) in enumerate(zip(OWNER.tolist(), LATENT.tolist(), strict=True)):
            codes = _codes(model, kind, IMAGES[image])[before:, latent].float()
            torch.testing.assert_close(found.activation[index].flatten(), codes, rtol=1e-4, atol=1e-5)
            expected = {"max": codes.max(), "sum": codes.sum()}[pooling]
            torch.testing.assert_close(found.value[index], expected, rtol=1e-4, atol=1e-5)


def test_the_class_tokens_latents_have_values_and_fields(models: dict[str, Classifier]) -> None:
    model = models["vit"]
    found = explain_latents(
        model, IMAGES, OWNER, "blocks.0", _dictionary("vit"), LATENT, pooling="class_token", size=(2, 2)
    )
    for index, (image, latent) in enumerate(zip(OWNER.tolist(), LATENT.tolist(), strict=True)):
        value = _codes(model, "vit", IMAGES[image])[0, latent].float()
        torch.testing.assert_close(found.value[index], value, rtol=1e-4, atol=1e-5)
    assert found.receptive_field.shape == (5, 2, 2)
    fires = found.value > 0
    assert 1 <= int(fires.sum()) < 5
    assert found.receptive_field[fires].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_fields_are_those_of_the_latents_and_no_batch_changes_anything(
    models: dict[str, Classifier], kind: str
) -> None:
    model, layer, dictionary = models[kind], LAYERS[kind], _dictionary(kind)
    whole = explain_latents(model, IMAGES, OWNER, layer, dictionary, LATENT)
    scalars = latents(layer, OWNER, dictionary, LATENT)
    torch.testing.assert_close(whole.receptive_field, receptive_fields(model, IMAGES, scalars))
    parted = explain_latents(model, IMAGES, OWNER, layer, dictionary, LATENT, batch_size=1)
    alone = explain_latents(model, IMAGES[2:], torch.tensor([0]), layer, dictionary, LATENT[4:])
    for name, expected in vars(whole).items():
        torch.testing.assert_close(getattr(parted, name), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(getattr(alone, name)[0], expected[4], rtol=1e-4, atol=1e-6)
        assert expected.dtype == torch.float32
        assert not expected.requires_grad


def _slow(
    model: Classifier, kind: str, index: int, importance: Tensor, cells: int, blank: Baseline
) -> tuple[list[float], float]:
    """One latent's curve, patch by patch: the code at the position that is largest on the clean image."""
    image, latent = IMAGES[int(OWNER[index])], int(LATENT[index])
    before, side = {"vit": 1, "cnn": 0}[kind], 32 // cells
    clean = _codes(model, kind, image)[before:, latent]
    place = int(clean.argmax()) + before
    canvas = make_baseline(blank, model, image[None])[0].clone()
    mean = torch.nn.functional.adaptive_avg_pool2d(importance[None].double(), cells)[0].flatten()
    values = [float(_codes(model, kind, canvas)[place, latent])]
    for patch in sorted(range(cells**2), key=lambda one: (-float(mean[one]), one)):
        rows, columns = (slice(first * side, (first + 1) * side) for first in divmod(patch, cells))
        canvas[:, rows, columns] = image[:, rows, columns]
        values.append(float(_codes(model, kind, canvas)[place, latent]))
    curve = [value / float(clean.max()) for value in values]
    area = sum((one + other) / 2 / cells**2 for one, other in pairwise(curve))
    return curve, area


@pytest.mark.parametrize(
    ("kind", "grid", "blank"),
    [
        ("vit", None, Baseline("mean")),
        ("cnn", (4, 4), Baseline("blur", sigma=2.0)),
        ("cnn", (8, 8), Baseline("black")),
    ],
)
def test_curves_equal_a_loop_over_patches(
    models: dict[str, Classifier], kind: str, grid: tuple[int, int] | None, blank: Baseline
) -> None:
    model, layer, dictionary = models[kind], LAYERS[kind], _dictionary(kind)
    maps = {"coarse": normal(5, 4, 4).double(), "fine": normal(5, 16, 16, seed=1).double()}
    scalars = latents(layer, OWNER, dictionary, LATENT)
    found = insertion(model, IMAGES, scalars, maps, grid=grid, blank=blank, batch_size=7)
    cells = grid[0] if grid else 4
    for name, importance in maps.items():
        for index in (0, 3):
            curve, area = _slow(model, kind, index, importance[index], cells, blank)
            assert found[name].recovered[index].tolist() == pytest.approx(curve, rel=1e-4, abs=1e-5)
            assert float(found[name].area[index]) == pytest.approx(area, rel=1e-4, abs=1e-5)
        assert found[name].recovered[:, -1].tolist() == pytest.approx([1.0] * 5)
        torch.testing.assert_close(found[name].fraction, torch.linspace(0, 1, cells**2 + 1).double())


def test_fewer_steps_are_points_of_the_whole_curve_whatever_the_batch(models: dict[str, Classifier]) -> None:
    model, layer, dictionary = models["vit"], LAYERS["vit"], _dictionary("vit")
    scalars, maps = latents(layer, OWNER, dictionary, LATENT, "sum"), {"map": normal(5, 4, 4)}
    whole = insertion(model, IMAGES, scalars, maps)["map"]
    for size in (1, 4, 64):
        few = insertion(model, IMAGES, scalars, maps, steps=4, batch_size=size)["map"]
        torch.testing.assert_close(few.recovered, whole.recovered[:, ::4])
        torch.testing.assert_close(few.fraction, whole.fraction[::4])
    ends = insertion(model, IMAGES, scalars, maps, steps=1)["map"]
    torch.testing.assert_close(ends.area, (whole.recovered[:, 0] + 1) / 2)


def test_what_cannot_be_recovered_or_ranked_is_undefined(models: dict[str, Classifier]) -> None:
    model, dictionary = models["vit"], _dictionary("vit")
    silent = torch.tensor([5, 0])
    scalars = latents("blocks.0", torch.tensor([0, 2]), dictionary, silent)
    found = insertion(model, IMAGES, scalars, {"map": normal(2, 4, 4), "even": torch.ones(2, 4, 4)})
    assert found["map"].area.isnan().tolist() == [True, False]
    assert found["map"].recovered.isnan().all(dim=1).tolist() == [True, False]
    assert found["even"].area.isnan().all()


def test_a_latent_that_only_the_canvas_fires_has_no_curve(models: dict[str, Classifier]) -> None:
    model, dictionary = models["vit"], _dictionary("vit", atoms=40)
    on_clean, on_blank = (_codes(model, "vit", image)[0] for image in (IMAGES[0], torch.zeros_like(IMAGES[0])))
    chosen = ((on_clean == 0) & (on_blank > 0)).nonzero().flatten()[:1]
    assert len(chosen) == 1
    scalars = latents("blocks.0", torch.tensor([0]), dictionary, chosen, "class_token")
    found = insertion(model, IMAGES, scalars, {"map": normal(1, 4, 4)})["map"]
    assert found.recovered.isnan().all()
    assert found.area.isnan().all()


def test_feature_vectors_are_inserted_too(models: dict[str, Classifier]) -> None:
    model = models["cnn"]
    with torch.no_grad(), captured(model, ["layer2"]) as outputs:
        model(IMAGES)
    clean = to_vectors(model, outputs["layer2"], "layer2")[1, 7]
    scalars = feature_vectors("layer2", torch.tensor([1]), torch.tensor([7]), clean[None])
    found = insertion(model, IMAGES, scalars, {"srd": receptive_fields(model, IMAGES, scalars)}, grid=(4, 4))
    assert float(found["srd"].recovered[0, -1]) == pytest.approx(1.0)
    assert found["srd"].area.isfinite().all()


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_every_attributor_and_the_naive_ranking_are_compared(models: dict[str, Classifier], kind: str) -> None:
    model, layer, dictionary = models[kind], LAYERS[kind], _dictionary(kind)
    wanted = {
        "auto": None,
        "gradient": None,
        "integrated_gradients": {"steps": 4},
        "kernel_shap": {"grid": 2, "samples": 16},
    }
    found = latent_insertion(
        model, IMAGES, OWNER, layer, dictionary, LATENT, attributors=wanted, grid=(4, 4), steps=4
    )
    assert set(found) == {ACTIVATION, *wanted}
    explained = explain_latents(model, IMAGES, OWNER, layer, dictionary, LATENT)
    scalars = latents(layer, OWNER, dictionary, LATENT)
    maps = {ACTIVATION: explained.activation, "auto": explained.receptive_field}
    for name, curve in insertion(model, IMAGES, scalars, maps, grid=(4, 4), steps=4).items():
        torch.testing.assert_close(found[name].area, curve.area)
    # Exhaustive Shapley values of four cells rank at least as well as the reversed ranking of them.
    shapley = receptive_fields(
        model, IMAGES, scalars, attributor="kernel_shap", options={"grid": 2, "samples": 16}
    )
    both = insertion(model, IMAGES, scalars, {"best": shapley, "worst": -shapley}, grid=(2, 2))
    assert both["best"].area.mean() > both["worst"].area.mean()


def test_the_callers_modes_do_not_matter(models: dict[str, Classifier]) -> None:
    model, dictionary = models["vit"], _dictionary("vit")
    images = IMAGES.float()
    model = Classifier(tiny_vit().module.float(), model.spec)

    def area() -> InsertionCurve:
        return latent_insertion(
            model, images, OWNER, "blocks.0", dictionary, LATENT, attributors=("gradient",), steps=2
        )["gradient"]

    expected = area()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = area()
    torch.testing.assert_close(found.area, expected.area)
    assert all(parameter.grad is None for parameter in model.module.parameters())


# The search


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_the_search_lists_latents_by_the_mean_distance_of_their_exemplars(
    models: dict[str, Classifier], kind: str
) -> None:
    model, layer, dictionary = models[kind], LAYERS[kind], _dictionary(kind)
    owner = torch.tensor([2, 0, 1, 0, 2, 1, 0])
    chosen = torch.tensor([4, 1, 2, 4, 5, 1, 2])
    found, every = most_non_localised(model, IMAGES, owner, layer, dictionary, chosen, count=2, batch_size=1)
    explained = explain_latents(model, IMAGES, owner, layer, dictionary, chosen)
    expected = locality(explained.activation, explained.receptive_field)
    torch.testing.assert_close(vars(every), vars(expected), equal_nan=True, rtol=1e-4, atol=1e-6)
    means = {latent: float(expected.distance[chosen == latent].mean()) for latent in (1, 2, 4)}
    ranked = sorted(means, key=lambda latent: -means[latent])
    assert found.latent.tolist() == ranked[:2]
    assert found.distance.tolist() == pytest.approx([means[latent] for latent in ranked[:2]], rel=1e-4)
    assert found.exemplars.tolist() == [2, 2]


def test_exemplars_without_a_distance_do_not_count() -> None:
    nothing = torch.full((4,), torch.nan)
    distance = torch.tensor([0.5, torch.nan, 0.7, torch.nan])
    found = rank_by_distance(torch.tensor([3, 3, 1, 0]), Locality(distance, nothing, nothing, nothing), 9)
    assert found.latent.tolist() == [1, 3]
    assert found.exemplars.tolist() == [1, 1]
    empty = rank_by_distance(torch.tensor([3] * 4), Locality(nothing, nothing, nothing, nothing), 9)
    assert empty.latent.tolist() == []
    with pytest.raises(UsageError, match="at least 1, got 0"):
        rank_by_distance(torch.tensor([3] * 4), Locality(nothing, nothing, nothing, nothing), 0)


# Refusals


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"owner": torch.tensor([3, 0, 1, 0, 2])}, r"owner: expected 0\.\.2, got 0\.\.3"),
        ({"owner": torch.tensor([], dtype=torch.int64)}, "at least one owner"),
        ({"latents": torch.tensor([6, 0, 0, 0, 0])}, r"expected 0\.\.5"),
        ({"latents": LATENT[:2]}, "one a scalar"),
        ({"layer": "layer2", "kind": "cnn", "pooling": "class_token"}, "expected a layer with a class token"),
        ({"layer": "patch_embed.proj", "pooling": "class_token"}, "expected a layer with a class token"),
        ({"pooling": "mean"}, "max, sum, class_token"),
        ({"dictionary": Dictionary(normal(6, 24), torch.ones(6))}, "LASSO codes have no gradient"),
        ({"dictionary": _dictionary("cnn")}, r"expected shape \[N, 8\]"),
        ({"layer": "blocks.9"}, "did you mean|blocks.1"),
    ],
)
def test_explaining_refuses(models: dict[str, Classifier], change: dict, complaint: str) -> None:
    request = {
        "images": IMAGES,
        "owner": OWNER,
        "layer": "blocks.0",
        "latents": LATENT,
        "pooling": "max",
        **change,
    }
    kind = request.pop("kind", "vit")
    request.setdefault("dictionary", _dictionary(kind))
    with pytest.raises(UsageError, match=complaint):
        explain_latents(models[kind], **request)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"maps": {}}, "at least one ranking"),
        ({"maps": {"map": normal(4, 4, 4)}}, r"\[5, h, w\].*'map' of shape \(4, 4, 4\)"),
        ({"maps": {"map": normal(5, 4, 4).fill_(torch.nan)}}, "with NaN or infinity"),
        ({"grid": (0, 4)}, "rows and columns, got"),
        ({"grid": (4, 33)}, "rows and columns, got"),
        ({"steps": 17}, "expected 1 to 16"),
    ],
)
def test_inserting_refuses(models: dict[str, Classifier], change: dict, complaint: str) -> None:
    scalars = latents("blocks.0", OWNER, _dictionary("vit"), LATENT)
    request = {"maps": {"map": normal(5, 4, 4)}, **change}
    with pytest.raises(UsageError, match=complaint):
        insertion(models["vit"], IMAGES, scalars, **request)


def test_comparing_and_searching_refuse(models: dict[str, Classifier]) -> None:
    request = (models["vit"], IMAGES, OWNER, "blocks.0", _dictionary("vit"))
    with pytest.raises(UsageError, match="none named 'activation'"):
        latent_insertion(*request, LATENT, attributors=("activation",))
    with pytest.raises(UsageError, match="one an owner"):
        most_non_localised(*request, LATENT[:2])
