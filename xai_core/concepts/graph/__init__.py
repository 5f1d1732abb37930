"""The Interlayer Concept Graph (iERF, section VI): how concepts of one layer make those of the next.

Importing this package registers the attributions of coefficients.
"""

from xai_core.concepts.graph.attributions import coefficient_attributions
from xai_core.concepts.graph.concept_graph import concept_graph, node_importance
from xai_core.concepts.graph.curves import InterlayerCurves, interlayer_curves
from xai_core.concepts.graph.decomposition import NO_CONCEPT, Decomposition, decompose
from xai_core.concepts.graph.diagnosis import Comparison, compare, fgsm
from xai_core.concepts.graph.nodes import Importance, Nodes, top_concepts
from xai_core.concepts.graph.options import Attribution, GraphOptions
from xai_core.concepts.graph.questions import Alignment, Logits
from xai_core.concepts.graph.routes import Routes, strongest_routes
from xai_core.concepts.graph.structure import CLASSIFIER, ConceptGraph, averaged, edge_shares, joined

__all__ = [
    "CLASSIFIER",
    "NO_CONCEPT",
    "Alignment",
    "Attribution",
    "Comparison",
    "ConceptGraph",
    "Decomposition",
    "GraphOptions",
    "Importance",
    "InterlayerCurves",
    "Logits",
    "Nodes",
    "Routes",
    "averaged",
    "coefficient_attributions",
    "compare",
    "concept_graph",
    "decompose",
    "edge_shares",
    "fgsm",
    "interlayer_curves",
    "joined",
    "node_importance",
    "strongest_routes",
    "top_concepts",
]
