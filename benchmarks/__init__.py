"""Benchmarks of the generic path: `python -m benchmarks`. One file a family of rows; nothing is asserted."""
