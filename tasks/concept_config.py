"""The config section ``concepts``: sampled vectors, dictionaries, exemplars, concept graphs and latents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tasks.choices import (
    AttributorChoice,
    Choice,
    CoefficientAttributionChoice,
    ExtractorChoice,
    Frozen,
    LatentAttributorChoice,
    options_of,
)
from xai_core.concepts.coding import LASSO_PENALTY
from xai_core.concepts.graph import GraphOptions
from xai_core.concepts.graph.curves import STEPS
from xai_core.receptive_fields.attributors import attributors


class ReceptiveFieldsConfig(Frozen):
    """Which pixels drive each sampled vector, kept at a low resolution.

    ``size``: rows and columns at most; an attributor with fewer, such as a ViT's patches, keeps its own.
    ``attributor``: ``auto`` (SRD on maps, AttnLRP on ViTs), or a name, or a mapping with ``name`` and its options.
    """

    size: int = Field(default=14, ge=1, le=224)
    attributor: AttributorChoice = "auto"

    @property
    def chosen(self) -> tuple[str, Any]:
        """The attributor's name and its options object; None where these are its defaults."""
        if isinstance(self.attributor, Choice):
            return self.attributor.name, options_of(attributors, self.attributor)
        return self.attributor, None


class ExemplarsConfig(Frozen):
    """How many of the sampled vectors are shown for each concept: the nearest ones.

    ``distinct_images``: at most one of an image, its nearest; else an image may give several.
    """

    count: int = Field(default=10, ge=1, le=1000)
    distinct_images: bool = True


def _one_of_each(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Refuses two of one name: their results stand under the name, side by side, and one would hide the other."""
    names = [choice.name for choice in choices]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"expected each once, got {', '.join(twice)} with several options; keep one of them")
    return choices


class GraphConfig(Frozen):
    """The interlayer concept graph: of which images, by which dictionaries, and with which attributions.

    ``extractors``: ids of those that graphs are made of; empty: the study's first. ``images``: how many, the first
    of the data set. ``concepts``: nodes a layer. ``edges``, ``nodes``: attributions of coefficients.
    ``compare``: attributions whose edges are tested by concept insertion and deletion, each on the
    ``compared_children`` most important concepts of the next layer, in ``insertion_steps``.
    """

    extractors: tuple[str, ...] = ()
    images: int = Field(default=100, ge=1)
    concepts: int = Field(default=5, ge=1)
    edges: CoefficientAttributionChoice = Field(default="integrated_gradients", validate_default=True)
    nodes: CoefficientAttributionChoice = Field(default="integrated_gradients", validate_default=True)
    penalty: float = Field(default=LASSO_PENALTY, gt=0)
    compare: Annotated[tuple[CoefficientAttributionChoice, ...], AfterValidator(_one_of_each)] = ()
    compared_children: int = Field(default=3, ge=1)
    insertion_steps: int = Field(default=STEPS, ge=1)

    @model_validator(mode="after")
    def _can_be_made(self) -> GraphConfig:
        self.options()
        return self

    def options(self) -> GraphOptions:
        """The same as xai_core takes it."""
        return GraphOptions(
            concepts=self.concepts,
            edges=self.edges.name,
            edge_options=dict(self.edges.options),
            nodes=self.nodes.name,
            node_options=dict(self.nodes.options),
            penalty=self.penalty,
        )


class CafeConfig(Frozen):
    """Latents of sparse autoencoders explained: how many of each layer, on how many of their strongest images.

    ``pooling``: which scalar a latent is; ``steps``: of the insertion test, null for one patch a step.
    """

    latents: int = Field(default=16, ge=1)
    images: int = Field(default=3, ge=1)
    attributors: Annotated[tuple[LatentAttributorChoice, ...], AfterValidator(_one_of_each)] = Field(
        default=("integrated_gradients", "gradient", "kernel_shap"), validate_default=True
    )
    pooling: Literal["max", "sum", "class_token"] = "max"
    steps: int | None = Field(default=None, ge=1)


class ConceptsConfig(Frozen):
    """Which layers' pointwise feature vectors are sampled and which dictionaries are fitted to them.

    ``per_image`` vectors are drawn from each image, and ``class_token`` adds that of a ViT. ``receptive_fields``
    null leaves out where each vector comes from, which costs two to six gradients a vector. ``atoms`` null means
    8 per channel, capped by the sample.
    """

    layers: tuple[str, ...] = ()
    per_image: int = Field(default=1, ge=1)
    class_token: bool = True
    receptive_fields: ReceptiveFieldsConfig | None = ReceptiveFieldsConfig()
    extractors: tuple[ExtractorChoice, ...] = Field(default=("bisecting_kmeans", "sae"), validate_default=True)
    atoms: int | None = Field(default=None, ge=1)
    exemplars: ExemplarsConfig = ExemplarsConfig()
    graph: GraphConfig | None = None
    cafe: CafeConfig | None = None

    @model_validator(mode="after")
    def _graph_of_own_dictionaries(self) -> ConceptsConfig:
        known = [choice.id for choice in self.extractors]
        unknown = [one for one in (self.graph.extractors if self.graph else ()) if one not in known]
        if unknown:
            raise ValueError(
                f"graph.extractors: expected ids of concepts.extractors ({', '.join(known)}), got "
                f"{', '.join(unknown)}"
            )
        if (self.graph or self.cafe) and not self.layers:
            raise ValueError("graph and cafe are made of layers' dictionaries: name concepts.layers")
        return self

    @property
    def graph_or_default(self) -> GraphConfig:
        """How graphs are made, also for whoever makes one that the study does not."""
        return self.graph or GraphConfig()

    @property
    def cafe_or_default(self) -> CafeConfig:
        """How latents are explained."""
        return self.cafe or CafeConfig()

    @property
    def graph_extractors(self) -> tuple[str, ...]:
        """The ids of the extractors that graphs are made of."""
        if self.graph is None:
            return ()
        return self.graph.extractors or tuple(choice.id for choice in self.extractors[:1])
