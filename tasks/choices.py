"""What configs are made of: frozen sections, and registered things chosen by name with their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

import xai_core.attribution
import xai_core.concepts
import xai_core.inherent
import xai_core.metrics
import xai_core.parts
import xai_core.receptive_fields  # noqa: F401  (importing these six registers what a config can name)
from xai_core.concepts.graph import coefficient_attributions
from xai_core.receptive_fields.attributors import attributors
from xai_core.registry import Registry, extractors, methods, metrics, parsers, variant_id


class Frozen(BaseModel):
    """A config section: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _tuples(value: Any) -> Any:
    """Lists as tuples all the way down: JSON knows only lists, and options that went through it stay equal."""
    if isinstance(value, Mapping):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


class Choice(Frozen):
    """A registered thing with all its options spelled out, and the id under which its results stand."""

    name: str
    options: Annotated[Mapping[str, Any], AfterValidator(_tuples)]
    id: str


def choose(registry: Registry[Any]) -> Callable[[Any], Choice]:
    """What makes a choice of a name, or of a mapping with it and options, as a validator of Pydantic's."""

    def chosen(value: Any) -> Choice:
        if isinstance(value, Choice):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError(
                f"expected a {registry.kind}'s name, or a mapping with 'name' and its options, got {value!r}"
            )
        if set(value) == {"name", "options", "id"}:
            return Choice(**value)
        entry = registry.get(value["name"])
        given = {key: option for key, option in value.items() if key != "name"}
        checked = _check_options(entry.options, given)
        return Choice(name=entry.name, options=asdict(checked), id=variant_id(entry.name, checked))

    return chosen


def _check_options(options: type, given: Mapping[str, Any]) -> Any:
    """The options object from a config's values, types checked; errors name the option.

    An option whose metadata says that it ``names`` a method is checked as one, with that method's own options.
    """
    known = [option.name for option in fields(options)]
    wrapping = [one.name for one in fields(options) if one.metadata.get("names") == methods.kind]
    given = {**given, **{name: _check_named(name, given[name]) for name in wrapping if name in given}}
    strict = pydantic_dataclass(options, frozen=True, config=ConfigDict(extra="forbid"))
    try:
        checked = TypeAdapter(strict).validate_python(dict(given))
    except ValidationError as error:
        raise ValueError(
            "; ".join(_told(".".join(map(str, one["loc"])), one, known) for one in error.errors())
        ) from None
    return options(**{name: getattr(checked, name) for name in known})


def _told(where: str, error: Any, known: list[str]) -> str:
    """One line for one wrong option; what the options object itself refuses names the option already."""
    if error["type"] == "unexpected_keyword_argument":
        return f"no option {where!r}; it takes {', '.join(known) or 'none'}"
    if not where:
        return str(error["msg"]).removeprefix("Value error, ")
    return f"option {where}: {error['msg']}, got {error['input']!r}"


def _check_named(option: str, value: Any) -> dict[str, Any]:
    """A method and its options as a mapping, all of them written out."""
    try:
        choice = choose(methods)(value)
    except ValueError as error:
        raise ValueError(f"option {option}: {error}") from None
    return {"name": choice.name, **choice.options}


def options_of(registry: Registry[Any], choice: Choice) -> Any:
    """The options object of a choice."""
    return registry.get(choice.name).options(**choice.options)


MethodChoice = Annotated[Choice, BeforeValidator(choose(methods))]
MetricChoice = Annotated[Choice, BeforeValidator(choose(metrics))]
ParserChoice = Annotated[Choice, BeforeValidator(choose(parsers))]
ExtractorChoice = Annotated[Choice, BeforeValidator(choose(extractors))]
# The attributor that fits the model, or a chosen one.
AttributorChoice = Annotated[
    Literal["auto"] | Choice,
    BeforeValidator(lambda value: value if value == "auto" else choose(attributors)(value)),
]
CoefficientAttributionChoice = Annotated[Choice, BeforeValidator(choose(coefficient_attributions))]
LatentAttributorChoice = Annotated[Choice, BeforeValidator(choose(attributors))]
