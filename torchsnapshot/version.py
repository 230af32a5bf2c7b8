"""The library's version, in one place that everything may import."""

__version__ = "1.0.0a1"
