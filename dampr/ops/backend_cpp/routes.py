"""Chooses the route of a gated linear layer or convolution on the CPU, and says why. The routes are those of
:mod:`dampr.ops.routes`.
"""

from __future__ import annotations

import functools
import math

import torch

from dampr.ops import routes, thresholds
from dampr.ops.skip_closed import WORK

from . import products

# Up to this many multiply-adds, weights, and terms of a sum, one call on one thread that computes everything is faster
# than several calls on several threads.
SMALL, SMALL_WEIGHT, SMALL_SUM = 2**21, 2**18, 2**13
# Gates multiply activations if these are fewer than this share of the weights: an activation takes longer, because its
# result needs new memory.
FEWER = 7 / 8


def is_small(M: int, N: int, K: int) -> bool:
    """Whether the layer is small enough for the route "small"."""
    return M * N * K <= SMALL and N * K <= SMALL_WEIGHT and M <= SMALL_SUM and N <= SMALL_SUM and K <= SMALL_SUM


def route(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    granularity: str | tuple[int, int],
    per_sample: bool,
    device: torch.device | None = None,
    drawn: bool = True,
) -> tuple[str, str]:
    """(name, reason) of the route of x (M, K) through a weight (N, K).

    ``drawn``: whether gates are drawn. If not, the route is never "small", because a fresh layer in evaluation must
    equal the dense one to the bit.

    Raises: ValueError for a forced route that cannot serve the call.
    """
    forced = routes.forced_name()
    name = decide(forced, M, N, K, dtype, granularity, per_sample, drawn)
    whose = products.described(M, N, K, dtype, drawn)
    weights = granularity == "weight" or isinstance(granularity, tuple)
    if name == forced and not weights:
        return name, "forced by forced_route"
    if name == "small":
        return name, f"{M * N * K} multiply-adds: one call that does all is faster than several"
    if name == "passes":
        return name, f"every row has gates of its own: they are drawn while the activations are multiplied; {whose}"
    if name == "activations":
        why = f"{M} rows are fewer than the {min(N, K)} of the weight's smaller side, so activations are smaller"
        return name, f"{why}; {whose}{_or_live(M * N * K)}"
    if weights:
        return name, f"one pass multiplies the gates into the weight; {whose}"
    return (
        name,
        f"{M} rows: the weight is the smaller operand, and one pass multiplies the gates into it; "
        f"{whose}{_or_live(M * N * K)}",
    )


@functools.lru_cache(maxsize=4096)
def decide(
    forced: str | None,
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    granularity: str | tuple[int, int],
    per_sample: bool,
    drawn: bool,
) -> str:
    """The name of the route; it depends on the arguments alone. ``forced``: the forced route, or None."""
    weights = granularity == "weight" or isinstance(granularity, tuple)
    small = drawn and not weights and dtype in (torch.float32, torch.float64)
    possible = (
        ("fold",)
        if weights
        else (*["small"] * small, *(("passes",) if per_sample else ("fold", "activations", "live")))
    )
    # "linear" is a route of convolutions; the linear layer that such a convolution becomes chooses freely
    if forced is not None and forced != "linear":
        routes.check(forced, possible, granularity, per_sample)
        return forced
    if small and is_small(M, N, K):
        return "small"
    if per_sample:
        return "passes"
    return "activations" if not weights and routes.are_smaller(M, N, K) else "fold"


def _or_live(work: int) -> str:
    """The part of a reason that says that closed gates may be left out; empty for layers that are too small."""
    return (
        f"; on the open gates alone where a call finds enough closed: {thresholds.described()}" if work >= WORK else ""
    )


def conv_route(problem: routes.ConvProblem) -> tuple[str, str]:
    """(name, reason) of the route of a convolution.

    A 1 x 1 convolution is not run as a linear layer unless forced: oneDNN's convolution is as fast, and in deep layers
    twice as fast.

    Raises: ValueError if a forced route cannot serve the call.
    """
    weight, _, granularity, per_sample, pointwise, activations, work, _ = problem
    vectors = granularity in ("input", "output", "both")
    if routes.forced_name() is not None:
        live = ["live"] * (
            problem.groups == 1 and (granularity == "output" or (granularity == "input" and len(weight) == 4))
        )
        possible = (
            ("passes",)
            if per_sample
            else ("fold", "activations", *live, *["linear"] * pointwise)
            if vectors
            else ("fold",)
        )
        name = routes.forced(possible, granularity, per_sample)
        assert name is not None
        return name, "forced by forced_route"
    if per_sample:
        return "passes", "every image has gates of its own: passes over the activations around torch's convolution"
    if torch.compiler.is_compiling():  # sizes may be symbols, which no text can hold
        fewer = vectors and routes.known(activations < FEWER * math.prod(weight))
        return (
            "activations" if fewer else "fold"
        ), "compiled: the route that is right for all sizes, where they are dynamic"
    also = _or_live(work) if vectors and problem.groups == 1 else ""
    if vectors and activations < FEWER * math.prod(weight):
        return (
            "activations",
            f"{activations} activations are fewer than {FEWER:g} of the {math.prod(weight)} weights{also}",
        )
    return "fold", f"one pass multiplies the gates into the filters, then torch's convolution runs{also}"
