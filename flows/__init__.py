"""Orchestration: config files, the command line, Prefect flows, the Dask cluster and progress. Thin."""
