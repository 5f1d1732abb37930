"""Entry points of Prefect deployments; ``prefect.yaml`` names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from flows.config import load_config
from flows.study import run_study


@flow(name="vitrine-nightly", log_prints=True)
def nightly_study(
    config: str | None = None,
    store: str = "vitrine-store",
    overrides: list[str] | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Runs or resumes a study, with the same choices as on the command line; with nothing new it ends at once."""
    chosen = load_config(Path(config) if config else None, overrides or (), limit)
    result = run_study(chosen, Path(store))
    return {"run_id": result.run_id, "executed": result.executed, "quarantined": result.quarantined}
