"""The content-addressed store: bytes under keys, and the protocol that keeps them. Imports no torch."""
