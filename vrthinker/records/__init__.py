"""Files that outlive a process: results, metrics, run folders, locks, and where numbers came from."""
