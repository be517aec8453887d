"""The graph of a model: which layers read which layers' outputs, through which operations. It is read off autograd's
graph of one run.

A "node" is one of this graph (:class:`Node`); a ``grad_node`` is one of autograd's, a ``grad_fn``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from . import hooks, inputs, tracing
from .layers.registry import kind_of
from .restore import as_it_was


@dataclass(eq=False)
class Node:
    """A node of the graph: a layer (with all its calls), a bare parameter, or one operation between layers.

    Attributes:
        module: the layer or parameter; None for an operation.
        operation: the type of autograd's node, such as "MulBackward0"; "" for a layer or parameter.
        inputs, outputs: the nodes that this one reads, and those that read it.
        returned: whether its result is one of the model's outputs.
    """

    module: nn.Module | nn.Parameter | None = None
    operation: str = ""
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    returned: bool = False


class Flow:
    """The graph of a model in evaluation mode. ``flow[layer]`` is the node of a layer, ``layer in flow`` whether it
    ran.

    Args:
        model: the model; afterwards as it was.
        example_inputs: the inputs of the run.
        whole: modules that count as one node although they have children. Attention and recurrent layers always do.

    Attributes:
        calls: layer -> the number of its calls, in the order of the first calls.

    Raises: what the model's forward raises.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, whole: set[nn.Module]) -> None:
        def run(running: nn.Module, sample: Any) -> list[Any]:
            """Run a copy of the model, and return autograd's nodes of its outputs."""
            self._start(inputs.counterparts(running, model))
            return self._run(running, sample, whole)

        self._walk(inputs.without_arithmetic(model, example_inputs, run))

    def _start(self, originals: dict[Any, Any]) -> None:
        """Forget an earlier run. ``originals``: module or parameter of the copy that will run -> that of the model."""
        self._original = originals
        self.calls: dict[nn.Module, int] = {}
        # autograd's node of a layer's output -> the layer, and autograd's nodes of its inputs
        self._made: dict[Any, tuple[nn.Module, list[Any]]] = {}
        self._given: dict[nn.Module, list[list[Any]]] = {}  # running layers -> autograd's nodes of their inputs
        self._nodes: dict[Any, Node] = {}

    def _run(self, model: nn.Module, example_inputs: Any, whole: set[nn.Module]) -> list[Any]:
        """Run a copy of the model, and return autograd's nodes of its outputs.

        Args:
            model: the copy.
            example_inputs: its inputs.
            whole: modules of the model that count as one node.
        """
        cores = {module for module in model.modules() if self._original.get(module, module) in whole}
        layers = [m for m in model.modules() if tracing.is_leaf(m) or m in cores]
        handles: list[RemovableHandle] = [m.register_forward_pre_hook(self._enter, with_kwargs=True) for m in layers]
        handles += [m.register_forward_hook(self._leave) for m in layers]
        with (
            hooks.removing(handles),
            as_it_was(model),
            inputs.evaluating(model),
            tracing.all_trainable(model),
            tracing.one_node(model, cores),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the model has already given its warnings in an earlier run
            return [t.grad_fn for t in inputs.tensors(inputs.call(model, example_inputs)) if t.grad_fn is not None]

    def __contains__(self, layer: Any) -> bool:
        return layer in self._nodes

    def __getitem__(self, layer: Any) -> Node:
        return self._nodes[layer]

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Count the call of a layer and note the autograd nodes of what it is given, as a forward pre-hook."""
        layer = self._original.get(layer, layer)
        self.calls[layer] = self.calls.get(layer, 0) + 1
        self._given.setdefault(layer, []).append(_graph_nodes((args, kwargs)))

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Note the autograd nodes that a layer made, unless they came in as inputs, as a forward hook."""
        layer = self._original.get(layer, layer)
        input_nodes = self._given[layer].pop()
        is_layer = kind_of(layer).normalises or next(layer.parameters(), next(layer.buffers(), None)) is not None
        for grad_node in _graph_nodes(output) if is_layer else []:
            if grad_node not in input_nodes:
                self._made[grad_node] = layer, input_nodes

    def _walk(self, results: list[Any]) -> None:
        """Build the graph by walking autograd's nodes backwards from ``results``, the nodes of the outputs."""
        todo: list[tuple[Any, Node | None]] = [(grad_node, None) for grad_node in results]
        seen: set[Any] = set()
        while todo:
            grad_node, reader = todo.pop()
            node = self._node(grad_node)
            if reader is None:
                node.returned = True
            elif not any(reader is other for other in node.outputs):
                node.outputs.append(reader)
                reader.inputs.append(node)
            if grad_node not in seen:
                seen.add(grad_node)
                before = (
                    self._made[grad_node][1]
                    if grad_node in self._made
                    else [f for f, _ in grad_node.next_functions if f is not None]
                )
                todo += [(previous, node) for previous in before]
        for node in self._nodes.values():
            node.inputs.reverse()  # a stack gives the last first
            node.outputs.reverse()

    def _node(self, grad_node: Any) -> Node:
        """Return the node of what autograd's node ``grad_node`` belongs to: a layer, a parameter, or the operation
        itself.
        """
        variable = getattr(grad_node, "variable", grad_node)
        key = self._made[grad_node][0] if grad_node in self._made else self._original.get(variable, variable)
        if key not in self._nodes:
            known = isinstance(key, (nn.Module, Tensor))
            self._nodes[key] = Node(key, "") if known else Node(None, type(grad_node).__name__)
        return self._nodes[key]

    def neighbours(self, layer: Any, after: Callable[[Node], list[Node]]) -> list[Node]:
        """Return the first layers and bare parameters on each way from ``layer``.

        Args:
            layer: a layer or bare parameter of the graph.
            after: a function from a node to the next nodes on the way, such as those that read it.
        """
        reached: dict[Node, None] = {}
        todo, seen = list(after(self[layer])), set()
        while todo:
            node = todo.pop()
            if node.module is not None:
                reached[node] = None
            elif node not in seen:
                seen.add(node)
                todo.extend(after(node))
        return list(reached)


def _graph_nodes(values: Any) -> list[Any]:
    """Return autograd's nodes of the tensors in any containers, packed sequences included."""
    leaves = pytree.tree_leaves(values, is_leaf=tracing.is_packed)
    return [
        t.grad_fn
        for t in (v.data if tracing.is_packed(v) else v for v in leaves)
        if isinstance(t, Tensor) and t.grad_fn is not None
    ]
