"""The part of ``dampr verify`` for gated linear layers: every placement of gates, memory layout and rule."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dampr import functional, names, ops, philox, reference
from dampr.spec import hard_concrete, mask, ramp, value

from .rows import Expected, Row, compare_all, on_backend, upstream
from .tolerances import HARD_SHAPES, TILED_SHAPES, layouts


@dataclass(frozen=True)
class LinearCase:
    """One gated linear layer.

    Attributes:
        shape: (M, K, N) of x (M, K) and weight (N, K).
        gates: "none", "input", "output", "both", "weight", or the size of a block of weights.
        per_sample: whether each row has a draw.
        rule: the rule of the gates.
        layout: the memory layout of x and weight.
        expanded_dy: whether the gradient of y is one expanded number.
    """

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
    """The cases: difficult shapes with every placement of gates; layouts and gradients on one shape; every rule; on
    CUDA also shapes of whole tiles.
    """
    on_vectors, on_weights = ("input", "output", "both"), ("weight", (4, 4), (3, 5), (64, 1))
    cases = [LinearCase(shape, "none") for shape in HARD_SHAPES]
    cases += [
        LinearCase(shape, gates, per_sample)
        for shape in HARD_SHAPES
        for gates in on_vectors
        for per_sample in (False, True)
    ]
    cases += [LinearCase(shape, gates) for shape in HARD_SHAPES for gates in on_weights]
    ways: list[tuple[str | tuple[int, int], bool]] = [
        ("both", False),
        ("both", True),
        ("weight", False),
        ((4, 4), False),
    ]
    for layout, expanded, (gates, per_sample) in itertools.product(
        ("transposed", "sliced", "offset"), (False, True), ways
    ):
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


def linear_data(
    case: LinearCase, dtype: torch.dtype, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(data, dy, seed) of a case; data and dy are rounded to ``dtype``, gates are not."""
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
    dy = (
        torch.ones((), dtype=dtype).expand(m, n)
        if case.expanded_dy
        else torch.randn(m, n, generator=generator).to(dtype)
    )
    return data, dy, seed


def verify(row: Row, dtype: torch.dtype) -> Row:
    """Run every case of a row in ``dtype``, add the comparisons with the reference to ``row``, and return it."""
    generator = torch.Generator().manual_seed(2)
    for index, case in enumerate(case for case in linear_cases(row.device) if case.op == row.op):
        data, dy, seed = linear_data(case, dtype, generator)
        if not row.has(index):
            continue
        expected = Expected(row, dtype, partial(_reference, case, seed), data, dy)
        for route in _routes(row.backend, case):
            with ops.forced_route(route):
                out = linear_once(row.backend, dtype, row.device, case, data, dy, seed)
            compare_all(row, str(case) if route is None else f"{case}, route {route}", out, expected, dtype)
    return row


def _reference(
    case: LinearCase, seed: Tensor, dtype: torch.dtype, data: dict[str, Tensor], dy: Tensor
) -> dict[str, Tensor]:
    """The results of the reference for a case, in the order of arguments that :class:`Expected` calls."""
    return linear_once(None, dtype, "cpu", case, data, dy, seed)


def _routes(backend: names.Backend, case: LinearCase) -> tuple[str | None, ...]:
    """The routes to force for a case; None lets the backend choose.

    In C++ the difficult shapes are small layers, so the routes of larger ones are forced too.
    """
    if backend != "cpp" or case.op != "gated_linear" or case.gates == "none":
        return (None,)
    if case.per_sample and case.rule == "sample":
        return None, "passes"
    # closed gates of these two families have a gradient, so they cannot be left out
    return None, "fold", "activations", *["live"] * (case.rule not in ("mask", "value"))


def linear_once(
    backend: names.Backend | None,
    dtype: torch.dtype,
    device: str,
    case: LinearCase,
    data: dict[str, Tensor],
    dy: Tensor,
    seed: Tensor,
) -> dict[str, Tensor]:
    """y and every gradient of a case, by name; ``backend`` None: autograd on the reference.

    The data are the same for every dtype.
    """
    leaves: dict[str, Tensor] = {}
    for name, t in data.items():
        t = t.to(device, dtype if dtype == torch.float64 or not name.endswith("_gate") else torch.float32)
        leaves[name] = (dict(layouts(t))[case.layout] if name in ("x", "weight") else t).detach().requires_grad_()
    families = {"ramp": ramp(), "mask": mask(), "value": value()}
    seed, spec = seed.to(device), families.get(case.rule) or hard_concrete(case.rule)
    with on_backend(backend):
        if backend is not None:
            how: dict[str, Any] = {**leaves, "seed": seed, "per_sample": case.per_sample, "spec": spec}
            if case.op == "weight_gated_linear":
                how["block"] = case.block
            y = functional.gated_linear(**how)
        elif case.op == "weight_gated_linear":
            y = reference.weight_gated_linear(
                leaves["x"], leaves["weight"], leaves.get("bias"), leaves["weight_gate"], seed, spec, case.block
            )
        else:
            gates = leaves.get("input_gate"), leaves.get("output_gate")
            second = seed if gates[0] is None else seed ^ philox.SECOND_STREAM
            y = reference.gated_linear(
                leaves["x"], leaves["weight"], leaves.get("bias"), *gates, seed, second, spec, case.per_sample
            )
        y.backward(upstream(dy, dtype, device))
    # binary gates have no derivative, so their gradient is None
    return {
        "y": y.detach(),
        **{f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()},
    }
