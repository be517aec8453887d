"""The base of the autograd functions: fused kernels for a forward and its backward, plain PyTorch for all other
derivatives.

A kernel has no derivative of its own. So every operator has a ``plain`` form, which computes the same from the same
inputs (gates are drawn again from their seeds) and which torch can differentiate any number of times. It is used for a
backward that is differentiated itself (``create_graph=True``), for a batch of gradients (``is_grads_batched=True``),
for torch.func and for forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dampr.spec import GateSpec

from ._torch import (
    apply_of,
    as_no_view,
    count_dispatch_modes,
    forward_mode_level,
    in_torch_func,
    is_batch_of_gradients,
    is_profiled,
    is_view,
)
from .gate_args import GatePair

# Bound to names, because every backward calls them and two attribute lookups can be measured in a tiny layer.
_grad_enabled, _compiling = torch.is_grad_enabled, torch.compiler.is_compiling


def is_transformed() -> bool:
    """Whether torch.func or forward mode is active; both need operators that torch can differentiate."""
    return in_torch_func() or forward_mode_level() >= 0


PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, list, tuple, GateSpec, torch.dtype}


def needs_dispatcher(args: Sequence[Any], by_profiler: bool = True) -> bool:
    """Whether a compiler, a dispatch mode, a transform, the profiler or a tensor subclass must see operators.

    Args:
        args: the arguments of the operator.
        by_profiler: False if a profiler alone is no reason, because it records the kernels anyway.
    """
    return (
        _compiling()
        or (by_profiler and is_profiled())
        or count_dispatch_modes() > 0
        or in_torch_func()
        or forward_mode_level() >= 0
        or not PLAIN.issuperset(map(type, args))
    )


class Node(torch.autograd.Function):
    """Base of the autograd functions.

    A subclass defines ``forward`` and two ways to compute gradients. ``plain`` is the same computation in
    differentiable torch operators; its gradients are used if gradients are differentiated again or come in batches.
    ``fused`` computes the gradients with the backend's kernels, and stands in place of ``backward``. A subclass
    without ``fused`` stores a plan that computes them, and has ``by_operators`` for code that is compiled, traced or
    profiled.

    The context of a call keeps the arguments of ``plain``: the first ``tensors`` of the saved tensors, which are the
    first inputs of ``forward``, and then ``constants``.
    """

    tensors: int
    plain: Callable[..., Any]
    fused: Callable[..., Any] | None = None
    by_operators: Callable[..., Any] | None = None
    apply_at_once: Callable[..., Any]  # ``apply`` without its wrapper in Python, for calls that nothing traces

    def __init_subclass__(cls) -> None:
        """Give a subclass its ``backward`` and ``apply_at_once``."""
        planned, fused = cls.fused is None, cls.fused or cls.by_operators

        def backward(ctx: Any, *grads: Tensor) -> Any:
            """The gradients: by ``plain`` if they are differentiated again or batched, else by ``fused`` or the
            plan.
            """
            # The first case is a backward that is differentiated again, or a batch of gradients. Compiled code is
            # never in it, because torch refuses second derivatives of that with an error of its own.
            compiling = _compiling()
            if not compiling and (
                _grad_enabled() or is_batch_of_gradients(grads[0]) or in_torch_func() or forward_mode_level() >= 0
            ):
                return _by_plain(cls, ctx, grads)
            if not planned or compiling or is_profiled() or count_dispatch_modes() > 0 or type(grads[0]) not in PLAIN:
                return fused(ctx, *grads)  # type: ignore[misc]
            plan, needs = ctx.constants[0], ctx.needs_input_grad
            found = plan.backward(plan, *grads, ctx.saved_tensors, needs)
            return (*found, *[None] * (len(needs) - len(found)))

        cls.backward = staticmethod(backward)  # type: ignore[method-assign, assignment]
        cls.apply_at_once = staticmethod(apply_of(cls))


class Planned(Node):
    """Base of the autograd functions that call a backend directly, without operators.

    The last input of ``forward`` is the :class:`.plan.Plan` of the call. A subclass has ``by_operators`` in the place
    of ``fused``: the backward through operators. The last saved tensor is what the forward kept, and the only constant
    is the plan.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        plan, tensors = inputs[-1], inputs[:-1]
        y, kept = plan.forward(plan, *tensors)
        ctx.save_for_backward(*tensors, kept)
        ctx.constants = (plan,)
        # autograd raises if the result of a custom function is a view that is then changed in place
        changeable = as_no_view(y, y.shape) if is_view(y) else y
        return changeable  # type: ignore[no-any-return]


def _by_plain(node: type[Node], ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a call by its plain form, differentiable in its inputs and in ``grads``."""
    needs = ctx.needs_input_grad
    inputs = ctx.saved_tensors[: node.tensors]
    found = differentiate(lambda *given: node.plain(*given, *ctx.constants), grads, inputs, needs[: len(inputs)])
    return (*found, *[None] * (len(needs) - len(inputs)))


def differentiate(
    function: Callable[..., Any], grads: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of those ``inputs`` that need one, None for the others.

    Args:
        function: computes the outputs from the inputs.
        grads: the gradients of the outputs.
        inputs: the inputs.
        needs: whether each input needs a gradient.

    The result is differentiable if gradients are enabled.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [_stand_in(t) if need and t is not None else t for t, need in zip(inputs, needs, strict=True)]
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t, need in zip(given, needs, strict=True) if need and t is not None]
        learned = [(y, dy) for y, dy in zip(outputs, grads, strict=True) if y is not None and y.requires_grad]
        found = [torch.zeros_like(t) for t in wanted]
        if learned:  # empty if all outputs come from gates of a rule without a gradient
            ends, upstream = zip(*learned, strict=True)
            found = list(torch.autograd.grad(ends, wanted, upstream, create_graph=again, materialize_grads=True))
    return [found.pop(0) if need and t is not None else None for t, need in zip(given, needs, strict=True)]


def _stand_in(t: Tensor) -> Tensor:
    """A view of an input that requires a gradient, so that the gradient stops here and not at the input's own
    inputs.
    """
    view = t.view_as(t)
    return view if view.requires_grad else view.requires_grad_()


def differentiate_layer(
    layer: Callable[..., Tensor], dy: Tensor, tensors: Sequence[Tensor | None], gates: GatePair, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, weight, bias and both log_alphas of ``layer(x, weight, bias, gates)``, through operators.

    It serves callers for which :func:`needs_dispatcher` is true.
    """

    def whole(x: Tensor, weight: Tensor, bias: Tensor | None, in_la: Tensor | None, out_la: Tensor | None) -> Tensor:
        return layer(x, weight, bias, gates._replace(input_log_alpha=in_la, output_log_alpha=out_la))

    return differentiate(whole, (dy,), (*tensors, gates.input_log_alpha, gates.output_log_alpha), needs)


def apply(node: type[Node], *args: Any) -> Any:
    """``node.apply(*args)``, or ``node.plain(*args)`` under a transform.

    torch.compile needs ``Function.apply`` itself. A call that is compiled without gradients runs ``forward``, because
    dynamo does not support ``apply`` there. A call that is exported with gradients (a stage of
    ``torch.distributed.pipelining``) runs ``plain``, because an export keeps operators but not the backward of a
    function.
    """
    if is_transformed():
        return node.plain(*args)
    if not torch.compiler.is_compiling():
        return node.apply_at_once(*args)
    learns = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if learns and torch.compiler.is_exporting():
        return node.plain(*args)
    return node.apply(*args) if learns else node.forward(*args)
