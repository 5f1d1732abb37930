"""Where the nodes of a layered graph stand: columns by layer, ordered so that strong edges cross little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from xai_core.errors import UsageError

# There and back again, each; the best of all orders that were seen is taken.
SWEEPS = 12

Link = tuple[str, str, float]


def layer_order(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Layers from early to late, as edges between them tell: those that nothing tells apart by name.

    Args:
        pairs: source and target layer of edges.

    Raises:
        UsageError: edges that run in a circle.
    """
    from graphlib import CycleError, TopologicalSorter

    sorter: TopologicalSorter[str] = TopologicalSorter()
    for source, target in sorted(set(pairs)):
        sorter.add(target, source)
    try:
        sorter.prepare()
    except CycleError as error:
        raise UsageError(
            f"layers: expected edges from earlier to later layers, got a circle {' -> '.join(error.args[1])}"
        ) from None
    found: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        found.extend(ready)
        sorter.done(*ready)
    return found


def ordered(columns: Sequence[Sequence[str]], links: Sequence[Link]) -> list[list[str]]:
    """Nodes of each layer in the order that the barycentre method finds (Sugiyama, Tagawa and Toda 1981).

    Sweeps from left to right and back put every node at the mean place of its neighbours behind or before,
    weighted by the links; the order whose crossing links weigh least is kept, the given one if none is better.

    Args:
        columns: node ids by layer; links: (source, target, weight at least 0) from an earlier to a later layer.
    """
    best = order = [list(column) for column in columns]
    least = crossings(best, links)
    for sweep in range(2 * SWEEPS):
        if least == 0:
            break
        order = _swept(order, links, backwards=sweep % 2 == 1)
        weight = crossings(order, links)
        if weight < least:
            best, least = order, weight
    return best


def crossings(columns: Sequence[Sequence[str]], links: Sequence[Link]) -> float:
    """What crosses: the product of the weights of every two links of one pair of layers that cross, added up."""
    place = {node: (layer, index) for layer, column in enumerate(columns) for index, node in enumerate(column)}
    tables: dict[tuple[int, int], np.ndarray] = {}
    for source, target, weight in links:
        (first, row), (second, column) = place[source], place[target]
        shape = (len(columns[first]), len(columns[second]))
        tables.setdefault((first, second), np.zeros(shape))[row, column] += weight
    return float(sum((_earlier_and_lower(table) * table).sum() for table in tables.values()))


def _earlier_and_lower(table: np.ndarray) -> np.ndarray:
    """For every (i, j) the sum over all (k, l) with k < i and l > j: what crosses a link from i to j."""
    after = np.cumsum(table[:, ::-1], axis=1)[:, ::-1] - table
    return np.asarray(np.cumsum(after, axis=0) - after)


def _swept(order: list[list[str]], links: Sequence[Link], *, backwards: bool) -> list[list[str]]:
    neighbours: dict[str, list[tuple[str, float]]] = {}
    for source, target, weight in links:
        node, neighbour = (source, target) if backwards else (target, source)
        neighbours.setdefault(node, []).append((neighbour, weight))
    place = {node: _share(index, column) for column in order for index, node in enumerate(column)}
    found: list[list[str]] = []
    for column in order[::-1] if backwards else order:
        centre = {node: _barycentre(neighbours.get(node, ()), place, place[node]) for node in column}
        arranged = sorted(column, key=centre.__getitem__)
        place.update({node: _share(index, arranged) for index, node in enumerate(arranged)})
        found.append(arranged)
    return found[::-1] if backwards else found


def _share(index: int, column: Sequence[str]) -> float:
    """A place in (0, 1), so that layers of different length can be compared."""
    return (index + 0.5) / len(column)


def _barycentre(neighbours: Sequence[tuple[str, float]], place: Mapping[str, float], alone: float) -> float:
    whole = sum(weight for _, weight in neighbours)
    return sum(place[node] * weight for node, weight in neighbours) / whole if whole else alone


def heights(columns: Sequence[Sequence[str]], pitch: float) -> dict[str, float]:
    """The middle of every node: the longest layer at ``pitch``, shorter ones wider apart and centred."""
    longest = max(map(len, columns))
    return {
        node: pitch * (longest / 2 + (index - (len(column) - 1) / 2) * (longest / len(column)) ** 0.5)
        for column in columns
        for index, node in enumerate(column)
    }
