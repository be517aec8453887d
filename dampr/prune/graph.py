"""Which widths of a network are tied together, from torch-pruning's dependency graph.

A *width* is one dimension that several layers share: the layers that write it (producers) and those that read it (consumers). torch-pruning
finds and slices widths; this module asks it, channel by channel where it has to, and says which channels can go without changing a result.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from dampr.nn import Gate, PrunedMultiheadAttention, Scale

from . import heads, inputs

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GEMMS = (nn.Linear, *_CONVOLUTIONS)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
_PASSES_THROUGH = (Scale, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
_MIXES_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_ATTENTION = (nn.MultiheadAttention, PrunedMultiheadAttention)
_READERS = (nn.Linear, nn.modules.conv._ConvNd, *_ATTENTION, nn.RNNBase)

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


def channel_count(layer: nn.Module, writes: bool) -> int:
    """Channels that a linear, convolution, recurrent or embedding layer writes, or reads, or a norm or activation has."""
    if isinstance(layer, nn.RNNBase):
        return (1 + layer.bidirectional) * (layer.proj_size or layer.hidden_size) if writes else layer.input_size
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim if writes else layer.num_embeddings
    if isinstance(layer, (nn.modules.batchnorm._NormBase, Scale, Gate)):
        return layer.num_features
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0 if writes else 1])


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel is made of the input channel of the same number alone."""
    return isinstance(layer, _CONVOLUTIONS) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether a convolution reads zeros beyond the border of its input."""
    return isinstance(layer, _CONVOLUTIONS) and layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one layer: it has no others in it, or is attention, whose last projection is never called."""
    return isinstance(module, _ATTENTION) or not list(module.children())


class Widths:
    """The dependency graph of a model, traced in evaluation mode; the model is left as it was. Raises what the model's forward raises."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        import torch_pruning

        self._channelwise = _channelwise(model, example_inputs)
        self._cores = {attention.core for attention in heads.find(model)}
        self._calls: dict[nn.Module, int] = {}
        self._returned: set[Any] = set()
        self._names = {module: name for name, module in model.named_modules()}
        hooks = [module.register_forward_pre_hook(self._count) for module in model.modules() if _is_leaf(module)]
        packed = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
        try:
            with (
                inputs.evaluating(model),
                _all_trainable(model),
                _one_node(model, self._cores),
                torch.enable_grad(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                graph = torch_pruning.DependencyGraph()
                own = {**dict.fromkeys((nn.GRU, nn.RNN, nn.LSTM), _recurrent_pruner()), Scale: _scale_pruner(self._channelwise)}
                own |= dict.fromkeys((PrunedMultiheadAttention, *map(type, self._cores)), _attention_pruner())
                self._graph = graph.build_dependency(model, packed, forward_fn=self._forward, verbose=False, customized_pruners=own)
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, module: nn.Module, _: Any) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1

    def called(self) -> list[nn.Module]:
        """The modules without children, and attention, in the order in which they were first called."""
        return list(self._calls)

    def _forward(self, model: nn.Module, example_inputs: Any) -> list[Tensor]:
        found = [t for t in inputs.tensors(inputs.call(model, example_inputs)) if t.grad_fn is not None]
        self._returned = {t.grad_fn for t in found}
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
        group = self.group(layer, True, range(size))
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
        would cut that many; such a group is asked for again from the producer.
        """
        pruner = self._graph.get_pruner_of_module(layer)
        found = self._graph.get_pruning_group(layer, pruner.prune_out_channels if writes else pruner.prune_in_channels, sorted(channels))
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


@contextlib.contextmanager
def _one_node(model: nn.Module, cores: set[nn.Module]) -> Iterator[None]:
    """Make each recurrent layer, and attention, one node of autograd's graph, and not one for each product in each of its steps.

    ``cores``: the attention of other libraries.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.RNNBase, *_ATTENTION)) or module in cores]
    own = {layer: vars(layer)["forward"] for layer in layers if "forward" in vars(layer)}  # of libraries that wrap it
    for layer in layers:
        layer.forward = functools.partial(_call_as_one_node, layer, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        for layer, forward in own.items():
            layer.forward = forward  # type: ignore[method-assign]


def _call_as_one_node(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    read = [t for t in pytree.tree_leaves((args, kwargs), is_leaf=_is_packed) if isinstance(t, (Tensor, PackedSequence))]
    with torch.no_grad():
        output, state = forward(*args, **kwargs)
        results, structure = pytree.tree_flatten((output.data, state))
    computed = [t for t in results if isinstance(t, Tensor)]  # attention weights may be None
    before = [t.data if _is_packed(t) else t for t in read]
    nodes = iter(_OneNode.apply(len(computed), *computed, *before, *layer.parameters()))
    values, state = pytree.tree_unflatten([next(nodes) if isinstance(t, Tensor) else t for t in results], structure)
    return output._replace(data=values) if _is_packed(output) else values, state


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


class _OneNode(torch.autograd.Function):
    """Its first tensors, as if computed from the others; only looked at, never differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])


def input_columns(layer: nn.Module) -> list[str]:
    """The names of the weights whose columns are the input of a linear, convolution or recurrent layer."""
    if isinstance(layer, nn.RNNBase):
        return ["weight_ih_l0", "weight_ih_l0_reverse"] if layer.bidirectional else ["weight_ih_l0"]
    return ["weight"]


def _recurrent_pruner() -> Any:
    """A recurrent layer as one node of torch-pruning's graph, which has no such node for some, and for others one that slices wrongly."""
    import torch_pruning

    class Recurrent(torch_pruning.BasePruningFunc):  # type: ignore[misc]
        def get_out_channels(self, layer: nn.RNNBase) -> int:
            return channel_count(layer, True)

        def get_in_channels(self, layer: nn.RNNBase) -> int:
            return layer.input_size

        def prune_out_channels(self, layer: nn.RNNBase, idxs: Any) -> nn.Module:
            raise NotImplementedError  # Widths.members refuses it

        def prune_in_channels(self, layer: nn.RNNBase, idxs: Any) -> nn.Module:
            left = sorted(set(range(layer.input_size)) - set(idxs))
            for name in input_columns(layer):
                weight = getattr(layer, name)
                setattr(layer, name, nn.Parameter(weight.detach()[:, left], requires_grad=weight.requires_grad))
            layer.input_size = len(left)
            return layer

    return Recurrent()


def _attention_pruner() -> Any:
    """What is left of attention as one node of torch-pruning's graph, which knows only the whole of it."""
    import torch_pruning

    class Attention(torch_pruning.BasePruningFunc):  # type: ignore[misc]
        def get_out_channels(self, layer: Any) -> int | None:
            return getattr(layer, "embed_dim", None)

        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            raise NotImplementedError  # Widths.members refuses it

        get_in_channels = get_out_channels
        prune_in_channels = prune_out_channels

    return Attention()


def _scale_pruner(channelwise: set[nn.Module]) -> Any:
    """Factors of channels are sliced with the channels; those of another dimension stay."""
    import torch_pruning

    class Factors(torch_pruning.BasePruningFunc):  # type: ignore[misc]
        def get_out_channels(self, layer: Scale) -> int | None:
            return layer.num_features if layer in channelwise else None

        def prune_out_channels(self, layer: Scale, idxs: Any) -> nn.Module:
            if layer in channelwise:
                layer.scale = layer.scale[sorted(set(range(layer.num_features)) - set(idxs))]
            return layer

        get_in_channels = get_out_channels
        prune_in_channels = prune_out_channels

    return Factors()


def _channelwise(model: nn.Module, example_inputs: Any) -> set[nn.Module]:
    """The :class:`Scale` modules whose dimension is that of channels: 1 where convolutions read or write, else the last."""
    dims: dict[nn.Module, int] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: dims.update({m: args[0].dim()})) for m in model.modules() if isinstance(m, Scale)]
    if hooks:
        try:
            inputs.evaluate(model, example_inputs)
        finally:
            for hook in hooks:
                hook.remove()
    spatial = {2 + len(m.kernel_size) for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
    return {m for m, dim in dims.items() if isinstance(m, Scale) and m.dim % dim == (1 if dim in spatial else dim - 1)}


class CannotCutError(Exception):
    """Why closed channels stay; the message completes a note of the manifest."""


def unconsumed_outputs(model: nn.Module, names: Iterable[str], example_inputs: Any) -> list[str]:
    """Of the layers ``names``, those whose outputs reach the model's output unread."""
    widths = Widths(model, example_inputs)
    layers = {name: model.get_submodule(name) for name in names}
    return [name for name, layer in layers.items() if layer in widths and widths.reaches_output(layer)]


@contextlib.contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Tracing follows autograd, so frozen parameters have to take part for its length."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
