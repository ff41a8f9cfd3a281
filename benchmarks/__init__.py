"""Benchmarks: `python -m benchmarks`. Here the generic path, in structures/ the kernels. One file a family of rows; nothing is asserted."""
