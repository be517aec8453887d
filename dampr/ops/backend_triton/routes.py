"""Which kernels serve a gated linear map, as a pure function of the problem. What each route does, and forcing one: dampr/ops/routes.py.

The backward of "live" and of "small_m" is that of "fold".
"""

from __future__ import annotations

import torch

from dampr.kernels import configs
from dampr.ops.routes import forced


def route(M: int, N: int, K: int, dtype: torch.dtype, granularity: str | tuple[int, int], per_sample: bool) -> tuple[str, str]:
    """(name, reason) of the route of x (M, K) in ``dtype`` through W (N, K), unless one is forced a function of the arguments alone.

    ``granularity``: "weight", a block (rows, columns) of weights, or anything else for gates of features. ``per_sample``: a draw per row,
    hence False for a rule without noise. Raises ValueError where a forced route cannot serve the call.
    """
    weights = granularity in ("weight", (1, 1))
    if weights:
        possible: tuple[str, ...] = ("fold", "small_m")
    elif isinstance(granularity, tuple):
        possible = ("fold",)
    else:
        possible = ("one_pass", "passes") if per_sample else ("fold", "live")
    name = forced(possible, granularity, per_sample)
    if name is not None:
        return name, "forced by forced_route"
    if possible == ("one_pass", "passes"):
        if configs.fits_one_pass(M, N, K):
            return "one_pass", f"its gates are few enough ({configs.ONE_PASS_GATES} draws) to be drawn by every tile that needs them"
        return "passes", f"more than {configs.ONE_PASS_GATES} draws in a GEMM would cost more than passes over the activations"
    if weights and dtype != torch.float32 and configs.fits_small_m(M, N, K):
        return "small_m", f"at most {configs.SMALL_M} rows: the GEMM draws the gates of its weights [estimate]"
    if "live" in possible and configs.SKIP_DEAD:
        return "live", "configs.SKIP_DEAD says that most gates are closed"
    return "fold", "one pass multiplies the gates into the weight, then the vendor GEMM runs"
