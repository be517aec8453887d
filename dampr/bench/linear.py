"""GatedLinear against dense, eager unfused and torch.compile'd unfused layers, forward + backward, interleaved.

``python -m dampr.bench.linear`` needs torch only (and triton where there is a GPU); ``dampr bench`` prints the same as a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

import dampr
from dampr.bench import records, timing, verify
from dampr.bench.competitors import UnfusedLinear

CPU_SHAPES = ((16, 64, 64), (64, 1024, 1024), (256, 1024, 1024))
CUDA_SHAPES = ((256, 4096, 4096), (8192, 4096, 4096))
CASES = tuple((granularity, per_sample) for per_sample in (False, True) for granularity in ("output", "input"))


@dataclass(frozen=True)
class Point:
    """One measured point; times in seconds per forward + backward."""

    case: str
    shape: tuple[int, int, int]
    dtype: str
    device: str
    provider: str
    median: float
    low: float
    high: float
    peak_bytes: int | None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(shapes: Iterable[tuple[int, int, int]] | None = None, *, compiled: bool = True, rounds: int = 20) -> list[Point]:
    """Time every case at every (M, K, N): CUDA (bf16 autocast) where there is one, else CPU float32; forward + backward, no penalty."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    points = []
    for shape in shapes or (CUDA_SHAPES if device == "cuda" else CPU_SHAPES):
        for granularity, per_sample in CASES:
            points += _case(shape, granularity, per_sample, device, compiled, rounds)
    return points


def _case(shape: tuple[int, int, int], granularity: str, per_sample: bool, device: str, compiled: bool, rounds: int) -> list[Point]:
    m, k, n = shape
    torch.manual_seed(0)
    unfused = UnfusedLinear(k, n, granularity=granularity, per_sample=per_sample)
    layers: dict[str, nn.Module] = {
        "dense": nn.Linear(k, n),
        "dampr": dampr.nn.GatedLinear(k, n, granularity=granularity, per_sample=per_sample),
        "eager unfused": unfused,
    }
    errors = {}
    if compiled:
        layers["compiled unfused"] = cast(nn.Module, torch.compile(unfused))
    steps = {
        name: _step(layer.to(device), torch.randn(m, k, device=device), torch.randn(m, n, device=device)) for name, layer in layers.items()
    }
    for name in list(steps):
        try:
            steps[name]()
        except Exception as error:  # a competitor that cannot run here is reported, not hidden
            if name in ("dense", "dampr"):
                raise
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del steps[name]
    times = timing.interleaved(steps, rounds=rounds, cuda=device == "cuda")
    case = f"{'per sample' if per_sample else 'per batch'}, {granularity} gates"
    common = (case, shape, "bfloat16 autocast" if device == "cuda" else "float32", device)
    points = [Point(*common, name, t.median, t.low, t.high, _peak(steps[name], device)) for name, t in times.items()]
    return points + [Point(*common, name, float("nan"), float("nan"), float("nan"), None, why) for name, why in errors.items()]


def _step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    x.requires_grad_()
    parameters = list(layer.parameters())

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            y = layer(x)
        y.backward(dy.to(y.dtype))
        x.grad = None
        for p in parameters:
            p.grad = None

    return step


def _peak(step: Callable[[], None], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def table(points: list[Point], verified: bool) -> list[tuple[str, ...]]:
    """Rows of text, a header first: medians, spreads, and ratios to the dense layer, which are withheld unless ``verified``."""
    rows: list[tuple[str, ...]] = [("M, K, N", "case", "provider", "median ms", "spread", "x dense")]
    dense = {(p.shape, p.case): p.median for p in points if p.provider == "dense"}
    for p in points:
        if p.error:
            rows.append((str(p.shape), p.case, p.provider, "did not run", "", p.error))
            continue
        ratio = f"{p.median / dense[p.shape, p.case]:.2f}" if verified else "withheld: verification failed"
        rows.append((str(p.shape), p.case, p.provider, f"{p.median * 1e3:.3f}", f"{(p.high - p.low) / p.median:.0%}", ratio))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Verify gated_linear, then time it; print a plain table; 1 when verification failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write points and environment to this file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled competitor out")
    arguments = parser.parse_args(argv)
    verified = all(row.ok for row in verify.run("gated_linear"))
    points = run(compiled=not arguments.no_compile, rounds=arguments.rounds)
    for row in table(points, verified):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (18, 26, 17, 12, 7, 8), strict=True)).rstrip())
    if arguments.json:
        payload = {"environment": records.environment(), "verified": verified, "points": [p.as_dict() for p in points]}
        records.write_json(arguments.json, payload)
    return 0 if verified else 1


if __name__ == "__main__":
    sys.exit(main())
