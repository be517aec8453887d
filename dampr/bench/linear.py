"""GatedLinear against dense, eager unfused, torch.compile'd unfused and captum's layers, interleaved, forward +
backward.

``python -m dampr.bench.linear`` needs torch only (and triton where there is a GPU); ``dampr bench`` prints the same as
a table, and ``python -m benchmarks.run`` runs the full suite.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import dampr
from dampr import _checks, _progress, names, records
from dampr.bench import timing
from dampr.bench.competitors import CaptumLinear, UnfusedLinear, unfused_gate
from dampr.nn.explain import route_of
from dampr.testing import verify


@dataclass(frozen=True)
class Case:
    """What is timed: a layer with gates of one granularity on x (M, K) and weight (N, K),
    or only the pass that gates its weight.
    """

    shape: tuple[int, int, int]  # (M, K, N)
    granularity: names.Granularity | tuple[int, int]
    per_sample: bool = False
    weight_pass: bool = False  # draw and multiply only, forward; x has no rows

    def __str__(self) -> str:
        how = "draw and multiply" if self.weight_pass else "per sample" if self.per_sample else "per batch"
        return f"{how}, {self.granularity} gates"


def _vectors(*shapes: tuple[int, int, int]) -> list[Case]:
    return [Case(shape, where, each) for shape in shapes for each in (False, True) for where in ("output", "input")]


QUICK = {
    "cpu": [
        *_vectors((16, 64, 64), (256, 1024, 1024)),
        Case((64, 1024, 1024), "weight"),
        Case((64, 1024, 1024), (16, 16)),
    ],
    "cuda": [*_vectors((8192, 4096, 4096)), Case((8192, 4096, 4096), "weight"), Case((8192, 4096, 4096), (16, 16))],
}


COMPILED, TORCH_PRODUCTS = "dampr, compiled", "dampr, torch's products"
RATED = ("dampr", COMPILED)  # providers that are compared with each other one round by round
DTYPES = {"cpu": "float32", "cuda": "bfloat16 autocast"}
Step = Callable[[], object]


@dataclass(frozen=True)
class Point:
    """One measured point; times in seconds per call, memory in bytes.

    ``shape``: (M, K, N) of a linear layer, (B, C, H, W, N, kernel, stride) of a convolution, that of the input of a
    network.

    ``peak_bytes``: of one step, beyond what was allocated before it (CUDA only). ``kept_bytes``: what the forward keeps
    for the backward, beyond parameters and the input (None where there is no backward). ``ratios``, of dampr's points:
    (median, low, high) of the time relative to each other provider, round by round, with its 95 % interval
    (:meth:`dampr.bench.timing.Timing.relative_to`).
    """

    case: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    provider: str
    median: float
    low: float
    high: float
    peak_bytes: int | None
    route: str | None = None
    error: str | None = None
    kept_bytes: int | None = None
    ratios: dict[str, tuple[float, float, float]] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(cases: Iterable[Case] | None = None, *, compiled: bool = True, rounds: int = 20) -> list[Point]:
    """Time every case: CUDA (bf16 autocast) where there is one, else CPU float32. The penalty is not part of a step.

    Raises ValueError unless ``rounds`` is a positive integer.
    """
    rounds = _checks.positive_int("rounds", rounds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = QUICK[device] if cases is None else list(cases)
    return [
        point for case in _progress.track(chosen, "bench", delay=0) for point in measure(case, device, compiled, rounds)
    ]


def measure(case: Case, device: str, compiled: bool, rounds: int) -> list[Point]:
    """The points of one case, one for each competitor; one that cannot run here is reported with its error,
    not hidden.
    """
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
    points = time_steps(str(case), case.shape, device, steps, rounds, {"dampr": case_route(case, device)})
    nan, common = float("nan"), (str(case), case.shape, DTYPES[device], device)
    return points + [Point(*common, name, nan, nan, nan, None, error=why) for name, why in errors.items()]


def case_route(case: Case, device: str) -> str:
    """The route that a step of the case takes."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return route_of(case.shape, case.granularity, case.per_sample, torch.device(device), dtype).route


def time_steps(
    case: str, shape: tuple[int, ...], device: str, steps: Mapping[str, Step], rounds: int, routes: Mapping[str, str]
) -> list[Point]:
    """The points of competing steps, named by their providers; ``routes`` holds the routes of those that have one."""
    times = timing.interleaved(steps, rounds=rounds, cuda=device == "cuda")
    return [
        Point(
            *(case, shape, DTYPES[device], device, name, t.median, t.low, t.high),
            peak_bytes=_peak(steps[name], device),
            route=routes.get(name),
            kept_bytes=_kept(steps[name]),
            ratios={other: t.relative_to(o) for other, o in times.items() if other != name} if name in RATED else None,
        )
        for name, t in times.items()
    ]


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
    made: dict[str, Callable[[], Step]] = {name: partial(_built_step, layer, x, dy) for name, layer in layers.items()}
    products = getattr(dampr.ops.select(x.device, x.dtype), "products", None)
    if products is not None and products.by_onednn(m, n, k, x.dtype):  # what the choice of a library alone is worth
        made[TORCH_PRODUCTS] = lambda: TorchProducts(layers["dampr"](), x, dy)
    return made


def _built_step(layer: Callable[[], nn.Module], x: Tensor, dy: Tensor) -> Step:
    return TrainingStep(layer().to(x.device), x, dy)


class TrainingStep:
    """Forward and backward with gradients for x and every parameter; bf16 autocast on CUDA."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.layer, self.x, self.dy = layer, x.clone().requires_grad_(), dy
        self.leaves = [self.x, *layer.parameters()]

    def __call__(self) -> None:
        y = self.forward()
        y.backward(self.dy.to(y.dtype))
        for leaf in self.leaves:
            leaf.grad = None

    def forward(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.x.is_cuda):
            y: Tensor = self.layer(self.x)
        return y

    def kept_bytes(self) -> int:
        """Bytes of memory that the forward keeps for the backward: each piece once, parameters,
        buffers and x left out.
        """
        there_anyway = {t.untyped_storage().data_ptr() for t in (*self.leaves, *self.layer.buffers())}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in there_anyway:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.forward()  # held until the end: memory that is given back could be counted twice
        del y
        return sum(kept.values())


class TorchProducts(TrainingStep):
    """The same without oneDNN: matrix products that dampr would have it compute are torch's,
    as those of every other contender are.
    """

    def __call__(self) -> None:
        # as torch.backends.mkldnn.flags does, which warns of other things
        torch._C._set_mkldnn_enabled(False)  # type: ignore[attr-defined]
        try:
            super().__call__()
        finally:
            torch._C._set_mkldnn_enabled(True)  # type: ignore[attr-defined]


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
        with (
            torch.no_grad(),
            torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
            dampr.ops.forced_route("fold"),
        ):
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


def _kept(step: Step) -> int | None:
    return step.kept_bytes() if isinstance(step, TrainingStep) else None


MEMORY_COLUMNS = {"kept for backward": "kept_bytes", "peak": "peak_bytes"}


def table(points: list[Point], verified: bool) -> list[tuple[str, ...]]:
    """Rows of text, a header first: medians, spreads, ratios to the floor of the case, which are withheld unless
    ``verified``, and memory.

    A column of memory that no point has a number for is left out.
    """
    memory = {
        column: field for column, field in MEMORY_COLUMNS.items() if any(getattr(p, field) is not None for p in points)
    }
    rows: list[tuple[str, ...]] = [
        (
            "M, K, N" if all(len(p.shape) == 3 for p in points) else "shape",
            "case",
            "provider",
            "median ms",
            "spread",
            "x floor",
            *memory,
        )
    ]
    floor = {(p.shape, p.case): p.median for p in points if p.provider in ("dense", "copy")}
    for p in points:
        name = f"{p.provider} ({p.route})" if p.route else p.provider
        sizes = [size_text(getattr(p, field)) for field in memory.values()]
        if p.error:
            rows.append((str(p.shape), p.case, name, "did not run", "", p.error, *sizes))
            continue
        ratio = f"{p.median / floor[p.shape, p.case]:.2f}" if verified else "withheld: verification failed"
        rows.append(
            (str(p.shape), p.case, name, f"{p.median * 1e3:.3f}", f"{(p.high - p.low) / p.median:.0%}", ratio, *sizes)
        )
    return rows


def size_text(size: int | None) -> str:
    """4194304 -> "4.19 MB", in powers of ten and three digits; nothing for None."""
    if size is None:
        return ""
    scale, unit = next(
        (s, unit) for s, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "B")) if size >= 0.9995 * s or s == 1
    )
    return f"{size / scale:.3g} {unit}"


def aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """The rows of a table as lines, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Verify the linear ops, then time them; print a plain table; 1 when verification failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write points and environment to this file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled competitor out")
    arguments = parser.parse_args(argv)
    verified = verify.passes("gated_linear", "weight_gated_linear")
    points = run(compiled=not arguments.no_compile, rounds=arguments.rounds)
    print(*aligned(table(points, verified)), sep="\n")
    if arguments.json:
        records.write_json(arguments.json, payload(points, verified))
    return 0 if verified else 1


def payload(points: list[Point], verified: bool) -> dict[str, Any]:
    """What a results file holds: environment, points, and whether the ops passed verification in the same run."""
    return {"environment": records.environment(), "verified": verified, "points": [p.as_dict() for p in points]}


if __name__ == "__main__":
    sys.exit(main())
