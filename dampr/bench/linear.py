"""Time GatedLinear, forward and backward, against a dense layer, unfused gates (eager and compiled) and captum's layer.

The competitors take turns in each round. ``python -m dampr.bench.linear`` needs torch only (and triton on a GPU);
``dampr bench`` prints the same as a table, and ``python -m benchmarks.run`` runs the full suite.
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
    """A case to time: a layer with gates of one granularity, or only the pass that multiplies its weight by gates.

    Attributes:
        shape: (M, K, N) for x (M, K) and weight (N, K).
        granularity: what one gate multiplies.
        per_sample: whether each row has a draw.
        weight_pass: only draw the gates and multiply the weight, forward; x has no rows.
    """

    shape: tuple[int, int, int]  # (M, K, N)
    granularity: names.Granularity | tuple[int, int]
    per_sample: bool = False
    weight_pass: bool = False  # draw and multiply only, forward; x has no rows

    def __str__(self) -> str:
        how = "draw and multiply" if self.weight_pass else "per sample" if self.per_sample else "per batch"
        return f"{how}, {self.granularity} gates"


def _vectors(*shapes: tuple[int, int, int]) -> list[Case]:
    """Cases with output and input gates, with a draw per batch and per sample, for these shapes."""
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
RATED = ("dampr", COMPILED)  # the providers whose times are divided by those of every other one, round by round
DTYPES = {"cpu": "float32", "cuda": "bfloat16 autocast"}
Step = Callable[[], object]


@dataclass(frozen=True)
class Point:
    """One measured point; times in seconds per call, memory in bytes.

    Attributes:
        case, dtype, device, provider: what was measured, and whose.
        shape: (M, K, N) of a linear layer, (B, C, H, W, N, kernel, stride) of a convolution, the shape of the input of
            a network.
        median, low, high: the median and the quartiles of the time.
        peak_bytes: the memory of one step beyond what was allocated before it (CUDA only).
        route: the route of a layer of dampr.
        error: why it could not run.
        kept_bytes: what the forward keeps for the backward, without parameters and input; None without a backward.
        ratios: for the points in :data:`RATED`, other provider -> (median, low, high) of the ratio of times, round by
            round, with a 95 % interval (:meth:`dampr.bench.timing.Timing.relative_to`).
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
    """Time every case: on CUDA (bf16 autocast) if there is a GPU, else on the CPU in float32. A step has no penalty.

    Raises: ValueError unless ``rounds`` is a positive integer.
    """
    rounds = _checks.positive_int("rounds", rounds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = QUICK[device] if cases is None else list(cases)
    return [
        point for case in _progress.track(chosen, "bench", delay=0) for point in measure(case, device, compiled, rounds)
    ]


def measure(case: Case, device: str, compiled: bool, rounds: int) -> list[Point]:
    """The points of one case, one for each competitor; one that cannot run here has its error in the point."""
    torch.manual_seed(0)
    if compiled:
        torch._dynamo.reset()  # otherwise dynamo makes sizes dynamic from the second shape on
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
    """The points of competing steps; ``routes``: provider -> its route, for those that have one."""
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
    """name -> a function that builds what a competitor does once. Building may fail, or take long."""
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
    if products is not None and products.by_onednn(m, n, k, x.dtype):  # to measure the choice of a library alone
        made[TORCH_PRODUCTS] = lambda: TorchProducts(layers["dampr"](), x, dy)
    return made


def _built_step(layer: Callable[[], nn.Module], x: Tensor, dy: Tensor) -> Step:
    """The training step of the layer that ``layer()`` builds."""
    return TrainingStep(layer().to(x.device), x, dy)


class TrainingStep:
    """Forward and backward with gradients for x and every parameter; bf16 autocast on CUDA.

    layer: the layer; x: its input; dy: the gradient of its output.
    """

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.layer, self.x, self.dy = layer, x.clone().requires_grad_(), dy
        self.leaves = [self.x, *layer.parameters()]

    def __call__(self) -> None:
        y = self.forward()
        y.backward(self.dy.to(y.dtype))
        for leaf in self.leaves:
            leaf.grad = None

    def forward(self) -> Tensor:
        """The output of the layer on x, in bfloat16 autocast on a GPU."""
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.x.is_cuda):
            y: Tensor = self.layer(self.x)
        return y

    def kept_bytes(self) -> int:
        """The bytes that the forward keeps for the backward, each block of memory once, without parameters, buffers
        and x.
        """
        there_anyway = {t.untyped_storage().data_ptr() for t in (*self.leaves, *self.layer.buffers())}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            """Saved-tensor hook that notes the memory of a tensor."""
            storage = t.untyped_storage()
            if storage.data_ptr() not in there_anyway:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.forward()  # kept alive, because freed memory could be used, and counted, a second time
        del y
        return sum(kept.values())


class TorchProducts(TrainingStep):
    """The step without oneDNN: torch computes the matrix products that dampr would give to oneDNN, as for all
    competitors.
    """

    def __call__(self) -> None:
        # the same as torch.backends.mkldnn.flags, without its warnings
        torch._C._set_mkldnn_enabled(False)  # type: ignore[attr-defined]
        try:
            super().__call__()
        finally:
            torch._C._set_mkldnn_enabled(True)  # type: ignore[attr-defined]


def _weight_pass(case: Case, device: str, compiled: bool) -> dict[str, Callable[[], Step]]:
    """The competitors for W (N, K) times gates in the dtype of the product. A layer with an input of no rows does only
    that.
    """
    _, k, n = case.shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = dampr.nn.GatedLinear(k, n, bias=False, granularity=case.granularity).to(device)
    weight, log_alpha = layer.weight.detach(), layer.gate.parameter.detach().view(n, k)
    empty = torch.empty(0, k, device=device)

    def unfused(weight: Tensor, log_alpha: Tensor) -> Tensor:
        """The weight times its gates, operator by operator."""
        return (weight * unfused_gate(log_alpha)).to(dtype)

    def gated() -> Tensor:
        """The weight times its gates by dampr: the forward of a layer on an input without rows."""
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
    """The peak of the memory that a step allocates, in bytes; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _kept(step: Step) -> int | None:
    """What the forward of a step keeps for its backward, in bytes; None if it is not a training step."""
    return step.kept_bytes() if isinstance(step, TrainingStep) else None


MEMORY_COLUMNS = {"kept for backward": "kept_bytes", "peak": "peak_bytes"}


def table(points: list[Point], verified: bool) -> list[tuple[str, ...]]:
    """The rows of a table as text, with a header: medians, spreads, ratios to the floor of the case, and memory.

    The floor is the dense layer, or a copy. Ratios are withheld unless ``verified``. A column of memory that no point
    has a number for is left out.
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
    """A size in words with three digits, in powers of ten: 4194304 -> "4.19 MB"; "" for None."""
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
    """Verify the linear operators, then time them and print a table; returns 1 if verification failed."""
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
    """The content of a results file: environment, points, and whether the operators passed verification in the same
    run.
    """
    return {"environment": records.environment(), "verified": verified, "points": [p.as_dict() for p in points]}


if __name__ == "__main__":
    sys.exit(main())
