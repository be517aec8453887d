"""The generator of Dep-L0 in one call: ``generator.h`` of csrc."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]

from .host import CODES, ptr

# the largest generator that one call computes; it runs on one thread, and torch's products use several
GENERATOR_PARAMETERS = 2**22


def dependency_generator_fwd(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """a_1, a_2, ... one after the other in one vector."""
    held, widths = _chain(parameters)
    values = torch.empty(sum(widths[1:]), dtype=held[0].dtype)
    _C.generator_fwd(CODES[values.dtype], [*map(ptr, held)], widths, limit, ptr(values))
    return values


def dependency_generator_bwd(
    parameters: Sequence[Tensor], values: Tensor, dvalues: Tensor, limit: float
) -> list[Tensor]:
    """The gradients of W_1, b_1, W_2, ..., from those of the values."""
    (held, widths), values, dvalues = _chain(parameters), values.contiguous(), dvalues.contiguous()
    grads = [torch.empty_like(p) for p in held]
    _C.generator_bwd(
        CODES[values.dtype], [*map(ptr, held)], widths, limit, ptr(values), ptr(dvalues), [*map(ptr, grads)]
    )
    return grads


def _chain(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """(the parameters, contiguous; the widths of a_0, a_1, ...)."""
    return [p.contiguous() for p in parameters], [parameters[0].shape[1], *(bias.numel() for bias in parameters[1::2])]
