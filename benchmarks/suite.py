"""The registry of cases: what `python -m benchmarks.run` times on the CPU and on a GPU,
in stages of a few minutes each.
"""

from __future__ import annotations

from dampr.bench.linear import Case

Shape = tuple[int, int, int]


def _vectors(*shapes: Shape) -> list[Case]:
    return [Case(shape, where, each) for shape in shapes for each in (False, True) for where in ("output", "input")]


def _weights(*shapes: Shape) -> list[Case]:
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
