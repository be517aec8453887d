"""Finds the norms of a model that can be made to count only open units, whatever their types.

A norm over channels divides by the number of all channels. If units are closed, a smaller model divides by fewer, so
the masked model must count only open units too (:class:`dampr.nn.OpenStatistics`). The same holds for layers that
standardise their weights over what these read (:class:`dampr.nn.OpenWeight`).

A class is an integer that stands for units which can be cut only together (:mod:`.units`). A call, below, is
(arguments, output) of one call of a module.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dampr.gates import Fixed, Gate
from dampr.nn.open_statistics import OpenStatistics, OpenWeight, put_on

from . import hooks, inputs
from .layers.registry import kind_of
from .units import Units
from .units.ledger import Ints


@dataclass(frozen=True)
class OpenNorm:
    """A module that computes statistics over units along one dimension of its input, or of its weight.

    Attributes:
        classes: the class of each element of that dimension.
        dim: the dimension.
        centred, whole, correction, offset: as in :class:`dampr.nn.OpenStatistics`.
        weight: None for a norm; for a layer that standardises its weight the keyword arguments ``owned``, ``over`` and
            ``channels`` of :class:`dampr.nn.OpenWeight`.
    """

    classes: tuple[int, ...]
    dim: int
    centred: bool
    whole: bool = False
    correction: int | None = 0
    offset: str = "bias"
    weight: dict[str, Any] | None = None

    def statistics(self, gate: Gate, index: Tensor) -> OpenStatistics:
        """Make the statistics over open units for a module of this kind.

        Args:
            gate: the gate vector.
            index: int64, the number of the gate of each element, as in the gate vector; -1 for an element without a
                gate.
        """
        options: dict[str, Any] = {"centred": self.centred, "correction": self.correction, "offset": self.offset}
        if self.weight is not None:
            return OpenWeight(gate, index, self.dim, **options, **self.weight)
        return OpenStatistics(gate, index, self.dim, whole=self.whole, **options)

    def without(self, classes: Collection[int], device: Any) -> OpenStatistics:
        """Make the statistics without these classes, on ``device``: the gates of their elements are fixed at 0, all
        others at 1.
        """
        gone = set(classes)
        values = torch.tensor([float(class_id not in gone) for class_id in self.classes], device=device)
        return self.statistics(Fixed(values), torch.arange(len(values), device=device))


def find(model: nn.Module, units: Units, example_inputs: Any, *, streams: bool = True) -> dict[str, OpenNorm]:
    """Find the norms of a plain model.

    A norm is a module without children that has one input and one output of the same shape, and whose statistics all
    run over the same units. A layer that standardises its weight counts as a norm too.

    Args:
        model: the plain model; it is run in evaluation, at most once.
        units: its partition into classes.
        example_inputs: the inputs of this run.
        streams: True: also the norms of widths along which activations are added, as residual streams. False: only
            others, and all layers that standardise their weights.

    Returns: name -> norm.
    """
    added = set(units.label[units.added].tolist())
    # name -> what its statistics run over: columns of a weight, (parameter, dimension), or classes of an input
    columns_of: dict[str, set[tuple[str, int]]] = defaultdict(set)
    classes_of: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name, counted in units.counted:
        classes = set(units.label[counted].tolist())
        if not name or units.fixed.keys() >= classes or model.get_submodule(name)._modules:
            continue
        if (weight_columns := _columns(model, units, name, counted)) is not None:
            columns_of[name].add(weight_columns)
        elif streams or added.isdisjoint(classes):
            classes_of[name].add(tuple(units.label[counted].tolist()))
    names = [name for name in {**classes_of, **columns_of} if len([*classes_of[name], *columns_of[name]]) == 1]
    calls = _calls(model, names, example_inputs) if names else {}
    norms = {}
    for name in names:
        layer, norm = model.get_submodule(name), None
        if name in calls and classes_of[name]:
            (norm_classes,) = classes_of[name]
            dims = {_dim(*call, len(norm_classes)) for call in calls[name]}
            dim = dims.pop() if len(dims) == 1 else None
            norm = None if dim is None else _of_input(layer, norm_classes, dim, calls[name][0])
        elif name in calls:
            ((weight_name, dim),) = columns_of[name]
            owner, _, attribute = weight_name.rpartition(".")
            known = tuple(units.classes(weight_name, dim)), dim, calls[name][0]
            norm = _of_weight(layer, attribute, *known) if owner == name else _of_input(layer, *known)
        if norm is not None and _same_in_training(layer, calls[name][0][0][0]):
            norms[name] = _exact(layer, name, norm, units, calls[name][0][0][0])
    return norms


def _columns(model: nn.Module, units: Units, name: str, counted: Ints) -> tuple[str, int] | None:
    """Find the columns that a statistic counts: those of a parameter of the module that computes it, or of the one that
    this module parametrizes.

    Args:
        model: the plain model.
        units: its partition into classes.
        name: the name of the module.
        counted: int64 (n,), the units that the statistic runs over.

    Returns: (parameter, dimension); None if the statistic counts no columns.
    """
    owner = name.rpartition(".")[0] if ".parametrizations." in name else name
    for attribute, _ in model.get_submodule(owner).named_parameters(recurse=False):
        full_name = f"{owner}.{attribute}"
        for dim, first, size in units.origin[units.alias[full_name]] if full_name in units.alias else ():
            if units.is_column(full_name, dim) and ((counted >= first) & (counted < first + size)).any():
                return full_name, dim
    return None


def _calls(model: nn.Module, names: Iterable[str], example_inputs: Any) -> dict[str, list[tuple[Any, Any]]]:
    """Run the model in evaluation, and return name -> (arguments, output) of each call of the modules called
    ``names``.
    """
    calls: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def note(name: str) -> Any:
        """Make a forward hook that notes the arguments and the output of module ``name``."""
        return lambda norm, args, kwargs, output: calls[name].append(((*args, *kwargs.values()), output))

    with (
        hooks.removing(
            [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names]
        ),
        inputs.unfused(),  # fused encoder layers use nested tensors, which have no shape
    ):
        inputs.evaluate(model, example_inputs)
    return calls


def _of_input(norm: nn.Module, classes: tuple[int, ...], dim: int, call: tuple[Any, Any]) -> OpenNorm:
    """Find what is known about a norm of its input, from one call.

    Args:
        norm: the module.
        classes: the class of each element of dimension ``dim``.
        dim: the dimension that it normalises.
        call: (arguments, output) of the call.
    """
    (x,), _ = call
    # whether it subtracts a mean over ``dim`` at each place, or one over all that a sample has
    ignores_per_place, ignores_per_sample = (
        _ignores(x, [1 if d in over else n for d, n in enumerate(x.shape)], norm)
        for over in ((dim % x.dim(),), range(1, x.dim()))
    )
    return OpenNorm(classes, dim, ignores_per_sample, ignores_per_sample and not ignores_per_place)


def _dim(args: Any, output: Any, size: int) -> int | None:
    """Return the dimension of ``size`` elements of a norm's input: the last one (-1) or dimension 1.

    Args:
        args: the arguments of a call.
        output: what it returned.
        size: the number of elements that the norm counts.

    Returns: None if the call is not that of a norm, or no such dimension has this size.
    """
    if (
        len(args) != 1
        or not isinstance(args[0], Tensor)
        or not isinstance(output, Tensor)
        or output.shape != args[0].shape
    ):
        return None
    shape = args[0].shape
    return next((dim for dim in (-1, 1) if len(shape) > 1 and shape[dim] == size), None)


def _of_weight(
    layer: nn.Module, owned: str, classes: tuple[int, ...], dim: int, call: tuple[Any, Any]
) -> OpenNorm | None:
    """Find what is known about a layer that standardises its weight, from one call.

    Args:
        layer: the layer.
        owned: the name of the parameter in the layer.
        classes: the class of each of its columns.
        dim: the dimension of these columns.
        call: (arguments, output) of the call.

    Returns: None if the call is not that of a linear layer or a convolution.
    """
    weight, (args, output) = layer.get_parameter(owned), call
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor) or weight.dim() < 2:
        return None

    def run(value: Tensor) -> Tensor:
        """Return the output with another weight."""
        return cast(Tensor, torch.func.functional_call(layer, {owned: value}, args))

    every = range(weight.dim())
    choices = [(dim,), tuple(every[1:]), tuple(every)]
    shapes = [[1 if d in over else n for d, n in enumerate(weight.shape)] for over in choices]
    centred = [over for over, shape in zip(choices, shapes, strict=True) if _ignores(weight, shape, run)]
    options = {"owned": owned, "over": centred[0] if centred else choices[1], "channels": 1 if weight.dim() > 2 else -1}
    return OpenNorm(classes, dim, bool(centred), weight=options)


@torch.no_grad()
def _ignores(x: Tensor, shape: list[int], run: Callable[[Tensor], Any]) -> bool:
    """Return whether ``run(x)`` stays the same if random constants of this shape are added to x.

    A norm that subtracts a mean over some dimensions ignores constants that do not change along these.

    Args:
        x: a tensor, floating-point.
        shape: a shape that broadcasts to that of ``x``.
        run: a function of a tensor like ``x`` with a tensor as its result.
    """
    generator = torch.Generator().manual_seed(0)
    constants = (1 + torch.rand(shape, generator=generator)).to(x.device, x.dtype) * x.abs().mean().clamp(min=1e-3)
    output = [run(x)]
    return not inputs.differ(output, [run(x + constants)], 0.0, 0.02 * inputs.size(output))


@torch.no_grad()
def _same_in_training(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer computes the same in training as in evaluation.

    A layer that normalises in one mode alone must not leave anything out in the other one.
    """
    modes = (copy.deepcopy(inputs.as_trained(layer, None, sure=True)).train(training) for training in (False, True))
    try:
        a, b = (mode(x) for mode in modes)
    except Exception:
        return False
    return not inputs.differ([a], [b], 1e-4, 1e-4 * inputs.size([a]))


@torch.no_grad()
def _exact(layer: nn.Module, name: str, norm: OpenNorm, units: Units, x: Tensor) -> OpenNorm:
    """Find the ``correction`` and the ``offset`` with which a norm that counts open units alone computes the right
    result.

    Half of the units are closed in one copy of the layer and cut out of another one. The right result is what the cut
    copy computes; each correction is tried in the masked copy.

    Args:
        layer: the norm layer.
        name: its name in the model.
        norm: what is known of the norm.
        units: the partition of the model.
        x: an input of the layer.

    Returns: ``norm`` with both attributes set, the correction that comes closest; ``norm`` itself if the layer does not
    run alone.
    """
    gone = sorted(set(norm.classes).difference(units.fixed))[1::2]
    kept = torch.tensor([at for at, class_id in enumerate(norm.classes) if class_id not in gone]).to(x.device)
    reads = norm.dim if norm.weight is None else norm.weight["channels"]
    try:
        whole_layer, x = copy.deepcopy(inputs.as_trained(layer, None, sure=True)).double().eval(), x.double()
        norm = replace(norm, offset=_offset(whole_layer, x, reads))
        expected = _cut_alone(copy.deepcopy(whole_layer), name, units, gone)(x.index_select(reads, kept))
        gaps: dict[int | None, float] = {}
        for correction in (0, 1, None):
            masked = copy.deepcopy(whole_layer)
            put_on(masked, replace(norm, correction=correction).without(gone, x.device))
            outputs = masked(x)
            outputs = outputs.index_select(reads, kept) if norm.weight is None else outputs
            gaps[correction] = inputs.gap([expected], [outputs])
    except Exception:  # it keeps a number of its own, say; trials of the whole model decide
        return norm
    return replace(norm, correction=min(gaps, key=lambda correction: gaps[correction]))


def _offset(layer: nn.Module, x: Tensor, channels: int) -> str:
    """Return the name of the parameter that a layer adds at the end; "bias" if none is seen.

    Without it, the output for -x would be minus the output for x.

    Args:
        layer: the layer.
        x: an input.
        channels: the dimension of the channels in its output.
    """
    added = ((layer(x) + layer(-x)) / 2).movedim(channels, -1).flatten(0, -2)[0]
    names = (
        parameter for parameter, p in layer.named_parameters() if p.shape == added.shape and torch.allclose(p, added)
    )
    return next(names, "bias")


def _cut_alone(layer: nn.Module, name: str, units: Units, classes: Iterable[int]) -> nn.Module:
    """Delete the indices of ``classes`` from the parameters and buffers of one layer.

    Args:
        layer: a copy of the layer; changed in place.
        name: its name in the model.
        units: the partition of the model into classes.
        classes: the classes to delete.

    Returns: ``layer``.
    """
    gone = units.indices(classes)
    tables: tuple[dict[str, Any], ...] = layer._parameters, layer._buffers
    for tensors, attribute in (
        (table, attribute) for table in tables for attribute, t in table.items() if t is not None
    ):
        for dim, indices in gone.get(units.alias.get(f"{name}.{attribute}", ""), {}).items():
            kept = torch.tensor([at for at in range(tensors[attribute].shape[dim]) if at not in indices])
            values = tensors[attribute].index_select(dim, kept.to(tensors[attribute].device))
            tensors[attribute] = nn.Parameter(values) if isinstance(tensors[attribute], nn.Parameter) else values
    kind_of(layer).follow(layer)
    return layer


def close(model: nn.Module, norms: Mapping[str, OpenNorm], classes: Collection[int]) -> None:
    """Make the norms of a copy leave these classes out of their statistics.

    Args:
        model: the copy; changed in place.
        norms: name -> norm.
        classes: the classes. Norms that count none of them stay as they are.
    """
    for name, norm in norms.items():
        if not set(classes).isdisjoint(norm.classes):
            module = model.get_submodule(name)
            device = next((t.device for t in (*module.parameters(), *model.parameters())), None)
            put_on(module, norm.without(classes, device))


def in_one_vector(norms: Mapping[str, OpenNorm], vectors: Iterable[Iterable[int]]) -> dict[str, OpenNorm]:
    """Return the norms whose classes with gates all belong to one gate vector; ``vectors`` are the classes of each. A
    norm without any is left out.
    """
    number = {class_id: at for at, vector in enumerate(vectors) for class_id in vector}
    return {
        name: norm
        for name, norm in norms.items()
        if len({number[class_id] for class_id in norm.classes if class_id in number}) == 1
    }
