"""A network with a layer at its end: what the families train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.pytorch.paths import Path

FEATURES, HIDDEN = 16, 64


class Model(nn.Module):
    """features (batch, FEATURES) -> loss; an MLP moves the layer's first vector, the other
    parameters are shared by the batch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        tensors = path.sample(())
        self.moved = next(k for k, t in enumerate(tensors) if t.ndim == 1)
        for k, tensor in enumerate(tensors):
            self.register_buffer(f"theta{k}", tensor)
        size = len(tensors[self.moved])
        self.count, self.layer = len(tensors), path.layer()
        self.mlp = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, size)
        ).double()

    def forward(self, features: Tensor) -> Tensor:
        theta = [self.get_buffer(f"theta{k}") for k in range(self.count)]
        theta[self.moved] = theta[self.moved] + self.mlp(features)
        return sum((torch.cos(5 * x) * x).sum() for x in self.layer(*theta)) / len(features)


def built(path: Path) -> Model:
    torch.manual_seed(0)
    return Model(path)


def features(batch: int) -> Tensor:
    return torch.randn(
        batch, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
