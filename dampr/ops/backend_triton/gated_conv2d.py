"""Gated convolution on Triton in one pass: host code for the kernels in dampr/kernels/gated_conv2d.py."""

from __future__ import annotations

import torch

from dampr.kernels import configs
from dampr.kernels import gated_conv2d as conv_kernels
from dampr.ops.gate_args import GatePair
from dampr.ops.gated_conv import Window

from . import host
from .gates import sample_gates_fwd

Lists = tuple[torch.Tensor | None, torch.Tensor | None]


def gated_conv2d_one_pass(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z_in: torch.Tensor | None,
    z_out: torch.Tensor | None,
    window: Window,
) -> torch.Tensor:
    """y = z_out * (conv2d(x * z_in, weight) + bias), (B, N, OH, OW), in channels_last and the dtype of x.

    Args:
        x: (B, C, H, W); copied if it is not in channels_last.
        weight: (N, C / groups, R, S), of any floating dtype.
        bias: (N,) or None, of any floating dtype.
        z_in: gate values, float32, (C,), or (B, C) with a row for each image; None: no gates.
        z_out: gate values, float32, (N,) or (B, N); None: no gates.
        window: stride, padding, dilation and groups.

    Blocks of input channels whose gates are all 0 are neither read nor multiplied, for all images or, with a row of
    gates per image, for that image. Tiles of output channels whose gates are all 0 are filled with zeros without a
    product.
    """
    tile = _tile(x, weight, z_in, z_out, window)
    lists = (None, None) if z_in is None else _list_live(z_in, window.groups, tile.depth)
    return _conv(x, weight, bias, z_in, z_out, lists, window, tile)


def gated_conv2d_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gates: GatePair, window: Window
) -> torch.Tensor:
    """Draw the gates, one draw per batch, and run :func:`gated_conv2d_one_pass`."""
    z_in, z_out = (None if gate is None else sample_gates_fwd(gate, None) for gate in (gates.input, gates.output))
    return gated_conv2d_one_pass(x, weight, bias, z_in, z_out, window)


def _slabs(
    x: torch.Tensor, weight: torch.Tensor, z_in: torch.Tensor | None, z_out: torch.Tensor | None, window: Window
) -> tuple[int, int]:
    """(number of slabs, output pixels of one slab).

    A slab is the images that share their gates: one image if some gates are drawn per image, else the whole batch.
    """
    OH, OW = window.size(x.shape, weight.shape)
    return (x.shape[0], OH * OW) if _per_image(z_in) or _per_image(z_out) else (1, x.shape[0] * OH * OW)


def _per_image(z: torch.Tensor | None) -> bool:
    """Whether the gates are drawn for each image: z is (B, channels), not (channels,)."""
    return z is not None and z.dim() == 2


def _dtype(x: torch.Tensor) -> str:
    """The name of the dtype that :func:`configs.conv_tile` takes: "tf32" for float32 where torch allows TF32.

    torch has a separate switch of TF32 for convolutions; it is on by default.
    """
    name, capability = host.machine(x)
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # allow_tf32 sets it too
    return "tf32" if name == "fp32" and capability >= 80 and allowed else name


def _tile(
    x: torch.Tensor, weight: torch.Tensor, z_in: torch.Tensor | None, z_out: torch.Tensor | None, window: Window
) -> configs.Tile:
    """The tile sizes for the convolution of these shapes."""
    slabs, rows = _slabs(x, weight, z_in, z_out, window)
    N, C = weight.shape[0] // window.groups, weight.shape[1]
    return configs.conv_tile(slabs, rows, N, C, z_in is not None, _dtype(x), host.capability(x.device))


def _list_live(z: torch.Tensor, groups: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(live, count), int32: for each image and group, the blocks of ``depth`` input channels that have an open gate.

    Args:
        z: gate values, (C,) or (B, C).
        groups: the groups of the convolution.
        depth: the channels of one block.

    Returns: ``live`` (images * groups, blocks), the indices of these blocks, and ``count`` (images * groups, 1), how
    many there are. Images count as one if they share their gates.
    """
    rows, C = z.shape[:-1].numel() * groups, z.shape[-1] // groups
    live, count = (host.empty(z, (rows, size), torch.int32) for size in (configs.cdiv(C, depth), 1))
    host.launch(
        conv_kernels.list_live_kernel,
        (rows,),
        z.contiguous(),
        live,
        count,
        C,
        BLOCKS=configs.LIVE_BLOCKS,
        BLOCK_C=depth,
    )
    return live, count


def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z_in: torch.Tensor | None,
    z_out: torch.Tensor | None,
    lists: Lists,
    window: Window,
    tile: configs.Tile,
) -> torch.Tensor:
    """Launch the convolution kernel; ``lists`` is the result of :func:`_list_live`, or two Nones without input
    gates.
    """
    (B, _, H, W), (N, C, R, S), (OH, OW), groups = (
        x.shape,
        weight.shape,
        window.size(x.shape, weight.shape),
        window.groups,
    )
    (SH, SW), (PH, PW), (DH, DW) = window[:3]
    slabs, rows = _slabs(x, weight, z_in, z_out, window)
    x, w = (t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight))
    y = host.empty(x, (B, OH, OW, N), x.dtype)
    args = (x, w, *host.vectors(bias, z_in, z_out), *lists, y, slabs, rows, H, W, OH, OW, groups, C, N // groups)
    taps = {"R": R, "S": S, "SH": SH, "SW": SW, "PH": PH, "PW": PW, "DH": DH, "DW": DW}
    gates = {"IN_PER_SLAB": _per_image(z_in), "OUT_PER_SLAB": _per_image(z_out)}
    blocks = {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.cols,
        "BLOCK_C": tile.depth,
        "GROUP": tile.group,
        "EVEN": C % tile.depth == 0,
    }
    options = {
        "PRECISION": "tf32" if _dtype(x) == "tf32" else "ieee",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    grid = (slabs * host.tiles(rows, N // groups, tile) * groups,)
    host.launch(conv_kernels.gated_conv2d_fwd_kernel, grid, *args, **taps, **gates, **blocks, **options)
    return y.permute(0, 3, 1, 2)
