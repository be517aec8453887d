"""Attention made of linear layers, as libraries of models have it: where its heads are, and how those that are closed
are cut.

``nn.MultiheadAttention`` is one layer. Others are modules of their own around ``nn.Linear`` layers, which compute
query, key and value and project the heads back. The last projection has a gate for each head
(:class:`dampr.nn.GatedHeads`); closed heads leave all of them. ``KINDS`` says how such modules are made, by the full
names of their types, so that none of these libraries is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dampr.nn import GatedHeads

Kept = dict[tuple[nn.Module, bool], Tensor]


@dataclass(frozen=True)
class Kind:
    """How a kind of attention is made; names are those of modules and attributes in it.

    Attributes:
        read: the linear layers whose rows are heads, and how often each has all of them (3: query, key and value one
            after the other).
        written: the linear layer whose columns are heads.
        head_dim: the attribute with the width of one head.
        core: the module that computes the heads, which is one step for whoever traces the model; "": all of it.
        sharing: the attribute with the number of query heads that share a key and a value, and so a gate; "": each has
            its own.
        scaled: attributes in proportion to the number of heads, which change with it.
    """

    read: Mapping[str, int]
    written: str
    head_dim: str = "head_dim"
    core: str = ""
    sharing: str = ""
    scaled: tuple[str, ...] = ()


KINDS: dict[str, tuple[Kind, ...]] = {}
"""Of each type of attention, by its full name, what it may be made of; the first counts whose layers it has."""


@dataclass(frozen=True)
class Attention:
    """One such module of a model, by its name there."""

    name: str
    module: nn.Module
    kind: Kind = field(repr=False)

    @property
    def core(self) -> nn.Module:
        return self.module.get_submodule(self.kind.core)

    @property
    def written(self) -> Any:
        return self.module.get_submodule(self.kind.written)

    @property
    def written_name(self) -> str:
        return f"{self.name}.{self.kind.written}".lstrip(".")

    def read(self) -> Iterator[tuple[Any, int]]:
        """The layers whose rows are heads, and how often each has all of them."""
        for name, times in self.kind.read.items():
            yield self.module.get_submodule(name), times

    @property
    def heads(self) -> int:
        """How many gates: heads, or sets of query heads that share a key and a value."""
        width: int = _attribute(self.module, self.kind.head_dim)
        shared: int = _attribute(self.module, self.kind.sharing) if self.kind.sharing else 1
        return int(self.written.in_features) // (width * shared)

    def sides(self) -> Iterator[tuple[tuple[nn.Module, bool], Tensor]]:
        """Each side of a layer that heads are on, (layer, writes), and of each channel there its head: int64."""
        heads = self.heads
        yield (self.written, False), torch.arange(heads).repeat_interleave(self.written.in_features // heads)
        for layer, times in self.read():
            yield (
                (layer, True),
                torch.arange(heads).repeat_interleave(layer.out_features // (times * heads)).repeat(times),
            )

    def weights_per_head(self) -> float:
        """The parameters that go with a head, biases of query, key and value included."""
        rows = sum(p.numel() for layer, _ in self.read() for p in (layer.weight, layer.bias) if p is not None)
        return float(rows + self.written.weight.numel()) / self.heads

    def fits(self) -> bool:
        """Whether the layers are there, linear, and of widths that go with the number of heads."""
        try:
            read = list(self.read())
            heads = self.heads if isinstance(self.written, nn.Linear) else 0
        except AttributeError:
            return False
        return heads > 0 and all(
            isinstance(layer, nn.Linear) and layer.out_features % (times * heads) == 0 for layer, times in read
        )

    def resize(self, before: int, heads: int) -> None:
        """Set the attributes that follow from the number of heads, which was ``before``; layers stay as they are."""
        for path in self.kind.scaled:
            owner, _, attribute = path.rpartition(".")
            value = getattr(self.module.get_submodule(owner), attribute)
            setattr(self.module.get_submodule(owner), attribute, value // before * heads)


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def find(model: nn.Module) -> list[Attention]:
    """Every attention of a known kind in ``model``."""
    found = []
    for name, module in model.named_modules():
        kinds = KINDS.get(f"{type(module).__module__}.{type(module).__qualname__}", ())
        found += [a for a in (Attention(name, module, kind) for kind in kinds) if a.fits()][:1]
    return found


def parts(model: nn.Module) -> dict[nn.Module, Attention]:
    """The layers of each attention, and the attention."""
    return {
        layer: attention
        for attention in find(model)
        for layer in (attention.written, *(m for m, _ in attention.read()))
    }


def left_out(layer: nn.Module, attention: Attention | None, granularity: Any, per_sample: bool) -> str | None:
    """Why convert leaves out a layer of an attention; None where it does not."""
    if attention is None or granularity != "output":
        return None
    if layer is not attention.written:
        return f"its outputs are the heads of {attention.name!r}, whose gates are in {attention.written_name!r}"
    return "heads have no draws for each sample" if per_sample else None


def open_heads(model: nn.Module) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The heads that are open in each attention that has gates, by its name, and where all are closed the first,
    with a note.
    """
    found = {a.name: a.written.open_heads() for a in find(model) if isinstance(a.written, GatedHeads)}
    notes = {name: "1 closed head stays: every layer keeps one at least" for name, heads in found.items() if not heads}
    return {name: heads or [0] for name, heads in found.items()}, notes


def cut(small: nn.Module, left: Mapping[str, list[int]]) -> tuple[Kept, dict[str, tuple[int, list[int]]]]:
    """Leave ``left``, by the names of attentions, of the heads of a plain model.

    Returns: what is left of each layer, and of each attention how many heads there were and which are left.
    """
    kept: Kept = {}
    heads: dict[str, tuple[int, list[int]]] = {}
    for attention in find(small):
        there = left.get(attention.name, range(attention.heads))
        if len(there) == attention.heads:
            continue
        heads[attention.name] = attention.heads, list(there)
        stay = torch.zeros(attention.heads, dtype=torch.bool)
        stay[list(there)] = True
        own = {side: stay[head].nonzero().flatten() for side, head in attention.sides()}
        attention.resize(attention.heads, len(there))
        for (layer, writes), channels in own.items():
            narrow(layer, channels, writes)
        kept |= own
    return kept, heads


def narrow(layer: nn.Module, channels: Tensor, writes: bool) -> None:
    """Leave these rows, or columns, of a linear layer."""
    for name, p in list(layer.named_parameters(recurse=False)):
        if writes or name == "weight":
            new = p.detach().index_select(0 if writes else 1, channels.to(p.device)).clone()
            setattr(layer, name, nn.Parameter(new, requires_grad=p.requires_grad))
    setattr(layer, "out_features" if writes else "in_features", len(channels))
