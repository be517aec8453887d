"""Example inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments; run and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def run(model: nn.Module, example_inputs: Any) -> Any:
    """``model`` on the example inputs, as it stands, without gradients."""
    with torch.no_grad():
        if isinstance(example_inputs, Mapping):
            return model(**example_inputs)
        if isinstance(example_inputs, (tuple, list)):
            return model(*example_inputs)
        return model(example_inputs)


def check(example_inputs: Any) -> None:
    """Raise TypeError unless there is at least one tensor in the example inputs."""
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example_inputs)):
        raise TypeError(
            f"example_inputs={example_inputs!r:.80}: expected a tensor, a tuple of positional or a dict of keyword arguments that holds one"
        )


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of a model's output, in order."""
    leaves = pytree.tree_leaves(output) if not hasattr(output, "to_tuple") else pytree.tree_leaves(output.to_tuple())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; each module gets back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
