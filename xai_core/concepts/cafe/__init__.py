"""Concept-Anchored Feature Explanation (CAFE): what input makes a latent fire, and where (iERF, section V)."""

from xai_core.concepts.cafe.exemplars import Exemplars, ExemplarSearch, concept_scores
from xai_core.concepts.cafe.explain import ACTIVATION, LatentExplanation, explain_latents, latent_insertion
from xai_core.concepts.cafe.insertion import InsertionCurve, insertion
from xai_core.concepts.cafe.locality import Locality, locality
from xai_core.concepts.cafe.search import NonLocalised, most_non_localised, rank_by_distance

__all__ = [
    "ACTIVATION",
    "ExemplarSearch",
    "Exemplars",
    "InsertionCurve",
    "LatentExplanation",
    "Locality",
    "NonLocalised",
    "concept_scores",
    "explain_latents",
    "insertion",
    "latent_insertion",
    "locality",
    "most_non_localised",
    "rank_by_distance",
]
