"""Gated layers on DTensors (tensor parallelism). Gates are whole on every rank, and torch's operators for DTensors
multiply them.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional as F

from dampr.gates import Gate


def beside(z: Tensor, like: Any) -> Tensor:
    """The gates as a DTensor that is replicated over the mesh of ``like``, so that their gradient is whole too.

    Returns ``z`` unchanged if ``like`` is no DTensor.
    """
    if not isinstance(like, DTensor) or isinstance(z, DTensor):
        return z
    return DTensor.from_local(z, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def times(t: Tensor, z: Tensor) -> Tensor:
    """t * z, computed in the dtype of the gates and returned in that of t.

    If t is a DTensor of partial sums (``Partial`` placements), the sums are completed first.
    """
    if isinstance(t, DTensor) and any(placement.is_partial() for placement in t.placements):
        t = t.redistribute(placements=[Replicate() if p.is_partial() else p for p in t.placements])
    return (t * beside(z, t)).to(t.dtype)


def linear(layer: Any, x: Tensor) -> Tensor:
    """The forward of a :class:`dampr.nn.GatedLinear` whose weight is sharded.

    Gates that are the same for all samples are multiplied into the shards of the weight.
    """
    gate: Gate = layer.gate
    if layer.per_sample and gate.draws:
        rows = math.prod(x.shape[:-1])
        z = gate(rows).view(*x.shape[:-1], -1)
        if layer.granularity == "input":
            return F.linear(times(x, z), layer.weight, layer.bias)
        return times(F.linear(x, layer.weight, layer.bias), z)
    z = beside(gate(), layer.weight)  # once, so that its gradient is one message
    bias = layer.bias
    if bias is not None and layer.granularity == "output":
        bias = times(bias, z)
    return F.linear(x, times(layer.weight, spread(layer, z)), bias)


def spread(layer: Any, z: Tensor) -> Tensor:
    """``z``, one per gate, as a tensor that broadcasts to the weight; gates of whole columns (heads) stay one row."""
    if isinstance(layer.granularity, tuple) and layer.granularity[0] >= layer.weight.shape[0]:
        return z.repeat_interleave(layer.granularity[1])[: layer.weight.shape[1]].view(1, -1)
    values: Tensor = layer._spread(z)
    return values


def whole(t: Tensor) -> Tensor:
    """The full tensor of a DTensor, with a gradient; another tensor as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t
