"""Pictures of wind-up toys whose class-deciding parts are known exactly.

Every toy has a body, up to three trimmings (key, belt, badge) that mean nothing, and three deciding parts:
head, feet and tail. `CLASSES` lists which three belong together. Any two deciding parts name the class and no
single one does, so a toy that lacks one part still has exactly one right answer. Position, size, tilt,
mirroring, colours, backdrop and distractors are drawn independently of the class.

A `Scene` holds every random decision, so a picture can be drawn again without one of its parts: what stood
behind that part appears and all else stays as it was.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from xai_core.synthetic_shapes import SHAPES, Placement, Point, Polygon

IMAGE_SIZE = 128
NO_PART = 255
PART_DROPOUT = 0.15

CLASSES: dict[str, tuple[str, str, str]] = {
    "rolling cat": ("cat head", "wheels", "curly tail"),
    "walking cat": ("cat head", "legs", "fan tail"),
    "rocking cat": ("cat head", "rocker", "bolt tail"),
    "rolling bird": ("bird head", "wheels", "fan tail"),
    "walking bird": ("bird head", "legs", "bolt tail"),
    "rocking bird": ("bird head", "rocker", "curly tail"),
    "rolling robot": ("robot head", "wheels", "bolt tail"),
    "walking robot": ("robot head", "legs", "curly tail"),
    "rocking robot": ("robot head", "rocker", "fan tail"),
}
CLASS_NAMES: tuple[str, ...] = tuple(CLASSES)

_SUPERSAMPLING = 2
_FINE_SIZE = IMAGE_SIZE * _SUPERSAMPLING
_MARGIN = 3.0

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """One part of a toy; `shape` names its outline and `jitter` moves it about its `anchor` in toy units."""

    name: str
    shape: str
    deciding: bool
    colour: Colour
    anchor: Point
    jitter: Placement


@dataclass(frozen=True)
class Distractor:
    """A small shape that belongs to no toy, placed in pixels."""

    shape: str
    colour: Colour
    placement: Placement


@dataclass(frozen=True)
class Backdrop:
    """A texture of two colours: its pattern, how fine and how turned it is, and the seed of its grain."""

    pattern: str
    colours: tuple[Colour, Colour]
    frequency: float
    angle: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """All random decisions behind one picture; `parts` are in drawing order, farthest first."""

    label: int
    backdrop: Backdrop
    distractors: tuple[Distractor, ...]
    pose: Placement
    parts: tuple[Part, ...]

    def without(self, part: int) -> Scene:
        """The same scene lacking part `part`; raises IndexError unless 0 <= part < number of parts."""
        if not 0 <= part < len(self.parts):
            raise IndexError(f"part {part} of a toy with {len(self.parts)} parts")
        return replace(self, parts=self.parts[:part] + self.parts[part + 1 :])


@dataclass(frozen=True, eq=False)
class Rendered:
    """A drawn scene: uint8 `image` [H,W,3] and, at twice its resolution, which part is seen where.

    `fine_labels` [2H,2W] uint8 holds part indices 0..P-1 in drawing order, `NO_PART` where no part is seen.
    """

    image: NDArray[np.uint8]
    label: int
    fine_labels: NDArray[np.uint8]
    part_names: tuple[str, ...]
    deciding: tuple[bool, ...]

    @cached_property
    def coverage(self) -> NDArray[np.float32]:
        """Visible share of each pixel per part, float32 [P,H,W] in steps of 1/4.

        Drawing the scene without part k changes no pixel where `coverage[k]` is 0.
        """
        size = _SUPERSAMPLING
        height, width = (side // size for side in self.fine_labels.shape)
        indices = np.arange(len(self.part_names), dtype=np.uint8)[:, None, None]
        seen = (self.fine_labels == indices).reshape(-1, height, size, width, size)
        return seen.mean(axis=(2, 4), dtype=np.float32)

    @cached_property
    def part_labels(self) -> NDArray[np.uint8]:
        """Part seen most in each pixel, uint8 [H,W]; `NO_PART` where parts cover less than half of it."""
        coverage = self.coverage
        labels = coverage.argmax(axis=0).astype(np.uint8)
        return np.where(coverage.sum(axis=0) >= 0.5, labels, np.uint8(NO_PART))

    @property
    def part_masks(self) -> NDArray[np.bool_]:
        """Disjoint masks of the visible parts, bool [P,H,W]."""
        return self.part_labels == np.arange(len(self.part_names), dtype=np.uint8)[:, None, None]

    @property
    def object_mask(self) -> NDArray[np.bool_]:
        """Pixels of the toy, bool [H,W]; the union of `part_masks`."""
        return self.part_labels != NO_PART


@dataclass(frozen=True)
class _Slot:
    """A place on the toy: where parts attach, which shapes fit, and how far (radians) they may tilt."""

    anchor: Point
    shapes: tuple[str, ...]
    tilt: float
    deciding: bool = False
    optional: bool = False


_SLOTS: dict[str, _Slot] = {  # in drawing order, farthest first
    "key": _Slot((-0.08, -0.38), ("key",), tilt=0.2, optional=True),
    "tail": _Slot((-0.5, -0.02), ("curly tail", "fan tail", "bolt tail"), tilt=0.15, deciding=True),
    "body": _Slot((0.0, 0.0), ("oval body", "box body", "egg body"), tilt=0.0),
    "belt": _Slot((-0.24, 0.0), ("belt",), tilt=0.08, optional=True),
    "badge": _Slot((0.1, 0.0), ("star badge", "heart badge", "round badge"), tilt=0.4, optional=True),
    "feet": _Slot((0.0, 0.26), ("wheels", "legs", "rocker"), tilt=0.05, deciding=True),
    "head": _Slot((0.56, -0.34), ("cat head", "bird head", "robot head"), tilt=0.15, deciding=True),
}
_OPTIONAL = tuple(name for name, slot in _SLOTS.items() if slot.optional)
_DISTRACTORS = ("triangle", "diamond", "hexagon", "cross", "pill")
_TOY_COLOURS = bytes.fromhex(
    "e24b42 f08a38 f7c548 96be46 3ea06e 3caab4 4682cd 6062be 9e5cb2 e27098 a8704e ded6c6 788291"
)


def render(seed: int, index: int) -> Rendered:
    """Picture `index` of the data set drawn from `seed`: uint8 [128,128,3] with its label and masks."""
    return draw_scene(sample_scene(seed, index))


def sample_scene(seed: int, index: int, part_dropout: float = PART_DROPOUT) -> Scene:
    """Decide all about picture `index` of data set `seed`; its label is `index` modulo the class count.

    A toy lacks one part with probability `part_dropout`, which bears on no other decision.
    Raises ValueError when `seed` or `index` is negative.
    """
    generator = np.random.default_rng([seed, index])
    label = index % len(CLASSES)
    parts = _sample_parts(generator, CLASSES[CLASS_NAMES[label]])
    scene = Scene(
        label=label,
        backdrop=_sample_backdrop(generator),
        distractors=tuple(_sample_distractor(generator) for _ in range(generator.integers(3, 8))),
        pose=_sample_pose(generator, parts),
        parts=parts,
    )
    is_incomplete, missing = generator.random() < part_dropout, int(generator.integers(len(parts)))
    return scene.without(missing) if is_incomplete else scene


def _sample_parts(generator: np.random.Generator, class_shapes: Sequence[str]) -> tuple[Part, ...]:
    # One trimming is always kept so that a toy lacking a part still shows at least four.
    kept = {_OPTIONAL[generator.integers(len(_OPTIONAL))]}
    kept |= {name for name in _OPTIONAL if generator.random() < 0.5}
    colours = generator.permutation(len(_TOY_COLOURS) // 3)
    parts = []
    for colour, (name, slot) in zip(colours, _SLOTS.items(), strict=False):
        fitting = [shape for shape in slot.shapes if not slot.deciding or shape in class_shapes]
        part = Part(
            name=fitting[0] if slot.deciding else name,
            shape=fitting[generator.integers(len(fitting))],
            deciding=slot.deciding,
            colour=_toy_colour(generator, colour),
            anchor=slot.anchor,
            jitter=Placement(
                x=generator.uniform(-0.03, 0.03),
                y=generator.uniform(-0.03, 0.03),
                scale=generator.uniform(0.9, 1.12),
                angle=generator.uniform(-slot.tilt, slot.tilt),
            ),
        )
        if not slot.optional or name in kept:
            parts.append(part)
    return tuple(parts)


def _toy_colour(generator: np.random.Generator, choice: int) -> Colour:
    base = np.frombuffer(_TOY_COLOURS, np.uint8).reshape(-1, 3)[choice].astype(int)
    red, green, blue = np.clip(base + generator.integers(-14, 15, size=3), 0, 255).tolist()
    return red, green, blue


def _sample_pose(generator: np.random.Generator, parts: Sequence[Part]) -> Placement:
    """Turn, mirror and size the toy at random, and put it anywhere it fits whole."""
    turn = Placement(angle=generator.uniform(-0.45, 0.45), mirrored=bool(generator.random() < 0.5))
    corners = np.concatenate([polygon for part in parts for polygon in _outline(part, turn)])
    low, high = corners.min(axis=0), corners.max(axis=0)
    room = IMAGE_SIZE - 2.0 * _MARGIN
    scale = min(generator.uniform(44.0, 58.0), room / float((high - low).max()))
    x, y = (_MARGIN - scale * low + generator.random(2) * (room - scale * (high - low))).tolist()
    return replace(turn, x=x, y=y, scale=scale)


def _sample_backdrop(generator: np.random.Generator) -> Backdrop:
    hue, lightness = generator.random(), generator.uniform(0.3, 0.85)
    tones = [
        (hue + generator.uniform(-0.08, 0.08), lightness + shift * generator.uniform(0.04, 0.09))
        for shift in (-1, 1)
    ]
    saturation = generator.uniform(0.12, 0.4)
    first, second = (_rgb(hue, lightness, saturation) for hue, lightness in tones)
    return Backdrop(
        pattern=list(_PATTERNS)[generator.integers(len(_PATTERNS))],
        colours=(first, second),
        frequency=generator.uniform(3.0, 9.0),
        angle=generator.uniform(0.0, np.pi),
        seed=int(generator.integers(2**32)),
    )


def _rgb(hue: float, lightness: float, saturation: float) -> Colour:
    red, green, blue = (round(255 * tone) for tone in colorsys.hls_to_rgb(hue % 1.0, lightness, saturation))
    return red, green, blue


def _sample_distractor(generator: np.random.Generator) -> Distractor:
    x, y = generator.uniform(4.0, IMAGE_SIZE - 4.0, size=2).tolist()
    return Distractor(
        shape=_DISTRACTORS[generator.integers(len(_DISTRACTORS))],
        colour=_toy_colour(generator, int(generator.integers(len(_TOY_COLOURS) // 3))),
        placement=Placement(x, y, generator.uniform(3.5, 7.5), generator.uniform(0.0, 2.0 * np.pi)),
    )


def draw_scene(scene: Scene, without: int | None = None) -> Rendered:
    """Draw `scene`, or the same scene lacking part `without`, its remaining parts renumbered.

    Raises IndexError when the scene has no part `without`.
    """
    if without is not None:
        scene = scene.without(without)
    canvas = _draw_backdrop(scene.backdrop)
    labels = np.full((_FINE_SIZE, _FINE_SIZE), NO_PART, dtype=np.uint8)
    for distractor in scene.distractors:
        outline = [
            distractor.placement.apply(np.array(polygon)) for polygon in SHAPES[distractor.shape].silhouette
        ]
        _paint(canvas, outline, [], distractor.colour)
    for index, part in enumerate(scene.parts):
        details = [(tone, _place(part, scene.pose, polygon)) for tone, polygon in SHAPES[part.shape].details]
        window, mask = _paint(canvas, _outline(part, scene.pose), details, part.colour)
        labels[window][mask] = index
    return Rendered(
        image=_shrink(canvas),
        label=scene.label,
        fine_labels=labels,
        part_names=tuple(part.name for part in scene.parts),
        deciding=tuple(part.deciding for part in scene.parts),
    )


def _outline(part: Part, pose: Placement) -> list[NDArray[np.float64]]:
    return [_place(part, pose, polygon) for polygon in SHAPES[part.shape].silhouette]


def _place(part: Part, pose: Placement, polygon: Polygon) -> NDArray[np.float64]:
    return pose.apply(part.jitter.apply(np.array(polygon)) + part.anchor)


def _shrink(canvas: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average each 2x2 block: uint8 [2H,2W,3] to [H,W,3]."""
    wide = canvas.astype(np.uint16)
    rows = wide[0::2] + wide[1::2]
    return ((rows[:, 0::2] + rows[:, 1::2] + 2) // 4).astype(np.uint8)


_TONES = {
    "ink": (0.22, 0.0),
    "shade": (0.62, 0.0),
    "light": (0.45, 0.55),
}  # share of own colour, share of white
_EDGE_TONE = 0.35
_EDGE_FILTER = ImageFilter.MinFilter(5)


def _paint(
    canvas: NDArray[np.uint8],
    outline: Sequence[NDArray[np.float64]],
    details: Sequence[tuple[str, NDArray[np.float64]]],
    colour: Colour,
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Paint one shape, polygons in pixels, onto the fine canvas; returns its window and its mask in there."""
    corners = np.concatenate(outline) * _SUPERSAMPLING
    left, top = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 3, 0).tolist()
    right, bottom = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 4, _FINE_SIZE).tolist()
    window, size, origin = (slice(top, bottom), slice(left, right)), (right - left, bottom - top), (left, top)

    stencil = _stencil(size, origin, outline)
    mask = np.asarray(stencil) > 0
    edge = mask & (np.asarray(stencil.filter(_EDGE_FILTER)) == 0)
    light = np.linspace(1.12, 0.84, size[1], dtype=np.float32)[:, None, None]
    paint = np.broadcast_to(light * np.array(colour, dtype=np.float32), (size[1], size[0], 3)).copy()
    for tone, polygon in details:
        own, white = _TONES[tone]
        inside = np.asarray(_stencil(size, origin, [polygon])) > 0
        paint[inside] = own * np.array(colour) + white * 255.0
    paint[edge] = _EDGE_TONE * np.array(colour)
    canvas[window][mask] = np.clip(paint[mask], 0.0, 255.0)
    return window, mask


def _stencil(size: tuple[int, int], origin: Point, polygons: Sequence[NDArray[np.float64]]) -> Image.Image:
    stencil = Image.new("L", size)
    pencil = ImageDraw.Draw(stencil)
    for polygon in polygons:
        pencil.polygon((polygon * _SUPERSAMPLING - origin).ravel().tolist(), fill=255)
    return stencil


Field = NDArray[np.floating[Any]]
_Pattern = Callable[[Field, Field, np.random.Generator], Field]


def _noise(generator: np.random.Generator, cells: int) -> Field:
    """Smooth noise in 0..1 with `cells` bumps a side, float32 [H,W]."""
    coarse = Image.fromarray(generator.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def _stripes(u: Field, v: Field, generator: np.random.Generator) -> Field:
    return np.clip(0.5 + 2.0 * np.sin(2.0 * np.pi * u), 0.0, 1.0)


def _waves(u: Field, v: Field, generator: np.random.Generator) -> Field:
    return 0.5 + 0.5 * np.sin(2.0 * np.pi * u + 6.0 * _noise(generator, 5))


def _checks(u: Field, v: Field, generator: np.random.Generator) -> Field:
    return np.clip(0.5 + 3.0 * np.sin(np.pi * u) * np.sin(np.pi * v), 0.0, 1.0)


def _dots(u: Field, v: Field, generator: np.random.Generator) -> Field:
    distance = np.hypot(u % 1.0 - 0.5, v % 1.0 - 0.5)
    return np.clip(8.0 * (0.3 - distance), 0.0, 1.0)


def _clouds(u: Field, v: Field, generator: np.random.Generator) -> Field:
    return 0.6 * _noise(generator, 5) + 0.4 * _noise(generator, 14)


_PATTERNS: dict[str, _Pattern] = {p.__name__[1:]: p for p in (_stripes, _waves, _checks, _dots, _clouds)}


def _draw_backdrop(backdrop: Backdrop) -> NDArray[np.uint8]:
    """Backdrop as uint8 [2H,2W,3]; drawn at picture resolution since its grain is no finer than that."""
    generator = np.random.default_rng(backdrop.seed)
    steps = np.arange(IMAGE_SIZE, dtype=np.float32) * np.float32(backdrop.frequency / IMAGE_SIZE)
    cosine, sine = np.float32(np.cos(backdrop.angle)), np.float32(np.sin(backdrop.angle))
    u = cosine * steps[None, :] + sine * steps[:, None]
    v = cosine * steps[:, None] - sine * steps[None, :]
    mix = _PATTERNS[backdrop.pattern](u, v, generator)[..., None]
    first, second = np.array(backdrop.colours, dtype=np.float32)
    grain = 10.0 * (_noise(generator, 40) - 0.5) + 8.0 * (generator.random(u.shape, dtype=np.float32) - 0.5)
    colours = first + mix * (second - first) + grain[..., None]
    coarse = np.clip(colours, 0.0, 255.0).astype(np.uint8)
    return coarse.repeat(_SUPERSAMPLING, axis=0).repeat(_SUPERSAMPLING, axis=1)
