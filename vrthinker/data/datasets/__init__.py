"""Public preference sets in their published layouts, with one file per family of layouts."""
