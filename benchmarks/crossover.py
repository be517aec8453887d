"""Finds where one route overtakes another: times every route of a gated layer, forced, for growing numbers of rows of
x, and derives the thresholds between routes.

This is the stage ``crossover`` of ``python -m benchmarks.run``. The weight is fixed; the dense layer runs beside the
routes of each case. On CUDA the stage also measures what skipping closed gates gains, with gates closed in whole
blocks, at each of the shares :data:`SHARES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

import dampr
from dampr.bench import linear
from dampr.bench.linear import Case, Point, Step
from dampr.kernels import configs
from dampr.kernels.dispatch import Thresholds
from dampr.ops.routes import ROUTES, forced_route

SIZE = {"cpu": 1024, "cuda": 4096}  # K and N of the weight
ROWS = {"cpu": [2**i for i in range(3, 12)], "cuda": [2**i for i in range(2, 14)]}
PER_BATCH = (("output", False), ("input", False))
PER_SAMPLE = (("output", True), ("input", True))
WEIGHT = ("weight", False)
CLOSED_BLOCK = 128  # features with gates that are closed together: whole tiles, whatever their size
COMPARED = tuple(route for route in ROUTES if route != "small")  # "small" is for weights hundreds of times smaller
SHARES = (0.0, 0.5, 0.75, 0.9)
CLOSED = -20.0  # a log_alpha whose gate is open once in 10^8 draws


class RouteStep(linear.TrainingStep):
    """A training step of a gated layer, all of whose calls are forced down one route."""

    def __init__(self, case: Case, route: str, x: torch.Tensor, dy: torch.Tensor, closed: float = 0.0) -> None:
        _, k, n = case.shape
        layer = dampr.nn.GatedLinear(k, n, granularity=case.granularity, per_sample=case.per_sample).to(x.device)
        close_blocks(layer.gate.log_alpha, closed)
        super().__init__(layer, x, dy)
        self.route = route

    def __call__(self) -> None:
        with forced_route(self.route):
            super().__call__()

    def kept_bytes(self) -> int:
        with forced_route(self.route):
            return super().kept_bytes()


def close_blocks(log_alpha: torch.Tensor, share: float) -> None:
    """Close this share of the blocks of a vector of gates, drawn at random, in place."""
    blocks = log_alpha.detach().split(CLOSED_BLOCK)
    for i in torch.randperm(len(blocks))[: round(share * len(blocks))].tolist():
        blocks[i].fill_(CLOSED)


def routes_of(case: Case, device: str) -> list[str]:
    """The compared routes that can serve a case on this device."""
    return [name for name in COMPARED if _serves(name, case, device)]


def _serves(name: str, case: Case, device: str) -> bool:
    """Whether a route can serve a case on this device."""
    try:
        with forced_route(name):
            return linear.case_route(case, device) == name
    except ValueError:
        return False


def run(device: str, *, rounds: int = 20) -> list[Point]:
    """The points of every case and number of rows. On CUDA, points with closed blocks follow, at the largest number of
    rows.
    """
    size = SIZE[device]
    cases = [Case((m, size, size), *how) for how in (*PER_BATCH, *PER_SAMPLE, WEIGHT) for m in ROWS[device]]
    points = [point for case in cases for point in measure(case, device, rounds)]
    if device == "cuda":
        widest = [Case((ROWS[device][-1], size, size), *how) for how in PER_BATCH]
        points += [point for case in widest for share in SHARES for point in measure(case, device, rounds, share)]
    return points


def measure(case: Case, device: str, rounds: int, closed: float | None = None) -> list[Point]:
    """The points of the dense layer and of each route of the gated layer, with this share of its blocks of gates
    closed.
    """
    torch.manual_seed(0)
    m, k, n = case.shape
    x, dy = torch.randn(m, k, device=device), torch.randn(m, n, device=device)
    steps: dict[str, Step] = {"dense": linear.TrainingStep(torch.nn.Linear(k, n).to(device), x, dy)}
    routes = routes_of(case, device)
    for route in routes:
        steps[route] = RouteStep(case, route, x, dy, closed or 0.0)
    name = str(case) if closed is None else closed_name(case, closed)
    points = linear.time_steps(name, case.shape, device, steps, rounds, {route: route for route in routes})
    return [replace(point, provider="dampr") if point.route else point for point in points]


def closed_name(case: Case, share: float) -> str:
    """The name of a case with closed blocks in the results."""
    return f"{case}, {share:.0%} of blocks closed"


def tuned(points: Iterable[Point], source: str) -> Thresholds:
    """The thresholds that make the chosen routes fastest over the whole sweep. The route "live" is allowed only if it
    is never slower than "fold".
    """
    points = list(points)
    _, K, N = points[0].shape

    def most_rows(hows: Iterable[tuple[str, bool]], below: str, above: str) -> int:
        return best_limit([_pairs(points, str(Case((0, K, N), *how)), below, above) for how in hows])

    live = [pair for how in PER_BATCH for pair in _pairs(points, str(Case((0, K, N), *how)), "live", "fold").values()]
    return Thresholds(
        source=source,
        one_pass_gates=configs.one_pass_gates(most_rows(PER_SAMPLE, "one_pass", "passes"), N, K),
        small_m=most_rows([WEIGHT], "small_m", "fold"),
        skip_dead=bool(live) and all(skipping <= folding for skipping, folding in live),
    )


def _pairs(points: Iterable[Point], case: str, one: str, other: str) -> dict[int, tuple[float, float]]:
    """The seconds of two routes in a case, by the number of rows of x."""
    seconds = {(p.shape[0], p.route): p.median for p in points if p.case == case}
    return {m: (seconds[m, one], seconds[m, other]) for m in sorted({m for m, _ in seconds})}


def best_limit(sweeps: Iterable[dict[int, tuple[float, float]]]) -> int:
    """The number of rows of x up to which the first of two routes should be taken, 0 for never.

    The limit chosen is the one for which the product of all times is smallest. A product gives every size the same
    weight, and taking it over the whole sweep keeps one noisy point from moving the limit.
    """
    pairs = [(m, one / other) for sweep in sweeps for m, (one, other) in sweep.items()]
    return min(
        {0, *(m for m, _ in pairs)}, key=lambda limit: (sum(math.log(ratio) for m, ratio in pairs if m <= limit), limit)
    )
