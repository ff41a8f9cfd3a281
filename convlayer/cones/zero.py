"""The cone {0}, whose dual is everything: equality rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convlayer.cones.cone import Cone, Spectrum


@dataclass(frozen=True)
class Zero(Cone):
    """K = {0}, any number of rows in one block.

    Solution:    Pi(v) = 0.
    Derivative:  0; no kink, no curvature.
    """

    size: int
    name: ClassVar[str] = "zero"
    dims: ClassVar[str] = "zero"
    place: ClassVar[int] = 0
    elementwise: ClassVar[bool] = True

    @classmethod
    def read(cls, count: int) -> Sequence[Cone]:
        return [cls(count)]

    @classmethod
    def describe(cls, cones: Sequence[Cone]) -> str:
        return f"{sum(cone.size for cone in cones)} {cls.name}"

    def project(self, v: Tensor) -> Tensor:
        return v - v  # NaN where v is

    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        return v - v, Spectrum(torch.zeros_like(v), None)

    def curvature(self, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
        return (v - v) * h * g

    def smooth(self, v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Spectrum]:
        return v - v, -v, Spectrum(torch.ones_like(v), None)

    def margin(self, v: Tensor, p: Tensor) -> Tensor:
        return v.new_full(v.shape[:-1], torch.inf)

    @property
    def group(self) -> object:
        return self.name

    @classmethod
    def merge(cls, cones: Sequence[Cone]) -> tuple[Cone, int]:
        return cls(sum(cone.size for cone in cones)), 1
