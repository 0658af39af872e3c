"""The evidence page: one self-contained HTML file for one episode."""
