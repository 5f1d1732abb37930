"""Sources of images and the store of results. No torch, no Prefect, no Dask."""

from storage.commits import CommitRecord, Unit, key_of
from storage.errors import NoStoreError, QueryError, SourceError, StoreError, StoreLockedError
from storage.store import Store, open_store

__all__ = [
    "CommitRecord",
    "NoStoreError",
    "QueryError",
    "SourceError",
    "Store",
    "StoreError",
    "StoreLockedError",
    "Unit",
    "key_of",
    "open_store",
]
