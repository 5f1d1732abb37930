"""A query in a process of its own, which can be killed: what DuckDB neither interrupts nor counts ends there.

The request is JSON on standard input. The answer on standard output is one line of JSON, ``{"error": null}`` or
the error's kind and message, and after a good one the rows as an Arrow IPC stream.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from storage.errors import NoStoreError, QueryError, StoreError
from storage.limits import Limits

if TYPE_CHECKING:
    from storage.store import Store

# Interpreter, imports and the sending of the rows lie outside the query's own time.
GRACE_SECONDS = 10.0
# Buffers of the scan and of what has been fetched, over what the query itself may hold.
SPARE_BYTES = 512 * 1024 * 1024
ERRORS: dict[str, type[Exception]] = {one.__name__: one for one in (QueryError, NoStoreError, StoreError)}


@dataclass(frozen=True)
class Request:
    """What the child is asked; ``grace`` in seconds."""

    store: str
    text: str
    run_ids: list[str] | None
    limits: dict[str, Any]
    grace: float


def query_apart(
    store: Store,
    text: str,
    *,
    timeout: float = 60.0,
    run_ids: Iterable[str] | None = None,
    memory_limit: str = "1GB",
    threads: int = 2,
    grace: float = GRACE_SECONDS,
) -> pa.Table:
    """:func:`storage.sql.query` in a process of its own, which is killed ``grace`` seconds after ``timeout``.

    Raises:
        QueryError: as in :func:`storage.sql.query`, or the process had to be killed or ended by itself.
        StoreError: the store cannot be opened.
    """
    limits = Limits(timeout, memory_limit, threads)
    chosen = None if run_ids is None else list(run_ids)
    request = Request(str(store.root.resolve()), text, chosen, asdict(limits), grace)
    # -P: a file of the working folder must not stand in for a module.
    command = [sys.executable, "-P", "-m", "storage.sql_process"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        try:
            answer, said = child.communicate(json.dumps(asdict(request)).encode(), timeout + grace)
        except subprocess.TimeoutExpired:
            raise QueryError(
                f"the query ran past {timeout:g} s, could not be interrupted and was killed; "
                "narrow it or raise --timeout"
            ) from None
        finally:
            child.kill()
    return _rows_of(answer, child.returncode, said)


def _rows_of(answer: bytes, code: int, said: bytes) -> pa.Table:
    end = answer.find(b"\n") + 1
    error = json.loads(answer[:end])["error"] if end else None
    if error is not None:
        raise ERRORS[error["kind"]](error["message"])
    if not end or code != 0:
        raise QueryError(
            f"the query's process {_ending(code)}{_last_line(said)}; narrow the query, or raise --memory or "
            "--timeout"
        )
    return pa.ipc.open_stream(pa.py_buffer(answer).slice(end)).read_all()


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return f" ({lines[-1]})" if lines else ""


def answer(request: Request, stream: BinaryIO) -> None:
    """Runs a query under the limits of this process and writes rows or error."""
    from storage.sql import query
    from storage.store import open_store

    try:
        table = query(open_store(request.store), request.text, run_ids=request.run_ids, **request.limits)
    except tuple(ERRORS.values()) as error:
        kind = next(name for name, one in ERRORS.items() if isinstance(error, one))
        stream.write(json.dumps({"error": {"kind": kind, "message": str(error)}}).encode() + b"\n")
        return
    stream.write(b'{"error": null}\n')
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)


def limit_this_process(request: Request) -> None:
    """The second line of defence: no file grows, no core is dumped, processor time and memory end.

    Memory is limited over what is mapped now; processor time counts DuckDB's threads and the scan's.
    """
    asked = Limits(**request.limits)
    pa.set_cpu_count(asked.threads)
    limits = {
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: math.ceil((asked.timeout + request.grace) * 2 * asked.threads),
        # The work of the query and its result, each up to the limit.
        resource.RLIMIT_DATA: _mapped_bytes() + 2 * asked.memory_bytes + SPARE_BYTES,
    }
    for kind, most in limits.items():
        allowed = resource.getrlimit(kind)[1]
        least = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(kind, (least, least))


def _mapped_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)


def main() -> None:
    """The child: one request in, one answer out."""
    import storage.sql  # noqa: F401  (loaded before memory is measured)

    # What a library may print must not be taken for a part of the answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # No module is cached from here on: no file can be written.
    sys.dont_write_bytecode = True
    request = Request(**json.load(sys.stdin))
    limit_this_process(request)
    with answers:
        answer(request, answers)


if __name__ == "__main__":
    main()
