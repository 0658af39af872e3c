"""Rankings of several clips of one caption from judgments of pairs."""
