"""One call of an ATen operator, as the rules see it: arguments, results, and the axes of the tensors among them.

An axis (:mod:`.axes`) is an int64 tensor that holds the unit of each index along some dimensions of a tensor, and has
size 1 along all others. The "marks" of a tensor (:class:`.ledger.Marks`) are its axes, and whether it is a weight.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import inputs
from .axes import Axes, moving, varying
from .ledger import Marks, Product, Reason, line

if TYPE_CHECKING:
    from .tracer import Tracer

_NOT_USER_CODE = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
_COUNTED = {
    *("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"),
    *("convolution", "_convolution", "conv2d", "convolution_backward"),
}
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


class Call:
    """One call of an ATen operator, which a rule turns into the axes of its result.

    Attributes:
        tracer: the run that made the call.
        ledger: where the rule writes what it finds about units.
        func: the operator, with its overload.
        name: its name without namespace and overload, such as "mm".
        args, kwargs: its arguments.
        out: what it returned.
        given: the tensors among the arguments, in order.
        marks: the axes of each tensor in ``given``; None for a tensor that no parameter, buffer or input went into.
    """

    def __init__(
        self,
        tracer: Tracer,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        given: list[Tensor],
        marks: list[Marks | None],
    ) -> None:
        self.tracer, self.ledger = tracer, tracer.ledger
        self.func, self.name, self.args, self.kwargs, self.out = func, name, args, kwargs, out
        self.given, self.marks = given, marks
        self._place: tuple[str, str, str] | None = None

    @property
    def first(self) -> Tensor:
        """The first output of the operator."""
        output: Tensor = self.out[0] if isinstance(self.out, (tuple, list)) else self.out
        return output

    def arg(self, name: str, default: Any = None) -> Any:
        """Return the argument called ``name`` in the operator's schema; ``default`` if the schema has none of that
        name.
        """
        for at, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return self.args[at] if at < len(self.args) else self.kwargs.get(name, argument.default_value)
        return default

    def of(self, tensor: Any) -> Marks | None:
        """Return the marks of a tensor (its axes, and whether it is a weight); None for a constant, and for what is not
        a tensor.
        """
        return self.tracer.marks(tensor) if isinstance(tensor, Tensor) else None

    def axes(self, tensor: Any) -> Axes:
        """Return the axes of a tensor; an empty list for a constant, and for what is not a tensor."""
        marks = self.of(tensor)
        return marks.axes if marks is not None else []

    def is_weight(self, tensor: Tensor) -> bool:
        """Return whether a tensor is made of parameters and buffers alone, or is a constant with one value."""
        marks = self.of(tensor)
        return (tensor.numel() == 1 or id(tensor) in self.tracer.uniform) if marks is None else marks.weight

    def numbers(self) -> list[Any]:
        """Return the numbers that an elementwise operator was given beside tensors; [] for other operators."""
        if torch.Tag.pointwise not in self.func.tags:
            return []
        return [
            a for a in (*self.args, *self.kwargs.values()) if isinstance(a, (int, float)) and not isinstance(a, bool)
        ]

    def even(self, tensor: Tensor, dims: set[int]) -> bool:
        """Return whether a tensor of constants has equal values along all of the dimensions ``dims``.

        The tracer may know it without looking at the values (:meth:`.tracer.Tracer.is_even`). Else the values are
        compared; a meta tensor has none, so the answer is then False.
        """
        if all(self.tracer.is_even(tensor, d - tensor.dim()) for d in dims):
            return True
        if tensor.device.type == "meta":
            return False
        return all(bool((tensor == tensor.narrow(d, 0, 1)).all()) for d in dims)

    def is_view(self) -> bool:
        """Return whether the result shares memory with the first argument."""
        return (
            bool(self.args)
            and isinstance(self.args[0], Tensor)
            and self.func._schema.arguments[0].alias_info is not None
        )

    def writes_in_place(self) -> bool:
        """Return whether the operator changes its first argument."""
        return self.is_view() and bool(self.func._schema.arguments[0].alias_info.is_write)

    def count(self, macs: int, factors: Axes, overlapping: Sequence[Tensor] = ()) -> None:
        """Record a product, if the trace counts products and torch's FLOP counter counts this operator.

        Args:
            macs: its multiply-accumulates.
            factors: the axes of its dimensions, contracted ones included.
            overlapping: those of them that change along a dimension together.
        """
        if self.tracer.counts and self.name in _COUNTED:
            lines = [line(axis) for axis in moving(factors)]
            self.ledger.products.append(Product(self.module_name(), macs, lines, list(overlapping)))

    def reads_weight(self) -> bool:
        """Whether the first argument is a weight."""
        return bool(self.args) and isinstance(self.args[0], Tensor) and self.is_weight(self.args[0])

    def module_name(self) -> str:
        """Return the name of the module that runs this call; "" for the model itself."""
        return self.tracer.module_name()

    def why(self, kind: str, text: str) -> Reason:
        """Make a :class:`~.ledger.Reason` that names the operator, the running module and the line of the user's code.

        Args:
            kind: the kind of the reason, one of those that :class:`~.ledger.Reason` lists.
            text: the reason in words.
        """
        if self._place is None:
            self._place = self.name, self.tracer.module(), _user_line(sys._getframe(1))
        return Reason(kind, text, *self._place)

    def probe(self, tensor: Tensor, axes: Axes, dim: int, added: bool = False) -> None:
        """Note which values closed units have along ``dim``, where a weight or a sum reads them.

        ``tracer.alive`` gets (least, largest) of every closed unit that is not 0 everywhere. Nothing is done in a trace
        without closed units.

        Args:
            tensor: the tensor that is read, with values.
            axes: its axes.
            dim: the dimension along which it is read.
            added: whether a sum without weights reads it; ``tracer.added`` then gets the units too.
        """
        for unit, values in self._closed(tensor, axes, dim):
            low, high = float(values.min()), float(values.max())
            earlier = self.tracer.alive.get(unit, (low, high))
            if low or high or earlier != (low, high):
                self.tracer.alive[unit] = min(low, earlier[0]), max(high, earlier[1])
                self.tracer.added.update([unit] if added else [])

    def probe_pair(self, pair: list[tuple[Tensor, Axes, int]]) -> None:
        """Note the closed units that contribute to a product of two activations, which no mask on a weight can remove.

        A unit contributes where both factors are not 0 at some index of the contracted dimension.

        Args:
            pair: (tensor, axes, contracted dimension) of each factor.
        """
        if self.tracer.closed is None:
            return
        a, b = (tensor.movedim(dim, -1).flatten(0, -2).any(0) for tensor, _, dim in pair)
        for tensor, axes, dim in pair:
            contributes = (a & b).reshape([-1 if at == dim else 1 for at in range(tensor.dim())])
            self.tracer.added.update(unit for unit, values in self._closed(contributes, axes, dim) if bool(values))

    def _closed(self, tensor: Tensor, axes: Axes, dim: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (unit, its values in ``tensor``) for every closed unit of the axes that change along ``dim`` alone.

        Args:
            tensor: the tensor that is read, with values.
            axes: axes of the rank of ``tensor``.
            dim: a dimension. The values of a unit are what ``tensor`` holds at its index of ``dim``, without that
                dimension.
        """
        closed = self.tracer.closed
        for axis in axes if closed is not None else []:
            if closed is None or varying(axis) != {dim}:
                continue
            ids = axis.reshape(-1)
            positions = torch.nonzero((ids < len(closed)) & closed[ids.clamp(max=len(closed) - 1)]).reshape(-1)
            yield from zip(ids[positions].tolist(), tensor.index_select(dim, positions).unbind(dim), strict=True)


def _user_line(frame: FrameType | None) -> str:
    """Return "file:line" of the innermost frame in code of neither torch, the standard library nor this package; "" if
    there is none.
    """
    while frame is not None:
        path = frame.f_code.co_filename
        if path == inputs.__file__ and frame.f_code.co_name == "call":
            return ""
        standard = path.startswith(_STANDARD_LIBRARY) and "site-packages" not in path
        if not standard and not path.startswith(("<", *_NOT_USER_CODE)):
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


Rule = Callable[[Call], "Axes | tuple[Axes, ...]"]
