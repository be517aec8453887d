"""The linear cases that ``python -m benchmarks.run`` times, by device and stage; a stage takes a few minutes."""

from __future__ import annotations

from dampr.bench.linear import Case

Shape = tuple[int, int, int]


def _vectors(*shapes: Shape) -> list[Case]:
    """Cases with gates on outputs and on inputs, per batch and per sample, of each shape (M, K, N)."""
    return [Case(shape, where, each) for shape in shapes for each in (False, True) for where in ("output", "input")]


def _weights(*shapes: Shape) -> list[Case]:
    """Cases with gates on single weights and on blocks of 16 x 16, of each shape (M, K, N)."""
    return [Case(shape, granularity) for shape in shapes for granularity in ("weight", (16, 16))]


SUITE: dict[str, dict[str, list[Case]]] = {
    "cpu": {
        "pass": [Case((0, 4096, 4096), "weight", weight_pass=True)],
        "vectors": _vectors((16, 64, 64), (256, 2048, 2048), (1024, 1024, 1024)),
        "weights": _weights((64, 1024, 1024), (1024, 1024, 1024)),
    },
    "cuda": {
        "pass": [Case((0, size, size), "weight", weight_pass=True) for size in (4096, 16384)],
        "vectors": _vectors((8192, 4096, 4096), (256, 4096, 4096)),
        "weights": _weights((8192, 4096, 4096)),
        "small": [Case((m, 4096, 4096), "weight") for m in (16, 32, 64, 128, 256, 512)],
        "tiny": _vectors((16, 64, 64)),
    },
}
