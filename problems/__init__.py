"""The prebuilt problem library."""
