"""Entry points of Prefect deployments; ``prefect.yaml`` names them."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.study import nightly


@flow(name="vitrine-nightly", log_prints=True)
def nightly_study(
    config: str | None = None,
    store: str = "vitrine-store",
    overrides: list[str] | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Runs or resumes a study; with nothing new it ends at once."""
    return nightly(config, store, overrides, limit)
