"""Which widths of a network are tied together: what layers write and read, by the units of :mod:`.units`.

A *width* is one dimension that several layers share: the layers that write it (producers) and those that read it
(consumers). Channels that go together are one class of units. This module says of a layer's channels which layers share
them, and which can go without changing a result.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dampr.nn import GatedLayer, Scale
from dampr.nn.computed import computed

from . import heads, inputs
from .flow import Flow, Node
from .tracing import ATTENTION, GEMMS, channel_count, is_depthwise, is_transposed, pads_with_zeros
from .units import Units, trace_units

__all__ = [
    "GEMMS",
    "NORMS",
    "CannotCutError",
    "Closed",
    "Side",
    "Widths",
    "channel_count",
    "is_depthwise",
    "is_transposed",
    "pads_with_zeros",
]

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
_PASSES_THROUGH = (Scale, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
_READERS = (nn.Linear, nn.modules.conv._ConvNd, *ATTENTION, nn.RNNBase)
_KEEPS_ZERO = ("SiluBackward0", "GeluBackward0", "ReluBackward0", "TanhBackward0")  # functions with f(0) = 0

Side = tuple[nn.Module, bool]  # a layer, and whether the channels that it writes are meant or those that it reads
Closed = dict[Side, set[int]]  # the closed channels of each


@dataclass(frozen=True)
class Member:
    """One layer's side of a width: which of its channels belong to which class.

    ``passes``: the layer only hands channels on (norms, activations, depthwise convolutions), and is neither producer
    nor consumer.
    """

    module: nn.Module
    writes: bool
    channels: list[int]
    classes: list[int]
    passes: bool

    @property
    def side(self) -> Side:
        return self.module, self.writes

    def of(self, classes: set[int]) -> list[int]:
        """Its channels that belong to these classes."""
        return [channel for channel, one in zip(self.channels, self.classes, strict=True) if one in classes]


class TracingError(RuntimeError):
    """The operators of a model cannot be followed, though it runs."""


class CannotCutError(Exception):
    """Why closed channels stay; the message completes a note of the manifest."""


class Widths:
    """The widths of a model, traced in evaluation and in training mode; the model is left as it was.

    ``units``: of the model, where they are known. A model with gates is seen as ``plain`` is, a copy without gates in
    which layers have their names; ``traced`` is what was seen.

    Raises: TracingError; what the model's forward raises.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, units: Units | None = None, plain: nn.Module | None = None
    ) -> None:
        self._cores = {attention.core for attention in heads.find(model)}
        self._names = {module: name for name, module in model.named_modules()}
        self._flow = Flow(model, example_inputs, self._cores)
        self.traced, self._inputs = plain or model, example_inputs
        try:
            self.units = units or inputs.looked_at(self.traced, lambda: trace_units(self.traced, example_inputs))
        except Exception as error:
            raise TracingError(
                f"the operators of {type(model).__name__} cannot be followed ({type(error).__name__}: {error})"
            ) from error
        self._owners: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
        self._paths: dict[nn.Module, str] = {}
        self._sides: dict[frozenset[int], list[Member]] = {}
        twins = dict(plain.named_modules()) if plain is not None else {}
        for module, name in self._names.items():
            # a norm that took in its activation
            two = isinstance(module, GatedLayer) and isinstance(twins.get(name), nn.Sequential)
            self._paths[module] = f"{name}.0." if two else f"{name}." if name else ""
        modules = {path: module for module, path in self._paths.items()}
        for alias, name in self.units.alias.items():
            path, _, own = alias.rpartition(".")
            path = path.partition("parametrizations.")[0].rstrip(".")
            owner = modules.get(f"{path}." if path else "")
            if owner is not None:
                self._owners[name].append((owner, own))

    def called(self) -> list[nn.Module]:
        """The modules without children, and attention, in the order in which they were first called."""
        return list(self._flow.calls)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._flow

    def why_absent(self, layer: nn.Module) -> str:
        """Why a layer is not in the graph."""
        if any(layer in core.modules() for core in self._cores):
            return "it is inside of an attention, of which only whole heads are cut"
        if layer in self._flow.calls:
            return "its outputs are detached (torch.no_grad, detach), so what reads them is not known"
        return "example_inputs do not reach the layer"

    # ---- what comes after what

    def reaches_output(self, module: nn.Module) -> bool:
        """Whether the outputs of ``module`` get to the model's output without being read by another layer on some
        path.
        """
        todo, seen = [self._flow[module]], set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.returned:
                return True
            todo.extend(after for after in node.outputs if not isinstance(after.module, _READERS))
        return False

    def sources(self, layer: nn.Module) -> list[Any]:
        """The layers and bare parameters whose values get to ``layer`` through operations alone."""
        return [node.module for node in self._flow.neighbours(layer, lambda node: node.inputs)]

    def targets(self, layer: Any) -> list[Any]:
        """The layers that the values of a layer, or of a bare parameter, get to through operations alone;
        None is the model's output.
        """
        end = Node(nn.Identity(), "")
        found = self._flow.neighbours(layer, lambda node: [*node.outputs, *[end] * node.returned])
        return [None if node is end else node.module for node in found]

    def norm_after(self, module: nn.Module) -> nn.Module | None:
        """The BatchNorm, or :class:`Scale`, that alone reads the outputs of ``module``, both called once;
        None without one.
        """
        after = self._flow[module].outputs
        norm = after[0].module if len(after) == 1 else None
        if not isinstance(norm, (nn.modules.batchnorm._BatchNorm, Scale)) or norm.num_features != channel_count(
            module, True
        ):
            return None
        return norm if self._calls(module) == self._calls(norm) == 1 else None

    def _calls(self, layer: nn.Module) -> int:
        return self._flow.calls.get(layer, 1)

    def norms_reading(self, layer: nn.Module) -> tuple[list[nn.Module], bool]:
        """The BatchNorms that read the outputs of ``layer``, also as part of a sum,
        and whether nothing else reads these.
        """
        norms: list[nn.Module] = []
        alone = True
        todo, seen = list(self._flow[layer].outputs), set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if isinstance(node.module, nn.modules.batchnorm._BatchNorm):
                norms.append(node.module)
                alone &= node.module.num_features == channel_count(layer, True) and self._calls(node.module) == 1
            elif isinstance(node.module, _READERS) or node.returned:
                alone = False
            else:
                todo.extend(node.outputs)
        return [norm for norm in self._names if norm in norms], alone

    def layer_before(self, norm: nn.Module) -> nn.Module | None:
        """The linear or convolution layer whose outputs the BatchNorm ``norm`` alone reads; None without one."""
        before = self._flow[norm].inputs if norm in self else []
        layer = before[0].module if len(before) == 1 else None
        return layer if isinstance(layer, GEMMS) and self.norm_after(layer) is norm else None

    def readers_after(self, norm: nn.Module) -> list[nn.Module]:
        """The layers that read the outputs of ``norm`` channel by channel and nothing else;
        empty where something else does.
        """
        found: list[nn.Module] = []
        todo = list(self._flow[norm].outputs) if norm in self else []
        while todo:
            node = todo.pop()
            if isinstance(node.module, GEMMS):
                if getattr(node.module, "groups", 1) != 1 or channel_count(node.module, False) != norm.num_features:
                    return []
                found.append(node.module)
            elif len(node.inputs) != 1 or node.returned:
                return []
            else:
                todo.extend(node.outputs)
        return found

    def around(self, norm: nn.Module) -> list[Side]:
        """The side of a layer where a channel that is 0 after ``norm`` is as good as not there: where it is written,
        or else read.
        """
        writer = self.layer_before(norm)
        return [(writer, True)] if writer is not None else [(reader, False) for reader in self.readers_after(norm)]

    @functools.cached_property
    def multiplied(self) -> dict[nn.Module, nn.Module]:
        """Of a layer the one whose outputs do nothing but multiply its own, channel by channel, as in gated
        feed-forward layers.

        A channel that is 0 in the first is 0 in the product, so both may go. Layers that come to the product as they
        are come first.
        """
        layers = [module for module in self._names if isinstance(module, GEMMS) and module in self]
        ends = {layer: self._product_after(layer) for layer in layers}
        found: list[tuple[int, nn.Module, nn.Module]] = []
        for layer, (product, steps, keeps_zero) in ends.items():
            others = [
                other for other in layers if other is not layer and product is not None and ends[other][0] is product
            ]
            if keeps_zero and len(others) == 1 and others[0] in self.written_together(layer):
                found.append((steps, layer, others[0]))
        return {layer: other for _, layer, other in sorted(found, key=lambda item: item[0])}

    def _product_after(self, layer: nn.Module) -> tuple[Node | None, int, bool]:
        """The product of two that alone reads the outputs of ``layer``, after how many steps,
        and whether 0 stays 0 on the way.
        """
        node, steps, keeps_zero = self._flow[layer], 0, True
        while len(node.outputs) == 1 and not node.returned and self._calls(layer) == 1:
            node, steps = node.outputs[0], steps + 1
            if node.operation == "MulBackward0" and len(node.inputs) == 2:
                return node, steps, keeps_zero
            if len(node.inputs) != 1 or node.module is not None:
                break
            keeps_zero &= node.operation in _KEEPS_ZERO
        return None, steps, False

    # ---- what goes together

    def classes(self, layer: nn.Module, writes: bool) -> list[int]:
        """The class of each channel that a layer writes, or reads; empty where its weight is no parameter,
        or has one channel there.
        """
        place = self._place(layer, writes)
        return [] if place is None else self.units.classes(*place)

    def _place(self, layer: nn.Module, writes: bool) -> tuple[str, int] | None:
        """The parameter, and its dimension, with an index for each channel that a layer writes, or reads."""
        places = ((self._paths.get(layer, "") + own, dim) for own, dim in _weights(layer, writes))
        return next((place for place in places if place[0] in self.units.alias and self.units.classes(*place)), None)

    def written_together(self, layer: nn.Module) -> list[nn.Module]:
        """The layers whose output channels are added to those of ``layer``, one to one, itself included,
        in the order of the model.
        """
        own = self.classes(layer, True)
        kinds = (nn.Embedding, *GEMMS)
        found: list[nn.Module] = [
            m
            for m in self._names
            if isinstance(m, kinds) and own and not is_depthwise(m) and self.classes(m, True) == own
        ]
        return found if layer in found else [layer]

    def why_not(self, layer: nn.Module) -> str | None:
        """Why no channel that ``layer`` writes can be cut, or only with those of layers that cannot share its gates;
        else None.
        """
        try:
            members = self.members(layer, True)
        except CannotCutError as error:
            return str(error)
        own = self.classes(layer, True)
        other = next((m.module for m in members if m.writes and not m.passes and self.classes(*m.side) != own), None)
        return (
            None
            if other is None
            else f"its channels and those of {self._names[other]!r} go together, but not one to one"
        )

    def members(self, layer: nn.Module, writes: bool) -> list[Member]:
        """Every side of a layer that has some of these channels.

        Raises CannotCutError where one is of a kind that cannot be cut.
        """
        self._check_weights(layer)
        classes = self.classes(layer, writes)
        sides = list(self._with_some_of(frozenset(classes)))
        producers = [m for m in sides if m.writes and not m.passes]
        if not producers:
            raise CannotCutError("its width is the model's own input")
        if any(self.reaches_output(m.module) for m in producers if m.module in self):
            raise CannotCutError("its width is the model's own output")
        if (reason := self._reason(layer, writes)) is not None:
            raise CannotCutError(reason)
        if not classes:
            raise CannotCutError("it has one channel")
        return sides

    def _with_some_of(self, wanted: frozenset[int]) -> list[Member]:
        """Every side of a layer that has some of these classes.

        Raises CannotCutError for a parameter that no layer has.
        """
        if wanted not in self._sides:
            found: dict[tuple[nn.Module, bool], Member] = {}
            for name, dim in self.units.places(wanted):
                if name not in self._owners:
                    raise CannotCutError(f"{name!r} shares its width, and cannot be cut yet")
                for module, own in self._owners[name]:
                    side = self._side(module, own, dim)
                    if side is not None and (module, side) not in found:
                        labels = self.units.classes(name, dim)
                        channels = [i for i, one in enumerate(labels) if one in wanted]
                        own_classes = [labels[i] for i in channels]
                        found[module, side] = Member(module, side, channels, own_classes, self._passes(module))
            self._sides[wanted] = list(found.values())
        return self._sides[wanted]

    def _reason(self, layer: nn.Module, writes: bool) -> str | None:
        """Why some of these channels stay.

        What training alone mixes or averages, such as an auxiliary loss over all channels, is defined for fewer of them
        too.
        """
        place = self._place(layer, writes)
        reason = None if place is None else self.units.why_not(*place)
        if (
            place is not None
            and reason is not None
            and reason.kind in ("mixed", "statistic")
            and True in self.units.modes
        ):
            reason = self._evaluated.why_not(*place)
        return None if reason is None else str(reason)

    @functools.cached_property
    def _evaluated(self) -> Units:
        return inputs.looked_at(self.traced, lambda: trace_units(self.traced, self._inputs, training=(False,)))

    def _passes(self, module: nn.Module) -> bool:
        return isinstance(module, _PASSES_THROUGH) or is_depthwise(module)

    def _side(self, module: nn.Module, own: str, dim: int) -> bool | None:
        """Whether a dimension of a layer's parameter is what the layer writes (True) or reads (False); None where
        another one says so.

        Raises CannotCutError for layers that cannot be cut.
        """
        self._check_weights(module)
        kind, called = type(module).__name__, self._names[module]
        if self._passes(module):
            return True if dim == 0 else None
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
            raise CannotCutError(f"{kind} {called!r} computes statistics over its channels")
        if isinstance(module, nn.RNNBase) and own.startswith("weight_ih_l0") and dim == 1:
            writes: bool | None = False
        elif isinstance(module, nn.Embedding) and dim == 1:
            writes = True
        elif isinstance(module, GEMMS) and getattr(module, "groups", 1) == 1:
            writes = (None if own != "weight" else True) if dim == 0 else False
        elif is_transposed(module) and module.groups == 1:
            writes = (dim == 1) if own == "weight" else None
        elif (
            isinstance(module, (*_READERS, nn.RNNCellBase, nn.Embedding))
            or module in self._cores
            or own in ("weight", "bias")
        ):
            how = " with groups" if getattr(module, "groups", 1) > 1 else ""
            raise CannotCutError(f"{kind} {called!r}{how} shares its width, and cannot be cut yet")
        else:
            raise CannotCutError("a bare nn.Parameter takes part in its width")
        if self._calls(module) != 1:
            raise CannotCutError(f"{kind} {called!r} is called {self._calls(module)} times")
        return writes

    def _check_weights(self, module: nn.Module) -> None:
        if (weight := computed(module)) is not None:
            raise CannotCutError(
                f"the {weight} of {type(module).__name__} {self._names[module]!r} is computed from other tensors"
            )

    def removable(self, layer: nn.Module, writes: bool, closed: Closed) -> set[int]:
        """Of the channels of ``layer``, the classes that nobody writes (all producers closed) or nobody reads.

        Raises CannotCutError where the width cannot be cut at all.
        """
        shut, used = set[tuple[int, bool]](), set[tuple[int, bool]]()
        for m in self.members(layer, writes):
            own = closed.get(m.side, set())
            for channel, one in zip(m.channels, m.classes, strict=True) if not m.passes else ():
                (shut if channel in own else used).add((one, m.writes))
        gone = {one for one, _ in shut - used}
        return gone.intersection(self.classes(layer, writes))

    def last(self, sides: Iterable[Side], gone: set[int]) -> set[int]:
        """The classes that stay so that each of these sides keeps a channel though all of its classes are ``gone``:
        the lowest of each.
        """
        found = (set(self.classes(*side)) for side in sides)
        return {min(own) for own in found if own and own <= gone}


def _weights(layer: nn.Module, writes: bool) -> Iterable[tuple[str, int]]:
    """The parameters, and their dimensions, that have an index for each channel that a layer writes, or reads."""
    if isinstance(layer, nn.RNNBase):
        return [] if writes else [("weight_ih_l0", 1)]
    if isinstance(layer, Scale):
        return [("scale", 0)]
    if isinstance(layer, nn.Embedding) or is_transposed(layer):
        return [("weight", int(writes))]
    if isinstance(layer, _PASSES_THROUGH) or is_depthwise(layer):
        return [("weight", 0), ("running_mean", 0)]
    return [("weight", int(not writes))]
