"""What a map costs beside the pass of the model that it explains, and that no rounding makes its places tie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.xai_core.attribution.learned.small import explainer_of
from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.attribution.learned import ExplainerOptions, LearnedExplainer
from xai_core.attribution.learned.decoder import OneMap
from xai_core.demo_models import DEMO_MODELS
from xai_core.models import ModelSpec, load_classifier

#: Plain forwards that a map may cost, without refinement.
MOST_FORWARDS = 1.5


def predicted(explainer: LearnedExplainer, images: Tensor) -> Tensor:
    """Maps of the first class ``[B, h, w]``."""
    classes = torch.zeros(len(images), 1, dtype=torch.long)
    with torch.no_grad():
        return explainer.maps(explainer.read(images)[0], images, classes).squeeze(1)


def flops(function: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_a_map_costs_one_forward_and_a_little(name: str) -> None:
    model = load_classifier(ModelSpec(name))
    explainer = LearnedExplainer(model, ExplainerOptions().decoder)
    images = torch.zeros(2, 3, *model.input_size)
    plain, explained = flops(lambda: model(images)), flops(lambda: predicted(explainer, images))
    assert plain < explained <= MOST_FORWARDS * plain


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3), (8, 8)])
def test_the_last_convolution_is_one(size: tuple[int, int], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    last = OneMap(4).double()
    maps = torch.randn(3, 4, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_(True)
    found, plain = last(maps), F.conv2d(maps, last.weight, padding=1)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    toward = torch.randn_like(plain)
    leaves = (maps, last.weight)
    found, plain = (torch.autograd.grad((one * toward).sum(), leaves) for one in (found, plain))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tiny", [tiny_vit, tiny_cnn])
def test_an_autocast_around_it_makes_no_places_tie(tiny: Callable) -> None:
    """A map is an order: rounded to bfloat16, many of its places would share their score."""
    model = tiny()
    model.module.float()
    explainer, images = explainer_of(model), pictures(3)[0].float()

    def distinct(maps: Tensor) -> list[int]:
        assert maps.dtype == torch.float32
        return [len(one.unique()) for one in maps]

    usual = distinct(predicted(explainer, images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = distinct(predicted(explainer, images))
    assert usual == [maps.numel() for maps in predicted(explainer, images)]
    assert rounded == usual
