"""The cases that ``make emulate`` runs, in units: a unit is a set of cases of one op in one dtype.

The set "verify" has the cases that ``dampr verify`` runs on a GPU, with the same random numbers. The set "core" forces
every route, with sizes that are no multiples of tiles, with views, and with inputs under autocast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from dampr import functional, ops
from dampr.testing import Comparison, compare, poisoned_empty, verify, verify_conv, verify_linear, verify_norm
from tests.emulator import driver

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = ("float32", verify.TF32, "bfloat16", "float16")
CORE_SHAPES = ((5, 7, 3), (1, 129, 65), (33, 16, 32), (127, 257, 63), (70, 80, 112), (130, 144, 272))  # (M, K, N)
NORM_SHAPES = {(5, 7), (130, 65), (3, 5, 17), (3, 7, 5, 3), (2, 64, 16, 16), (1, 3, 33, 29), (33, 20)}
ROUTED = {"weight": ("fold", "small_m"), True: ("one_pass", "passes"), False: ("fold", "live")}
OWN = "own choice"


@dataclasses.dataclass(frozen=True)
class Unit:
    """The cases of one op in one dtype; ``set`` is "verify" or "core"."""

    op: str
    dtype: str
    set: str

    def __str__(self) -> str:
        return f"{self.set}/{self.op}/{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = torch.float32 if self.dtype == verify.TF32 else getattr(torch, self.dtype)
        return found


def units() -> list[Unit]:
    """Every unit there is; those that take longest to emulate come last."""
    found = [Unit("autocast", dtype, "core") for dtype in DTYPES[2:]]
    for name, op, dtype in itertools.product(("core", "verify"), verify._OPS, DTYPES):
        unit = Unit(op, dtype, name)
        possible = verify._applies(op, "triton", "cuda", unit.torch_dtype)
        if dtype == verify.TF32:  # with gates on weights, only a forced route multiplies float32 in a kernel
            possible = op in (verify._PRODUCTS if name == "core" else ("gated_linear", "gated_conv2d"))
        if possible and (name == "verify" or op in _CORE):
            found.append(unit)
    return sorted(found, key=lambda unit: (unit.set, unit.op) == ("verify", "gated_linear"))


@dataclasses.dataclass
class Route(verify.Row):
    """The results of the cases of one route, with the faults that the emulator noted in them and the largest shared
    memory, in bytes, of their kernels.
    """

    faults: list[str] = dataclasses.field(default_factory=list)
    shared: int = 0


@dataclasses.dataclass
class ByRoute(verify.Row):
    """A row of results that keeps a row for each route besides.

    Launches since the last comparison are counted as those of the next comparison's case.
    """

    routes: dict[str, Route] = dataclasses.field(default_factory=dict)

    def add(self, case: str, result: Comparison) -> None:
        super().add(case, result)
        name = case.partition(", route ")[2].partition(":")[0] or OWN
        route = self.routes.setdefault(name, Route(self.op, self.backend, self.device, self.dtype))
        route.add(case, result)
        launched = driver.current().take_log()
        route.faults += [fault for fault in launched.faults if fault not in route.faults]
        route.shared = max(route.shared, *launched.shared.values(), 0)


def run(unit: Unit) -> ByRoute:
    """The results of a unit. The caller has to turn on the emulation around the call."""
    with contextlib.ExitStack() as stack:
        for patch in _as_on_a_gpu() if unit.set == "verify" else _CORE[unit.op](unit):
            stack.enter_context(patch)
        stack.enter_context(poisoned_empty())
        if unit.op == "autocast":
            return _autocast(ByRoute(unit.op, "triton", "cpu", unit.dtype), unit.torch_dtype)
        tf32 = unit.dtype == verify.TF32
        row = verify.verify_op(unit.op, "triton", "cpu", unit.torch_dtype, tf32, ByRoute)
        assert isinstance(row, ByRoute)
        return row


def _as_on_a_gpu() -> list[Any]:
    """Patches that make verify run the cases of CUDA, though the tensors lie on the CPU."""
    linear, conv = verify_linear.linear_cases, verify_conv.cases
    return [
        mock.patch.object(verify_linear, "linear_cases", return_value=linear("cuda")),
        mock.patch.object(verify_conv, "cases", return_value=list(conv("triton", "cuda"))),
    ]


def linear_cases(op: str) -> list[verify_linear.LinearCase]:
    """The core set of linear maps: edges, tiles, blocks, views, splits of a long K."""
    case = verify_linear.LinearCase
    found = [
        case(shape, gates, each)
        for shape in CORE_SHAPES
        for gates, each in (("both", True), ("both", False), ("weight", False))
    ]
    found += [case((70, 80, 112), gates, each) for gates in ("input", "output") for each in (False, True)]
    found += [case((37, 24, 20), block) for block in ((4, 4), (3, 5), (64, 1))]
    for layout in ("transposed", "sliced", "offset"):
        ways = (("both", False), ("both", True), ("weight", False))
        found += [
            case((37, 24, 20), gates, each, layout=layout, expanded_dy=layout == "sliced") for gates, each in ways
        ]
    found += [case((16, 64, 48), "weight"), case((3, 640, 32), "weight")]
    return [c for c in found if c.op == op]


def linear_routes(case: verify_linear.LinearCase) -> tuple[str | None, ...]:
    """Every route that can serve a case."""
    if case.gates == "weight":
        return ROUTED["weight"]
    return ROUTED[case.per_sample] if case.op == "gated_linear" else (None,)


def norm_cases() -> list[verify_norm.NormCase]:
    """The core set of norms: training on a few shapes, and a third of the other settings on one shape."""
    every = verify_norm.norm_cases()
    return [c for c in every if c.shape in NORM_SHAPES and c.training] + [c for c in every if c.shape == (3, 20, 5, 7)][
        ::3
    ]


def conv_cases() -> list[verify_conv.ConvCase]:
    """The core set of convolutions: channels that fill tiles exactly, tiles in part, and few; with the routes of a
    GPU.
    """
    shapes = (2, 64, 9, 7, 48, 3), (1, 128, 12, 12, 144, 3), (3, 20, 6, 5, 33, 3)
    case = verify_conv.ConvCase
    around, few = {"padding": 1}, shapes[2]
    found = [case(shape, gates, False, True, around, "live") for shape in shapes for gates in ("input", "both")]
    found += [
        case(few, "both", False, False, around),
        case(few, "both", True, False, around),
        case(few, "weight", False, False, around),
    ]
    found += [case(few, "both", False, last, around, "fold") for last in (False, True)]
    found += [
        case(few, "both", True, True, around, "passes"),
        case((2, 16, 5, 4, 32, 1), "both", False, True, {}, "linear"),
    ]
    return found


def _core_linear(unit: Unit) -> list[Any]:
    """Patches that make verify run the core set of a linear op over all of its routes."""
    return [
        mock.patch.object(verify_linear, "linear_cases", return_value=linear_cases(unit.op)),
        mock.patch.object(verify_linear, "_routes", side_effect=lambda backend, case: linear_routes(case)),
    ]


_CORE: dict[str, Callable[[Unit], list[Any]]] = {
    "gated_linear": _core_linear,
    "weight_gated_linear": _core_linear,
    "norm_gate": lambda unit: [mock.patch.object(verify_norm, "norm_cases", return_value=norm_cases())],
    "gated_conv2d": lambda unit: [mock.patch.object(verify_conv, "cases", return_value=conv_cases())],
    "autocast": lambda unit: [],
}


def _autocast_cases() -> Iterator[tuple[tuple[int, int, int], str, bool, str]]:
    """(shape (M, K, N), gates, per_sample, route) of each case under autocast."""
    for gates, each in (("input", False), ("output", True), ("both", False), ("both", True), ("weight", False)):
        case = verify_linear.LinearCase((37, 48, 33), gates, each)
        for route in linear_routes(case):
            yield case.shape, gates, each, str(route)


def _autocast(row: ByRoute, dtype: torch.dtype) -> ByRoute:
    """Compare float32 layers that compute in half precision with the float64 reference; values and gradients must be
    within the same bounds as those of half-precision layers.
    """
    generator = torch.Generator().manual_seed(6)
    for shape, gates, each, route in _autocast_cases():
        case = verify_linear.LinearCase(shape, gates, each)
        m, k, n = shape
        sizes = {"x": (m, k), "weight": (n, k), "bias": (n,)}
        sizes |= {f"{end}_gate": (size,) for end, size in (("input", k), ("output", n)) if gates in (end, "both")}
        sizes |= {"weight_gate": (n * k,)} if gates == "weight" else {}
        data = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        data["weight"] /= k**0.5
        dy, seed = torch.randn(m, n, generator=generator).to(dtype), torch.randint(0, 2**62, (1,), generator=generator)
        truth = verify_linear.linear_once(None, torch.float64, "cpu", case, data, dy, seed)
        baseline = verify_linear.linear_once(None, dtype, "cpu", case, data, dy, seed)
        leaves = {name: t.clone().requires_grad_() for name, t in data.items()}
        with ops.backend("triton"), ops.forced_route(route), torch.autocast("cpu", dtype):
            y = functional.gated_linear(**leaves, seed=seed, per_sample=each)  # type: ignore[arg-type]
            y.backward(dy)
        out = {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}
        for name, o in out.items():
            assert o is not None
            row.add(f"{case}, autocast, route {route}: {name}", compare(name, o, truth[name], baseline[name], dtype))
    return row
