"""Reports for people: tables on a terminal, pages and plots."""
