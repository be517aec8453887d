"""The weights of a convolution, (N, C / groups, *kernel), with their gates in them: views of it as a matrix,
in either memory format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fold_weight import fold_blocks, fold_weight
from .gate_args import GateArgs
from .node import is_transformed


def channels_innermost(weight: Tensor) -> bool:
    """Whether a (filter, position) is followed in memory by its channels; False under a transform,
    where memory is not to be seen.
    """
    return weight.dim() == 4 and not is_transformed() and weight.is_contiguous(memory_format=torch.channels_last)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as (filters, all else) in the order of its memory, which is (N, *kernel, C) for channels last."""
    if not weight.is_contiguous() and channels_innermost(weight):
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
    """A matrix of as many elements, in that order, in the shape and memory format of ``weight``."""
    if not weight.is_contiguous() and channels_innermost(weight):
        n_out, n_in, *kernel = weight.shape
        return matrix.view(n_out, *kernel, n_in).permute(0, 3, 1, 2)
    return matrix.view(weight.shape)


def fold_filters(
    weight: Tensor, bias: Tensor | None, gate: GateArgs, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Filters (and the bias) times their gates; the weight keeps its memory format."""
    folded, bias = fold_weight(as_matrix(weight), bias, gate.on_rows(), dtype)
    return from_matrix(folded, weight), bias


def fold_channels(weight: Tensor, gate: GateArgs, groups: int, dtype: torch.dtype) -> Tensor:
    """Weights times the gates of the channels they read: columns where channels are innermost,
    else blocks of the filters of a group.
    """
    n_out, n_in = weight.shape[0], weight.shape[1]
    if groups == 1 and channels_innermost(weight):
        last = weight.permute(0, 2, 3, 1)
        folded, _ = fold_weight(last.reshape(-1, n_in), None, gate.on_columns(), dtype)
        return folded.view(last.shape).permute(0, 3, 1, 2)
    return fold_blocks(weight, gate, (max(1, n_out // groups), max(1, weight.shape[2:].numel())), dtype)
