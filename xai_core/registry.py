"""One registry for methods, metrics, parsers and extractors: an entry is data, a duplicate is fatal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from xai_core.errors import UsageError, nearest

Family = Literal["cnn", "vit"]
BOTH: tuple[Family, ...] = ("cnn", "vit")


@dataclass(frozen=True)
class NoOptions:
    """The options of an entry that has none."""


@dataclass(frozen=True)
class Entry:
    """What every registered thing tells of itself.

    ``options`` is a frozen dataclass type: its fields are the config keys, its defaults the defaults.
    """

    name: str
    function: Callable[..., Any]
    options: type = NoOptions
    summary: str = ""
    paper: str = ""


@dataclass(frozen=True)
class MethodEntry(Entry):
    """An attribution method: where it is defined, what it fits, what it returns and what it costs.

    ``needs``: what a model, or a model and the method's options, must have beside the family. Each is a function
    ``(model, options) -> reason``: why it cannot be, or None. ``cost`` counts forward-equivalents an image: a
    forward is 1, a gradient behind it about 1 more.
    """

    equation: str = ""
    families: tuple[Family, ...] = BOTH
    needs: tuple[Callable[[Any, Any], str | None], ...] = ()
    output: Literal["pixels", "parts"] = "pixels"
    # How a map of native resolution becomes one of input resolution; None where it already has that size.
    upsampling: str | None = None
    cost: str = ""
    # Whether the map depends on the class asked for; one that does not cannot contrast classes.
    class_specific: bool = True
    gradient_free: bool = False
    # "kept": timm's fused attention kernels stay; "off": attention is computed step by step for the pass.
    fused_attention: Literal["kept", "off"] = "kept"
    # Whether the method may run under bf16; one that may not is refused there.
    half_precision: bool = True
    # Whether its maps can be differentiated by the images, exactly, where these require gradients.
    differentiable: bool = False
    # What the method hands out beside the map under its options: names, and their dimensions behind the image's.
    arrays: Callable[[Any], Mapping[str, tuple[str, ...]]] = field(default=lambda options: {})
    # The method that this one is computed from under its options, with that method's own options.
    wraps: Callable[[Any], tuple[MethodEntry, Any]] | None = None
    # What a method learns from data before it explains: ``(model, samples, options, batch_size, seed)`` to named
    # tensors, which its function takes as ``fitted``. Its options have ``fit_images``, how many a study gives it;
    # where users can bring pictures of their own, ``concepts``, their folder, and ``examples``, the most of each.
    fit: Callable[..., Any] | None = None


Need = Literal["parts", "mask", "effects", "explainer"]


@dataclass(frozen=True)
class MetricEntry(Entry):
    """A metric: its exact definition, its direction and bounds are data, not prose.

    Its function takes the evidence and the options and gives what it measured. ``needs`` name what it reads beside
    the map; ``undefined`` says when an image has no value; ``cost`` counts forward-equivalents an image.
    """

    definition: str = ""
    family: str = ""
    higher_is_better: bool = True
    # None where there is no bound.
    bounds: tuple[float | None, float | None] = (0.0, 1.0)
    unit: str = ""
    undefined: str = ""
    needs: tuple[Need, ...] = ()
    # What it reads beside those under some of its options.
    also_needs: Callable[[Any], tuple[Need, ...]] = field(default=lambda options: ())
    cost: str = ""

    def all_needs(self, options: Any) -> tuple[Need, ...]:
        """What the metric reads beside the map under these options."""
        return (*self.needs, *self.also_needs(options))


@dataclass(frozen=True)
class ParserEntry(Entry):
    """A way to cut an image into parts. ``needs`` names the inputs it reads beside the images."""

    needs: tuple[Literal["features", "masks"], ...] = ()


@dataclass(frozen=True)
class ExtractorEntry(Entry):
    """A way to learn a dictionary of concept vectors from pointwise feature vectors."""


E = TypeVar("E", bound=Entry)


class Registry(Generic[E]):
    """Entries of one kind by name."""

    def __init__(self, kind: str, entry_type: type[E]) -> None:
        self.kind = kind
        self._entry_type = entry_type
        self._entries: dict[str, E] = {}

    def register(self, name: str, **facts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that registers a function under ``name``; a second one of that name is an error."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._entries:
                raise RuntimeError(f"{self.kind} {name!r} is registered twice: rename one of them")
            summary = (function.__doc__ or "").strip().splitlines()[0] if function.__doc__ else ""
            self._entries[name] = self._entry_type(name=name, function=function, summary=summary, **facts)
            return function

        return add

    def get(self, name: str) -> E:
        """The entry of that name.

        Raises:
            UsageError: no such entry; the message gives the nearest names.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise UsageError(f"unknown {self.kind} {name!r}: {nearest(name, self._entries)}") from None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def __iter__(self) -> Iterator[E]:
        return iter(self._entries[name] for name in self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries


methods: Registry[MethodEntry] = Registry("method", MethodEntry)
metrics: Registry[MetricEntry] = Registry("metric", MetricEntry)
parsers: Registry[ParserEntry] = Registry("parser", ParserEntry)
extractors: Registry[ExtractorEntry] = Registry("extractor", ExtractorEntry)


def build_options(entry: Entry, values: Mapping[str, Any]) -> Any:
    """An entry's options object from plain values.

    Raises:
        UsageError: a key that the entry does not take.
    """
    known = [option.name for option in dataclasses.fields(entry.options)]
    for key in values:
        if key not in known:
            raise UsageError(
                f"{entry.name!r} has no option {key!r}: "
                + (nearest(key, known) if known else "it takes no options")
            )
    return entry.options(**values)


def refuse_unread(options: Any, why: str, *names: str) -> None:
    """Refuses options off their defaults that nothing reads under the others: they would be ignored in silence.

    Raises:
        UsageError: naming the option and why it is not read.
    """
    for name in changed(options):
        if name in names:
            raise UsageError(f"{name}: nothing reads it {why}; leave it out")


def variant_id(name: str, options: Any) -> str:
    """The id under which results are stored: the name, and in brackets every option off its default.

    ``kl_hessian`` with epsilon 0.3 is ``kl_hessian[epsilon=0.3]``. Options that have a method ``in_id`` say
    themselves what stands there, as a mapping.
    """
    shown = options.in_id() if hasattr(options, "in_id") else changed(options)
    spelled = ",".join(f"{key}={_spell(value)}" for key, value in shown.items())
    return f"{name}[{spelled}]" if spelled else name


def changed(options: Any) -> dict[str, Any]:
    """The options that are off their defaults."""
    values = {option.name: (getattr(options, option.name), option) for option in dataclasses.fields(options)}
    return {key: value for key, (value, option) in values.items() if value != _default(option)}


def _default(option: dataclasses.Field[Any]) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def _spell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(_spell(one) for one in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
