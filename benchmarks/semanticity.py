"""What maps that never saw a picture score on the measures of section 4.1: discs in the middle, on real trimaps.

Pets in the geometry of an IA(16, k): what a segmentation difference or a macro IoU has to be compared with before
it says that something looked at the picture.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.timing import row
from xai_core.inherent.patches import enlarge
from xai_core.metrics import Evidence, evaluate
from xai_core.metrics.semanticity import ImportanceOptions
from xai_core.metrics.truth import INSIDE, OUTSIDE, UNKNOWN, Truth
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.registry import metrics

TRIMAPS = Path(__file__).parents[2] / "shared" / "data" / "pets" / "trimaps"
#: Of a trimap: the animal, what is around it, and the border, of which nobody knows.
MEANING = {1: INSIDE, 2: OUTSIDE, 3: UNKNOWN}
PATCH, GRID = 16, 14
NETWORK = {
    "num_classes": 3,
    "img_size": PATCH * GRID,
    "patch_size": PATCH,
    "importance_width": 8,
    "component_width": 8,
}
RADII = (2, 3, 4, 5, 6)
MEASURES = ("segmentation_difference", "macro_iou")


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    model = load_classifier(ModelSpec("vitrine_ia", pretrained=False, create_args=NETWORK), device)
    masks = trimaps(model).to(device)
    for label, importance in maps(device).items():
        row(f"{label}, {len(masks)} pets", **scores(model, importance, masks))


def trimaps(model: Classifier) -> Tensor:
    """All trimaps as the metrics take masks, ``[N, 224, 224]``."""
    found = []
    for path in sorted(TRIMAPS.rglob("*.png")):
        mask = model.preprocess_mask(Image.open(path))
        known = torch.full_like(mask, UNKNOWN)
        for value, meaning in MEANING.items():
            known[mask == value] = meaning
        found.append(known)
    return torch.stack(found)


def maps(device: str) -> dict[str, Tensor]:
    """Importance ``[14, 14]`` by name."""
    places = torch.arange(GRID, device=device) - (GRID - 1) / 2
    distance = (places[:, None] ** 2 + places**2).sqrt()
    discs = {f"disc of radius {radius} patches": (distance <= radius).float() for radius in RADII}
    return {"nothing": torch.zeros_like(distance), "all": torch.ones_like(distance), **discs}


def scores(model: Classifier, importance: Tensor, masks: Tensor) -> dict[str, float]:
    """Means of the measures over the masks."""
    images = torch.zeros(len(masks), 3, *model.input_size, device=masks.device)
    targets = torch.zeros(len(masks), dtype=torch.long, device=masks.device)
    whole = enlarge(importance.expand(len(masks), -1, -1), model.input_size).squeeze(1)
    options = ImportanceOptions(PATCH, "none")
    evidence = Evidence(model, images, targets, whole, truth=Truth(masks))
    found = evaluate(evidence, [(metrics.get(name), options) for name in MEASURES]).values
    return {name: one.nanmean().item() for name, one in zip(MEASURES, found.values(), strict=True)}
