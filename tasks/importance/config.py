"""The config section ``importance``: which trained networks are evaluated, and at which thresholds."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import Field, field_validator

from tasks.choices import Frozen
from xai_core.inherent.evaluation import THRESHOLDS

Threshold = Annotated[float, Field(ge=0, le=1)]


class EvaluationConfig(Frozen):
    """``networks`` are files of trained IAs, EAs and PAs; ``thresholds`` by default those of Tables 4 and 5."""

    networks: tuple[str, ...] = Field(min_length=1)
    thresholds: tuple[Threshold, ...] = Field(default=THRESHOLDS, min_length=1)

    @field_validator("thresholds")
    @classmethod
    def _distinct(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        """In rising order, so that the same thresholds are the same evaluation."""
        twice = [value for value, count in Counter(given).items() if count > 1]
        if twice:
            raise ValueError(f"expected each threshold once, got {twice[0]:g} more than once")
        return tuple(sorted(given))
