"""Which widths of a network are tied together, from torch-pruning's dependency graph.

A *width* is one dimension that several layers share: the layers that write it (producers) and those that read it (consumers). torch-pruning
finds and slices widths; this module asks it, channel by channel where it has to, and says which channels can go without changing a result.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dampr.nn import PrunedMultiheadAttention, Scale
from dampr.nn.computed import computed

from . import heads, inputs, tracing, transposed
from .tracing import ATTENTION, GEMMS, channel_count, is_depthwise, pads_with_zeros

__all__ = ["GEMMS", "NORMS", "CannotCutError", "Closed", "Member", "Side", "Widths", "channel_count", "is_depthwise", "pads_with_zeros"]

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
_PASSES_THROUGH = (Scale, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
_MIXES_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_READERS = (nn.Linear, nn.modules.conv._ConvNd, *ATTENTION, nn.RNNBase)

_CIRCLES = 8  # times that a group may go through all dependencies of a model
_KEEPS_ZERO = ("SiluBackward0", "GeluBackward0", "ReluBackward0", "TanhBackward0")  # functions with f(0) = 0

Closed = dict[bool, dict[nn.Module, set[int]]]  # writes -> layer -> closed channels
Side = tuple[nn.Module, bool]  # a layer, and whether the channels that it writes are meant or those that it reads


@dataclass(frozen=True)
class Member:
    """One layer of a width and the channels of it, written or read, that go with the channels asked for."""

    module: nn.Module
    writes: bool
    channels: list[int]

    def size(self) -> int:
        """How many channels of this kind the layer has, from its weight of shape (written, read, ...)."""
        return channel_count(self.module, self.writes)


class TracingError(RuntimeError):
    """torch-pruning cannot follow a model, though it runs."""


class CannotCutError(Exception):
    """Why closed channels stay; the message completes a note of the manifest."""


class Widths:
    """The dependency graph of a model, traced in evaluation mode; the model is left as it was.

    Raises: TracingError; what the model's forward raises.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        import torch_pruning

        self._channelwise = tracing.channelwise_factors(model, example_inputs)
        self._cores = {attention.core for attention in heads.find(model)}
        self._calls: dict[nn.Module, int] = {}
        self._returned: set[Any] = set()
        self._ran = False
        self._names = {module: name for name, module in model.named_modules()}
        hooks = [module.register_forward_pre_hook(self._count) for module in model.modules() if tracing.is_leaf(module)]
        packed = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
        with (
            inputs.removing(hooks),
            inputs.evaluating(model),
            tracing.all_trainable(model),
            tracing.one_node(model, self._cores),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph()
            own = {
                **dict.fromkeys((nn.GRU, nn.RNN, nn.LSTM), tracing.recurrent_pruner()),
                Scale: tracing.scale_pruner(self._channelwise),
            }
            norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
            own |= dict.fromkeys({type(m) for m in norms if m.affine and m.bias is None}, tracing.norm_pruner())
            whole = PrunedMultiheadAttention, nn.LSTMCell, nn.GRUCell, nn.RNNCell, *map(type, self._cores)
            own |= dict.fromkeys(whole, tracing.attention_pruner())
            try:
                self._graph = graph.build_dependency(model, packed, forward_fn=self._forward, verbose=False, customized_pruners=own)
            except Exception as error:
                if not self._ran:
                    raise
                known = "; its Conv1D layers are known to dampr.integrations.huggingface" if transposed.find(model) else ""
                raise TracingError(
                    f"torch-pruning cannot follow {type(model).__name__} ({type(error).__name__}: {error}){known}"
                ) from error
        dependencies = [d for node in self._graph.module2node.values() for d in node.dependencies]
        self._steps, self._most_steps = 0, 1000 + _CIRCLES * len(dependencies)
        for dependency in dependencies:
            dependency.index_mapping.append(functools.partial(self._in_range, dependency))

    def _in_range(self, dependency: Any, indices: Any) -> Any:
        """The last step of a dependency's index mapping: the indices as they are, if what they are of has that many.

        Around a circle of views, as key heads that several query heads share make one, torch-pruning goes on for ever with ever larger
        indices. Raises CannotCutError.
        """
        self._steps += 1
        if self._steps > self._most_steps:
            raise CannotCutError("torch-pruning goes in circles around its width")
        module = dependency.target.module
        size = None
        if isinstance(module, nn.Parameter):
            size = module.numel()
        elif isinstance(module, (nn.Embedding, *GEMMS)) and getattr(module, "groups", 1) == 1:
            size = channel_count(module, self._graph.is_out_channel_pruning_fn(dependency.handler))
        if size is not None and indices and max(index.idx for index in indices) >= size:
            name = "a bare nn.Parameter" if isinstance(module, nn.Parameter) else repr(self._names.get(module))
            raise CannotCutError(f"its channels are rearranged on the way to {name}")
        return indices

    def _count(self, module: nn.Module, _: Any) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1

    def called(self) -> list[nn.Module]:
        """The modules without children, and attention, in the order in which they were first called."""
        return list(self._calls)

    def _forward(self, model: nn.Module, example_inputs: Any) -> list[Tensor]:
        found = [t for t in inputs.tensors(inputs.call(model, example_inputs)) if t.grad_fn is not None]
        self._returned, self._ran = {t.grad_fn for t in found}, True
        return found

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._graph.module2node

    def why_absent(self, layer: nn.Module) -> str:
        """Why a layer is not in the graph."""
        if any(layer in core.modules() for core in self._cores):
            return "it is inside of an attention, of which only whole heads are cut"
        return "example_inputs do not reach the layer"

    def reaches_output(self, module: nn.Module) -> bool:
        """Whether the outputs of ``module`` get to the model's output without being read by another layer on some path."""
        todo, seen = [self._graph.module2node[module]], set()
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if not node.outputs or node.grad_fn in self._returned:
                return True
            todo.extend(after for after in node.outputs if not isinstance(after.module, _READERS))
        return False

    def sources(self, layer: nn.Module) -> list[Any]:
        """The layers and bare parameters whose values get to ``layer`` through operations alone."""
        return self._neighbours(layer, lambda node: node.inputs)

    def targets(self, layer: Any) -> list[Any]:
        """The layers that the values of a layer, or of a bare parameter, get to through operations alone; None is the model's output."""
        return self._neighbours(layer, lambda node: [*node.outputs, *self._end(node)])

    def _end(self, node: Any) -> list[None]:
        return [None] if not node.outputs or node.grad_fn in self._returned else []

    def _neighbours(self, layer: Any, after: Callable[[Any], list[Any]]) -> list[Any]:
        found: dict[Any, None] = {}
        todo, seen = list(after(self._graph.module2node[layer])), set()
        while todo:
            node = todo.pop()
            if node is None or node.module in self._names or isinstance(node.module, nn.Parameter):
                found[None if node is None else node.module] = None
            elif id(node) not in seen:
                seen.add(id(node))
                todo.extend(after(node))
        return list(found)

    def norm_after(self, module: nn.Module) -> nn.Module | None:
        """The BatchNorm, or :class:`Scale`, that alone reads the outputs of ``module``, both called once; None without one."""
        after = self._graph.module2node[module].outputs
        norm = after[0].module if len(after) == 1 else None
        if not isinstance(norm, (nn.modules.batchnorm._BatchNorm, Scale)) or norm.num_features != channel_count(module, True):
            return None
        return norm if self._calls.get(module, 1) == self._calls.get(norm, 1) == 1 else None

    def norms_reading(self, layer: nn.Module) -> tuple[list[nn.Module], bool]:
        """The BatchNorms that read the outputs of ``layer``, also as part of a sum, and whether nothing else reads these."""
        norms: list[nn.Module] = []
        alone = True
        todo, seen = list(self._graph.module2node[layer].outputs), set()
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node.module, nn.modules.batchnorm._BatchNorm):
                norms.append(node.module)
                alone &= node.module.num_features == channel_count(layer, True) and self._calls.get(node.module) == 1
            elif isinstance(node.module, _READERS) or not node.outputs or node.grad_fn in self._returned:
                alone = False
            else:
                todo.extend(node.outputs)
        return [norm for norm in self._names if norm in norms], alone

    def layer_before(self, norm: nn.Module) -> nn.Module | None:
        """The linear or convolution layer whose outputs the BatchNorm ``norm`` alone reads; None without one."""
        before = self._graph.module2node[norm].inputs if norm in self else []
        layer = before[0].module if len(before) == 1 else None
        return layer if isinstance(layer, GEMMS) and self.norm_after(layer) is norm else None

    def readers_after(self, norm: nn.Module) -> list[nn.Module]:
        """The layers that read the outputs of ``norm`` channel by channel and nothing else; empty where something else does."""
        found: list[nn.Module] = []
        todo = list(self._graph.module2node[norm].outputs) if norm in self else []
        while todo:
            node = todo.pop()
            if isinstance(node.module, GEMMS):
                if getattr(node.module, "groups", 1) != 1 or channel_count(node.module, False) != norm.num_features:
                    return []
                found.append(node.module)
            elif len(node.inputs) != 1 or not node.outputs or node.grad_fn in self._returned:
                return []
            else:
                todo.extend(node.outputs)
        return found

    def around(self, norm: nn.Module) -> list[Side]:
        """The side of a layer where a channel that is 0 after ``norm`` is as good as not there: where it is written, or else read."""
        writer = self.layer_before(norm)
        return [(writer, True)] if writer is not None else [(reader, False) for reader in self.readers_after(norm)]

    def written_together(self, layer: nn.Module) -> list[nn.Module]:
        """The layers whose output channels are added to those of ``layer``, one to one, itself included, in the order of the model."""
        size = channel_count(layer, True)
        try:
            group = self.group(layer, True, range(size))
        except CannotCutError:
            return [layer]
        found = {
            item.dep.target.module
            for item in group
            if isinstance(item.dep.target.module, (nn.Embedding, *GEMMS))
            and self._graph.is_out_channel_pruning_fn(item.dep.handler)
            and list(item.idxs) == list(range(channel_count(item.dep.target.module, True)))
            and not is_depthwise(item.dep.target.module)
        }
        return [module for module in self._names if module in found and channel_count(module, True) == size]

    @functools.cached_property
    def multiplied(self) -> dict[nn.Module, nn.Module]:
        """Of a layer the one whose outputs do nothing but multiply its own, channel by channel, as in gated feed-forward layers.

        A channel that is 0 in the first is 0 in the product, so both may go. Layers that come to the product as they are come first.
        """
        layers = [module for module in self._names if isinstance(module, GEMMS) and module in self]
        ends = {layer: self._product_after(layer) for layer in layers}
        found: list[tuple[int, nn.Module, nn.Module]] = []
        for layer, (product, steps, keeps_zero) in ends.items():
            others = [other for other in layers if other is not layer and product is not None and ends[other][0] is product]
            if keeps_zero and len(others) == 1 and others[0] in self.written_together(layer):
                found.append((steps, layer, others[0]))
        return {layer: other for _, layer, other in sorted(found, key=lambda item: item[0])}

    def _product_after(self, layer: nn.Module) -> tuple[Any, int, bool]:
        """The product of two that alone reads the outputs of ``layer``, after how many steps, and whether 0 stays 0 on the way."""
        node, steps, keeps_zero = self._graph.module2node[layer], 0, True
        while len(node.outputs) == 1 and node.grad_fn not in self._returned and self._calls.get(layer) == 1:
            node, steps = node.outputs[0], steps + 1
            operation = type(node.grad_fn).__name__
            if operation == "MulBackward0" and len(node.inputs) == 2:
                return node, steps, keeps_zero
            if len(node.inputs) != 1 or node.module in self._names:
                break
            keeps_zero &= operation in _KEEPS_ZERO
        return None, steps, False

    def group(self, layer: nn.Module, writes: bool, channels: Iterable[int]) -> Any:
        """torch-pruning's group of everything that is sliced together with these channels of ``layer``.

        Asked from the reading side of a flattened convolution, torch-pruning names a channel of the producer once for each position, and
        would cut that many; such a group is asked for again from the producer. Raises CannotCutError where torch-pruning gets lost.
        """
        self._steps = 0
        pruner = self._graph.get_pruner_of_module(layer)
        side = pruner.prune_out_channels if writes else pruner.prune_in_channels
        try:
            found = self._graph.get_pruning_group(layer, side, sorted(channels))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise CannotCutError(f"torch-pruning cannot follow its width ({type(error).__name__}: {error})") from error
        if writes or all(len(set(item.idxs)) == len(item.idxs) for item in found):
            return found
        producers = [i for i in found if self._graph.is_out_channel_pruning_fn(i.dep.handler) and isinstance(i.dep.target.module, _READERS)]
        return self.group(producers[0].dep.target.module, True, set(producers[0].idxs)) if producers else found

    def whole_width(self, layer: nn.Module, writes: bool) -> list[Any]:
        """The groups of all channels of ``layer``, each asked from the side that writes it, where a channel is named once."""
        channels = range(channel_count(layer, writes))
        found = self.group(layer, writes, channels)
        if writes:
            return [found]
        groups: list[Any] = []
        asked: set[Side] = set()
        for (producer, written), _, indices, _ in self.sides(found):
            if written and isinstance(producer, (nn.Embedding, *GEMMS)) and not is_depthwise(producer) and (producer, True) not in asked:
                groups.append(self.group(producer, True, indices))
                asked |= {side for side, *_ in self.sides(groups[-1])}
        return groups or [found]

    def why_not(self, layer: nn.Module) -> str | None:
        """Why no channel that ``layer`` writes can be cut; None where they can."""
        try:
            self.members(self.group(layer, True, range(channel_count(layer, True))))
        except CannotCutError as error:
            return str(error)
        return None

    def members(self, group: Any) -> list[Member]:
        """The producers and consumers of a group. Raises CannotCutError where one of them is of a kind that cannot be cut exactly."""
        found = []
        for item in group:
            module = item.dep.target.module
            if isinstance(module, nn.Parameter):
                raise CannotCutError("a bare nn.Parameter takes part in its width")
            if isinstance(module, nn.Module) and (name := computed(module)) is not None:
                raise CannotCutError(f"the {name} of {type(module).__name__} {self._names.get(module)!r} is computed from other tensors")
            if not isinstance(module, nn.Module) or isinstance(module, _PASSES_THROUGH) or is_depthwise(module):
                continue
            if isinstance(module, _MIXES_CHANNELS):
                raise CannotCutError(f"{type(module).__name__} {self._names.get(module)!r} computes statistics over its channels")
            if not list(module.parameters(recurse=False)) and module not in self._cores:
                continue
            writes = self._graph.is_out_channel_pruning_fn(item.dep.handler)
            self._check_kind(module, writes)
            found.append(Member(module, writes, list(item.idxs)))
            if max(item.idxs) >= found[-1].size():
                raise CannotCutError(f"its channels are rearranged on the way to {self._names.get(module)!r}")
        if not any(m.writes for m in found):
            raise CannotCutError("its width is the model's own input")
        if any(m.writes and self.reaches_output(m.module) for m in found):
            raise CannotCutError("its width is the model's own output")
        return found

    def sides(self, group: Any) -> Iterator[tuple[Side, int, list[int], list[int]]]:
        """What is sliced in a group: a side, its size, which of its channels, and to which channel of the layer asked each belongs.

        Norms, depthwise convolutions and the like, whose channels are those of the layer before, count as written.
        """
        for item in group:
            layer = item.dep.target.module
            if (isinstance(layer, nn.PReLU) and layer.num_parameters == 1) or (isinstance(layer, Scale) and layer not in self._channelwise):
                continue
            if isinstance(layer, _PASSES_THROUGH) or is_depthwise(layer):
                yield (layer, True), channel_count(layer, True), list(item.idxs), list(item.root_idxs)
            elif isinstance(layer, (nn.Embedding, nn.RNNBase, *GEMMS)):
                writes = self._graph.is_out_channel_pruning_fn(item.dep.handler)
                yield (layer, writes), channel_count(layer, writes), list(item.idxs), list(item.root_idxs)

    def _check_kind(self, module: nn.Module, writes: bool) -> None:
        kind, name = type(module).__name__, self._names.get(module, "?")
        if isinstance(module, nn.RNNBase) and not writes:
            pass
        elif not isinstance(module, (nn.Embedding, *GEMMS)) or getattr(module, "groups", 1) != 1:
            raise CannotCutError(
                f"{kind} {name!r}{' with groups' if hasattr(module, 'groups') else ''} shares its width, and cannot be cut yet"
            )
        if self._calls.get(module, 1) != 1:
            raise CannotCutError(f"{kind} {name!r} is called {self._calls[module]} times")

    def removable(self, layer: nn.Module, writes: bool, closed: Closed) -> set[int]:
        """Of the closed channels of ``layer``, those whose whole group nobody writes (all producers closed) or nobody reads.

        At least one channel stays in every layer. Raises CannotCutError where the width cannot be cut at all.
        """
        wanted = closed[writes][layer]
        if not self._is_dead(self.members(self.group(layer, writes, wanted)), closed):
            wanted = {i for i in wanted if self._is_dead(self.members(self.group(layer, writes, [i])), closed)}
        while wanted:
            members = self.members(self.group(layer, writes, wanted))
            if not self._is_dead(members, closed):
                raise CannotCutError("its channels are tied to open ones in a way that cannot be told apart")
            if all(len(set(m.channels)) < m.size() for m in members):
                return wanted
            # Leave one channel, and with it those of the same layer that torch-pruning ties to it.
            tied = self.members(self.group(layer, writes, [min(wanted)]))
            wanted = wanted - {min(wanted)}.union(*(m.channels for m in tied if m.module is layer and m.writes == writes))
        return wanted

    @staticmethod
    def _is_dead(members: list[Member], closed: Closed) -> bool:
        def shut(writes: bool) -> bool:
            return all(set(m.channels) <= closed[writes].get(m.module, set()) for m in members if m.writes == writes)

        return shut(True) or (any(not m.writes for m in members) and shut(False))
