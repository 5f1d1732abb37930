"""One digest over all results of a run: two stores that hold the same results have the same one."""

from __future__ import annotations

from storage.canonical import digest_json
from storage.errors import StoreError
from storage.store import Store


def results_digest(store: Store, run_id: str) -> str:
    """sha256 over every unit of a run with its key and the digests of its objects.

    Objects that tell times (timings, the report) are left out: no two runs agree in them.

    Raises:
        StoreError: no such run, or units of it that are not committed; the digest of half a run says nothing.
    """
    run = store.runs.read(run_id)
    if run is None:
        raise StoreError(f"expected a run of store {store.root}, got {run_id!r}: see `vitrine status`")
    entries = []
    for unit, key in sorted(run.units().items()):
        record = store.done(unit, key)
        if record is None:
            raise StoreError(
                f"{run_id}: expected every unit committed, {unit} is not: resume it with `vitrine run`"
            )
        objects = sorted((one.path, one.sha256) for one in record.objects if one.repeatable)
        entries.append([str(unit), key, objects])
    return digest_json(entries)
