"""The ``dampr`` operator library and the two ways into it that every op uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dampr.spec import GateSpec

from . import routes

LIBRARY = torch.library.Library("dampr", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``dampr::<schema>``, implement it on CPU and CUDA, give it a fake; returns the callable overload."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"dampr::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.dampr, name).default


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` without binding the arguments to a signature, which alone costs as much as a small layer (60 us).

    ``Function.apply`` does that for functions with a ``setup_context`` before it hands over to its base class; under torch.func and
    torch.compile it has more to do, and is called itself.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` (..., n) as a matrix (rows, n), also where a size is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def choose_activations(M: int, N: int, K: int) -> bool:
    """Whether x (M, K) and y (M, N) are both smaller than the weight (N, K), unless a route is forced."""
    forced = routes.forced_name()
    return min(N, K) > M if forced not in ("fold", "activations") else forced == "activations"


def gates_activations(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether gates per batch multiply x (..., K) and y (..., N) instead of the weight (N, K), on the CPU where these are smaller.

    The output gate then keeps the activation before it for its gradient. On a GPU a pass over the weight is too cheap for that.
    """
    return x.device.type == "cpu" and choose_activations(x.shape[:-1].numel(), *weight.shape)


def unpack(spec: Sequence[float]) -> GateSpec:
    """A GateSpec from the float list that travels through the schema."""
    return GateSpec(int(spec[0]), int(spec[1]), *spec[2:])
