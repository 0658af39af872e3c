"""Files that outlive a process: results, metrics, run folders, locks, and the provenance of numbers."""
