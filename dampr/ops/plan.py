"""A plan: how one call of a gated linear layer is computed. It is made once, in the forward, and kept for the
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dampr.spec import GateSpec


class Plan(NamedTuple):
    """The route of a call, the backend's functions for it, and what these need to know besides tensors.

    ``forward(plan, *tensors)`` returns (the output, a tensor to keep for the backward or None). ``backward(plan, dy,
    tensors, needs)`` gets the same tensors and then the kept one. It returns the gradient of each, None where ``needs``
    is False.
    """

    route: str  # one of dampr.ops.routes, as dampr.explain prints it
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    spec: GateSpec
    rows: int  # x is (rows, in_features)
    per_sample: bool = False
    # whether the forward keeps y before the output gates, for their gradient; on the route "fold" the folded weight
    keep: bool = False
    onednn: bool = False  # whether oneDNN computes the products, else torch
    drawn: bool = True  # whether gates are drawn, as in training; in evaluation the forward uses torch's product
    looks: bool = False  # whether to read the drawn gates, in order to leave closed ones out of the product
    block: tuple[int, int] = (1, 1)  # the weights that share a gate, for gates on weights
