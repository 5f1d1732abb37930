"""Attribution of concept coefficients by Kernel SHAP: concepts as players, all their positions together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.attribution.perturbation.coalitions import Design
from xai_core.attribution.perturbation.kernel_shap import constrained_fit, fewest_samples, weighted_coalitions
from xai_core.batching import run_batches
from xai_core.concepts.graph.attributions import coefficient_attributions
from xai_core.concepts.graph.decomposition import NO_CONCEPT
from xai_core.concepts.graph.questions import Question
from xai_core.errors import UsageError
from xai_core.precision import full_precision


@dataclass(frozen=True)
class ShapleyOptions:
    """``samples``: coalitions of an image, none and all included; with 2^Q of them values are exact.

    An image with so many players that the fit needs more than these (2 Q + 2) is given what it needs.

    256 passes are about what integrated gradients cost with 10 steps and 20 targets. ``seed`` of the draw.
    """

    samples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 2 or self.seed < 0:
            raise UsageError(
                "kernel_shap: expected samples of at least 2 and a seed of at least 0, got "
                f"{self.samples} and {self.seed}"
            )


@coefficient_attributions.register(
    "kernel_shap", options=ShapleyOptions, paper="iERF, equation 14; Lundberg & Lee 2017, theorem 2"
)
def kernel_shap(question: Question, queries: Tensor | None, options: ShapleyOptions, batch_size: int) -> Tensor:
    """ICAT by Kernel SHAP: the queries that an image has are its players, all other concepts stay as they are.

    The values add up to S with all players less S without any. Every coalition's pass serves all targets, and
    images with equally many players share their coalitions and one least-squares map.
    """
    source = question.source
    if queries is None:
        queries = torch.arange(source.codes.shape[2], device=source.codes.device).expand(len(source.codes), -1)
    players = (queries != NO_CONCEPT) & source.active.gather(1, queries.clamp(min=0))
    counts = players.sum(dim=1)
    # Players first, in the order of the queries: an image's coalitions do not depend on who else was asked about.
    order = players.int().argsort(dim=1, descending=True, stable=True)
    values = source.codes.new_zeros(*queries.shape, question.count)
    with torch.no_grad():
        for count in counts.unique().tolist():
            if count:
                owners = (counts == count).nonzero().flatten()
                seats = order[owners, :count]
                design = _design(count, options, queries.device)
                fitted = _played(question, owners, queries[owners].gather(1, seats), design, batch_size)
                values[owners.unsqueeze(1), seats] = fitted.to(values)
    return values


def _design(players: int, options: ShapleyOptions, device: torch.device) -> Design:
    samples = max(options.samples, fewest_samples(players))
    coalitions, weights = weighted_coalitions(players, samples - 2, options.seed)
    ends = torch.stack([torch.zeros(players), torch.ones(players)]).bool()
    operator = constrained_fit(coalitions, weights)
    return Design(torch.cat([ends, coalitions]).to(device), operator.to(device))


def _played(question: Question, owners: Tensor, concepts: Tensor, design: Design, batch_size: int) -> Tensor:
    """Values ``[b, k, T]`` float64 of the concepts ``[b, k]`` of some images that all have k players."""
    source, coalitions = question.source, design.coalitions
    spread = source.spread
    everyone = torch.full((len(spread), concepts.shape[1]), NO_CONCEPT, device=concepts.device)
    everyone[owners] = concepts
    codes, atoms = source.chosen(everyone)

    def outcome(rows: slice) -> Tensor:
        flat = torch.arange(rows.start, rows.stop, device=spread.device)
        image, absent = owners[flat // len(coalitions)], ~coalitions[flat % len(coalitions)]
        with full_precision(spread.device):
            removed = (codes[image] * absent.unsqueeze(1)) @ atoms[image]
        return question.scores(spread[image] - removed + source.offset, image).double()

    outcomes = torch.cat(run_batches(outcome, len(owners) * len(coalitions), batch_size))
    return torch.einsum("ks,bst->bkt", design.operator, outcomes.unflatten(0, (len(owners), -1)))
