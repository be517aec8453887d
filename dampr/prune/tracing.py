"""What the layers of a model are, and which of them count as one node of autograd's graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from dampr.nn import GatedActivation, PrunedMultiheadAttention, Scale, StackedRNN

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GEMMS = (nn.Linear, *CONVOLUTIONS)
ATTENTION = (nn.MultiheadAttention, PrunedMultiheadAttention)


def channel_count(layer: nn.Module, writes: bool) -> int:
    """Channels that a linear, convolution, recurrent or embedding layer or attention writes, or reads,
    or a norm or activation has.
    """
    if isinstance(layer, StackedRNN):
        return sum(layer.widths[-len(layer.layers[0]) :]) if writes else layer.input_size
    if isinstance(layer, nn.RNNBase):
        return (1 + layer.bidirectional) * (layer.proj_size or layer.hidden_size) if writes else layer.input_size
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim if writes else layer.num_embeddings
    if isinstance(layer, (nn.modules.batchnorm._NormBase, Scale, GatedActivation)):
        return layer.num_features
    if isinstance(layer, (nn.LayerNorm, *ATTENTION)):
        return layer.normalized_shape[-1] if isinstance(layer, nn.LayerNorm) else layer.embed_dim
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[int(writes) if is_transposed(layer) else int(not writes)])


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight of a layer has what it reads first: (read, written, *kernel)."""
    return isinstance(layer, nn.modules.conv._ConvTransposeNd)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel is made of the input channel of the same number alone."""
    return (
        isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels
    )


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether a convolution reads zeros beyond the border of its input."""
    return (
        isinstance(layer, CONVOLUTIONS)
        and layer.padding_mode == "zeros"
        and any(layer._reversed_padding_repeated_twice)
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one layer: it has no others in it but what computes its weights, or is attention, whose last
    projection is never called.
    """
    return isinstance(module, ATTENTION) or all(name == "parametrizations" for name, _ in module.named_children())


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
    """Make each recurrent layer or cell, and attention, one node of autograd's graph, and not one for each product in
    each of its steps.

    ``cores``: the attention of other libraries.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase, *ATTENTION)) or module in cores
    ]
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
    read = [t for t in pytree.tree_leaves((args, kwargs), is_leaf=is_packed) if isinstance(t, (Tensor, PackedSequence))]
    with torch.no_grad():
        made = forward(*args, **kwargs)
    packed = made[0] if isinstance(made, tuple) and is_packed(made[0]) else None
    results, structure = pytree.tree_flatten(made if packed is None else (packed.data, *made[1:]))
    computed = [t for t in results if isinstance(t, Tensor)]  # attention weights may be None
    before = [t.data if is_packed(t) else t for t in read]
    nodes = iter(_OneNode.apply(len(computed), *computed, *before, *layer.parameters()))
    made = pytree.tree_unflatten([next(nodes) if isinstance(t, Tensor) else t for t in results], structure)
    return made if packed is None else (packed._replace(data=made[0]), *made[1:])


def is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


class _OneNode(torch.autograd.Function):
    """Its first tensors, as if computed from the others; only looked at, never differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])


def input_columns(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The weights whose columns are the input of a linear, convolution or recurrent layer: the modules that have them,
    and their names.
    """
    if isinstance(layer, StackedRNN):
        return [(part, "weight_ih_l0") for part in layer.layers[0]]
    if isinstance(layer, nn.RNNBase):
        return [(layer, name) for name in ["weight_ih_l0", *["weight_ih_l0_reverse"] * layer.bidirectional]]
    return [(layer, "weight")]
