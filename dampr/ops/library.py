"""The ``dampr`` operator library, and how an operator is called if nothing needs torch's dispatcher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import routes
from .node import needs_dispatcher

LIBRARY = torch.library.Library("dampr", "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    returned: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define the operator ``dampr::<schema>`` for CPU and CUDA; returns a function that calls it.

    Args:
        schema: the schema, as :mod:`torch.library` takes it.
        implementation: computes it.
        fake: makes empty results for tracing.
        returned: an operator cannot return None; ``returned(result, *arguments)`` replaces a result with None in it.

    The returned function calls ``implementation`` directly if nothing needs the dispatcher
    (:func:`.node.needs_dispatcher`): going through it and back into Python takes 30 us per step of a tiny layer (16,
    64, 64). Compilers, transforms, counters and profilers get the operator. Tensors inside of a list argument are not
    checked; the caller has to check these.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = implementation if returned is None else lambda *args: returned(implementation(*args), *args)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, operator, key)
    torch.library.register_fake(f"dampr::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.dampr, name).default

    def call(*args: Any) -> Any:
        """Call the implementation, or the operator if something needs the dispatcher."""
        first = args[0] if type(args[0]) is not list else args[0][0]
        return (
            overload(*args) if needs_dispatcher(args) or not (first.is_cpu or first.is_cuda) else implementation(*args)
        )

    return call


def or_empty(grads: Sequence[torch.Tensor | None], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients with an empty tensor in place of each None, because an operator cannot return None."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def wanted(grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """The gradients with None for those that ``needs`` does not ask for."""
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` (..., n) as a matrix (rows, n). It works for sizes of 0, and for symbolic sizes, which ``numel`` would
    fix.
    """
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def choose_activations(M: int, N: int, K: int) -> bool:
    """Whether the gates multiply x and y (True) or are folded into the weight (False).

    Unless the user forces one of these routes, they multiply x (M, K) and y (M, N) if both are smaller than the weight
    (N, K). False if a size is symbolic and the answer depends on it.
    """
    forced = routes.forced_name()
    return (
        routes.known(routes.are_smaller(M, N, K))
        if forced is None or forced not in ("fold", "activations")
        else forced == "activations"
    )


def gates_activations(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether gates per batch multiply x (..., K) and y (..., N) instead of the weight (N, K).

    Only on the CPU, where these are smaller. The output gate then needs the activation in front of it for its gradient.
    On a GPU a pass over the weight costs too little to be worth that.
    """
    return x.device.type == "cpu" and choose_activations(rows_of(x).shape[0], *weight.shape)
