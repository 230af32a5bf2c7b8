"""From a committed snapshot to its bytes: opening it, and reading what overlaps a box."""
