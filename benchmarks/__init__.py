"""Benchmarks: `python -m benchmarks`. Here the generic path, in structures/ kernels, in programs/
the rest. One file a family of rows; nothing is asserted."""
