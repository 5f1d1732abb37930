"""One Prefect API per run, watched: the one that ``PREFECT_API_URL`` names, or a local server of our own."""

from __future__ import annotations

import http.client
import os
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.server import QUIET, ApiError, LocalServer

# Prefect's client waits 2, 4, 8, ... seconds between tries: these bridge 30 s, as long as a server's start.
RETRIES = {"PREFECT_CLIENT_MAX_RETRIES": "4"}
RESTARTS = 3
SILENCE_SECONDS = 30.0
LOOK_SECONDS = 1.0
# A gateway that answers in place of the API behind it.
AWAY = frozenset({502, 503, 504})


class Api:
    """A Prefect API that is watched from ``wait`` until ``stop``."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._lost: str | None = None
        self._retries: int | None = None
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="prefect-api-watch", daemon=True)

    def wait(self) -> None:
        """Returns once the API answers, and watches it from then on.

        Raises:
            ApiError: it does not.
        """
        self.require()
        self._watcher.start()

    def check(self) -> None:
        """Returns at once while the API is there, or may come back.

        Raises:
            ApiError: it is gone for good.
        """
        if self._lost is not None:
            raise ApiError(self._lost)

    def trouble(self, error: BaseException) -> ApiError | None:
        """What an error of a flow says about the API, or None where it is about something else."""
        import httpx

        if isinstance(error, ApiError):
            return error
        # A call whose further tries were cut off stumbles over an assertion of Prefect's client.
        signs = (httpx.HTTPError, AssertionError) if self._lost else (httpx.HTTPError,)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, signs):
            cause = cause.__cause__
        if cause is None:
            return None
        return ApiError(
            self._lost
            or f"the Prefect API at {self.url}: expected it to answer as long as the study runs, got "
            f"{type(cause).__name__} ({cause}); what was committed is kept"
        )

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()
        if self._watcher.ident is not None:
            self._watcher.join()
        if self._retries is not None:
            _client_settings().max_retries = self._retries

    def _give_up(self, reason: str) -> None:
        """Says that the API is gone, and keeps Prefect's client from trying each farewell for half a minute."""
        self._lost = reason
        self._retries = _client_settings().max_retries
        _client_settings().max_retries = 0

    def require(self) -> None:
        """Returns once the API answers.

        Raises:
            ApiError: it does not.
        """
        raise NotImplementedError

    def _watch(self) -> None:
        raise NotImplementedError


class OwnApi(Api):
    """A local server that ends with the run, and is started again where it ends before."""

    def __init__(self, home: Path) -> None:
        self._server = LocalServer(home)
        super().__init__(self._server.url)

    def stop(self) -> None:
        """Ends the watch, then the server."""
        super().stop()
        self._server.stop()

    def require(self) -> None:
        """Waits for the server's start."""
        self._server.wait()

    def _watch(self) -> None:
        restarts = 0
        while not self._stopped.wait(LOOK_SECONDS):
            ended = self._server.ended()
            if ended is None:
                continue
            if restarts == RESTARTS:
                self._give_up(
                    f"the local Prefect server: expected it to run as long as the study, got {ended} after "
                    f"{RESTARTS} restarts; what was committed is kept: see {self._server.log}, or name a server "
                    "of your own in PREFECT_API_URL"
                )
                return
            restarts += 1
            print(
                f"the local Prefect server came to {ended}; starting it again ({restarts} of {RESTARTS})",
                file=sys.stderr,
                flush=True,
            )
            # One that could not be started is seen as ended in the next round.
            with suppress(OSError):
                self._server.start()


class NamedApi(Api):
    """The API at an address; it may be silent for a while, as in a restart, but not for good."""

    _heard = False

    def require(self) -> None:
        """Asks once."""
        self._heard = _silence(self.url) is None
        # Prefect takes seconds to import, and is asked only where a plain request was not answered.
        if not self._heard:
            self._ask_prefect()

    def _ask_prefect(self) -> None:
        import httpx
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
        # Only silence counts: what answers in another way may still serve flows.
        if isinstance(problem, httpx.TransportError):
            raise ApiError(
                f"PREFECT_API_URL: expected a Prefect API at {self.url}, got {problem}; start it, or unset "
                "PREFECT_API_URL: the run then starts a server of its own"
            )

    def _watch(self) -> None:
        silent_since: float | None = None
        while not self._stopped.wait(LOOK_SECONDS):
            problem = _silence(self.url)
            if problem is None:
                self._heard, silent_since = True, None
            # An API that these plain requests never reached (a proxy, say) is left to Prefect's own client.
            elif self._heard:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since >= SILENCE_SECONDS:
                    self._give_up(self._gone(problem))
                    return

    def _gone(self, problem: str) -> str:
        return (
            f"PREFECT_API_URL: expected the Prefect API at {self.url} to answer as long as the study runs, got no "
            f"answer for {SILENCE_SECONDS:.0f} s ({problem}); what was committed is kept: start the API again, or "
            "unset PREFECT_API_URL"
        )


@contextmanager
def prefect_api(home: Path) -> Iterator[Api]:
    """Points this process to a Prefect API for the block; starts a local server if none is named.

    The server starts in the background: call ``wait`` before the first flow.

    Raises:
        ApiError: an API is named and does not answer.
    """
    os.environ.update({name: value for name, value in (QUIET | RETRIES).items() if name not in os.environ})
    named = os.environ.get("PREFECT_API_URL")
    if named:
        api: Api = NamedApi(named)
        api.require()
        try:
            yield api
        finally:
            api.stop()
        return
    before = {name: os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_HOME")}
    api = own = OwnApi(home)
    os.environ["PREFECT_API_URL"] = own.url
    os.environ["PREFECT_HOME"] = str(home)
    try:
        yield api
    finally:
        api.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _client_settings() -> Any:
    from prefect.settings import get_current_settings

    return get_current_settings().client


def _silence(url: str) -> str | None:
    """Why nothing answers at an API's address, or None where something does."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=10).close()
    except urllib.error.HTTPError as error:
        return str(error) if error.code in AWAY else None
    except urllib.error.URLError as error:
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except http.client.HTTPException:
        return None
    except (OSError, ValueError) as error:
        return str(error)
    return None
