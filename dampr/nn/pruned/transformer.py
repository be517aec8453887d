"""PrunedTransformerEncoderLayer and PrunedTransformerDecoderLayer: the plain layers that compaction makes of
transformer layers with closed heads, neurons or sublayers.
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
    """The code that both pruned layers share; mixed in before :class:`EncoderBySublayers` or
    :class:`DecoderBySublayers`.
    """

    def _keep(
        self, d_model: int, nhead: int, dim_feedforward: int, heads: Sequence[Sequence[int] | None], how: dict[str, Any]
    ) -> None:
        """Replace the attentions, and remove the sublayers, that the dense constructor has made in full.

        Args:
            d_model, nhead, dim_feedforward: the constructor's arguments; ``dim_feedforward`` 0: no feed-forward
                sublayer.
            heads: for each attention the heads that are left; () for none, None for all.
            how: further arguments of :class:`PrunedMultiheadAttention`.
        """
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
        """x + branch(); x if the sublayer was removed."""
        return x if isinstance(getattr(self, self._sublayers[index]), RemovedPart) else x + branch()

    def is_whole(self) -> bool:
        """Whether no head and no sublayer is missing, as after :func:`dampr.expand`; torch's own layer could take its
        place then.
        """
        return not any(isinstance(part, (RemovedPart, PrunedMultiheadAttention)) for part in self.children())

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor for a layer like this one: plain data, and an activation that is a module.

        Raises: TypeError if the activation is a function other than ``F.relu`` and ``F.gelu``.
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
    """An ``nn.TransformerEncoderLayer`` that has only some of its heads, or only some of its sublayers.

    Args:
        d_model ... dtype: as in ``nn.TransformerEncoderLayer``; ``dim_feedforward=0`` leaves out the feed-forward
            sublayer.
        heads: the indices of those of the ``nhead`` heads that are left; () leaves out the attention, None keeps all.
        head_dim: the width of a head; None: d_model / nhead. It differs if channels of the residual stream were cut
            too.

    It is called like ``nn.TransformerEncoderLayer``. With ``norm_first=False``, the norm after a removed sublayer
    stays.

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
        # if heads are missing, the attention is replaced anyway; with one head torch's checks of nhead cannot fail
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
    """An ``nn.TransformerDecoderLayer`` that has only some of its heads, or only some of its sublayers.

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
    """Stands in place of a removed part, with the attributes that ``nn.TransformerEncoder`` reads."""

    in_proj_weight = in_proj_bias = weight = bias = torch.empty(0)

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first

    @property
    def out_proj(self) -> RemovedPart:
        """This object, because ``nn.TransformerEncoder`` reads ``out_proj.weight`` too."""
        return self


_Removed = RemovedPart  # the former name, which older pickles of compacted models contain


def remove_sublayer(layer: Any, index: int, name: str) -> None:
    """Remove sublayer ``index`` from ``layer``, where ``name`` is its first part; a norm after the sum stays."""
    for part in ("linear1", "linear2") if name == "linear1" else (name,):
        setattr(layer, part, RemovedPart(getattr(getattr(layer, part), "batch_first", False)))
    if layer.norm_first:
        setattr(layer, f"norm{index + 1}", RemovedPart())


def layer_arguments(layer: Any, d_model: int, nhead: int) -> dict[str, Any]:
    """The constructor's arguments that ``torch.nn``'s transformer layers and those made of them share, read off
    ``layer``.

    Raises: TypeError for an activation other than ``F.relu``, ``F.gelu`` or a module.
    """
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
    """The indices of the heads that are left; () for a removed attention, None for one with all heads."""
    if isinstance(attention, RemovedPart):
        return ()
    return attention.heads if isinstance(attention, PrunedMultiheadAttention) else None
