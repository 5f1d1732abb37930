"""Agreement with pytorch-grad-cam: the CAM family at equal definitions, and where the definitions part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm
from PIL import Image
from pytorch_grad_cam import AblationCAM, GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

from tests.xai_core.tiny import pictures, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.attribution import attribute
from xai_core.models import Classifier, ModelSpec, load_classifier

GRADIENT_CAMS: dict[str, Any] = {
    "grad_cam": GradCAM,
    "grad_cam_pp": GradCAMPlusPlus,
    "xgrad_cam": XGradCAM,
    "layer_cam": LayerCAM,
}
# pytorch-grad-cam's upsampling of masks has aligned corners.
PEERS_SCORE = {"align_corners": True}


@pytest.fixture(autouse=True)
def _no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm, "tqdm", lambda rows: rows)


def pearson(ours: Tensor, peers: Tensor) -> float:
    """The least correlation of an image's two maps, where a blank map correlates with nothing."""
    pairs = zip(ours.flatten(1).double(), peers.flatten(1).double(), strict=True)
    return min(float(torch.corrcoef(torch.stack(pair))[0, 1].nan_to_num(0.0)) for pair in pairs)


def peer_maps(peer: Any, model: Classifier, layer: str, images: Tensor, targets: Tensor, size: Any) -> Tensor:
    """The peer's maps, each scaled to [0, 1] as it does, at the layer's own resolution."""

    def tokens_to_map(tokens: Tensor) -> Tensor:
        rows, columns = model.token_grid
        return tokens[:, model.num_prefix_tokens :].transpose(1, 2).reshape(len(tokens), -1, rows, columns)

    transform = tokens_to_map if model.family == "vit" else None
    with peer(model.module, [model.layer(layer)], reshape_transform=transform) as cam:
        cam.get_target_width_height = lambda _images: (size[1], size[0])
        chosen = [ClassifierOutputTarget(int(target)) for target in targets]
        return torch.from_numpy(cam(images.clone().requires_grad_(True), chosen))


def compare(
    method: str, peer: Any, model: Classifier, layer: str, images: Tensor, targets: Tensor, **options: Any
) -> float:
    ours = attribute(
        model, images, targets, method=method, options={"layer": layer, **options}, native=True, batch_size=8
    )
    return pearson(ours, peer_maps(peer, model, layer, images, targets, ours.shape[-2:]))


def shown(model: Classifier, layer: str) -> tuple[Tensor, Tensor]:
    """Pictures, and classes of positive logits, whose Grad-CAM is not blank: blank maps correlate with nothing."""
    images, _ = pictures(8)
    with torch.no_grad():
        targets = model(images).argmax(dim=1)
    maps = attribute(model, images, targets, method="grad_cam", options={"layer": layer}, native=True)
    keep = (maps.flatten(1).amax(dim=1) > 0) & (model(images).amax(dim=1) > 0)
    assert int(keep.sum()) >= 3
    return images[keep], targets[keep]


@pytest.mark.parametrize("method", list(GRADIENT_CAMS))
def test_gradient_cams_on_maps_behind_a_relu(method: str) -> None:
    model = tiny_relu_cnn()
    assert compare(method, GRADIENT_CAMS[method], model, "layer2", *shown(model, "layer2")) > 0.999


@pytest.mark.parametrize("method", ["grad_cam", "layer_cam"])
@pytest.mark.parametrize(("build", "layer"), [(tiny_cnn, "layer1"), (tiny_vit, "blocks.1.norm1")])
def test_gradient_cams_on_signed_maps(method: str, build: Callable[[], Classifier], layer: str) -> None:
    model = build()
    assert compare(method, GRADIENT_CAMS[method], model, layer, *shown(model, layer)) > 0.999


@pytest.mark.parametrize("method", ["grad_cam_pp", "xgrad_cam"])
def test_on_signed_maps_sums_in_denominators_part_us(method: str) -> None:
    """The peer divides by sums of the signed map; ours are sums of the map through a ReLU, as in the papers."""
    model = tiny_vit()
    layer = "blocks.1.norm1"
    assert compare(method, GRADIENT_CAMS[method], model, layer, *shown(model, layer)) < 0.99


def test_grad_cam_pp_has_no_epsilon_that_small_gradients_fall_below() -> None:
    """The peer adds 1e-6 to a denominator of squared gradients: its map depends on the gradients' scale."""
    model = tiny_relu_cnn()
    images, targets = shown(model, "layer2")
    before = attribute(model, images, targets, method="grad_cam_pp", options={"layer": "layer2"}, native=True)
    peers_before = peer_maps(GradCAMPlusPlus, model, "layer2", images, targets, (4, 4))
    model.module.fc.weight.mul_(1e-4)
    after = attribute(model, images, targets, method="grad_cam_pp", options={"layer": "layer2"}, native=True)
    peers_after = peer_maps(GradCAMPlusPlus, model, "layer2", images, targets, (4, 4))
    assert pearson(after, before) > 0.9
    assert pearson(peers_after, peers_before) < pearson(after, before) - 0.01


@pytest.mark.parametrize(("build", "layer"), [(tiny_relu_cnn, "layer2"), (tiny_vit, "blocks.1.norm1")])
def test_score_cam(build: Callable[[], Classifier], layer: str) -> None:
    model = build()
    images, targets = pictures(3)
    assert compare("score_cam", ScoreCAM, model, layer, images, targets, **PEERS_SCORE) > 0.999


def test_score_cam_masks_differ_by_their_corners() -> None:
    """Ours follow the authors' code by default: a map's cells are areas of the picture, not points."""
    model = tiny_vit()
    images, targets = pictures(3)
    assert compare("score_cam", ScoreCAM, model, "blocks.1.norm1", images, targets) < 0.9999


def test_ablation_cam_on_maps_behind_a_relu() -> None:
    model = tiny_relu_cnn()
    assert compare("ablation_cam", AblationCAM, model, "layer2", *shown(model, "layer2")) > 0.999


def test_ablation_cam_does_not_turn_round_with_the_sign_of_the_logit() -> None:
    """The peer divides the drop by the logit: of a negative one it shows what speaks against the class."""
    model = tiny_relu_cnn()
    images, targets = shown(model, "layer2")
    with torch.no_grad():
        model.module.fc.bias -= 100
    ours = attribute(model, images, targets, method="ablation_cam", options={"layer": "layer2"}, native=True)
    peers = peer_maps(AblationCAM, model, "layer2", images, targets, (4, 4))
    with torch.no_grad():
        model.module.fc.bias += 100
    expected = attribute(model, images, targets, method="ablation_cam", options={"layer": "layer2"}, native=True)
    assert pearson(ours, expected) > 0.9999
    assert pearson(peers, expected) < 0.9


def test_ablation_cam_ablates_with_zero_where_the_peer_takes_minus_ten_million() -> None:
    """The paper sets a channel to zero; the peer deviates where a map has negative values, as it says itself."""
    model = tiny_cnn()
    assert compare("ablation_cam", AblationCAM, model, "layer1", *shown(model, "layer1")) < 0.99


def real(shared_data: Path, name: str) -> tuple[Classifier, Tensor, Tensor]:
    """A real model in float64, two real photographs and the classes it sees in them."""
    checkpoint = shared_data / "models" / f"{name}.safetensors"
    photographs = sorted(
        path for path in (shared_data / "imagenet-sample").rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
    )
    if not checkpoint.is_file() or not photographs:
        pytest.skip(f"needs {checkpoint.name} and the ImageNet sample in {shared_data}")
    model = load_classifier(ModelSpec(name, False, checkpoint=str(checkpoint)))
    model.module.double()
    chosen = photographs[:: max(1, len(photographs) // 2)][:2]
    images = torch.stack([model.preprocess(Image.open(path)) for path in chosen]).double()
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize("method", list(GRADIENT_CAMS))
def test_gradient_cams_on_a_real_convolutional_network(method: str, shared_data: Path) -> None:
    model, images, targets = real(shared_data, "mobilenetv2_100")
    # The peer's epsilon weighs in where gradients are of its size, as here.
    least = 0.99 if method == "grad_cam_pp" else 0.999
    assert compare(method, GRADIENT_CAMS[method], model, "bn2", images, targets) > least


@pytest.mark.parametrize("method", ["grad_cam", "layer_cam"])
def test_gradient_cams_on_a_real_transformer(method: str, shared_data: Path) -> None:
    model, images, targets = real(shared_data, "deit_tiny_patch16_224")
    assert compare(method, GRADIENT_CAMS[method], model, "blocks.11.norm1", images, targets) > 0.999


def test_score_cam_on_a_real_transformer(shared_data: Path) -> None:
    model, images, targets = real(shared_data, "deit_tiny_patch16_224")
    model.module.float()
    one = images[:1].float()
    assert compare("score_cam", ScoreCAM, model, "blocks.11.norm1", one, targets[:1], **PEERS_SCORE) > 0.999


def test_ablation_cam_on_a_real_convolutional_network(shared_data: Path) -> None:
    model, images, targets = real(shared_data, "mobilenetv2_100")
    model.module.float()
    one = torch.nn.functional.interpolate(images[:1].float(), (96, 96))
    ours = attribute(model, one, targets[:1], method="ablation_cam", native=True)
    peers = peer_maps(AblationCAM, model, "bn2", one, targets[:1], ours.shape[-2:])
    assert pearson(ours, peers) > 0.999
