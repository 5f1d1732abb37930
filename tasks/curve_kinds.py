"""What the recorded curves are, by the stem of their id: headings, axes and how to read them, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CurveGroup:
    """Curves that are shown under one heading, with what they have in common."""

    title: str
    hint: str


REPLACED = CurveGroup(
    "Revealed and replaced",
    "Mean probability of the target class while the image is revealed or replaced in the order of relevance.",
)
IMPUTED = CurveGroup(
    "Removed and imputed",
    "Mean probability of the target class while pixels are removed and filled in from their neighbours (ROAD).",
)
INFORMATION = CurveGroup(
    "Information regained",
    "What the model makes of a blurred picture that regains its pixels, most relevant first, against the bytes "
    "that it takes to store it.",
)
RANDOMISED = CurveGroup(
    "Layers randomised",
    "Mean similarity of a map to the one that the same method gives once layers are initialised anew, from the "
    "head down. A method that explains what the model has learnt falls.",
)
UNKNOWN = CurveGroup("Other curves", "Recorded by metrics that this version does not know.")

GROUPS = (REPLACED, IMPUTED, INFORMATION, RANDOMISED, UNKNOWN)


@dataclass(frozen=True)
class CurveKind:
    """One kind of curve. ``value`` names the y axis; kinds of one group and value share its scale.

    ``bounds`` are what values can be: bands end there, and an axis shows no more.
    """

    group: CurveGroup
    title: str
    subtitle: str
    direction: str
    share: str
    value: str = "p(target)"
    bounds: tuple[float, float] = (0.0, 1.0)


HIGHER, LOWER = "higher curve is better", "lower curve is better"
KINDS = {
    "insertion": CurveKind(
        REPLACED, "Insertion", "pixels revealed, most relevant first", HIGHER, "share of pixels"
    ),
    "deletion": CurveKind(REPLACED, "Deletion", "pixels replaced, most relevant first", LOWER, "share of pixels"),
    "part_insertion": CurveKind(
        REPLACED, "Part insertion", "parts revealed, highest score first", HIGHER, "share of parts"
    ),
    "part_deletion": CurveKind(
        REPLACED, "Part deletion", "parts replaced, highest score first", LOWER, "share of parts"
    ),
    "road_most": CurveKind(IMPUTED, "ROAD", "most relevant pixels removed first", LOWER, "share of pixels"),
    "road_least": CurveKind(IMPUTED, "ROAD", "least relevant pixels removed first", HIGHER, "share of pixels"),
    "aic": CurveKind(
        INFORMATION, "Accuracy (AIC)", "images predicted as the target", HIGHER, "share of information", "accuracy"
    ),
    "sic": CurveKind(
        INFORMATION,
        "Softmax (SIC)",
        "share of the target's softmax regained",
        HIGHER,
        "share of information",
        "share",
    ),
    "randomisation": CurveKind(
        RANDOMISED,
        "Randomisation",
        "from the head to the stem",
        LOWER,
        "share of layers",
        "similarity",
        (-1.0, 1.0),
    ),
}


def kind_of(curve: str) -> CurveKind:
    """The kind of a curve by its id, variant or not; one that is not known is told by its id alone."""
    stem = curve.split("[")[0]
    unknown = CurveKind(UNKNOWN, stem, "", "", "fraction", "value", (float("-inf"), float("inf")))
    return KINDS.get(stem, unknown)


def place_of(curve: str) -> tuple[int, int]:
    """Where a curve stands among others: groups and kinds in the order above."""
    stem = curve.split("[")[0]
    return GROUPS.index(kind_of(curve).group), list(KINDS).index(stem) if stem in KINDS else len(KINDS)
