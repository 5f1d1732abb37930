"""Errors of the store and the sources; each says what was expected, what was got and what to do."""


class StoreError(RuntimeError):
    """The store cannot do what was asked, and nothing was changed."""


class NoStoreError(StoreError):
    """The folder that was named as a store is not one, or cannot become one."""


class SourceError(ValueError):
    """A data source cannot be used as configured."""


class StoreLockedError(StoreError):
    """Another process writes this store."""


class QueryError(ValueError):
    """A SQL query failed, ran too long, or asked for something outside the store."""
