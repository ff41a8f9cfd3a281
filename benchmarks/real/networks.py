"""Flows, power grids, games and markets."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch

from convlayer.problems import prebuilt

BUSES = 5
LINES = [(0, 1), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4)]
PLANTS = [0, 0, 2, 3, 4]  # the bus of each
SUSCEPTANCE = np.array([3.0, 3.5, 15.0, 9.0, 3.4, 3.4])
LINKS = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5)]
GRID = 4
STREETS = [
    (GRID * i + j, GRID * k + l)
    for i in range(GRID)
    for j in range(GRID)
    for k, l in ((i, j + 1), (i + 1, j))
    if k < GRID and l < GRID
]


def _incidence(edges, nodes):
    """+1 where an edge leaves, -1 where it ends."""
    A = np.zeros((nodes, len(edges)))
    for e, (tail, head) in enumerate(edges):
        A[tail, e], A[head, e] = 1, -1
    return A


def _transfer():
    """What a unit fed in at a bus, and taken out at the first, puts on each line."""
    A = _incidence(LINES, BUSES)
    flows = (A * SUSCEPTANCE).T[:, 1:]
    angles = np.linalg.inv((A * SUSCEPTANCE @ A.T)[1:, 1:])
    return np.hstack([np.zeros((len(LINES), 1)), flows @ angles])


@prebuilt()
def economic_dispatch(n=5):
    cost, demand, limit = cp.Parameter(n), cp.Parameter(BUSES), cp.Parameter(n)
    g, plants = cp.Variable(n), np.eye(BUSES)[:, PLANTS]
    flow = _transfer() @ (plants @ g - demand)
    limits = [cp.sum(g) == cp.sum(demand), g >= 0, g <= limit, cp.abs(flow) <= 1.2]
    price = cost @ g + 0.1 * cp.sum_squares(g)
    return cp.Problem(cp.Minimize(price), limits), [cost, demand, limit], [g]


@prebuilt()
def power_flow(n=5, lines=6):
    cost, demand, capacity = cp.Parameter(n), cp.Parameter(BUSES), cp.Parameter(lines)
    g, flow, angle, shed = (cp.Variable(k) for k in (n, lines, BUSES, BUSES))
    plants, A = np.eye(BUSES)[:, PLANTS], _incidence(LINES, BUSES)
    balance = plants @ g + shed - demand == A @ flow
    laws = [balance, flow == cp.multiply(SUSCEPTANCE, A.T @ angle), angle[0] == 0]
    limits = [g >= 0, g <= 2, cp.abs(flow) <= capacity, shed >= 0]
    price = cost @ g + 0.1 * cp.sum_squares(g) + 5 * cp.sum(shed) + cp.sum_squares(shed)
    return cp.Problem(cp.Minimize(price), laws + limits), [cost, demand, capacity], [g, flow]


@prebuilt()
def demand_response(hours=24):
    price, wanted, total = cp.Parameter(hours), cp.Parameter(hours), cp.Parameter()
    x = cp.Variable(hours)
    cost = price @ x + 0.5 * cp.sum_squares(x - wanted)
    limits = [cp.sum(x) >= total, x >= 0, x <= 2]
    return cp.Problem(cp.Minimize(cost), limits), [price, wanted, total], [x]


@prebuilt()
def battery(hours=12):
    price, start = cp.Parameter(hours), cp.Parameter()
    charge, discharge, energy = cp.Variable(hours), cp.Variable(hours), cp.Variable(hours + 1)
    cost = (
        price @ (charge - discharge)
        + 0.05 * cp.sum_squares(charge)
        + 0.05 * cp.sum_squares(discharge)
    )
    flows = [energy[0] == start, energy[1:] == energy[:-1] + 0.9 * charge - discharge / 0.9]
    limits = [energy >= 0, energy <= 2]
    limits += [charge >= 0, charge <= 0.5, discharge >= 0, discharge <= 0.5]
    problem = cp.Problem(cp.Minimize(cost), flows + limits)
    return problem, [price, start], [charge, discharge]


@prebuilt()
def matrix_game(n=5):
    A, x, value = cp.Parameter((n, n)), cp.Variable(n), cp.Variable()
    limits = [A.T @ x <= value, cp.sum(x) == 1, x >= 0]
    return cp.Problem(cp.Minimize(value + 0.1 * cp.sum_squares(x)), limits), [A], [x]


@prebuilt()
def shortest_path(n=24):
    cost, x = cp.Parameter(n), cp.Variable(n)
    ends = np.zeros(GRID**2)
    ends[[0, -1]] = 1, -1
    limits = [_incidence(STREETS, GRID**2) @ x == ends, x >= 0, x <= 1]
    return cp.Problem(cp.Minimize(cost @ x + 0.1 * cp.sum_squares(x)), limits), [cost], [x]


@prebuilt()
def minimum_cost_flow(n=9, nodes=6):
    cost, capacity, supply = cp.Parameter(n), cp.Parameter(n), cp.Parameter(nodes - 1)
    x, A = cp.Variable(n), _incidence(LINKS, nodes)[:-1]  # the last node takes what is left
    limits = [A @ x == supply, x >= 0, x <= capacity]
    price = cost @ x + 0.1 * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(price), limits), [cost, capacity, supply], [x]


@prebuilt()
def maximum_flow(n=9, nodes=6):
    capacity, x, value = cp.Parameter(n), cp.Variable(n), cp.Variable()
    ends = np.eye(nodes)[0] - np.eye(nodes)[-1]
    limits = [_incidence(LINKS, nodes) @ x == value * ends, x >= 0, x <= capacity]
    gain = value - 0.02 * cp.sum_squares(x)
    return cp.Problem(cp.Maximize(gain), limits), [capacity], [x, value]


@prebuilt()
def matching(n=5):
    score, P = cp.Parameter((n, n)), cp.Variable((n, n))
    gain = cp.sum(cp.multiply(score, P)) - 0.5 * cp.sum_squares(P)
    limits = [cp.sum(P, axis=0) <= 1, cp.sum(P, axis=1) <= 1, P >= 0]
    return cp.Problem(cp.Maximize(gain), limits), [score], [P]


@prebuilt()
def network_utility(flows=8, links=5):
    weight, capacity = cp.Parameter(flows, nonneg=True), cp.Parameter(links)
    x = cp.Variable(flows)
    routes = np.array(
        [[(f + 2 * l) % 3 == 0 or f % links == l for f in range(flows)] for l in range(links)],
        dtype=float,
    )
    problem = cp.Problem(cp.Maximize(weight @ cp.log(x)), [routes @ x <= capacity])
    return problem, [weight, capacity], [x]


@prebuilt()
def budget_of_square_roots(n=10):
    weight, price = cp.Parameter(n, nonneg=True), cp.Parameter(n)
    x = cp.Variable(n)
    gain = cp.sum(cp.multiply(weight, cp.sqrt(x)))
    return cp.Problem(cp.Maximize(gain), [price @ x <= 1, x <= 0.5]), [weight, price], [x]


@prebuilt()
def water_filling(n=10):
    noise, power, x = cp.Parameter(n, nonneg=True), cp.Parameter(nonneg=True), cp.Variable(n)
    rate = cp.sum(cp.log(noise + x))
    return cp.Problem(cp.Maximize(rate), [x >= 0, cp.sum(x) == power]), [noise, power], [x]


@prebuilt()
def market_equilibrium(buyers=4, goods=4):
    V, X = cp.Parameter((buyers, goods), nonneg=True), cp.Variable((buyers, goods))
    welfare = cp.sum(cp.log(cp.sum(cp.multiply(V, X), axis=1))) - 0.1 * cp.sum_squares(X)
    return cp.Problem(cp.Maximize(welfare), [cp.sum(X, axis=0) <= 1, X >= 0]), [V], [X]


economic_dispatch.sampled_by(
    lambda draw, n: (draw.uniform(1, 3, n), draw.uniform(0.2, 0.8, BUSES), draw.uniform(1, 1.5, n))
)
power_flow.sampled_by(
    lambda draw, n, lines: (
        draw.uniform(1, 3, n),
        draw.uniform(0.2, 1, BUSES),
        draw.uniform(0.3, 1, lines),
    )
)
demand_response.sampled_by(
    lambda draw, hours: (
        draw.uniform(0, 1.5, hours),
        draw.uniform(0, 1.5, hours),
        draw.uniform(8, 20),
    )
)
battery.sampled_by(lambda draw, hours: (draw.uniform(0, 1, hours), draw.uniform(0.5, 1.5)))
matrix_game.sampled_by(lambda draw, n: (draw.normal(n, n),))
shortest_path.sampled_by(lambda draw, n: (draw.uniform(0.2, 2, n),))
maximum_flow.sampled_by(lambda draw, n, nodes: (draw.uniform(0.3, 1, n),))
matching.sampled_by(lambda draw, n: (draw.normal(n, n),))
network_utility.sampled_by(
    lambda draw, flows, links: (draw.uniform(0.5, 2, flows), draw.uniform(1, 3, links))
)
budget_of_square_roots.sampled_by(
    lambda draw, n: (draw.uniform(0.5, 2, n), draw.uniform(0.5, 2, n))
)
water_filling.sampled_by(lambda draw, n: (draw.uniform(0.2, 2, n), draw.uniform(0.5, 2)))
market_equilibrium.sampled_by(lambda draw, buyers, goods: (draw.uniform(0.1, 1, buyers, goods),))


@minimum_cost_flow.sampled_by
def _supplies(draw, n, nodes):
    within = draw.uniform(0.1, 0.7, n)
    A = torch.as_tensor(_incidence(LINKS, nodes)[:-1])
    return draw.uniform(0.5, 2, n), within + draw.uniform(0.05, 0.3, n), within @ A.mT
