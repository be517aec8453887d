"""Which widths of a network are tied together, from torch-pruning's dependency graph.

A *width* is one dimension that several layers share: the layers that write it (producers) and those that read it (consumers).
torch-pruning finds and slices widths; this module asks it, and says who produces, who consumes, and whether the width is also the model's
own input or output.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from . import inputs

_MIXES_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_ELEMENTWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
_READERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)


class Member(NamedTuple):
    """One layer of a width: ``channels[i]`` is the layer's channel that goes with the width's channel ``root[i]``."""

    module: nn.Module
    writes: bool
    channels: list[int]
    root: list[int]


def build(model: nn.Module, example_inputs: Any) -> Any:
    """torch-pruning's dependency graph of ``model``, traced in evaluation mode; the model is left as it was."""
    import torch_pruning

    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    with inputs.evaluating(model), _all_trainable(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(model, example_inputs, verbose=False)


def group(graph: Any, module: nn.Module, writes: bool, index: Iterable[int]) -> Any:
    """torch-pruning's group of everything that has to be sliced with these output (``writes``) or input channels of ``module``."""
    pruner = graph.get_pruner_of_module(module)
    return graph.get_pruning_group(module, pruner.prune_out_channels if writes else pruner.prune_in_channels, list(index))


def members(graph: Any, found: Any) -> tuple[list[Member], str]:
    """The producers and consumers of a group, and the reason why the width cannot be cut exactly, or an empty string."""
    result = []
    for item in found:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return [], "a bare nn.Parameter takes part in it"
        if isinstance(module, _MIXES_CHANNELS):
            return [], f"{type(module).__name__} computes statistics over its channels"
        if not isinstance(module, nn.Module) or not _has_channels(module):
            continue
        writes = graph.is_out_channel_pruning_fn(item.dep.handler)
        result.append(Member(module, writes, list(item.idxs), list(item.root_idxs)))
    if not any(m.writes for m in result):
        return result, "it is the model's own input"
    if any(reaches_output(graph, m.module) for m in result if m.writes):
        return result, "it is the model's own output"
    return result, ""


def reaches_output(graph: Any, module: nn.Module) -> bool:
    """Whether the outputs of ``module`` get to the model's output without being read by another layer on some path."""
    todo, seen = list(graph.module2node[module].outputs), set()
    if not todo:
        return True
    while todo:
        node = todo.pop()
        if id(node) in seen or isinstance(node.module, _READERS):
            continue
        seen.add(id(node))
        if not node.outputs:
            return True
        todo.extend(node.outputs)
    return False


def unconsumed_outputs(model: nn.Module, names: Iterable[str], example_inputs: Any) -> list[str]:
    """Of the layers ``names``, those whose outputs nothing but the model's own output receives."""
    graph = build(model, example_inputs)
    layers = {name: model.get_submodule(name) for name in names}
    return [name for name, layer in layers.items() if layer in graph.module2node and reaches_output(graph, layer)]


def _has_channels(module: nn.Module) -> bool:
    """Whether the module reads or writes channels of its own, rather than passing each one through."""
    return bool(list(module.parameters(recurse=False)) or isinstance(module, _READERS)) and not isinstance(module, _ELEMENTWISE)


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
