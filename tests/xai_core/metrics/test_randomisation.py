"""The randomisation checks against slow twins; they leave the model alone and make up no number."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity as skimage_ssim
from torch import Tensor, nn

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import CLASSES, SIZE, pictures, quarters, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.attribution import fit_method
from xai_core.attribution.explainer import Explainer
from xai_core.attribution.interface import misfit
from xai_core.coverage import SMALL_BUDGETS
from xai_core.errors import UsageError
from xai_core.metrics import Evaluation
from xai_core.metrics.randomisation.check import RandomisationOptions
from xai_core.metrics.randomisation.weights import layers_from_head, randomised_copies, reinitialise
from xai_core.metrics.structural_similarity import structural_similarity, unit_range
from xai_core.models import Classifier, ModelSpec, weights_digest
from xai_core.registry import build_options, methods, variant_id
from xai_core.train_demo_models import Pictures, shuffle_labels
from xai_core.training import kinds_of_method

SIMILARITY_NAMES = ("spearman", "pearson", "cosine", "ssim")
BUILD: dict[str, Callable[[], Classifier]] = {"vit": tiny_vit, "cnn": tiny_cnn, "relu_cnn": tiny_relu_cnn}


def measured(
    model: Classifier, explainer: Explainer, *wanted: tuple[Any, Any], count: int = 3, **more: Any
) -> Evaluation:
    """What checks say of the first pictures' maps."""
    images, targets = pictures(count)
    parts = quarters(count)
    maps = more.pop("maps", None)
    maps = explainer.maps(model, images, targets, parts) if maps is None else maps
    return evaluate(model, images, targets, maps, parts, list(wanted), explainer=explainer, **more)


def checks(**options: Any) -> list[tuple[Any, Any]]:
    return chosen("randomisation", **options)


def own_parameters(model: Classifier) -> dict[str, list[Tensor]]:
    """Every module's own parameters, copied."""
    named = {name: list(one.parameters(recurse=False)) for name, one in model.module.named_modules()}
    return {name: [value.clone() for value in values] for name, values in named.items() if values}


def unlike_any_initialisation(model: Classifier) -> Classifier:
    """The model with noise for weights, so that whatever is initialised anew differs."""
    generator = torch.Generator().manual_seed(9)
    for value in model.module.parameters():
        value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return model


# What is randomised, and in which order.


@pytest.mark.parametrize("build", BUILD.values())
def test_layers_go_from_the_head_to_the_stem(build: Callable[[], Classifier]) -> None:
    model = build()
    names = layers_from_head(model)
    defined = [name for name, module in model.module.named_modules() if list(module.parameters(recurse=False))]
    # These networks run as they are defined.
    assert list(names) == defined[::-1]
    assert model.module.get_submodule(names[0]) is model.module.get_classifier()
    assert not any(module._forward_pre_hooks for module in model.module.modules())


def test_what_is_defined_late_and_runs_early_is_randomised_late() -> None:
    torch.manual_seed(0)
    module = timm.create_model("fasternet_t0", num_classes=CLASSES)
    model = Classifier(module, ModelSpec("fasternet_t0", False, transform={"input_size": (3, 64, 64)}))
    names = layers_from_head(model)
    last_stage = [name for name in names if name.startswith("stages.3.")]
    # It is defined behind the blocks, and runs before them.
    assert [name for name in own_parameters(model) if name.startswith("stages.3.")][-2:] == last_stage[:-3:-1]
    assert sorted(names) == sorted(own_parameters(model))


class Mixer(nn.Module):
    """Torch's attention, which uses the parameters of a projection that is never called."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, CLASSES)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.stem = nn.Conv2d(3, 8, 8, stride=8)

    def forward_features(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).mean(dim=1))


def test_a_layer_that_is_not_called_stands_with_the_module_around_it() -> None:
    model = Classifier(Mixer(), ModelSpec("mixer", False, transform={"input_size": (3, SIZE, SIZE)}))
    names = layers_from_head(model)
    assert names[0] == "head"
    assert set(names[1:3]) == {"attention", "attention.out_proj"}
    assert names[3] == "stem"


@pytest.mark.parametrize("build", BUILD.values())
def test_every_layer_is_drawn_anew_up_to_the_fraction_and_none_behind_it(build: Callable[[], Classifier]) -> None:
    model = unlike_any_initialisation(build())
    before, names = own_parameters(model), layers_from_head(model)
    digest = weights_digest(model.module)
    seen = []
    for fraction, copied in randomised_copies(model, (0.3, 0.5, 1.0), seed=0):
        done = round(fraction * len(names))
        after = own_parameters(copied)
        for name in names:
            changed = [not torch.equal(*pair) for pair in zip(before[name], after[name], strict=True)]
            assert all(changed) if name in names[:done] else not any(changed), name
        assert not any(value.requires_grad for value in copied.module.parameters())
        seen.append(done)
    assert seen == [round(0.3 * len(names)), round(0.5 * len(names)), len(names)]
    assert weights_digest(model.module) == digest


def test_new_weights_are_fixed_by_the_seed_alone() -> None:
    model = tiny_vit()

    def last(fractions: tuple[float, ...], seed: int) -> str:
        return [weights_digest(copied.module) for _, copied in randomised_copies(model, fractions, seed)][-1]

    state = torch.get_rng_state()
    first = last((1.0,), 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert last((0.1, 0.6, 1.0), 0) == first
    assert last((1.0,), 1) != first


def test_layers_of_one_shape_get_different_weights() -> None:
    *_, (_, copied) = randomised_copies(tiny_vit(), (1.0,), seed=0)
    blocks = copied.module.blocks
    assert blocks[0].attn.qkv.weight.shape == blocks[1].attn.qkv.weight.shape
    assert not torch.equal(blocks[0].attn.qkv.weight, blocks[1].attn.qkv.weight)


def test_running_statistics_are_set_back_with_their_layer() -> None:
    *_, (_, copied) = randomised_copies(tiny_relu_cnn(), (1.0,), seed=0)
    assert torch.equal(copied.module.bn1.running_mean, torch.zeros_like(copied.module.bn1.running_mean))
    assert torch.equal(copied.module.bn1.running_var, torch.ones_like(copied.module.bn1.running_var))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(3.0 + 0.1 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0)))
        self.temperature = nn.Parameter(torch.tensor(2.5))
        self.unused = nn.Parameter(torch.full((4,), 1e-5))


def test_bare_parameters_keep_their_scale_and_lose_their_content() -> None:
    layer = Bare()
    before = layer.table.detach().clone()
    reinitialise(layer, seed=5)
    after = layer.table.detach()
    assert after.mean() == pytest.approx(3.0, abs=0.02)
    assert after.std() == pytest.approx(0.1, rel=0.1)
    assert abs(np.corrcoef(before.flatten(), after.flatten())[0, 1]) < 0.1
    # One number, or equal ones, hold nothing but their scale.
    assert layer.temperature.item() == 2.5
    assert torch.equal(layer.unused.detach(), torch.full((4,), 1e-5))


def test_what_a_network_remembers_of_its_weights_is_forgotten() -> None:
    torch.manual_seed(0)
    module = timm.create_model("efficientformer_l1", num_classes=CLASSES).eval()
    model = Classifier(module, ModelSpec("efficientformer_l1", False))
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name.endswith("attention_biases"):
                value.normal_()
        # Its attention keeps the biases as it first read them in evaluation mode, and they are bare parameters.
        for _, copied in randomised_copies(model, (0.01, 1.0), seed=0):
            found = copied.module(image)
        assert torch.equal(found, copied.module.train().eval()(image))


# What is measured.


def slow_similarity(name: str, a: np.ndarray, b: np.ndarray, absolute: bool) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = (np.abs(a), np.abs(b)) if absolute else (a, b)
    if name == "spearman":
        return float(spearmanr(a.ravel(), b.ravel()).statistic)
    if name == "pearson":
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    if name == "cosine":
        return float(np.vdot(a, b) / np.sqrt(np.vdot(a, a) * np.vdot(b, b)))
    a, b = ((one - one.min()) / (one.max() - one.min()) for one in (a, b))
    return float(skimage_ssim(a, b, data_range=1.0))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", SIMILARITY_NAMES)
def test_values_and_curves_agree_with_a_slow_twin(name: str, absolute: bool) -> None:
    model, explainer = tiny_vit(), Explainer("gradient")
    images, targets = pictures(2)
    options = {"similarity": name, "absolute": absolute, "fractions": (0.4, 1.0), "seed": 3}
    fast = measured(model, explainer, *checks(**options), count=2)
    (metric,) = fast.values
    names = layers_from_head(model)
    for b in range(2):
        one = slice(b, b + 1)
        own = explainer.maps(model, images[one], targets[one])[0].numpy()
        expected = [1.0]
        for _, copied in randomised_copies(model, (0.4, 1.0), seed=3):
            other = explainer.maps(copied, images[one], targets[one])[0].numpy()
            expected.append(slow_similarity(name, own, other, absolute))
        curve = fast.curves[metric]
        np.testing.assert_allclose(curve.prob[b].numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(curve.fraction[b].numpy(), [0, round(0.4 * len(names)) / len(names), 1])
        assert float(fast.values[metric][b]) == pytest.approx(expected[-1], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(7, 20), st.integers(7, 20), st.integers(0, 10_000), st.floats(1e-30, 1e30))
def test_ssim_is_that_of_scikit_image(height: int, width: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = unit_range(size * torch.randn(3, height, width, generator=generator, dtype=torch.float64))
    noise = torch.rand(3, height, width, generator=generator, dtype=torch.float64)
    b = (a + torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64).view(3, 1, 1) * (noise - 0.5)).clamp(0, 1)
    expected = [skimage_ssim(one.numpy(), other.numpy(), data_range=1.0) for one, other in zip(a, b, strict=True)]
    np.testing.assert_allclose(structural_similarity(a, b), expected, atol=1e-9)
    assert float(structural_similarity(a, b)[0]) == pytest.approx(1.0, abs=1e-9)


def test_ssim_refuses_what_its_window_does_not_fit() -> None:
    with pytest.raises(UsageError, match="at least 7 x 7"):
        structural_similarity(torch.zeros(1, 6, 9), torch.zeros(1, 6, 9))
    with pytest.raises(UsageError, match=r"got \(1, 9, 9\) and \(2, 9, 9\)"):
        structural_similarity(torch.zeros(1, 9, 9), torch.zeros(2, 9, 9))


@cache
def fitting() -> tuple[tuple[str, str], ...]:
    """Every method with the first tiny model that it fits."""
    built = {name: build() for name, build in BUILD.items()}
    cases = []
    for entry in methods:
        options = build_options(entry, SMALL_BUDGETS.get(entry.name, {}))
        cases += [(entry.name, name) for name, model in built.items() if misfit(entry, model, options) is None][:1]
    return tuple(cases)


@pytest.mark.parametrize(("method", "name"), fitting())
def test_every_method_can_be_checked(method: str, name: str) -> None:
    model = BUILD[name]()
    model.module.float()
    images, targets = (values[:2] for values in pictures(2))
    images = images.float()
    entry = methods.get(method)
    options = build_options(entry, SMALL_BUDGETS.get(method, {}))
    how = {"method": method, "options": options}
    fitted = fit_method(model, images, targets, **how, parts=quarters(2)) if entry.fit else None
    explainer = Explainer(method, options, fitted)
    digest = weights_digest(model.module)
    maps = explainer.maps(model, images, targets, quarters(2))
    wanted = [*checks(fractions=(1.0,)), *checks(test="class", similarity="pearson")]
    found = evaluate(model, images, targets, maps, quarters(2), wanted, explainer=explainer)
    weights, other_class = found.values.values()
    for name, values in found.values.items():
        assert not found.broken[name].any()
        assert all(-1 <= value <= 1 for value in values[~values.isnan()].tolist())
    assert (weights[~weights.isnan()] < 0.9999).all()
    if not entry.class_specific:
        torch.testing.assert_close(other_class, torch.ones_like(other_class), rtol=0, atol=1e-9)
    assert weights_digest(model.module) == digest


def test_every_method_is_among_those() -> None:
    assert {method for method, _ in fitting()} == {name for name in methods.names() if not kinds_of_method(name)}


def test_the_other_class_is_a_fixed_step_away() -> None:
    model, explainer = tiny_cnn(), Explainer("gradient")
    images, targets = pictures(4)
    found = measured(model, explainer, *checks(test="class", similarity="pearson", seed=1), count=4)
    (values,) = found.values.values()
    own = explainer.maps(model, images, targets)
    by_step = []
    for step in range(1, CLASSES):
        other = explainer.maps(model, images, (targets + step) % CLASSES)
        by_step.append(
            [slow_similarity("pearson", a.numpy(), b.numpy(), False) for a, b in zip(own, other, strict=True)]
        )
    matching = [row for row in by_step if np.allclose(row, values, atol=1e-6)]
    assert len(matching) == 1
    steps = {
        tuple(measured(model, explainer, *checks(test="class", seed=seed), count=1).values.popitem()[1].tolist())
        for seed in range(12)
    }
    assert len(steps) > 1


def test_a_model_of_one_class_has_no_other() -> None:
    torch.manual_seed(0)
    module = timm.create_model("resnet10t", num_classes=1, channels=(8, 8, 8, 8)).double()
    model = Classifier(module, ModelSpec("resnet10t", False, transform={"input_size": (3, SIZE, SIZE)}))
    images, _ = pictures(1)
    with pytest.raises(UsageError, match="two or more classes"):
        evaluate(
            model,
            images,
            torch.zeros(1, dtype=torch.long),
            torch.randn(1, SIZE, SIZE),
            None,
            checks(test="class"),
            explainer=Explainer("gradient"),
        )


def saved(model: Classifier, path: Path) -> str:
    save_file({name: value.contiguous() for name, value in model.module.state_dict().items()}, path)
    return str(path)


def test_labels_compares_with_the_model_of_the_checkpoint(tmp_path: Path) -> None:
    model, explainer = tiny_cnn(), Explainer("gradient")
    images, targets = pictures(3)
    other = unlike_any_initialisation(tiny_cnn())
    other.module.float().double()
    path = saved(other, tmp_path / "shuffled.safetensors")
    found = measured(model, explainer, *checks(test="labels", checkpoint=path))
    ((name, values),) = found.values.items()
    assert name == "randomisation[test=labels,checkpoint=shuffled.safetensors]"
    own, others = explainer.maps(model, images, targets), explainer.maps(other, images, targets)
    expected = [slow_similarity("spearman", a.numpy(), b.numpy(), False) for a, b in zip(own, others, strict=True)]
    np.testing.assert_allclose(values, expected, atol=1e-6)
    itself = checks(test="labels", checkpoint=saved(model, tmp_path / "same.safetensors"))
    (same,) = measured(model, explainer, *itself).values.values()
    np.testing.assert_allclose(same, 1.0, atol=1e-4)


def test_labels_refuses_a_checkpoint_that_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    model, explainer = tiny_cnn(), Explainer("gradient")
    with pytest.raises(UsageError, match=r"randomisation\.checkpoint: cannot be used: .*no file at"):
        measured(model, explainer, *checks(test="labels", checkpoint=str(tmp_path / "none.safetensors")))
    misfitting = saved(tiny_relu_cnn(), tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"randomisation\.checkpoint: cannot be used: .*does not fit the model"):
        measured(model, explainer, *checks(test="labels", checkpoint=misfitting))


def test_shuffled_labels_are_the_same_labels_on_other_pictures() -> None:
    count = 300
    labels = torch.arange(count) % CLASSES
    drawn = Pictures(torch.arange(count), labels, torch.arange(count))
    shuffled = shuffle_labels(drawn, seed=0)
    assert torch.equal(shuffled.images, drawn.images)
    assert torch.equal(shuffled.guides.sort().values, drawn.guides)
    assert torch.equal(shuffled.labels, labels[shuffled.guides])
    assert (shuffled.labels == labels).double().mean() == pytest.approx(1 / CLASSES, abs=0.1)
    assert torch.equal(shuffle_labels(drawn, seed=0).labels, shuffled.labels)
    assert not torch.equal(shuffle_labels(drawn, seed=1).labels, shuffled.labels)


# What several metrics and images share.


def test_a_second_similarity_explains_nothing_again() -> None:
    model, explainer = tiny_cnn(), Explainer("gradient")
    passes: list[int] = []
    # A copy of the model has copies of its hooks, which tell the same list.
    model.module.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    layers_from_head(model)
    maps = explainer.maps(model, *pictures(3))
    passes.clear()
    measured(model, explainer, *checks(), maps=maps)
    once = list(passes)
    passes.clear()
    both = [option for name in SIMILARITY_NAMES for option in checks(similarity=name)]
    measured(model, explainer, *both, maps=maps)
    assert passes == once
    # The method's own trial passes on the copy aside, each fraction explains the whole batch at once.
    assert once.count(3) == 4


@pytest.mark.parametrize("test", ["weights", "class"])
def test_a_batch_equals_its_images_one_by_one(test: str) -> None:
    model, explainer = tiny_vit(), Explainer("rise", methods.get("rise").options(masks=16))
    wanted = [option for name in SIMILARITY_NAMES for option in checks(test=test, similarity=name)]
    images, targets = pictures(3)
    maps = explainer.maps(model, images, targets)
    together = evaluate(model, images, targets, maps, None, wanted, explainer=explainer, batch_size=2)
    for b in range(3):
        one = slice(b, b + 1)
        alone = evaluate(model, images[one], targets[one], maps[one], None, wanted, explainer=explainer)
        for name, values in together.values.items():
            torch.testing.assert_close(alone.values[name][0], values[b], rtol=0, atol=1e-4)


# Where there is no value.


def test_a_map_that_says_nothing_has_no_similarity() -> None:
    model, explainer = tiny_cnn(), Explainer("gradient")
    images, targets = pictures(3)
    maps = explainer.maps(model, images, targets)
    maps[0] = 2.0
    maps[1, 0, 0] = torch.nan
    wanted = [*checks(), *checks(similarity="ssim"), *checks(test="class", similarity="cosine")]
    found = measured(model, explainer, *wanted, maps=maps)
    for name, values in found.values.items():
        assert found.reasons[name] == ("the map is constant", "the map is not finite", None)
        assert values.isnan().tolist() == [True, True, False]
        assert not found.broken[name].any()
    assert found.curves["randomisation"].prob.isnan().all(dim=1).tolist() == [True, True, False]


def test_magnitudes_that_are_equal_say_nothing() -> None:
    model, explainer = tiny_cnn(), Explainer("gradient")
    signs = torch.where(torch.arange(SIZE * SIZE).view(1, SIZE, SIZE) % 2 == 0, 1.0, -1.0)
    found = measured(model, explainer, *checks(), *checks(absolute=True), count=1, maps=signs)
    assert [told for (told,) in found.reasons.values()] == [None, "the map is constant"]


class Unlucky(nn.Linear):
    """A head whose new weights are no numbers, or all the same."""

    fill = torch.nan

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.fill)


class Dull(Unlucky):
    fill = 0.0


def with_head(model: Classifier, head: type[nn.Linear]) -> Classifier:
    own = model.module.get_classifier()
    replaced = head(own.in_features, own.out_features, dtype=own.weight.dtype)
    replaced.load_state_dict(own.state_dict())
    model.module.head = replaced
    return Classifier(model.module, model.spec)


@pytest.mark.parametrize(
    ("method", "head", "reason"),
    [
        ("gradient", Unlucky, "the map of the randomised model is not finite"),
        ("gradient", Dull, "the map of the randomised model is constant"),
        # It tries out whether the blocks add up as it expects, and where all is NaN they do not.
        ("t_lrp", Unlucky, "the method refuses the randomised model"),
    ],
)
def test_a_randomised_model_without_a_map_gives_its_reason(
    method: str, head: type[nn.Linear], reason: str
) -> None:
    found = measured(with_head(tiny_vit(), head), Explainer(method), *checks(fractions=(0.01, 1.0)))
    assert found.reasons["randomisation[fractions=0.01+1.0]"] == (reason,) * 3
    assert found.values["randomisation[fractions=0.01+1.0]"].isnan().all()
    curve = found.curves["randomisation[fractions=0.01+1.0]"].prob
    assert torch.equal(curve[:, 0], torch.ones(3, dtype=torch.float64))
    assert curve[:, 1:].isnan().all()


# What can be asked for.


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"test": "biases"}, "test: expected one of weights, labels, class, got 'biases'"),
        ({"similarity": "hog"}, "similarity: expected one of spearman, pearson, cosine, ssim, got 'hog'"),
        ({"fractions": ()}, "fractions: expected ascending numbers"),
        ({"fractions": (0.5, 0.5)}, "fractions: expected ascending numbers"),
        ({"fractions": (0.0, 0.5)}, "fractions: expected ascending numbers"),
        ({"fractions": (0.5, 1.5)}, "fractions: expected ascending numbers"),
        ({"test": "class", "fractions": (1.0,)}, "fractions: nothing reads it with test class"),
        ({"test": "labels"}, "checkpoint: expected with test labels"),
        ({"checkpoint": "a.safetensors"}, "checkpoint: nothing reads it with test weights"),
        (
            {"test": "labels", "checkpoint": "a.safetensors", "seed": 1},
            "seed: nothing reads it with test labels",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=rf"^(randomisation\.)?{told}"):
        RandomisationOptions(**options)


def test_ids_carry_what_is_off_its_default() -> None:
    def spelled(**options: Any) -> str:
        return variant_id("randomisation", RandomisationOptions(**options))

    assert spelled() == "randomisation"
    assert spelled(fractions=[0.5, 1.0], similarity="ssim") == "randomisation[similarity=ssim,fractions=0.5+1.0]"
    assert spelled(test="class", absolute=True) == "randomisation[test=class,absolute=true]"
