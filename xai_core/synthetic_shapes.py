"""Outlines of toy parts and distractors, as polygons in toy units around the point where a part is attached.

x grows towards the head, y downwards; a body is about one unit long. Distractors have a radius of about one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
Polygon = tuple[Point, ...]


@dataclass(frozen=True)
class Placement:
    """Where a shape goes: mirrored, scaled, turned by `angle` radians, then moved to (`x`, `y`)."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    angle: float = 0.0
    mirrored: bool = False

    def apply(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move `points` [N,2] (x to the right, y down); returns [N,2]."""
        cosine, sine = np.cos(self.angle) * self.scale, np.sin(self.angle) * self.scale
        turn = np.array([[cosine, sine], [-sine, cosine]])
        flip = np.array([-1.0 if self.mirrored else 1.0, 1.0])
        return (points * flip) @ turn + (self.x, self.y)


@dataclass(frozen=True)
class Shape:
    """A silhouette (union of polygons) and toned details (`ink`, `shade` or `light`) seen only inside it."""

    silhouette: tuple[Polygon, ...]
    details: tuple[tuple[str, Polygon], ...] = ()


def _ellipse(x: float, y: float, rx: float, ry: float | None = None, power: float = 2.0) -> Polygon:
    """Ellipse about (x, y); powers above 2 square it off."""
    turns = np.linspace(0.0, 2.0 * np.pi, 32, endpoint=False)
    cosine, sine = np.cos(turns), np.sin(turns)
    xs = x + rx * np.sign(cosine) * np.abs(cosine) ** (2.0 / power)
    ys = y + (ry or rx) * np.sign(sine) * np.abs(sine) ** (2.0 / power)
    return tuple(zip(xs.tolist(), ys.tolist(), strict=True))


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def _regular(corners: int, radius: float, inner: float | None = None) -> Polygon:
    """Regular polygon about the origin, or a star when `inner` gives the radius of its notches."""
    radii = [radius] if inner is None else [radius, inner]
    count = corners * len(radii)
    turns = [2.0 * np.pi * step / count - np.pi / 2 for step in range(count)]
    return tuple(
        (float(radii[step % len(radii)] * np.cos(turn)), float(radii[step % len(radii)] * np.sin(turn)))
        for step, turn in enumerate(turns)
    )


def _ribbon(path: Sequence[Point], width: float) -> tuple[Polygon, ...]:
    """Round-jointed band along `path`: one box per step, one disc per joint."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(path):
        length = float(np.hypot(x1 - x0, y1 - y0))
        dx, dy = (y0 - y1) * width / 2 / length, (x1 - x0) * width / 2 / length
        boxes.append(((x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)))
    return (*boxes, *(_ellipse(x, y, width / 2) for x, y in path))


def _cat_head() -> Shape:
    ears = (((-0.28, -0.05), (-0.3, -0.52), (0.03, -0.25)), ((0.28, -0.05), (0.3, -0.52), (-0.03, -0.25)))
    inner_ears = (((-0.2, -0.2), (-0.23, -0.4), (-0.08, -0.27)), ((0.2, -0.2), (0.23, -0.4), (0.08, -0.27)))
    eyes = (_ellipse(-0.12, -0.06, 0.055, 0.085), _ellipse(0.12, -0.06, 0.055, 0.085))
    muzzle, nose = _ellipse(0.0, 0.14, 0.15, 0.1), ((-0.06, 0.07), (0.06, 0.07), (0.0, 0.15))
    details = [("shade", ear) for ear in inner_ears] + [("light", muzzle)]
    return Shape((_ellipse(0.0, 0.0, 0.33, 0.3), *ears), (*details, *(("ink", ink) for ink in (*eyes, nose))))


def _bird_head() -> Shape:
    beak = ((0.16, -0.14), (0.62, 0.06), (0.14, 0.18))
    crest = tuple(_ellipse(-0.16 + 0.11 * step, -0.33, 0.07, 0.13) for step in range(3))
    eye = (("light", _ellipse(0.06, -0.08, 0.11)), ("ink", _ellipse(0.09, -0.08, 0.055)))
    mouth = ((0.2, 0.02), (0.62, 0.05), (0.2, 0.06))
    return Shape((_ellipse(0.0, 0.0, 0.29), beak, *crest), (("shade", beak), ("ink", mouth), *eye))


def _robot_head() -> Shape:
    antenna = (_box(-0.035, -0.5, 0.035, -0.2), _ellipse(0.0, -0.5, 0.09))
    visor = _box(-0.22, -0.15, 0.22, 0.04)
    lamps = (_ellipse(-0.11, -0.055, 0.06), _ellipse(0.11, -0.055, 0.06))
    grille = tuple(_box(x, 0.11, x + 0.06, 0.21) for x in (-0.17, -0.03, 0.11))
    dark = (("ink", visor), *(("ink", slot) for slot in grille))
    return Shape((_box(-0.31, -0.27, 0.31, 0.29), *antenna), (*dark, *(("light", lamp) for lamp in lamps)))


_SPOKES = ((0.13, 0.025), (0.025, 0.13))


def _wheels() -> Shape:
    centres = (-0.34, 0.34)
    rims = tuple(("light", _ellipse(x, 0.2, 0.13)) for x in centres)
    spokes = tuple(("shade", _box(x - w, 0.2 - h, x + w, 0.2 + h)) for x in centres for w, h in _SPOKES)
    return Shape(tuple(_ellipse(x, 0.2, 0.24) for x in centres), (*rims, *spokes))


def _legs() -> Shape:
    shafts = tuple(_box(x - 0.09, -0.05, x + 0.09, 0.36) for x in (-0.3, 0.24))
    shoes = tuple(_ellipse(x + 0.07, 0.37, 0.2, 0.1) for x in (-0.3, 0.24))
    soles = tuple(("ink", _box(x - 0.2, 0.41, x + 0.3, 0.5)) for x in (-0.3, 0.24))
    return Shape((*shafts, *shoes), soles)


def _rocker() -> Shape:
    arc = [(x, 0.4 - 0.5 * x * x) for x in np.linspace(-0.72, 0.72, 13).tolist()]
    rear = ((-0.28, -0.02), (-0.16, -0.02), (-0.3, 0.36), (-0.44, 0.3))
    front = ((0.28, -0.02), (0.16, -0.02), (0.3, 0.36), (0.44, 0.3))
    return Shape((*_ribbon(arc, 0.15), rear, front))


def _curly_tail() -> Shape:
    turns = np.linspace(0.0, 3.3 * np.pi, 28)
    radii = 0.27 - 0.063 * turns / np.pi
    coil = [(-0.36 + r * np.sin(t), -0.3 + r * np.cos(t)) for t, r in zip(turns, radii, strict=True)]
    return Shape(_ribbon([(0.12, 0.03), (-0.1, 0.02), *((float(x), float(y)) for x, y in coil)], 0.1))


def _fan_tail() -> Shape:
    angles = np.radians((158.0, 182.0, 206.0, 230.0))
    tips = [(0.5 * float(np.cos(a)), 0.5 * float(np.sin(a))) for a in angles]
    feathers = tuple(blade for tip in tips for blade in _ribbon([(0.1, 0.0), tip], 0.19))
    return Shape(feathers, tuple(("light", _ellipse(x, y, 0.06)) for x, y in tips))


def _bolt_tail() -> Shape:
    upper = ((0.12, -0.08), (-0.2, -0.14), (-0.16, -0.42), (-0.62, -0.6))
    lower = ((-0.36, -0.34), (-0.44, 0.02), (-0.12, 0.04), (0.12, 0.12))
    return Shape(((*upper, *lower),))


def _key() -> Shape:
    bow = (_ellipse(-0.15, -0.28, 0.15, 0.13), _ellipse(0.15, -0.28, 0.15, 0.13))
    holes = (("ink", _ellipse(-0.15, -0.28, 0.07, 0.055)), ("ink", _ellipse(0.15, -0.28, 0.07, 0.055)))
    return Shape((*bow, _box(-0.055, -0.3, 0.055, 0.12)), holes)


def _belt() -> Shape:
    return Shape((_box(-0.09, -0.29, 0.09, 0.29),), (("light", _box(-0.02, -0.3, 0.02, 0.3)),))


_HEART: Polygon = ((0.0, 0.19), (-0.19, -0.02), (-0.15, -0.15), (0.0, -0.08), (0.15, -0.15), (0.19, -0.02))
SHAPES: dict[str, Shape] = {
    "oval body": Shape((_ellipse(0.0, 0.0, 0.58, 0.39),)),
    "box body": Shape((_ellipse(0.0, 0.0, 0.55, 0.36, power=6.0),)),
    "egg body": Shape((_ellipse(-0.1, 0.0, 0.48, 0.4), _ellipse(0.2, -0.02, 0.38, 0.33))),
    "cat head": _cat_head(),
    "bird head": _bird_head(),
    "robot head": _robot_head(),
    "wheels": _wheels(),
    "legs": _legs(),
    "rocker": _rocker(),
    "curly tail": _curly_tail(),
    "fan tail": _fan_tail(),
    "bolt tail": _bolt_tail(),
    "key": _key(),
    "belt": _belt(),
    "star badge": Shape((_regular(5, 0.21, 0.1),)),
    "heart badge": Shape((_HEART,)),
    "round badge": Shape((_ellipse(0.0, 0.0, 0.16),), (("light", _ellipse(0.0, 0.0, 0.08)),)),
    "triangle": Shape((_regular(3, 1.0),)),
    "diamond": Shape((_regular(4, 1.0),)),
    "hexagon": Shape((_regular(6, 0.9),)),
    "cross": Shape((_box(-0.9, -0.3, 0.9, 0.3), _box(-0.3, -0.9, 0.3, 0.9))),
    "pill": Shape((_ellipse(0.0, 0.0, 1.0, 0.45, power=3.0),)),
}
