"""Residual streams: widths that are read through LayerNorms alone, as in a transformer, and how they are cut.

A LayerNorm computes statistics over all channels, so a channel of zeros in front of it cannot be cut: the statistics
would change. If all norms of a stream compute them over the open channels alone (:class:`dampr.nn.GatedLayerNorm` with
``statistics="open"``, one gate vector for all), a closed channel has no influence on any layer that reads the stream.
It can be cut out of the layers that write it, the norms, and the layers that read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dampr.gates import Fixed
from dampr.nn import GatedLayerNorm

from . import heads, inputs, transformer
from .graph import Widths
from .layers.base import CannotCutError
from .layers.registry import channel_count, kind_of
from .modules import is_exactly, of_kind

Kept = dict[tuple[nn.Module, bool], Tensor]


@dataclass
class Stream:
    """One residual stream.

    Attributes:
        width: its number of channels.
        norms: the LayerNorms that normalise it.
        writers: the layers that write it.
        parameters: the bare parameters whose values are in it: name -> the dimension of its channels.
        readers: the layers that read the outputs of the norms.
    """

    width: int
    norms: list[Any] = field(default_factory=list)
    writers: list[Any] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    readers: list[Any] = field(default_factory=list)

    def weights_per_channel(self, model: nn.Module) -> float:
        """How many parameters, those of the norms included, belong to one channel while all other widths are whole."""
        weights = {p for layer in (*self.norms, *self.writers) for p in _own(layer, True)}
        weights |= {p for layer in self.readers for p in _own(layer, False)} | {
            model.get_parameter(name) for name in self.parameters
        }
        return sum(p.numel() for p in weights) / self.width

    def sides(self) -> list[tuple[nn.Module, bool]]:
        """Each side of a layer that has the channels of the stream: what norms and writers write, and what readers
        read.
        """
        return [(layer, True) for layer in (*self.norms, *self.writers)] + [(layer, False) for layer in self.readers]

    def cut(self, model: nn.Module, left: Tensor) -> Kept:
        """Cut the stream in place down to the channels ``left``, increasing indices, int64.

        Returns: ``left`` for each side of a layer that was cut.
        """
        take = _Take(left)
        # The input and the output of an attention have the same channels, so it is replaced as a whole.
        attentions = [layer for layer in self.writers if kind_of(layer).attends]
        replaced = {layer: transformer.narrow(layer, left) for layer in attentions}
        for layer in self.norms:
            take(layer, ["weight", "bias"], 0)
            layer.normalized_shape = (len(left),)
        for name, dim in self.parameters.items():
            owner, _, own = name.rpartition(".")
            take(model.get_submodule(owner), [own], dim)
        sides = [(layer, True) for layer in self.writers] + [(layer, False) for layer in self.readers]
        for layer, writes in sides:
            kind = kind_of(layer)
            if layer not in replaced:
                for own, dim in kind.axes(writes).items():
                    take(layer, [own], dim)
                setattr(layer, kind.size_written if writes else kind.size_read, len(left))
        inputs.replace(model, replaced)
        transformer.resize(model, self.norms, len(left))
        return {(replaced.get(layer, layer), writes): left for layer, writes in self.sides()}

    def within(self, twin: nn.Module, names: dict[nn.Module, str]) -> Stream:
        """The same stream in ``twin``, a copy of the model; ``names`` maps the layers of the model to their names."""
        norms, writers, readers = (
            [twin.get_submodule(names[m]) for m in own] for own in (self.norms, self.writers, self.readers)
        )
        return Stream(self.width, norms, writers, self.parameters, readers)


class _Take:
    """Cuts parameters of modules down to the channels ``left``.

    A parameter that several modules share is cut once, and they share the result.
    """

    def __init__(self, left: Tensor) -> None:
        self._left = left
        self._known: dict[tuple[Tensor, int], nn.Parameter] = {}

    def __call__(self, owner: nn.Module, names: list[str], dim: int) -> None:
        """Cut the parameters ``names`` of ``owner`` along ``dim``; those that are None stay None."""
        for name in names:
            p = getattr(owner, name)
            if p is None:
                continue
            if (p, dim) not in self._known:
                new = p.detach().index_select(dim, self._left.to(p.device))
                new = self._known[p, dim] = nn.Parameter(new, requires_grad=p.requires_grad)
                self._known[new, dim] = new  # a module may have several names
            setattr(owner, name, self._known[p, dim])


def _own(layer: Any, writes: bool) -> Iterator[Any]:
    """The parameters of a layer with a dimension for the channels that it writes (``writes``) or reads."""
    if kind_of(layer).attends:
        yield from layer.out_proj.parameters() if writes else [layer.in_proj_weight]
    else:
        yield from (p for name, p in layer.named_parameters(recurse=False) if writes or name == "weight")


def find(model: nn.Module, widths: Widths) -> tuple[list[Stream], dict[nn.Module, str]]:
    """The residual streams of a model without gates.

    Returns: the streams in the order of their first norms, and for each LayerNorm without one the reason.
    """
    streams: list[Stream] = []
    why: dict[nn.Module, str] = {}
    names: dict[Any, str] = {module: name for name, module in model.named_modules()} | {
        p: name for name, p in model.named_parameters()
    }
    attentions = {attention.core: attention for attention in heads.find(model)}
    for norm in of_kind(model, nn.LayerNorm):
        if not any(norm in stream.norms for stream in streams):
            try:
                streams.append(_around(norm, widths, names, attentions))
            except CannotCutError as error:
                why[norm] = str(error)
    return streams, why


def _around(
    norm: nn.LayerNorm, widths: Widths, names: dict[Any, str], attentions: dict[Any, heads.Attention]
) -> Stream:
    """The stream that ``norm`` normalises.

    Args:
        names: layer or parameter -> its name.
        attentions: the attentions made of linear layers, by the module that is one node of the graph.

    Raises: CannotCutError if something other than a layer writes it, or something reads it without a LayerNorm.
    """
    if norm not in widths:
        raise CannotCutError("example_inputs do not reach the layer")
    found: dict[str, dict[Any, None]] = {"norm": {}, "writer": {}, "reader": {}}
    size = norm.normalized_shape[-1]
    todo: list[tuple[str, Any]] = [("norm", norm)]
    while todo:
        kind, layer = todo.pop()
        if layer in found[kind]:
            continue
        found[kind][layer] = None
        for part in _parts(kind, layer, attentions):
            _check(kind, part, size, names)
        sources = (
            []
            if kind == "writer"
            else [s for s in widths.sources(layer) if not isinstance(s, nn.Parameter) or size in s.shape]
        )
        targets = [] if kind == "reader" else widths.targets(layer)
        if kind == "norm" and not sources:
            raise CannotCutError("its width is the model's own input")
        for source in sources:
            role = "norm" if _is_norm(source) else "writer"
            if (kind, role) == ("reader", "writer"):
                raise CannotCutError(
                    f"{_called(layer, names)} reads {_called(source, names)} without a LayerNorm between"
                )
            todo.append((role, source))
        for target in targets:
            if target is None:
                raise CannotCutError("its width is the model's own output")
            role = "norm" if _is_norm(target) else "reader"
            if (kind, role) == ("writer", "reader"):
                raise CannotCutError(
                    f"{_called(target, names)} reads {_called(layer, names)} without a LayerNorm between"
                )
            todo.append((role, target))
        if kind_of(layer).attends or (layer in attentions and attentions[layer].written in set(layer.modules())):
            todo += [("writer", layer), ("reader", layer)]
    members = {kind: {part for layer in own for part in _parts(kind, layer, attentions)} for kind, own in found.items()}
    norms, written, readers = (
        [layer for layer in names if layer in members[kind]] for kind in ("norm", "writer", "reader")
    )
    parameters = {
        names[p]: max(d for d, n in enumerate(p.shape) if n == size) for p in written if isinstance(p, nn.Parameter)
    }
    _check_shared({*norms, *written, *readers}, names)
    return Stream(size, norms, [layer for layer in written if isinstance(layer, nn.Module)], parameters, readers)


def _is_norm(layer: Any) -> bool:
    return isinstance(layer, nn.LayerNorm)


def _parts(kind: str, layer: Any, attentions: dict[Any, heads.Attention]) -> list[Any]:
    """The layers that hold the parameters of a node of the graph on the side ``kind`` ("norm", "writer" or "reader").

    For an attention made of linear layers these are the layers that compute query, key and value ("reader"), or its
    output projection. Any other node is the layer itself.
    """
    if layer in attentions and kind == "reader":
        return [part for part, _ in attentions[layer].read()]
    return (
        [attentions[layer].written]
        if layer in attentions and attentions[layer].written in set(layer.modules())
        else [layer]
    )


def _check_shared(members: set[Any], names: dict[Any, str]) -> None:
    """Raise CannotCutError if a layer outside of the stream shares a weight with a member, because its weight has to
    stay whole.
    """
    own = {p: layer for layer in members if isinstance(layer, nn.Module) for p in layer.parameters(recurse=False)}
    for layer in (layer for layer in names if isinstance(layer, nn.Module) and layer not in members):
        for p in layer.parameters(recurse=False):
            if p in own:
                raise CannotCutError(
                    f"{_called(own[p], names)} shares a weight with {_called(layer, names)}, which has another width"
                )


def _called(layer: Any, names: dict[Any, str]) -> str:
    """How messages name a layer: its type and its name in the model."""
    return f"{type(layer).__name__} {names[layer]!r}"


def _check(kind: str, layer: Any, size: int, names: dict[Any, str]) -> None:
    """Raise CannotCutError if ``layer`` cannot lose channels as a member of a stream; ``kind`` is "norm", "writer" or
    "reader".
    """
    called, own = _called(layer, names), kind_of(layer)
    if isinstance(layer, nn.Parameter):
        return
    if kind == "norm":
        if not is_exactly(layer, (nn.LayerNorm,)) or len(layer.normalized_shape) != 1:
            raise CannotCutError(f"{called} shares its width: expected exactly nn.LayerNorm of one dimension")
    elif not (own.attends or (own.shares_gates if kind == "writer" else own.gemm)) or getattr(layer, "groups", 1) != 1:
        raise CannotCutError(
            f"{called}{' with groups' if hasattr(layer, 'groups') else ''} shares its width, and cannot be cut yet"
        )
    elif getattr(layer, "max_norm", None) is not None:
        raise CannotCutError(f"{called} limits the norm of its rows, all channels together")
    elif own.attends and layer.in_proj_weight is None:
        raise CannotCutError(f"{called} has keys or values of another width")
    elif not own.attends and not isinstance(layer.weight, nn.Parameter):
        raise CannotCutError(f"the weight of {called} is computed from other tensors")
    if channel_count(layer, kind != "reader") != size:
        raise CannotCutError(f"its channels are rearranged on the way to {names[layer]!r}")


def why_not(model: nn.Module, stream: Stream, example_inputs: Any) -> str | None:
    """Why the channels of a stream cannot be cut; None if they can.

    The cut is tried: a copy of the model loses a random half of them, and its outputs are compared with those of gates.
    """
    if stream.width == 1:
        return "it has one channel"
    trial = inputs.copied(model, example_inputs)
    own = stream.within(trial, {module: name for name, module in model.named_modules()})
    closed = torch.randperm(stream.width, generator=torch.Generator().manual_seed(0)) < stream.width // 2
    gate = Fixed(torch.ones(stream.width, device=next(model.parameters()).device))
    gated: dict[nn.Module, Any] = {
        norm: GatedLayerNorm.from_dense(norm, gate=gate, statistics="open") for norm in own.norms
    }
    gate.values[closed.to(gate.values.device)] = 0
    with inputs.unfused():
        inputs.replace(trial, gated)
        masked = inputs.evaluate(trial, example_inputs)
        inputs.replace(trial, {layer: norm for norm, layer in gated.items()})
        own.cut(trial, (~closed).nonzero().flatten())
        try:
            compacted = inputs.evaluate(trial, example_inputs)
        except Exception as error:  # a model may raise anything when a width is not what it expects
            return (
                "without half of its channels the model does not run, so something beside its layers has that width "
                f"({error})"
            )
    largest = max((float(t.abs().max()) for t in masked if t.numel()), default=0.0)
    tolerance = min(0.05, 1024 * max((torch.finfo(t.dtype).eps for t in masked if t.is_floating_point()), default=0.0))
    if inputs.differ(masked, compacted, tolerance, tolerance * largest):
        return (
            "without half of its channels the model computes something else, so these are mixed or rearranged on the "
            "way"
        )
    return None


def cut_closed(
    small: nn.Module, opened: dict[nn.Module, Tensor], sample: Any, round_to: int, notes: dict[str, str]
) -> tuple[Kept, dict[str, dict[str, Any]]]:
    """Cut the channels that gates of norms with open statistics have closed, in place.

    Args:
        small: the model, whose norms are plain by now.
        opened: norm -> which of its channels are open, bool.
        sample: example inputs.
        round_to: widths that are not a multiple of it get a note.
        notes: notes are added to it, by the names of layers.

    Returns: the channels that are left on each side of a layer, and for bare parameters the entries of the manifest, by
    name.

    Raises: CannotCutError if closed channels cannot be cut, because the statistics of a plain norm would include them.
    """
    kept: Kept = {}
    parameters: dict[str, dict[str, Any]] = {}
    if all(bool(is_open.all()) for is_open in opened.values()):
        return kept, parameters
    names = {module: name for name, module in small.named_modules()}
    streams, why = find(small, Widths(small, sample))
    for norm, is_open in opened.items():
        if bool(is_open.all()) or (norm, True) in kept:
            continue
        stream = next((own for own in streams if norm in own.norms), None)
        reason = why.get(norm, "")
        if stream is not None and not all(torch.equal(opened.get(other, ~is_open), is_open) for other in stream.norms):
            reason = (
                f"the norms of one stream, {[names[m] for m in stream.norms]}, have other gates: expected one for "
                "all, of open statistics"
            )
        if stream is None or reason:
            raise CannotCutError(
                f"{names[norm]}: {int((~is_open).sum())} closed channels cannot stay, for its statistics leave them "
                f"out: {reason}"
            )
        left = is_open.nonzero().flatten().cpu()
        if not len(left):
            left = torch.zeros(1, dtype=torch.int64)
            notes[names[norm]] = "1 closed channel stays: every layer keeps one at least"
        elif len(left) % round_to:
            notes[names[norm]] = (
                f"{len(left)} channels are left, no multiple of {round_to}: a LayerNorm counts whatever would fill "
                "them up"
            )
        kept |= stream.cut(small, left)
        for name, dim in stream.parameters.items():
            parameters[name] = {"dim": dim, "before": stream.width, "kept": left.tolist()}
    return kept, parameters
