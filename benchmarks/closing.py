"""Times a training step of a linear layer and a convolution with an ever larger share of their gates closed.

This is the stage ``closing`` of ``python -m benchmarks.run``. The closed gates are drawn once, each independently
rather than in blocks; the other gates stay open. The unfused competitors have equally many closed gates, but compute
everything and then multiply by zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import conv
from benchmarks.crossover import CLOSED
from dampr.bench.competitors import UnfusedConv2d, UnfusedLinear
from dampr.bench.linear import Case, Point
from dampr.nn import GatedConv2d, GatedLinear

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
OPEN = -CLOSED
LINEAR = {"cpu": (256, 2048, 2048), "cuda": (8192, 4096, 4096)}
CONV = {"cpu": conv.Conv("VGG16", 32, 256, 8, 256, 3), "cuda": conv.Conv("VGG16", 512, 256, 8, 256, 3)}
LAYERS = {"linear": (nn.Linear, GatedLinear, UnfusedLinear), "conv": (nn.Conv2d, GatedConv2d, UnfusedConv2d)}


def run(device: str, *, compiled: bool = True, rounds: int = 20) -> list[Point]:
    """The points for every layer, kind of gates and share of closed ones."""
    points = []
    for kind, granularity, share in cases():
        case, shape, x, arguments = _problem(kind, granularity, device)
        dense, gated, unfused = LAYERS[kind]
        builds: conv.Layers = {
            "dense": partial(dense, **arguments),
            "dampr": partial(_closed, gated, share, granularity=granularity, **arguments),
            "eager unfused": partial(_closed, unfused, share, granularity=granularity, **arguments),
        }
        points += conv.measure(closed_name(case, share), shape, builds, x, device, compiled, rounds)
    return points


def cases() -> Iterator[tuple[str, str, float]]:
    """(kind of layer, granularity, share of closed gates) of every case."""
    return ((kind, granularity, share) for kind in LAYERS for granularity in ("output", "input") for share in SHARES)


def closed_name(case: str, share: float) -> str:
    """The name of a case in the results."""
    return f"{case}, {share:.0%} closed"


def _problem(kind: str, granularity: str, device: str) -> tuple[str, tuple[int, ...], torch.Tensor, dict[str, Any]]:
    """(name, shape, input, constructor arguments) of a layer of this kind with gates of this granularity."""
    if kind == "linear":
        m, k, n = LINEAR[device]
        return (
            f"linear, {Case((m, k, n), granularity)}",
            (m, k, n),
            torch.randn(m, k),
            {"in_features": k, "out_features": n},
        )
    c = CONV[device]
    sizes = {
        "in_channels": c.channels,
        "out_channels": c.filters,
        "kernel_size": c.kernel,
        "padding": c.kernel // 2,
        "bias": False,
    }
    where = {"output": "filter", "input": "channel"}[granularity]
    name = f"{c.name}, {c.kernel} x {c.kernel}, per batch, {where} gates"
    return name, c.shape, torch.randn(c.batch, c.channels, c.size, c.size), sizes


def _closed(layer: type[nn.Module], share: float, **arguments: Any) -> nn.Module:
    """A new layer with this share of its gates closed and the others open."""
    built = layer(**arguments)
    for name, t in built.named_parameters():
        if name.endswith("log_alpha"):
            shut = torch.randperm(t.numel())[: round(share * t.numel())]
            t.data.fill_(OPEN)[shut] = CLOSED
    return built
