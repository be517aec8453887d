"""Attention and torch's transformer layers in convert and compact: which parts get gates, which are left out and why,
and what compaction leaves of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dampr.nn import (
    GatedLayer,
    GatedMultiheadAttention,
    GatedTransformerDecoderLayer,
    GatedTransformerEncoderLayer,
    PrunedMultiheadAttention,
    PrunedTransformerDecoderLayer,
    PrunedTransformerEncoderLayer,
)
from dampr.nn.base import Granularity
from dampr.nn.pruned.attention import attention_arguments
from dampr.nn.pruned.transformer import PrunedLayer
from dampr.nn.transformer import GatedTransformer

from . import inputs
from .modules import by_name, is_exactly, of_kind

_LAYERS: dict[type, Any] = {
    nn.TransformerEncoderLayer: GatedTransformerEncoderLayer,
    nn.TransformerDecoderLayer: GatedTransformerDecoderLayer,
}
_PRUNED: dict[type, Any] = {
    nn.TransformerEncoderLayer: PrunedTransformerEncoderLayer,
    nn.TransformerDecoderLayer: PrunedTransformerDecoderLayer,
}
_PARTS = ("self_attn", "multihead_attn", "linear1", "linear2", "norm1", "norm2", "norm3")
_RESIDUAL = "the residual stream has its width, and norms there count every channel"
_LAST = "1 closed {} stays: every layer keeps one at least"

Kept = dict[tuple[nn.Module, bool], Tensor]


def owners(model: nn.Module) -> dict[nn.Module, list[tuple[str, nn.Module]]]:
    """For each part (attention, linear layer or norm) of a transformer layer, torch's own or a gated one: the names and
    layers that it is a part of.
    """
    found: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if is_exactly(layer, _LAYERS) or isinstance(layer, GatedTransformer):
            for part in _PARTS:
                if part in layer._modules:
                    found.setdefault(getattr(layer, part), []).append((name, layer))
    return found


def left_out(part: nn.Module, above: list[tuple[str, nn.Module]], granularity: Granularity) -> str | None:
    """Why convert gives no gates to a part of the transformer layers ``above``; None if it does."""
    if granularity == "output" and any(layer.linear2 is part for _, layer in above):
        return f"its outputs have no gates: {_RESIDUAL}"
    return None


def adopt(model: nn.Module) -> dict[nn.Module, Any]:
    """Turn each transformer layer of torch that has gated parts into the gated class, in place. Returns layer -> its
    former class.

    The layer's fused path would read the parts' weights without calling the parts, and so skip their gates.
    """
    changed: dict[nn.Module, Any] = {}
    for layer in model.modules():
        if is_exactly(layer, _LAYERS) and any(isinstance(part, GatedLayer) for part in layer.children()):
            changed[layer] = type(layer)
            layer.__class__ = _LAYERS[type(layer)]
    return changed


def make_plain(
    small: nn.Module, samples: list[Any], atol: float, rtol: float
) -> tuple[nn.Module, Kept, dict[str, tuple[int, list[int]]], dict[str, str]]:
    """Replace every gated transformer layer and attention of ``small`` by a plain one without closed heads, neurons and
    sublayers.

    Returns: the model; the neurons that are left, by (layer, whether it writes them); for each attention, by name, how
    many heads there were and which are left; and notes on what is closed and stays. An attention outside of transformer
    layers keeps its heads if the model computes something from its attention weights, which is found out by trying.
    """
    kept: Kept = {}
    heads: dict[str, tuple[int, list[int]]] = {}
    notes: dict[str, str] = {}
    for name, layer in by_name(small, GatedTransformer).items():
        plain, left = layer.compacted()
        inputs.replace(small, {layer: plain})
        small = plain if layer is small else small
        _record(f"{name}." if name else "", layer, plain, left, kept, heads, notes)
    alone = by_name(small, GatedMultiheadAttention)
    expected = (
        [inputs.evaluate(small, sample) for sample in samples] if any(m.closed_heads() for m in alone.values()) else []
    )
    for name, attention in alone.items():
        pruned, there = attention.compacted()
        inputs.replace(small, {attention: pruned})
        if len(there) < attention.num_heads and not _same(small, samples, expected, atol, rtol):
            inputs.replace(small, {pruned: attention.to_dense()})
            notes[name] = f"{len(attention.closed_heads())} closed heads stay: the model reads their attention weights"
            continue
        heads[name] = attention.num_heads, there
        if attention.closed_heads() & set(there):
            notes[name] = _LAST.format("head")
    return small, kept, heads, notes


def _record(
    prefix: str,
    layer: Any,
    plain: Any,
    left: dict[str, list[int]],
    kept: Kept,
    heads: dict[str, tuple[int, list[int]]],
    notes: dict[str, str],
) -> None:
    """Add what is left of one transformer layer to ``kept``, ``heads`` and ``notes``."""
    for name in layer._attentions:
        attention = getattr(layer, name)
        heads[prefix + name] = attention.num_heads, left[name]
        if isinstance(attention, GatedMultiheadAttention) and attention.closed_heads() & set(left[name]):
            notes[prefix + name] = _LAST.format("head")
    neurons, closed = left["linear1"], layer.closed_neurons()
    if 0 < len(neurons) < layer.linear1.out_features:
        kept[plain.linear1, True] = kept[plain.linear2, False] = torch.tensor(neurons)
    if closed & set(neurons):
        why = f"{len(closed)} closed neurons stay: the activation is not one of each neuron alone"
        notes[f"{prefix}linear1"] = _LAST.format("neuron") if len(neurons) == 1 else why
    for name, writes in (("linear1", False), ("linear2", True)):
        part = getattr(layer, name)
        channels = part.closed_channels()[0 if writes else 1] if isinstance(part, GatedLayer) else set()
        if channels:
            notes[prefix + name] = f"{len(channels)} closed channels stay: {_RESIDUAL}"


def narrow(attention: Any, left: Tensor) -> PrunedMultiheadAttention:
    """An attention that reads and writes only the channels ``left``; its heads keep their width."""
    how = attention_arguments(attention) | dict.fromkeys(("embed_dim", "kdim", "vdim"), len(left))
    heads, dtype = getattr(attention, "heads", range(attention.num_heads)), attention.out_proj.weight.dtype
    plain = PrunedMultiheadAttention(**how, heads=heads, head_dim=attention.head_dim, device="meta", dtype=dtype)
    dims = {"in_proj_weight": 1, "out_proj.weight": 0, "out_proj.bias": 0}
    for name, p in attention.named_parameters():
        owner, _, own = name.rpartition(".")
        new = p.detach().index_select(dims[name], left.to(p.device)) if name in dims else p.detach().clone()
        setattr(plain.get_submodule(owner), own, nn.Parameter(new, requires_grad=p.requires_grad))
    return plain.train(attention.training)


def resize(model: nn.Module, norms: list[nn.Module], size: int) -> None:
    """Set ``d_model`` of the transformers and transformer layers whose residual stream now has the width ``size``.

    These are the ones with one of ``norms``, the norms on that stream. A layer of torch becomes the pruned class.
    """
    layers: list[Any] = of_kind(model, (nn.Transformer, PrunedLayer, *_PRUNED))
    for layer in layers:
        if any(part in norms for part in (layer.modules() if isinstance(layer, nn.Transformer) else layer.children())):
            layer.d_model = size
            if type(layer) in _PRUNED:
                layer.__class__, layer.nhead = _PRUNED[type(layer)], layer.self_attn.num_heads


def _same(model: nn.Module, samples: list[Any], expected: list[list[Tensor]], atol: float, rtol: float) -> bool:
    """Whether the model computes the expected outputs for all samples, within the tolerances."""
    try:
        return not any(
            inputs.differ(e, inputs.evaluate(model, sample), rtol, atol)
            for e, sample in zip(expected, samples, strict=True)
        )
    except RuntimeError:
        return False
