"""The registry of attributors: ways to say which pixels or patches drive a scalar inside a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import BOTH, Entry, Family, Registry, build_options

#: The first of these that fits a model is what ``auto`` means: SRD for CNNs and AttnLRP for ViTs (iERF, section
#: III-D), and gradients, which fit every model, where neither has rules for what it computes.
AUTO = ("srd", "attn_lrp", "gradient")


@dataclass(frozen=True)
class AttributorEntry(Entry):
    """An attributor A of equation 1: which models it fits, what it returns and what it costs.

    Its function takes a :class:`~xai_core.receptive_fields.passes.Reading`, its options and a batch size. It gives
    an iterator over the reading's columns: maps ``[n, h, w]`` of the column's n scalars. ``resolution`` says what
    h x w are. ``needs`` is as in :class:`~xai_core.registry.MethodEntry`, ``cost`` what one scalar costs.
    """

    families: tuple[Family, ...] = BOTH
    needs: tuple[Callable[[Any, Any], str | None], ...] = ()
    resolution: Literal["pixels", "patches", "cells"] = "pixels"
    equation: str = ""
    cost: str = ""


attributors: Registry[AttributorEntry] = Registry("attributor", AttributorEntry)


def choose(model: Classifier, attributor: str, options: Any) -> tuple[AttributorEntry, Any]:
    """The attributor of that name, or for ``auto`` the first of :data:`AUTO` that fits, and its options.

    Raises:
        UsageError: an unknown name or option, or a model that the attributor does not fit.
    """
    entry = _automatic(model) if attributor == "auto" else attributors.get(attributor)
    chosen = options if isinstance(options, entry.options) else build_options(entry, options or {})
    reason = misfit(entry, model, chosen)
    if reason is not None:
        raise UsageError(
            f"attributor {entry.name!r} does not fit {model.spec.name}: {reason}; attributors that fit it: "
            + ", ".join(other.name for other in attributors if misfit(other, model, other.options()) is None)
        )
    return entry, chosen


def misfit(entry: AttributorEntry, model: Classifier, options: Any) -> str | None:
    """Why an attributor with these options cannot explain this model, or None where it can."""
    if model.family not in entry.families:
        return f"it fits {' and '.join(entry.families)} models, and this is a {model.family}"
    reasons = (need(model, options) for need in entry.needs)
    return next((reason for reason in reasons if reason is not None), None)


def _automatic(model: Classifier) -> AttributorEntry:
    entries = [attributors.get(name) for name in AUTO]
    return next(entry for entry in entries if misfit(entry, model, entry.options()) is None)
