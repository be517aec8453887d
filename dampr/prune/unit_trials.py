"""Try a cut on copies of a model: one copy is masked, another one has lost the units, and their outputs must agree.

A class is an integer that stands for units which can be cut only together (:mod:`.units`). In the masked copy the
weights that read some classes have zeros there; in the small copy these classes are deleted. ``sizes`` are attributes
of modules, such as ``num_heads``, which follow the width of a parameter. :class:`Subject` is the model with all that
its trials share, :class:`Shapes` only asks whether a small copy runs, and :class:`Trial` compares values.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from . import inputs
from .meta import OnMeta
from .open_norms import OpenNorm, close
from .units import Units
from .units.numbers import set_number
from .units.proof import cut, substitute
from .units.sizes import Size, follow
from .values import with_tensors

_SCALES = (10.0, 100.0)  # masked and cut models are compared on example inputs times these too


@dataclass
class Subject:
    """A plain model with what is needed to try cuts on it.

    Attributes:
        model: the model; not changed.
        units: its partition into classes.
        example_inputs: the inputs.
        norms: name -> a norm that has to count only open units.
    """

    model: nn.Module
    units: Units
    example_inputs: Any
    norms: Mapping[str, OpenNorm]
    _asked: dict[tuple[str, str], bool] = field(default_factory=dict)  # whether a forward asks for a module's attribute

    @functools.cached_property
    def shapes(self) -> Shapes | None:
        """Runs cut copies without arithmetic; None if the model does not run on meta tensors."""
        try:
            return None if is_meta(self.model) else Shapes(self.model, self.example_inputs)
        except Exception:  # the model asks for values, which meta tensors do not have
            return None

    @functools.cached_property
    def twins(self) -> inputs.Twins:
        """Makes copies of the model that share its parameters."""
        return inputs.Twins(self.model)

    def used(self, sizes: Iterable[Size]) -> list[Size]:
        """Return the attributes in ``sizes`` that a forward reads; all of them if shapes cannot show that."""
        if self.shapes is None:
            return list(sizes)
        sizes = list(sizes)
        new = [size for size in sizes if (size.module, size.attribute) not in self._asked]
        for attribute in {size.attribute for size in new}:
            alike = [size for size in new if size.attribute == attribute]
            self._asked |= dict.fromkeys([(size.module, attribute) for size in alike], self.shapes.asks_for(alike))
        return [size for size in sizes if self._asked[size.module, size.attribute]]

    def doubt_shapes(self) -> None:
        """Stop using shapes, because a model that runs on shapes was found not to run on values; later trials compare
        values.
        """
        self.__dict__["shapes"] = None


class Shapes:
    """Runs copies of a model on the meta device, where operators compute shapes and no values.

    Args:
        model: the whole model; not changed.
        example_inputs: the inputs; they need not be on the meta device.

    Raises: what the model raises there.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._twins = inputs.Twins(model, meta=True)
        self._inputs = OnMeta.of(example_inputs)
        self._expected = self._run(self._twins.make())

    def without(self, units: Units, classes: list[int]) -> inputs.Twins:
        """Return a source of copies on the meta device that have lost ``classes``, of the partition ``units``."""
        return inputs.Twins(cut(self._twins.make(), units, classes), meta=True)

    def asks_for(self, sizes: list[Size]) -> bool:
        """Return whether a forward uses one of these attributes. They are set to an object that refuses all use, and
        the copy is run.
        """
        model = self._twins.make()
        try:
            for size in sizes:
                set_number(model.get_submodule(size.module), size.attribute, _Unreadable())
        except Exception:  # the module examines its inputs
            return True
        return not self.fits(model)

    def fits(self, small: nn.Module) -> bool:
        """Return whether a copy, for example a smaller one, runs and has outputs of the expected shapes."""
        try:
            return self._run(small) == self._expected
        except Exception:
            return False

    def _run(self, model: nn.Module) -> list[torch.Size]:
        """Return the shapes of the outputs of a copy."""
        with OnMeta(), inputs.unfused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [t.shape for t in inputs.evaluate(model, self._inputs)]


class _Unreadable:
    """A value that raises TypeError wherever code compares it, converts it or computes with it."""

    def _refuse(self, *_: Any) -> NoReturn:
        """Raise TypeError."""
        raise TypeError("a number that nothing was expected to ask for")

    __eq__ = __ne__ = __bool__ = __str__ = __format__ = __hash__ = _refuse  # type: ignore[assignment]


class Trial:
    """A comparison between a model in which nothing reads some classes and copies that have lost these classes.

    Args:
        subject: the model and its inputs.
        classes: the classes.
        quick: True: compare on the example inputs alone. False: also on inputs ten and a hundred times as large, with
            noise.
    """

    def __init__(self, subject: Subject, classes: list[int], quick: bool = False) -> None:
        self._subject, self.model, self._units, self._classes = subject, subject.model, subject.units, classes
        self._samples = [subject.example_inputs]
        if not quick and any(t.is_floating_point() for t in inputs.tensors(subject.example_inputs)):
            to_scale = (inputs.perturbed(subject.example_inputs), subject.example_inputs)
            self._samples += [_scaled(sample, scale) for sample, scale in zip(to_scale, _SCALES, strict=True)]
        self._expected: dict[int, list[Tensor]] = {}
        self._small_shapes: inputs.Twins | None = None
        self._fits: dict[tuple[Size, ...], bool] = {}
        self._said: dict[tuple[Size, ...], tuple[int, str]] = {}  # sizes -> (samples compared, what differs)

    @functools.cached_property
    def _masked(self) -> nn.Module:
        """A copy with zeros where weights read the classes, and with norms that do not count them."""
        masked = self._subject.twins.make()
        mask_columns(masked, self._units, self._classes)
        close(masked, self._subject.norms, self._classes)
        return masked

    @functools.cached_property
    def _small(self) -> inputs.Twins:
        """The source of copies of the model without the classes."""
        return inputs.Twins(cut(self._subject.twins.make(), self._units, self._classes))

    def _outputs(self, number: int) -> list[Tensor]:
        """Return the outputs of the masked model on sample ``number``, computed once. Raises what the model raises."""
        if number not in self._expected:
            self._expected[number] = inputs.evaluate(self._masked, self._samples[number])
        return self._expected[number]

    def fits(self, sizes: list[Size]) -> bool:
        """Return whether a copy without the classes runs after the attributes in ``sizes`` have followed; True if
        shapes cannot tell.
        """
        shapes = self._subject.shapes
        if shapes is None:
            return True
        if self._small_shapes is None:
            self._small_shapes = shapes.without(self._units, self._classes)
        key = tuple(sizes)
        if key not in self._fits:
            self._fits[key] = shapes.fits(self._followed(self._small_shapes.make(), sizes))
        return self._fits[key]

    def _followed(self, small: nn.Module, sizes: list[Size]) -> nn.Module:
        """Change the attributes in ``sizes`` of the copy ``small``, which has lost the classes; returns ``small``."""
        follow(small, sizes, self._units.indices(self._classes))
        return small

    def pieces(self) -> set[tuple[str, str]]:
        """(module, attribute) of the numbers by which code takes parts of a width."""
        return self._units.piece_numbers

    def same(self, sizes: list[Size], first: bool = False) -> bool:
        """Return whether a copy without the classes, with the attributes in ``sizes`` changed, computes what the masked
        copy does.

        ``first``: compare on the example inputs alone.
        """
        return self.fits(sizes) and not self.differs(sizes, first)

    def differs(self, sizes: list[Size], first: bool = False) -> str:
        """Return how the outputs of a copy without the classes, with the attributes in ``sizes`` changed, differ from
        those of the masked copy.

        Earlier results for the same attributes are used again.

        Args:
            sizes: the attributes.
            first: compare on the example inputs alone.

        Returns: the difference in words; "" if the outputs agree, and for a model on the meta device.
        """
        if is_meta(self.model):
            return ""
        key, last = tuple(sizes), 1 if first else len(self._samples)
        done, difference = self._said.get(key, (0, ""))
        if not difference and done < last:
            self._said[key] = last, self._difference(sizes, range(done, last))
        return self._said[key][1]

    def _difference(self, sizes: list[Size], numbers: range) -> str:
        """Compare as :meth:`differs` does, on the samples with these ``numbers``, without use of earlier results.

        Returns: the difference in words; "" if the outputs agree.

        Raises: what the masked model raises on sample 0. Later samples on which it raises are left out.
        """
        small = self._followed(self._small.make(), sizes)
        with inputs.unfused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a norm without weight warns if its width is not that of its input
            for number in numbers:
                try:
                    expected = self._outputs(number)
                except Exception:
                    if number == 0:
                        raise
                    continue  # the model itself refuses inputs that large
                try:
                    outputs = inputs.evaluate(small, self._samples[number])
                except Exception as error:
                    return (
                        "without half of its channels the model does not run, so something beside its layers has "
                        f"that width ({error})"
                    )
                tolerance = 30 * inputs.TOLERANCE[_precision(expected)]
                if inputs.differ(expected, outputs, tolerance, tolerance * inputs.size(expected)):
                    return (
                        "without half of its channels the model computes something else, so these are mixed or "
                        "rearranged on the way"
                    )
        return ""


def is_meta(model: nn.Module) -> bool:
    """Return whether a model has parameters on the meta device, which have no values."""
    return any(p.is_meta for p in model.parameters())


def _precision(outputs: list[Tensor]) -> torch.dtype:
    """Return the lowest precision among output tensors; float32 if none of them is floating-point."""
    return max(
        (t.dtype for t in outputs if t.dtype in inputs.TOLERANCE),
        key=lambda kind: inputs.TOLERANCE[kind],
        default=torch.float32,
    )


def _scaled(example_inputs: Any, scale: float) -> Any:
    """Return the example inputs with every floating-point tensor multiplied by ``scale``."""

    def grow(leaf: Tensor) -> Tensor:
        """Return a tensor of the inputs, multiplied if it is floating-point."""
        return leaf * scale if leaf.is_floating_point() else leaf

    return with_tensors(grow, example_inputs)


def mask_columns(model: nn.Module, units: Units, classes: Iterable[int]) -> None:
    """Set the columns of weights that read ``classes`` to 0, in new parameters, so that those shared with other models
    stay.

    Args:
        model: a copy of the model; changed in place.
        units: the partition of the model.
        classes: the classes that nothing is to read.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    closed: dict[str, list[tuple[int, Any]]] = {}
    for name, dims in units.indices(classes).items():
        for dim, indices in dims.items() if name in parameters else ():
            cut_indices = np.array(indices)
            column_indices = cut_indices[units.columns[units.first_unit(name, dim) + cut_indices]]
            if len(column_indices):
                closed.setdefault(name, []).append((dim, column_indices))
    new: dict[int, Tensor] = {}
    for name, places in closed.items():
        values = parameters[name].detach().clone()
        for dim, column_indices in places:
            values.index_fill_(dim, torch.from_numpy(column_indices).to(values.device), 0.0)
        new[id(parameters[name])] = nn.Parameter(values, requires_grad=parameters[name].requires_grad)
    substitute(model, new)
