"""What a concept graph is made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from xai_core.concepts.coding import LASSO_PENALTY
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.graph import rules, shapley  # noqa: F401  (they register)
from xai_core.concepts.graph.attributions import coefficient_attributions
from xai_core.concepts.graph.questions import Question
from xai_core.errors import UsageError
from xai_core.registry import build_options

# Kernel SHAP needs two coalitions a player at least: a whole dictionary is too many.
_NOT_FOR_NODES = "kernel_shap"


@dataclass(frozen=True)
class GraphOptions:
    """``concepts``: nodes a layer and class (iERF's figures show 5).

    ``edges``, ``nodes``: attributions of coefficients, with ``edge_options`` and ``node_options``; ``penalty``: of
    the LASSO (equation 12), for dictionaries without an encoder.
    """

    concepts: int = 5
    edges: str = "integrated_gradients"
    edge_options: Mapping[str, Any] = field(default_factory=dict)
    nodes: str = "integrated_gradients"
    node_options: Mapping[str, Any] = field(default_factory=dict)
    penalty: float = LASSO_PENALTY

    def __post_init__(self) -> None:
        if self.concepts < 1:
            raise UsageError(f"concepts: expected at least 1, got {self.concepts}")
        if self.nodes == _NOT_FOR_NODES:
            raise UsageError(
                f"nodes: expected an attribution that can rank a whole dictionary, got {self.nodes!r}, which "
                "needs more coalitions than concepts; take it for the edges, and another one for the nodes"
            )
        self.edge_attribution()
        self.node_attribution()

    def edge_attribution(self) -> Attribution:
        """What edges are computed with."""
        return Attribution.of(self.edges, self.edge_options)

    def node_attribution(self) -> Attribution:
        """What the importance of nodes is computed with."""
        return Attribution.of(self.nodes, self.node_options)


@dataclass(frozen=True)
class Attribution:
    """One attribution of coefficients with its options: what the graph asks of it."""

    name: str
    options: Any

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any] | None = None) -> Attribution:
        """From a registered name and plain values.

        Raises:
            UsageError: an unknown name or option.
        """
        return cls(name, build_options(coefficient_attributions.get(name), values or {}))

    @property
    def passes(self) -> int:
        """Forward passes an image: how many rows of a batch one image takes."""
        return int(getattr(self.options, "steps", getattr(self.options, "samples", 1)))

    def __call__(self, question: Question, queries: Tensor | None, batch_size: int) -> Tensor:
        """``[B, Q, T]`` for the queries ``[B, Q]``, or for all concepts ``[B, K, T]``."""
        found: Tensor = coefficient_attributions.get(self.name).function(
            question, queries, self.options, batch_size
        )
        return found


def check_penalty(penalty: float, dictionaries: Mapping[str, Dictionary]) -> None:
    """Refuses a penalty that no dictionary would read.

    Raises:
        UsageError: it is off its default and all dictionaries bring an encoder.
    """
    if penalty != LASSO_PENALTY and all(dictionary.encoder for dictionary in dictionaries.values()):
        raise UsageError(
            f"penalty: nothing reads {penalty} where every dictionary brings its own encoder; leave it out"
        )
