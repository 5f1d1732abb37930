"""KL-Hessian's time over the sum of the passes it needs: 2K + 1 input gradients and 2K forwards an image.

The bare passes are timed in the same run at the same batch size, parameters without gradients. A slow twin
that treats one part at a time shows what batching gains. On a GPU the model is ViT-B/16 at 224, as in the
paper, which states 162 ms an image on an RTX 3090 at batch size 32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.matrix_rate import flops_of, matrix_rate
from benchmarks.timing import alternate, median, row
from xai_core.attribution import score_parts
from xai_core.attribution.gradients.gradient import input_gradient
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.precision import Precision, precision_context

PARTS = 12
PAPER_MILLISECONDS = 162.0


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    if device == "cuda":
        for precision in ("fp32", "tf32", "bf16"):
            compare("vit_base_patch16_224", device, images=64, batch_size=128, precision=precision, repeats=3)
        return
    for name in ("deit_tiny_patch16_224", "mobilenetv2_100"):
        compare(name, device, images=4, batch_size=32, precision="fp32", repeats=5)


def compare(name: str, device: str, *, images: int, batch_size: int, precision: Precision, repeats: int) -> None:
    """One row: the ratio to the bare passes, and the slow twin's."""
    model = load_classifier(ModelSpec(name, pretrained=False), device)
    pictures, targets, parts = inputs(images, model, device)
    batch = pictures[:1].expand(batch_size, -1, -1, -1).contiguous()
    labels = targets[:1].expand(batch_size)
    functions: dict[str, Callable[[], object]] = {
        "forward": partial(forward, model, batch),
        "gradient": partial(input_gradient, model, batch, labels),
        "ours": partial(score_parts, model, pictures, targets, parts, batch_size=batch_size, precision=precision),
        "twin": partial(one_part_at_a_time, model, pictures[:1], targets[:1], parts[:1], precision),
    }
    with precision_context(precision, device):
        times = alternate(functions, repeats, device)
        needed = [
            ((2 * PARTS + 1) * gradient + 2 * PARTS * bare) / batch_size
            for gradient, bare in zip(times["gradient"], times["forward"], strict=True)
        ]
        ours = [seconds / images for seconds in times["ours"]]
        ratios = [mine / least for mine, least in zip(ours, needed, strict=True)]
        numbers: dict[str, float | str] = {
            "ms/image": 1000 * median(ours),
            "over bare passes": median(ratios),
            "slow twin over ours": median(times["twin"]) / median(ours),
        }
        if device == "cuda":
            flops = (2 * PARTS + 1) * flops_of(functions["gradient"]) + 2 * PARTS * flops_of(functions["forward"])
            numbers["of matrix rate"] = flops / batch_size / median(ours) / matrix_rate(device, precision)
            numbers["paper's ms (RTX 3090)"] = PAPER_MILLISECONDS
    row(f"{name} {precision} K={PARTS} batch={batch_size}", **numbers)


def inputs(images: int, model: Classifier, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random pictures, their targets, and a grid of 3 x 4 parts."""
    torch.manual_seed(0)
    height, width = model.input_size
    pictures = torch.randn(images, 3, height, width).to(device)
    rows = torch.arange(height) * 3 // height
    columns = torch.arange(width) * 4 // width
    parts = (rows.view(-1, 1) * 4 + columns).to(device, torch.uint8)
    return pictures, torch.zeros(images, dtype=torch.long, device=device), parts.expand(images, -1, -1)


def forward(model: Classifier, batch: Tensor) -> Tensor:
    """A bare forward."""
    with torch.no_grad():
        return model(batch)


def one_part_at_a_time(
    model: Classifier, pictures: Tensor, targets: Tensor, parts: Tensor, precision: Precision
) -> None:
    """The slow twin: every part a call of its own, everything computed again for each."""
    for part in range(PARTS):
        alone = torch.where(parts == part, 0, 255).to(torch.uint8)
        score_parts(model, pictures, targets, alone, batch_size=2, precision=precision)
