"""Errors of stages, apart from what stages need: the command line knows them before it loads torch."""


class StageError(RuntimeError):
    """A stage ended with units that could not be done."""
