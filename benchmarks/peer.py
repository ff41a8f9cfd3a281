"""cvxpylayers, the peer, with its default settings; optional."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from convlayer.problems import Declared

try:
    from cvxpylayers.torch import CvxpyLayer
except ImportError:
    CvxpyLayer = None

MISSING = "cvxpylayers is not installed"


def peer_layer(declared: Declared) -> Callable[..., tuple[Tensor, ...]] | None:
    """The peer's layer for the same declaration, None if there is no peer."""
    if CvxpyLayer is None:
        return None
    gp = not declared.problem.is_dcp()
    return CvxpyLayer(
        declared.problem,
        parameters=list(declared.parameters),
        variables=list(declared.variables),
        gp=gp,
    )
