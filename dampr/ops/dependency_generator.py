"""The generator of Dep-L0, a_l = limit tanh(W_l a_{l-1} + b_l) with a_0 = 1, as one op forward and one op backward.

For small generators: where products are large, torch's own are better, and :func:`dependency_generator` takes those.
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
    first = parameters[0]
    values: Tensor = select(first.device, first.dtype).dependency_generator_fwd(parameters, limit)
    return values


def _fwd_fake(parameters: Sequence[Tensor], limit: float) -> Tensor:
    return parameters[0].new_empty(sum(bias.shape[0] for bias in parameters[1::2]))


def _bwd(parameters: Sequence[Tensor], values: Tensor, dvalues: Tensor, limit: float) -> list[Tensor]:
    first = parameters[0]
    grads: list[Tensor] = select(first.device, first.dtype).dependency_generator_bwd(parameters, values, dvalues, limit)
    return grads


def _bwd_fake(parameters: Sequence[Tensor], values: Tensor, dvalues: Tensor, limit: float) -> list[Tensor]:
    return [p.new_empty(p.shape) for p in parameters]


fwd = define("dependency_generator_fwd(Tensor[] parameters, float limit) -> Tensor", _fwd, _fwd_fake)
bwd = define(
    "dependency_generator_bwd(Tensor[] parameters, Tensor values, Tensor dvalues, float limit) -> Tensor[]",
    _bwd,
    _bwd_fake,
    # they may be views of one tensor, which results of an operator must not be
    lambda grads, *_: [g.clone() for g in grads],
)


class _DependencyGenerator(Node):
    tensors = -1  # the last one saved is what came out

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
    """a_1, a_2, ..., (widths[l],) each, differentiable in ``parameters``: W_1, b_1, W_2, ...;
    by one op where :func:`fused` says so.
    """
    if not fused(parameters):
        return reference.dependency_generator(parameters, limit)
    values = apply(_DependencyGenerator, *parameters, limit)
    return list(values.split([bias.shape[0] for bias in parameters[1::2]]))


def fused(parameters: Sequence[Tensor]) -> bool:
    """Whether the backend has the op and it beats torch's own matrix-vector products at this size."""
    first = parameters[0]
    if not PLAIN.issuperset(map(type, parameters)) or not (first.is_cpu or first.is_cuda) or not _fit(parameters):
        return False
    limit: int = select(first.device, first.dtype).GENERATOR_PARAMETERS
    return sum(p.numel() for p in parameters) <= limit


def _fit(parameters: Sequence[Tensor]) -> bool:
    """Whether shapes, dtypes and devices go together; where they do not, torch says which."""
    first = parameters[0]
    dtype, device, width = first.dtype, first.device, first.shape[-1]
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        if weight.shape != (bias.numel(), width) or any(p.dtype != dtype or p.device != device for p in (weight, bias)):
            return False
        width = bias.numel()
    return True
