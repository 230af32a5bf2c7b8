"""The benchmark: ``make bench``, or ``python -m benchmarks``. What each line of its table means: docs/benchmarks.md.

Each part is a module with a ``measure`` of its own, run in a process of its own; ``python -m benchmarks.take --quick``
runs one. ``codec.py`` and ``main_job.py`` stand alone.
"""
