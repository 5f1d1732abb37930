"""Agreement of the LASSO codes with scikit-learn's ``lasso_cd`` on the same atoms, vectors and penalty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import sparse_encode
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts import fit_dictionary, lasso_codes
from xai_core.concepts.vectors import prefix, to_vectors
from xai_core.models import ModelSpec, load_classifier

LAYERS = ("blocks.2", "blocks.6", "blocks.10")


def agree(atoms: Tensor, vectors: Tensor, penalty: float) -> None:
    """Same objective, to 1e-6 of it, for every vector, and the same support but for idle atoms."""
    atoms, vectors = (torch.nn.functional.normalize(one.double(), dim=1) for one in (atoms, vectors))
    theirs = torch.from_numpy(
        sparse_encode(vectors.numpy(), atoms.numpy(), algorithm="lasso_cd", alpha=penalty, max_iter=20_000)
    )
    ours = lasso_codes(atoms, vectors, penalty).double()
    ratio = objective(atoms, vectors, ours, penalty) / objective(atoms, vectors, theirs, penalty)
    assert float((ratio - 1).abs().max()) < 1e-6
    differ = (ours != 0) != (theirs != 0)
    assert float((ours - theirs).abs()[differ].sum()) < 1e-3 * float(theirs.abs().sum())
    assert int(differ.sum()) <= 0.005 * int((theirs != 0).sum())


def objective(atoms: Tensor, vectors: Tensor, codes: Tensor, penalty: float) -> Tensor:
    error = vectors - codes @ atoms
    return error.square().sum(dim=1) / 2 + penalty * codes.abs().sum(dim=1)


@pytest.mark.parametrize("penalty", [0.3, 0.1, 0.02])
def test_random_vectors(penalty: float) -> None:
    agree(normal(400, 64), normal(100, 64, seed=1), penalty)


@pytest.fixture(scope="module")
def features(shared_data: Path) -> dict[str, Tensor]:
    """Patch tokens of DeiT-tiny's blocks for photographs."""
    checkpoint = shared_data / "models" / "deit_tiny_patch16_224.safetensors"
    model = load_classifier(ModelSpec("deit_tiny_patch16_224", False, checkpoint=str(checkpoint)))
    files = sorted((shared_data / "imagenet-sample" / "images").glob("*/*.jpg"))[::50]
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((224, 224)), dtype=np.float32) for file in files]
    images = (torch.from_numpy(np.stack(pixels)) / 255 - 0.45) / 0.225
    found: dict[str, Tensor] = {}
    handles = [
        model.layer(layer).register_forward_hook(lambda _module, _in, out, layer=layer: found.update({layer: out}))
        for layer in LAYERS
    ]
    with torch.no_grad():
        model(images.permute(0, 3, 1, 2))
    for handle in handles:
        handle.remove()
    return {
        layer: to_vectors(model, out, layer)[:, prefix(model, out) :].flatten(0, 1) for layer, out in found.items()
    }


@pytest.mark.shared
@pytest.mark.parametrize("layer", LAYERS)
def test_features_of_photographs_on_centroids_of_bisecting_kmeans(features: dict[str, Tensor], layer: str) -> None:
    vectors = features[layer]
    atoms = fit_dictionary(vectors, atoms=500).atoms
    cosines = torch.nn.functional.normalize(atoms, dim=1) @ torch.nn.functional.normalize(atoms, dim=1).T
    assert cosines.fill_diagonal_(0).amax(dim=1).median() > 0.7  # the hard case: atoms that resemble each other
    agree(atoms, vectors[::40], 0.1)
