"""Timing on a noisy machine: competitors take turns, round by round, and medians are compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all rounds: the median, the quartiles, and all ``samples``, one per round."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def relative_to(self, other: Timing) -> tuple[float, float, float]:
        """(median, low, high) of the ratio of this time to that of ``other`` over the rounds, with a 95 % confidence
        interval.

        Both were measured one after the other in each round, so most disturbances of the machine cancel. The interval
        is that of order statistics (binomial, normal approximation), which assumes no distribution. With a single round
        it is that round.
        """
        ratios = sorted(a / b for a, b in zip(self.samples, other.samples, strict=True))
        n = len(ratios)
        first = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
        return statistics.median(ratios), ratios[first], ratios[n - 1 - first]


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 20, min_seconds: float = 0.01, cuda: bool = False
) -> dict[str, Timing]:
    """name -> the timing of each function; in every round each is called often enough to last ``min_seconds``.

    On CUDA, the calls between two events are timed, and 256 MB are overwritten before each function, so that none finds
    its inputs in the cache.
    """
    measure = _cuda if cuda else _wall
    repeats = {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        repeats[name] = max(1, round(min_seconds / max(measure(function, 1), 1e-9)))
    flush = torch.empty(2**26, device="cuda") if cuda else None
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        names = list(functions)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if flush is not None:
                flush.zero_()
            samples[name].append(measure(functions[name], repeats[name]) / repeats[name])
    return {name: _summarise(seconds) for name, seconds in samples.items()}


def _summarise(seconds: list[float]) -> Timing:
    """The timing of ``seconds``, one number for each call: median and quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Timing(median, low, high, tuple(seconds))


def _wall(function: Callable[[], object], repeats: int) -> float:
    """The seconds of ``repeats`` calls, by the clock."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return time.perf_counter() - start


def _cuda(function: Callable[[], object], repeats: int) -> float:
    """The seconds of ``repeats`` calls on the GPU, by CUDA events."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000
