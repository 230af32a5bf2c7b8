"""Restoring a snapshot, whole or in part: selection, targets, structure, another number of ranks."""
