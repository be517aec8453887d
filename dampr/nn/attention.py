"""GatedMultiheadAttention: ``nn.MultiheadAttention`` with a gate for each head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dampr import _checks, functional, ops
from dampr.gates import GateLike, make_gate, place_gate
from dampr.spec import SAMPLE

from .attend import as_batch, attend, joined, sequence_first
from .base import GatedLayer, fresh_values, wide_dtype
from .computed import check_dense, refresh, settled
from .pruned.attention import PrunedMultiheadAttention, attention_arguments

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
_IN_ROWS = _PROJECTIONS[:-2]  # their rows belong to heads; a packed one has the rows of q, then of k, then of v


class GatedMultiheadAttention(GatedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with a learned gate for each head: y = sum over heads of z_h head_h W_o,h + b_o.

    Args:
        embed_dim ... dtype: as in ``nn.MultiheadAttention``, by position or name.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance with ``num_heads`` gates to share.
        per_sample: in training, one draw for each sample of the batch instead of one per call.

    Called as ``nn.MultiheadAttention`` is, with the same results; the attention weights that it returns are those of
    all heads, closed ones too. A gate is folded into the columns of ``out_proj.weight`` that read its head, a pass over
    one weight, and torch's own attention (``scaled_dot_product_attention`` with ``need_weights=False``) runs on that.
    Only draws per sample multiply activations.

    Parameters come first in ``parameters()`` with the names of ``nn.MultiheadAttention``; a dense ``state_dict`` loads
    and leaves the gates as they are. A fresh layer in evaluation mode equals torch's attention in Python to the bit,
    and its fused inference path to rounding. That path reads weights without asking their layers, so it is never taken
    here, nor by an ``nn.TransformerEncoderLayer`` around this.

    Raises: ValueError or TypeError that names the argument, and what ``nn.MultiheadAttention`` raises.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: GateLike = "hard_concrete",
        per_sample: bool = False,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.granularity = "head"
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.gate = place_gate(gate, num_heads, self.out_proj.weight.device, self.per_sample)

    def reset_parameters(self) -> None:
        """Fresh parameters, those of ``out_proj`` too, and fresh gates; torch's own has no public name for it."""
        self.out_proj.reset_parameters()
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """As in ``torch.nn``, and fresh gates."""
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._reset_gate()
        # every fused path of torch.nn asks for this attribute, that of an encoder layer too; False switches them off
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``, with each head times its gate; with one draw per batch, gates are folded into
        the output projection.
        """
        # weight_norm, spectral_norm and prune compute the weight in a pre-forward hook, and out_proj is never called
        if self.out_proj._forward_pre_hooks:
            for number, hook in self.out_proj._forward_pre_hooks.items():
                with_kwargs = number in self.out_proj._forward_pre_hooks_with_kwargs
                hook(self.out_proj, (), *[{}] * with_kwargs)
        call = self._each_sample if self.per_sample and self.gate.spec.rule == SAMPLE else self._folded
        how = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        return sequence_first(call, self.batch_first, query, key, value, *how)

    def _folded(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        need: bool,
        mask: Tensor | None,
        average: bool,
        causal: bool,
    ) -> Any:
        """Torch's attention on (sequence, batch, features), with the gates in the weight of its last projection."""
        return F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self._gated_out_weight(),
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=padding,
            need_weights=need,
            attn_mask=mask,
            use_separate_proj_weight=self.in_proj_weight is None,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average,
            is_causal=causal,
        )

    def _gated_out_weight(self) -> Tensor:
        """``out_proj.weight`` (E, E) with each head's columns multiplied by its gate.

        Under autocast the result has autocast's dtype, into which the product would convert it anyway.
        """
        weight = self.out_proj.weight
        parameter, seed, spec = self.gate.call()
        dtype = weight.dtype
        if dtype == torch.float32 and not weight.is_meta and torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        if dtype == torch.float64:
            parameter = parameter.double()
        return ops.fold_blocks(weight, ops.GateArgs(parameter, seed, spec), (self.embed_dim, self.head_dim), dtype)

    def _each_sample(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        need: bool,
        mask: Tensor | None,
        average: bool,
        causal: bool,
    ) -> Any:
        """Attention with gates of its own for each sample, which multiply the outputs of the heads."""
        batched = query.dim() == 3
        if not batched:
            query, key, value, padding = as_batch(query, key, value, padding)
        heads, weights = attend(self, range(self.num_heads), query, key, value, padding, need, mask, causal)
        parameter, seed, spec = self.gate.call()
        how: dict[str, Any] = {"per_sample": True, "spec": spec, "index_offset": self.gate.index_offset(heads.shape[0])}
        heads = functional.gate_activations(heads, parameter, dim=1, seed=seed, **how)
        return joined(self.out_proj, heads, weights, average, batched)

    @classmethod
    def gates_for(cls, layer: nn.MultiheadAttention, granularity: str = "output") -> int:
        """How many gates a dense ``layer`` would have, one for each head."""
        return layer.num_heads

    @classmethod
    def from_dense(
        cls,
        layer: nn.MultiheadAttention,
        *,
        gate: GateLike = "hard_concrete",
        per_sample: bool = False,
    ) -> GatedMultiheadAttention:
        """A gated layer that takes over the parameters of ``layer`` themselves, not copies.

        If fresh gates are not 1, ``out_proj.weight`` is divided by them, so that the layer computes the same.

        Raises: TypeError unless the type of ``layer`` is exactly ``nn.MultiheadAttention``; ValueError if a fresh gate
        is 0.
        """
        gated = cls._around(layer, gate, per_sample)
        gated._undo_fresh_gates()
        return gated

    @torch.no_grad()
    def _undo_fresh_gates(self) -> None:
        """Divide ``out_proj.weight`` by fresh gates that are not 1. Raises ValueError if one is 0."""
        if self.gate.starts_at_one():
            return
        z = fresh_values(self.gate)
        if not bool((z != 0).all()):
            raise ValueError(
                f"gate={type(self.gate).__name__}: a fresh gate of it is 0, so what the layer computes could not be "
                "kept"
            )
        weight = self.out_proj.weight
        weight.data = (weight / z.repeat_interleave(self.head_dim)).to(weight.dtype)

    @classmethod
    def _around(cls, layer: nn.MultiheadAttention, gate: GateLike, per_sample: bool) -> GatedMultiheadAttention:
        """:meth:`from_dense` without the division by fresh gates."""
        check_dense(layer, nn.MultiheadAttention)
        own = make_gate(gate, layer.num_heads, layer.out_proj.weight.device)
        gated = cls(
            **attention_arguments(layer),
            device="meta",
            dtype=layer.out_proj.weight.dtype,
            gate=own,
            per_sample=per_sample,
        )
        for name in _PROJECTIONS:
            setattr(gated, name, getattr(layer, name))
        gated.out_proj.weight, gated.out_proj.bias = layer.out_proj.weight, layer.out_proj.bias
        return gated.train(layer.training)

    @torch.no_grad()
    @settled
    def to_dense(self) -> nn.MultiheadAttention:
        """The ``nn.MultiheadAttention`` that computes what this layer computes in evaluation mode; its parameters are
        copies.
        """
        plain = nn.MultiheadAttention(**attention_arguments(self), device="meta", dtype=self.out_proj.weight.dtype)
        self._copy_into(plain, range(self.num_heads))
        return plain.train(self.training)

    @torch.no_grad()
    @settled
    def compacted(self) -> tuple[nn.MultiheadAttention | PrunedMultiheadAttention, list[int]]:
        """(the smallest plain layer that computes what this layer computes in evaluation mode, the heads that it has).

        The layer is that of :meth:`to_dense` if no head is closed. At least one head is left. Attention weights differ,
        because the closed heads have none.
        """
        heads = self.gate.is_open().nonzero().flatten().tolist() or [0]
        if len(heads) == self.num_heads:
            return self.to_dense(), heads
        plain = PrunedMultiheadAttention(
            **attention_arguments(self), device="meta", dtype=self.out_proj.weight.dtype, heads=heads
        )
        self._copy_into(plain, heads)
        return plain.train(self.training), heads

    def _copy_into(self, plain: Any, heads: Sequence[int]) -> None:
        """Give ``plain`` copies of the parameters of ``heads``, with the gates in ``out_proj``."""
        own = self._rows(heads)
        for name in _PROJECTIONS:
            old = getattr(self, name)
            if old is not None:
                by_row = old.view(-1, self.embed_dim, *old.shape[1:]) if name in _IN_ROWS else old
                new = by_row[:, own].reshape(-1, *old.shape[1:]) if name in _IN_ROWS else by_row[..., own]
                setattr(plain, name, nn.Parameter(new.clone(), requires_grad=old.requires_grad))
        weight, bias = self.out_proj.weight, self.out_proj.bias
        z = self.gate.deterministic().repeat_interleave(self.head_dim)
        plain.out_proj.weight = nn.Parameter((weight * z)[:, own].to(weight.dtype), requires_grad=weight.requires_grad)
        if bias is not None:
            plain.out_proj.bias = nn.Parameter(bias.clone(), requires_grad=bias.requires_grad)

    def _rows(self, heads: Sequence[int]) -> Tensor:
        """The indices in [0, embed_dim) that belong to these heads."""
        every = torch.arange(self.embed_dim, device=self.out_proj.weight.device).view(self.num_heads, self.head_dim)
        return every[list(heads)].flatten()

    def closed_heads(self) -> set[int]:
        """The heads whose gates are closed."""
        return set((~self.gate.is_open()).nonzero().flatten().tolist())

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """Two empty sets: a closed head closes no channel, because all heads read all inputs and add to all outputs."""
        return set(), set()

    def _of_heads(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """For each head the sum of ``of(parameter)`` over its rows of q, k and v and its columns of ``out_proj``,
        (num_heads,).

        ``of`` maps a parameter to a tensor of the same shape.
        """
        total = of(self.out_proj.weight).sum(0)
        for name in _PROJECTIONS:
            parameter = getattr(self, name)
            if parameter is not None and name in _IN_ROWS:
                total = total + of(parameter).reshape(len(parameter) // self.embed_dim, self.embed_dim, -1).sum((0, 2))
            elif parameter is not None:
                total = total + of(parameter).flatten()
        return total.view(self.num_heads, self.head_dim).sum(1)

    def group_size(self) -> int:
        """|g|, how many parameters a head has: its rows of q, k and v with biases, and its columns of ``out_proj``."""
        projections = [p for p in (getattr(self, name) for name in _PROJECTIONS) if p is not None]
        return sum(p.numel() for p in (*projections, self.out_proj.weight)) // self.num_heads

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        cost: float | Tensor = lam * self.group_size()
        ungated: float | Tensor = 0.0
        if prior_precision:
            refresh(self)
            cost = cost + 0.5 * prior_precision * self._of_heads(lambda p: wide_dtype(p).square())
            if self.out_proj.bias is not None:
                ungated = 0.5 * prior_precision * wide_dtype(self.out_proj.bias).square().sum()
        total: Tensor = (self.gate.open_probability() * cost).sum() + ungated
        return total

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, per_sample={self.per_sample}"
