"""What an explainer depends on of its model beside the weights: how the network is built, and what it is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from xai_core.create_args import that_build
from xai_core.errors import UsageError
from xai_core.models import Classifier

#: Each fact, and what of a config sets it.
_SET_BY = {
    "architecture": "model.name",
    "create_args": "model.create_args",
    "input_size": "model.transform.input_size, or img_size in model.create_args,",
    "mean": "model.transform.mean",
    "std": "model.transform.std",
}


def explained_model(model: Classifier) -> dict[str, Any]:
    """Architecture, its arguments, input size, mean and std, as plain JSON without paths."""
    known: Mapping[str, Any] = getattr(model.module, "pretrained_cfg", None) or {}
    facts = {
        "architecture": known.get("architecture") or model.spec.name,
        "create_args": that_build(model.spec.create_args),
        **{name: model.data_config[name] for name in ("input_size", "mean", "std")},
    }
    return dict(json.loads(json.dumps(facts, default=str)))


def refuse_another(expected: Mapping[str, Any], model: Classifier, path: str) -> None:
    """Refuses a model that is not the one that :func:`explained_model` said this of.

    Raises:
        UsageError: the first fact that differs: expected and got, and what sets it.
    """
    got = explained_model(model)
    for name, set_by in _SET_BY.items():
        if expected[name] != got[name]:
            raise UsageError(
                f"checkpoint: expected a model with {name} {expected[name]}, as the explainer in {path} was "
                f"trained for, got {got[name]}; set {set_by} to that, or train an explainer of this model"
            )
