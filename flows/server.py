"""One Prefect API per run: the one that ``PREFECT_API_URL`` names, or a local server of our own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import StoreError

START_SECONDS = 120.0
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # The run tells its own errors; Prefect would print each once more for every layer.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
}


class LocalServer:
    """A Prefect server on loopback that ends with this process, even if this process is killed."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}/api"
        home.mkdir(parents=True, exist_ok=True)
        self._log = home / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.server", str(self._port)],
                env={**os.environ, **QUIET, **_settings(home)},
                # The server ends when this pipe closes, which the kernel does for a killed parent too.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Returns once the health route answers.

        Raises:
            StoreError: the server ended or did not answer in time; names its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if _healthy(self.url):
                return
            time.sleep(0.1)
        raise StoreError(f"the local Prefect server did not start on {self.url}; see {self._log}")

    def stop(self) -> None:
        """Ends the server."""
        self._process.terminate()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def prefect_api(home: Path) -> Iterator[LocalServer | None]:
    """Points this process to a Prefect API for the block; starts a local server if none is named.

    The server starts in the background: call ``wait`` on it before the first flow.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    if os.environ.get("PREFECT_API_URL"):
        yield None
        return
    before = {name: os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_HOME")}
    server = LocalServer(home)
    os.environ["PREFECT_API_URL"] = server.url
    os.environ["PREFECT_HOME"] = str(home)
    try:
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _settings(home: Path) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _serve(port: int) -> None:
    """The server process: serves on loopback until its standard input closes."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            "prefect.server.api.server:create_app",
            factory=True,
            host="127.0.0.1",
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=2,
        )
    )

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=end_with_parent, daemon=True).start()
    server.run()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
