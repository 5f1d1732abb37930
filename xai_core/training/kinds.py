"""The kinds of training there are: each an entry that builds its objective from a model and options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from xai_core.models import Classifier
from xai_core.registry import Entry, Registry

#: What a training is for: the commands of ``vitrine train``.
Group = Literal["classifier", "explainer", "importance"]


@dataclass(frozen=True)
class KindEntry(Entry):
    """A kind of training; its function takes the model and the options and gives the objective.

    It is called with torch's global generator seeded by the recipe, and the model where the training is to be. An
    option that is a file is called ``checkpoint``.
    """

    group: Group = "classifier"
    # What builds the trained network again, as JSON without paths, for the header of its file.
    config: Callable[[Classifier, Any], Mapping[str, Any]] = field(
        default=lambda model, options: dataclasses.asdict(options)
    )
    # Whether the result belongs to the model with just these weights.
    explains_model: bool = False
    # Whether it is the model itself that is trained: it then gets one of its own, random weights by the seed.
    own_model: bool = False
    # The attribution method that reads the file; None where none does.
    method: str | None = None
    reads_labels: Callable[[Any], bool] = field(default=lambda options: True)


kinds: Registry[KindEntry] = Registry("kind of training", KindEntry)


def kinds_of_method(method: str) -> tuple[str, ...]:
    """The kinds whose files an attribution method reads; none for a method that reads no such file."""
    return tuple(entry.name for entry in kinds if entry.method == method)
