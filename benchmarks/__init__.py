"""Benchmarks of the generic path: `python -m benchmarks`. One file a family of rows; speed and accuracy, never assertions."""
