"""What can be named in a config, as rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import xai_core.attribution
import xai_core.concepts
import xai_core.inherent
import xai_core.metrics
import xai_core.parts
import xai_core.receptive_fields  # noqa: F401  (importing registers)
from xai_core.concepts.graph import coefficient_attributions
from xai_core.receptive_fields.attributors import AttributorEntry, attributors
from xai_core.registry import Entry, MethodEntry, MetricEntry, Registry, extractors, methods, metrics, parsers

REGISTRIES: dict[str, Registry[Any]] = {
    "methods": methods,
    "metrics": metrics,
    "parts": parsers,
    "extractors": extractors,
    "attributors": attributors,
    "attributions": coefficient_attributions,
}
HIDDEN = ("function", "options", "also_needs", "arrays", "wraps", "fit")


def catalogue(kind: str, pattern: str | None = None) -> list[dict[str, Any]]:
    """All entries of a kind as plain dicts; ``pattern`` keeps names that match (``*`` for any text)."""
    from fnmatch import fnmatch

    if kind == "models":
        import timm

        import xai_core.demo_models  # noqa: F401  (importing registers the packaged models)

        return [{"name": name} for name in timm.list_models(pattern or "")]
    entries = [_describe(entry) for entry in REGISTRIES[kind]]
    return [entry for entry in entries if pattern is None or fnmatch(entry["name"], pattern)]


def default_of(option: dataclasses.Field[Any]) -> Any:
    """An option's default, or ``required``."""
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return "required" if option.default is dataclasses.MISSING else option.default


def needs_of(entry: MethodEntry | AttributorEntry) -> list[str]:
    """What a method needs of a model beside its family, a phrase each."""
    return [(need.__doc__ or need.__name__).strip().splitlines()[0].rstrip(".") for need in entry.needs]


def _describe(entry: Entry) -> dict[str, Any]:
    facts = {
        field.name: getattr(entry, field.name) for field in dataclasses.fields(entry) if field.name not in HIDDEN
    }
    options = {field.name: default_of(field) for field in dataclasses.fields(entry.options)}
    if isinstance(entry, MethodEntry):
        facts |= {"fitted": entry.fit is not None}
    if isinstance(entry, (MethodEntry, AttributorEntry)):
        facts |= {"families": ", ".join(entry.families), "needs": needs_of(entry)}
    if isinstance(entry, MetricEntry):
        facts |= {"better": "higher" if entry.higher_is_better else "lower"}
    return {"name": facts.pop("name"), "options": options, **facts}
