"""What a study is: frozen models of its config. Unknown keys are refused; every default is written here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tasks.choices import Choice, Frozen, MethodChoice, MetricChoice, ParserChoice, options_of
from tasks.concept_config import ConceptsConfig
from tasks.dataset_config import DatasetConfig
from tasks.importance.config import EvaluationConfig
from tasks.training.config import TrainingConfig
from xai_core.models import ModelSpec
from xai_core.precision import Precision

__all__ = [
    "Choice",
    "ConceptsConfig",
    "DatasetConfig",
    "EvaluationConfig",
    "Frozen",
    "ModelConfig",
    "RunConfig",
    "StudyConfig",
    "TrainingConfig",
    "options_of",
]


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


# Sections that came when stores were full of runs without them.
_LATER = ("training", "importance")


class StudyConfig(Frozen):
    """One study: a data set, and what is asked of it: a model explained, a training, networks' importance."""

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
    training: TrainingConfig | None = None
    importance: EvaluationConfig | None = None
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

    @property
    def asks_model(self) -> bool:
        """Whether anybody asks what the model says of the images: not to train or evaluate networks alone."""
        other = self.training is not None or self.importance is not None
        return bool(self.methods or self.concepts.layers) or not other

    def identity(self) -> dict[str, Any]:
        """The config without what cannot change a result: how and where it is computed."""
        found = self.model_dump(mode="json", exclude={"compute": True, "run": {"batch_size", "device"}})
        # Studies without these sections keep the run ids that they had before there were any.
        return {key: value for key, value in found.items() if value is not None or key not in _LATER}
