"""PrunedTransformerEncoderLayer and PrunedTransformerDecoderLayer: what compaction leaves of layers that had closed
heads, neurons or sublayers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dampr import _checks

from ..sublayers import BySublayers, DecoderBySublayers, EncoderBySublayers
from .attention import PrunedMultiheadAttention

_ACTIVATIONS = {F.relu: "relu", F.gelu: "gelu"}


class PrunedLayer(BySublayers):
    """What both pruned layers share, mixed in before :class:`EncoderBySublayers` or :class:`DecoderBySublayers`."""

    def _keep(
        self, d_model: int, nhead: int, dim_feedforward: int, heads: Sequence[Sequence[int] | None], how: dict[str, Any]
    ) -> None:
        """Replace what the dense constructor made by what is left of it."""
        dim_feedforward = _checks.positive_int("dim_feedforward", dim_feedforward, least=0)
        self.d_model, self.nhead = d_model, nhead
        for index, (name, left) in enumerate(zip(self._attentions, heads, strict=True)):
            if left is not None and not left:
                remove_sublayer(self, index, name)
            elif left is not None or how["head_dim"] is not None:
                there = range(nhead) if left is None else left
                setattr(self, name, PrunedMultiheadAttention(d_model, nhead, **how, heads=there))
        if dim_feedforward == 0:
            remove_sublayer(self, len(self._attentions), "linear1")

    def _sum(self, index: int, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        return x if isinstance(getattr(self, self._sublayers[index]), RemovedPart) else x + branch()

    def is_whole(self) -> bool:
        """Whether every head and sublayer is there, as after :func:`dampr.expand`,
        so that torch's own layer would do.
        """
        return not any(isinstance(part, (RemovedPart, PrunedMultiheadAttention)) for part in self.children())

    def arguments(self) -> dict[str, Any]:
        """What its constructor takes for such a layer: plain data, and an activation that is a module.

        Raises TypeError for a function.
        """
        attentions = [getattr(self, name) for name in self._attentions]
        widths = [
            a.head_dim
            for a in attentions
            if isinstance(a, PrunedMultiheadAttention) and a.head_dim * self.nhead != self.d_model
        ]
        own = dict(zip(("heads", "memory_heads"), map(_heads_of, attentions), strict=False))
        return layer_arguments(self, self.d_model, self.nhead) | own | ({"head_dim": widths[0]} if widths else {})


class PrunedTransformerEncoderLayer(PrunedLayer, EncoderBySublayers):
    """An ``nn.TransformerEncoderLayer`` of which only some heads, or only some sublayers, are there: what is left of a
    gated one.

    Args:
        d_model ... dtype: as in ``nn.TransformerEncoderLayer``; ``dim_feedforward=0`` for a layer without the
            feed-forward sublayer.
        heads: which of the ``nhead`` heads are there; () for a layer without attention, None for all.
        head_dim: how wide a head is; None: d_model / nhead. Another where channels of the residual stream were cut.

    Called as ``nn.TransformerEncoderLayer`` is. The norm of a sublayer that is not there stays where it comes after the
    sum.

    Raises: ValueError that names the argument, and what ``nn.TransformerEncoderLayer`` raises.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: Sequence[int] | None = None,
        head_dim: int | None = None,
    ) -> None:
        arguments = dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype
        # else torch's attention, which wants a divisor, is replaced in any case
        whole = heads is None and head_dim is None
        super().__init__(d_model, nhead if whole else 1, max(dim_feedforward, 1), *arguments)
        how = {
            "dropout": dropout,
            "bias": bias,
            "batch_first": batch_first,
            "head_dim": head_dim,
            "device": device,
            "dtype": dtype,
        }
        self._keep(d_model, nhead, dim_feedforward, [heads], how)


class PrunedTransformerDecoderLayer(PrunedLayer, DecoderBySublayers):
    """An ``nn.TransformerDecoderLayer`` of which only some heads, or only some sublayers, are there.

    Everything as in :class:`PrunedTransformerEncoderLayer`; ``memory_heads`` are those of the attention to the
    encoder's output.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: Sequence[int] | None = None,
        memory_heads: Sequence[int] | None = None,
        head_dim: int | None = None,
    ) -> None:
        arguments = dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype
        whole = None in (heads, memory_heads) and head_dim is None
        super().__init__(d_model, nhead if whole else 1, max(dim_feedforward, 1), *arguments)
        how = {
            "dropout": dropout,
            "bias": bias,
            "batch_first": batch_first,
            "head_dim": head_dim,
            "device": device,
            "dtype": dtype,
        }
        self._keep(d_model, nhead, dim_feedforward, [heads, memory_heads], how)


class RemovedPart(nn.Module):
    """In the place of a part of a sublayer that is gone, with the attributes that nn.TransformerEncoder looks at."""

    in_proj_weight = in_proj_bias = weight = bias = torch.empty(0)

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first

    @property
    def out_proj(self) -> RemovedPart:
        return self


_Removed = RemovedPart  # as pickles of compacted models know it


def remove_sublayer(layer: Any, index: int, name: str) -> None:
    """Leave nothing of a sublayer of ``layer`` but a norm that comes after the sum."""
    for part in ("linear1", "linear2") if name == "linear1" else (name,):
        setattr(layer, part, RemovedPart(getattr(getattr(layer, part), "batch_first", False)))
    if layer.norm_first:
        setattr(layer, f"norm{index + 1}", RemovedPart())


def layer_arguments(layer: Any, d_model: int, nhead: int) -> dict[str, Any]:
    """What the constructor of ``layer``, one of ``torch.nn`` or what gates left of it, was given of what they share."""
    norm = next((m for m in layer.modules() if isinstance(m, nn.LayerNorm)), None)
    activation = layer.activation if isinstance(layer.activation, nn.Module) else _ACTIVATIONS.get(layer.activation)
    if activation is None:
        raise TypeError(f"activation={layer.activation!r}: expected F.relu, F.gelu or a module")
    return {
        "d_model": d_model,
        "nhead": nhead,
        "dim_feedforward": getattr(layer.linear1, "out_features", 0),
        "dropout": layer.dropout.p,
        "activation": activation,
        "layer_norm_eps": 1e-5 if norm is None else norm.eps,
        "batch_first": layer.self_attn.batch_first,
        "norm_first": layer.norm_first,
        "bias": norm is None or norm.bias is not None,
    }


def _heads_of(attention: nn.Module) -> tuple[int, ...] | None:
    if isinstance(attention, RemovedPart):
        return ()
    return attention.heads if isinstance(attention, PrunedMultiheadAttention) else None
