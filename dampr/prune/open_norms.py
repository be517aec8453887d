"""Finds the norms of a model that can be made to count only open units, whatever their types.

A norm over channels divides by the number of all channels. If units are closed, a smaller model divides by fewer, so
the masked model must count only open units too (:class:`dampr.nn.OpenStatistics`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dampr.gates import Fixed, Gate
from dampr.nn.open_statistics import OpenStatistics, put_on

from . import hooks, inputs
from .units import Units


@dataclass(frozen=True)
class OpenNorm:
    """A module that computes statistics over units along one dimension of its input.

    Attributes:
        classes: the class of each element of that dimension.
        dim: the dimension.
        centred, whole: as in :class:`dampr.nn.OpenStatistics`.
    """

    classes: tuple[int, ...]
    dim: int
    centred: bool
    whole: bool

    def statistics(self, gate: Gate, index: Tensor) -> OpenStatistics:
        """The statistics over open units for a module of this kind; ``index`` is the gate of each element, as in
        ``gate``.
        """
        return OpenStatistics(gate, index, self.dim, centred=self.centred, whole=self.whole)


def find(model: nn.Module, units: Units, example_inputs: Any) -> dict[str, OpenNorm]:
    """name -> norm, for the norms of a plain model.

    A norm is a module without children that has one input and one output of the same shape, and whose statistics all
    run over the same units.
    """
    lines: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name, line in units.counted:
        lines[name].add(tuple(units.label[line].tolist()))
    modules = {name: model.get_submodule(name) for name, found in lines.items() if name and len(found) == 1}
    modules = {name: norm for name, norm in modules.items() if not norm._modules}
    calls: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def note(name: str) -> Any:
        """A forward hook that notes the arguments and the output of norm ``name``."""
        return lambda norm, args, kwargs, output: calls[name].append(((*args, *kwargs.values()), output))

    with (
        hooks.removing([norm.register_forward_hook(note(name), with_kwargs=True) for name, norm in modules.items()]),
        inputs.unfused(),  # fused encoder layers use nested tensors, which have no shape
    ):
        inputs.evaluate(model, example_inputs)
    found = {}
    for name, norm in modules.items():
        (classes,) = lines[name]
        dims = {_dim(*call, len(classes)) for call in calls[name]}
        if len(dims) == 1 and (dim := dims.pop()) is not None:
            found[name] = OpenNorm(classes, dim, *_statistics_of(norm, *calls[name][0], dim))
    return found


def _dim(args: Any, output: Any, size: int) -> int | None:
    """The dimension of ``size`` elements: the last one or dimension 1; None if the call is not that of a norm."""
    if (
        len(args) != 1
        or not isinstance(args[0], Tensor)
        or not isinstance(output, Tensor)
        or output.shape != args[0].shape
    ):
        return None
    shape = args[0].shape
    return next((dim for dim in (-1, 1) if len(shape) > 1 and shape[dim] == size), None)


@torch.no_grad()
def _statistics_of(norm: nn.Module, args: Any, output: Tensor, dim: int) -> tuple[bool, bool]:
    """(whether a norm subtracts a mean, whether it is the mean of a whole sample).

    Constants are added to its input: a norm that subtracts a mean over some dimensions ignores constants along these.
    """
    (x,) = args
    generator = torch.Generator().manual_seed(0)

    def ignores(dims: tuple[int, ...]) -> bool:
        """Whether the output stays the same if a random constant is added that does not change along ``dims``."""
        shape = [1 if d in dims else size for d, size in enumerate(x.shape)]
        constants = (1 + torch.rand(shape, generator=generator)).to(x.device, x.dtype) * x.abs().mean().clamp(min=1e-3)
        return not inputs.differ([output], [norm(x + constants)], 0.0, 0.02 * inputs.size([output]))

    of_place, of_sample = ignores((dim % x.dim(),)), ignores(tuple(range(1, x.dim())))
    return of_sample, of_sample and not of_place


def close(model: nn.Module, norms: Mapping[str, OpenNorm], classes: Collection[int]) -> None:
    """Make the norms of a copy leave these classes out of their statistics."""
    gone = set(classes)
    for name, norm in norms.items():
        if not gone.isdisjoint(norm.classes):
            module = model.get_submodule(name)
            device = next((t.device for t in (*module.parameters(), *model.parameters())), None)
            values = torch.tensor([float(one not in gone) for one in norm.classes], device=device)
            put_on(module, norm.statistics(Fixed(values), torch.arange(len(values), device=device)))


def in_one_vector(norms: Mapping[str, OpenNorm], vectors: Iterable[Iterable[int]]) -> dict[str, OpenNorm]:
    """The norms whose classes with gates all belong to one gate vector; ``vectors`` are the classes of each."""
    number = {one: at for at, vector in enumerate(vectors) for one in vector}
    return {
        name: norm for name, norm in norms.items() if len({number[one] for one in norm.classes if one in number}) == 1
    }
