"""Taking a snapshot of many ranks: who writes what, who reports what, one manifest."""
