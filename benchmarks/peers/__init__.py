"""Other libraries that do this job, each in a process of its own with a state of its own.

``client`` is the benchmark's side; ``launch``, ``serve`` and one module per library run in the peer's environment and
need nothing there but torch and that library.
"""
