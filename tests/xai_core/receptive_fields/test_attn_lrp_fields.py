"""AttnLRP's fields against relevance propagated by hand, down to the patch embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.xai_core.attribution.test_attn_lrp import Account, BlockByHand, sum_rule, transformer, vit_with_offsets
from tests.xai_core.receptive_fields.networks import agree, vectors_at
from tests.xai_core.tiny import pictures
from xai_core.models import Classifier
from xai_core.receptive_fields import output_of, receptive_fields


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def patches_by_hand(model: Classifier, image: Tensor, clean: Tensor, place: int, gamma: float) -> Tensor:
    """Relevance ``[patches, C]`` of the embeddings for a vector of the last block, by AttnLRP's propositions."""
    network, account = model.module, Account()
    embedded = torch.cat([network.cls_token[0], network.patch_embed(image[None])[0]])
    blocks = [BlockByHand(block, gamma, account) for block in network.blocks]
    state = embedded + network.pos_embed[0]
    for block in blocks:
        state = block.forward(state)
    relevance = torch.zeros_like(state)
    relevance[place] = state[place] * clean / clean.norm()
    for block in reversed(blocks):
        relevance = block.backward(relevance)
    return sum_rule(relevance, embedded, network.pos_embed[0])[0][1:]


@pytest.mark.parametrize("gamma", [0.05, 0.0])
def test_attn_lrp(gamma: float) -> None:
    """Of the class token and of a patch token; the norm over channels is the default, the sum keeps the sign."""
    model = vit_with_offsets()
    images, _ = pictures(2)
    owner, place = [0, 1], [0, 5]
    scalars = vectors_at(model, images, owner, place, "blocks.1")
    norm, summed = (
        receptive_fields(model, images, scalars, options={"gamma_linear": gamma, **more})
        for more in ({}, {"channels": "sum"})
    )
    assert norm.shape == (2, *model.token_grid)
    for number, (image, at) in enumerate(zip(owner, place, strict=True)):
        by_hand = patches_by_hand(model, images[image], scalars.vectors[number], at, gamma)
        agree(norm[number].flatten(), by_hand.norm(dim=1))
        agree(summed[number].flatten(), by_hand.sum(1))
    assert (summed < 0).any()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28}),
        ("vit_base_patch16_gap_224", {}),
    ],
)
def test_attn_lrp_adds_up_where_nothing_but_values_carries_relevance(name: str, arguments: dict) -> None:
    """Distilled, with registers, without a class token: each against gradient times input of another network.

    Where all scores are 0 an attention is an average, whose relevance proposition 3.3 halves, and nothing else is
    lost in a block without a perceptron. The other network has that half and every norm's deviation frozen.
    """
    model = transformer(name, **arguments)
    network = model.module
    images = torch.randn(2, 3, *model.input_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for block in network.blocks:
            width = block.attn.qkv.weight.shape[0] // 3
            block.attn.qkv.weight[: 2 * width] = 0
            block.mlp.fc2.weight.zero_()
        for key, parameter in network.named_parameters():
            if key.endswith("bias") or key in ("cls_token", "pos_embed", "reg_token", "dist_token"):
                parameter.zero_()
    last = f"blocks.{len(network.blocks) - 1}"
    prefix = model.num_prefix_tokens
    scalars = vectors_at(model, images, [0, 1], [prefix, prefix + 1], last)
    got = receptive_fields(model, images, scalars, options={"channels": "sum"})
    deviations = [
        part.register_forward_hook(
            lambda norm, inputs, _output: (
                (inputs[0] - inputs[0].mean(-1, keepdim=True))
                / (inputs[0].var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
                * norm.weight
            )
        )
        for key, part in network.named_modules()
        if key.endswith("norm1")
    ]
    patches: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        patches.append(output.detach().requires_grad_(True))
        return patches[-1]

    handles = [network.patch_embed.register_forward_hook(keep)]
    handles += [block.attn.register_forward_hook(lambda _m, _i, output: half(output)) for block in network.blocks]
    with torch.enable_grad():
        output = output_of(model, images, last)
    for handle in (*handles, *deviations):
        handle.remove()
    clean = scalars.vectors
    value = (output[[0, 1], [prefix, prefix + 1]] * clean / clean.norm(dim=1, keepdim=True)).sum()
    (gradient,) = torch.autograd.grad(value, patches[0])
    agree(got.flatten(1), (gradient * patches[0].detach()).sum(-1))


def half(tensor: Tensor) -> Tensor:
    """The tensor with half its gradient."""
    return 0.5 * tensor + (0.5 * tensor).detach()
