"""The nodes of autograd: fused for a forward and its backward, plain PyTorch for every other derivative.

A kernel has no derivative of its own. So every op has a ``plain`` form beside it, which computes the same from the same
inputs, gates redrawn from their seed included, and which torch differentiates as often as it is asked to. It serves a
backward that is itself differentiated (``create_graph=True``), a backward of a batch of gradients
(``is_grads_batched=True``), torch.func and forward mode.
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

# Looked up once: every backward asks these, and beside a tiny layer an attribute of an attribute counts.
_grad_enabled, _compiling = torch.is_grad_enabled, torch.compiler.is_compiling


def is_transformed() -> bool:
    """Whether torch.func or forward mode is at work: they need operators that torch knows."""
    return in_torch_func() or forward_mode_level() >= 0


PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, list, tuple, GateSpec, torch.dtype}


def needs_dispatcher(args: Sequence[Any], by_profiler: bool = True) -> bool:
    """Whether a compiler, a dispatch mode, a transform, the profiler or an argument of another type must see operators.

    Args:
        args: the arguments of the operator.
        by_profiler: False where a profiler does not count, because it is served by what really runs.
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
    """Base of the nodes. A subclass has ``forward``, ``fused`` in the place of ``backward``, and ``plain``.

    The context of a call keeps what :meth:`plain` takes: the first ``tensors`` of the saved tensors, which are the
    first inputs of ``forward``, and after them ``constants``.
    """

    tensors: int
    plain: Callable[..., Any]
    fused: Callable[..., Any] | None = None
    by_operators: Callable[..., Any] | None = None
    apply_at_once: Callable[..., Any]  # ``apply`` without what it does first, for where nobody traces or transforms

    def __init_subclass__(cls) -> None:
        planned, fused = cls.fused is None, cls.fused or cls.by_operators

        def backward(ctx: Any, *grads: Tensor) -> Any:
            # Differentiated again, or one of a batch. What is compiled is neither:
            # torch refuses a second derivative of it by name.
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
    """Base of the nodes that go straight into the backend, by the :class:`.plan.Plan` that ``forward`` is given last.

    A subclass has ``by_operators`` in the place of ``fused``: the backward by operators. What the forward kept is the
    last of the saved tensors, and the plan is the one constant.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        plan, tensors = inputs[-1], inputs[:-1]
        y, kept = plan.forward(plan, *tensors)
        ctx.save_for_backward(*tensors, kept)
        ctx.constants = (plan,)
        # autograd lets nobody change a view in place
        changeable = as_no_view(y, y.shape) if is_view(y) else y
        return changeable  # type: ignore[no-any-return]


def _by_plain(node: type[Node], ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a call, differentiable in its inputs and in ``grads``."""
    needs = ctx.needs_input_grad
    inputs = ctx.saved_tensors[: node.tensors]
    found = differentiate(lambda *given: node.plain(*given, *ctx.constants), grads, inputs, needs[: len(inputs)])
    return (*found, *[None] * (len(needs) - len(inputs)))


def differentiate(
    function: Callable[..., Any], grads: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the ``inputs`` that need one from ``grads``, those of the outputs;
    differentiable where gradients are enabled.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [_stand_in(t) if need and t is not None else t for t, need in zip(inputs, needs, strict=True)]
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t, need in zip(given, needs, strict=True) if need and t is not None]
        learned = [(y, dy) for y, dy in zip(outputs, grads, strict=True) if y is not None and y.requires_grad]
        found = [torch.zeros_like(t) for t in wanted]
        if learned:  # not by gates of a rule without a gradient
            ends, upstream = zip(*learned, strict=True)
            found = list(torch.autograd.grad(ends, wanted, upstream, create_graph=again, materialize_grads=True))
    return [found.pop(0) if need and t is not None else None for t, need in zip(given, needs, strict=True)]


def _stand_in(t: Tensor) -> Tensor:
    """A view in the place of an input: what the input was itself made of is not part of the gradient by it."""
    view = t.view_as(t)
    return view if view.requires_grad else view.requires_grad_()


def differentiate_layer(
    layer: Callable[..., Tensor], dy: Tensor, tensors: Sequence[Tensor | None], gates: GatePair, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and both log-alphas by way of ``layer(x, weight, bias, gates)``, of operators,
    for whoever needs operators.
    """

    def whole(x: Tensor, weight: Tensor, bias: Tensor | None, in_la: Tensor | None, out_la: Tensor | None) -> Tensor:
        return layer(x, weight, bias, gates._replace(input_log_alpha=in_la, output_log_alpha=out_la))

    return differentiate(whole, (dy,), (*tensors, gates.input_log_alpha, gates.output_log_alpha), needs)


def apply(node: type[Node], *args: Any) -> Any:
    """``node.apply(*args)``, or its plain form where somebody transforms.

    Under torch.compile ``Function.apply`` has more to do, and is called itself. What is compiled without a gradient is
    the forward: dynamo does not know the ``apply`` of such a function there. What is exported
    with one (a stage of ``torch.distributed.pipelining``) keeps operators alone, not the backward of a function.
    """
    if is_transformed():
        return node.plain(*args)
    if not torch.compiler.is_compiling():
        return node.apply_at_once(*args)
    learns = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if learns and torch.compiler.is_exporting():
        return node.plain(*args)
    return node.apply(*args) if learns else node.forward(*args)
