"""One rule for each ATen operator: it turns a :class:`~.call.Call` into the axes of the result (a tuple of axes for
several results).

An axis (:mod:`.axes`) is an int64 tensor that holds the unit of each index along some dimensions of a tensor. The rules
of movement, indexing, contraction and reduction are in modules of their own; one table holds all rules. An operator
without a rule is elementwise if torch tags it as pointwise; else it is decomposed if torch can do so; else it is
opaque, and none of the units of its inputs may be cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .axes import Axes, at_rank, moving, varying
from .ledger import CONSTANTS, Marks, line

if TYPE_CHECKING:
    from .call import Call, Rule

_TABLE: dict[str, Rule] = {}


def base_name(func: Any) -> str:
    """Return the operator's name without namespace, overload and the underscore of its in-place form."""
    return str(func._schema.name).split("::")[1].rstrip("_")


def rule(names: str) -> Callable[[Rule], Rule]:
    """Decorator: enter a function into the table under ``names``, which are separated by spaces."""

    def enter(function: Rule) -> Rule:
        """Enter ``function`` into the table and return it."""
        _TABLE.update(dict.fromkeys(names.split(), function))
        return function

    return enter


def of(func: Any, name: str) -> Rule | None:
    """Return the rule of the operator ``func``, whose :func:`base_name` is ``name``; None if there is none."""
    if name in _TABLE:
        return _TABLE[name]
    return elementwise if torch.Tag.pointwise in func.tags else None


def parts_of(func: Any) -> Callable[..., Any] | None:
    """Return a function that computes what an operator does by operators that it consists of; None if torch has none.

    Gradients that no rule is for, which models that compute forces call in their forward, are in torch's table of
    decompositions. It takes a second to load.
    """
    if func._schema.name == "aten::_trilinear":
        return _trilinear
    if func._can_decompose():
        decompose: Callable[..., Any] = func.decompose
        return decompose
    if "backward" not in func._schema.name:
        return None
    from torch._decomp import decomposition_table

    return decomposition_table.get(func)


def _trilinear(
    a: Tensor, weight: Tensor, b: Tensor, new_a: list[int], new_weight: list[int], new_b: list[int], over: list[int]
) -> Tensor:
    """Compute the operator ``_trilinear``, of which ``torch.nn.functional.bilinear`` is made: (a * weight *
    b).sum(over).

    Args:
        a, weight, b: the factors.
        new_a, new_weight, new_b: for each factor, the dimensions of size 1 that it gets before the product.
        over: the dimensions to sum over.
    """
    product = functools.reduce(Tensor.unsqueeze, new_a, a) * functools.reduce(Tensor.unsqueeze, new_weight, weight)
    return (product * functools.reduce(Tensor.unsqueeze, new_b, b)).sum(over)


def operand(call: Call, tensor: Tensor) -> tuple[Marks, list[int]] | None:
    """Return (marks, shape) of one tensor, as :meth:`~.ledger.Ledger.meet` takes them; None for a tensor without units.

    A dimension along which the tensor was expanded has size 1 in the shape.
    """
    marks = call.of(tensor)
    return (
        None
        if marks is None
        else (marks, [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    )


_FACTORS = ("mul", "div", "true_divide")  # operators whose result is 0 where the first operand is 0


def _decisive_last(call: Call) -> list[Tensor]:
    """Order the operands of an elementwise operator that computes a weight from other weights, for
    :meth:`~.ledger.Ledger.meet`.

    The last operand decides to which units the columns of the result belong: the parameter if a buffer masks it, the
    numerator of a quotient. Conditions that choose between weights come first.
    """
    last = [
        t
        for t in call.given
        if t.dtype.is_floating_point and (not call.tracer.owned(t) or isinstance(t, torch.nn.Parameter))
    ]
    last = last[::-1] if call.name in _FACTORS[1:] else last
    return [t for t in call.given if not any(t is other for other in last)] + last


def scaled_weight(call: Call) -> Tensor | None:
    """Return the factor of an elementwise product that is a weight with several dimensions of units, or such a weight
    times activations (:class:`~.ledger.Marks`); None if no factor is.
    """
    if call.name != "mul":
        return None
    for tensor in call.given:
        marks = call.of(tensor)
        if marks is not None and (marks.scaled or (marks.weight and len(moving(marks.axes)) > 1)):
            return tensor
    return None


def write(call: Call, tensors: Iterable[Any]) -> None:
    """Record in the ledger that the weights among ``tensors`` write the units that they have."""
    for tensor in tensors:
        marks = call.of(tensor)
        if marks is not None and marks.weight:
            call.ledger.written.extend(line(axis) for axis in marks.axes)


def meet_constants(call: Call, tensor: Tensor, axes: Axes, places: Sequence[int]) -> Axes:
    """Record that a tensor meets ``axes`` elementwise, if it is constant: units along which it differs must not be cut.

    Args:
        call: the call that combines them.
        tensor: the tensor. Nothing is recorded if it has units of its own, or holds whole numbers or booleans.
        axes: the axes of the result.
        places: for each dimension of the axes, that of ``tensor``; negative where ``tensor`` has none.

    Returns: the axes along all of whose changing dimensions the constants have more than one entry, all of them equal.
    """
    taken: Axes = []
    if call.of(tensor) is not None or not (tensor.is_floating_point() or tensor.is_complex()):
        return taken
    for axis in axes:
        dims = {d for d in varying(axis) if places[d] >= 0 and tensor.shape[places[d]] > 1}
        if dims and not call.even(tensor, {places[d] for d in dims}):
            call.ledger.keep_along(axis, dims, CONSTANTS, call)
        elif dims and len(dims) == len(varying(axis)):
            taken.append(axis)
    return taken


@rule(
    "_prelu_kernel prelu native_dropout bernoulli rrelu_with_noise gelu _fused_dropout masked_fill where hardswish "
    "hardsigmoid nan_to_num "
    "feature_dropout isnan isinf complex polar log_sigmoid_forward"
)
def elementwise(call: Call) -> Axes:
    """The rule of elementwise operators: units at the same place of the operands become one unit.

    Constants that meet units must be the same along them; if they are not, or if that is not known, the units are
    fixed.
    """
    ledger, shape = call.ledger, list(call.first.shape)
    weights, tensors = all(marks is None or marks.weight for marks in call.marks), call.given
    scaled = None if weights else scaled_weight(call)
    if scaled is not None:
        tensors = [*(t for t in tensors if t is not scaled), scaled]
    operands = list(filter(None, (operand(call, t) for t in (_decisive_last(call) if weights else tensors))))
    if not weights:
        write(call, tensors[:-1] if scaled is not None else tensors)
    elif call.name not in _FACTORS:
        ledger.lie_beside(
            [[at_rank(axis, len(shape)) for axis in call.axes(t)] for t in call.given if t.dtype.is_floating_point]
        )
    axes = ledger.meet(shape, operands, call)
    activations = [marks for marks in call.marks if marks is not None and marks.axes and not marks.weight]
    if call.name not in _FACTORS and len(activations) > 1:  # also lerp, addcmul, where
        ledger.added += [line(axis) for axis in axes]
    for tensor in call.given:
        ahead = len(shape) - tensor.dim()
        taken = meet_constants(call, tensor, axes, [d - ahead for d in range(len(shape))])
        if taken:  # the constants now have these units, so other layers that meet them have the same width
            call.tracer.mark(tensor, Marks([axis.reshape(axis.shape[ahead:]) for axis in taken]))
    return axes


@rule(
    "clone detach alias _to_copy lift_fresh lift_fresh_copy contiguous zeros_like ones_like empty_like rand_like "
    "randn_like full_like fill "
    "zero normal uniform conj real imag resolve_conj resolve_neg tril triu _conj"
)
def same(call: Call) -> Axes:
    """The rule of operators whose result has the units of the first argument."""
    return call.axes(call.args[0])


@rule(
    "new_zeros new_ones new_empty new_full new_empty_strided empty_strided _local_scalar_dense is_nonzero size stride "
    "sym_size equal item "
    "set _is_all_true _is_any_true _is_zerotensor allclose"
)
def nothing(call: Call) -> Axes:
    """The rule of operators whose result has no units."""
    return []


@rule("copy")
def copied(call: Call) -> Axes:
    """The rule of ``copy``: the result has the units of the source, which is broadcast to the target."""
    target = call.args[0]
    return [at_rank(axis, target.dim()) for axis in call.axes(call.args[1])]


def opaque(call: Call, what: str = "of which nothing is known") -> Axes | tuple[Axes, ...]:
    """The rule of unknown operators: no unit of an input may be cut, and the result has no units.

    Args:
        call: the call.
        what: what is said of the operator in the reason.

    Returns: an empty list of axes for each result.
    """
    if isinstance(call.out, (bool, int, float)):
        return []  # it asks something of tensors
    for marks in call.marks:
        if marks is not None:
            call.ledger.fix(marks.axes, call.why("opaque", f"its channels go into an operator {what}"))
    return [] if isinstance(call.out, Tensor) or call.out is None else tuple([] for _ in call.out)


from . import contraction, indexing, movement, reduction  # noqa: E402, F401  (they fill the table)
