"""The ``dampr`` operator library, and the call of an operator where nobody needs the dispatcher."""

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
    """Define ``dampr::<schema>``, implement it on CPU and CUDA, give it a fake; returns what calls it.

    An operator cannot return None. Where ``implementation`` does, ``returned(result, *arguments)`` is what the operator
    returns for it.

    Where nothing but the implementation could answer, the dispatcher is left out: going through it and back into Python
    costs a tiny layer (16, 64, 64) 30 us a step. Whoever traces, transforms, counts or profiles gets the operator. Of a
    list of tensors only the caller looks at what is in it.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = implementation if returned is None else lambda *args: returned(implementation(*args), *args)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, operator, key)
    torch.library.register_fake(f"dampr::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.dampr, name).default

    def call(*args: Any) -> Any:
        first = args[0] if type(args[0]) is not list else args[0][0]
        return (
            overload(*args) if needs_dispatcher(args) or not (first.is_cpu or first.is_cuda) else implementation(*args)
        )

    return call


def or_empty(grads: Sequence[torch.Tensor | None], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a backward operator returns: operators have no None,
    so an empty tensor stands for a gradient that nobody needs.
    """
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def wanted(grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """None again where nobody needs a gradient, whichever way a backward went."""
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` (..., n) as a matrix (rows, n), also where a size is 0, or a symbol, which numel makes a number."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def choose_activations(M: int, N: int, K: int) -> bool:
    """Whether x (M, K) and y (M, N) are both smaller than the weight (N, K), unless a route is forced;
    not where a size is dynamic.
    """
    forced = routes.forced_name()
    return (
        routes.known(routes.are_smaller(M, N, K))
        if forced is None or forced not in ("fold", "activations")
        else forced == "activations"
    )


def gates_activations(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether gates per batch multiply x (..., K) and y (..., N) instead of the weight (N, K), on the CPU where these
    are smaller.

    The output gate then keeps the activation before it for its gradient. On a GPU a pass over the weight is too cheap
    for that.
    """
    return x.device.type == "cpu" and choose_activations(rows_of(x).shape[0], *weight.shape)
