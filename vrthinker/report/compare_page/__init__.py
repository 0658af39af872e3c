"""The index page of a comparison of two generators: one self-contained HTML file."""
