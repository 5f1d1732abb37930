"""What is known of the demo's pictures: their true parts, and what each does to the model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tasks.stage import Context
from tasks.targets import read_targets
from tasks.worker import Pictures, study_classifier
from xai_core.batching import try_batches
from xai_core.errors import ImageError, NotFinite
from xai_core.models import Classifier
from xai_core.parts.labels import NO_PART
from xai_core.precision import precision_context
from xai_core.synthetic import Rendered, Scene, draw_scene, sample_scene


@dataclass(frozen=True)
class Drawn:
    """The scenes of ``n`` pictures as they were drawn.

    ``labels`` ``[n, H, W]`` uint8 are the true parts as the model sees them (255: none), ``effects`` by picture
    what each part's absence takes from the target's logit; ``failed`` are positions of pictures without effects.
    """

    scenes: list[Scene]
    labels: Tensor
    effects: list[np.ndarray]
    failed: dict[int, ImageError]


def drawn(context: Context, pictures: Pictures) -> Drawn:
    """The scenes of the demo's pictures, drawn again."""
    model = study_classifier(context)
    scenes = [scene_of(path) for path in pictures.paths]
    empty = torch.zeros(0, *model.input_size, dtype=torch.uint8)
    labels = [true_labels(model, draw_scene(scene)) for scene in scenes]
    effects, failed = _effects(context, scenes, read_targets(context, pictures))
    return Drawn(scenes, torch.stack(labels) if labels else empty, effects, failed)


def scene_of(path: str) -> Scene:
    """The scene behind a picture of the demo, by its path."""
    _, seed, index = path.split("/")
    return sample_scene(int(seed), int(index))


def true_labels(model: Classifier, rendered: Rendered) -> Tensor:
    """True part labels ``[H, W]`` through the model's geometry, whose padding is no part."""
    # The geometry pads with 0, which is a part.
    shifted = model.preprocess_mask(Image.fromarray(rendered.part_labels + np.uint8(1)))
    return torch.where(shifted == 0, NO_PART, shifted - 1).to(torch.uint8)


def _effects(
    context: Context, scenes: list[Scene], targets: Tensor
) -> tuple[list[np.ndarray], dict[int, ImageError]]:
    """The target's logit of each scene minus that of the scene without each of its parts, and scenes that failed.

    All drawings, of all scenes, go through the model as one list, batch by batch: none is kept.
    """
    model, run = study_classifier(context), context.config.run
    left_out = [(at, part) for at, scene in enumerate(scenes) for part in (None, *range(len(scene.parts)))]

    def logits(rows: slice) -> Tensor:
        some = left_out[rows]
        pictures = [Image.fromarray(draw_scene(scenes[at], without=part).image) for at, part in some]
        inputs = torch.stack([model.preprocess(picture) for picture in pictures]).to(context.device)
        of = targets[[at for at, _ in some]].view(-1, 1)
        return model(inputs).double().gather(1, of).squeeze(1)

    with torch.no_grad(), precision_context(run.precision, context.device):
        batches = try_batches(logits, len(left_out), run.batch_size)
    failed = {left_out[row][0]: error for row, error in batches.failed.items()}
    found = np.full(len(left_out), np.nan)
    if batches.rows:
        found[batches.rows] = torch.cat(batches.results).cpu().numpy()
    ends = np.cumsum([0, *(1 + len(scene.parts) for scene in scenes)])
    effects = [found[start] - found[start + 1 : stop] for start, stop in pairwise(ends.tolist())]
    for at, some in enumerate(effects):
        if at not in failed and not np.isfinite(some).all():
            failed[at] = NotFinite("the model gave a logit that is NaN or infinite for the scene without a part")
    return effects, failed
