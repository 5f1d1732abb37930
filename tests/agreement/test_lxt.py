"""Agreement with LXT, the authors' own implementation of AttnLRP's rules, on torchvision's vision transformer.

LXT ships a torchvision model for its cheaper relative CP-LRP only (no relevance through the softmax), so the
network is run here step by step with LXT's rule for each step; zennit's gamma rule stands in the linear layers, as
in LXT's own example.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer
from zennit.composites import NameMapComposite
from zennit.rules import Epsilon, Gamma

from tests.agreement.test_captum import pearson
from tests.agreement.test_captum_perturbation import real
from xai_core.attribution import attribute
from xai_core.models import Classifier, ModelSpec

functional = pytest.importorskip("lxt.explicit.functional", reason="LXT's rules: pip install lxt")
rules = pytest.importorskip("lxt.explicit.rules", reason="LXT's rules: pip install lxt")

# LXT adds its stabiliser without a sign: at its default of 1e-6 single denominators near -1e-6 rule whole maps.
EPSILON = 1e-12
NAMES = {
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln": "norm",
    "heads.head": "head",
    "ln_1": "norm1",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def timm_name(name: str) -> str:
    name = name.replace("encoder.layers.encoder_layer_", "blocks.")
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def as_in_torchvision(network: nn.Module, **sizes: int) -> VisionTransformer:
    """timm's transformer as torchvision's, with the same weights."""
    peer = VisionTransformer(**sizes).double().eval().requires_grad_(False)
    weights = network.state_dict()
    peer.load_state_dict({name: weights[timm_name(name)] for name in peer.state_dict()})
    return peer


def attention(layer: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    qkv = functional.linear_epsilon(tokens, layer.in_proj_weight, layer.in_proj_bias, EPSILON)
    queries, keys, values = (
        part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2)
    )
    scores = functional.matmul(queries, keys.transpose(2, 3), False, EPSILON)
    scores = functional.mul2(scores, layer.head_dim**-0.5)
    mixed = functional.matmul(functional.softmax(scores, -1), values, False, EPSILON)
    joined = mixed.transpose(1, 2).flatten(2)
    return functional.linear_epsilon(joined, layer.out_proj.weight, layer.out_proj.bias, EPSILON)


def norm(layer: nn.LayerNorm, tokens: Tensor) -> Tensor:
    return functional.layer_norm_grad_fn.apply(tokens, layer.weight, layer.bias, layer.eps, EPSILON)


def block(layer: nn.Module, tokens: Tensor) -> Tensor:
    attended = attention(layer.self_attention, norm(layer.ln_1, tokens))
    tokens = functional.add2(tokens, attended, False, EPSILON)
    first, activation, _, second, _ = layer.mlp
    hidden = second(rules.identity(activation, first(norm(layer.ln_2, tokens))))
    return functional.add2(tokens, hidden, False, EPSILON)


def logits(peer: VisionTransformer, images: Tensor) -> Tensor:
    patches = peer.conv_proj(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([peer.class_token.expand(len(images), -1, -1), patches], dim=1)
    positions = peer.encoder.pos_embedding.expand_as(tokens)
    tokens = functional.add2(tokens, positions, False, EPSILON)
    for layer in peer.encoder.layers:
        tokens = block(layer, tokens)
    return peer.heads(norm(peer.encoder.ln, tokens)[:, 0])


def relevance(peer: VisionTransformer, images: Tensor, targets: Tensor, gammas: tuple[float, float]) -> Tensor:
    perceptrons = [
        name for name, part in peer.named_modules() if isinstance(part, nn.Linear) and "attention" not in name
    ]
    convolution, linear = (Gamma(gamma) if gamma else Epsilon(EPSILON) for gamma in gammas)
    composite = NameMapComposite([(["conv_proj"], convolution), (perceptrons, linear)])
    pixels = images.clone().requires_grad_(True)
    with composite.context(peer), torch.enable_grad():
        score = logits(peer, pixels).gather(1, targets[:, None])
        (result,) = torch.autograd.grad(score, pixels, score.detach())
    return result.sum(1)


def small_transformers() -> tuple[VisionTransformer, Classifier]:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    network = timm.create_model("vit_tiny_patch16_224", **sizes).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    ours = Classifier(network, ModelSpec("vit_tiny_patch16_224", False, create_args=sizes))
    peer = as_in_torchvision(
        network, image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=24, mlp_dim=96, num_classes=5
    )
    return peer, ours


@pytest.mark.parametrize("gammas", [(0.25, 0.05), (0.0, 0.0), (100.0, 1.0)])
def test_the_same_transformer_of_torchvision(gammas: tuple[float, float]) -> None:
    peer, ours = small_transformers()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([0, 3, 4])
    torch.testing.assert_close(peer(images), ours(images))
    torch.testing.assert_close(logits(peer, images), ours(images))
    options = {"gamma_convolution": gammas[0], "gamma_linear": gammas[1]}
    got = attribute(ours, images, targets, method="attn_lrp", options=options)
    expected = relevance(peer, images, targets, gammas)
    for mine, theirs in zip(got, expected, strict=True):
        assert pearson(mine, theirs) >= 0.999
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.shared
def test_a_trained_transformer_on_a_photograph(shared_data: Path) -> None:
    ours, images, targets = real("deit_tiny_patch16_224", shared_data)
    peer = as_in_torchvision(
        ours.module, image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768
    )
    torch.testing.assert_close(peer(images), ours(images))
    got = attribute(ours, images, targets, method="attn_lrp")
    assert pearson(got, relevance(peer, images, targets, (0.25, 0.05))) >= 0.999
