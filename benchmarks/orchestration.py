"""What orchestration costs: a run's wall time less the time in shard functions, as a share of the wall.

With one worker the shard functions run one after the other, so that the difference is all that is not
computing: start-up of Prefect, Dask and Python, planning, sending, committing, and waiting.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import row

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.parquet"
CONFIG = """
name: orchestration
dataset: {{kind: parquet, path: {path}, limit: 1000}}
model: vitrine_demo_vit
methods: [grad_cam, integrated_gradients, kl_hessian]
metrics: []
run: {{shard_size: 128}}
compute: {{workers: 1}}
"""


def run(device: str) -> None:
    """Runs 1000 CIFAR images with the demo ViT and three methods."""
    if not CIFAR.exists():
        row("skipped", why=f"no CIFAR-10 at {CIFAR}")
        return
    from storage.sql import query
    from storage.store import open_store

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "orchestration.yaml"
        config.write_text(CONFIG.format(path=CIFAR))
        store = Path(folder) / "store"
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "flows.cli", "run", str(config), "--store", str(store)],
            capture_output=True,
            check=True,
        )
        wall = time.perf_counter() - started
        computing = query(open_store(store), "select sum(seconds) as s from timings").to_pylist()[0]["s"]
    row("1000 CIFAR images", wall=wall, computing=computing, share=(wall - computing) / wall)
