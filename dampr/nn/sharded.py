"""Gated layers on DTensors: gates are whole on every rank, and operators of torch, which know how tensors are sharded,
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
    """Gates as a tensor that every rank of the mesh of ``like`` has whole; their gradient is whole too.

    ``z`` where that is no DTensor.
    """
    if not isinstance(like, DTensor) or isinstance(z, DTensor):
        return z
    return DTensor.from_local(z, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def times(t: Tensor, z: Tensor) -> Tensor:
    """t * z in the precision of the gates, in the dtype of t; parts of a sum are added up first."""
    if isinstance(t, DTensor) and any(placement.is_partial() for placement in t.placements):
        t = t.redistribute(placements=[Replicate() if p.is_partial() else p for p in t.placements])
    return (t * beside(z, t)).to(t.dtype)


def linear(layer: Any, x: Tensor) -> Tensor:
    """What a :class:`dampr.nn.GatedLinear` computes of a weight that is sharded.

    Gates per batch go into the shards of the weight.
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
    """One value per gate as something that broadcasts to the weight; a gate of whole columns, as heads have it,
    is not written out.
    """
    if isinstance(layer.granularity, tuple) and layer.granularity[0] >= layer.weight.shape[0]:
        return z.repeat_interleave(layer.granularity[1])[: layer.weight.shape[1]].view(1, -1)
    values: Tensor = layer._spread(z)
    return values


def whole(t: Tensor) -> Tensor:
    """A DTensor as a plain tensor, with a gradient; any other as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t
