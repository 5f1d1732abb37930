"""Concept graphs and latents that cannot be made of a model are refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.preflight import check_study
from storage.store import open_store
from tasks.config import StudyConfig
from tasks.study import Study
from tests.conftest import TINY, config_with
from xai_core.errors import UsageError

Check = Callable[..., None]
TWO = ["blocks.0", "blocks.2"]
CNN = {"model": "vitrine_demo_resnet"}


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Checks the tiny study with other concepts."""

    def check(concepts: dict[str, Any], **changes: Any) -> None:
        config = StudyConfig.model_validate(config_with(TINY, concepts=concepts, **changes))
        check_study(Study(config, open_store(tmp_path / "store", create=True)))

    return check


def test_graphs_and_latents_that_can_be_made_pass(check: Check) -> None:
    check(
        {
            "layers": TWO,
            "extractors": ["sae"],
            "graph": {"edges": "lrp", "compare": ["integrated_gradients", {"name": "kernel_shap", "samples": 16}]},
            "cafe": {"attributors": ["attn_lrp"], "pooling": "class_token"},
        }
    )


@pytest.mark.parametrize(
    ("concepts", "changes", "told"),
    [
        ({"layers": TWO[::-1], "graph": {}}, {}, r"concepts\.graph: .*blocks\.2"),
        ({"layers": TWO, "graph": {"edges": "deep_lift"}}, {}, r"concepts\.graph: "),
        ({"layers": TWO, "graph": {"compare": ["deep_lift"]}}, {}, r"concepts\.graph: "),
        ({"layers": TWO[:1], "graph": {"compare": ["lrp"]}}, {}, r"concepts\.graph: compare: .* name two"),
        ({"cafe": {}}, {}, r"concepts\.cafe: expected an extractor with latents \(sae, .*got bisecting_kmeans"),
        (
            {"extractors": ["sae"], "cafe": {"attributors": ["srd"]}},
            {},
            r"concepts\.cafe: attributor 'srd' does not fit vitrine_demo_vit",
        ),
        (
            {
                "layers": ["layer3"],
                "extractors": ["sae"],
                "cafe": {"attributors": ["srd"], "pooling": "class_token"},
            },
            CNN,
            r"concepts\.cafe: pooling: expected a layer with a class token, got layer3",
        ),
        (
            {"receptive_fields": {"attributor": "srd"}},
            {},
            r"concepts\.receptive_fields\.attributor: attributor 'srd' does not fit",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(
    check: Check, concepts: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        check(concepts, **changes)


@pytest.mark.parametrize(
    ("concepts", "told"),
    [
        ({"layers": [], "graph": {}}, "name concepts.layers"),
        ({"graph": {"extractors": ["sae"]}}, "graph.extractors: expected ids of concepts.extractors"),
        ({"graph": {"nodes": "kernel_shap"}}, "needs more coalitions than concepts"),
        ({"graph": {"edges": "lime"}}, "unknown attribution of coefficients 'lime'"),
        (
            {"graph": {"compare": ["lrp", {"name": "integrated_gradients", "steps": 4}, "integrated_gradients"]}},
            "(?s)compare.*expected each once, got integrated_gradients",
        ),
        ({"cafe": {"attributors": ["gradient", "gradient"]}}, "(?s)attributors.*expected each once, got gradient"),
    ],
)
def test_configs_that_mean_nothing_are_refused(concepts: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        StudyConfig.model_validate(config_with(TINY, concepts=concepts))
