"""The model as torch-pruning's tracer has to see it: what its layers are, which count as one node, and how odd ones are sliced."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from dampr.nn import Gate, PrunedMultiheadAttention, Scale, StackedRNN

from . import inputs

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GEMMS = (nn.Linear, *CONVOLUTIONS)
ATTENTION = (nn.MultiheadAttention, PrunedMultiheadAttention)


def channel_count(layer: nn.Module, writes: bool) -> int:
    """Channels that a linear, convolution, recurrent or embedding layer or attention writes, or reads, or a norm or activation has."""
    if isinstance(layer, StackedRNN):
        return sum(layer.widths[-len(layer.layers[0]) :]) if writes else layer.input_size
    if isinstance(layer, nn.RNNBase):
        return (1 + layer.bidirectional) * (layer.proj_size or layer.hidden_size) if writes else layer.input_size
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim if writes else layer.num_embeddings
    if isinstance(layer, (nn.modules.batchnorm._NormBase, Scale, Gate)):
        return layer.num_features
    if isinstance(layer, (nn.LayerNorm, *ATTENTION)):
        return layer.normalized_shape[-1] if isinstance(layer, nn.LayerNorm) else layer.embed_dim
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0 if writes else 1])


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel is made of the input channel of the same number alone."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether a convolution reads zeros beyond the border of its input."""
    return isinstance(layer, CONVOLUTIONS) and layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one layer: it has no others in it, or is attention, whose last projection is never called."""
    return isinstance(module, ATTENTION) or not list(module.children())


@contextlib.contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Tracing follows autograd, so frozen parameters have to take part for its length."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextlib.contextmanager
def one_node(model: nn.Module, cores: set[nn.Module]) -> Iterator[None]:
    """Make each recurrent layer or cell, and attention, one node of autograd's graph, and not one for each product in each of its steps.

    ``cores``: the attention of other libraries.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.RNNBase, nn.RNNCellBase, *ATTENTION)) or module in cores]
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
        made = forward(*args, **kwargs)
    packed = made[0] if isinstance(made, tuple) and _is_packed(made[0]) else None
    results, structure = pytree.tree_flatten(made if packed is None else (packed.data, *made[1:]))
    computed = [t for t in results if isinstance(t, Tensor)]  # attention weights may be None
    before = [t.data if _is_packed(t) else t for t in read]
    nodes = iter(_OneNode.apply(len(computed), *computed, *before, *layer.parameters()))
    made = pytree.tree_unflatten([next(nodes) if isinstance(t, Tensor) else t for t in results], structure)
    return made if packed is None else (packed._replace(data=made[0]), *made[1:])


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


class _OneNode(torch.autograd.Function):
    """Its first tensors, as if computed from the others; only looked at, never differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])


def input_columns(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The weights whose columns are the input of a linear, convolution or recurrent layer: the modules that have them, and their names."""
    if isinstance(layer, StackedRNN):
        return [(part, "weight_ih_l0") for part in layer.layers[0]]
    if isinstance(layer, nn.RNNBase):
        return [(layer, name) for name in ["weight_ih_l0", *["weight_ih_l0_reverse"] * layer.bidirectional]]
    return [(layer, "weight")]


def recurrent_pruner() -> Any:
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
            for _, name in input_columns(layer):
                weight = getattr(layer, name)
                setattr(layer, name, nn.Parameter(weight.detach()[:, left], requires_grad=weight.requires_grad))
            layer.input_size = len(left)
            return layer

    return Recurrent()


def attention_pruner() -> Any:
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


def scale_pruner(channelwise: set[nn.Module]) -> Any:
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


def norm_pruner() -> Any:
    """Batch norms without a bias, torch 2.13's, which torch-pruning would slice."""
    import torch_pruning

    class Norm(torch_pruning.pruner.function.BatchnormPruner):  # type: ignore[misc]
        def prune_out_channels(self, layer: Any, idxs: Any) -> nn.Module:
            if layer.bias is not None or not layer.affine:
                return super().prune_out_channels(layer, idxs)  # type: ignore[no-any-return]
            left = sorted(set(range(layer.num_features)) - set(idxs))
            layer.affine = False  # the statistics alone
            super().prune_out_channels(layer, idxs)
            layer.affine, layer.weight = True, self._prune_parameter_and_grad(layer.weight, left, 0)
            return layer  # type: ignore[no-any-return]

        prune_in_channels = prune_out_channels

    return Norm()


def channelwise_factors(model: nn.Module, example_inputs: Any) -> set[nn.Module]:
    """The :class:`Scale` modules whose dimension is that of channels: 1 where convolutions read or write, else the last."""
    dims: dict[nn.Module, int] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: dims.update({m: args[0].dim()})) for m in model.modules() if isinstance(m, Scale)]
    if hooks:
        with inputs.removing(hooks):
            inputs.evaluate(model, example_inputs)
    spatial = {2 + len(m.kernel_size) for m in model.modules() if isinstance(m, CONVOLUTIONS)}
    return {m for m, dim in dims.items() if isinstance(m, Scale) and m.dim % dim == (1 if dim in spatial else dim - 1)}
