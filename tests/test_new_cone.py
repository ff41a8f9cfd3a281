"""A cone that no file of the library names: what it says of itself is all that the cone program's
own files ask."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from convlayer.cones import Cone, Nonnegative, Product, Spectrum, Zero
from convlayer.cones.kinds import KINDS, cones_of, unknown_kinds
from convlayer.conic.adjoint import adjoint
from convlayer.conic.bounds import Bounds, implied
from convlayer.conic.consistency import Dependence
from convlayer.conic.elimination import Elimination
from convlayer.conic.kkt import Visible
from convlayer.conic.polish import polish
from convlayer.conic.program import Data, Operators, Program
from convlayer.solvers import SOLVERS


@dataclass(frozen=True)
class Wedge(Cone):
    """K = {(a, b) : a <= 0, b <= 0}, which is not the library's: two nonpositive rows that are
    scaled as one."""

    size: ClassVar[int] = 2  # type: ignore[misc]
    name: ClassVar[str] = "wedge"
    dims: ClassVar[str] = "wedges"
    place: ClassVar[int] = 9

    @classmethod
    def read(cls, count: int) -> list[Cone]:
        return [cls()] * count

    def inside(self) -> Tensor:
        return -torch.ones(2, dtype=torch.float64)

    def project(self, v: Tensor) -> Tensor:
        return v.clamp(max=0)

    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        return v.clamp(max=0), Spectrum((v <= tolerance).to(v.dtype), None)

    def curvature(self, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
        return torch.zeros_like(v)

    def smooth(self, v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Spectrum]:
        raise NotImplementedError

    def margin(self, v: Tensor, p: Tensor) -> Tensor:
        return v.abs().amin(-1)


# x0 + x1 + x2 = 1;  x >= b, of which one by the orthant and two by the wedge
PROGRAM = Program(
    3,
    4,
    Product([Zero(1), Nonnegative(1), Wedge()]),
    P_rows=np.arange(3),
    P_cols=np.arange(3),
    A_rows=np.array([0, 1, 0, 2, 0, 3]),
    A_cols=np.array([0, 0, 1, 1, 2, 2]),
)
A = torch.tensor([[1.0, -1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
ALL = Visible(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool))


def projection(c: Tensor, low: Tensor) -> Tensor:
    """Of c onto {x : sum x = 1, x >= low}, by the shift that makes the sum right."""
    shift = torch.linspace(-5, 5, 400001, dtype=torch.float64)
    total = (c + shift.unsqueeze(-1)).maximum(low).sum(-1)
    return (c + shift[(total - 1).abs().argmin()]).maximum(low)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_it_is_polished_and_differentiated(dense):
    """min |x - c|^2/2: on the support S of the bounds that do not hold, dx = 1_S (dc - mean_S
    dc)."""
    c, low = (
        torch.tensor([0.9, -1.0, 0.3], dtype=torch.float64),
        torch.tensor([0.1, -0.2, 0.1], dtype=torch.float64),
    )
    x = projection(c, low)
    assert (x > low + 0.01).tolist() == [True, False, True]
    # Rows of the wedge are  x_j + s_j = l_j, s_j <= 0,  and that of the orthant  -x_0 + s_0 = -l_0.
    b = torch.stack([torch.ones(()).double(), -low[0], low[1], low[2]])
    operators = Operators(
        Data(PROGRAM, torch.ones(1, 3).double(), -c.unsqueeze(0), A, b.unsqueeze(0)), dense=dense
    )
    s = b - operators.A(x.unsqueeze(0))
    nu = (c - x)[0]
    y = torch.stack(
        [nu, torch.zeros(()).double(), (c - x)[1] - nu, torch.zeros(()).double()]
    ).unsqueeze(0)
    root = polish(operators, x.unsqueeze(0), s, y, ALL, None)
    assert root.residual.item() < 1e-13
    assert not bool(root.degenerate.any())
    assert (root.x - x).abs().amax() < 1e-4
    w, _ = adjoint(root, torch.tensor([[1.0, 2.0, 4.0]]).double(), torch.zeros(1, 4).double())
    assert (w - torch.tensor([[-1.5, 0.0, 1.5]])).abs().amax() < 1e-12


def test_what_is_read_off_a_program_reads_it():
    fixed, values = np.ones(6, dtype=bool), A[0].numpy()
    bounds = Bounds.of(PROGRAM, fixed, values, np.ones(3, dtype=bool))
    assert bounds is not None
    assert bounds.rows.tolist() == [1]
    assert implied(PROGRAM, fixed, values, np.zeros(4), np.zeros(4, dtype=bool)) is None
    assert Dependence.of(PROGRAM, fixed, values) is None
    assert Elimination.of(PROGRAM, fixed, values, ALL, lambda program, dense: 0.0) is None
    assert not PROGRAM.is_polyhedral
    assert PROGRAM.scale_group.tolist() == [0, 1, 2, 2]
    assert not bool(PROGRAM.cones.curved.any())


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_every_solver_takes_it_or_refuses_it_in_words(solver):
    with pytest.raises(ValueError, match="wedge"):
        SOLVERS[solver].check(PROGRAM, {})


def test_every_kind_is_found_and_read_from_cvxpys_summary():
    dims = SimpleNamespace(zero=2, nonneg=3, soc=[3, 1], psd=[2], exp=1, p3d=[0.25], pnd=[])
    names = [cone.name for cone in cones_of(dims).cones]
    assert names == [
        "zero",
        "nonnegative",
        "second_order",
        "second_order",
        "psd",
        "exponential",
        "power",
    ]
    assert [kind.name for kind in KINDS] == list(dict.fromkeys(names))
    assert cones_of(dims).size == 2 + 3 + 4 + 3 + 3 + 3
    assert not unknown_kinds(dims)
    assert unknown_kinds(SimpleNamespace(**vars(dims) | {"pnd": [[0.2, 0.8]], "wedges": 1})) == [
        "pnd",
        "wedges",
    ]
