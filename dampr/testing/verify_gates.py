"""The part of ``dampr verify`` for drawn gates, their noise, and the generator of Dep-L0."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dampr import functional, names, ops, reference
from dampr.spec import SHAPES, VARIANTS, GateSpec, hard_concrete, mask, ramp, value

from .rows import Row, exact, on_backend
from .tolerances import compare


def _specs() -> list[tuple[str, GateSpec]]:
    """(name, spec) of every rule and family."""
    rules = [(rule, hard_concrete(rule)) for rule in ("sample", "paper", "median", "binary")]
    other = [("sample, beta 0.5, gamma -0.2, zeta 1.3", hard_concrete("sample", 0.5, -0.2, 1.3)), ("value", value())]
    ramps = [(f"ramp, {shape}", ramp(shape, 2.0)) for shape in SHAPES]
    return [*rules, *other, *ramps, *((f"mask, {variant}", mask(variant)) for variant in VARIANTS)]


def verify_noise(row: Row, dtype: torch.dtype) -> Row:
    """Add to ``row`` whether drawn gates are 0 and 1 exactly where the reference says.

    For random seeds, and for rows whose first gate is not a multiple of four.
    """
    generator = torch.Generator().manual_seed(0)
    for index, (rows, n) in enumerate(((None, 4096), (3, 1001), (257, 64), (5, 7), (1, 1), (0, 5))):
        seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
        log_alpha = torch.randn(n, generator=generator) * 3
        if not row.has(index):
            continue
        truth = reference.gate_values(log_alpha, hard_concrete(), seed, rows)
        with ops.backend(row.backend):
            z = functional.sample_gates(log_alpha.to(row.device), seed=seed.to(row.device), rows=rows)
        row.add(f"rows={rows}, n={n}: zeros", exact("zeros", z == 0, truth == 0))
        row.add(f"rows={rows}, n={n}: ones", exact("ones", z == 1, truth == 1))
    return row


def verify_values(row: Row, dtype: torch.dtype) -> Row:
    """Add to ``row`` gates of every rule and family, and the gradients of their parameters."""
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
        out = gates_once(row.backend, dtype, row.device, *args)
        truth = gates_once(None, torch.float64, "cpu", *args)
        baseline = gates_once(None, dtype, "cpu", *args)
        case = f"{label}, rows={rows}, n={n}"
        for name, o, t, b in zip(("z", "dlog_alpha"), out, truth, baseline, strict=True):
            row.add(f"{case}: {name}", compare(name, o, t, b))
    return row


def gates_once(
    backend: names.Backend | None,
    dtype: torch.dtype,
    device: str,
    log_alpha: Tensor,
    seed: Tensor,
    dz: Tensor,
    rows: int | None,
    spec: GateSpec,
) -> tuple[Tensor, Tensor]:
    """(gate values, the gradient of log_alpha) from one backend; None: from autograd on the reference."""
    leaf = log_alpha.to(device, dtype).detach().requires_grad_()
    with on_backend(backend):
        if backend is None:
            z = reference.gate_values(leaf, spec, seed.to(device), rows)
        else:
            z = functional.sample_gates(leaf, seed=seed.to(device), rows=rows, spec=spec)
        if z.requires_grad:  # a binary gate has no derivative
            z.backward(dz.to(device, dtype))
    return z, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def verify_generator(row: Row, dtype: torch.dtype) -> Row:
    """Add to ``row`` generators with difficult widths.

    Their weights are small, so that a deep generator does not multiply rounding errors from layer to layer.
    """
    generator = torch.Generator().manual_seed(4)
    for index, widths in enumerate(
        ((1, 1), (5, 7, 3), (65, 1, 129, 63), (16,) * 12, (20, 20, 50, 500), (64, 64, 128, 256))
    ):
        shapes = [shape for before, after in itertools.pairwise(widths) for shape in ((after, before), (after,))]
        data = [
            torch.randn(shape, generator=generator) / (25 * shape[-1]) ** (len(shape) / 2 - 0.5) for shape in shapes
        ]
        upstream = torch.randn(sum(widths[1:]), generator=generator)
        if not row.has(index):
            continue
        out = generator_once(row.backend, dtype, row.device, data, upstream)
        truth, baseline = (generator_once(None, kind, "cpu", data, upstream) for kind in (torch.float64, dtype))
        for name, o, t, b in zip(("values", "gradients"), out, truth, baseline, strict=True):
            row.add(f"{widths}: {name}", compare(name, o, t, b))
    return row


def generator_once(
    backend: names.Backend | None, dtype: torch.dtype, device: str, data: list[Tensor], upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """(values, the gradients of all parameters in one vector) from one backend; None: from autograd on the
    reference.
    """
    leaves, upstream = [t.to(device, dtype).detach().requires_grad_() for t in data], upstream.to(device, dtype)
    with on_backend(backend):
        if backend is None:
            values = torch.cat(reference.dependency_generator(leaves, 4.0))
            grads = torch.autograd.grad(values, leaves, upstream)
        else:
            held = [t.detach() for t in leaves]
            values = torch.ops.dampr.dependency_generator_fwd(held, 4.0)
            grads = torch.ops.dampr.dependency_generator_bwd(held, values, upstream, 4.0)
    return values.detach(), torch.cat([g.reshape(-1) for g in grads])
