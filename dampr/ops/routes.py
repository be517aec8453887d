"""Which way a gated linear map or convolution takes through a backend, and how tests and benchmarks overrule it.

small        drawn gates of features, a tiny layer: one call does it all, products included (C++)
fold         per batch: gates multiplied into the weight by one pass, then the vendor GEMM or convolution
activations  per batch, gates of features or channels: multiplied into activations, which are smaller than the weight
             (CPU)
live         per batch, gates of features or channels: the product over open gates alone; Triton: in a GEMM or a
             convolution of its own, over blocks of features that have one; CPU: what is open is picked out, where a
             draw leaves few enough open
slice        per batch, gates of a family that keeps the open ones side by side (DAM): the layer on a view of its
             weight, by another of these routes (CPU); :func:`dampr.explain` says so, nothing forces it
small_m      per batch, a gate for each weight: a GEMM that draws the gates of its weights (Triton)
linear       per batch, a 1 x 1 convolution on channels last: the linear map that it is (its own route then decides)
one_pass     per sample: GEMMs with the gates inside (Triton)
passes       per sample: passes that gate activations, around the vendor GEMM or convolution
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

ROUTES = ("small", "fold", "activations", "live", "linear", "small_m", "one_pass", "passes")
stack: list[list[str | None]] = []  # process-wide on purpose: the backward of CUDA ops runs in threads of its own


class ConvProblem(NamedTuple):
    """What the route of a gated convolution depends on.

    ``weight``: its shape, (N, C / groups, *kernel). ``pointwise``: whether the convolution is a linear map of the
    channels of each pixel that lie side by side in memory. ``activations``: how many elements gates would multiply that
    do not multiply the weight. ``work``: multiply-adds. ``per_sample``: a draw per image, hence False for a rule
    without noise.
    """

    weight: tuple[int, ...]
    groups: int
    granularity: str | tuple[int, int]
    per_sample: bool
    pointwise: bool
    activations: int
    work: int
    device: torch.device


@contextmanager
def forced_route(name: str | None) -> Iterator[None]:
    """Send every call of the block, and its backward wherever that is, down one route; None leaves the choice free.

    Raises ValueError for an unknown name; a call that the route cannot serve raises ValueError. On the CPU, who traces,
    counts or transforms sees operators, which have no "small" and no "live". Each of these goes the way of the block
    that it runs in.
    """
    if name is not None and name not in ROUTES:
        raise ValueError(f"name={name!r}: expected None or one of {ROUTES}")
    forced = [name]
    stack.append(forced)
    try:
        yield
    finally:
        stack[:] = [other for other in stack if other is not forced]  # blocks of several threads may overlap


def known(condition: bool) -> bool:
    """``condition``, a comparison of sizes, or False where a compiler's symbol leaves it open.

    A threshold that asked for the value of a dynamic size would make a guard of it, and what is compiled would serve a
    few sizes.
    """
    if not torch.compiler.is_compiling() and isinstance(condition, bool):
        return condition
    return torch.fx.experimental.symbolic_shapes.statically_known_true(condition)


def forced_name() -> str | None:
    """The name given to the innermost block, or None."""
    return stack[-1][0] if stack else None


def check(name: str, possible: tuple[str, ...], granularity: str | tuple[int, int], per_sample: bool) -> None:
    """Raise ValueError unless the route ``name`` is among those that can serve a call."""
    if name not in possible:
        raise ValueError(
            f"route {name!r} cannot serve granularity={granularity!r}, per_sample={per_sample}: one of {possible} can"
        )


def forced(possible: tuple[str, ...], granularity: str | tuple[int, int], per_sample: bool) -> str | None:
    """The forced route, checked against those that can serve a call; None when the choice is free."""
    name = forced_name()
    if name is not None:
        check(name, possible, granularity, per_sample)
    return name


def are_smaller(M: int, N: int, K: int) -> bool:
    """Whether x (M, K) and y (M, N) are both smaller than the weight (N, K)."""
    return min(N, K) > M


def forced_linear(possible: tuple[str, ...], granularity: str | tuple[int, int], per_sample: bool) -> str | None:
    """:func:`forced` for a linear map, which is free to choose where a convolution was told to be one."""
    return None if forced_name() == "linear" else forced(possible, granularity, per_sample)
