"""The nonnegative orthant: inequality rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convlayer.cones.cone import Cone, Spectrum, split


@dataclass(frozen=True)
class Nonnegative(Cone):
    """K = {v : v >= 0}, any number of rows in one block.

    Solution:    Pi(v) = max(v, 0).
    Derivative:  1[v > 0] on the diagonal.
    Curvature:   0.
    Smoothed:    p_i - r_i = v_i with p_i r_i = kappa.
    At a kink:   v_i = 0; within `tolerance` of it the value is 1, that is values = 1[v >=
                 -tolerance].
    """

    size: int
    name: ClassVar[str] = "nonnegative"
    dims: ClassVar[str] = "nonneg"
    place: ClassVar[int] = 1
    elementwise: ClassVar[bool] = True

    @property
    def signed(self) -> Sequence[int]:
        return range(self.size)

    @classmethod
    def read(cls, count: int) -> Sequence[Cone]:
        return [cls(count)]

    @classmethod
    def describe(cls, cones: Sequence[Cone]) -> str:
        return f"{sum(cone.size for cone in cones)} {cls.name}"

    def project(self, v: Tensor) -> Tensor:
        return v.clamp(min=0)

    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        return v.clamp(min=0), Spectrum((v >= -tolerance).to(v.dtype), None)

    def curvature(self, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
        return (v - v) * h * g

    def smooth(self, v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Spectrum]:
        p, r = split(v, kappa.unsqueeze(-1))
        return p, r, Spectrum(r / (p + r), None)

    def margin(self, v: Tensor, p: Tensor) -> Tensor:
        return v.abs().amin(-1) if v.shape[-1] else v.new_full(v.shape[:-1], torch.inf)

    @property
    def group(self) -> object:
        return self.name

    @classmethod
    def merge(cls, cones: Sequence[Cone]) -> tuple[Cone, int]:
        return cls(sum(cone.size for cone in cones)), 1
