"""What runs, why, and what it costs, in words."""

from __future__ import annotations

from convlayer.canon import Canonical
from convlayer.kkt import DENSE_SHARE, DENSE_SIZE


def explain_cone_program(canonical: Canonical, solver: str, tolerance: float, batch: int) -> str:
    return ""
