"""Average and maximum sensitivity of a map to small changes of its image."""
