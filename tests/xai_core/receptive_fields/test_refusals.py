"""What receptive fields refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.xai_core.receptive_fields.networks import autoencoder
from tests.xai_core.tiny import pictures, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.concepts.dictionary import Dictionary
from xai_core.errors import NotFinite, UsageError
from xai_core.models import Classifier
from xai_core.receptive_fields import feature_vectors, latents, output_of, receptive_fields


def test_refusals() -> None:
    cnn, vit = tiny_relu_cnn(), tiny_vit()
    images, _ = pictures(2)
    owner = torch.tensor([0])
    vector = torch.ones(1, 16)

    def at(layer: str, owner: Tensor = owner, place: int = 0, vector: Tensor = vector) -> Any:
        return feature_vectors(layer, owner, torch.tensor([place]), vector)

    def refused(message: str, model: Classifier, scalars: Any, images: Tensor = images, **how: Any) -> None:
        with pytest.raises(UsageError, match=message):
            receptive_fields(model, images, scalars, **how)

    refused(r"unknown attributor 'srdd'.*did you mean 'srd'", cnn, at("layer3"), attributor="srdd")
    refused(r"no option 'step'", cnn, at("layer3"), attributor="integrated_gradients", options={"step": 3})
    refused(r"attributor 'srd' does not fit vit_tiny.*it fits cnn models", vit, at("blocks.0"), attributor="srd")
    refused(r"does not fit resnet10t.*no layer 'patch_embed'", cnn, at("layer3"), attributor="attn_lrp")
    refused(r"layer 'layer9'.*did you mean", cnn, at("layer9"))
    refused(r"layer 'fc'.*spatial positions", cnn, at("fc"))
    refused(r"layer 'patch_embed.proj'.*behind the patch embedding", vit, at("patch_embed.proj"))
    refused(r"owner: expected numbers in 0\.\.1.*from 2 to 2", cnn, at("layer3", torch.tensor([2])))
    refused(r"position: expected 0\.\.3 in layer 'layer3', got 4\.\.4", cnn, at("layer3", place=4))
    refused(
        r"vectors: expected the 16 channels of layer 'layer3'.*got 5", cnn, at("layer3", vector=torch.ones(1, 5))
    )
    refused(r"images: expected \[B, 3, H, W\]", cnn, at("layer3"), images=images[0])
    refused(r"batch_size: expected at least 1, got 0", cnn, at("layer3"), batch_size=0)
    refused(r"size: expected rows and columns", cnn, at("layer3"), size=(0, 4))
    refused(r"attn_lrp\.channels: expected norm or sum", vit, at("blocks.0"), options={"channels": "l1"})
    refused(
        r"kernel_shap\.samples: expected at least 100",
        cnn,
        at("layer3"),
        attributor="kernel_shap",
        options={"samples": 20},
    )
    with pytest.raises(NotFinite, match="image 1"):
        receptive_fields(cnn, images.index_fill(0, torch.tensor([1]), torch.nan), at("layer3", torch.tensor([1])))
    # A picture that no scalar asks for is not looked at.
    receptive_fields(cnn, images.index_fill(0, torch.tensor([1]), torch.nan), at("layer3"))


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = tiny_cnn()
    model.module.spare = nn.Conv2d(3, 8, 1)
    with pytest.raises(UsageError, match=r"layer 'spare'.*does not"):
        output_of(model, pictures(1)[0], "spare")


def test_scalars_are_checked_when_they_are_made() -> None:
    owner, atom = torch.tensor([0, 1]), torch.tensor([0, 1])
    dictionary = autoencoder(16)
    with pytest.raises(UsageError, match="position: expected 2 whole numbers"):
        feature_vectors("layer3", owner, torch.tensor([0.0, 1.0]), torch.ones(2, 16))
    with pytest.raises(UsageError, match=r"vectors: expected \[2, C\]"):
        feature_vectors("layer3", owner, atom, torch.ones(3, 16))
    with pytest.raises(UsageError, match="pooling: expected one of max, sum, class_token, got 'mean'"):
        latents("layer3", owner, dictionary, atom, "mean")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"latent: expected 0\.\.11, got 1\.\.12"):
        latents("layer3", owner, dictionary, torch.tensor([1, 12]))
    with pytest.raises(UsageError, match="LASSO codes have no gradient"):
        latents("layer3", owner, Dictionary(dictionary.atoms, dictionary.sizes), atom)
    images, _ = pictures(2)
    with pytest.raises(UsageError, match="a class token for 'class_token'"):
        receptive_fields(tiny_relu_cnn(), images, latents("layer3", owner, dictionary, atom, "class_token"))
