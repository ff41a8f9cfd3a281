"""Benchmarks of the structures' kernels: `python -m benchmarks --suite structures`. One file a
family of rows."""

PACKAGES = ("moreau", "moreau-cpu", "POT", "entmax")
