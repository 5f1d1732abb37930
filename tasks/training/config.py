"""The config section ``training``: what is trained, how, and on what it is judged."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from tasks.choices import Choice, Frozen, choose
from tasks.dataset_config import DatasetConfig
from xai_core.training.kinds import KindEntry, kinds
from xai_core.training.recipe import Recipe

KindChoice = Annotated[Choice, BeforeValidator(choose(kinds))]


class TrainingConfig(Frozen):
    """A kind with its options, the recipe, and the pictures that are kept from it.

    ``held_out``: the share of the pictures that the training does not see; after every epoch they are measured,
    and the weights of the best one are taken; ``held_out_seed`` draws them: trainings of several recipe.seed learn
    from the same pictures, and so do an EA or a PA and its IA. ``test``: others, measured once at the end.
    """

    kind: KindChoice
    recipe: Recipe = Field(default_factory=Recipe)
    held_out: float = Field(default=0.1, ge=0, lt=1)
    held_out_seed: int = 0
    test: DatasetConfig | None = None

    @property
    def entry(self) -> KindEntry:
        """What the registry knows of the kind."""
        return kinds.get(self.kind.name)

    @property
    def options(self) -> Any:
        """The options object of the kind."""
        return self.entry.options(**self.kind.options)

    @model_validator(mode="after")
    def _without_masks(self) -> TrainingConfig:
        if self.test is not None and self.test.masks is not None:
            raise ValueError("test.masks: training reads no masks: remove them")
        return self
