"""Layers as people declare them, of many fields and of the sizes of practice, beside the
incumbents: `python -m benchmarks --suite real`. One file a field, and `declarations`, which
measures them."""

PACKAGES = ("moreau", "moreau-cpu")
