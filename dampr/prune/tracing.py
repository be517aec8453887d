"""Helpers for tracing with autograd: which modules count as one layer, and how a layer becomes one node of autograd's
graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from .layers.registry import kind_of


def is_leaf(module: nn.Module) -> bool:
    """Whether a module counts as one layer.

    It does if its only submodules compute its weights (``parametrizations``). Attention counts as one layer too,
    because torch uses the weight of its last projection without calling that projection.
    """
    return kind_of(module).attends or all(name == "parametrizations" for name, _ in module.named_children())


@contextlib.contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Let every floating-point parameter require a gradient inside the ``with`` block, because autograd's graph leaves
    frozen parameters out.
    """
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
    """Make each recurrent layer, recurrent cell and attention of ``model`` one node of autograd's graph inside the
    ``with`` block.

    Without this, each product in each time step would be a node of its own.

    ``cores``: the modules that compute attention in models of other libraries (:class:`.heads.Kind`, ``core``).
    """
    layers = [module for module in model.modules() if kind_of(module).one_node or module in cores]
    # Some libraries replace forward on the instance.
    own = {layer: vars(layer)["forward"] for layer in layers if "forward" in vars(layer)}
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
    """Call ``forward`` without a graph, and connect its output tensors to its input tensors and the parameters of
    ``layer`` by one node.
    """
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
    """An autograd function that returns copies of its first ``count`` tensors; in the graph they depend on all the
    tensors.

    It has no backward: the graph is only read.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])
