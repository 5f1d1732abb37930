"""Real processes to be killed, and what can be said of a store afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.canonical import digest_json
from storage.commits import Unit
from storage.digest import results_digest
from storage.store import Store, open_store
from storage.verify import verify_store
from tests.conftest import REPOSITORY
from tests.flows.command import VITRINE

FULL = bool(os.environ.get("VITRINE_FAULTS"))
PRELOAD = Path(__file__).parent / "preload"
BEGUN = r"^lock .*/locks/units/"
SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# So many that two workers have one thread each: sums are then added up in the same order everywhere.
CORES = 2


@dataclass(frozen=True)
class Faults:
    """What the watched processes of one test are told, and what they left behind.

    ``deaths`` and ``hold``: see ``Death`` and ``Hold`` of the preloaded module, without the files that they name.
    """

    folder: Path
    deaths: tuple[Mapping[str, Any], ...] = ()
    hold: Mapping[str, Any] | None = None

    @property
    def journal(self) -> Path:
        """The moments that were logged."""
        return self.folder / "journal.txt"

    def settings(self) -> dict[str, str]:
        """The environment variables that switch the watching on."""
        deaths = [{**death, "marker": str(self._marker(number))} for number, death in enumerate(self.deaths)]
        return {
            "VITRINE_TEST_LOG": str(self.journal),
            "VITRINE_TEST_LOGGED": BEGUN,
            "VITRINE_TEST_DEATHS": json.dumps(deaths),
            "VITRINE_TEST_HOLDS": json.dumps([{**self.hold, **self._hold_files()}] if self.hold else []),
        }

    def environment(self, api: str | None = None) -> dict[str, str]:
        """An environment in which a command and all its workers are watched; without an API it starts its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        path = os.pathsep.join(filter(None, [str(PRELOAD), kept.get("PYTHONPATH")]))
        named = {"PREFECT_API_URL": api} if api else {}
        return {**kept, **SINGLE, **self.settings(), **named, "PYTHONPATH": path}

    def begun(self) -> Counter[str]:
        """How often each unit was begun, by the name of its lock."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return Counter(Path(line.split(" ", 2)[2]).stem for line in lines)

    def fired(self, number: int = 0) -> list[str]:
        """What a named death said, once for each time it came: "pid moment path"."""
        marker = self._marker(number)
        return [path.read_text().strip() for path in sorted(self.folder.glob(f"{marker.name}*"))]

    @property
    def held(self) -> bool:
        """Whether some process is, or was, held."""
        return Path(self._hold_files()["marker"]).exists()

    def release(self) -> None:
        """Lets go what is held."""
        Path(self._hold_files()["until"]).touch()

    def _hold_files(self) -> dict[str, str]:
        return {"marker": str(self.folder / "held"), "until": str(self.folder / "released")}

    def _marker(self, number: int) -> Path:
        return self.folder / f"fired-{number}-"


@dataclass(frozen=True)
class Clean:
    """What a run of a study gives that nothing disturbed."""

    store: Store
    digest: str
    seconds: float


class Warm:
    """The client of a process that forks runs of a chain; see ``tests.faults.warm``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clean: dict[str, Clean] = {}
        self.log = folder / "children.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"],
            cwd=REPOSITORY,
            env={**os.environ, **SINGLE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.threads: list[str] = self._answer()["threads"]

    def clean(self, config: dict[str, Any]) -> Clean:
        """A study's undisturbed run, done once."""
        name = digest_json(config)[:8]
        if name not in self._clean:
            root = self._folder / name
            started = time.monotonic()
            assert self.run(config, root, Faults(self._folder)) == 0, self.said()
            seconds = time.monotonic() - started
            self._clean[name] = Clean(open_store(root), digest(root), seconds)
        return self._clean[name]

    def start(self, config: dict[str, Any], store: Path, faults: Faults) -> int:
        """Starts a child that runs a study on a store; its process number."""
        settings = faults.settings()
        found = self._ask("start", config=config, store=str(store), log=str(self.log), settings=settings)
        return int(found["pid"])

    def wait(self, pid: int) -> int:
        """How a child ended: its exit code, or minus the signal's number."""
        return int(self._ask("wait", pid=pid)["status"])

    def run(self, config: dict[str, Any], store: Path, faults: Faults) -> int:
        """Runs a study to its end, or to its named death."""
        return self.wait(self.start(config, store, faults))

    def said(self) -> str:
        """The end of what the children printed."""
        return self.log.read_text()[-3000:] if self.log.exists() else ""

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, what: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"do": what, **request}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the warm process ended: {self._process.wait()}"
        found: dict[str, Any] = json.loads(line)
        return found


def start_vitrine(
    *arguments: object, cwd: Path, log: Path, environment: Mapping[str, str], program: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    """Starts the command, or another program in its place, at the head of a process group of its own."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*(program or (str(VITRINE),)), *map(str, arguments)],
            cwd=cwd,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # The workers are started seconds later, and take over where their parent may run.
    os.sched_setaffinity(process.pid, sorted(os.sched_getaffinity(0))[:CORES])
    return process


def digest(root: Path) -> str:
    """The digest of a store's one complete run, after every byte of it was found whole and vouched for."""
    store = open_store(root)
    (run,) = store.runs.all()
    assert run.state == "complete"
    found = verify_store(store)
    assert found.damage == ()
    assert found.uncommitted == ()
    return results_digest(store, run.run_id)


def temporary(root: Path) -> list[str]:
    """Files that were written and not put in place."""
    return sorted(path.name for path in root.rglob(".tmp-*"))


def committed(store: Store) -> dict[Unit, str]:
    """The units of the store's runs that are done, with their keys."""
    return {record.unit: record.key for _, record in store.records()}


def units(store: Store) -> dict[Unit, str]:
    """All units of the store's one run, with their keys."""
    (run,) = store.runs.all()
    return run.units()
