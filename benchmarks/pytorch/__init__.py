"""Benchmarks of the layer as a part of torch: `python -m benchmarks --suite torch`. One file a
family of rows."""
