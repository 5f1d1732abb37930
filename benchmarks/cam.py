"""The CAM family against pytorch-grad-cam on the same pictures, classes and layer, with the same maps.

The peer gets a batch of pictures for Grad-CAM, with parameters frozen as ours are; Score-CAM and Ablation-CAM
at its default batch size or a smaller one, whichever is the faster; Ablation-CAM at ours. Memory is the
growth of the process's peak during one call, in a process of its own. ``bare forwards``: the time of a forward
a channel, in the usual layout and the peer's default batch size, over our time and the peer's.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import alternate, median, row
from xai_core.attribution import attribute
from xai_core.layers import default_cam_layer
from xai_core.models import Classifier, ModelSpec, load_classifier

MODELS = Path(__file__).parents[2] / "shared" / "data" / "models"
BATCH = 32
# pytorch-grad-cam's masks have aligned corners.
OPTIONS: dict[str, dict[str, Any]] = {"score_cam": {"align_corners": True}}


@dataclass(frozen=True)
class Case:
    """A method on a network: the layer's name for the peer, pictures in a call, and calls timed."""

    name: str
    layer: str
    method: str
    images: int
    repeats: int = 3


NETWORKS = {
    "resnet18": "layer4",
    "mobilenetv2_100": "bn2",
    "deit_tiny_patch16_224": "blocks.11.norm1",
}


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    for name, layer in NETWORKS.items():
        for method, images in (("grad_cam", 8), ("ablation_cam", 1), ("score_cam", 1)):
            # pytorch-grad-cam ablates signed maps with another value than zero: another method.
            if method != "ablation_cam" or default_cam_layer(build(name, device)) is None:
                compare(Case(name, layer, method, images, 1 if method == "score_cam" else 3), device)


def compare(case: Case, device: str) -> None:
    """One row: our images a second over the peer's, the least correlation of the maps, and peak memory."""
    model = build(case.name, device)
    pictures, targets = inputs(model, case.images, device)
    sizes = {"grad_cam": (case.images,), "ablation_cam": (BATCH,), "score_cam": (4, 16)}[case.method]
    functions: dict[str, Callable[[], Any]] = {"ours": partial(ours, model, case, pictures, targets)}
    functions |= {f"peer{size}": partial(peers, model, case, pictures, targets, size) for size in sizes}
    maps = [functions[name]().flatten(1).double() for name in ("ours", f"peer{sizes[0]}")]
    agreement = min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*maps, strict=True))
    if case.method == "score_cam":
        functions["bare"] = partial(bare_forwards, model, pictures)
    times = alternate(functions, case.repeats, device)
    fastest = min((name for name in times if name.startswith("peer")), key=lambda name: median(times[name]))
    ratios = [theirs / mine for mine, theirs in zip(times["ours"], times[fastest], strict=True)]
    numbers: dict[str, float | str] = {
        "images/s": case.images / median(times["ours"]),
        "over peer's": median(ratios),
        "correlation": agreement,
    }
    if "bare" in times:
        passes = channels(model, pictures) * case.images / BATCH
        numbers["bare forwards over ours"] = passes * median(times["bare"]) / median(times["ours"])
        numbers["over peer's time"] = passes * median(times["bare"]) / median(times[fastest])
    if device == "cpu":
        numbers["MiB"] = peak_memory(case, BATCH, "ours")
        numbers["peer's MiB"] = peak_memory(case, int(fastest.removeprefix("peer")), "peer")
    row(f"{case.name} {case.method} batch={BATCH}", **numbers)


def build(name: str, device: str) -> Classifier:
    """A network with real weights where they lie beside the checkout, else random ones."""
    checkpoint = MODELS / f"{name}.safetensors"
    return load_classifier(
        ModelSpec(name, False, checkpoint=str(checkpoint) if checkpoint.is_file() else None), device
    )


def inputs(model: Classifier, images: int, device: str) -> tuple[Tensor, Tensor]:
    """Random smooth pictures and the classes that the model sees in them."""
    torch.manual_seed(0)
    coarse = torch.randn(images, 3, 14, 14)
    pictures = torch.nn.functional.interpolate(coarse, model.input_size, mode="bicubic").to(device)
    with torch.no_grad():
        return pictures, model(pictures).argmax(dim=1)


def ours(model: Classifier, case: Case, pictures: Tensor, targets: Tensor) -> Tensor:
    """Our maps at the layer's resolution."""
    options = OPTIONS.get(case.method)
    return attribute(
        model, pictures, targets, method=case.method, options=options, batch_size=BATCH, native=True
    ).cpu()


def peers(model: Classifier, case: Case, pictures: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    """pytorch-grad-cam's maps at the layer's resolution, scaled to [0, 1]."""
    import tqdm
    from pytorch_grad_cam import AblationCAM, GradCAM, ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    tqdm.tqdm = lambda rows: rows  # no bars between the rows
    rows, columns = model.token_grid if model.family == "vit" else model.final_size

    def tokens_to_map(tokens: Tensor) -> Tensor:
        return tokens[:, model.num_prefix_tokens :].transpose(1, 2).reshape(len(tokens), -1, rows, columns)

    peer: Any = {"grad_cam": GradCAM, "ablation_cam": AblationCAM, "score_cam": ScoreCAM}[case.method]
    transform = tokens_to_map if model.family == "vit" else None
    with peer(model.module, [model.layer(case.layer)], reshape_transform=transform) as cam:
        cam.batch_size = batch_size
        cam.get_target_width_height = lambda _pictures: (columns, rows)
        leaves = pictures.clone().requires_grad_(case.method == "grad_cam")
        return torch.from_numpy(cam(leaves, [ClassifierOutputTarget(int(target)) for target in targets]))


def bare_forwards(model: Classifier, pictures: Tensor) -> Tensor:
    """Forwards of a full batch in the peer's default batch size."""
    with torch.no_grad():
        return torch.cat([model(pictures[:1].repeat(16, 1, 1, 1)) for _ in range(BATCH // 16)])


def channels(model: Classifier, pictures: Tensor) -> int:
    """Channels of the layer that CAM methods read."""
    with torch.no_grad():
        features = model.module.forward_features(pictures[:1])
    return int(features.shape[2 if model.family == "vit" else 1])


def peak_memory(case: Case, batch_size: int, side: str) -> float:
    """MiB by which the peak of a process of its own grows in one call."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (case, batch_size, side, torch.get_num_threads()))


def _grown(case: Case, batch_size: int, side: str, threads: int) -> float:
    torch.set_num_threads(threads)
    model = build(case.name, "cpu")
    pictures, targets = inputs(model, case.images, "cpu")
    call = ours if side == "ours" else partial(peers, batch_size=batch_size)
    ours(model, Case(case.name, case.layer, "grad_cam", 1), pictures[:1], targets[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = _status("VmRSS")
    call(model, case, pictures, targets)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])
