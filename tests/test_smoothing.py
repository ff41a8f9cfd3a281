"""Laws of the smoothed zero: its equations, its derivative by differences, its limits, and what it says where there is none."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from convlayer.adjoint import Zero, adjoint, polish, pull_back
from convlayer.cones import Cone, Nonnegative, Product, Psd, SecondOrder
from convlayer.cones import Zero as Equality
from convlayer.generic import evaluate
from convlayer.kkt import Visible
from convlayer.program import Data, Operators, Program
from convlayer.residual import normalise, recentre
from convlayer.smoothing import smoothed
from convlayer.solvers.clarabel import Clarabel
from convlayer.threads import one_thread
from tests.cases import CASES

FOUND = 1e-12
NAMES = (
    "linear_program",
    "transport",
    "quadratic_program",
    "lasso",
    "raw_second_order",
    "norm_ball",
    "spectraplex",
    "nearest_correlation",
    "small_psd",
    "raw_exponential",
    "entropy",
    "logistic_regression",
    "raw_power",
    "p_norm",
    "every_cone",
    "many_cones_linear",
)
WEIGHTS = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(20263)
    with one_thread():
        yield


def solved(data: Data, visible: Visible | None = None, dense: bool = True) -> Zero:
    """The zero of the residual map in normalised units."""
    program = data.program
    visible = visible or Visible(torch.ones(program.n, dtype=torch.bool), torch.zeros(program.m, dtype=torch.bool))
    data, scaling = normalise(data)
    found = Clarabel().solve_data(data, 1e-9, {})
    data, scaling = recentre(data, replace(scaling, rho=scaling.rho, tau=scaling.tau), found.x, found.y)
    before = normalise_units(scaling, data, found)
    return polish(Operators(data, dense), *before, visible, scaling.c)


def normalise_units(scaling, data: Data, found) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError
