"""The cone program: its values, residual map, linear systems, adjoint."""
