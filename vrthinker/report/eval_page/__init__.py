"""The page of an evaluation: one self-contained HTML file with its tables, intervals, controls and errors."""
