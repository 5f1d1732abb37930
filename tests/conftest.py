"""Fixtures of the whole suite: real files, real processes, one real Prefect server for the session."""

from __future__ import annotations

import html
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storage.commits import Unit
from storage.store import Store, open_store

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are short of memory come first, while the heap holds nothing that was freed."""
    items.sort(key=lambda item: item.get_closest_marker("short_of_memory") is None)


SHORT_OF_MEMORY = ("storage/test_decode.py", "tasks/test_quarantine.py", "xai_core/test_batching.py")
WHOLE_RUNS = ("faults", "flows")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """What is dealt to a worker as one: a file; those that are short of memory; all that start whole runs.

    A file's fixtures are built once then, a heap that holds what others freed feeds no test that is short of
    memory, and there is one run with its server and workers at a time.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0].removeprefix("tests/")
            if file in SHORT_OF_MEMORY:
                return "short of memory"
            return "whole runs" if file.split("/", 1)[0] in WHOLE_RUNS else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real images and models beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real images and models in {SHARED}, which are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one Prefect server for the session; PREFECT_API_URL names it meanwhile."""
    from flows.server import QUIET, LocalServer

    home = tmp_path_factory.mktemp("prefect")
    server = LocalServer(home)
    added = {"PREFECT_API_URL": server.url, "PREFECT_HOME": str(home), **QUIET}
    before = {name: os.environ.get(name) for name in added}
    try:
        server.wait()
        os.environ.update(added)
        yield server.url
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        server.stop()


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """A picture of coarse coloured noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(root: Path, classes: dict[str, int]) -> Path:
    """An image folder with so many pictures of every class, PNG and JPEG in turn."""
    seed = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            suffix = (".png", ".jpg")[index % 2]
            picture(seed).save(root / name / f"{index:03d}{suffix}")
            seed += 1
    return root


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """Eleven small pictures of three classes."""
    return write_folder(tmp_path / "images", {"apple": 5, "pear": 3, "plum": 3})


TINY: dict[str, Any] = {
    "name": "tiny",
    "dataset": {"kind": "demo", "images": 12},
    "parts": {"parser": "grid", "k": 4},
    "methods": ["grad_cam", {"name": "integrated_gradients", "steps": 2}, "kl_hessian"],
    "metrics": [{"name": "insertion", "steps": 3}, "p_deletion"],
    "concepts": {"layers": ["blocks.2"], "extractors": ["bisecting_kmeans"], "atoms": 3},
    "run": {"shard_size": 4, "batch_size": 4},
    "compute": {"workers": 1},
}
#: A model that weighs its patches, and learns the demo's classes in a moment.
TINY_IA: dict[str, Any] = {
    "name": "vitrine_ia",
    "pretrained": False,
    "create_args": {
        "num_classes": 12,
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "importance_width": 8,
        "component_width": 8,
    },
}


def queries_of(page: str) -> list[str]:
    """The SQL that a report gives to be asked on."""
    section = html.unescape(page.split('<section id="query">')[1])
    return re.findall(r'vitrine sql "(.*?)"', section, re.DOTALL)


def config_with(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A config document with some sections replaced or, where both are mappings, merged."""
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = {**base[name], **value} if both else value
    return merged


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """The config of a study of twelve drawn pictures that takes seconds."""
    return config_with(TINY)


@dataclass
class SerialExecutor:
    """Runs works in this process, one after the other, and remembers what was really executed."""

    executed: list[Unit] = field(default_factory=list)

    def run(self, works: list[Any]) -> Iterator[Any]:
        from tasks.execute import execute

        for work in works:
            receipt = execute(work, "cpu")
            if getattr(receipt, "executed", False):
                self.executed.append(work.unit)
            yield receipt


class Quiet:
    """Progress that nobody watches."""

    def begin(self, stage: str, units: int, images: int) -> None: ...

    def advance(self, receipt: Any) -> None: ...

    def wait(self, reason: str) -> None: ...

    def end(self, stage: str, executed: int, reused: int) -> None: ...


@dataclass(frozen=True)
class Ran:
    """A finished chain: its store, its run's id and the units that were executed for it."""

    store: Store
    run_id: str
    executed: tuple[Unit, ...]
    quarantined: int

    @property
    def counts(self) -> dict[str, int]:
        """Executed units by stage."""
        return dict(Counter(unit.stage for unit in self.executed))

    def sql(self, text: str) -> list[dict[str, Any]]:
        """Rows of a query over this run alone."""
        from storage import sql

        return sql.query(self.store, text, run_ids=[self.run_id]).to_pylist()


@pytest.fixture(scope="session")
def run_chain() -> Callable[[dict[str, Any], Path], Ran]:
    """Runs a study's whole chain in this process, without Prefect and Dask."""
    from flows.study import conduct
    from tasks.config import StudyConfig
    from tasks.sources import open_source
    from tasks.study import Study

    def run(document: dict[str, Any], root: Path) -> Ran:
        open_source.cache_clear()
        executor = SerialExecutor()
        study = Study(StudyConfig.model_validate(document), open_store(root, create=True))
        result = conduct(study, executor, Quiet(), tasks=False)
        return Ran(study.store, result.run_id, tuple(executor.executed), result.quarantined)

    return run
