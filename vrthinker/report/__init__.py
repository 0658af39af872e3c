"""What people look at: tables on a terminal (pages and plots come here too)."""
