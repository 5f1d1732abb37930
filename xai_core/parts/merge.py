"""Fragments too small to be parts go to the neighbour they touch most."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

import numpy as np

from xai_core.parts.labels import NO_PART


def merge_fragments(labels: np.ndarray, min_area: float) -> np.ndarray:
    """Merges small 4-connected components into their neighbours ("removing small regions", KL-Hessian 4.1).

    A component of fewer than ``min_area * H * W`` pixels joins the neighbouring component with the longest
    common border, the smallest component first. Ties: among fragments and among neighbours alike, the
    smaller label, then the one met first row by row. Pixels without a part stay so, however few they are,
    and take up a fragment only where it has no other neighbour; the last part of an image stays, however
    small.

    Args:
        labels: integers ``[H, W]``, ``NO_PART`` where there is none.
        min_area: fraction of the image; 0 leaves everything as it is.

    Returns:
        int64 ``[H, W]`` with values of ``labels``.
    """
    components, graph = _component_graph(labels)
    _contract(graph, min_area * labels.size)
    return graph.final_labels()[components]


@dataclass
class _Graph:
    """Components as nodes, numbered in the order in which a reader meets them; contracted in place.

    ``borders[a][b]`` is the number of pixel edges between a and b, ``parts`` the nodes that are a part. A
    contracted node has no borders and points in ``merged_into`` at the node that took its pixels.
    """

    label: list[int]
    area: list[int]
    borders: list[Counter[int]]
    merged_into: list[int]
    parts: set[int]

    def rank(self, node: int) -> tuple[int, int, int]:
        return self.area[node], self.label[node], node

    def target(self, fragment: int) -> int:
        around = self.borders[fragment]
        candidates = [node for node in around if node in self.parts] or list(around)
        return min(candidates, key=lambda node: (-around[node], self.label[node], node))

    def give(self, fragment: int, target: int) -> int:
        """Relabels a fragment as its target; the node that now holds both.

        Every neighbour of that label is joined: the fragment may have been all that lay between them.
        """
        label = self.label[target]
        holder = fragment
        for node in [node for node in self.borders[fragment] if self.label[node] == label]:
            holder = self._join(holder, node)
        self.label[holder] = label
        if label == NO_PART:
            self.parts.discard(holder)
        return holder

    def _join(self, one: int, other: int) -> int:
        """Contracts two neighbours into the one met first, which keeps the numbers in reading order."""
        kept, gone = min(one, other), max(one, other)
        self.area[kept] += self.area[gone]
        self.merged_into[gone] = kept
        self.parts.discard(gone)
        del self.borders[gone][kept], self.borders[kept][gone]
        for node, length in self.borders[gone].items():
            self.borders[kept][node] += length
            self.borders[node][kept] += length
            del self.borders[node][gone]
        self.borders[gone].clear()
        return kept

    def final_labels(self) -> np.ndarray:
        holder = np.array(self.merged_into)
        while not np.array_equal(holder, holder[holder]):
            holder = holder[holder]
        return np.array(self.label, dtype=np.int64)[holder]


def _contract(graph: _Graph, threshold: float) -> None:
    queue = [graph.rank(node) for node in graph.parts if graph.area[node] < threshold]
    heapq.heapify(queue)
    while queue and len(graph.parts) > 1:
        entry = heapq.heappop(queue)
        fragment = entry[-1]
        # Nodes change after they were queued: an entry counts only while it still tells the truth.
        if fragment not in graph.parts or graph.rank(fragment) != entry:
            continue
        holder = graph.give(fragment, graph.target(fragment))
        if holder in graph.parts and graph.area[holder] < threshold:
            heapq.heappush(queue, graph.rank(holder))


def _component_graph(labels: np.ndarray) -> tuple[np.ndarray, _Graph]:
    from skimage.measure import label as connected_components

    # Its numbers start at 1 and follow reading order.
    components = connected_components(labels, background=labels.min() - 1, connectivity=1) - 1
    area = np.bincount(components.ravel())
    label = np.zeros(len(area), dtype=np.int64)
    label[components] = labels
    borders: list[Counter[int]] = [Counter() for _ in area]
    for one, other, length in zip(*_border_lengths(components, len(area)), strict=True):
        borders[one][other] = borders[other][one] = length
    parts = set(np.flatnonzero(label != NO_PART).tolist())
    return components, _Graph(label.tolist(), area.tolist(), borders, list(range(len(area))), parts)


def _border_lengths(components: np.ndarray, count: int) -> tuple[list[int], list[int], list[int]]:
    pairs = np.concatenate(
        [
            np.stack([components[:, :-1].ravel(), components[:, 1:].ravel()]),
            np.stack([components[:-1].ravel(), components[1:].ravel()]),
        ],
        axis=1,
    ).astype(np.int64)
    pairs = pairs[:, pairs[0] != pairs[1]]
    low, high = pairs.min(axis=0), pairs.max(axis=0)
    edges, lengths = np.unique(low * count + high, return_counts=True)
    return (edges // count).tolist(), (edges % count).tolist(), lengths.tolist()
