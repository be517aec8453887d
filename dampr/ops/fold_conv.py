"""Fold gates into the weight of a convolution, (N, C / groups, *kernel), in either memory format.

The weight is viewed as a matrix in the order of its memory, and the operators of :mod:`.fold_weight` work on that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fold_weight import fold_blocks, fold_weight
from .gate_args import GateArgs
from .node import is_transformed


def channels_innermost(weight: Tensor) -> bool:
    """Whether the channels of a filter position lie side by side in memory (channels last).

    False under torch.func transforms, where a tensor does not show its memory.
    """
    return weight.dim() == 4 and not is_transformed() and weight.is_contiguous(memory_format=torch.channels_last)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as (filters, everything else), in the order of its memory; for channels last that is (N, *kernel, C)."""
    if not weight.is_contiguous() and channels_innermost(weight):
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
    """The inverse of :func:`as_matrix`: a matrix in the shape and the memory format of ``weight``."""
    if not weight.is_contiguous() and channels_innermost(weight):
        n_out, n_in, *kernel = weight.shape
        return matrix.view(n_out, *kernel, n_in).permute(0, 3, 1, 2)
    return matrix.view(weight.shape)


def fold_filters(
    weight: Tensor, bias: Tensor | None, gate: GateArgs, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) with each filter times its gate, in ``dtype``; the weight keeps its memory format."""
    folded, bias = fold_weight(as_matrix(weight), bias, gate.on_rows(), dtype)
    return from_matrix(folded, weight), bias


def fold_channels(weight: Tensor, gate: GateArgs, groups: int, dtype: torch.dtype) -> Tensor:
    """The weight times the gates of the channels that it reads, in ``dtype``.

    The gates are on columns if channels are innermost, else on blocks: one channel of all filters of a group.
    """
    n_out, n_in = weight.shape[0], weight.shape[1]
    if groups == 1 and channels_innermost(weight):
        last = weight.permute(0, 2, 3, 1)
        folded, _ = fold_weight(last.reshape(-1, n_in), None, gate.on_columns(), dtype)
        return folded.view(last.shape).permute(0, 3, 1, 2)
    return fold_blocks(weight, gate, (max(1, n_out // groups), max(1, weight.shape[2:].numel())), dtype)
