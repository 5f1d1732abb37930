"""Attribution of concept coefficients by changed derivatives: DeepLIFT and layer-wise relevance propagation.

The rules hold inside the network; the cosine of the alignment score on top has its plain derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import cast

from torch import Tensor

from xai_core.attribution.gradients.deep_lift import affine_and_elementwise, multiplier_logits, reference_record
from xai_core.attribution.propagation.attn_lrp import attention_with_rules, attn_lrp_rules
from xai_core.attribution.propagation.lrp import layers_with_rules, lrp_rules
from xai_core.attribution.propagation.structure import zennit_installed
from xai_core.concepts.graph.attributions import at_the_codes, coefficient_attributions
from xai_core.concepts.graph.questions import Question
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import NoOptions


@coefficient_attributions.register(
    "deep_lift", paper="iERF, equation 14; Shrikumar et al. 2017, section 3.5.2 (Rescale rule)"
)
def deep_lift(question: Question, queries: Tensor | None, options: NoOptions, batch_size: int) -> Tensor:
    """ICAT by DeepLIFT's Rescale rule, against the layer without any concept (coefficients 0).

    Raises:
        UsageError: a network with other than affine layers, element-wise activations and max pooling.
    """
    _refuse("deep_lift", question.model, affine_and_elementwise(question.model, None))
    return at_the_codes(question, queries, batch_size, _multiplied_scores)


@coefficient_attributions.register("lrp", paper="iERF, equation 14; Bach et al. 2015; Achtibat et al. 2024")
def lrp(question: Question, queries: Tensor | None, options: NoOptions, batch_size: int) -> Tensor:
    """ICAT by relevance propagation: epsilon-plus on convolutional networks, AttnLRP where there is attention.

    The decomposition is one more linear layer, from coefficients to vectors, which shares relevance by LRP-0.

    Raises:
        UsageError: a network with layers that have no rule.
    """
    rules = _rules(question.model)

    def scores(question: Question, vectors: Tensor, owners: Tensor) -> Tensor:
        with rules():
            return question.scores(vectors, owners)

    return at_the_codes(question, queries, batch_size, scores)


def _multiplied_scores(question: Question, vectors: Tensor, owners: Tensor) -> Tensor:
    """Scores whose derivatives are DeepLIFT's multipliers; the reference sees the same rest of the image."""
    # Both only call what they are given as a model.
    network = cast(Classifier, partial(_called, question, owners))
    record = reference_record(network, question.source.offset.expand_as(vectors))
    return multiplier_logits(network, vectors, record)


def _called(question: Question, owners: Tensor, vectors: Tensor) -> Tensor:
    return question.scores(vectors, owners)


def _rules(model: Classifier) -> Callable[[], AbstractContextManager[None]]:
    _refuse("lrp", model, zennit_installed(model, None))
    outside = layers_with_rules(model, None)
    if outside is None:
        return partial(lrp_rules, model.module, "epsilon_plus")
    _refuse("lrp", model, attention_with_rules(model, None) and outside)
    return partial(attn_lrp_rules, model.module)


def _refuse(name: str, model: Classifier, reason: str | None) -> None:
    if reason is not None:
        raise UsageError(f"{name}: expected a network that it is defined on, got {model.spec.name}: {reason}")
