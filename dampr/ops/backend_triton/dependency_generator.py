"""Launches of dampr/kernels/dependency_generator.py: one program computes all layers of the generator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from dampr.kernels import configs
from dampr.kernels import dependency_generator as kernels

from . import host

# The largest generator that one program computes. One program reads about 20 GB/s [est]; for larger generators that
# takes longer than one launch per layer.
GENERATOR_PARAMETERS = 2**18


def dependency_generator_fwd(parameters: Sequence[torch.Tensor], limit: float) -> torch.Tensor:
    """a_1, a_2, ... one after the other in one vector, float32."""
    held = [p.contiguous() for p in parameters]
    values = host.empty(held[0], (sum(bias.numel() for bias in held[1::2]),), torch.float32)
    host.launch(kernels.dependency_generator_fwd_kernel, (1,), _table(held), values, len(held) // 2, **_sizes(limit))
    return values


def dependency_generator_bwd(
    parameters: Sequence[torch.Tensor], values: torch.Tensor, dvalues: torch.Tensor, limit: float
) -> list[torch.Tensor]:
    """The gradients of all parameters, float32; they are views of one tensor."""
    held, values, dvalues = [p.contiguous() for p in parameters], values.contiguous(), dvalues.contiguous()
    grads = host.empty(values, (sum(p.numel() for p in held),), torch.float32)
    args = _table(held), values, dvalues, torch.empty_like(values), grads, len(held) // 2, values.numel(), grads.numel()
    host.launch(kernels.dependency_generator_bwd_kernel, (1,), *args, **_sizes(limit))
    pieces = grads.split([p.numel() for p in held])
    return [piece.view(p.shape) for piece, p in zip(pieces, held, strict=True)]


def _sizes(limit: float) -> dict[str, Any]:
    """The constants of a launch. One pipeline stage, because a layer reads what the one before it has just written."""
    block_n, block_k = configs.GENERATOR_TILE
    return {
        "LIMIT": limit,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": configs.GENERATOR_WARPS,
        "num_stages": 1,
    }


def _table(held: Sequence[torch.Tensor]) -> torch.Tensor:
    """:func:`_table_of` these parameters."""
    widths = held[0].shape[1], *(bias.numel() for bias in held[1::2])
    return _table_of(tuple(p.data_ptr() for p in held), widths, held[0].device)


@functools.lru_cache(maxsize=64)
def _table_of(addresses: tuple[int, ...], widths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 (layers, 4): for each layer the addresses of weight and bias, and both widths, as the kernels read them.

    It is cached, so that a step copies nothing to the device and can be captured in a CUDA graph.
    """
    rows = zip(addresses[::2], addresses[1::2], widths, widths[1:], strict=False)
    return torch.tensor(list(rows), dtype=torch.int64, device=device)
