"""VAR with ten classes over ten separate attributions of the same images by the wrapped method.

The separate ones are what a user without VAR's sharing would run: one call of ``attribute`` for each class, the
classes known beforehand. Both at the same batch size in the same run; VAR chooses its classes itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import alternate, median, row
from xai_core.attribution import attribute
from xai_core.models import Classifier, ModelSpec, load_classifier

K = 10
BATCH = 16
TARGET = 0.75
BASES = ("gradient", "grad_cam")


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    for name in ("resnet18", "deit_tiny_patch16_224"):
        for base in BASES:
            compare(name, base, device, images=BATCH // 4 if device == "cpu" else 8 * BATCH, repeats=3)


def compare(name: str, base: str, device: str, *, images: int, repeats: int) -> None:
    """One row: VAR's time over that of K separate attributions, at most 0.75 for gradient methods."""
    model = load_classifier(ModelSpec(name, pretrained=False), device)
    torch.manual_seed(0)
    pictures = torch.randn(images, 3, *model.input_size).to(device)
    with torch.no_grad():
        order = torch.cat([model(part) for part in pictures.split(BATCH)]).argsort(dim=1, descending=True)
    classes = torch.cat([order[:, : K - 1], order[:, -1:]], dim=1)
    functions: dict[str, Callable[[], object]] = {
        "var": lambda: contrast(model, pictures, classes[:, 0], base),
        "separate": lambda: one_by_one(model, pictures, classes, base),
    }
    times = alternate(functions, repeats, device)
    ratios = [mine / separate for mine, separate in zip(times["var"], times["separate"], strict=True)]
    row(
        f"{name} {base} K={K} batch={BATCH}",
        **{
            "ms/image": 1000 * median(times["var"]) / images,
            "separate ms/image": 1000 * median(times["separate"]) / images,
            "ratio": median(ratios),
            "at most": TARGET,
        },
    )


def contrast(model: Classifier, pictures: Tensor, targets: Tensor, base: str) -> Tensor:
    """VAR of the nine most probable classes and the least probable one."""
    options = {"of": base, "k": K - 1}
    return attribute(model, pictures, targets, method="var", options=options, batch_size=BATCH)


def one_by_one(model: Classifier, pictures: Tensor, classes: Tensor, base: str) -> list[Tensor]:
    """The same classes, a call for each."""
    return [
        attribute(model, pictures, classes[:, position], method=base, batch_size=BATCH) for position in range(K)
    ]
