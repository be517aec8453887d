"""The cost of each layer, product and parameter of a model as terms; a term is a product of widths."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from . import hooks, inputs
from .cost_widths import Variables
from .layers.registry import counted_in, kind_of
from .measure import macs_beside_layers
from .modules import of_kind
from .structure import Factor, Structure
from .terms import Term, Width
from .unit_structure import Counts, UnitStructure


def unit_terms(structure: UnitStructure, counts: Counts, metric: str) -> Iterator[Term]:
    """The terms of a model with gates on parameters: one for each product ("macs") or each parameter.

    A term is proportional to what is left of each dimension.
    """
    if metric == "macs":
        products = [(p.module, p.macs, p.factors) for p in structure.units.products]
    else:
        own = dict(structure.plain.named_parameters())
        products = [
            (name, own[name].numel(), [np.arange(first, first + size) for _, first, size in dims])
            for name, dims in structure.units.origin.items()
            if name in own
        ]
    # The steps of a recurrent layer make the same products, so their costs are added up.
    alike: dict[Any, tuple[str, int, Any]] = {}
    for name, amount, factors in products:
        key = name, tuple(line.tobytes() for line in factors)
        alike[key] = name, amount + alike.get(key, ("", 0))[1], factors
    for name, amount, factors in alike.values():
        yield from _in_proportion(name, amount, [(counts.of(line), len(line)) for line in factors])


def _in_proportion(name: str, amount: int, widths: list[tuple[Width, int]]) -> Iterator[Term]:
    """A term that costs ``amount`` while all widths are full, and is proportional to what is left of each.

    ``widths``: (width, full size) pairs. There is no term if no width can change.
    """
    narrow = [(width, size) for width, size in widths if width.weights]
    scale = amount / math.prod(size for _, size in narrow)
    first, second, *more = [width for width, _ in narrow] + [Width(1)] * (2 - len(narrow))
    if narrow:
        yield Term(name, first, second, scale, 0.0, tuple(more))


def macs_terms(plain: nn.Module, variables: Variables, example_inputs: Any) -> Iterator[Term]:
    """The terms for multiply-accumulates.

    They are those of linear, convolution and recurrent layers and of attentions, and of products in code outside of
    layers. ``example_inputs`` say how often each layer is used.
    """
    uses, projections = _uses(plain, example_inputs)
    more = _products_apart(plain, variables)
    for product in more.values():
        for name, macs, factors in product:
            yield from _in_proportion(name, macs, variables.of_factors(factors))
    for name, layer, kind in counted_in(plain):
        times = 0 if name in more else uses.get(layer, 0)
        yield from kind.macs(name, layer, variables, times, projections.get(layer, 0))


def _products_apart(plain: nn.Module, variables: Variables) -> dict[str, list[tuple[str, int, list[Factor]]]]:
    """The products that need terms of their own: module -> its products.

    These are products in code outside of layers, and products of layers that depend on other channels than those that
    the layer reads and writes.
    """
    found: dict[str, list[tuple[str, int, list[Factor]]]] = defaultdict(list)
    for product in variables.products:
        found[product[0]].append(product)
    whole = [f"{name}." for name in variables.attentions]
    whole += [f"{name}." for name, layer in plain.named_modules() if kind_of(layer).gates_units]

    def apart(name: str, own: list[tuple[str, int, list[Factor]]]) -> bool:
        layer = plain.get_submodule(name)
        if kind_of(layer).gemm:
            return any(variables.has_more(layer, factors) for *_, factors in own)
        return not f"{name}.".startswith(tuple(whole))

    return {name: own for name, own in found.items() if apart(name, own)}


def params_terms(structure: Structure, variables: Variables) -> Iterator[Term]:
    """The terms for parameters.

    Those of a layer are proportional to its channels or heads, or constant; bare parameters have terms too.
    """
    plain = structure.plain
    inside = {layer.out_proj for layer in of_kind(plain, nn.MultiheadAttention)}
    bare = {plain.get_parameter(name): (name, stream) for stream, _ in structure.streams for name in stream.parameters}
    for p, (name, stream) in bare.items():
        yield Term(name, Width(1), variables.width(stream.norms[0], True), p.numel() / stream.width)
    counted: set[Any] = set()  # weights that have a term; an embedding may share its weight with the last layer
    for name, layer in plain.named_modules():
        if layer in inside:
            continue
        own = sum(p.numel() for p in layer.parameters(recurse=False) if p not in bare)
        yield from kind_of(layer).params(name, layer, variables, own, counted)
        if layer in variables.biases:
            yield Term(name, variables.biases[layer], variables.width(layer, True), 1)


def attention_terms(structure: Structure, variables: Variables, example_inputs: Any) -> Iterator[Term]:
    """The terms for the attention scores and the weighted sums, proportional to the heads that are left."""
    if structure.attentions:
        beside = macs_beside_layers(
            structure.plain, example_inputs, [attention.name for attention in structure.attentions]
        )
        for attention in structure.attentions:
            columns = variables.width(attention.written, False)
            yield Term(attention.name, Width(1), columns, beside[attention.name] / attention.written.in_features)


def _uses(plain: nn.Module, example_inputs: Any) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """How often the example inputs use each layer: (uses, projections), layer -> number, as
    :meth:`.layers.base.Counted.uses` defines them.
    """
    layers = dict(plain.named_modules())
    uses, projections = inputs.without_arithmetic(plain, example_inputs, _uses_by_name)
    return {layers[name]: n for name, n in uses.items()}, {layers[name]: n for name, n in projections.items()}


def _uses_by_name(plain: nn.Module, example_inputs: Any) -> tuple[dict[str, int], dict[str, int]]:
    """As :func:`_uses`, but by the names of layers: ``plain`` may be a copy."""
    found: dict[str, int] = defaultdict(int)
    projections: dict[str, int] = defaultdict(int)
    counted = {layer: (name, kind) for name, layer, kind in counted_in(plain)}

    def count(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        name, kind = counted[layer]
        uses, projected = kind.uses(layer, (args, kwargs), output)
        found[name] += uses
        projections[name] += projected

    handles = [layer.register_forward_hook(count, with_kwargs=True) for layer in counted]
    with hooks.removing(handles):
        inputs.evaluate(plain, example_inputs)
    return found, projections
