"""Attention as one layer: torch's own, and the attention with fewer heads that compaction puts in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dampr.gates import GateLike
from dampr.nn import GatedMultiheadAttention, PrunedMultiheadAttention
from dampr.nn.base import Granularity

from ..measure import count_call
from ..places import Places, places_in
from ..terms import LayerWidths, Term, Width
from .base import Call, Counted, Entry, Kind

_ATTENDED = "query", "key", "value"


class _OfAttention(Kind):
    """What both kinds of attention have in common: the input and the output have one width."""

    reads = attends = one_node = True
    size_written = ""

    def width(self, layer: Any, writes: bool) -> int:
        """The embedding dimension, on both sides."""
        return int(layer.embed_dim)


class Attention(_OfAttention, Counted):
    """``nn.MultiheadAttention``. Its gates are on heads; the width around it counts as its channels."""

    types = (nn.MultiheadAttention,)
    twins = ((nn.MultiheadAttention, GatedMultiheadAttention),)
    gated_parts = "heads"
    gates_units = from_file = True

    def gated(self, layer: Any, gate: GateLike, granularity: Granularity, per_sample: bool) -> Any:
        """The attention with gates on its heads, whatever the granularity."""
        return self.twin(layer).from_dense(layer, gate=gate, per_sample=per_sample)

    def staying(self, layer: Any) -> dict[tuple[str, int], str]:
        """The heads, where they are to go without another layer in place of torch's."""
        reason = "torch's attention has as many channels in its heads as around them"
        return {(name, 0): reason for name, _ in layer.named_parameters(recurse=False) if name.endswith("proj_weight")}

    # ---- cost

    def uses(self, layer: Any, call: Call, output: Any) -> tuple[int, int]:
        """The multiply-accumulates of the call, and those of its projections alone; called without hooks, which would
        count again.
        """
        args, kwargs = call
        given = dict(zip(_ATTENDED, args, strict=False)) | kwargs
        projections = sum(given[x].numel() for x in ("query", *_ATTENDED)) * layer.embed_dim
        return count_call(layer.forward, *args, **kwargs), projections  # forward, because a call would run the hooks

    def macs(self, name: str, layer: Any, widths: LayerWidths, uses: int, projections: int) -> Iterator[Term]:
        """The projections are proportional to heads times width, and the products of the heads to heads alone."""
        heads = widths.heads(layer)
        yield Term(name, widths.width(layer, False), heads, projections / (layer.num_heads * layer.embed_dim))
        yield Term(name, Width(1), heads, (uses - projections) / layer.num_heads)

    def params(self, name: str, layer: Any, widths: LayerWidths, own: int, counted: set[Any]) -> Iterator[Term]:
        """Two dimensions of a projection's weight shrink: one with the number of heads, the other with the width that
        the attention reads and writes.
        """
        heads, width = widths.heads(layer), widths.width(layer, False)
        in_weights = layer.in_proj_weight, layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
        weights, biases = (
            sum(p.numel() for p in found if p is not None)
            for found in ((*in_weights, layer.out_proj.weight), (layer.in_proj_bias, layer.bias_k, layer.bias_v))
        )
        yield Term(name, width, heads, weights / (layer.num_heads * layer.embed_dim), biases / layer.num_heads)
        if layer.out_proj.bias is not None:
            yield Term(name, Width(1), width, 1)

    def timed_widths(self, layer: Any, widths: LayerWidths) -> tuple[Width, Width]:
        """The time depends on the width around the attention (read) and on the number of heads (written)."""
        return widths.width(layer, False), widths.heads(layer)

    def timed_size(self, layer: Any, writes: bool) -> int:
        """All heads for what it writes, the whole width around it for what it reads: the sizes of
        :meth:`timed_widths`.
        """
        return int(layer.num_heads if writes else layer.embed_dim)

    def narrow(self, layer: Any, read: int, written: int, within: bool) -> nn.Module:
        """An attention with the width ``read`` around it and ``written`` heads of the old size."""
        others = [read if size == layer.embed_dim else size for size in (layer.kdim, layer.vdim)]
        how = (
            layer.dropout,
            layer.in_proj_bias is not None,
            layer.bias_k is not None,
            layer.add_zero_attn,
            *others,
            layer.batch_first,
        )
        return PrunedMultiheadAttention(read, layer.num_heads, *how, heads=range(written), head_dim=layer.head_dim)

    def narrow_call(self, layer: Any, call: Call, read: int) -> Call:
        """The same call with the first ``read`` features of query, key and value.

        Inputs of another width (``kdim``, ``vdim``) stay as they are. Arguments that are one tensor stay one tensor,
        because torch then takes another path, which may take another time.
        """
        args, kwargs = call
        given = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(_ATTENDED)]
        # keyed by identity: an argument that is given twice stays one tensor
        narrow = {id(t): t[..., :read].contiguous() if t.shape[-1] == layer.embed_dim else t for t in given}
        others = {name: value for name, value in kwargs.items() if name not in _ATTENDED}
        return (*(narrow[id(t)] for t in given), *args[3:]), others


class PrunedAttention(_OfAttention):
    """An attention with only some of its heads."""

    types = (PrunedMultiheadAttention,)

    def tensors(self, layer: Any, entry: Entry) -> dict[str, list[Places]]:
        """As for other layers; the rows of query, key and value, and the columns of the output projection, go head by
        head.
        """
        written, read = (places_in(entry.get(side)) for side in ("out", "in"))
        heads = entry.get("heads")
        one: Places = None
        three: Places = None
        if heads is not None:
            if (heads["before"], len(heads["kept"])) != (layer.num_heads, len(layer.heads)):
                own = f"{len(layer.heads)} of {layer.num_heads}"
                raise ValueError(f"manifest: heads={heads!r:.80}, expected {own}, those of the layer")
            size = layer.num_heads * layer.head_dim
            rows = torch.arange(size).view(int(heads["before"]), -1)[heads["kept"]].flatten()
            one, three = (size, rows), (3 * size, torch.cat([rows + i * size for i in range(3)]))
        return {
            "in_proj_weight": [three, read],
            "in_proj_bias": [three],
            **{f"{name}_proj_weight": [one] for name in "qkv"},
            **{name: [None, None, one] for name in ("bias_k", "bias_v")},
            "out_proj.weight": [written, one],
            "out_proj.bias": [written],
        }

    def restored(self, layer: Any, entry: Entry) -> nn.Module:
        """An ``nn.MultiheadAttention`` with the parameters of this layer, which have all heads again."""
        how = layer.dropout, layer.bias, layer.add_bias_kv, layer.add_zero_attn
        sizes = layer.kdim, layer.vdim, layer.batch_first
        whole = nn.MultiheadAttention(layer.embed_dim, layer.num_heads, *how, *sizes, device="meta")
        for name, p in layer.named_parameters():
            parent, _, own = name.rpartition(".")
            setattr(whole.get_submodule(parent), own, p)
        return whole.train(layer.training)
