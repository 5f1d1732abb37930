"""Attributors against their formulas written out, one scalar and one picture at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from math import factorial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.xai_core.attribution.relu_networks import NETWORKS as RELU_NETWORKS
from tests.xai_core.attribution.test_srd import SIDE, mini, slow_ierfs
from tests.xai_core.receptive_fields.networks import (
    agree,
    autoencoder,
    clean_vectors,
    gradient_of_one,
    layer_of,
    vectors_at,
)
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.models import Classifier
from xai_core.receptive_fields import latents, receptive_fields

Read = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def along(clean: Tensor, place: int) -> Read:
    return lambda vectors: vectors[place] @ clean / clean.norm()


def some_vectors(model: Classifier) -> tuple[Tensor, list[int], list[int], list[Read]]:
    """Pictures, owners and places of vectors, and how each is read."""
    images, _ = pictures(2)
    owner, place = [1, 0, 1], [0, 1, 2]
    clean = clean_vectors(model, images, layer_of(model))
    return images, owner, place, [along(clean[i, p], p) for i, p in zip(owner, place, strict=True)]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
def test_srd_of_a_vector_is_the_forward_recursion_times_its_length(activation: nn.Module) -> None:
    model = mini(activation)
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features, ierfs = zip(*(slow_ierfs(model.module, image) for image in images), strict=True)
    places = features[0][0].numel()
    owner = [0] * places + [1] * places
    got = receptive_fields(model, images, vectors_at(model, images, owner, list(range(places)) * 2, "act3"))
    lengths = torch.cat([one.flatten(1).norm(dim=0) for one in features])
    agree(got.flatten(1), torch.cat(ierfs) * lengths.unsqueeze(1))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
def test_a_linear_reading_is_one_more_affine_layer(activation: nn.Module) -> None:
    """A latent that is read before an activation shares by its own direction, not by the vector's.

    Equation 17 with the encoder in f: what a pixel puts into the first convolution's output, along the encoder's
    row; the biases of both in equal shares.
    """
    model = mini(activation)
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    first = model.module.first
    dictionary = autoencoder(len(first.bias))
    with torch.no_grad():
        output = first(image)[0]
        codes = output.flatten(1).T.float() @ dictionary.encoder["weight"].T + dictionary.encoder["bias"]
    latent = int(codes.amax(0).argmax())
    place = int(codes[:, latent].argmax())
    row, column = divmod(place, SIDE)
    scalars = latents("first", torch.tensor([0]), dictionary, torch.tensor([latent]))
    got = receptive_fields(model, image, scalars)[0].double()

    # The encoder's bias goes to the vector it is added to, and from there on as any relevance of a vector.
    direction = dictionary.encoder["weight"][latent].double()
    vector = output[:, row, column]
    start = direction + vector * float(dictionary.encoder["bias"][latent]) / vector.square().sum()
    expected = torch.zeros(SIDE, SIDE)
    seen = [
        (y, x)
        for y in range(row - 1, row + 2)
        for x in range(column - 1, column + 2)
        if 0 <= y < SIDE and 0 <= x < SIDE
    ]
    for y, x in seen:
        put_in = first.weight[:, :, y - row + 1, x - column + 1] @ image[0, :, y, x]
        expected[y, x] = put_in @ start + first.bias @ start / len(seen)
    agree(got, expected)
    torch.testing.assert_close(got.sum(), codes[place, latent].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", RELU_NETWORKS)
def test_srd_adds_up_to_the_scalar(name: str) -> None:
    """Of vectors and of latents, before and behind an activation; biases, poolings, sums and concatenation."""
    model = RELU_NETWORKS[name]()
    images, _ = pictures(2)
    stages = [stage["module"] for stage in model.module.feature_info]
    convolutions = [key for key, part in model.module.named_modules() if isinstance(part, nn.Conv2d)]
    for layer in (*stages[:2], convolutions[2]):
        clean = clean_vectors(model, images, layer)
        last = clean.shape[1] - 1
        scalars = vectors_at(model, images, [0, 1, 0], [0, last, last // 2], layer)
        found = receptive_fields(model, images, scalars)
        agree(found.sum(dim=(1, 2)), scalars.vectors.norm(dim=1))
        dictionary = autoencoder(clean.shape[2])
        for pooling in ("max", "sum"):
            of_atoms = latents(layer, torch.tensor([0, 1, 1]), dictionary, torch.tensor([0, 3, 5]), pooling)
            values = of_atoms.settled(clean[[0, 1, 1]], torch.arange(3), 0)(clean[[0, 1, 1]], torch.arange(3))
            assert values.count_nonzero() > 1
            agree(receptive_fields(model, images, of_atoms).sum(dim=(1, 2)), values)


@pytest.mark.parametrize("channels", ["sum_abs", "max_abs", "sum"])
@pytest.mark.parametrize("build", [tiny_cnn, tiny_vit])
def test_gradient(build: Callable[[], Classifier], channels: str) -> None:
    model = build()
    images, owner, place, reads = some_vectors(model)
    scalars = vectors_at(model, images, owner, place)
    got = receptive_fields(model, images, scalars, attributor="gradient", options={"channels": channels})
    summed = {"sum_abs": lambda g: g.abs().sum(0), "max_abs": lambda g: g.abs().amax(0), "sum": lambda g: g.sum(0)}
    for field, image, read in zip(got, owner, reads, strict=True):
        _, gradient = gradient_of_one(model, images[image], layer_of(model), read)
        agree(field, summed[channels](gradient))


@pytest.mark.parametrize("build", [tiny_cnn, tiny_vit])
@pytest.mark.parametrize("baseline", ["black", "mean"])
def test_integrated_gradients(build: Callable[[], Classifier], baseline: str) -> None:
    model = build()
    images, owner, place, reads = some_vectors(model)
    scalars = vectors_at(model, images, owner, place)
    options = {"steps": 3, "baseline": baseline}
    got = receptive_fields(model, images, scalars, attributor="integrated_gradients", options=options)
    start = model.normalise(torch.zeros_like(images[0])[None])[0] if baseline == "black" else torch.zeros(3, 1, 1)
    for field, image, read in zip(got, owner, reads, strict=True):
        expected = torch.zeros(SIZE, SIZE)
        for node, weight in zip(*np.polynomial.legendre.leggauss(3), strict=True):
            point = start + (images[image] - start) * (node + 1) / 2
            _, gradient = gradient_of_one(model, point, layer_of(model), read)
            expected += (gradient * (images[image] - start)).sum(0) * weight / 2
        agree(field, expected)


def test_integrated_gradients_are_complete() -> None:
    model = tiny_cnn()
    images, owner, place, reads = some_vectors(model)
    scalars = vectors_at(model, images, owner, place)
    got = receptive_fields(model, images, scalars, attributor="integrated_gradients", options={"steps": 64})
    black = clean_vectors(model, model.normalise(torch.zeros_like(images[:1])), layer_of(model))[0]
    expected = torch.stack([scalars.vectors[n].norm() - read(black) for n, read in enumerate(reads)])
    torch.testing.assert_close(got.double().sum(dim=(1, 2)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("build", [tiny_cnn, tiny_vit])
def test_kernel_shap_is_the_shapley_value(build: Callable[[], Classifier]) -> None:
    """By its definition: the mean gain over all orders of 4 cells."""
    model = build()
    images, owner, place, reads = some_vectors(model)
    got = receptive_fields(
        model, images, vectors_at(model, images, owner, place), attributor="kernel_shap", options={"grid": 2}
    )
    half = SIZE // 2
    cells = [(slice(y, y + half), slice(x, x + half)) for y in (0, half) for x in (0, half)]
    for field, image, read in zip(got, owner, reads, strict=True):

        def worth(shown: tuple[int, ...], image: int = image, read: Read = read) -> Tensor:
            canvas = torch.zeros_like(images[image])
            for cell in shown:
                canvas[(slice(None), *cells[cell])] = images[image][(slice(None), *cells[cell])]
            return read(clean_vectors(model, canvas[None], layer_of(model))[0])

        expected = torch.zeros(4)
        for cell in range(4):
            others = [one for one in range(4) if one != cell]
            for size in range(4):
                for shown in combinations(others, size):
                    share = factorial(size) * factorial(3 - size) / factorial(4)
                    expected[cell] += share * (worth((*shown, cell)) - worth(shown))
        agree(field.flatten(), expected)


@pytest.mark.parametrize("attributor", ["integrated_gradients", "kernel_shap"])
@pytest.mark.parametrize("build", [tiny_relu_cnn, tiny_vit])
def test_a_maximum_stays_where_the_clean_image_has_it(build: Callable[[], Classifier], attributor: str) -> None:
    """Pictures on the way from a blank canvas have the latent's largest code elsewhere."""
    model = build()
    images, _ = pictures(2)
    layer = "layer2" if model.family == "cnn" else "blocks.1"
    clean = clean_vectors(model, images, layer)
    dictionary = autoencoder(clean.shape[2])
    prefix = model.num_prefix_tokens
    atom = torch.arange(8)
    scalars = latents(layer, torch.ones(8, dtype=torch.int64), dictionary, atom)
    weight, bias = dictionary.encoder["weight"].double(), dictionary.encoder["bias"].double()
    codes = (clean @ weight.T + bias).relu()[1, prefix:]
    places = codes.argmax(0)[:8] + prefix
    options = {"integrated_gradients": {"steps": 2}, "kernel_shap": {"grid": 1}}[attributor]
    got = receptive_fields(model, images, scalars, attributor=attributor, options=options)

    def read(number: int, place: int) -> Read:
        return lambda vectors: (vectors[place] @ weight[number] + bias[number]).relu()

    blank = clean_vectors(model, torch.zeros_like(images[1:]), layer)[0]
    moved = 0
    for number in range(8):
        place = int(places[number])
        if attributor == "kernel_shap":
            expected = codes.amax(0)[number] - read(number, place)(blank)
            moved += int((blank[prefix:] @ weight[number]).argmax()) + prefix != place
        else:
            start = model.normalise(torch.zeros_like(images[:1]))[0]
            path = images[1] - start
            expected = torch.zeros(SIZE, SIZE)
            for node in np.polynomial.legendre.leggauss(2)[0]:
                point = start + path * (node + 1) / 2
                _, gradient = gradient_of_one(model, point, layer, read(number, place))
                expected += (gradient * path).sum(0) / 2
                there = clean_vectors(model, point[None], layer)[0, prefix:] @ weight[number]
                moved += int(there.argmax()) + prefix != place
        torch.testing.assert_close(got[number].double().view_as(expected), expected, rtol=1e-3, atol=1e-4)
    assert moved
