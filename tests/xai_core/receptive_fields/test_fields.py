"""What holds for the receptive fields of every attributor: batches, order, layers, sizes and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.xai_core.attribution.test_attn_lrp import built
from tests.xai_core.attribution.test_srd import SIDE, mini
from tests.xai_core.attribution.untouched import state_of
from tests.xai_core.receptive_fields.networks import autoencoder, clean_vectors, layer_of, vectors_at
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.receptive_fields import attributors, feature_vectors, latents, receptive_fields
from xai_core.receptive_fields.attributors import misfit
from xai_core.receptive_fields.passes import SHARED, rows_of

QUICK: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 3},
    "kernel_shap": {"grid": 2},
}
CASES = [
    (build, entry.name)
    for build in (tiny_relu_cnn, tiny_vit)
    for entry in attributors
    if misfit(entry, build(), entry.options()) is None
]
# More of one image than share a forward, in no order, and an image that none asks for.
OWNER = [3, 0, 3, 3, 1, 3, 0, 3, 3, 3, 3, 3, 3]


def many(model: Classifier) -> tuple[Tensor, Any]:
    images, _ = pictures(4)
    positions = clean_vectors(model, images, layer_of(model)).shape[1]
    return images, vectors_at(model, images, OWNER, [n % positions for n in range(len(OWNER))])


def test_every_attributor_has_a_case() -> None:
    assert {name for _, name in CASES} == set(attributors.names())
    assert len(CASES) == 8


@pytest.mark.parametrize(("build", "attributor"), CASES)
def test_neither_batches_nor_neighbours_change_a_field(build: Callable[[], Classifier], attributor: str) -> None:
    model = build()
    images, scalars = many(model)
    how = {"attributor": attributor, "options": QUICK.get(attributor)}
    whole = receptive_fields(model, images, scalars, **how)
    assert whole.dtype == torch.float32
    assert (whole.flatten(1).abs().amax(1) > 0).all()
    for batch_size in (1, 2):
        torch.testing.assert_close(
            receptive_fields(model, images, scalars, **how, batch_size=batch_size), whole, rtol=1e-5, atol=1e-6
        )
    for number in (0, 4, 12):
        alone = feature_vectors(
            scalars.layer, torch.tensor([0]), scalars.position[[number]], scalars.vectors[[number]]
        )
        one = receptive_fields(model, images[[OWNER[number]]], alone, **how)
        torch.testing.assert_close(one, whole[[number]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3", "layer3.0.downsample"])
def test_a_picture_alone_is_treated_as_beside_another(layer: str) -> None:
    """Torch's batch norm on the CPU misreads a gradient of transposed vectors where there is one picture."""
    model = tiny_cnn()
    images, _ = pictures(2)
    alone, beside = (
        receptive_fields(
            model, images, vectors_at(model, images, owner, [0] * len(owner), layer), attributor="gradient"
        )
        for owner in ([0], [0, 1])
    )
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("build", "attributor"), CASES)
def test_nothing_behind_the_layer_runs_and_nothing_is_left_behind(
    build: Callable[[], Classifier], attributor: str
) -> None:
    model = build()
    images, scalars = many(model)
    ran: list[int] = []
    head = model.module.get_classifier()
    handle = head.register_forward_hook(lambda _module, inputs, _output: ran.append(len(inputs[0])))
    # What is asked of a network once (its structure) comes before.
    receptive_fields(model, images, scalars, attributor=attributor, options=QUICK.get(attributor))
    ran.clear()
    before = state_of(model.module)
    receptive_fields(
        model, images.requires_grad_(True), scalars, attributor=attributor, options=QUICK.get(attributor)
    )
    assert not ran
    assert state_of(model.module) == before
    assert images.grad is None
    handle.remove()


@pytest.mark.parametrize(
    ("attributor", "expected"),
    [
        # 1 image with 11 scalars fills two rows, the others one each: 4 rows of one forward.
        ("gradient", 4),
        ("srd", 4),
        ("integrated_gradients", 4 * 3),
        ("kernel_shap", 4 * 16),
    ],
)
def test_scalars_of_an_image_share_its_forwards(attributor: str, expected: int) -> None:
    model = tiny_relu_cnn()
    images, scalars = many(model)
    receptive_fields(model, images, scalars, attributor=attributor, options=QUICK.get(attributor))
    rows: list[int] = []
    first = model.module.conv1[0] if isinstance(model.module.conv1, nn.Sequential) else model.module.conv1
    handle = first.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    receptive_fields(model, images, scalars, attributor=attributor, options=QUICK.get(attributor), batch_size=8)
    handle.remove()
    assert sum(rows) == expected
    assert max(rows) <= 8


@given(st.lists(st.integers(0, 6), max_size=60))
@settings(max_examples=60, deadline=None)
def test_rows_hold_every_scalar_once(owner: list[int]) -> None:
    table = rows_of(torch.tensor(owner, dtype=torch.int64))
    inside = table >= 0
    assert sorted(table[inside].tolist()) == list(range(len(owner)))
    sizes = inside.sum(1)
    assert not len(sizes) or (int(sizes.max()) <= SHARED and int(sizes.min()) > 0)
    assert (sizes.diff() <= 0).all()
    for row, there in zip(table, inside, strict=True):
        assert there[: int(there.sum())].all()
        assert len({owner[number] for number in row[there]}) == 1
    # As few rows as can be: no more forwards than that.
    counts = torch.tensor(owner, dtype=torch.int64).bincount()
    assert len(table) == int((-(-counts // SHARED)).sum())


def test_the_field_of_an_early_vector_lies_in_its_theoretical_receptive_field() -> None:
    model = mini(nn.ReLU())
    images = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    row, column = 3, 6
    scalars = vectors_at(model, images, [0], [row * SIDE + column], "act1")
    for attributor in ("srd", "gradient", "integrated_gradients"):
        field = receptive_fields(model, images, scalars, attributor=attributor)[0]
        inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        inside[row - 1 : row + 2, column - 1 : column + 2] = True
        assert (field[~inside] == 0).all()
        assert (field[inside] != 0).all()


def test_size_averages() -> None:
    model = tiny_relu_cnn()
    images, scalars = many(model)
    whole = receptive_fields(model, images, scalars)
    small = receptive_fields(model, images, scalars, size=(4, 8))
    expected = whole.unflatten(1, (4, SIZE // 4)).unflatten(3, (8, SIZE // 8)).mean(dim=(2, 4))
    torch.testing.assert_close(small, expected)


def test_a_vector_of_zeros_has_a_field_of_zeros() -> None:
    model = tiny_relu_cnn()
    images, _ = pictures(1)
    zeros = feature_vectors("layer3", torch.tensor([0]), torch.tensor([1]), torch.zeros(1, 16))
    for attributor in ("srd", "gradient"):
        assert (receptive_fields(model, images, zeros, attributor=attributor) == 0).all()


@pytest.mark.parametrize("size", [None, (3, 5)])
def test_no_scalars(size: tuple[int, int] | None) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    scalars = feature_vectors("layer3", none, none, torch.zeros(0, 16))
    found = receptive_fields(tiny_relu_cnn(), pictures(1)[0], scalars, size=size)
    assert found.shape == (0, *(size or (SIZE, SIZE)))


def test_auto_is_what_the_paper_uses() -> None:
    for build, attributor in ((tiny_relu_cnn, "srd"), (tiny_vit, "attn_lrp")):
        model = build()
        images, scalars = many(model)
        assert torch.equal(
            receptive_fields(model, images, scalars),
            receptive_fields(model, images, scalars, attributor=attributor),
        )
    # A network of maps whose attention SRD has no rule for.
    model = built("windows")
    images, _ = pictures(1)
    assert receptive_fields(model, images, vectors_at(model, images, [0], [0], "layers.0")).shape == (1, 8, 8)


def test_the_class_token_and_its_latents_have_a_field() -> None:
    """Its vector stands first, and no patch is its place."""
    model = tiny_vit()
    images, _ = pictures(2)
    clean = clean_vectors(model, images, "blocks.1")
    dictionary = autoencoder(clean.shape[2])
    atom = int((clean[:, 0].float() @ dictionary.encoder["weight"].T + dictionary.encoder["bias"])[1].argmax())
    scalars = latents("blocks.1", torch.tensor([1]), dictionary, torch.tensor([atom]), "class_token")
    direction = dictionary.encoder["weight"][[atom]].double()
    along = feature_vectors("blocks.1", torch.tensor([1]), torch.tensor([0]), direction)
    torch.testing.assert_close(
        receptive_fields(model, images, scalars, attributor="gradient"),
        receptive_fields(model, images, along, attributor="gradient") * float(direction.norm()),
    )
    assert (receptive_fields(model, images, scalars) > 0).all()


def test_a_sum_leaves_out_prefix_tokens() -> None:
    model = tiny_vit()
    images, _ = pictures(1)
    clean = clean_vectors(model, images, "blocks.1")
    dictionary = autoencoder(clean.shape[2])
    # One that the class token has, too.
    atom = int((clean[0, 0].float() @ dictionary.encoder["weight"].T + dictionary.encoder["bias"]).argmax())
    scalars = latents("blocks.1", torch.tensor([0]), dictionary, torch.tensor([atom]), "sum")
    with pytest.raises(UsageError, match="not settled"):
        scalars(clean, torch.tensor([0]))
    value = scalars.settled(clean, torch.tensor([0]), 1)(clean, torch.tensor([0]))
    weight, bias = dictionary.encoder["weight"][atom], dictionary.encoder["bias"][atom]
    torch.testing.assert_close(value.float(), (clean[:, 1:].float() @ weight + bias).relu().sum(1))


def test_packaged_networks_give_fields_of_their_own_resolution() -> None:
    for name, layer, shape in (
        ("vitrine_demo_resnet", "layer2", None),
        ("vitrine_demo_vit", "blocks.1", "tokens"),
    ):
        model = load_classifier(ModelSpec(name))
        images = torch.randn(2, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
        scalars = vectors_at(model, images, [0, 1, 1], [1, 2, 3], layer)
        field = receptive_fields(model, images, scalars)
        assert field.shape[1:] == (model.token_grid if shape else model.input_size)
        if shape is None:
            torch.testing.assert_close(field.sum(dim=(1, 2)), scalars.vectors.norm(dim=1), rtol=1e-3, atol=1e-4)
