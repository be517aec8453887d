"""The part of ``dampr verify`` for gated convolutions: results against autograd on the float64 reference.

It covers every placement of gates, memory layout and route.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dampr import functional, names, ops, philox, reference
from dampr.spec import hard_concrete

from .rows import Expected, Row, compare_all

Shape = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class ConvCase:
    """One gated convolution.

    Attributes:
        shape: (B, C, H, W, N, kernel).
        gates: where the gates are: "input", "output", "both", "weight", or the size of a block of filters and channels.
        per_sample: whether each sample has a draw of its own.
        channels_last: whether tensors are in channels_last.
        arguments: stride, padding, dilation and groups.
        route: the route to force; None lets the backend choose.
    """

    shape: Shape
    gates: str | tuple[int, int]
    per_sample: bool = False
    channels_last: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    route: str | None = None

    def __str__(self) -> str:
        how = [
            f"{self.shape}, gates on {self.gates}",
            "per sample" if self.per_sample else "",
            "channels last" if self.channels_last else "",
        ]
        how += [f"{name} {value}" for name, value in self.arguments.items()]
        return ", ".join([*(part for part in how if part), *([f"route {self.route}"] if self.route else [])])

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of x, weight, bias and gates, by name."""
        b, c, h, w, n, k = self.shape
        read = c // self.arguments.get("groups", 1)
        found: dict[str, tuple[int, ...]] = {"x": (b, c, h, w), "weight": (n, read, k, k), "bias": (n,)}
        if self.gates in ("input", "both"):
            found["input_gate"] = (c,)
        if self.gates in ("output", "both"):
            found["output_gate"] = (n,)
        if self.gates == "weight":
            found["weight_gate"] = (n * read * k * k,)
        if isinstance(self.gates, tuple):
            found["weight_gate"] = (-(n // -self.gates[0]) * -(read // -self.gates[1]),)
        return found


def cases(backend: names.Backend, device: str) -> Iterator[ConvCase]:
    """The cases for a backend: odd and even sizes, strides, padding, dilation, groups, depthwise, 1 x 1, and forced
    routes.

    Interpreted Triton gets fewer cases, because it folds gates into weights with the kernels of the linear layer.
    """
    base: Shape = (3, 8, 7, 6, 12, 3)
    interpreted = backend == "triton" and device == "cpu"
    ways: list[dict[str, Any]] = [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"groups": 2, "padding": (1, 0)},
    ]
    for arguments, last in itertools.product(ways[-1:] if interpreted else ways, (False, True)):
        for gates, each in itertools.product(("input", "output", "both"), (False, True)):
            yield ConvCase(base, gates, each, last, arguments)
        on_weights: list[str | tuple[int, int]] = ["weight", (1, 1), (5, 3)]
        yield from (ConvCase(base, where, False, last, arguments) for where in on_weights)
    for shape, groups in (((2, 6, 5, 5, 6, 3), 6), ((1, 1, 3, 3, 1, 1), 1), ((2, 5, 4, 4, 7, 1), 1)):
        for gates, each in itertools.product(("input", "output"), (False, True)):
            yield ConvCase(shape, gates, each, False, {"groups": groups})
    if backend != "reference":
        yield from (
            ConvCase((2, 16, 5, 4, 32, 1), gates, False, True, {}, "linear") for gates in ("input", "output", "both")
        )
    if backend == "cpp":
        for arguments, (gates, last) in itertools.product(
            ways[:-1], (("input", True), ("output", True), ("output", False))
        ):
            yield ConvCase((2, 20, 9, 7, 33, 3), gates, False, last, arguments, "live")
    if backend == "triton":
        for arguments, gates in itertools.product(ways, ("both",) if interpreted else ("input", "output", "both")):
            yield ConvCase((2, 64, 9, 7, 48, 3), gates, False, True, arguments, "live")


def once(
    backend: names.Backend | None,
    dtype: torch.dtype,
    device: str,
    case: ConvCase,
    data: dict[str, Tensor],
    dy: Tensor,
    seed: Tensor,
) -> dict[str, Tensor]:
    """y and every gradient of one case, by name ("y", "dx", "dweight", ...).

    Args:
        backend: the backend; None runs autograd on the reference.
        dtype: the dtype of the computation.
        device: where it runs.
        case: the case.
        data: the inputs by name, the same for every dtype.
        dy: the gradient of y.
        seed: int64 (1,), of the gates.
    """
    leaves: dict[str, Tensor] = {}
    for name, t in data.items():
        t = t.to(device, dtype if dtype == torch.float64 or not name.endswith("_gate") else torch.float32)
        if case.channels_last and t.dim() == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        leaves[name] = t.detach().requires_grad_()
    seed, spec = seed.to(device), hard_concrete()
    own = leaves["x"], leaves["weight"], leaves["bias"]
    block = case.gates if isinstance(case.gates, tuple) else None
    gates: dict[str, Any] = {name: leaf for name, leaf in leaves.items() if name.endswith("_gate")}
    if backend is not None:
        with ops.backend(backend), ops.forced_route(case.route) if case.route else nullcontext():
            inputs: dict[str, Any] = {**leaves, **case.arguments}
            y = functional.gated_conv2d(**inputs, block=block, seed=seed, per_sample=case.per_sample)
            y.backward(dy.to(device, dtype))
    else:
        if "weight_gate" in gates:
            y = reference.weight_gated_conv(*own, gates["weight_gate"], seed, spec, block, **case.arguments)
        else:
            second = seed if "input_gate" not in gates else seed ^ philox.SECOND_STREAM
            ends = gates.get("input_gate"), gates.get("output_gate")
            y = reference.gated_conv(*own, *ends, seed, second, spec, case.per_sample, **case.arguments)
        y.backward(dy.to(device, dtype))
    return {
        "y": y.detach(),
        **{f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()},
    }


def make(case: ConvCase, dtype: torch.dtype, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(data, dy, seed) of a case; data and dy are rounded to ``dtype``, gates are not."""
    data = {name: torch.randn(size, generator=generator) for name, size in case.sizes().items()}
    data["weight"] /= max(1, data["weight"][0].numel()) ** 0.5
    data = {name: t if name.endswith("_gate") else t.to(dtype) for name, t in data.items()}
    size = torch.nn.functional.conv2d(data["x"].float(), data["weight"].float(), **case.arguments).shape
    return (
        data,
        torch.randn(size, generator=generator).to(dtype),
        torch.randint(0, 2**63 - 1, (1,), generator=generator),
    )


def verify(row: Row, dtype: torch.dtype) -> Row:
    """Run every case of a row of ``dampr verify`` in ``dtype``, add the comparisons with the reference to ``row``, and
    return it.

    A row that is one part of several runs only the cases of its part.
    """
    generator = torch.Generator().manual_seed(3)
    for index, case in enumerate(cases(row.backend, row.device)):
        data, dy, seed = make(case, dtype, generator)
        if not row.has(index):
            continue
        out = once(row.backend, dtype, row.device, case, data, dy, seed)
        expected = Expected(row, dtype, partial(_reference, case, seed), data, dy)
        compare_all(row, str(case), out, expected, dtype)
    return row


def _reference(
    case: ConvCase, seed: Tensor, dtype: torch.dtype, data: dict[str, Tensor], dy: Tensor
) -> dict[str, Tensor]:
    """The results of the reference for a case, in the order of arguments that :class:`Expected` calls."""
    return once(None, dtype, "cpu", case, data, dy, seed)
