"""The whole chain on real photographs with real weights, on a transformer and on a convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {},
    "mobilenetv2_100": {
        "create_args": {"pad_type": "same"},
        "transform": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "crop_pct": 0.875,
        },
    },
}
LAYERS = {"deit_tiny_patch16_224": "blocks.8", "mobilenetv2_100": "blocks.4"}


@pytest.mark.shared
@pytest.mark.parametrize("name", MODELS)
def test_photographs_are_recognised_and_explained(
    name: str, shared_data: Path, run_chain: Callable[..., Any], tmp_path: Path
) -> None:
    sample = shared_data / "imagenet-sample"
    ran = run_chain(
        {
            "name": "real",
            "dataset": {
                "kind": "folder",
                "path": str(sample / "images"),
                "classes": str(sample / "classes.csv"),
                "limit": 8,
            },
            "model": {
                "name": name,
                "checkpoint": str(shared_data / "models" / f"{name}.safetensors"),
                **MODELS[name],
            },
            "parts": {"parser": "tokens", "k": 3},
            "methods": ["grad_cam", {"name": "integrated_gradients", "steps": 2}, "kl_hessian"],
            "metrics": [{"name": "deletion", "steps": 4}, "p_insertion"],
            "concepts": {"layers": [LAYERS[name]], "extractors": ["bisecting_kmeans"]},
            "run": {"shard_size": 4, "batch_size": 4},
        },
        tmp_path / "store",
    )
    # Chance would be one in a thousand.
    (images,) = ran.sql("select count(*) as n, sum(correct::int) as right_ from images")
    assert images["n"] == 8
    assert images["right_"] >= 5
    (metrics,) = ran.sql("select count(*) as n, count(value) as defined from metrics")
    assert metrics["n"] == 8 * 3 * 2
    assert metrics["defined"] >= metrics["n"] - 4
    (parts,) = ran.sql("select min(score) as low, count(*) as n from part_scores where method = 'kl_hessian'")
    assert parts["n"] >= 2 * 8
    assert parts["low"] >= 0
    (concepts,) = ran.sql("select count(*) as n from concepts")
    # A quarter of the vectors: one an image, and a class token where there is one.
    assert concepts["n"] == (4 if "deit" in name else 2)
