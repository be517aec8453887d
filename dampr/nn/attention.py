"""GatedMultiheadAttention, with a gate for each head, and the plain layer that is left of it without its closed heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dampr import functional, ops
from dampr.gates import Gate, make_gate, place_gate
from dampr.spec import SAMPLE

from .base import GatedLayer, _wide

Maybe = Tensor | None
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
_IN_ROWS = _PROJECTIONS[:-2]  # whose rows belong to heads, once in each of q, k and v where they are packed


class GatedMultiheadAttention(GatedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with a learned gate for each head: y = sum over heads of z_h head_h W_o,h + b_o.

    Args:
        embed_dim ... dtype: as in ``nn.MultiheadAttention``, by position or name.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance with ``num_heads`` gates to share.
        per_sample: in training, one draw for each sample of the batch instead of one per call.

    Called as ``nn.MultiheadAttention`` is, with the same results; the attention weights that it returns are those of all heads, closed
    ones too. A gate is folded into the columns of ``out_proj.weight`` that read its head, a pass over one weight, and torch's own attention
    (``scaled_dot_product_attention`` with ``need_weights=False``) runs on that. Only draws per sample multiply activations.

    Parameters come first in ``parameters()`` with the names of ``nn.MultiheadAttention``; a dense ``state_dict`` loads and leaves the gates
    as they are. A fresh layer in evaluation mode equals torch's attention in Python to the bit, and its fused inference path to rounding.
    That path reads weights without asking their layers, so it is never taken here, nor by an ``nn.TransformerEncoderLayer`` around this.

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
        gate: str | type[Gate] | Gate = "hard_concrete",
        per_sample: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        self.granularity = "head"
        self.per_sample = bool(per_sample)
        self.gate = place_gate(gate, num_heads, self.out_proj.weight.device, self.per_sample)

    def _reset_parameters(self) -> None:
        """As in ``torch.nn``; the gates stay as they are."""
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False  # the condition on which every fused path of torch.nn gives up, that of an encoder layer too

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Maybe = None,
        need_weights: bool = True,
        attn_mask: Maybe = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Maybe]:
        call = self._each_sample if self.per_sample and self.gate.spec.rule == SAMPLE else self._folded
        how = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        return _sequence_first(call, self.batch_first, query, key, value, *how)

    def _folded(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Maybe, need: bool, mask: Maybe, average: bool, causal: bool
    ) -> Any:
        """torch's own attention on sequences first, with the gates in the weight of its last projection."""
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
        """out_proj.weight with each head's gate in its columns; under autocast in its dtype, into which it would be cast in any case."""
        weight = self.out_proj.weight
        parameter, seed, spec = self.gate.call()
        dtype = weight.dtype
        if dtype == torch.float32 and not weight.is_meta and torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        if dtype == torch.float64:
            parameter = parameter.double()
        return ops.fold_blocks(weight, parameter, seed, spec, (self.embed_dim, self.head_dim), dtype)

    def _each_sample(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Maybe, need: bool, mask: Maybe, average: bool, causal: bool
    ) -> Any:
        batched = query.dim() == 3
        if not batched:
            query, key, value, padding = _as_batch(query, key, value, padding)
        heads, weights = _attend(self, range(self.num_heads), query, key, value, padding, need, mask, causal)
        parameter, seed, spec = self.gate.call()
        heads = functional.gate_activations(heads, parameter, dim=1, seed=seed, per_sample=True, spec=spec)
        return _joined(self.out_proj, heads, weights, average, batched)

    @classmethod
    def gates_for(cls, layer: nn.MultiheadAttention, granularity: str = "output") -> int:
        """How many gates a dense ``layer`` would have, one for each head."""
        return layer.num_heads

    @classmethod
    def from_dense(
        cls, layer: nn.MultiheadAttention, *, gate: str | type[Gate] | Gate = "hard_concrete", per_sample: bool = False
    ) -> GatedMultiheadAttention:
        """A gated layer with the very parameters of ``layer``, not copies. Raises TypeError unless its type is exactly the dense one.

        Where fresh gates are not 1, ``out_proj.weight`` is divided by them, so that the layer computes the same; ValueError where one is 0.
        """
        gated = cls._around(layer, gate, per_sample)
        gated._undo_fresh_gates()
        return gated

    @torch.no_grad()
    def _undo_fresh_gates(self) -> None:
        z = self.gate.deterministic()
        if bool((z == 1).all()):
            return
        if not bool((z != 0).all()):
            raise ValueError(f"gate={type(self.gate).__name__}: a fresh gate of it is 0, so what the layer computes could not be kept")
        weight = self.out_proj.weight
        weight.data = (weight / z.repeat_interleave(self.head_dim)).to(weight.dtype)

    @classmethod
    def _around(cls, layer: nn.MultiheadAttention, gate: str | type[Gate] | Gate, per_sample: bool) -> GatedMultiheadAttention:
        """:meth:`from_dense` that leaves the weights as they are."""
        if type(layer) is not nn.MultiheadAttention:
            raise TypeError(f"layer={type(layer).__name__}: expected exactly nn.MultiheadAttention")
        own = make_gate(gate, layer.num_heads, layer.out_proj.weight.device)
        gated = cls(**_arguments(layer), device="meta", dtype=layer.out_proj.weight.dtype, gate=own, per_sample=per_sample)
        for name in _PROJECTIONS:
            setattr(gated, name, getattr(layer, name))
        gated.out_proj.weight, gated.out_proj.bias = layer.out_proj.weight, layer.out_proj.bias
        return gated.train(layer.training)

    @torch.no_grad()
    def to_dense(self) -> nn.MultiheadAttention:
        """The ``nn.MultiheadAttention`` that computes what this layer computes in evaluation mode; parameters are copies."""
        plain = nn.MultiheadAttention(**_arguments(self), device="meta", dtype=self.out_proj.weight.dtype)
        self._copy_into(plain, range(self.num_heads))
        return plain.train(self.training)

    @torch.no_grad()
    def compacted(self) -> tuple[nn.MultiheadAttention | PrunedMultiheadAttention, list[int]]:
        """The smallest plain layer that computes what this one computes in evaluation mode, and the heads that it has.

        :meth:`to_dense` where no head is closed. One head at least is left. Only the attention weights differ: closed heads have none.
        """
        heads = self.gate.is_open().nonzero().flatten().tolist() or [0]
        if len(heads) == self.num_heads:
            return self.to_dense(), heads
        plain = PrunedMultiheadAttention(**_arguments(self), device="meta", dtype=self.out_proj.weight.dtype, heads=heads)
        self._copy_into(plain, heads)
        return plain.train(self.training), heads

    def _copy_into(self, plain: Any, heads: Sequence[int]) -> None:
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
        """The indices in embed_dim of what these heads compute."""
        every = torch.arange(self.embed_dim, device=self.out_proj.weight.device).view(self.num_heads, self.head_dim)
        return every[list(heads)].flatten()

    def closed_heads(self) -> set[int]:
        """The heads whose gates are closed."""
        return set((~self.gate.is_open()).nonzero().flatten().tolist())

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """Nothing: heads are no channels of the input or the output, which all of them read and write."""
        return set(), set()

    def _of_heads(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """For each head the sum of ``of(parameter)``, of a parameter's shape, over its rows of q, k, v and columns of out_proj."""
        total = of(self.out_proj.weight).sum(0)
        for name in _PROJECTIONS:
            parameter = getattr(self, name)
            if parameter is not None and name in _IN_ROWS:
                total = total + of(parameter).reshape(len(parameter) // self.embed_dim, self.embed_dim, -1).sum((0, 2))
            elif parameter is not None:
                total = total + of(parameter).flatten()
        return total.view(self.num_heads, self.head_dim).sum(1)

    def group_size(self) -> int:
        """|g|: how many parameters a head has: its rows of q, k, v with their biases, and its columns of ``out_proj``."""
        projections = [p for p in (getattr(self, name) for name in _PROJECTIONS) if p is not None]
        return sum(p.numel() for p in (*projections, self.out_proj.weight)) // self.num_heads

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        cost: float | Tensor = lam * self.group_size()
        ungated: float | Tensor = 0.0
        if prior_precision:
            cost = cost + 0.5 * prior_precision * self._of_heads(lambda p: _wide(p).square())
            if self.out_proj.bias is not None:
                ungated = 0.5 * prior_precision * _wide(self.out_proj.bias).square().sum()
        total: Tensor = (self.gate.open_probability() * cost).sum() + ungated
        return total

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, per_sample={self.per_sample}"


class PrunedMultiheadAttention(nn.Module):
    """An ``nn.MultiheadAttention(embed_dim, num_heads)`` of which only some heads are there: what is left of a gated one.

    Args:
        embed_dim ... dtype: those of the whole layer.
        heads: which of its heads are there, increasing, at least one.

    Called as the whole layer is. A mask for each head has all of the whole layer's heads; attention weights are those of the heads that are
    there, and their mean. Parameters have the names of ``nn.MultiheadAttention``, and the rows and columns of these heads alone.

    Raises: ValueError that names the argument.
    """

    _qkv_same_embed_dim = False  # an nn.TransformerEncoderLayer around it asks before it takes its fused path

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
        heads: Sequence[int],
    ) -> None:
        super().__init__()
        self.heads = tuple(heads)
        if not self.heads or list(self.heads) != sorted(set(self.heads)) or not 0 <= self.heads[0] <= self.heads[-1] < num_heads:
            raise ValueError(f"heads={heads!r}: expected increasing integers in [0, {num_heads}), at least one")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: expected a divisor of embed_dim={embed_dim}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        width = len(self.heads) * self.head_dim
        packed = self.kdim == self.vdim == embed_dim

        def parameter(there: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if there else None

        self.in_proj_weight = parameter(packed, 3 * width, embed_dim)
        self.q_proj_weight = parameter(not packed, width, embed_dim)
        self.k_proj_weight = parameter(not packed, width, self.kdim)
        self.v_proj_weight = parameter(not packed, width, self.vdim)
        self.in_proj_bias = parameter(bias, 3 * width)
        self.bias_k = parameter(add_bias_kv, 1, 1, width)
        self.bias_v = parameter(add_bias_kv, 1, 1, width)
        self.out_proj = nn.Linear(width, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in ``nn.MultiheadAttention``, for the sizes that are left."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                nn.init.xavier_normal_(row)

    @property
    def bias(self) -> bool:
        """Whether the projections have biases."""
        return self.in_proj_bias is not None

    @property
    def add_bias_kv(self) -> bool:
        """Whether keys and values are extended by a learned one."""
        return self.bias_k is not None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Maybe = None,
        need_weights: bool = True,
        attn_mask: Maybe = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Maybe]:
        how = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        return _sequence_first(self._call, self.batch_first, query, key, value, *how)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, padding: Maybe, need: bool, mask: Maybe, average: bool, causal: bool) -> Any:
        batched = query.dim() == 3
        if not batched:
            query, key, value, padding = _as_batch(query, key, value, padding)
        heads, weights = _attend(self, self.heads, query, key, value, padding, need, mask, causal)
        return _joined(self.out_proj, heads, weights, average, batched)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, heads={self.heads}"


def _arguments(layer: nn.MultiheadAttention) -> dict[str, Any]:
    """What the constructor of ``layer`` was given."""
    names = "embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first"
    given = {name: getattr(layer, name) for name in names}
    return given | {"bias": layer.in_proj_bias is not None, "add_bias_kv": layer.bias_k is not None}


def _sequence_first(call: Callable[..., Any], batch_first: bool, query: Tensor, key: Tensor, value: Tensor, *how: Any) -> Any:
    """``call`` on tensors whose first dimension is the sequence; the same tensor three times stays one tensor."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise TypeError("query: got a nested tensor, expected padded ones and a key_padding_mask (gates rule out torch's fused path)")
    if not batch_first or query.dim() != 3:
        return call(query, key, value, *how)
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    v = k if value is key else value.transpose(0, 1)
    output, weights = call(q, k, v, *how)
    return output.transpose(0, 1), weights


def _as_batch(query: Tensor, key: Tensor, value: Tensor, padding: Maybe) -> tuple[Tensor, Tensor, Tensor, Maybe]:
    q = query.unsqueeze(1)
    k = q if key is query else key.unsqueeze(1)
    return q, k, k if value is key else value.unsqueeze(1), None if padding is None else padding.unsqueeze(0)


def _attend(
    layer: GatedMultiheadAttention | PrunedMultiheadAttention,
    heads: Sequence[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Maybe,
    need_weights: bool,
    attn_mask: Maybe,
    is_causal: bool,
) -> tuple[Tensor, Maybe]:
    """What ``torch.nn.functional.multi_head_attention_forward`` does before the last projection, for ``heads`` of ``layer.num_heads``.

    Inputs are (L, N, E), (S, N, kdim) and (S, N, vdim), with the masks of ``nn.MultiheadAttention``. Returns what the heads say,
    (N, heads, L, head_dim), and their attention weights, (N, heads, L, S), or None where they are not needed.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal=True with attn_mask=None: expected the causal mask as well, of which is_causal is only a hint")
    causal = is_causal and key_padding_mask is None and not need_weights
    q, k, v = _project(layer, query, key, value)
    samples, more = query.shape[1], 0
    if layer.bias_k is not None and layer.bias_v is not None:
        k, v, more = torch.cat([k, layer.bias_k.expand(1, samples, -1)]), torch.cat([v, layer.bias_v.expand(1, samples, -1)]), more + 1
    if layer.add_zero_attn:
        k, v, more = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1)), more + 1
    sizes = samples, layer.num_heads, query.shape[0], key.shape[0]
    mask = _mask(None if causal else attn_mask, key_padding_mask, heads, sizes, more, q.dtype)
    q, k, v = (t.unflatten(2, (len(heads), layer.head_dim)).permute(1, 2, 0, 3) for t in (q, k, v))
    dropout = layer.dropout if layer.training else 0.0
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
    scores = q * layer.head_dim**-0.5 @ k.transpose(2, 3)
    weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
    return weights @ v, weights


def _project(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of all heads of ``layer``, in as few products as there are different inputs."""
    bias = layer.in_proj_bias
    if layer.in_proj_weight is None:
        weights = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    elif query is key and key is value:
        q, k, v = F.linear(query, layer.in_proj_weight, bias).chunk(3, -1)
        return q, k, v
    else:
        weights = layer.in_proj_weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, weight, b) for x, weight, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _mask(
    attn_mask: Maybe, key_padding_mask: Maybe, heads: Sequence[int], sizes: tuple[int, int, int, int], more: int, dtype: torch.dtype
) -> Maybe:
    """Both masks as one that is added to scores, (N or 1, heads or 1, L or 1, S + more); None without any.

    Args: the masks of ``nn.MultiheadAttention``; ``sizes`` = (N, num_heads, L, S); ``more`` keys at the end, which no mask hides.
    """
    samples, num_heads, queries, keys = sizes
    found = []
    if attn_mask is not None:
        if attn_mask.shape not in ((queries, keys), (samples * num_heads, queries, keys)):
            expected = f"({queries}, {keys}) or ({samples * num_heads}, {queries}, {keys})"
            raise RuntimeError(f"attn_mask.shape={tuple(attn_mask.shape)}: expected {expected}")
        shaped = attn_mask.view(-1, 1 if attn_mask.dim() == 2 else num_heads, queries, keys)
        found.append(shaped if attn_mask.dim() == 2 or len(heads) == num_heads else shaped[:, list(heads)])
    if key_padding_mask is not None:
        if key_padding_mask.shape != (samples, keys):
            raise RuntimeError(f"key_padding_mask.shape={tuple(key_padding_mask.shape)}: expected ({samples}, {keys})")
        found.append(key_padding_mask.view(samples, 1, 1, keys))
    added = [torch.zeros_like(m, dtype=dtype).masked_fill(m, float("-inf")) if m.dtype == torch.bool else m.to(dtype) for m in found]
    if not added:
        return None
    mask = added[0] if len(added) == 1 else added[0] + added[1]
    return F.pad(mask, (0, more)) if more else mask


def _joined(out_proj: nn.Linear, heads: Tensor, weights: Maybe, average: bool, batched: bool) -> tuple[Tensor, Maybe]:
    """The last projection of (N, heads, L, head_dim), on sequences first, and the attention weights as the caller wants them."""
    output = F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj.weight, out_proj.bias)
    if weights is not None and average:
        weights = weights.mean(1)
    return (output, weights) if batched else (output.squeeze(1), None if weights is None else weights.squeeze(0))
