"""Chooses the kernels for a gated linear layer or convolution, as a pure function of the problem and of the device's
thresholds.

The routes are described in dampr/ops/routes.py, the thresholds are in dampr/kernels/dispatch. The backward of "live"
and of "small_m" is that of "fold".
"""

from __future__ import annotations

import torch

from dampr.kernels import configs
from dampr.kernels.dispatch import Thresholds, thresholds
from dampr.ops.routes import ConvProblem, forced, forced_linear

from . import host


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
    """:func:`route_by` with the thresholds of ``device``, or the default ones."""
    return route_by(thresholds(host.device_name(device)), M, N, K, dtype, granularity, per_sample)


def route_by(
    table: Thresholds, M: int, N: int, K: int, dtype: torch.dtype, granularity: str | tuple[int, int], per_sample: bool
) -> tuple[str, str]:
    """(name, reason) of the route of x (M, K) in ``dtype`` through a weight (N, K).

    Args:
        table: the thresholds of the device.
        granularity: "weight", a block (rows, columns) of weights, or anything else for gates on features.
        per_sample: whether each row has a draw; False if nothing is drawn.

    Raises: ValueError if a forced route cannot serve the call.
    """
    weights = granularity in ("weight", (1, 1))
    if weights:
        possible: tuple[str, ...] = ("fold", "small_m")
    elif isinstance(granularity, tuple):
        possible = ("fold",)
    else:
        possible = ("one_pass", "passes") if per_sample else ("fold", "live")
    name = forced_linear(possible, granularity, per_sample)
    if name is not None:
        return name, "forced by forced_route"
    if possible == ("one_pass", "passes"):
        limit = f"{table.one_pass_gates} draws [{table.source}]"
        if configs.fits_one_pass(M, N, K, table):
            return "one_pass", f"its gates are few enough to be drawn by every tile that needs them: at most {limit}"
        return "passes", f"drawing in the GEMMs would cost more than passes over the activations: more than {limit}"
    if weights and dtype != torch.float32 and configs.fits_small_m(M, N, K, table):
        return "small_m", f"the GEMM draws the gates of its weights: at most {table.small_m} rows [{table.source}]"
    if "live" in possible and table.skip_dead:
        return (
            "live",
            f"a GEMM over live blocks is no slower than fold here, even with every gate open [{table.source}]",
        )
    return "fold", "one pass multiplies the gates into the weight, then the vendor GEMM runs"


def conv_route(problem: ConvProblem) -> tuple[str, str]:
    """(name, reason) of the route of a convolution. The number of activations does not matter here, because a pass over
    the weight is cheap on a GPU.

    Raises: ValueError if a forced route cannot serve the call.
    """
    weight, groups, granularity, per_sample, pointwise, _, _, device = problem
    if granularity not in ("input", "output", "both"):
        possible: tuple[str, ...] = ("fold",)
    elif per_sample:
        possible = ("passes",)
    else:
        possible = ("fold", "live", "linear") if pointwise else ("fold", "live") if len(weight) == 4 else ("fold",)
    name = forced(possible, granularity, per_sample)
    if name is not None:
        return name, "forced by forced_route"
    if per_sample:
        return "passes", "every image has gates of its own: passes over the activations around the vendor convolution"
    table = thresholds(host.device_name(device))
    if "live" in possible and table.skip_dead and groups == 1 and weight[1] % 16 == 0 and weight[0] % 16 == 0:
        return "live", f"a convolution over live blocks is no slower than the dense one here [{table.source}]"
    if "linear" in possible:
        return "linear", "a 1 x 1 convolution on channels last is a linear map"
    return "fold", "one pass multiplies the gates into the filters, then the vendor convolution runs"
