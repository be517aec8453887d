"""GatedEmbedding: ``nn.Embedding`` with gates on the columns or the rows of its table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, functional, names
from dampr.gates import GateLike, make_gate, place_gate
from dampr.spec import value

from .base import VECTOR_GRANULARITIES, GatedLayer, fresh_values, wide_dtype
from .computed import check_dense, refresh, settled

VALUE = value()


class GatedEmbedding(GatedLayer, nn.Embedding):
    """``nn.Embedding`` with learned gates on its columns (the width) or on its rows (the vocabulary).

    Args:
        num_embeddings ... dtype: as in ``nn.Embedding``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        granularity: ``"output"``, a gate per column of the table, or ``"input"``, a gate per row: a closed row makes
            zeros of its word.
        per_sample: in training, one draw for each index of the first dimension of the input instead of one per call.

    Gates multiply the rows that were looked up, never the table, so that a step costs what its words cost and
    ``sparse=True`` works. ``weight`` comes first in ``parameters()``; a dense ``state_dict`` loads and leaves the gates
    as they are. A fresh layer equals the dense one in evaluation mode, to the bit.

    Raises: ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: GateLike = "hard_concrete",
        granularity: names.VectorGranularity = "output",
        per_sample: bool = False,
    ) -> None:
        _checks.one_of("granularity", granularity, VECTOR_GRANULARITIES)
        arguments = padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, _freeze, device, dtype
        super().__init__(num_embeddings, embedding_dim, *arguments)
        self.granularity = granularity
        self.per_sample = _checks.flag("per_sample", per_sample)
        if granularity == "output":
            self.gate = place_gate(gate, embedding_dim, self.weight.device, self.per_sample)
        else:  # the gates of the looked-up rows are picked from drawn values, so no kernel has to draw them
            self.gate = make_gate(gate, num_embeddings, self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the indices ``input``, times gates on columns (granularity "output") or on whole rows. With draws
        per sample, each entry along the first dimension of ``input`` is a sample.
        """
        rows = super().forward(input)
        if self.sharded:
            return self._on_shards(rows, input)
        if self.granularity == "output":
            parameter, seed, spec = self.gate.call()
            offset = self.gate.index_offset(rows.shape[0]) if self.per_sample and seed is not None else 0
            how: dict[str, Any] = {"seed": seed, "per_sample": self.per_sample, "spec": spec, "index_offset": offset}
            return functional.gate_activations(rows, parameter, dim=-1, **how)
        if self.per_sample and self.gate.draws:
            words = input.shape[0]
            z = self.gate(words).gather(1, input.reshape(words, -1).long()).flatten()
        else:
            z = self.gate()[input.flatten()]
        flat = rows.reshape(-1, self.embedding_dim)
        return functional.gate_activations(flat, z, dim=0, spec=VALUE).view(rows.shape)

    def _on_shards(self, rows: Tensor, input: Tensor) -> Tensor:
        """The forward for a table that is a DTensor; ``rows`` are the looked-up rows."""
        from . import sharded  # loads torch.distributed.tensor

        drawn = self.per_sample and self.gate.draws
        z = self.gate(input.shape[0]) if drawn else self.gate()
        if self.granularity == "output":
            return sharded.times(rows, z.view(-1, *[1] * (rows.dim() - 2), z.shape[-1]) if drawn else z)
        words = sharded.whole(input)
        z = z.gather(1, words.reshape(len(words), -1).long()).view(words.shape) if drawn else z[words]
        return sharded.times(rows, z.unsqueeze(-1))

    @classmethod
    def gates_for(cls, layer: nn.Embedding, granularity: str = "output") -> int:
        """How many gates a dense ``layer`` would have: its columns, or its rows for granularity "input"."""
        return layer.num_embeddings if granularity == "input" else layer.embedding_dim

    @classmethod
    def from_dense(
        cls,
        layer: nn.Embedding,
        *,
        gate: GateLike = "hard_concrete",
        granularity: names.VectorGranularity = "output",
        per_sample: bool = False,
    ) -> GatedEmbedding:
        """A gated layer that takes over the table of ``layer`` itself, not a copy.

        If fresh gates are not 1, the table is divided by them, so that the layer computes the same.

        Raises: TypeError unless the type of ``layer`` is exactly ``nn.Embedding``; ValueError if fresh gates are not 1
        and one is 0, or ``max_norm`` would undo the division.
        """
        check_dense(layer, nn.Embedding)
        _checks.one_of("granularity", granularity, VECTOR_GRANULARITIES)
        own = make_gate(gate, cls.gates_for(layer, granularity), layer.weight.device)
        how: dict[str, Any] = {"gate": own, "granularity": granularity, "per_sample": per_sample}
        gated = cls(**_table(layer), _weight=layer.weight.detach(), **how)
        gated.weight = layer.weight
        gated.train(layer.training)
        if not own.starts_at_one():
            z = fresh_values(own).detach()
            if layer.max_norm is not None or not bool((z != 0).all()):
                why = "max_norm would undo it" if layer.max_norm is not None else "some are 0"
                raise ValueError(
                    f"gate={type(own).__name__}: fresh gates are not 1, and the table cannot make up for it, because "
                    f"{why}"
                )
            gated.weight.data = (gated.weight.detach() / gated._spread(z)).to(gated.weight.dtype)
        return gated

    def _spread(self, values: Tensor) -> Tensor:
        """``values``, one per gate, as a tensor that broadcasts to the table."""
        return values.view(-1, 1) if self.granularity == "input" else values

    @torch.no_grad()
    @settled
    def to_dense(self) -> nn.Module:
        """The ``nn.Embedding`` that computes what this layer computes in evaluation mode, with a copy of the table.

        ``max_norm`` then limits the norms of rows times gates, where this layer limits those of the rows alone.
        """
        table = (self.weight * self._spread(self.gate.deterministic())).to(self.weight.dtype)
        plain = nn.Embedding(**_table(self), _weight=table, _freeze=not self.weight.requires_grad)
        return plain.train(self.training)

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        along = 1 if self.granularity == "input" else 0
        cost: float | Tensor = lam * self.weight.shape[along]
        if prior_precision:
            refresh(self)
            cost = cost + 0.5 * prior_precision * wide_dtype(self.weight).square().sum(along)
        total: Tensor = (self.gate.open_probability() * cost).sum()
        return total

    def channel_gates(self) -> Tensor | None:
        """The gate of each column, int64; None if the gates are on rows, whose number the caller's indices
        depend on.
        """
        return torch.arange(self.embedding_dim) if self.granularity == "output" else None

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """(the closed columns, the closed rows); one of the two is empty."""
        shut = set((~self.gate.is_open()).nonzero().flatten().tolist())
        return (set(), shut) if self.granularity == "input" else (shut, set())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, granularity={self.granularity!r}, per_sample={self.per_sample}"


def _table(layer: nn.Embedding) -> dict[str, Any]:
    """The constructor's arguments of an embedding, without the table."""
    names = "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"
    return {name: getattr(layer, name) for name in names}
