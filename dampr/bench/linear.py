"""GatedLinear against dense, eager unfused, torch.compile'd unfused and captum's layers, interleaved, forward + backward.

``python -m dampr.bench.linear`` needs torch only (and triton where there is a GPU); ``dampr bench`` prints the same as a table, and
``python -m benchmarks.run`` runs the full suite.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import dampr
from dampr.bench import records, timing, verify
from dampr.bench.competitors import CaptumLinear, UnfusedLinear, unfused_gate
from dampr.nn.explain import route_of


@dataclass(frozen=True)
class Case:
    """What is timed: a layer with gates of one granularity on x (M, K) and weight (N, K), or only the pass that gates its weight."""

    shape: tuple[int, int, int]  # (M, K, N)
    granularity: str | tuple[int, int]
    per_sample: bool = False
    weight_pass: bool = False  # draw and multiply only, forward; x has no rows

    def __str__(self) -> str:
        how = "draw and multiply" if self.weight_pass else "per sample" if self.per_sample else "per batch"
        return f"{how}, {self.granularity} gates"


def _vectors(*shapes: tuple[int, int, int]) -> list[Case]:
    return [Case(shape, where, each) for shape in shapes for each in (False, True) for where in ("output", "input")]


QUICK = {
    "cpu": [*_vectors((16, 64, 64), (256, 1024, 1024)), Case((64, 1024, 1024), "weight"), Case((64, 1024, 1024), (16, 16))],
    "cuda": [*_vectors((8192, 4096, 4096)), Case((8192, 4096, 4096), "weight"), Case((8192, 4096, 4096), (16, 16))],
}


@dataclass(frozen=True)
class Point:
    """One measured point; times in seconds per call, ``peak_bytes`` of one step beyond what was allocated before it (CUDA only)."""

    case: str
    shape: tuple[int, int, int]
    dtype: str
    device: str
    provider: str
    median: float
    low: float
    high: float
    peak_bytes: int | None
    route: str | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(cases: Iterable[Case] | None = None, *, compiled: bool = True, rounds: int = 20) -> list[Point]:
    """Time every case: CUDA (bf16 autocast) where there is one, else CPU float32. The penalty is not part of a step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [point for case in (QUICK[device] if cases is None else cases) for point in measure(case, device, compiled, rounds)]


def measure(case: Case, device: str, compiled: bool, rounds: int) -> list[Point]:
    """The points of one case, one for each competitor; one that cannot run here is reported with its error, not hidden."""
    torch.manual_seed(0)
    if compiled:
        torch._dynamo.reset()  # else the competitor is traced with dynamic sizes from the second shape on
    steps, errors = {}, {}
    for name, build in providers(case, device, compiled).items():
        try:
            steps[name] = build()
            steps[name]()
        except Exception as error:
            if name in ("dense", "copy", "dampr"):
                raise
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            steps.pop(name, None)
    times = timing.interleaved(steps, rounds=rounds, cuda=device == "cuda")
    common = (str(case), case.shape, "bfloat16 autocast" if device == "cuda" else "float32", device)
    route = route_of(case.shape, case.granularity, case.per_sample, torch.device(device)).route
    points = [
        Point(*common, name, t.median, t.low, t.high, _peak(steps[name], device), route if name == "dampr" else None)
        for name, t in times.items()
    ]
    nan = float("nan")
    return points + [Point(*common, name, nan, nan, nan, None, error=why) for name, why in errors.items()]


Step = Callable[[], object]


def providers(case: Case, device: str, compiled: bool) -> dict[str, Callable[[], Step]]:
    """What each competitor of a case does once, by name; made when called, because that may fail or take long."""
    if case.weight_pass:
        return _weight_pass(case, device, compiled)
    m, k, n = case.shape
    x, dy = torch.randn(m, k, device=device), torch.randn(m, n, device=device)
    how: dict[str, Any] = {"granularity": case.granularity, "per_sample": case.per_sample}
    layers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: nn.Linear(k, n),
        "dampr": lambda: dampr.nn.GatedLinear(k, n, **how),
        "eager unfused": lambda: UnfusedLinear(k, n, **how),
    }
    if compiled:
        layers["compiled unfused"] = lambda: cast(nn.Module, torch.compile(UnfusedLinear(k, n, **how), dynamic=False))
    if case.per_sample and case.granularity == "input":
        layers["captum"] = lambda: CaptumLinear(k, n)
    return {name: partial(_built_step, layer, x, dy) for name, layer in layers.items()}


def _built_step(layer: Callable[[], nn.Module], x: Tensor, dy: Tensor) -> Step:
    return training_step(layer().to(x.device), x, dy)


def training_step(layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Forward and backward with gradients for x and every parameter; bf16 autocast on CUDA."""
    x = x.clone().requires_grad_()
    parameters = list(layer.parameters())

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            y = layer(x)
        y.backward(dy.to(y.dtype))
        x.grad = None
        for p in parameters:
            p.grad = None

    return step


def _weight_pass(case: Case, device: str, compiled: bool) -> dict[str, Callable[[], Step]]:
    """W (N, K) times gates, written in the dtype of the product; a layer that is given no rows does nothing else."""
    _, k, n = case.shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = dampr.nn.GatedLinear(k, n, bias=False, granularity=case.granularity).to(device)
    weight, log_alpha = layer.weight.detach(), layer.gate.parameter.detach().view(n, k)
    empty = torch.empty(0, k, device=device)

    def unfused(weight: Tensor, log_alpha: Tensor) -> Tensor:
        return (weight * unfused_gate(log_alpha)).to(dtype)

    def gated() -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), dampr.ops.forced_route("fold"):
            result: Tensor = layer(empty)
            return result

    providers: dict[str, Callable[[], Step]] = {
        "copy": lambda: lambda: weight.to(dtype, copy=True),
        "dampr": lambda: gated,
        "eager unfused": lambda: lambda: unfused(weight, log_alpha),
    }
    if compiled:
        fast = torch.compile(unfused, dynamic=False)
        providers["compiled unfused"] = lambda: lambda: fast(weight, log_alpha)
    return providers


def _peak(step: Step, device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def table(points: list[Point], verified: bool) -> list[tuple[str, ...]]:
    """Rows of text, a header first: medians, spreads, and ratios to the floor of the case, which are withheld unless ``verified``."""
    rows: list[tuple[str, ...]] = [("M, K, N", "case", "provider", "median ms", "spread", "x floor")]
    floor = {(p.shape, p.case): p.median for p in points if p.provider in ("dense", "copy")}
    for p in points:
        name = f"{p.provider} ({p.route})" if p.route else p.provider
        if p.error:
            rows.append((str(p.shape), p.case, name, "did not run", "", p.error))
            continue
        ratio = f"{p.median / floor[p.shape, p.case]:.2f}" if verified else "withheld: verification failed"
        rows.append((str(p.shape), p.case, name, f"{p.median * 1e3:.3f}", f"{(p.high - p.low) / p.median:.0%}", ratio))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Verify the linear ops, then time them; print a plain table; 1 when verification failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write points and environment to this file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled competitor out")
    arguments = parser.parse_args(argv)
    verified = verify.passes("gated_linear", "weight_gated_linear")
    points = run(compiled=not arguments.no_compile, rounds=arguments.rounds)
    for row in table(points, verified):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (18, 34, 21, 12, 7, 8), strict=True)).rstrip())
    if arguments.json:
        records.write_json(arguments.json, payload(points, verified))
    return 0 if verified else 1


def payload(points: list[Point], verified: bool) -> dict[str, Any]:
    """What a results file holds: environment, points, and whether the ops passed verification in the same run."""
    return {"environment": records.environment(), "verified": verified, "points": [p.as_dict() for p in points]}


if __name__ == "__main__":
    sys.exit(main())
