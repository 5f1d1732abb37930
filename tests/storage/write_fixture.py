"""Writes the store that later versions must be able to read: ``python -m tests.storage.write_fixture OUTPUT.zip``.

Run it once for every format of the store, and never again: a fixture is what an earlier version wrote.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import zipfile
from pathlib import Path

from flows.study import conduct
from storage.store import open_store
from tasks.config import StudyConfig
from tasks.pipeline import STAGES
from tasks.study import Study
from tests.conftest import Quiet, SerialExecutor, write_folder

PICTURES = Path("/pictures")
CONFIG = {
    "name": "fixture",
    "dataset": {"kind": "folder", "path": str(PICTURES)},
    "parts": {"parser": "grid", "k": 4},
    "methods": ["grad_cam", "kl_hessian"],
    "metrics": [{"name": "insertion", "steps": 2}, "p_deletion"],
    "concepts": {"layers": ["blocks.2"], "extractors": ["bisecting_kmeans"], "atoms": 2},
    "run": {"shard_size": 3, "batch_size": 3, "max_bad_fraction": 1},
}


def main(output: Path, work: Path) -> None:
    if PICTURES.exists():
        raise SystemExit(f"expected no {PICTURES}, since its path becomes part of the fixture: remove it")
    write_folder(PICTURES, {"apple": 3, "pear": 2})
    (PICTURES / "pear" / "broken.png").write_bytes(b"not a picture")
    try:
        store = open_store(work / "store", create=True)
        # The page holds a charting library of megabytes.
        STAGES.pop("report")
        with contextlib.suppress(FileNotFoundError):
            conduct(Study(StudyConfig.model_validate(CONFIG), store), SerialExecutor(), Quiet(), tasks=False)
        pack(store.root, output)
    finally:
        shutil.rmtree(PICTURES)


def pack(root: Path, output: Path) -> None:
    """All files of a store but its locks, with a fixed time, so that the same store gives the same archive."""
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file() and "locks" not in path.parts:
                archive.writestr(zipfile.ZipInfo(path.relative_to(root).as_posix()), path.read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
