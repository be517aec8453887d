"""Counts parameters and multiply-accumulates (MACs) of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from . import inputs
from .modules import gates_of
from .restore import as_it_was


def _recurrent_flops(x: torch.Size, *weights: Any, **_: Any) -> int:
    """Two FLOPs for each element of a matrix in each step: recurrent kernels of vendors, which torch does not count."""
    matrices = weights[0] if isinstance(weights[0], list) else weights[:2]
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in matrices if shape is not None and len(shape) == 2)


def _grouped_flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """Two FLOPs for each multiply-accumulate of a product of groups of rows, each with a matrix of its own: groups
    share the rows (of ``a``), the columns (of ``b``) or what is summed over.
    """
    return 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == len(b) == 3 else 1)


_COUNTED = {
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
    torch.ops.aten._cudnn_rnn: _recurrent_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}
"""Operators that torch's counter leaves out."""


def count_params(model: nn.Module) -> int:
    """The number of parameters without those of gates; a shared parameter counts once."""
    gates = {id(p) for module in gates_of(model) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """The multiply-accumulates of one evaluation pass over the example inputs, counted with
    ``torch.utils.flop_counter`` (two FLOPs each).

    A gated layer counts as its dense counterpart does. Attention is computed by its parts while it is counted, because
    the counter knows neither the fused kernels on a CPU nor that of a whole encoder layer. An einsum that sums over an
    axis of one element counts as a product, although torch computes it elementwise.
    """

    def count(model: nn.Module, example_inputs: Any) -> int:
        with as_it_was(model), inputs.evaluating(model), inputs.frozen(model), torch.no_grad():
            return count_call(inputs.call, model, example_inputs)

    return inputs.without_arithmetic(model, example_inputs, count)


def count_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of one call, counted like :func:`count_macs`."""
    counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with _Einsums(counter) as einsums:
        _count(counter, function, *args, **kwargs)
    return counter.get_total_flops() // 2 + einsums.macs


class _NoModules:
    """Stands for the tracker of modules of torch's counter where only the total is asked for.

    Torch's own tracker puts hooks on gradients, and so stops models that compute gradients in their forward, as those
    of forces do.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _Einsums(TorchFunctionMode):
    """Counts the einsums of two operands that torch computes elementwise because the axis that they sum over has one
    element, so that the counter sees no product.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter, self.macs = counter, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        if func is torch.functional.einsum and self.counter.get_total_flops() == before and isinstance(args[0], str):
            self.macs += _einsum_macs(args[0], [list(t.shape) for t in pytree.tree_leaves(args[1:])])
        return result


def _einsum_macs(equation: str, shapes: list[list[int]]) -> int:
    """The MACs of an einsum of two operands that sums over a common letter: the product of the sizes of all letters. 0
    for other einsums and for equations with dots.
    """
    operands, arrow, result = equation.replace(" ", "").partition("->")
    letters = operands.split(",")
    if not arrow or "." in equation or len(letters) != 2 or not (set(letters[0]) & set(letters[1])) - set(result):
        return 0
    sizes: dict[str, int] = {}
    for own, shape in zip(letters, shapes, strict=True):
        for letter, size in zip(own, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())


def macs_beside_layers(model: nn.Module, example_inputs: Any, names: Iterable[str]) -> dict[str, int]:
    """For each module in ``names``, the MACs that it computes itself, without those of the layers inside of it. For an
    attention these are its scores and the weighted sums of values.
    """
    with as_it_was(model), inputs.evaluating(model), inputs.frozen(model), torch.no_grad():
        counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)
        _count(counter, inputs.call, model, example_inputs)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    flops = {name: sum(by_operator.values()) for name, by_operator in counts.items()}
    found = {}
    for name in names:
        layers = [
            f"{root}.{name}.{inner}"
            for inner, m in model.get_submodule(name).named_modules()
            if inner and hasattr(m, "weight")
        ]
        found[name] = (flops.get(f"{root}.{name}", 0) - sum(flops.get(layer, 0) for layer in layers)) // 2
    return found


def _count(counter: FlopCounterMode, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call the function under the counter, with attention in its parts."""
    with inputs.unfused(), sdpa_kernel(SDPBackend.MATH), counter:
        function(*args, **kwargs)
