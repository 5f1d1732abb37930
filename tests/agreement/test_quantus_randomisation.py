"""Randomisation checks against Quantus: where both agree, and what Quantus does otherwise."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from quantus import MPRT, RandomLogit
from quantus.functions.similarity_func import correlation_pearson, correlation_spearman, cosine, ssim
from quantus.helpers.model.pytorch_model import PyTorchModel
from torch import Tensor, nn

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import CLASSES, SIZE, pictures, tiny_relu_cnn, tiny_vit
from xai_core.attribution.explainer import Explainer
from xai_core.metrics.randomisation.similarity import SIMILARITIES
from xai_core.metrics.randomisation.weights import layers_from_head, randomised_copies, reinitialise
from xai_core.models import Classifier, ModelSpec

EXPLAINER = Explainer("gradient")
# What Quantus seeds before every layer: its default seed, and 1.
THEIR_SEED = 43


def theirs(metric: Any, model: Classifier, images: Tensor, targets: Tensor) -> Any:
    """A metric of Quantus on the maps of our gradient."""

    def explain(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        images, classes = torch.as_tensor(inputs), torch.as_tensor(targets)
        return EXPLAINER.maps(Classifier(model, spec), images, classes).numpy()[:, None]

    spec = model.spec
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric(
            model=model.module,
            x_batch=images.numpy(),
            y_batch=targets.numpy(),
            a_batch=explain(model.module, images, targets),
            explain_func=explain,
            device="cpu",
            channel_first=True,
        )


def ours(model: Classifier, images: Tensor, targets: Tensor, **options: Any) -> list[float]:
    maps = EXPLAINER.maps(model, images, targets)
    found = evaluate(model, images, targets, maps, None, chosen("randomisation", **options), explainer=EXPLAINER)
    (values,) = found.values.values()
    return values.tolist()


def their_layers(model: Classifier) -> list[tuple[str, nn.Module]]:
    """Names of the layers that Quantus randomises and, of each step, a copy of the model."""
    steps = PyTorchModel(model.module).get_random_layer_generator(order="top_down", seed=42)
    return [(name, deepcopy(copied)) for name, copied in steps]


@pytest.mark.parametrize("absolute", [False, True])
def test_every_step_of_the_cascade_agrees_for_the_same_new_weights(absolute: bool) -> None:
    model, (images, targets) = tiny_relu_cnn(), pictures(3)
    scores = theirs(MPRT(abs=absolute, disable_warnings=True), model, images, targets)
    names = layers_from_head(model)
    assert list(scores) == ["original", *names]
    copied = Classifier(deepcopy(model.module), model.spec)
    own = EXPLAINER.maps(model, images, targets)
    for name in names:
        reinitialise(copied.module.get_submodule(name), THEIR_SEED)
        maps = EXPLAINER.maps(copied, images, targets)
        pair = (own.abs(), maps.abs()) if absolute else (own, maps)
        np.testing.assert_allclose(SIMILARITIES["spearman"](*pair), scores[name], atol=1e-6)


def test_similarities_of_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    b = a + torch.randn(3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    rows = a.flatten(1).numpy(), b.flatten(1).numpy()
    np.testing.assert_allclose(
        SIMILARITIES["spearman"](a, b), correlation_spearman(*rows, batched=True), atol=1e-9
    )
    np.testing.assert_allclose(SIMILARITIES["pearson"](a, b), correlation_pearson(*rows, batched=True), atol=1e-9)
    # Theirs is a distance: 0 where the maps are alike.
    distances = [cosine(*pair) for pair in zip(*rows, strict=True)]
    np.testing.assert_allclose(SIMILARITIES["cosine"](a, b), 1 - np.array(distances), atol=1e-9)
    # Theirs slides its window along the rows written one behind the other, and knows no columns.
    turned = [
        ssim(*pair) for pair in zip(*(one.transpose(1, 2).flatten(1).numpy() for one in (a, b)), strict=True)
    ]
    lines = ssim(*rows, batched=True)
    assert max(abs(np.array(turned) - lines)) > 1e-3
    both = SIMILARITIES["ssim"](a, b), SIMILARITIES["ssim"](a.transpose(1, 2), b.transpose(1, 2))
    torch.testing.assert_close(*both)


def test_quantus_gives_layers_of_one_shape_the_same_weights() -> None:
    model = tiny_vit()
    blocks = their_layers(model)[-1][1].blocks
    assert torch.equal(blocks[0].attn.qkv.weight, blocks[1].attn.qkv.weight)
    assert torch.equal(blocks[0].mlp.fc1.weight, blocks[1].mlp.fc1.weight)
    *_, (_, copied) = randomised_copies(model, (1.0,), seed=0)
    assert not torch.equal(copied.module.blocks[0].attn.qkv.weight, copied.module.blocks[1].attn.qkv.weight)


def test_quantus_leaves_bare_parameters_as_they_were() -> None:
    model = tiny_vit()
    names, modules = zip(*their_layers(model), strict=True)
    assert "" in layers_from_head(model)
    assert "" not in names
    assert torch.equal(modules[-1].pos_embed, model.module.pos_embed)
    *_, (_, copied) = randomised_copies(model, (1.0,), seed=0)
    assert not torch.equal(copied.module.pos_embed, model.module.pos_embed)


def test_quantus_takes_modules_without_parameters_for_layers() -> None:
    torch.manual_seed(0)
    shape = {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 8,
        "depths": (2, 2),
        "num_heads": (2, 2),
    }
    module = timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **shape)
    model = Classifier(module, ModelSpec("swin_tiny_patch4_window7_224", False, create_args=shape))
    names, modules = zip(*their_layers(model), strict=True)
    empty = names.index("layers.1.blocks.1")
    before, after = modules[empty - 1].state_dict(), modules[empty].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(layers_from_head(model)) == sorted(
        name for name, one in module.named_modules() if list(one.parameters(recurse=False))
    )


def test_quantus_follows_the_order_of_definition() -> None:
    torch.manual_seed(0)
    module = timm.create_model("fasternet_t0", num_classes=CLASSES)
    model = Classifier(module, ModelSpec("fasternet_t0", False, transform={"input_size": (3, 64, 64)}))
    stage = "stages.3."
    names = [name for name, one in module.named_modules() if hasattr(one, "reset_parameters")][::-1]
    their = [name for name in names if name.startswith(stage)]
    our = [name for name in layers_from_head(model) if name.startswith(stage)]
    assert set(their) == set(our)
    # The down-sampling is a stage's entrance: to randomise it is to randomise what all its blocks are fed.
    assert their[0] == our[-2] == "stages.3.downsample.norm"


def test_the_average_of_quantus_counts_the_untouched_model_as_a_step() -> None:
    model, (images, targets) = tiny_relu_cnn(), pictures(3)
    steps = theirs(MPRT(disable_warnings=True), model, images, targets)
    average = theirs(MPRT(return_average_correlation=True, disable_warnings=True), model, images, targets)
    assert steps["original"] == pytest.approx([1.0] * 3)
    layers = np.mean([scores for name, scores in steps.items() if name != "original"], axis=0)
    count = len(steps) - 1
    np.testing.assert_allclose(average, (1.0 + count * layers) / (count + 1), atol=1e-9)
    assert np.all(np.array(average) > layers)


def test_random_logit_agrees_for_the_same_class() -> None:
    model, (images, targets) = tiny_relu_cnn(), pictures(3)
    metric = {"num_classes": CLASSES, "disable_warnings": True}
    for similarity, function in (("pearson", correlation_pearson), ("spearman", correlation_spearman)):
        one = theirs(RandomLogit(similarity_func=function, **metric), model, images[:1], targets[:1])
        by_seed = {
            seed: ours(model, images[:1], targets[:1], test="class", similarity=similarity, seed=seed)
            for seed in range(12)
        }
        assert len({values[0] for values in by_seed.values()}) == CLASSES - 1
        assert sum(values == pytest.approx(one, abs=1e-6) for values in by_seed.values()) > 0


def test_the_class_of_quantus_depends_on_an_images_place_in_the_batch() -> None:
    model, (images, targets) = tiny_relu_cnn(), pictures(1)
    twice = images.expand(4, -1, -1, -1), targets.expand(4)
    metric = RandomLogit(
        similarity_func=correlation_pearson, num_classes=CLASSES, normalise=False, disable_warnings=True
    )
    assert len({round(score, 9) for score in theirs(metric, model, *twice)}) > 1
    assert len({round(score, 9) for score in ours(model, *twice, test="class", similarity="pearson")}) == 1


def test_the_ssim_of_quantus_depends_on_an_images_neighbours() -> None:
    """It divides the maps by the largest value of the batch, each of the two batches by its own."""
    model, (images, targets) = tiny_relu_cnn(), pictures(3)
    metric = RandomLogit(num_classes=CLASSES, disable_warnings=True)
    alone = theirs(metric, model, images[:1], targets[:1])[0]
    among = theirs(metric, model, images, targets)[0]
    assert abs(alone - among) > 1e-3
    options = {"test": "class", "similarity": "ssim"}
    assert ours(model, images[:1], targets[:1], **options)[0] == pytest.approx(
        ours(model, images, targets, **options)[0], abs=1e-6
    )
