"""The ``dampr`` operator library and the two ways into it that every op uses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dampr.spec import GateSpec

from . import routes
from .gate_args import GatePair, Maybe

LIBRARY = torch.library.Library("dampr", "DEF")


def define(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], returned: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Define ``dampr::<schema>``, implement it on CPU and CUDA, give it a fake; returns what calls it.

    An operator cannot return None. Where ``implementation`` does, ``returned(result, *arguments)`` is what the operator returns for it.

    Where nothing but the implementation could answer, the dispatcher is left out: going through it and back into Python costs a tiny layer
    (16, 64, 64) 30 us a step. Whoever traces, transforms, counts or profiles gets the operator. Of a list of tensors only the caller looks
    at what is in it.
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
        return overload(*args) if watched(args) or not (first.is_cpu or first.is_cuda) else implementation(*args)

    return call


PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, list, tuple, GateSpec, torch.dtype}


def watched(args: Sequence[Any]) -> bool:
    """Whether a compiler, a dispatch mode, a torch.func transform, the profiler or an argument of another kind wants to see operators."""
    return torch.autograd.profiler._is_profiler_enabled or traced(args)


def traced(args: Sequence[Any]) -> bool:
    """:func:`watched` by more than the profiler, which is served by what really runs."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not PLAIN.issuperset(map(type, args))
    )


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` without binding the arguments to a signature, which alone costs as much as a small layer (60 us).

    ``Function.apply`` does that for functions with a ``setup_context`` before it hands over to its base class; under torch.func and
    torch.compile it has more to do, and is called itself. What is compiled without a gradient is the forward: dynamo does not know the
    ``apply`` of such a function there.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and not (torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)):
        return function.forward(*args)
    if compiling or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def once_differentiable(backward: Callable[..., Any]) -> Any:
    """``torch.autograd.function.once_differentiable`` that costs nothing where no second derivative can be asked for."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return wrapper


def differentiate(
    whole: Callable[..., torch.Tensor], dy: torch.Tensor, tensors: Sequence[Maybe], gates: GatePair, needs: Sequence[bool]
) -> list[Maybe]:
    """Gradients of x, weight, bias and both log-alphas by way of ``whole(x, weight, bias, gates)``, of operators, for whoever looks on."""
    inputs = (*tensors, gates.input_log_alpha, gates.output_log_alpha)
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        y = whole(*leaves[:3], gates._replace(input_log_alpha=leaves[3], output_log_alpha=leaves[4]))
        found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], dy))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]


def or_empty(grads: Sequence[torch.Tensor | None], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a backward operator returns: operators have no None, so an empty tensor stands for a gradient that nobody needs."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def wanted(grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """None again where nobody needs a gradient, whichever way a backward went."""
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` (..., n) as a matrix (rows, n), also where a size is 0."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def choose_activations(M: int, N: int, K: int) -> bool:
    """Whether x (M, K) and y (M, N) are both smaller than the weight (N, K), unless a route is forced."""
    forced = routes.forced_name()
    return min(N, K) > M if forced is None or forced not in ("fold", "activations") else forced == "activations"


def gates_activations(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether gates per batch multiply x (..., K) and y (..., N) instead of the weight (N, K), on the CPU where these are smaller.

    The output gate then keeps the activation before it for its gradient. On a GPU a pass over the weight is too cheap for that.
    """
    return x.device.type == "cpu" and choose_activations(rows_of(x).shape[0], *weight.shape)
