"""``dampr tune``: measure which share of gates must be closed for a product to be faster without the closed ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dampr import functional, records
from dampr.ops import forced_route, thresholds

SHAPE = (256, 1024, 1024)  # rows, inputs, outputs
SHARES = (0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75)
PAYS = 0.98  # leaving out must take at most this share of the time; a smaller gain may be noise


class Timing(NamedTuple):
    """The time of a step that leaves closed gates out, relative to one that does not.

    side: "inputs" or "outputs"; closed: the share of closed gates; ratio: the ratio of times.
    """

    side: str
    closed: float
    ratio: float


def run(shape: tuple[int, int, int] = SHAPE, shares: Sequence[float] = SHARES, rounds: int = 7) -> list[Timing]:
    """Measure a step, forward and backward, at each share of closed gates, with and without leaving them out. Takes
    seconds.

    With one thread, the CPU time of the process is measured, which other processes disturb least.
    """
    return [
        Timing(side, share, _ratio(shape, side, share, rounds)) for side in ("inputs", "outputs") for share in shares
    ]


def _ratio(shape: tuple[int, int, int], side: str, share: float, rounds: int) -> float:
    """How the time of a training step changes if closed gates are left out of the products.

    Args:
        shape: (M, K, N) of the layer: x is (M, K), the weight (N, K).
        side: which gates the layer has, "inputs" or "outputs".
        share: the share of the gates that are closed, chosen at random.
        rounds: how many steps of each kind are timed, in turns.

    Returns: the median time of a step that leaves them out, divided by that of a step that multiplies them. Below 1,
    leaving out is faster.
    """
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator, requires_grad=True)
    weight = torch.randn(n, k, generator=generator, requires_grad=True)
    size = k if side == "inputs" else n
    gate = torch.full((size,), 9.0)
    gate[torch.randperm(size, generator=generator)[: round(share * size)]] = -9.0
    gate.requires_grad_()
    upstream = torch.randn(m, n, generator=generator)

    def step(route: str) -> Callable[[], None]:
        """A step that takes this route."""

        def once() -> None:
            with forced_route(route):
                ins, outs = (gate, None) if side == "inputs" else (None, gate)
                functional.gated_linear(x, weight, input_gate=ins, output_gate=outs, seed=1).backward(upstream)
            x.grad = weight.grad = gate.grad = None

        return once

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ways = step("live"), step("fold" if m >= min(k, n) else "activations")
    seconds: tuple[list[float], list[float]] = [], []
    for number in range(rounds + 1):
        for way, times in zip(ways, seconds, strict=True):
            began = clock()
            way()
            if number:  # the first warms up
                times.append(clock() - began)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def least(timings: Sequence[Timing], side: str) -> float:
    """The smallest measured share of closed gates such that, there and at every larger share, leaving them out is
    faster; NEVER if there is none.
    """
    found = thresholds.NEVER
    for timing in sorted((t for t in timings if t.side == side), key=lambda t: t.closed, reverse=True):
        if timing.ratio > PAYS:
            break
        found = timing.closed
    return found


def keep(timings: Sequence[Timing]) -> thresholds.Skip:
    """Write the result to the user's cache; returns the thresholds that hold now."""
    thresholds.write(
        least(timings, "inputs"),
        least(timings, "outputs"),
        date=records.environment()["date"][:10],
        torch=torch.__version__,
    )
    return thresholds.skip()
