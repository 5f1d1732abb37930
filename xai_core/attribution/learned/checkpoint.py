"""A trained explainer as a file, and from the file back to the model that it belongs to."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from xai_core.attribution.learned.decoder import Decoder, LearnedExplainer
from xai_core.attribution.learned.explained import explained_model, refuse_another
from xai_core.attribution.learned.objective import AhaObjective, ExplainerOptions
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.per_model import once_per_model
from xai_core.training.kinds import kinds
from xai_core.training.weights_file import digest_of, model_digest, read_trained

KIND = "aha"


def header_config(model: Classifier, options: ExplainerOptions) -> dict[str, Any]:
    """What the header of an explainer's file says: its options, and under ``model`` what it depends on of that."""
    return {**dataclasses.asdict(options), "model": explained_model(model)}


@kinds.register(
    KIND,
    group="explainer",
    options=ExplainerOptions,
    paper="AHA, Learn to Rank: Visual Attribution by Learning Importance Ranking, 2026",
    config=header_config,
    explains_model=True,
    method="aha",
    reads_labels=lambda options: options.target == "label",
)
def aha_objective(model: Classifier, options: ExplainerOptions) -> AhaObjective:
    """A decoder over the frozen model, whose maps' order makes deletion fall and insertion rise."""
    return AhaObjective(LearnedExplainer(model, options.decoder), options)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A decoder as a file holds it, and the options it was trained with."""

    decoder: Decoder
    options: ExplainerOptions

    def bound(self, model: Classifier) -> LearnedExplainer:
        """The explainer of its model."""
        return LearnedExplainer(model, self.options.decoder, self.decoder)


def trained_decoder(model: Classifier, path: str) -> Trained:
    """What a file holds for a model, read once for each model and content of the file.

    Raises:
        UsageError: no such file, none of this kind, or of a model with other weights, built otherwise or shown
            pictures of another size, mean or std; expected and got are named. Or a header that does not say what
            builds the decoder whose weights the file holds.
    """
    known = _read(model)
    # Weights that were changed in place are other weights: the file is then checked again.
    key = (digest_of(path), model.dtype, model_digest(model), json.dumps(explained_model(model)))
    if key not in known:
        known.clear()
        known[key] = _build(model, path)
    return known[key]


@once_per_model
def _read(_model: Classifier) -> dict[object, Trained]:
    """What was read for a model last, by file and weights: filled as it is. It holds the model no longer alive."""
    return {}


def _build(model: Classifier, path: str) -> Trained:
    tensors, about = read_trained(path, kinds=(KIND,), weights=model_digest(model))
    try:
        written = dict(about["config"])
        refuse_another(written.pop("model"), model, path)
        options = ExplainerOptions(**{**written, "layers": tuple(written["layers"])})
        # What is drawn here is overwritten: nobody else's chance is to change by it.
        with torch.random.fork_rng(devices=[]):
            decoder = LearnedExplainer(model, options.decoder).decoder
        decoder.load_state_dict(tensors)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"checkpoint: expected an explainer whose header names the options that build it, got in {path} what "
            f"does not fit ({type(error).__name__}: {error}); train it anew"
        ) from error
    return Trained(decoder.eval().requires_grad_(False), options)
