"""The peers: cvxpylayers by its default solver and by Moreau, and what one writes in torch for one
structure alone."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peer import CvxpyLayer
from benchmarks.structures.tasks import Layer
from convlayer.problems import Declared

try:
    from entmax import sparsemax as entmax_sparsemax
except ImportError:
    entmax_sparsemax = None
try:
    from ot.batch import solve_batch
except ImportError:
    solve_batch = None

CVXPYLAYERS, MOREAU = "cvxpylayers", "Moreau"
INCUMBENTS = {CVXPYLAYERS: {}, MOREAU: {"solver": "MOREAU"}}


def incumbent(name: str, declared: Declared) -> Layer:
    """The layer of cvxpylayers for this problem; an ImportError says what is missing."""
    if CvxpyLayer is None:
        raise ImportError("cvxpylayers is not installed")
    parameters, variables = list(declared.parameters), list(declared.variables)
    return CvxpyLayer(
        declared.problem,
        parameters=parameters,
        variables=variables,
        gp=not declared.problem.is_dcp(),
        **INCUMBENTS[name],
    )


def lstsq(A: Tensor, b: Tensor) -> tuple[Tensor]:
    # the only one there is on an accelerator
    driver = "gelsd" if A.device.type == "cpu" else "gels"
    return (torch.linalg.lstsq(A, b.unsqueeze(-1), driver=driver).solution.squeeze(-1),)


def projector(X: Tensor) -> tuple[Tensor]:
    v = torch.linalg.eigh(X).eigenvectors[..., -1]
    return (v.unsqueeze(-1) * v.unsqueeze(-2),)


def softmax(y: Tensor) -> tuple[Tensor]:
    return (torch.softmax(y, -1),)


def sparsemax(y: Tensor) -> tuple[Tensor]:
    """By sort."""
    z = y.sort(dim=-1, descending=True).values
    total = z.cumsum(-1) - 1
    count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    support = (count * z > total).sum(-1, keepdim=True)
    return ((y - total.gather(-1, support - 1) / support).clamp(min=0),)


def sparsemax_of_entmax(y: Tensor) -> tuple[Tensor]:
    if entmax_sparsemax is None:
        raise ImportError("entmax is not installed")
    return (entmax_sparsemax(y, -1),)


def sinkhorn(M: Tensor, r: Tensor, c: Tensor, eps: Tensor, iterations: int) -> tuple[Tensor]:
    """In the log domain, to be differentiated through its iterations."""
    kernel, g = -M / eps[:, None, None], torch.zeros_like(c)
    for _ in range(iterations):
        f = r.log() - torch.logsumexp(kernel + g.unsqueeze(1), 2)
        g = c.log() - torch.logsumexp(kernel + f.unsqueeze(2), 1)
    return ((kernel + f.unsqueeze(2) + g.unsqueeze(1)).exp(),)


@torch.no_grad()
def iterations_to(
    tolerance: float, M: Tensor, r: Tensor, c: Tensor, eps: Tensor, limit: int = 100_000
) -> int:
    """Of Sinkhorn until the marginals are met to this relative error in every row; they are looked
    at every tenth time."""
    kernel, g = -M / eps[:, None, None], torch.zeros_like(c)
    for count in range(1, limit + 1):
        f = r.log() - torch.logsumexp(kernel + g.unsqueeze(1), 2)
        g = c.log() - torch.logsumexp(kernel + f.unsqueeze(2), 1)
        if count % 10 == 0:
            rows = (kernel + f.unsqueeze(2) + g.unsqueeze(1)).exp().sum(2)
            if bool(((rows - r).norm(dim=1) <= tolerance * r.norm(dim=1)).all()):
                return count
    raise ArithmeticError(
        f"Sinkhorn has not met the marginals to {tolerance:g} in {limit} iterations"
    )


def pot(M: Tensor, r: Tensor, c: Tensor, eps: Tensor) -> tuple[Tensor]:
    """With its default tolerance 1e-5 and at most 1000 iterations; eps is the same for all rows,
    without a gradient."""
    if solve_batch is None:
        raise ImportError("POT is not installed")
    return (solve_batch(M, float(eps[0]), r, c, grad="autodiff").plan,)
