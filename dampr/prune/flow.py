"""Which layer's outputs get to which layers, and through what operations: read off autograd's graph of one run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from . import inputs, noise, tracing

# layers even where they have no parameters
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(eq=False)
class Node:
    """A layer, in all of its calls; a bare parameter; or one operation between layers.

    Attributes:
        module: the layer or parameter; None for an operation.
        operation: the type of autograd's node, such as "MulBackward0"; "" for a layer or parameter.
        returned: whether it makes one of the model's outputs.
    """

    module: nn.Module | nn.Parameter | None = None
    operation: str = ""
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    returned: bool = False


class Flow:
    """The graph of a model in evaluation mode; the model is left as it was.

    ``whole``: modules that are one node though they have others in them, beside attention and recurrent layers. What
    the model's forward raises is raised.

    Attributes:
        calls: the layers that ran, in the order of their first calls, and how often.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, whole: set[nn.Module]) -> None:
        def run(one: nn.Module, given: Any) -> list[Any]:
            self._start(inputs.counterparts(one, model))
            return self._run(one, given, whole)

        self._walk(inputs.without_arithmetic(model, example_inputs, run))

    def _start(self, own: dict[Any, Any]) -> None:
        """Nothing has run yet. ``own``: of modules and parameters of a copy that runs those of the model."""
        self._own = own
        self.calls: dict[nn.Module, int] = {}
        # by what a layer returned -> the layer, and what it was given
        self._made: dict[Any, tuple[nn.Module, list[Any]]] = {}
        self._given: dict[nn.Module, list[list[Any]]] = {}
        self._nodes: dict[Any, Node] = {}

    def _run(self, model: nn.Module, example_inputs: Any, whole: set[nn.Module]) -> list[Any]:
        """Autograd's nodes of what the model returns."""
        cores = {module for module in model.modules() if self._own.get(module, module) in whole}
        layers = [m for m in model.modules() if tracing.is_leaf(m) or m in cores]
        hooks: list[RemovableHandle] = [m.register_forward_pre_hook(self._enter, with_kwargs=True) for m in layers]
        hooks += [m.register_forward_hook(self._leave) for m in layers]
        with (
            inputs.removing(hooks),
            inputs.evaluating(model),
            tracing.all_trainable(model),
            tracing.one_node(model, cores),
            torch.enable_grad(),
            noise.same(model),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # what warns has warned before
            return [t.grad_fn for t in inputs.tensors(inputs.call(model, example_inputs)) if t.grad_fn is not None]

    def __contains__(self, layer: Any) -> bool:
        return layer in self._nodes

    def __getitem__(self, layer: Any) -> Node:
        return self._nodes[layer]

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any = None) -> None:
        layer = self._own.get(layer, layer)
        self.calls[layer] = self.calls.get(layer, 0) + 1
        self._given.setdefault(layer, []).append(_graph_nodes((args, kwargs)))

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        layer = self._own.get(layer, layer)
        given = self._given[layer].pop()
        is_layer = isinstance(layer, _NORMS) or next(layer.parameters(), next(layer.buffers(), None)) is not None
        for made in _graph_nodes(output) if is_layer else []:
            if made not in given:
                self._made[made] = layer, given

    def _walk(self, results: list[Any]) -> None:
        todo: list[tuple[Any, Node | None]] = [(made, None) for made in results]
        seen: set[Any] = set()
        while todo:
            made, reader = todo.pop()
            node = self._node(made)
            if reader is None:
                node.returned = True
            elif not any(reader is other for other in node.outputs):
                node.outputs.append(reader)
                reader.inputs.append(node)
            if made not in seen:
                seen.add(made)
                before = (
                    self._made[made][1] if made in self._made else [f for f, _ in made.next_functions if f is not None]
                )
                todo += [(one, node) for one in before]
        for node in self._nodes.values():
            node.inputs.reverse()  # a stack gives the last first
            node.outputs.reverse()

    def _node(self, made: Any) -> Node:
        variable = getattr(made, "variable", made)
        key = self._made[made][0] if made in self._made else self._own.get(variable, variable)
        if key not in self._nodes:
            known = isinstance(key, (nn.Module, Tensor))
            self._nodes[key] = Node(key, "") if known else Node(None, type(made).__name__)
        return self._nodes[key]

    def neighbours(self, layer: Any, after: Callable[[Node], list[Node]]) -> list[Node]:
        """The first layers and bare parameters on each way from ``layer``, where ``after`` gives the next nodes."""
        found: dict[Node, None] = {}
        todo, seen = list(after(self[layer])), set()
        while todo:
            node = todo.pop()
            if node.module is not None:
                found[node] = None
            elif node not in seen:
                seen.add(node)
                todo.extend(after(node))
        return list(found)


def _graph_nodes(values: Any) -> list[Any]:
    """Autograd's nodes of the tensors in any containers, packed sequences included."""
    leaves = pytree.tree_leaves(values, is_leaf=tracing.is_packed)
    return [
        t.grad_fn
        for t in (v.data if tracing.is_packed(v) else v for v in leaves)
        if isinstance(t, Tensor) and t.grad_fn is not None
    ]
