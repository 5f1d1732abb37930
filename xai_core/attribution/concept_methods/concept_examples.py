"""Examples of concepts: a user's pictures, or patches of a study's own images grouped by what a layer says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.attribution.fitting import FitSamples
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.parts import part_areas, part_boxes, part_counts

RANDOM = "random"
_RESTARTS = 10


@dataclass(frozen=True)
class Examples:
    """Pictures that are made when they are asked for, ``read(rows)`` giving ``[n, 3, H, W]``.

    ``vectors`` ``[N, C]`` are their pooled activations, ``members`` the rows of each concept, ``others`` those of
    pictures that stand for no concept.
    """

    read: Callable[[Tensor], Tensor]
    vectors: Tensor
    members: tuple[Tensor, ...]
    others: Tensor

    @property
    def count(self) -> int:
        """Number of pictures."""
        return len(self.vectors)


def folder_source(samples: FitSamples) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...], Tensor]:
    """A user's pictures: how to read them, the rows of each concept in order of its name, and those of no concept.

    The last are their own under ``random``, else the samples' images.
    """
    concepts = samples.concepts or {}
    names = sorted(name for name in concepts if name != RANDOM)
    if not names:
        raise UsageError("visual_tcav.concepts: expected pictures of at least one concept, got none")
    empty = [name for name in concepts if not len(concepts[name])]
    if empty:
        raise UsageError(f"visual_tcav.concepts: expected pictures of every concept, got none of {empty[0]!r}")
    groups = [*(concepts[name] for name in names), concepts.get(RANDOM, samples.images)]
    starts = torch.tensor([0, *(len(group) for group in groups)]).cumsum(0)
    ranges = [torch.arange(int(first), int(last)) for first, last in pairwise(starts)]

    def read(rows: Tensor) -> Tensor:
        group = torch.bucketize(rows, starts[1:], right=True)
        return torch.stack(
            [groups[one][row - int(starts[one])] for one, row in zip(group.tolist(), rows.tolist(), strict=True)]
        )

    return read, tuple(ranges[:-1]), ranges[-1]


def patch_source(samples: FitSamples) -> tuple[Callable[[Tensor], Tensor], int]:
    """Patches of the samples' images, one a part, and how many: its box, enlarged to the whole input.

    Nothing is masked: a grey surround would be what the layer sees most of.
    """
    if samples.parts is None:
        raise UsageError("visual_tcav takes patches around parts: expected parts [N, H, W], or concepts; got none")
    images, parts = samples.images, samples.parts
    count = int(part_counts(parts).max())
    image, part = (part_areas(parts, count) > 0).nonzero(as_tuple=True)
    boxes = part_boxes(parts, count)[image, part]

    def read(rows: Tensor) -> Tensor:
        rows = rows.to(image.device)
        return crop(images[image[rows].to(images.device)], boxes[rows].to(images.device))

    return read, len(image)


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (x0, y0, x1, y1 with exclusive ends) of images ``[n, 3, H, W]``, enlarged to their size, bilinear."""
    height, width = images.shape[-2:]
    size = torch.tensor([width, height], device=images.device, dtype=images.dtype)
    first, last = boxes[:, :2].to(images.dtype) / size, boxes[:, 2:].to(images.dtype) / size
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = (last - first).unbind(1)
    theta[:, :, 2] = first + last - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def clustered_examples(read: Callable[[Tensor], Tensor], vectors: Tensor, concepts: int, seed: int) -> Examples:
    """Concepts as clusters of pictures by k-means on a layer's pooled activations ``[N, C]``; others are all."""
    from sklearn.cluster import KMeans

    # An image without finite activations is set aside when it is explained; it must not spoil the others here.
    finite = vectors.isfinite().all(dim=1).nonzero().flatten()
    if not len(finite):
        raise UsageError("visual_tcav: expected patches with finite activations, got none")
    vectors = vectors[finite]
    points = vectors.double().cpu()
    clusters = min(concepts, len(points.unique(dim=0)))
    labels = KMeans(clusters, n_init=_RESTARTS, random_state=seed).fit_predict(points.numpy())
    rows = torch.arange(len(points))
    members = tuple(rows[torch.from_numpy(labels) == label] for label in range(clusters))
    return Examples(lambda chosen: read(finite[chosen]), vectors, members, rows)


def over_rows(
    model: Classifier,
    read: Callable[[Tensor], Tensor],
    rows: Tensor,
    batch_size: int,
    see: Callable[[Tensor], Tensor],
) -> Tensor:
    """What ``see`` makes of the pictures at some rows, batch by batch, on the CPU."""
    found = run_batches(lambda part: see(read(rows[part]).to(model.device)).cpu(), len(rows), batch_size)
    return torch.cat(found)
