"""What a study is: frozen models of its config. Unknown keys are refused; every default is written here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

import xai_core.attribution
import xai_core.concepts
import xai_core.metrics
import xai_core.parts  # noqa: F401  (importing these four registers what a config can name)
from xai_core.models import ModelSpec
from xai_core.precision import Precision
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


def _choose(registry: Registry[Any]) -> Callable[[Any], Choice]:
    def choose(value: Any) -> Choice:
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

    return choose


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
        choice = _choose(methods)(value)
    except ValueError as error:
        raise ValueError(f"option {option}: {error}") from None
    return {"name": choice.name, **choice.options}


def options_of(registry: Registry[Any], choice: Choice) -> Any:
    """The options object of a choice."""
    return registry.get(choice.name).options(**choice.options)


MethodChoice = Annotated[Choice, BeforeValidator(_choose(methods))]
MetricChoice = Annotated[Choice, BeforeValidator(_choose(metrics))]
ParserChoice = Annotated[Choice, BeforeValidator(_choose(parsers))]
ExtractorChoice = Annotated[Choice, BeforeValidator(_choose(extractors))]


class DatasetConfig(Frozen):
    """Where images come from and in which order they are taken.

    ``classes`` is a CSV (index, folder, name) for folders that are a subset of the model's classes;
    ``masks`` is a folder that mirrors the images, for the parser ``masks``; ``order_seed`` null keeps the
    source's own order; ``images`` and ``seed`` are the demo's.
    """

    kind: Literal["folder", "parquet", "demo"] = "demo"
    path: str | None = None
    classes: str | None = None
    masks: str | None = None
    order_seed: int | None = 0
    limit: int | None = Field(default=None, ge=1)
    images: int = Field(default=64, ge=1)
    seed: int = 1

    @model_validator(mode="after")
    def _path_where_needed(self) -> DatasetConfig:
        if self.kind != "demo" and self.path is None:
            raise ValueError(f"kind {self.kind!r} needs a path: set dataset.path")
        if self.kind == "demo" and (self.path or self.classes or self.masks):
            raise ValueError("kind 'demo' draws its own images: remove path, classes and masks, or change kind")
        if self.kind == "parquet" and (self.classes or self.masks):
            raise ValueError("kind 'parquet' reads neither classes nor masks: remove them, or use kind: folder")
        return self


class ModelConfig(Frozen):
    """A timm model, its weights and what differs from its own preprocessing."""

    name: str = "vitrine_demo_vit"
    pretrained: bool = True
    checkpoint: str | None = None
    create_args: Mapping[str, Any] = {}
    transform: Mapping[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def spec(self) -> ModelSpec:
        """The same as xai_core takes it."""
        return ModelSpec(self.name, self.pretrained, self.checkpoint, dict(self.create_args), dict(self.transform))


def _mask_values(value: Any) -> Any:
    """Mask values on the object, for all images or by class; a class stands as text, be it a name or a number."""
    if isinstance(value, Mapping) and value:
        return {str(name): _listed_values(values) for name, values in value.items()}
    return None if value is None else _listed_values(value)


def _listed_values(value: Any) -> tuple[int, ...]:
    given = value if isinstance(value, (list, tuple)) else ()
    if not given or not all(type(one) is int and 0 <= one <= 255 for one in given):
        raise ValueError(f"expected a list of mask values from 0 to 255, or such lists by class, got {value!r}")
    return tuple(given)


MaskValues = tuple[int, ...]
Foreground = Annotated[MaskValues | Mapping[str, MaskValues] | None, BeforeValidator(_mask_values)]


class TruthConfig(Frozen):
    """Where a data set says which pixels the object is on; the demo draws its objects and knows them.

    ``masks`` is a folder that mirrors ``dataset.path`` with PNG masks of one byte a pixel. ``foreground`` are the
    values on the object: for all images, or by class (its name or number); null takes all but 0 and ``ignore``,
    the values that nobody knows. ``boxes`` is a CSV with the columns path, x0, y0, x1, y1 and, optionally, label.
    """

    masks: str | None = None
    foreground: Foreground = None
    ignore: tuple[Annotated[int, Field(ge=0, le=255)], ...] = ()
    boxes: str | None = None

    @property
    def values_on_objects(self) -> frozenset[int]:
        """The mask values that are some class's object; empty where they are all but 0 and ``ignore``."""
        named = self.foreground if isinstance(self.foreground, Mapping) else {"": self.foreground or ()}
        return frozenset(value for values in named.values() for value in values)

    @model_validator(mode="after")
    def _consistent(self) -> TruthConfig:
        if self.masks is not None and self.boxes is not None:
            raise ValueError("expected masks or boxes, got both: remove one")
        if self.masks is None and (self.foreground is not None or self.ignore):
            raise ValueError("foreground and ignore are values of masks: set truth.masks to their folder")
        both = sorted(self.values_on_objects.intersection(self.ignore))
        if both:
            raise ValueError(f"expected each value in foreground or in ignore, got {both} in both")
        return self


class PartsConfig(Frozen):
    """How images are cut into parts; ``backbone`` gives the tokens instead of the classifier."""

    parser: ParserChoice = Field(default="tokens", validate_default=True)
    k: int = Field(default=12, ge=1, le=254)
    backbone: ModelConfig | None = None
    min_area: float = Field(default=0.005, ge=0, lt=1)


class ConceptsConfig(Frozen):
    """Which layers' pointwise feature vectors are sampled and which dictionaries are fitted to them.

    ``atoms`` null means 8 per channel, capped by the sample.
    """

    layers: tuple[str, ...] = ()
    per_image: int = Field(default=1, ge=1)
    extractors: tuple[ExtractorChoice, ...] = Field(default=("bisecting_kmeans", "sae"), validate_default=True)
    atoms: int | None = Field(default=None, ge=1)


class RunConfig(Frozen):
    """Sizes, seed, device and arithmetic. ``batch_size`` and ``device`` never change what is stored."""

    shard_size: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "fp32"
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)


class ComputeConfig(Frozen):
    """Dask workers: null starts one per GPU, or one per core up to four; or the address of a scheduler."""

    workers: int | None = Field(default=None, ge=1)
    scheduler: str | None = None
    memory_limit: str | None = None


class StudyConfig(Frozen):
    """One study: a model, a data set, methods, metrics and concepts."""

    # Part of file names and of a Prefect name template.
    name: str = Field(default="demo", pattern=r"^[A-Za-z0-9_ .+=,@-]{1,100}$")
    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    target: Literal["top1", "label"] = "top1"
    truth: TruthConfig = TruthConfig()
    parts: PartsConfig = Field(default_factory=PartsConfig)
    methods: tuple[MethodChoice, ...] = Field(
        default=("grad_cam", "integrated_gradients", "kl_hessian"),
        validate_default=True,
    )
    metrics: tuple[MetricChoice, ...] = Field(
        default=("insertion", "deletion", "aopc", "p_insertion", "p_deletion", "p_aopc"),
        validate_default=True,
    )
    concepts: ConceptsConfig = Field(default_factory=ConceptsConfig)
    run: RunConfig = RunConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _distinct(self) -> StudyConfig:
        chosen = {
            "methods": [choice.id for choice in self.methods],
            "metrics": [choice.id for choice in self.metrics],
            "concepts.layers": list(self.concepts.layers),
            "concepts.extractors": [choice.id for choice in self.concepts.extractors],
        }
        for name, ids in chosen.items():
            twice = sorted({one for one in ids if ids.count(one) > 1})
            if twice:
                raise ValueError(f"{name}: {', '.join(twice)} named more than once; keep one")
        if self.parts.parser.name == "masks" and self.dataset.masks is None:
            raise ValueError("parts.parser: 'masks' reads files: set dataset.masks to their folder")
        return self

    @model_validator(mode="after")
    def _truth_fits(self) -> StudyConfig:
        kind, truth = self.dataset.kind, self.truth
        if kind == "demo" and (truth.masks or truth.boxes):
            raise ValueError(
                "truth: kind 'demo' knows what it draws: remove masks and boxes, or change dataset.kind"
            )
        if kind == "parquet" and truth.masks:
            raise ValueError("truth.masks: a folder of masks mirrors an image folder, got dataset.kind parquet")
        return self

    def identity(self) -> dict[str, Any]:
        """The config without what cannot change a result: how and where it is computed."""
        return self.model_dump(mode="json", exclude={"compute": True, "run": {"batch_size", "device"}})
