"""AttnLRP against relevance propagated layer by layer, token by token and head by head from the propositions."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.xai_core.tiny import CLASSES, SIZE, pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.propagation import AttnLrpOptions, attn_lrp_rules
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec, weights_digest
from xai_core.registry import methods

STABILISER = 1e-6
OPTIONS = [(0.25, 0.05), (0.0, 0.0), (10.0, 1.0)]


def in_double(model: Classifier, images: Tensor, classes: Tensor, options: AttnLrpOptions | None = None) -> Tensor:
    """The registered method without the interface's float32."""
    return methods.get("attn_lrp").function(model, images, classes, options or AttnLrpOptions(), len(images))


# The slow twin. Each function takes the relevance of an output and gives that of its inputs.


def gamma_rule(weight: Tensor, bias: Tensor, x: Tensor, relevance: Tensor, gamma: float) -> Tensor:
    """A linear layer on one vector (equation 24): contributions of the output's own sign count 1 + gamma times."""
    result = torch.zeros_like(x)
    for unit in range(len(weight)):
        parts, offset = x * weight[unit], bias[unit]
        output = float(parts.sum() + offset)
        favoured = (lambda v: v.clamp(min=0)) if output > 0 else (lambda v: v.clamp(max=0))
        parts, offset = parts + gamma * favoured(parts), offset + gamma * favoured(offset)
        total = parts.sum() + offset
        stabiliser = 0.0 if gamma == 0 else STABILISER if total >= 0 else -STABILISER
        result += parts / (total + stabiliser) * relevance[unit]
    return result


def norm_rule(norm: nn.LayerNorm, x: Tensor, relevance: Tensor) -> Tensor:
    """Layer norm of one token: dividing passes all on (proposition 3.4); mean, weight and bias are linear."""
    width = len(x)
    deviation = ((x - x.mean()).square().mean() + norm.eps).sqrt()
    dense = norm.weight[:, None] * (torch.eye(width) - 1 / width) / deviation
    return gamma_rule(dense, norm.bias, x, relevance, 0.0)


def product_rule(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix product (proposition 3.3): each of its products in proportion, half to either factor."""
    to_left, to_right = torch.zeros_like(left), torch.zeros_like(right)
    product = left @ right
    for row in range(left.shape[0]):
        for column in range(right.shape[1]):
            if relevance[row, column] != 0:
                parts = left[row] * right[:, column] * relevance[row, column] / (2 * product[row, column])
                to_left[row] += parts
                to_right[:, column] += parts
    return to_left, to_right


def softmax_rule(scores: Tensor, relevance: Tensor) -> Tensor:
    """Each row's Taylor expansion at the scores (proposition 3.1)."""
    weights = scores.softmax(-1)
    rows = [scores[row] * (relevance[row] - weights[row] * relevance[row].sum()) for row in range(len(scores))]
    return torch.stack(rows)


def sum_rule(relevance: Tensor, *summands: Tensor) -> list[Tensor]:
    total = sum(summands)
    return [torch.where(total == 0, torch.zeros_like(part), part / total * relevance) for part in summands]


@dataclass
class Account:
    """Where relevance went that reached no pixel."""

    softmax: float = 0.0
    constants: float = 0.0


@dataclass
class BlockByHand:
    """A transformer block on the tokens of one image, ``[T, C]``, and its relevance backwards."""

    block: nn.Module
    gamma: float
    account: Account
    kept: dict[str, Tensor] = field(default_factory=dict)

    def forward(self, x: Tensor) -> Tensor:
        block, heads = self.block, self.block.attn.num_heads
        normed = block.norm1(x)
        qkv = block.attn.qkv(normed)
        queries, keys, values = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in qkv.chunk(3, dim=1))
        scores = queries @ keys.transpose(1, 2) * block.attn.scale
        mixed = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
        attended = block.attn.proj(mixed)
        middle = x + attended
        normed_2 = block.norm2(middle)
        hidden = block.mlp.fc1(normed_2)
        active = F.gelu(hidden)
        out = block.mlp.fc2(active)
        self.kept = {
            "x": x,
            "normed": normed,
            "queries": queries,
            "keys": keys,
            "values": values,
            "scores": scores,
            "mixed": mixed,
            "attended": attended,
            "middle": middle,
            "normed_2": normed_2,
            "active": active,
            "out": out,
        }
        return middle + out

    def tokens(self, layer: nn.Linear, x: Tensor, relevance: Tensor, gamma: float) -> Tensor:
        rows = [gamma_rule(layer.weight, layer.bias, x[t], relevance[t], gamma) for t in range(len(x))]
        return torch.stack(rows)

    def backward(self, relevance: Tensor) -> Tensor:
        k, block = self.kept, self.block
        to_middle, to_out = sum_rule(relevance, k["middle"], k["out"])
        to_active = self.tokens(block.mlp.fc2, k["active"], to_out, self.gamma)
        # GELU: one input, which gets all of it (equation 9).
        to_normed = self.tokens(block.mlp.fc1, k["normed_2"], to_active, self.gamma)
        for t in range(len(to_middle)):
            to_middle[t] += norm_rule(block.norm2, k["middle"][t], to_normed[t])
        to_x, to_attended = sum_rule(to_middle, k["x"], k["attended"])
        to_mixed = self.tokens(block.attn.proj, k["mixed"], to_attended, 0.0)
        to_normed = self.tokens(block.attn.qkv, k["normed"], self.attention(to_mixed), 0.0)
        for t in range(len(to_x)):
            to_x[t] += norm_rule(block.norm1, k["x"][t], to_normed[t])
        return to_x

    def attention(self, relevance: Tensor) -> Tensor:
        k, heads = self.kept, self.block.attn.num_heads
        by_head = relevance.unflatten(1, (heads, -1)).transpose(0, 1)
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for head in range(heads):
            scores = k["scores"][head]
            to_weights, to_values = product_rule(scores.softmax(-1), k["values"][head], by_head[head])
            to_scores = softmax_rule(scores, to_weights)
            self.account.softmax += float(to_weights.sum() - to_scores.sum())
            scaled = k["queries"][head] * self.block.attn.scale
            to_queries, to_keys = product_rule(scaled, k["keys"][head].T, to_scores)
            for kind, part in zip(parts, (to_queries, to_keys.T, to_values), strict=True):
                kind.append(part)
        return torch.cat([torch.cat(kind, dim=1) for kind in parts], dim=1)


def relevance_by_hand(
    model: Classifier, image: Tensor, target: int, gammas: tuple[float, float]
) -> tuple[Tensor, Account]:
    network, account = model.module, Account()
    convolution, size = network.patch_embed.proj, network.patch_embed.patch_size[0]
    cells = image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    weight = convolution.weight.flatten(1)
    embedded = torch.cat([network.cls_token[0], cells @ weight.T + convolution.bias])
    tokens = embedded + network.pos_embed[0]
    blocks = [BlockByHand(block, gammas[1], account) for block in network.blocks]
    states = [tokens]
    for block in blocks:
        states.append(block.forward(states[-1]))
    read = network.norm(states[-1][0])
    logits = network.head(read)
    start = torch.zeros_like(logits)
    start[target] = logits[target]
    relevance = torch.zeros_like(tokens)
    relevance[0] = norm_rule(
        network.norm, states[-1][0], gamma_rule(network.head.weight, network.head.bias, read, start, gammas[1])
    )
    for block in reversed(blocks):
        relevance = block.backward(relevance)
    to_embedded, to_positions = sum_rule(relevance, embedded, network.pos_embed[0])
    account.constants += float(to_positions.sum() + to_embedded[0].sum())
    rows, columns = model.token_grid
    pixels = torch.zeros_like(image)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        part = gamma_rule(weight, convolution.bias, cells[index], to_embedded[1 + index], gammas[0])
        place = pixels[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
        place += part.view(3, size, size)
    return pixels.sum(0), account


def offsets_of(model: Classifier) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.module.named_parameters() if name.endswith("bias")]


def vit_with_offsets() -> Classifier:
    """The tiny ViT with random biases, so that every rule must deal with one."""
    model, generator = tiny_vit(), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for bias in offsets_of(model):
            bias.copy_(0.2 * torch.randn(bias.shape, generator=generator, dtype=bias.dtype))
    return model


@pytest.fixture(autouse=True)
def _double(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("gammas", OPTIONS)
def test_the_slow_twin(gammas: tuple[float, float]) -> None:
    model = vit_with_offsets()
    images, targets = pictures(2)
    options = AttnLrpOptions(*gammas)
    got = in_double(model, images, targets[:, None], options)[:, 0]
    for index in range(2):
        expected, _ = relevance_by_hand(model, images[index], int(targets[index]), gammas)
        torch.testing.assert_close(got[index], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("gammas", "tolerance"), [((0.25, 0.05), 1e-3), ((0.0, 0.0), 1e-8)])
def test_relevance_adds_up_without_biases(gammas: tuple[float, float], tolerance: float) -> None:
    """Pixels, constant tokens, and what each softmax's expansion keeps back: together the logit."""
    model = tiny_vit()
    with torch.no_grad():
        for bias in offsets_of(model):
            bias.zero_()
    images, targets = pictures(1)
    logit = float(model(images)[0, targets[0]])
    _, account = relevance_by_hand(model, images[0], int(targets[0]), gammas)
    pixels = float(in_double(model, images, targets[:, None], AttnLrpOptions(*gammas)).sum())
    assert abs(account.softmax) > 1e-3 * abs(logit)
    assert abs(pixels + account.constants + account.softmax - logit) < tolerance * abs(logit)


def test_every_gamma_matters() -> None:
    model = vit_with_offsets()
    images, targets = pictures(1)
    maps = [
        in_double(model, images, targets[:, None], AttnLrpOptions(*gammas)) for gammas in (*OPTIONS, (0.25, 0.0))
    ]
    for one, other in ((0, 1), (0, 2), (0, 3), (1, 3)):
        assert float((maps[one] - maps[other]).norm() / maps[other].norm()) > 0.01


# Other transformers: what the twin does not have, in a chain of identities.


def transformer(name: str, **arguments: object) -> Classifier:
    torch.manual_seed(0)
    small = {"img_size": SIZE, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": CLASSES, **arguments}
    module = timm.create_model(name, **small).double()
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
            elif "gamma" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return Classifier(module, ModelSpec(name, False))


KINDS = {
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers and layer scale": ("vit_small_patch14_reg4_dinov2", {"img_size": 28}),
    "no class token": ("vit_base_patch16_gap_224", {}),
    "mean of tokens": ("vit_wee_patch16_reg1_gap_256", {}),
    "normed queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
    "windows": (
        "swin_tiny_patch4_window7_224",
        {"window_size": 4, "depths": (2, 2), "num_heads": (2, 2), "depth": None},
    ),
    "gated perceptron": ("vit_giant_patch14_dinov2", {"img_size": 28}),
}


def built(kind: str) -> Classifier:
    name, arguments = KINDS[kind]
    arguments = dict(arguments)
    if "depth" in arguments:
        torch.manual_seed(0)
        del arguments["depth"]
        module = timm.create_model(name, img_size=SIZE, embed_dim=24, num_classes=CLASSES, **arguments).double()
        return Classifier(module, ModelSpec(name, False))
    return transformer(name, **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_relevance_is_conserved_where_values_alone_carry_it(kind: str, fused: bool) -> None:
    """With scores that are all 0 the softmax hands nothing on: half the relevance of each attention is left.

    The relevance of the pixels is what a network whose attention is that same average, halved, would give:
    gradient times input of the network with every norm's deviation and every activation's y / x frozen.
    """
    model = built(kind)
    network = model.module
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, *model.input_size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for part in network.modules():
            if hasattr(part, "qkv"):
                width = part.qkv.weight.shape[0] // 3
                part.qkv.weight[: 2 * width] = 0
                if part.qkv.bias is not None:
                    part.qkv.bias[: 2 * width] = 0
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused
    classes = torch.tensor([[0], [1]])
    got = in_double(model, images, classes, AttnLrpOptions(0.0, 0.0))[:, 0]
    frozen = frozen_network(model, images)
    pixels = images.clone().requires_grad_(True)
    score = frozen(pixels).gather(1, classes).sum()
    (gradient,) = torch.autograd.grad(score, pixels)
    torch.testing.assert_close(got, (gradient * images).sum(1))


def frozen_network(model: Classifier, images: Tensor):  # type: ignore[no-untyped-def]
    """A function linear in the image: each norm, activation and gate replaced by its own factor at ``images``.

    The factors come from a first pass and are multiplied in a second, so nothing is shared with the method.
    """
    ratios: dict[nn.Module, Tensor] = {}

    def note(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        is_norm = isinstance(part, nn.LayerNorm)
        ratios[part] = (x.var(-1, correction=0, keepdim=True) + part.eps).rsqrt() if is_norm else output / x

    def replace(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if isinstance(part, nn.LayerNorm):
            return (x - x.mean(-1, keepdim=True)) * ratios[part] * part.weight + part.bias
        if isinstance(part, nn.Linear):
            queries, keys, values = output.chunk(3, dim=-1)
            return torch.cat([queries.detach(), keys.detach(), halved(values)], dim=-1)
        return x * ratios[part]

    def halved(values: Tensor) -> Tensor:
        return values / 2 + (values / 2).detach()

    def run(pixels: Tensor) -> Tensor:
        smooth = [part for part in model.module.modules() if isinstance(part, (nn.LayerNorm, nn.GELU, nn.SiLU))]
        values = [part.qkv for part in model.module.modules() if hasattr(part, "qkv")]
        gated = [
            part
            for part in model.module.modules()
            if hasattr(part, "fc1") and part.fc1.out_features != part.fc2.in_features
        ]
        first = [part.register_forward_hook(note) for part in smooth]
        model(images)
        for handle in first:
            handle.remove()
        second = [part.register_forward_hook(replace) for part in (*smooth, *values)]
        second += [part.drop1.register_forward_pre_hook(lambda _, inputs: halved(inputs[0])) for part in gated]
        try:
            return model(pixels)
        finally:
            for handle in second:
                handle.remove()

    return run


# As a citizen of the house.


def test_classes_share_one_graph() -> None:
    model = vit_with_offsets()
    images, _ = pictures(3)
    classes = torch.tensor([[0, 3], [4, 4], [2, 1]])
    together = attribute_classes(model, images, classes, method="attn_lrp")
    for position in range(2):
        alone = attribute(model, images, classes[:, position], method="attn_lrp", batch_size=1)
        torch.testing.assert_close(together[:, position], alone, rtol=1e-4, atol=1e-6)


def test_any_activation_can_be_the_start_and_the_end() -> None:
    """Relevance of a layer's tokens from one neuron of a later layer: gradient times activation."""
    model = vit_with_offsets()
    images, _ = pictures(1)
    kept: list[Tensor] = []
    with torch.enable_grad(), attn_lrp_rules(model.module, AttnLrpOptions(0.0, 0.0)):
        handle = model.module.blocks[0].register_forward_hook(lambda _, __, output: kept.append(output))
        start = model.module.forward_features(images.requires_grad_(True))[0, 3, 5]
        handle.remove()
    (gradient,) = torch.autograd.grad(start, kept[0])
    expected_block = BlockByHand(model.module.blocks[1], 0.0, Account())
    out = expected_block.forward(kept[0][0].detach())
    relevance = torch.zeros_like(out)
    one = torch.zeros(out.shape[1])
    one[5] = start.detach()
    relevance[3] = norm_rule(model.module.norm, out[3], one)
    torch.testing.assert_close((gradient * kept[0])[0].detach(), expected_block.backward(relevance))


def test_the_network_is_left_as_it_was_even_after_an_exception() -> None:
    model = tiny_vit()
    images, _ = pictures(1)
    before = weights_digest(model.module)

    def broken() -> None:
        with torch.enable_grad(), attn_lrp_rules(model.module):
            model(images.requires_grad_(True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    attribute(model, images, torch.tensor([0]), method="attn_lrp")
    assert weights_digest(model.module) == before
    for part in model.module.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks
        assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("option", ["gamma_linear", "gamma_convolution"])
def test_gammas_must_not_be_negative(option: str, value: float) -> None:
    with pytest.raises(UsageError, match=option):
        attribute(tiny_vit(), *pictures(1), method="attn_lrp", options={option: value})


def test_a_network_without_attention_is_refused() -> None:
    with pytest.raises(UsageError, match="no plain softmax self-attention"):
        attribute(tiny_cnn(), *pictures(1), method="attn_lrp")
