"""Derivatives in torch: points and their local functions, operators for compiled graphs,
threads."""
