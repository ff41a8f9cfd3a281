"""Forecasts that make good portfolios, learnt on several processes at once.

Data:   every day 20 signals on 8 assets, whose returns follow them by a rule that is not told, plus
        noise.
Inner:  a network turns the signals into forecasts mu, and the layer trades on them (`problems/portfolio.py`),
            maximise    mu'w - 1/2 |L'w|^2 - kappa |w - w0|_1
            subject to  w >= 0,  1'w = 1
Outer:  what the portfolios earn with the returns that come, risk and trading costs taken off; the
        gradient goes through the layer. Each process solves and differentiates its share of a
        batch, and DistributedDataParallel averages the gradients. Once an epoch the first process
        does a whole batch alone; the run fails if the gradients differ.

    torchrun --nproc_per_node 2 examples/distributed_training.py      gloo on CPUs; nccl where each process has a CUDA device
    python examples/distributed_training.py                           one process, and nothing to compare
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from convlayer import problems

SIGNALS, ASSETS, HIDDEN, KAPPA = 20, 8, 32, 0.05
DAYS, BATCH, EPOCHS, RATE, NOISE = 1024, 128, 8, 0.005, 0.3
TOLERANCE = 1e-9  # of the gradients, relative: rounding, no more


class Market:
    """The same on every process, from one seed: days to learn from, then as many to test on."""

    def __init__(self, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.L = (0.4 * torch.randn(ASSETS, ASSETS, generator=draw)).to(device)
        self.w0, self.kappa = (
            torch.full((ASSETS,), 1 / ASSETS, device=device),
            torch.tensor(KAPPA, device=device),
        )
        signals = torch.randn(2 * DAYS, SIGNALS, generator=draw)
        mean = torch.tanh(signals @ torch.randn(SIGNALS, ASSETS, generator=draw) / SIGNALS**0.5)
        returns = mean + NOISE * torch.randn(2 * DAYS, ASSETS, generator=draw)
        self.signals, self.mean, self.returns = (
            part.to(device) for part in (signals, mean, returns)
        )

    def earned(self, w: Tensor, returns: Tensor) -> Tensor:
        """What portfolios w (days, ASSETS) earn, risk and trading costs taken off, (days,)."""
        return (
            (returns * w).sum(-1)
            - (w @ self.L).square().sum(-1) / 2
            - KAPPA * (w - self.w0).abs().sum(-1)
        )


class Trade(nn.Module):
    """Forecasts (days, ASSETS) -> portfolios (days, ASSETS)."""

    def __init__(self, market: Market) -> None:
        super().__init__()
        self.market, self.layer = market, problems.portfolio.layer(ASSETS)

    def forward(self, mu: Tensor) -> Tensor:
        return self.layer(mu, self.market.L, self.market.w0, self.market.kappa)[0]


def train(rank: int, world: int, device: torch.device) -> float:
    """On the first process the largest difference between the gradients of all together and of one
    that did the whole batch."""
    torch.manual_seed(0)
    market = Market(device)
    trade = Trade(market)
    trader = nn.Sequential(
        nn.Linear(SIGNALS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, ASSETS), trade
    ).to(device)
    model = DistributedDataParallel(trader) if dist.is_initialized() else trader
    parameters = list(trader.parameters())
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    order, worst = torch.Generator().manual_seed(1), 0.0

    def loss(network: nn.Module, days: Tensor) -> Tensor:
        return -market.earned(network(market.signals[days]), market.returns[days]).sum()

    for epoch in range(EPOCHS):
        total = torch.zeros((), device=device)
        for step, batch in enumerate(torch.randperm(DAYS, generator=order).to(device).split(BATCH)):
            optimiser.zero_grad()
            value = loss(model, batch[rank::world])
            # Gradients are averaged over the processes: times their number they are the sum, so
            # that shares may differ in size.
            (value * world / len(batch)).backward()
            if step == 0 and rank == 0:
                whole = parameters_to_vector(
                    torch.autograd.grad(loss(trader, batch) / len(batch), parameters)
                )
                shared = parameters_to_vector(p.grad for p in parameters if p.grad is not None)
                worst = max(worst, float((shared - whole).abs().max() / whole.abs().max()))
            optimiser.step()
            total += value.detach()
        if dist.is_initialized():
            dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch}: loss {total / DAYS:.4f}", flush=True)
    if rank == 0:
        with torch.no_grad():
            learnt, best = trader(market.signals), trade(market.mean)
            earned, possible = (market.earned(w, market.mean)[DAYS:].mean() for w in (learnt, best))
        print(
            f"earned a day on {DAYS} new ones: {earned:.4f}; {possible:.4f} had the rule been known"
        )
    return worst


def main() -> int:
    torch.set_default_dtype(torch.float64)
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    rank, world = 0, 1
    if dist.is_torchelastic_launched():  # by torchrun, which tells the processes how to meet
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        rank, world = dist.get_rank(), dist.get_world_size()
    try:
        worst = train(rank, world, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0 and world > 1:
        print(
            f"largest difference between the gradients of {world} and of one process: {worst:.1e}, relative"
        )
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
