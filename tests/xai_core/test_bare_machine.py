"""xai_core and its benchmarks on a machine with nothing but torch, timm, numpy and scikit-learn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# The finder stands before all others: an import of anything blocked fails as if it were not installed.
SCRIPT = """
import sys

BLOCKED = {"prefect", "dask", "distributed", "zarr", "duckdb", "pyarrow", "pydantic", "typer", "rich",
           "captum", "skimage", "plotly", "jinja2", "flows", "tasks", "storage"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import benchmarks.precision
from benchmarks.kl_hessian import compare
import xai_core.attribution, xai_core.concepts, xai_core.metrics, xai_core.parts, xai_core.synthetic
compare("resnet10t", "cpu", images=1, batch_size=8, precision="bf16", repeats=1)
"""


def test_the_science_runs_without_the_machinery() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "over bare passes" in done.stdout
