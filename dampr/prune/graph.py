"""The widths of a model: which layers share channels, and which channels can be cut without a change of the result.

A *width* is one dimension that several layers share: the layers that write it (producers) and the layers that read it
(consumers). The units come from :mod:`.units`; channels that have to go together have the same class, an integer.
Functions with an argument ``writes`` are about one side of a layer: True for the channels that it writes, False for
those that it reads.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from dampr.nn import GatedLayer
from dampr.nn.computed import computed

from . import heads, inputs
from .flow import Flow, Node
from .layers.base import CannotCutError
from .layers.registry import channel_count, kind_of
from .units import Units, trace_units
from .units.ledger import OF_WEIGHT

_KEEPS_ZERO = ("SiluBackward0", "GeluBackward0", "ReluBackward0", "TanhBackward0")  # functions with f(0) = 0

Side = tuple[nn.Module, bool]  # a layer, and True for the channels that it writes, False for those that it reads
Closed = dict[Side, set[int]]  # side -> its closed channels


@dataclass(frozen=True)
class Member:
    """One side of a layer that belongs to a width.

    Attributes:
        module: the layer.
        writes: whether the side is what the layer writes, or what it reads.
        channels: the indices of its channels that belong to the width.
        classes: the class of each of these channels.
        passes: whether the layer only hands channels on (norms, activations, depthwise convolutions), so that it is
            neither a producer nor a consumer.
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
        """Return the indices of this side's channels that belong to ``classes``."""
        return [channel for channel, class_id in zip(self.channels, self.classes, strict=True) if class_id in classes]


class TracingError(RuntimeError):
    """The operators of a model cannot be followed, though it runs."""


class Widths:
    """The widths of a model, traced in evaluation and in training mode; the model is left as it was.

    Args:
        model: the model, with gates or without.
        example_inputs: the inputs of the trace.
        units: the units of the model if they are known; they are traced otherwise.
        plain: for a model with gates, a copy without gates in which layers have the same names. The operators of the
            copy are traced instead.

    Attributes:
        traced: the model whose operators were traced: ``plain`` if it is given, else ``model``.
        units: its units.

    Raises: TracingError.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, units: Units | None = None, plain: nn.Module | None = None
    ) -> None:
        self._cores = {attention.core for attention in heads.find(model)}
        self._names = {module: name for name, module in model.named_modules()}
        self.traced, self._inputs = plain or model, example_inputs
        try:
            self._flow = Flow(model, example_inputs, self._cores)
            with inputs.quiet(self.traced, example_inputs) if units is None else nullcontext():
                self.units = units or trace_units(self.traced, example_inputs)
        except Exception as error:
            raise TracingError(
                f"the operators of {type(model).__name__} cannot be followed ({type(error).__name__}: {error})"
            ) from error
        # name of a parameter, as in ``units.origin`` -> the layers that have it, with their names for it
        self._owners: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
        self._paths: dict[nn.Module, str] = {}  # layer -> what the names of its parameters begin with in ``units``
        self._sides: dict[frozenset[int], list[Member]] = {}  # classes -> what :meth:`_with_some_of` found for them
        twins = dict(plain.named_modules()) if plain is not None else {}
        for module, name in self._names.items():
            # A gated norm that also computes the activation after it is a Sequential of both in the plain copy.
            two = isinstance(module, GatedLayer) and isinstance(twins.get(name), nn.Sequential)
            self._paths[module] = f"{name}.0." if two else f"{name}." if name else ""
        modules = {path: module for module, path in self._paths.items()}
        for alias, name in self.units.alias.items():
            path, _, attribute = alias.rpartition(".")
            path = path.partition("parametrizations.")[0].rstrip(".")
            owner = modules.get(f"{path}." if path else "")
            if owner is not None:
                self._owners[name].append((owner, attribute))

    def called(self) -> list[nn.Module]:
        """Return the modules without children, and attention, in the order in which they were first called."""
        return list(self._flow.calls)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._flow

    def why_absent(self, layer: nn.Module) -> str:
        """Return why a layer is not in the graph, in words."""
        if any(layer in core.modules() for core in self._cores):
            return "it is inside of an attention, of which only whole heads are cut"
        if layer in self._flow.calls:
            return "its outputs are detached (torch.no_grad, detach), so what reads them is not known"
        return "example_inputs do not reach the layer"

    # ---- what comes after what

    def reaches_output(self, module: nn.Module) -> bool:
        """Return whether on some path the outputs of ``module`` become outputs of the model before another layer reads
        them.
        """
        todo, seen = [self._flow[module]], set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.returned:
                return True
            todo.extend(after for after in node.outputs if not kind_of(after.module).reads)
        return False

    def sources(self, layer: nn.Module) -> list[Any]:
        """Return the layers and bare parameters whose values reach ``layer`` through operations alone, with no layer in
        between.
        """
        return [node.module for node in self._flow.neighbours(layer, lambda node: node.inputs)]

    def targets(self, layer: Any) -> list[Any]:
        """Return the layers that the values of a layer, or of a bare parameter, reach through operations alone, with no
        layer in between.

        None in the list stands for the model's output.
        """
        end = Node(nn.Identity(), "")
        nodes = self._flow.neighbours(layer, lambda node: [*node.outputs, *[end] * node.returned])
        return [None if node is end else node.module for node in nodes]

    def norm_after(self, module: nn.Module) -> nn.Module | None:
        """Return the BatchNorm or :class:`Scale` that is the only reader of ``module`` and has its channels, if both
        are called once; else None.
        """
        after = self._flow[module].outputs
        norm: Any = after[0].module if len(after) == 1 else None
        kind = kind_of(norm)
        if not (kind.gates_values and kind.passes) or kind.width(norm, True) != channel_count(module, True):
            return None
        return norm if self._calls(module) == self._calls(norm) == 1 else None

    def _calls(self, layer: nn.Module) -> int:
        """Return how many times the example inputs call ``layer``; 1 if it was not counted."""
        return self._flow.calls.get(layer, 1)

    def norms_reading(self, layer: nn.Module) -> tuple[list[nn.Module], bool]:
        """Find the BatchNorms that read the outputs of ``layer``, directly or after additions and other operations.

        Returns: these norms in the order of the model, and whether they are the only readers, each with all channels
        and called once.
        """
        norms: list[Any] = []
        no_others = True
        todo, seen = list(self._flow[layer].outputs), set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            module: Any = node.module
            kind = kind_of(module)
            if kind.batch_statistics:
                norms.append(module)
                no_others &= kind.width(module, True) == channel_count(layer, True) and self._calls(module) == 1
            elif kind.reads or node.returned:
                no_others = False
            else:
                todo.extend(node.outputs)
        return [norm for norm in self._names if norm in norms], no_others

    def layer_before(self, norm: nn.Module) -> nn.Module | None:
        """Return the linear or convolution layer whose outputs the BatchNorm ``norm`` alone reads; None without one."""
        before = self._flow[norm].inputs if norm in self else []
        layer: Any = before[0].module if len(before) == 1 else None
        return layer if kind_of(layer).gemm and self.norm_after(layer) is norm else None

    def readers_after(self, norm: nn.Module) -> list[nn.Module]:
        """Return the linear and convolution layers that read the outputs of ``norm``, one column for each channel.

        The list is empty if anything else reads them too.
        """
        readers: list[Any] = []
        todo = list(self._flow[norm].outputs) if norm in self else []
        while todo:
            node = todo.pop()
            if kind_of(node.module).gemm:
                if getattr(node.module, "groups", 1) != 1 or channel_count(node.module, False) != norm.num_features:
                    return []
                readers.append(node.module)
            elif len(node.inputs) != 1 or node.returned:
                return []
            else:
                todo.extend(node.outputs)
        return readers

    def around(self, norm: nn.Module) -> list[Side]:
        """Return the sides of layers where a channel that is 0 after ``norm`` can be cut.

        This is the layer that writes the input of ``norm``, or if there is no such layer, the layers that read its
        output.
        """
        writer = self.layer_before(norm)
        return [(writer, True)] if writer is not None else [(reader, False) for reader in self.readers_after(norm)]

    @functools.cached_property
    def multiplied(self) -> dict[nn.Module, nn.Module]:
        """For a layer, the layer whose outputs do nothing but multiply its outputs channel by channel, as in a gated
        feed-forward layer.

        A channel that is 0 in the first layer is 0 in the product, so the same channel of both can be cut. Pairs are
        sorted by the number of operations between the first layer and the product, the fewest first.
        """
        layers = [module for module in self._names if kind_of(module).gemm and module in self]
        ends = {layer: self._product_after(layer) for layer in layers}
        pairs: list[tuple[int, nn.Module, nn.Module]] = []
        for layer, (product, steps, keeps_zero) in ends.items():
            others = [
                other for other in layers if other is not layer and product is not None and ends[other][0] is product
            ]
            if keeps_zero and len(others) == 1 and others[0] in self.written_together(layer):
                pairs.append((steps, layer, others[0]))
        return {layer: other for _, layer, other in sorted(pairs, key=lambda item: item[0])}

    def _product_after(self, layer: nn.Module) -> tuple[Node | None, int, bool]:
        """Find the product of two tensors that is the only reader of ``layer``, over a chain of operations with one
        input.

        Returns: the node of the product or None, the number of operations to it, and whether all operations before it
        map 0 to 0.
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
        """Return the class of each channel that a layer writes or reads; [] if its weight is not a parameter or has a
        single channel on that side.
        """
        place = self._place(layer, writes)
        return [] if place is None else self.units.classes(*place)

    def _place(self, layer: nn.Module, writes: bool) -> tuple[str, int] | None:
        """Return the parameter, and its dimension, that has an index for each channel that a layer writes or reads;
        None if there is none.
        """
        path = self._paths.get(layer, "")
        places = ((path + attribute, dim) for attribute, dim in kind_of(layer).places(layer, writes))
        return next((place for place in places if place[0] in self.units.alias and self.units.classes(*place)), None)

    def written_together(self, layer: nn.Module) -> list[nn.Module]:
        """Return the layers whose output channels are added to those of ``layer``, channel by channel, so that one
        class holds both.

        ``layer`` is among them; they are in the order of the model.
        """
        classes = self.classes(layer, True)
        layers = [m for m in self._names if classes and kind_of(m).shares_gates and self.classes(m, True) == classes]
        return layers if layer in layers else [layer]

    def why_not(self, layer: nn.Module) -> str | None:
        """Return why the channels that ``layer`` writes get no gates; None if they can have some.

        Either none of them can be cut, or they can be cut only together with channels of a layer that cannot share the
        gates.
        """
        try:
            members = self.members(layer, True)
        except CannotCutError as error:
            return str(error)
        classes = self.classes(layer, True)
        other = next(
            (m.module for m in members if m.writes and not m.passes and self.classes(*m.side) != classes), None
        )
        return (
            None
            if other is None
            else f"its channels and those of {self._names[other]!r} go together, but not one to one"
        )

    def members(self, layer: nn.Module, writes: bool) -> list[Member]:
        """Return the sides of all layers that have some of the channels that ``layer`` writes or reads.

        Raises: CannotCutError if one of these layers cannot be cut, or if the width is the model's input or output.
        """
        self._check_weights(layer)
        classes = self.classes(layer, writes)
        if not classes:
            raise CannotCutError("it has one channel")
        sides = list(self._with_some_of(frozenset(classes)))
        producers = [m for m in sides if m.writes and not m.passes]
        if not producers:
            raise CannotCutError("its width is the model's own input")
        if any(self.reaches_output(m.module) for m in producers if m.module in self):
            raise CannotCutError("its width is the model's own output")
        if (reason := self._reason(layer, writes)) is not None:
            raise CannotCutError(reason)
        return sides

    def _with_some_of(self, wanted: frozenset[int]) -> list[Member]:
        """Return the sides of all layers that have channels of the classes ``wanted``. Each set of classes is looked up
        once.

        Raises: CannotCutError if a parameter outside of layers has some, or if one of the layers cannot be cut.
        """
        if wanted not in self._sides:
            members: dict[tuple[nn.Module, bool], Member] = {}
            for name, dim in self.units.places(wanted):
                if name not in self._owners:
                    raise CannotCutError(f"{name!r} shares its width, and cannot be cut yet")
                for module, attribute in self._owners[name]:
                    side = self._side(module, attribute, dim)
                    if side is not None and (module, side) not in members:
                        labels = self.units.classes(name, dim)
                        channels = [i for i, class_id in enumerate(labels) if class_id in wanted]
                        own_classes = [labels[i] for i in channels]
                        members[module, side] = Member(module, side, channels, own_classes, kind_of(module).passes)
            self._sides[wanted] = list(members.values())
        return self._sides[wanted]

    def _reason(self, layer: nn.Module, writes: bool) -> str | None:
        """Return why some of the channels that a layer writes or reads must stay; None if all can go.

        Reasons that only hold in training mode because channels are mixed or averaged do not count: an auxiliary loss
        over all channels, for example, is also defined for fewer channels. Statistics of weights do count.
        """
        place = self._place(layer, writes)
        reason = None if place is None else self.units.why_not(*place)
        if (
            place is not None
            and reason is not None
            and reason.kind in ("mixed", "statistic")
            and reason.text != OF_WEIGHT
            and True in self.units.modes
        ):
            reason = self._evaluated.why_not(*place)
        return None if reason is None else str(reason)

    @functools.cached_property
    def _evaluated(self) -> Units:
        """The units of the model traced in evaluation mode alone."""
        with inputs.quiet(self.traced, self._inputs):
            return trace_units(self.traced, self._inputs, training=(False,))

    def _side(self, module: nn.Module, attribute: str, dim: int) -> bool | None:
        """Return which side of ``module`` dimension ``dim`` of its parameter ``attribute`` is.

        Returns: True for what the layer writes, False for what it reads, None if another parameter decides.

        Raises: CannotCutError for a layer that cannot be cut.
        """
        self._check_weights(module)
        kind, called = kind_of(module), f"{type(module).__name__} {self._names[module]!r}"
        if module in self._cores:
            raise CannotCutError(f"{called} shares its width, and cannot be cut yet")
        try:
            writes = kind.side(module, attribute, dim)
        except CannotCutError as error:
            raise CannotCutError(str(error).format(layer=called)) from None
        if self._calls(module) != 1 and not kind.passes:
            raise CannotCutError(f"{called} is called {self._calls(module)} times")
        return writes

    def _check_weights(self, module: nn.Module) -> None:
        """Raise CannotCutError if a weight of ``module`` is computed from other tensors, because a cut would not
        last.
        """
        if (weight := computed(module)) is not None:
            raise CannotCutError(
                f"the {weight} of {type(module).__name__} {self._names[module]!r} is computed from other tensors"
            )

    def removable(self, layer: nn.Module, writes: bool, closed: Closed) -> set[int]:
        """Return the classes of the channels of a side that can go: all layers that write them have closed them, or all
        that read them.

        Args:
            layer, writes: the side.
            closed: the closed channels of every side.

        Raises: CannotCutError if the width cannot be cut at all.
        """
        # (class, whether it is written) of closed channels, and of open ones
        shut, used = set[tuple[int, bool]](), set[tuple[int, bool]]()
        for m in self.members(layer, writes):
            closed_channels = closed.get(m.side, set())
            for channel, class_id in zip(m.channels, m.classes, strict=True) if not m.passes else ():
                (shut if channel in closed_channels else used).add((class_id, m.writes))
        gone = {class_id for class_id, _ in shut - used}
        return gone.intersection(self.classes(layer, writes))

    def last(self, sides: Iterable[Side], gone: set[int]) -> set[int]:
        """Return the classes that stay so that each of ``sides`` keeps a channel.

        For each side whose classes are all in ``gone``, the classes that are to go, this is its lowest class.
        """
        classes_of_sides = (set(self.classes(*side)) for side in sides)
        return {min(classes) for classes in classes_of_sides if classes and classes <= gone}
