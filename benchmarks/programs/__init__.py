"""Benchmarks of general programs, on the batched solvers: `python -m benchmarks --suite programs`.
One file a family of rows."""

PACKAGES = ("moreau", "moreau-cpu", "qpth", "proxsuite", "osqp")
