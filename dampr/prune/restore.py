"""Run a model without leaving a trace: attributes of its modules, buffers and random generators are afterwards as they
were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import noise


@contextmanager
def as_it_was(model: nn.Module, parameters: bool = False, swapped: bool = False) -> Iterator[None]:
    """After the block, restore the attributes of modules, the values of buffers, and the states of random generators.

    Random numbers that the model draws in the block are the same in every such block. A module that makes layers or
    parameters in its first call, once their sizes are known, keeps them.

    Args:
        model: the model.
        parameters: restore the values of parameters too, which needs a copy of them. A model may write into parameters
            in training, for example into those of a teacher that is a running average.
        swapped: whether the block puts other tensors in place of parameters and buffers. If not, layers of torch,
            whose forward sets no attribute, are passed over, which is faster.
    """
    own = [module for module in model.modules() if swapped or not type(module).__module__.startswith("torch.nn.")]
    attributes = [(module, dict(vars(module)), _containers(module)) for module in own]
    held = (*model.buffers(), *(model.parameters() if parameters else ()))
    values = [(t, t.detach().clone()) for t in held if t.layout == torch.strided and not t.is_quantized]
    try:
        with noise.same(model):
            yield
    finally:
        for module, had, containers in attributes:
            if not swapped and _has_grown(module, containers):
                continue
            vars(module).clear()
            vars(module).update(had)
            for container, content in containers:
                _refill(container, content)
        with torch.no_grad():
            for tensor, value in values:
                if tensor.shape != value.shape:
                    tensor.resize_(value.shape)
                # Batch norms write without a count of it, and writing counts against graphs that hold the tensor.
                if not tensor.is_meta and not torch.equal(tensor, value):
                    tensor.copy_(value)


def _has_grown(module: nn.Module, containers: list[tuple[Any, Any]]) -> bool:
    """Whether a module has got layers or parameters since its containers were copied."""
    before = {id(container): content or {} for container, content in containers}
    return any(held.keys() - before.get(id(held), held).keys() for held in (module._modules, module._parameters))


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """(container, copy of its content) for every dict, list and set among the attributes of a module; for empty ones,
    as most dicts of hooks are, the content is None.
    """
    return [
        (value, value.copy() if value else None)
        for value in vars(module).values()
        if isinstance(value, (dict, list, set))
    ]


def _refill(container: Any, content: Any) -> None:
    """Replace the content of a dict, list or set, in place."""
    if content is None and not container:
        return
    container.clear()
    if content is not None:
        container.extend(content) if isinstance(container, list) else container.update(content)
