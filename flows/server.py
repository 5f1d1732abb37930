"""A Prefect server on loopback, in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 120.0
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # The run tells its own errors; Prefect would print each once more for every layer.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
}


class ApiError(ConnectionError):
    """The Prefect API did not answer, or went away before the run ended."""


class LocalServer:
    """A Prefect server on loopback that ends with this process, even if this process is killed."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}/api"
        self.log = home / "server.log"
        home.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self.start()

    def start(self) -> None:
        """Starts the server's process; after an end, again on the same port with the same database."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.server", str(self._port)],
                env={**os.environ, **QUIET, **_settings(self._home)},
                # The server ends when this pipe closes, which the kernel does for a killed parent too.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Returns once the health route answers.

        Raises:
            ApiError: the server ended or did not answer in time; names its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.ended() is not None:
                break
            if _healthy(self.url):
                return
            time.sleep(0.1)
        raise ApiError(
            f"the local Prefect server: expected it to answer on {self.url} within {START_SECONDS:.0f} s, got "
            f"{self.ended() or 'no answer'}; see {self.log}, or name a server of your own in PREFECT_API_URL"
        )

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def ended(self) -> str | None:
        """How the process ended, in words, or None while it runs."""
        status = self._process.poll()
        return None if status is None else _in_words(status)

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


def _in_words(status: int) -> str:
    return f"an end by {signal.Signals(-status).name}" if status < 0 else f"an end with exit code {status}"


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
