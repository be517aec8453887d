"""Helpers of all kernel launches: layouts, workspaces, sums in a fixed order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from dampr.kernels import configs
from dampr.kernels import gates as gate_kernels
from dampr.kernels.dispatch import DEFAULT
from dampr.spec import GateSpec

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Needs = Sequence[bool]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
    """Launch a kernel on the device of its tensors; does nothing for an empty grid.

    Fused multiply-adds are switched off, because they would move the threshold at which a gate is 0.
    """
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, enable_fp_fusion=False, **sizes)
    else:
        kernel[grid](*args, enable_fp_fusion=False, **sizes)


def gemm_options(tile: configs.Tile, x: torch.Tensor, spec: GateSpec) -> dict[str, Any]:
    """The constants that every GEMM kernel takes besides its block sizes."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 sets it too
    sizes = {"GROUP": tile.group, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {**sizes, "PRECISION": "tf32" if tf32 else "ieee", "GATE": spec}


def machine(x: torch.Tensor) -> tuple[str, int]:
    """(name of the dtype, compute capability), as the functions of :mod:`dampr.kernels.configs` take them."""
    return DTYPE_NAMES[x.dtype], capability(x.device)


@functools.cache
def capability(device: torch.device) -> int:
    """The compute capability: 90 for sm_90; 0 for other devices (AMD, the interpreter)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def device_name(device: torch.device | None) -> str:
    """The name of the GPU for :func:`dampr.kernels.dispatch.thresholds`; without a GPU the name of the default
    table.
    """
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return DEFAULT
    return torch.cuda.get_device_name(device)


def keeps_cast(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the forward keeps the folded weight for the backward: under autocast, where the dense layer keeps a
    converted copy of the weight, of the same size.

    If weight and x have the same dtype, the dense layer keeps none, and the weight is folded again.
    """
    return weight.dtype != x.dtype and x.requires_grad


def tiles(rows: int, cols: int, tile: configs.Tile) -> int:
    """The number of tiles that cover a matrix (rows, cols)."""
    return configs.cdiv(rows, tile.rows) * configs.cdiv(cols, tile.cols)


def reduce(partial: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The sum of a workspace (splits, ...) over its first dimension, in a fixed order."""
    if partial.shape[0] == 1 and partial.dtype == dtype:
        return partial.view(shape)
    out = empty(partial, shape, dtype)
    block_s, block_n = configs.REDUCE_TILE
    grid = (configs.cdiv(out.numel(), block_n),)
    launch(
        gate_kernels.reduce_kernel, grid, partial, out, partial.shape[0], out.numel(), BLOCK_S=block_s, BLOCK_N=block_n
    )
    return out


def rows(t: torch.Tensor) -> torch.Tensor:
    """``t`` (rows, cols) itself if its rows are dense and, where their length allows it, aligned to 16; else a copy."""
    dense = t.stride(1) == 1 and t.stride(0) >= t.shape[1]
    aligned = t.shape[1] % 16 != 0 or (t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0)
    return t if dense and aligned else t.contiguous()


def vectors(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors, contiguous; None stays None."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the device of ``like``."""
    return torch.empty(shape, dtype=dtype, device=like.device)
