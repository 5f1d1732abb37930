"""The stages of a study: one file each, knowing neither Dask nor the command line."""
