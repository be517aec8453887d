"""Embeddings. The columns of the weight are the channels that an embedding writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from dampr.nn import GatedEmbedding

from ..terms import LayerWidths, Term, Width
from .base import Kind


class Embedding(Kind):
    """``nn.Embedding``. Its rows are chosen by indices from the caller, so they are never cut."""

    types: ClassVar[tuple[type, ...]] = (nn.Embedding,)
    twins: ClassVar[tuple[tuple[type, Any], ...]] = ((nn.Embedding, GatedEmbedding),)
    gated_parts = "columns"
    shares_gates = reads_indices = resizes = follows = from_file = writes_last = True
    size_written = "embedding_dim"

    def width(self, layer: Any, writes: bool) -> int:
        return int(layer.embedding_dim if writes else layer.num_embeddings)

    def weight_dim(self, writes: bool) -> int:
        """The weight is (rows, channels): it has what the layer writes in dimension 1."""
        return int(writes)

    def side(self, layer: Any, own: str, dim: int) -> bool | None:
        """Dimension 1 of the weight is what the layer writes; rows are never cut, which CannotCutError says."""
        return True if dim == 1 else super().side(layer, own, dim)

    def axes(self, writes: bool) -> dict[str, int]:
        return {"weight": 1} if writes else {}

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        layer.num_embeddings, layer.embedding_dim = shape

    def params(self, name: str, layer: Any, widths: LayerWidths, own: int, counted: set[Any]) -> Iterator[Term]:
        """One term: all rows times the channels that are left. A weight that several layers share counts once."""
        yield Term(name, Width(layer.num_embeddings), widths.width(layer, True), layer.weight not in counted)
        counted.add(layer.weight)


class EmbeddingBag(Embedding):
    """``nn.EmbeddingBag``, which adds up rows. It has no layer with gates, only gates on what reads it."""

    types = (nn.EmbeddingBag,)
    twins = ()
    gated_parts = ""
    shares_gates = False
