"""Which elements of which parameters go together, read off the ATen operators that a model runs; no module's type takes
part.

Every index of every dimension of every floating-point parameter and buffer is a *unit*. A model is run once in each
mode under a dispatch mode that carries units from operator to operator (:mod:`.tracer`); a rule for each operator
(:mod:`.rules`) says which units are one, which are mixed and which are only moved (:mod:`.ledger`); what follows from
all of it is a partition into classes (:mod:`.partition`). A trace is no proof, so a cut model is traced again, and a
masked one is looked at where closed units are read (:mod:`.proof`).
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
    """The units of a model's parameters and buffers, and which of them may be cut.

    The model is run on meta tensors, so nothing is computed; where its control flow asks for a value it is run on real
    ones. Whatever is raised, its attributes, buffers, modes and the states of random generators are as before.

    Args:
        model: any module, on any device (``meta`` included); its forward is what it computes without gradients.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        training: the modes to run it in. What only training reaches is traced too, so that nothing is cut that a branch
            of training reads.
        more_inputs: further example inputs, for models that take another path on these; all paths are united.
        fake: True: on meta tensors or not at all; False: on real ones.
        within: the weights of convolutions in groups, by name, of which every group loses the same channels; of others
            whole groups go.

    Returns: a :class:`Units`. Its ``failed`` says of a mode other than the first why the model does not run in it.

    Raises: TypeError for example inputs without a tensor; in the first mode, whatever the model raises.
    """
    modes = list(dict.fromkeys(training))
    samples = [example_inputs, *more_inputs]
    for sample in samples:
        inputs.check(sample)
    found, key = _known.get(), None
    if found is not None:
        key = _likeness(model), tuple(modes), tuple(map(id, samples)), fake, frozenset(within)
        if key in found:
            return found[key]
    units = _traced(model, samples, modes, fake, within)
    if found is not None:
        found[key] = units
    return units


_known: ContextVar[dict[Any, Units] | None] = ContextVar("known", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """In this block copies of a model are traced once: modules of the same names and types with tensors of the same
    shapes.

    For a block in which no module gets another forward, and example inputs stay the objects that they are.
    """
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def _likeness(model: nn.Module) -> tuple[Any, ...]:
    """What copies of a model have in common, numbers beside parameters included."""
    modules = [
        (name, type(module), *((key, value) for key, value in vars(module).items() if type(value) in (int, bool, str)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return tuple(modules), tuple((name, t.shape, t.dtype, first.setdefault(id(t), name)) for name, t in tensors)


def _traced(model: nn.Module, samples: list[Any], modes: list[bool], fake: bool | None, within: Iterable[str]) -> Units:
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
