"""The generator of Dep-L0 as one operator: a_l = limit tanh(W_l a_{l-1} + b_l), with a_0 = 1.

It pays for small generators, whose time is in launches. For large ones torch's matrix products are faster, and
:func:`dependency_generator` uses these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dampr import reference

from .backends import select
from .library import define, wanted
from .node import PLAIN, Node, apply


def _fwd(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Implementation of ``dampr::dependency_generator_fwd``: a_1, a_2, ... one after the other in one vector.

    parameters: W_1, b_1, W_2, b_2, ...; W_l is (widths[l], widths[l - 1]).
    """
    first = parameters[0]
    values: Tensor = select(first.device, first.dtype).dependency_generator_fwd(parameters, limit)
    return values


def _fwd_fake(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """The empty result of :func:`_fwd`."""
    return parameters[0].new_empty(sum(bias.shape[0] for bias in parameters[1::2]))


def _bwd(parameters: Sequence[Tensor], values: Tensor, dvalues: Tensor, limit: float) -> list[Tensor]:
    """Implementation of ``dampr::dependency_generator_bwd``: the gradient of each parameter.

    values: the result of :func:`_fwd`; dvalues: its gradient.
    """
    first = parameters[0]
    grads: list[Tensor] = select(first.device, first.dtype).dependency_generator_bwd(parameters, values, dvalues, limit)
    return grads


def _bwd_fake(parameters: Sequence[Tensor], values: Tensor, dvalues: Tensor, limit: float) -> list[Tensor]:
    """The empty results of :func:`_bwd`."""
    return [p.new_empty(p.shape) for p in parameters]


fwd = define("dependency_generator_fwd(Tensor[] parameters, float limit) -> Tensor", _fwd, _fwd_fake)
bwd = define(
    "dependency_generator_bwd(Tensor[] parameters, Tensor values, Tensor dvalues, float limit) -> Tensor[]",
    _bwd,
    _bwd_fake,
    # a backend may return views of one tensor, which the results of an operator must not be
    lambda grads, *_: [g.clone() for g in grads],
)


class _DependencyGenerator(Node):
    """The autograd function of the generator."""

    tensors = -1  # all saved tensors but the last, which is the output

    @staticmethod
    def plain(*inputs: Any) -> Tensor:
        *parameters, limit = inputs
        return torch.cat(reference.dependency_generator(parameters, limit))

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *parameters, limit = inputs
        return fwd(parameters, limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.constants = inputs[-1:]
        ctx.save_for_backward(*inputs[:-1], output)

    @staticmethod
    def fused(ctx: Any, dvalues: Tensor) -> Any:
        *parameters, values = ctx.saved_tensors
        return *wanted(bwd(parameters, values, dvalues, *ctx.constants), ctx.needs_input_grad[:-1]), None


def dependency_generator(parameters: Sequence[Tensor], limit: float) -> list[Tensor]:
    """a_1, a_2, ..., (widths[l],) each, differentiable in ``parameters`` W_1, b_1, W_2, ...

    Computed by one operator if :func:`fused` says so, else by torch's products.
    """
    if not fused(parameters):
        return reference.dependency_generator(parameters, limit)
    values = apply(_DependencyGenerator, *parameters, limit)
    return list(values.split([bias.shape[0] for bias in parameters[1::2]]))


def fused(parameters: Sequence[Tensor]) -> bool:
    """Whether one operator computes the generator: the backend has it, and it is faster than torch's products at this
    size.
    """
    first = parameters[0]
    if not PLAIN.issuperset(map(type, parameters)) or not (first.is_cpu or first.is_cuda) or not _fit(parameters):
        return False
    limit: int = select(first.device, first.dtype).GENERATOR_PARAMETERS
    return sum(p.numel() for p in parameters) <= limit


def _fit(parameters: Sequence[Tensor]) -> bool:
    """Whether shapes, dtypes and devices fit together; if not, torch's own products raise an error that says what is
    wrong.
    """
    first = parameters[0]
    dtype, device, width = first.dtype, first.device, first.shape[-1]
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        if weight.shape != (bias.numel(), width) or any(p.dtype != dtype or p.device != device for p in (weight, bias)):
            return False
        width = bias.numel()
    return True
