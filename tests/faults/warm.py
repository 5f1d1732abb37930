"""A process that has imported all there is and forks children that run a study's chain, to be killed by the dozen.

Run with ``python -m tests.faults.warm``; requests and answers are JSON lines. A child runs the stages one after
the other in itself, without Prefect and Dask, as a worker would run them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

PRELOAD = Path(__file__).parent / "preload" / "sitecustomize.py"


def main() -> None:
    answer(load())
    for line in sys.stdin:
        request = json.loads(line)
        answer(HANDLERS[request.pop("do")](**request))


def answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def load() -> dict[str, Any]:
    """Imports what a study needs, sooner or later.

    It says which threads there are then, since a fork takes only one of them along.
    """
    for name in NEEDED:
        importlib.import_module(name)
    return {"threads": [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]}


def start(config: dict[str, Any], store: str, log: str, settings: dict[str, str]) -> dict[str, Any]:
    """Forks a child that runs a study on a store; its output goes to a log."""
    child = os.fork()
    if child:
        return {"pid": child}
    status = 1
    try:
        _redirect(log)
        _watch(settings)
        run(config, Path(store))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int) -> dict[str, Any]:
    """How a child ended: its exit code, or minus the number of the signal that ended it."""
    return {"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def run(config: dict[str, Any], root: Path) -> None:
    """What ``vitrine run`` does, but for the API and the cluster."""
    from flows.study import conduct
    from storage.files import remove_leftovers
    from storage.store import open_store
    from tasks.config import StudyConfig
    from tasks.study import Study
    from tests.conftest import Quiet, SerialExecutor

    store = open_store(root, create=True)
    study = Study(StudyConfig.model_validate(config), store)
    with store.running(study.run_id):
        remove_leftovers(store.root)
        conduct(study, SerialExecutor(), Quiet(), tasks=False)


def _redirect(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _watch(settings: dict[str, str]) -> None:
    specification = importlib.util.spec_from_file_location("faults_preload", PRELOAD)
    assert specification is not None and specification.loader is not None
    preload = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(preload)
    preload.install(settings)


NEEDED = (
    "captum.attr",
    "plotly.graph_objects",
    "sklearn.cluster",
    "timm",
    "flows.catalogue",
    "flows.study",
    "storage.sql",
    "tests.conftest",
)
HANDLERS = {"start": start, "wait": wait}


if __name__ == "__main__":
    main()
