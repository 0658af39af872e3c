"""`evict`: tokens leave the middle of KV caches and of the sequences beside them. See `op` and `plan`."""
