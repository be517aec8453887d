"""Every op on every backend that is present, against the float64 reference: values, every gradient, noise, and which gates are 0 or 1.

``python -m dampr.bench.verify`` needs torch and numpy, and triton where there is a GPU; ``dampr verify`` prints the same as a table.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dampr import _checks, _progress, functional, ops, philox, reference
from dampr.bench import records, verify_conv
from dampr.spec import SHAPES, VARIANTS, GateSpec, hard_concrete, mask, ramp, value
from dampr.testing import HARD_SHAPES, TILED_SHAPES, Comparison, as_tf32, compare, layouts

# (B, C, ...) of a norm: nothing, vectors, sequences, images of one pixel, of primes, of whole tiles, of more channels than a tile. Never of
# two values per channel: those are always +1 and -1, and the gradient is zero but for eps.
NORM_SHAPES = (
    (0, 3, 4, 4),
    (5, 1),
    (5, 7),
    (130, 65),
    (3, 5, 17),
    (7, 3, 1, 1),
    (3, 7, 5, 3),
    (2, 64, 16, 16),
    (2, 130, 3, 5),
    (1, 3, 33, 29),
)

_DTYPES = {
    ("cpp", "cpu"): (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    ("reference", "cpu"): (torch.float32,),
    ("triton", "cuda"): (torch.float32, torch.bfloat16, torch.float16),
    ("triton", "cpu"): (torch.float32,),  # through the interpreter, whose bf16 dot is not to be trusted
    ("reference", "cuda"): (torch.float32, torch.bfloat16),
}


TF32 = "tf32"  # as a row's dtype: tensors of float32, their products in TF32
_PRODUCTS = ("gated_linear", "weight_gated_linear", "gated_conv2d")
_REDRAWN = 3  # how often signs are drawn again to learn the size of what is added up
PARTS = 6  # into which a row is cut where several processes verify
_SMALL = 2**16  # in problems of more elements than this not everything cancels


@dataclass
class Row:
    """One line of the table: an op on a backend in a dtype (or :data:`TF32`), over all its cases."""

    op: str
    backend: str
    device: str
    dtype: str
    cases: int = 0
    worst: Comparison | None = None
    worst_case: str = ""
    failures: list[str] = field(default_factory=list)
    part: tuple[int, int] = (0, 1)  # which of how many: every so many-th case

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def tf32(self) -> bool:
        return self.dtype == TF32

    def add(self, case: str, result: Comparison) -> None:
        self.cases += 1
        if not result.ok:
            self.failures.append(f"{case}: {result}")
        if self.worst is None or result.share > self.worst.share:
            self.worst, self.worst_case = result, case

    def has(self, index: int) -> bool:
        """Whether a case belongs to this part of a row."""
        return index % self.part[1] == self.part[0]

    def join(self, other: Row) -> None:
        """Add another part of the same row."""
        self.cases += other.cases
        self.failures += other.failures
        if self.worst is None or (other.worst is not None and other.worst.share > self.worst.share):
            self.worst, self.worst_case = other.worst, other.worst_case
        self.part = (0, 1)

    def as_dict(self) -> dict[str, Any]:
        return {**{key: value for key, value in asdict(self).items() if key != "part"}, "ok": self.ok}


def targets() -> list[tuple[str, str, torch.dtype]]:
    """(backend, device, dtype) of everything that can run here."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend in ("reference", "cpp", "triton"):
            for dtype in _DTYPES.get((backend, device), ()):
                if ops.backends.why_not(backend, torch.device(device), dtype) is None:
                    found.append((backend, device, dtype))
    return found


Job = tuple[str, str, str, torch.dtype, bool]  # op, backend, device, dtype, whether products are in TF32


def jobs(only_op: str | None = None, only_backend: str | None = None) -> list[Job]:
    """What can be verified here: an op on a backend, a device and in a dtype, and once more in TF32 where our kernels have it."""
    found = [(op, *target, False) for target in targets() for op in _OPS if only_op in (None, op) and _applies(op, *target)]
    found += [(op, "triton", "cuda", torch.float32, True) for op in _PRODUCTS if only_op in (None, op) and has_tf32()]
    return [job for job in found if only_backend in (None, job[1])]


def run(only_op: str | None = None) -> list[Row]:
    """Verify everything that can run here; a row per job."""
    return [verify_op(*job) for job in _progress.track(jobs(only_op), "verify", delay=0)]


def run_side_by_side(wanted: list[Job], processes: int, parts: int = PARTS) -> Iterator[Row]:
    """The rows of these jobs as they are done, worked at in parts by several processes: for a machine whose kernels are yet to be compiled.

    The processes have one thread each: threads of several that wait for each other on the same cores take many times as long.
    """
    _checks.positive_int("processes", processes)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows = [[pool.submit(verify_op, *job, part=(part, parts)) for part in range(parts)] for job in wanted]
        for first, *others in rows:
            row = first.result()
            for other in others:
                row.join(other.result())
            yield row


def verify_op(
    op: str,
    backend: str,
    device: str,
    dtype: torch.dtype,
    tf32: bool = False,
    row: type[Row] = Row,
    part: tuple[int, int] = (0, 1),
) -> Row:
    """One row, or a part of it. Products of float32 are in IEEE arithmetic whatever torch's switches say, or in TF32 and its bounds."""
    with float32_products(TF32 if tf32 else "ieee"):
        return _OPS[op](row(op, backend, device, TF32 if tf32 else str(dtype).removeprefix("torch."), part=part), dtype)


def has_tf32() -> bool:
    """Whether there is a GPU whose Triton kernels can multiply in TF32."""
    if ("triton", "cuda", torch.float32) not in targets() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Products of float32 matrices and convolutions on CUDA are "ieee" or "tf32" in the block. torch's default differs between the two."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]
    kept = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for switch, value in zip(switches, kept, strict=True):
            switch.fp32_precision = value


def _applies(op: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    """Whether the op takes the dtype; the noise of the reference is the definition."""
    if op == "noise":
        return dtype == torch.float32 and backend != "reference"
    return op not in ("sample_gates", "dependency_generator") or dtype in (torch.float32, torch.float64)


def passes(*names: str) -> bool:
    """Whether every backend present passes the verification of these ops."""
    return all(row.ok for name in names for row in run(name))


def _exact(name: str, out: Tensor, expected: Tensor) -> Comparison:
    """A comparison that only equality passes."""
    same = out.shape == expected.shape and bool((out.cpu() == expected.cpu()).all())
    return Comparison(name, 0.0 if same else float("inf"), 0.0, 0.0, 0.0)


def _specs() -> list[tuple[str, GateSpec]]:
    rules = [(rule, hard_concrete(rule)) for rule in ("sample", "paper", "median", "binary")]
    other = [("sample, beta 0.5, gamma -0.2, zeta 1.3", hard_concrete("sample", 0.5, -0.2, 1.3)), ("value", value())]
    ramps = [(f"ramp, {shape}", ramp(shape, 2.0)) for shape in SHAPES]
    return [*rules, *other, *ramps, *((f"mask, {variant}", mask(variant)) for variant in VARIANTS)]


def _verify_noise(row: Row, dtype: torch.dtype) -> Row:
    """Drawn gates are 0 and 1 exactly where the reference says, for random seeds and row starts that are no multiple of four."""
    generator = torch.Generator().manual_seed(0)
    for index, (rows, n) in enumerate(((None, 4096), (3, 1001), (257, 64), (5, 7), (1, 1), (0, 5))):
        seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
        log_alpha = torch.randn(n, generator=generator) * 3
        if not row.has(index):
            continue
        truth = reference.gate_values(log_alpha, hard_concrete(), seed, rows)
        with ops.backend(row.backend):
            z = functional.sample_gates(log_alpha.to(row.device), seed=seed.to(row.device), rows=rows)
        row.add(f"rows={rows}, n={n}: zeros", _exact("zeros", z == 0, truth == 0))
        row.add(f"rows={rows}, n={n}: ones", _exact("ones", z == 1, truth == 1))
    return row


def _verify_gates(row: Row, dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(1)
    problems = itertools.product(_specs(), ((None, 1), (None, 1003), (0, 5), (7, 13), (130, 64)))
    for index, ((label, spec), (rows, n)) in enumerate(problems):
        seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
        log_alpha = (torch.randn(n, generator=generator) * 3).to(dtype)
        shape = (n,) if rows is None else (rows, n)
        dz = torch.randn(shape, generator=generator).to(dtype)
        if not row.has(index):
            continue
        args = (log_alpha, seed, dz, rows, spec)
        out, truth, baseline = (
            gates_once(row.backend, dtype, row.device, *args),
            gates_once(None, torch.float64, "cpu", *args),
            gates_once(None, dtype, "cpu", *args),
        )
        case = f"{label}, rows={rows}, n={n}"
        for name, o, t, b in zip(("z", "dlog_alpha"), out, truth, baseline, strict=True):
            row.add(f"{case}: {name}", compare(name, o, t, b))
    return row


def gates_once(
    backend: str | None, dtype: torch.dtype, device: str, log_alpha: Tensor, seed: Tensor, dz: Tensor, rows: int | None, spec: GateSpec
) -> tuple[Tensor, Tensor]:
    """Gate values and the gradient of log_alpha from one backend; None: from autograd on the reference, without any op of ours."""
    leaf = log_alpha.to(device, dtype).detach().requires_grad_()
    with _running(backend):
        if backend is None:
            z = reference.gate_values(leaf, spec, seed.to(device), rows)
        else:
            z = functional.sample_gates(leaf, seed=seed.to(device), rows=rows, spec=spec)
        if z.requires_grad:  # a binary gate has no derivative
            z.backward(dz.to(device, dtype))
    return z, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _rounded(row: Row, data: dict[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the baseline of a row gets: in TF32 its factors as a tensor core reads them."""
    if not row.tf32:
        return data, dy
    return {name: as_tf32(t) if name in ("x", "weight") else t for name, t in data.items()}, as_tf32(dy)


def _other_signs(data: dict[str, Tensor], dy: Tensor, keep: tuple[str, ...] = ()) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The same problem a few times with signs drawn again, but for gates and what is named, if it is small."""
    if dy.numel() + sum(t.numel() for t in data.values()) > _SMALL:
        return
    generator = torch.Generator().manual_seed(5)

    def signed(t: Tensor) -> Tensor:
        return t * (2 * torch.randint(0, 2, t.shape, generator=generator) - 1).to(t.dtype)

    for _ in range(_REDRAWN):
        yield {name: t if name in keep or name.endswith("gate") else signed(t) for name, t in data.items()}, signed(dy)


class _Alike:
    """The truths of a problem with signs drawn again, computed when they are asked for."""

    def __init__(self, once: Callable[..., dict[str, Tensor]], data: dict[str, Tensor], dy: Tensor, keep: tuple[str, ...] = ()) -> None:
        self.once, self.problem = once, (data, dy, keep)

    @functools.cached_property
    def truths(self) -> list[dict[str, Tensor]]:
        return [self.once(*other) for other in _other_signs(*self.problem)]


def _running(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else ops.backend(backend)


@dataclass(frozen=True)
class LinearCase:
    """One gated linear map: x (M, K), weight (N, K); where its gates are, how many draws, what its memory looks like."""

    shape: tuple[int, int, int]  # (M, K, N)
    gates: str | tuple[int, int]  # "none", "input", "output", "both", "weight", or the size of a block of weights
    per_sample: bool = False
    rule: str = "sample"
    layout: str = "contiguous"
    expanded_dy: bool = False

    @property
    def op(self) -> str:
        return "gated_linear" if self.gates in ("none", "input", "output", "both") else "weight_gated_linear"

    @property
    def block(self) -> tuple[int, int]:
        return self.gates if isinstance(self.gates, tuple) else (1, 1)

    def __str__(self) -> str:
        how = [
            f"{self.shape}, gates on {self.gates}",
            "per sample" if self.per_sample else "",
            self.rule if self.rule != "sample" else "",
            f"{self.layout} x and weight" if self.layout != "contiguous" else "",
            "expanded gradient" if self.expanded_dy else "",
        ]
        return ", ".join(part for part in how if part)


def linear_cases(device: str) -> list[LinearCase]:
    """Hard shapes with every placement of gates, layouts and gradients on one shape, every rule; on CUDA also shapes of whole tiles."""
    on_vectors, on_weights = ("input", "output", "both"), ("weight", (4, 4), (3, 5), (64, 1))
    cases = [LinearCase(shape, "none") for shape in HARD_SHAPES]
    cases += [LinearCase(shape, gates, per_sample) for shape in HARD_SHAPES for gates in on_vectors for per_sample in (False, True)]
    cases += [LinearCase(shape, gates) for shape in HARD_SHAPES for gates in on_weights]
    ways: list[tuple[str | tuple[int, int], bool]] = [("both", False), ("both", True), ("weight", False), ((4, 4), False)]
    for layout, expanded, (gates, per_sample) in itertools.product(("transposed", "sliced", "offset"), (False, True), ways):
        cases.append(LinearCase((37, 24, 20), gates, per_sample, layout=layout, expanded_dy=expanded))
    cases += [
        LinearCase((9, 20, 12), gates, rule=rule)
        for gates in ("both", "weight")
        for rule in ("paper", "median", "binary", "ramp", "mask", "value")
    ]
    for shape in TILED_SHAPES if device == "cuda" else TILED_SHAPES[:1]:
        cases += [LinearCase(shape, gates, per_sample) for gates in on_vectors for per_sample in (False, True)]
        cases += [LinearCase(shape, gates) for gates in ("weight", (16, 16))]
    return cases


def linear_data(case: LinearCase, dtype: torch.dtype, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(data, dy, seed) of a case; data is rounded to ``dtype`` but for the gates."""
    seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
    m, k, n = case.shape
    block_rows, block_cols = case.block
    shapes = {
        "x": (m, k),
        "weight": (n, k),
        "bias": (n,) if n != 3 else None,
        "input_gate": (k,) if case.gates in ("input", "both") else None,
        "output_gate": (n,) if case.gates in ("output", "both") else None,
        "weight_gate": (-(n // -block_rows) * -(k // -block_cols),) if case.op == "weight_gated_linear" else None,
    }
    data = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if shape is not None}
    data["weight"] /= max(k, 1) ** 0.5
    data = {name: t if name.endswith("_gate") else t.to(dtype) for name, t in data.items()}
    dy = torch.ones((), dtype=dtype).expand(m, n) if case.expanded_dy else torch.randn(m, n, generator=generator).to(dtype)
    return data, dy, seed


def _verify_linear(row: Row, dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(2)
    for index, case in enumerate(case for case in linear_cases(row.device) if case.op == row.op):
        data, dy, seed = linear_data(case, dtype, generator)
        if not row.has(index):
            continue
        truth = linear_once(None, torch.float64, "cpu", case, data, dy, seed)
        baseline = linear_once(None, dtype, "cpu", case, *_rounded(row, data, dy), seed)

        def signed(x: dict[str, Tensor], upstream: Tensor, case: LinearCase = case, seed: Tensor = seed) -> dict[str, Tensor]:
            return linear_once(None, torch.float64, "cpu", replace(case, expanded_dy=False), x, upstream, seed)

        alike = _Alike(signed, data, dy)
        for route in _routes(row.backend, case):
            with ops.forced_route(route):
                out = linear_once(row.backend, dtype, row.device, case, data, dy, seed)
            _compare(row, str(case) if route is None else f"{case}, route {route}", out, truth, baseline, alike, dtype)
    return row


def _compare(
    row: Row,
    case: str,
    out: dict[str, Tensor],
    truth: dict[str, Tensor],
    baseline: dict[str, Tensor],
    alike: _Alike,
    dtype: torch.dtype,
) -> None:
    """Add every tensor of a case to its row. What else the signs could give is looked at where a bound is passed: it only raises bounds."""
    for name, o in out.items():
        result = compare(name, o, truth[name], baseline[name], dtype, tf32=row.tf32)
        if not result.ok:
            result = compare(name, o, truth[name], baseline[name], dtype, alike=[other[name] for other in alike.truths], tf32=row.tf32)
        row.add(f"{case}: {name}", result)


def _verify_conv(row: Row, dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(3)
    for index, case in enumerate(verify_conv.cases(row.backend, row.device)):
        data, dy, seed = verify_conv.make(case, dtype, generator)
        if not row.has(index):
            continue
        out = verify_conv.once(row.backend, dtype, row.device, case, data, dy, seed)
        truth = verify_conv.once(None, torch.float64, "cpu", case, data, dy, seed)
        baseline = verify_conv.once(None, dtype, "cpu", case, *_rounded(row, data, dy), seed)

        def signed(x: dict[str, Tensor], upstream: Tensor, case: verify_conv.ConvCase = case, seed: Tensor = seed) -> dict[str, Tensor]:
            return verify_conv.once(None, torch.float64, "cpu", case, x, upstream, seed)

        alike = _Alike(signed, data, dy)
        _compare(row, str(case), out, truth, baseline, alike, dtype)
    return row


def _routes(backend: str, case: LinearCase) -> tuple[str | None, ...]:
    """The route a case takes by itself and, in C++, where hard shapes are small layers, those of larger ones as well."""
    if backend != "cpp" or case.op != "gated_linear" or case.gates == "none":
        return (None,)
    if case.per_sample and case.rule == "sample":
        return None, "passes"
    return None, "fold", "activations", *["live"] * (case.rule not in ("mask", "value"))  # of these, closed gates have a gradient


def linear_once(
    backend: str | None, dtype: torch.dtype, device: str, case: LinearCase, data: dict[str, Tensor], dy: Tensor, seed: Tensor
) -> dict[str, Tensor]:
    """y and every gradient of one gated linear map, from the same data whatever the dtype; None: autograd on the reference."""
    leaves: dict[str, Tensor] = {}
    for name, t in data.items():
        t = t.to(device, dtype if dtype == torch.float64 or not name.endswith("_gate") else torch.float32)
        leaves[name] = (dict(layouts(t))[case.layout] if name in ("x", "weight") else t).detach().requires_grad_()
    families = {"ramp": ramp(), "mask": mask(), "value": value()}
    seed, spec = seed.to(device), families.get(case.rule) or hard_concrete(case.rule)
    with _running(backend):
        if backend is not None:
            block = {"block": case.block} if case.op == "weight_gated_linear" else {}
            y = functional.gated_linear(**leaves, **block, seed=seed, per_sample=case.per_sample, spec=spec)  # type: ignore[arg-type]
        elif case.op == "weight_gated_linear":
            y = reference.weight_gated_linear(
                leaves["x"], leaves["weight"], leaves.get("bias"), leaves["weight_gate"], seed, spec, case.block
            )
        else:
            gates = leaves.get("input_gate"), leaves.get("output_gate")
            second = seed if gates[0] is None else seed ^ philox.SECOND_STREAM
            y = reference.gated_linear(leaves["x"], leaves["weight"], leaves.get("bias"), *gates, seed, second, spec, case.per_sample)
        # Converting an expanded gradient would make it dense.
        y.backward(torch.ones((), dtype=dtype, device=device).expand(dy.shape) if case.expanded_dy else dy.to(device, dtype))
    # A binary gate has no derivative.
    return {"y": y.detach(), **{f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}}


@dataclass(frozen=True)
class NormCase:
    """One gated batch norm of x (B, C, ...): which statistics, how many draws, what follows, what its memory looks like."""

    shape: tuple[int, ...]
    training: bool = True
    per_sample: bool = True
    relu: bool = True
    rule: str = "sample"
    layout: str = "contiguous"  # "channels_last", or "sliced": every second index of the last dimension of a wider tensor
    affine: bool = True
    expanded_dy: bool = False
    mean: float = 0.0

    def __str__(self) -> str:
        how = [
            f"{self.shape}, {'training' if self.training else 'evaluation'}, per {'sample' if self.per_sample else 'batch'}",
            "ReLU" if self.relu else "",
            self.rule if self.rule != "sample" else "",
            self.layout if self.layout != "contiguous" else "",
            "" if self.affine else "no gain and bias",
            "expanded gradient" if self.expanded_dy else "",
            f"mean {self.mean}" if self.mean else "",
        ]
        return ", ".join(part for part in how if part)


def norm_cases() -> list[NormCase]:
    """Hard shapes in both modes with either draw; then layouts, rules and gradients on one shape of each kind."""
    both = (False, True)
    cases = [NormCase(shape, training, per_sample) for shape in NORM_SHAPES for training in both for per_sample in both]
    for shape in NORM_SHAPES:
        if len(shape) == 4:
            cases += [NormCase(shape, training, per_sample, layout="channels_last") for training in both for per_sample in both]
    images, vectors = (3, 20, 5, 7), (33, 20)
    for training, per_sample in itertools.product(both, both):
        for layout in ("contiguous", "channels_last", "sliced"):
            cases.append(NormCase(images, training, per_sample, layout=layout, expanded_dy=True))
            cases.append(NormCase(images, training, per_sample, relu=False, layout=layout))
        cases.append(NormCase(images, training, per_sample, affine=False))
        cases.append(NormCase(vectors, training, per_sample, relu=False))
    cases += [NormCase(images, training, True, rule=rule) for training in both for rule in ("paper", "median", "binary")]
    cases += [NormCase(images, relu=False, layout=layout, mean=100.0) for layout in ("contiguous", "channels_last")]
    return cases


NormData = tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]


def norm_data(case: NormCase, dtype: torch.dtype, generator: torch.Generator) -> NormData:
    """(data, running mean and variance, dy, seed) of a case; x and dy are rounded to ``dtype``."""
    seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
    channels = case.shape[1]
    data = {
        "x": (torch.randn(case.shape, generator=generator) + case.mean).to(dtype),
        "gate": torch.randn(channels, generator=generator),
    }
    if case.affine:
        data |= {name: torch.randn(channels, generator=generator) for name in ("weight", "bias")}
    running = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5
    dy = torch.ones((), dtype=dtype).expand(case.shape) if case.expanded_dy else torch.randn(case.shape, generator=generator).to(dtype)
    return data, running, dy, seed


def _verify_norm(row: Row, dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(3)
    for index, case in enumerate(norm_cases()):
        given = norm_data(case, dtype, generator)
        if row.has(index):
            verify_norm_case(row, case, dtype, given)
    return row


def verify_norm_case(row: Row, case: NormCase, dtype: torch.dtype, given: NormData) -> None:
    """Add one case to a row."""
    data, running, dy, seed = given
    truth, baseline = (norm_once(None, kind, "cpu", case, data, running, dy, seed) for kind in (torch.float64, dtype))

    def signed(affine: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
        return norm_once(None, torch.float64, "cpu", replace(case, expanded_dy=False), affine, running, upstream, seed)

    alike = _Alike(signed, data, dy, keep=("x",))
    out = norm_once(row.backend, dtype, row.device, case, data, running, dy, seed)
    _compare(row, str(case), out, truth, baseline, alike, dtype)


def norm_once(
    backend: str | None,
    dtype: torch.dtype,
    device: str,
    case: NormCase,
    data: dict[str, Tensor],
    running: tuple[Tensor, Tensor],
    dy: Tensor,
    seed: Tensor,
) -> dict[str, Tensor]:
    """y, every gradient and the running statistics of one gated batch norm; None: autograd through the reference."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {name: t.to(device, dtype if name == "x" else wide).detach().clone().requires_grad_() for name, t in data.items()}
    running = tuple(t.to(device, wide, copy=True) for t in running)  # type: ignore[assignment]
    x, seed, spec = leaves["x"], seed.to(device), hard_concrete(case.rule)
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif case.layout == "sliced":
        x = x.repeat_interleave(2, -1)[..., ::2]
    with _running(backend):
        if backend is not None:
            how = {"training": case.training, "per_sample": case.per_sample, "activation": "relu" if case.relu else None}
            affine = leaves.get("weight"), leaves.get("bias")
            y = functional.gated_batch_norm(x, leaves["gate"], *affine, *running, **how, seed=seed, spec=spec)  # type: ignore[arg-type]
        else:
            affine = leaves.get("weight"), leaves.get("bias")
            statistics = None if case.training else running
            per_sample = case.per_sample and case.rule == "sample"
            y = reference.norm_gate(x, *affine, leaves["gate"], seed, statistics, 1e-5, spec, per_sample, case.relu)
            if case.training:
                torch.nn.functional.batch_norm(x.detach(), *running, training=True)
        y.backward(torch.ones((), dtype=dtype, device=device).expand(dy.shape) if case.expanded_dy else dy.to(device, dtype))
    grads = {f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), **grads, "running_mean": running[0], "running_var": running[1]}


def _verify_generator(row: Row, dtype: torch.dtype) -> Row:
    """Chains of hard widths. Weights are small enough that a deep one does not multiply its rounding errors from layer to layer."""
    generator = torch.Generator().manual_seed(4)
    for index, widths in enumerate(((1, 1), (5, 7, 3), (65, 1, 129, 63), (16,) * 12, (20, 20, 50, 500), (64, 64, 128, 256))):
        shapes = [shape for before, after in itertools.pairwise(widths) for shape in ((after, before), (after,))]
        data = [torch.randn(shape, generator=generator) / (25 * shape[-1]) ** (len(shape) / 2 - 0.5) for shape in shapes]
        upstream = torch.randn(sum(widths[1:]), generator=generator)
        if not row.has(index):
            continue
        out = generator_once(row.backend, dtype, row.device, data, upstream)
        truth, baseline = (generator_once(None, kind, "cpu", data, upstream) for kind in (torch.float64, dtype))
        for name, o, t, b in zip(("values", "gradients"), out, truth, baseline, strict=True):
            row.add(f"{widths}: {name}", compare(name, o, t, b))
    return row


def generator_once(backend: str | None, dtype: torch.dtype, device: str, data: list[Tensor], upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Values and the gradients of all parameters from one backend; None: from autograd on the reference."""
    leaves, upstream = [t.to(device, dtype).detach().requires_grad_() for t in data], upstream.to(device, dtype)
    with _running(backend):
        if backend is None:
            values = torch.cat(reference.dependency_generator(leaves, 4.0))
            grads = torch.autograd.grad(values, leaves, upstream)
        else:
            held = [t.detach() for t in leaves]
            values = torch.ops.dampr.dependency_generator_fwd(held, 4.0)
            grads = torch.ops.dampr.dependency_generator_bwd(held, values, upstream, 4.0)
    return values.detach(), torch.cat([g.reshape(-1) for g in grads])


_OPS: dict[str, Callable[[Row, torch.dtype], Row]] = {
    "noise": _verify_noise,
    "sample_gates": _verify_gates,
    "gated_linear": _verify_linear,
    "weight_gated_linear": _verify_linear,
    "gated_conv2d": _verify_conv,
    "norm_gate": _verify_norm,
    "dependency_generator": _verify_generator,
}


def main(argv: list[str] | None = None) -> int:
    """Print the plain table; 0 when everything passes, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write rows and environment to this file")
    parser.add_argument("--processes", type=int, default=1, help="how many work at once")
    parser.add_argument("--backend", choices=("reference", "cpp", "triton"), help="only this one")
    arguments = parser.parse_args(argv)
    wanted, rows = jobs(only_backend=arguments.backend), []
    if arguments.processes > 1:
        found: Iterable[Row] = run_side_by_side(wanted, arguments.processes)
    else:
        found = (verify_op(*job) for job in _progress.track(wanted, "verify", delay=0))
    for row in found:
        worst = "" if row.worst is None else f"worst {row.worst.share:6.1%} of bound: {row.worst_case}"
        print(
            f"{'ok' if row.ok else 'FAILED':7} {row.op:20} {row.backend:10} {row.device:5} {row.dtype:9} {row.cases:4} cases  {worst}",
            flush=True,
        )
        for failure in row.failures[:5]:
            print(f"        {failure}")
        rows.append(row)
        if arguments.json:  # row by row: a run that is stopped keeps what it has
            records.write_json(arguments.json, {"environment": records.environment(), "rows": [row.as_dict() for row in rows]})
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
