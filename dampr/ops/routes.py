"""The routes: in which ways a backend can compute a gated linear layer or convolution, and how to force one.

"Per batch" means one draw of the gates for all samples; "per sample" a draw for each.

small        a tiny layer with drawn gates of features: one call computes everything, products included (C++)
fold         per batch: one pass multiplies gates into the weight, then the library's GEMM or convolution runs
activations  per batch, gates of features or channels: they multiply the activations, which are smaller than the weight
             (CPU)
live         per batch, gates of features or channels: closed gates are left out of the product. Triton: a GEMM or
             convolution of its own skips blocks of features whose gates are all closed. CPU: open features are
             gathered into smaller tensors, if the draw leaves few enough open. (The code calls this skip_closed.)
slice        per batch, gates of a family that keeps the open ones side by side (DAM): the layer runs on a view of its
             weight, by another of these routes (CPU). :func:`dampr.explain` names it; it cannot be forced
small_m      per batch, a gate for each weight: a GEMM draws the gates of the weights that it reads (Triton)
linear       per batch, a 1 x 1 convolution in channels last: it runs as a linear layer, which has a route of its own
one_pass     per sample: GEMMs with the gates inside (Triton)
passes       per sample: passes that multiply activations by gates, around the library's GEMM or convolution
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

ROUTES = ("small", "fold", "activations", "live", "linear", "small_m", "one_pass", "passes")
# for the whole process and not for a thread, because autograd runs the backward of CUDA operators in its own threads
stack: list[list[str | None]] = []


class ConvProblem(NamedTuple):
    """The properties of a gated convolution that its route depends on.

    Attributes:
        weight: the shape of the weight, (N, C / groups, *kernel).
        groups: the groups of the convolution.
        granularity: what one gate multiplies.
        per_sample: whether each image has a draw; False if nothing is drawn.
        pointwise: whether it is a linear layer on the channels of each pixel, which lie side by side in memory.
        activations: how many elements gates would multiply if they did not multiply the weight.
        work: multiply-adds.
        device: where it runs.
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
    """``condition``, a comparison of sizes; False if a size is a symbol of torch.compile and the answer depends on it.

    To ask a symbol for its value would add a guard, and the compiled code would then serve a few sizes only.
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
    """The route that the innermost :func:`forced_route` block asks for; None if the choice is free.

    Args:
        possible: the routes that can serve the call.
        granularity, per_sample: properties of the call, for the message of the error.

    Raises: ValueError if the route is not among ``possible``.
    """
    name = forced_name()
    if name is not None:
        check(name, possible, granularity, per_sample)
    return name


def are_smaller(M: int, N: int, K: int) -> bool:
    """Whether x (M, K) and y (M, N) are both smaller than the weight (N, K)."""
    return min(N, K) > M


def forced_linear(possible: tuple[str, ...], granularity: str | tuple[int, int], per_sample: bool) -> str | None:
    """:func:`forced` for a linear layer. If the forced route is "linear", which makes a convolution run as a linear
    layer, the choice is free here.
    """
    return None if forced_name() == "linear" else forced(possible, granularity, per_sample)
