"""Attention made of linear layers, as libraries have it: which channels belong to which head, and how closed heads are
cut.

``nn.MultiheadAttention`` is one layer and is treated elsewhere. Other libraries have modules around ``nn.Linear``
layers that compute query, key and value, and an output projection that reads the heads. The output projection has a
gate for each head (:class:`dampr.nn.GatedHeads`); a closed head is cut out of all these layers. ``KINDS`` lists such
modules by the full names of their types, so that none of the libraries is imported here.
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
    """How a type of attention is built; names are those of modules and attributes in it.

    Attributes:
        read: linear layer whose rows belong to heads -> how often its rows go through all heads (3 if it computes
            query, key and value one after the other).
        written: the output projection, whose columns belong to heads.
        head_dim: the attribute with the width of one head.
        core: the module that computes the heads; it is one node when the model is traced. "" if it is the whole module.
        sharing: the attribute with the number of query heads that share a key and a value, and so a gate; "" if none
            share.
        scaled: attributes that are proportional to the number of heads, and are set when heads go.
    """

    read: Mapping[str, int]
    written: str
    head_dim: str = "head_dim"
    core: str = ""
    sharing: str = ""
    scaled: tuple[str, ...] = ()


KINDS: dict[str, tuple[Kind, ...]] = {}
"""Full name of a type of attention -> the ways in which it may be built; the first that fits a module counts."""


@dataclass(frozen=True)
class Attention:
    """A module of a model that is an attention of a known kind.

    Attributes:
        name: its name in the model.
        module: the module.
        kind: how it is built.
    """

    name: str
    module: nn.Module
    kind: Kind = field(repr=False)

    @property
    def core(self) -> nn.Module:
        """The module that is one node when the model is traced."""
        return self.module.get_submodule(self.kind.core)

    @property
    def written(self) -> Any:
        """The output projection, which reads the heads."""
        return self.module.get_submodule(self.kind.written)

    @property
    def written_name(self) -> str:
        """The name of the output projection in the model."""
        return f"{self.name}.{self.kind.written}".lstrip(".")

    def read(self) -> Iterator[tuple[Any, int]]:
        """Yields each linear layer whose rows belong to heads, and how often its rows go through all heads."""
        for name, times in self.kind.read.items():
            yield self.module.get_submodule(name), times

    @property
    def heads(self) -> int:
        """The number of gates: one for each head, or for each set of query heads that share a key and a value."""
        width: int = _attribute(self.module, self.kind.head_dim)
        shared: int = _attribute(self.module, self.kind.sharing) if self.kind.sharing else 1
        return int(self.written.in_features) // (width * shared)

    def sides(self) -> Iterator[tuple[tuple[nn.Module, bool], Tensor]]:
        """Yields each side of a layer whose channels belong to heads, (layer, writes), and the head of each channel,
        int64.
        """
        heads = self.heads
        yield (self.written, False), torch.arange(heads).repeat_interleave(self.written.in_features // heads)
        for layer, times in self.read():
            yield (
                (layer, True),
                torch.arange(heads).repeat_interleave(layer.out_features // (times * heads)).repeat(times),
            )

    def weights_per_head(self) -> float:
        """The number of parameters that go with a head, biases of query, key and value included."""
        rows = sum(p.numel() for layer, _ in self.read() for p in (layer.weight, layer.bias) if p is not None)
        return float(rows + self.written.weight.numel()) / self.heads

    def fits(self) -> bool:
        """Whether the module has these layers, they are linear, and their widths are multiples of the number of
        heads.
        """
        try:
            read = list(self.read())
            heads = self.heads if isinstance(self.written, nn.Linear) else 0
        except AttributeError:
            return False
        return heads > 0 and all(
            isinstance(layer, nn.Linear) and layer.out_features % (times * heads) == 0 for layer, times in read
        )

    def resize(self, before: int, heads: int) -> None:
        """Set the attributes that follow from the number of heads, from ``before`` to ``heads``; the layers do not
        change.
        """
        for path in self.kind.scaled:
            owner, _, attribute = path.rpartition(".")
            value = getattr(self.module.get_submodule(owner), attribute)
            setattr(self.module.get_submodule(owner), attribute, value // before * heads)


def _attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted ``path`` below ``module``."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def find(model: nn.Module) -> list[Attention]:
    """The attentions in ``model`` whose types ``KINDS`` lists and whose layers fit."""
    found = []
    for name, module in model.named_modules():
        kinds = KINDS.get(f"{type(module).__module__}.{type(module).__qualname__}", ())
        found += [a for a in (Attention(name, module, kind) for kind in kinds) if a.fits()][:1]
    return found


def parts(model: nn.Module) -> dict[nn.Module, Attention]:
    """For each linear layer of an attention, the attention."""
    return {
        layer: attention
        for attention in find(model)
        for layer in (attention.written, *(m for m, _ in attention.read()))
    }


def left_out(layer: nn.Module, attention: Attention | None, granularity: Any, per_sample: bool) -> str | None:
    """Why convert puts no gates in a layer of an attention; None if it does, or if the layer is in none."""
    if attention is None or granularity != "output":
        return None
    if layer is not attention.written:
        return f"its outputs are the heads of {attention.name!r}, whose gates are in {attention.written_name!r}"
    return "heads have no draws for each sample" if per_sample else None


def open_heads(model: nn.Module) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The open heads of each attention with gates, and notes, both by the name of the attention.

    If all heads are closed, the first counts as open, with a note.
    """
    found = {a.name: a.written.open_heads() for a in find(model) if isinstance(a.written, GatedHeads)}
    notes = {name: "1 closed head stays: every layer keeps one at least" for name, heads in found.items() if not heads}
    return {name: heads or [0] for name, heads in found.items()}, notes


def cut(small: nn.Module, left: Mapping[str, list[int]]) -> tuple[Kept, dict[str, tuple[int, list[int]]]]:
    """Cut the heads of a plain model, in place, down to ``left``: attention -> the heads that stay.

    Returns: for each side of a layer the channels that are left, and for each attention that lost heads (the number of
    heads before, those that are left).
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
    """Cut a linear layer down to these output channels (``writes``) or input channels, in place; ``channels``:
    int64.
    """
    for name, p in list(layer.named_parameters(recurse=False)):
        if writes or name == "weight":
            new = p.detach().index_select(0 if writes else 1, channels.to(p.device)).clone()
            setattr(layer, name, nn.Parameter(new, requires_grad=p.requires_grad))
    setattr(layer, "out_features" if writes else "in_features", len(channels))
