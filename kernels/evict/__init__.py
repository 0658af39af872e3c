"""`evict` removes tokens from KV caches and from the sequences beside them. See `op` and `plan`."""
