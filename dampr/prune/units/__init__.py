"""Find which elements of which parameters have to be cut together, from the ATen operators that a model runs.

Every index of every dimension of every floating-point parameter and buffer is a *unit*. For ``Sequential(Linear(4, 8),
ReLU(), Linear(8, 2))``, row 3 of the first weight, entry 3 of its bias and column 3 of the second weight start as three
units. A trace finds that they are one: a *class*, which can be cut as a whole.

The steps: the model is run once in evaluation and once in training under a dispatch mode that carries units from
operator to operator (:mod:`.tracer`). A rule for each operator (:mod:`.rules`) records in a ledger (:mod:`.ledger`)
which units become one and which cannot be cut. From the ledger follows the partition into classes (:mod:`.partition`).
A trace is not a proof, so :mod:`.proof` cuts a copy and traces it again, and runs a masked copy to see which values
closed units have where something reads them. No step looks at the types of modules.

Names in the code of this package and of its callers:

- unit: an integer from 1 on; 0 means "no unit". Arrays over units have one entry for each, ``(units,)``.
- class: units that can be cut only together; also an integer, the least of its units. ``class_id`` is a class where
  a loop or a function takes a single one, and ``classes`` are several; neither ever is a Python class. ``label[unit]``
  is the class of a unit.
- member: the part of a class in one dimension of one parameter or buffer, ``(name, dim, indices)``.
- cluster: a list of classes that have units in the same dimension of some tensor, directly or through other classes.
- axis: an int64 tensor with the rank of some tensor; it holds the unit of each index along the dimensions in which the
  units change, and has size 1 along all others (:mod:`.axes`). ``line(axis)`` is the same units as a vector.
- marks: the axes of a tensor, and whether it is a weight (:class:`.ledger.Marks`); None for a constant.
- call: one call of an operator (:class:`.call.Call`). A rule is a function from a call to the axes of its results.
- read, written: a weight reads the units of its contracted dimension (its columns) and writes those of the others (its
  rows).
- gone: what is cut; kept, remaining: what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from .. import inputs
from . import tracer
from .ledger import Ledger, Reason
from .partition import Member, Units, solve

__all__ = ["Member", "Reason", "Units", "remembering", "trace_units"]


def trace_units(
    model: nn.Module,
    example_inputs: Any,
    *,
    training: Iterable[bool] = (False, True),
    more_inputs: Iterable[Any] = (),
    fake: bool | None = None,
    within: Iterable[str] = (),
) -> Units:
    """Group the units of a model's parameters and buffers into classes, and find which of these may be cut.

    The model is run on meta tensors, so nothing is computed. If its control flow asks for a value, it is run on real
    ones. Afterwards its attributes, buffers, modes and the states of random generators are as before, whatever is
    raised.

    Args:
        model: any module, on any device (``meta`` included). Only its forward without gradients is traced.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        training: the modes to run it in. A branch that only training runs is traced too, so that nothing is cut that it
            reads.
        more_inputs: further example inputs, for models whose control flow depends on the input; what is found on any of
            these holds.
        fake: True: on meta tensors or not at all; False: on real ones; None: on meta tensors if that works.
        within: names of the weights of grouped convolutions of which every group loses the same channels. Of other
            grouped convolutions whole groups are cut.

    Returns: a :class:`Units`. Its ``failed`` says of a mode other than the first why the model does not run in it.

    Raises: TypeError for example inputs without a tensor; in the first mode, whatever the model raises.
    """
    modes = list(dict.fromkeys(training))
    samples = [example_inputs, *more_inputs]
    for sample in samples:
        inputs.check(sample)
    traced_before, key = _known.get(), None
    if traced_before is not None:
        key = _likeness(model), tuple(modes), tuple(map(id, samples)), fake, frozenset(within)
        if key in traced_before:
            return traced_before[key]
    units = _traced(model, samples, modes, fake, within)
    if traced_before is not None:
        traced_before[key] = units
    return units


_known: ContextVar[dict[Any, Units] | None] = ContextVar("known", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Within this block, trace models that are alike only once.

    Models are alike if their modules have the same names, types and plain attributes and their tensors the same shapes,
    with the same example inputs (the same objects). No module may get another forward within the block.
    """
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def _likeness(model: nn.Module) -> tuple[Any, ...]:
    """Return a key that is equal for copies of a model: modules with their plain attributes, tensors with shape, dtype
    and sharing.
    """
    modules = [
        (name, type(module), *((key, value) for key, value in vars(module).items() if type(value) in (int, bool, str)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return tuple(modules), tuple((name, t.shape, t.dtype, first.setdefault(id(t), name)) for name, t in tensors)


def _traced(model: nn.Module, samples: list[Any], modes: list[bool], fake: bool | None, within: Iterable[str]) -> Units:
    """Trace the model in every mode and on every sample, and solve the ledger.

    Args:
        model: the model.
        samples: the example inputs, one entry for each run. Products are recorded on the first one alone.
        modes: the modes (True: training) to run it in.
        fake, within: as for :func:`trace_units`.

    Returns: the partition into classes. A mode other than the first in which the model raises is left out, and
    ``failed`` names the error.

    Raises: in the first mode, whatever the model raises.
    """
    ledger, failed = Ledger.of(model, within), dict[bool, str]()
    for mode in modes:
        mark = ledger.checkpoint()
        try:
            for sample in samples:
                counts = not mode and sample is samples[0]
                tracer.run_as_fits(ledger, model, sample, training=mode, fake=fake, counts=counts)
        except Exception as error:
            if mode == modes[0]:
                raise
            ledger.back_to(mark)
            failed[mode] = f"{type(error).__name__}: {error}"
    return solve(ledger, tuple(mode for mode in modes if mode not in failed), failed)
