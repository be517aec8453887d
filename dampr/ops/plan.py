"""How one call of a gated linear map is computed: decided once, in the forward, and kept by autograd's node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dampr.spec import GateSpec


class Plan(NamedTuple):
    """The route of a call, the backend's functions for it, and what these need to know besides tensors.

    ``forward(plan, *tensors)`` returns the output, and a tensor that is kept or None. ``backward(plan, dy, tensors,
    needs)`` is given these tensors and the one that was kept. It returns the gradients of those that have one, None
    where ``needs`` does not ask for it.
    """

    route: str  # one of dampr.ops.routes, as dampr.explain prints it
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    spec: GateSpec
    rows: int  # x is (rows, in_features)
    per_sample: bool = False
    # y before the output gates, for their gradient; on the route "fold" the folded weight, for that of x
    keep: bool = False
    onednn: bool = False  # whose products: oneDNN's, or torch's
    drawn: bool = True  # whether gates are, as in training; in evaluation the forward has torch's product
    looks: bool = False  # at the draw, for closed gates to leave out
    block: tuple[int, int] = (1, 1)
