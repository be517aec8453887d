"""Which layer with gates stands for which dense one, and what kind of gates it gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dampr.gates import DependencyGenerator, make_gate
from dampr.nn import (
    GatedBatchNorm1d,
    GatedBatchNorm2d,
    GatedBatchNorm3d,
    GatedConv1d,
    GatedConv2d,
    GatedConv3d,
    GatedEmbedding,
    GatedGRU,
    GatedHeads,
    GatedLayerNorm,
    GatedLinear,
    GatedLSTM,
    GatedMultiheadAttention,
    GatedRNN,
    GatedSyncBatchNorm,
)
from dampr.nn.base import VECTOR_GRANULARITIES, Granularity

from . import heads, inputs

REPLACEMENT: dict[type, Any] = {
    nn.Linear: GatedLinear,
    nn.Conv1d: GatedConv1d,
    nn.Conv2d: GatedConv2d,
    nn.Conv3d: GatedConv3d,
    nn.MultiheadAttention: GatedMultiheadAttention,
    nn.Embedding: GatedEmbedding,
    nn.LSTM: GatedLSTM,
    nn.GRU: GatedGRU,
    nn.RNN: GatedRNN,
}
OUTPUT_ONLY = {
    nn.MultiheadAttention: "heads",
    nn.Embedding: "columns",
    nn.LSTM: "units",
    nn.GRU: "units",
    nn.RNN: "units",
}
NORMS: dict[type, Any] = {
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
    nn.BatchNorm3d: GatedBatchNorm3d,
    nn.SyncBatchNorm: GatedSyncBatchNorm,
}
GATED: dict[type, Any] = {**REPLACEMENT, **NORMS, nn.LayerNorm: GatedLayerNorm}


def precise(gate: Any, model: nn.Module) -> Any:
    """``gate`` in float64 where the model is, because float32 is less exact than compaction is."""
    return (lambda count, device=None: make_gate(gate, count, device).double()) if is_double(model) else gate


def is_double(model: nn.Module) -> bool:
    return any(p.dtype == torch.float64 for p in model.parameters())


def gate_count(layer: nn.Module, granularity: Granularity) -> int:
    kind = GATED[type(layer)]
    count: int = kind.gates_for(layer, granularity)
    return count


def gated_layer(
    name: str, layer: nn.Module, gate: Any, granularity: Granularity, per_sample: bool, of_heads: heads.Attention | None
) -> nn.Module:
    how: dict[str, Any] = {"gate": gate, "per_sample": per_sample, "granularity": granularity}
    if isinstance(layer, nn.RNNBase):
        del how["per_sample"]
    if isinstance(layer, (*NORMS, nn.LayerNorm, nn.MultiheadAttention, nn.RNNBase)):
        del how["granularity"]
        how |= {"statistics": "open"} if isinstance(layer, nn.LayerNorm) else {}
    kind = GATED[type(layer)]
    if of_heads is not None:
        kind, how = GatedHeads, {"gate": gate, "heads": of_heads.heads, "weights_per_gate": of_heads.weights_per_head()}
    gated: nn.Module = kind.from_dense(layer, **how)
    inputs.keep_hooks(layer, gated)
    return gated


def device_of(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters()), None)


def starts_at_one(gate: Any) -> bool:
    """Whether fresh gates are 1 in evaluation."""
    return is_generator(gate) or bool((make_gate(gate, 1).deterministic() == 1).all())


def is_generator(gate: Any) -> bool:
    return gate == "dep_l0" or getattr(gate, "func", gate) is DependencyGenerator


def draws_each(gate: Any, granularity: Granularity, residual: bool) -> bool:
    """Whether the family is published with a draw per sample, and such gates can have one."""
    return is_generator(gate) and granularity in VECTOR_GRANULARITIES and not residual
