"""Cone programs as the compiled core takes them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from convlayer.cones import Block
from convlayer.conic.kkt import Visible
from convlayer.conic.program import Program
from convlayer.core.interface import core
from convlayer.core.rows import ConeRows, Pattern, Plan

# Unknowns and rows up to which the order of elimination is found in no time,
LARGEST = 1500
# rows of a curved cone, whose block is dense: matrices of order 20,
LARGEST_CONES = {ConeRows.PSD: 210}
LARGEST_CONE = 150
# and multiplications of a factorisation: beyond, torch's own factors are as fast.
FLOPS = 4e6
KINDS = {kind.name.lower(): kind for kind in ConeRows}


def plan_of(program: Program, visible: Visible, implied: Tensor | None) -> Plan | None:
    """None: there is no core, or the program is not for it."""
    library = core()
    if library is None or program.n + program.m > LARGEST or not program.n:
        return None
    blocks = program.cones.blocks
    if any(block.name not in KINDS for block in blocks):
        return None
    curved = [block for block in blocks if not block.elementwise]
    if any(b.size > LARGEST_CONES.get(KINDS[b.name], LARGEST_CONE) for b in curved):
        return None
    ignored = np.zeros(program.m, dtype=bool)
    if implied is not None and not program.is_polyhedral:
        ignored[implied.numpy()] = True
    logs = program.logarithms
    plan = Plan(
        library,
        Pattern(
            program.n,
            program.m,
            (program.P_rows, program.P_cols),
            (program.A_rows, program.A_cols),
            [_cone(block) for block in blocks],
            (program.parts[0].numpy(), program.parts[1].numpy(), program.parts[2]),
            (visible.x.numpy(), visible.y.numpy()),
            ignored,
            None if logs is None else (logs.group.numpy(), logs.seen.numpy(), logs.valued.numpy()),
        ),
    )
    return plan if plan.flops <= FLOPS else None


def _cone(block: Block) -> tuple[ConeRows, int, int, float]:
    kind = KINDS[block.name]
    if not block.elementwise and block.size == 1:  # a ray
        return ConeRows.NONNEGATIVE, 1, 0, 0.0
    order = int(block.parameter or 0) if kind is ConeRows.PSD else 0
    exponent = float(block.parameter or 0) if kind is ConeRows.POWER else 0.0
    return kind, block.size, order, exponent
