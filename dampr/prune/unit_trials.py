"""Trials of a cut: a copy in which nothing reads some units beside one that has lost them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import inputs
from .meta import OnMeta
from .open_norms import OpenNorm, close
from .units import Units
from .units.proof import cut, substitute
from .units.sizes import Size, follow, set_number

_SCALES = (10.0, 100.0)  # of the example inputs on which masked and cut models are compared too


@dataclass
class Subject:
    """A plain model, its units, inputs to try it on, and the norms that are to count open units only."""

    model: nn.Module
    units: Units
    example_inputs: Any
    norms: Mapping[str, OpenNorm]
    _asked: dict[tuple[str, str], bool] = field(default_factory=dict)  # whether a forward asks for a module's attribute

    @functools.cached_property
    def shapes(self) -> Shapes | None:
        """Whether a cut copy runs, without arithmetic; None where that is not to be seen."""
        try:
            return None if is_meta(self.model) else Shapes(self.model, self.example_inputs)
        except Exception:  # of a model that asks for values
            return None

    @functools.cached_property
    def twins(self) -> inputs.Twins:
        """Copies to try things on."""
        return inputs.Twins(self.model)

    def used(self, sizes: Iterable[Size]) -> list[Size]:
        """These numbers without those that a forward does not ask for, wherever modules keep them, as far as shapes
        show.
        """
        if self.shapes is None:
            return list(sizes)
        sizes = list(sizes)
        new = [size for size in sizes if (size.module, size.attribute) not in self._asked]
        for attribute in {size.attribute for size in new}:
            own = [size for size in new if size.attribute == attribute]
            self._asked |= dict.fromkeys([(size.module, attribute) for size in own], self.shapes.asks_for(own))
        return [size for size in sizes if self._asked[size.module, size.attribute]]

    def doubt_shapes(self) -> None:
        """From now on nothing but values counts."""
        self.__dict__["shapes"] = None


class Shapes:
    """A copy of a model on the meta device, where operators compute nothing but shapes.

    Raises what the model raises there.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._twins = inputs.Twins(model, meta=True)
        self._inputs = OnMeta.of(example_inputs)
        self._expected = self._run(self._twins.make())

    def without(self, units: Units, classes: list[int]) -> inputs.Twins:
        """Makes copies without these classes."""
        return inputs.Twins(cut(self._twins.make(), units, classes), meta=True)

    def asks_for(self, sizes: list[Size]) -> bool:
        """Whether a forward asks for one of these numbers."""
        model = self._twins.make()
        try:
            for size in sizes:
                set_number(model.get_submodule(size.module), size.attribute, _Unreadable())
        except Exception:  # of a module that looks at what it is given
            return True
        return not self.fits(model)

    def fits(self, small: nn.Module) -> bool:
        """Whether a copy, a smaller one for example, runs and has outputs of the same shapes."""
        try:
            return self._run(small) == self._expected
        except Exception:
            return False

    def _run(self, model: nn.Module) -> list[torch.Size]:
        with OnMeta(), inputs.unfused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [t.shape for t in inputs.evaluate(model, self._inputs)]


class _Unreadable:
    """In the place of a number; TypeError where code does anything with it but pass it on."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("a number that nothing was expected to ask for")

    __eq__ = __ne__ = __bool__ = __str__ = __format__ = __hash__ = _refuse  # type: ignore[assignment]


class Trial:
    """A copy of a model in which nothing reads some classes, to be compared with copies that have lost them.

    ``quick``: on the example inputs alone, else on larger ones too.
    """

    def __init__(self, subject: Subject, classes: list[int], quick: bool = False) -> None:
        self._subject, self.model, self._units, self._classes = subject, subject.model, subject.units, classes
        self._samples = [subject.example_inputs]
        if not quick and any(t.is_floating_point() for t in inputs.tensors(subject.example_inputs)):
            given = (inputs.perturbed(subject.example_inputs), subject.example_inputs)
            self._samples += [_scaled(sample, scale) for sample, scale in zip(given, _SCALES, strict=True)]
        self._expected: list[list[Tensor]] = []
        self._small_shapes: inputs.Twins | None = None
        self._fits: dict[tuple[Size, ...], bool] = {}
        self._said: dict[tuple[Size, ...], tuple[int, str]] = {}  # samples compared, what differs

    @functools.cached_property
    def _masked(self) -> nn.Module:
        masked = self._subject.twins.make()
        mask_columns(masked, self._units, self._classes)
        close(masked, self._subject.norms, self._classes)
        return masked

    @functools.cached_property
    def _small(self) -> inputs.Twins:
        return inputs.Twins(cut(self._subject.twins.make(), self._units, self._classes))

    def _outputs(self, number: int) -> list[Tensor]:
        """The outputs of the masked model on sample ``number``, computed once."""
        while number >= len(self._expected):
            self._expected.append(inputs.evaluate(self._masked, self._samples[len(self._expected)]))
        return self._expected[number]

    def fits(self, sizes: list[Size]) -> bool:
        """Whether a copy without the classes runs, with these numbers following, as far as shapes alone show."""
        shapes = self._subject.shapes
        if shapes is None:
            return True
        if self._small_shapes is None:
            self._small_shapes = shapes.without(self._units, self._classes)
        key = tuple(sizes)
        if key not in self._fits:
            self._fits[key] = shapes.fits(_followed(self._small_shapes.make(), sizes))
        return self._fits[key]

    def same(self, sizes: list[Size], first: bool = False) -> bool:
        """Whether a copy without the classes computes what the masked one does, with these numbers following.

        ``first``: on the example inputs alone.
        """
        return self.fits(sizes) and not self.differs(sizes, first)

    def differs(self, sizes: list[Size], first: bool = False) -> str:
        """What a copy without the classes does that the masked one does not, with these numbers following;
        "" for nothing.
        """
        if is_meta(self.model):
            return ""
        key, last = tuple(sizes), 1 if first else len(self._samples)
        done, said = self._said.get(key, (0, ""))
        if not said and done < last:
            self._said[key] = last, self._difference(sizes, range(done, last))
        return self._said[key][1]

    def _difference(self, sizes: list[Size], numbers: range) -> str:
        small = _followed(self._small.make(), sizes)
        with inputs.unfused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a norm without gain whose width is not that of its input
            for number in numbers:
                try:
                    found = inputs.evaluate(small, self._samples[number])
                except Exception as error:
                    return (
                        "without half of its channels the model does not run, so something beside its layers has "
                        f"that width ({error})"
                    )
                expected = self._outputs(number)
                tolerance = 30 * inputs.TOLERANCE[_precision(expected)]
                if inputs.differ(expected, found, tolerance, tolerance * inputs.size(expected)):
                    return (
                        "without half of its channels the model computes something else, so these are mixed or "
                        "rearranged on the way"
                    )
        return ""


def _followed(model: nn.Module, sizes: list[Size]) -> nn.Module:
    follow(model, sizes)
    return model


def is_meta(model: nn.Module) -> bool:
    """Whether a model has no values."""
    return any(p.is_meta for p in model.parameters())


def _precision(outputs: list[Tensor]) -> torch.dtype:
    return max(
        (t.dtype for t in outputs if t.dtype in inputs.TOLERANCE),
        key=lambda kind: inputs.TOLERANCE[kind],
        default=torch.float32,
    )


def _scaled(example_inputs: Any, scale: float) -> Any:
    def grow(leaf: Any) -> Any:
        return leaf * scale if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(grow, example_inputs)


def mask_columns(model: nn.Module, units: Units, classes: Iterable[int]) -> None:
    """Set to 0 the columns of weights that read these classes; ``model`` gets parameters of its own there."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    closed: dict[str, list[tuple[int, Any]]] = {}
    for name, dims in units.indices(classes).items():
        for dim, indices in dims.items() if name in parameters else ():
            own = np.array(indices)
            here = own[units.columns[units.first_unit(name, dim) + own]]
            if len(here):
                closed.setdefault(name, []).append((dim, here))
    new: dict[int, Tensor] = {}
    for name, places in closed.items():
        values = parameters[name].detach().clone()
        for dim, here in places:
            values.index_fill_(dim, torch.from_numpy(here).to(values.device), 0.0)
        new[id(parameters[name])] = nn.Parameter(values, requires_grad=parameters[name].requires_grad)
    substitute(model, new)
