"""Run a model once under a dispatch mode that carries axes from operator to operator.

:class:`Tracer` sees every ATen operator below autograd. It looks up the axes of the arguments (which unit each of their
elements belongs to, :mod:`.axes`), calls the operator's rule (:mod:`.rules`), and remembers the axes of the results. On
meta tensors operators compute shapes alone.

A tensor that neither inputs nor parameters went into is a constant here: it has no units, but it matters whether it is
the same along a dimension ("even") or everywhere ("uniform").
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .. import hooks, inputs, meta
from ..restore import as_it_was
from ..values import with_tensors
from . import rules
from .axes import Axes, moving, narrow, varying
from .call import Call
from .ledger import Ledger, Marks, Reason

_UNIFORM = "zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like"
_EMPTY = "empty new_empty empty_strided new_empty_strided"
_KEEPS_UNIFORM = (
    "view _unsafe_view expand select slice unbind unsqueeze squeeze permute transpose t clone _to_copy detach alias "
    "split cat stack repeat"
)


def run(
    ledger: Ledger,
    model: nn.Module,
    example_inputs: Any,
    *,
    training: bool,
    fake: bool,
    closed: Tensor | None = None,
    alive: dict[int, tuple[float, float]] | None = None,
    added: set[int] | None = None,
    counts: bool = False,
) -> None:
    """Run ``model`` once and write what its operators say about units into ``ledger``.

    The model is afterwards as it was, whatever is raised.

    Args:
        ledger: where the rules write.
        model: the model.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        training: the mode to run it in.
        fake: True: operators get meta tensors, which have shapes and no values, and compute nothing. False: they get
            real tensors.
        closed: bool (units,), which units are closed; None if none are.
        alive: gets closed unit -> (least, largest) of its values, for units that are not 0 where something reads them.
            None if this is not wanted.
        added: gets the units in ``alive`` that are read without a weight: by a sum, or by a product of two activations.
            None if this is not wanted.
        counts: whether products are recorded.

    Raises: what the model raises.
    """
    tracer = Tracer(ledger, {module: name for name, module in model.named_modules()}, training)
    tracer.fake, tracer.closed, tracer.alive, tracer.counts = fake, closed, {} if alive is None else alive, counts
    tracer.added = set() if added is None else added
    with ExitStack() as stack:
        stack.enter_context(as_it_was(model, parameters=training and not fake, swapped=True))
        stack.enter_context(_plain_operators())
        model.train(training)
        if fake:
            tracer.swap(model)
            example_inputs = with_tensors(tracer.on_meta, example_inputs)
        for example in inputs.tensors(example_inputs):
            tracer.mark(example, Marks([]))
        stack.enter_context(hooks.removing(tracer.hooks(model)))
        with tracer:
            output = inputs.call(model, example_inputs)
        for tensor in inputs.tensors(output):
            marks = tracer.marks(tensor)
            if marks is not None:
                ledger.fix(
                    marks.axes, Reason("output", f"its outputs are the model's own{' in training' if training else ''}")
                )


def run_as_fits(
    ledger: Ledger,
    model: nn.Module,
    example_inputs: Any,
    *,
    training: bool,
    fake: bool | None = None,
    counts: bool = False,
) -> None:
    """Call :func:`run` on meta tensors, and if that raises, on real tensors.

    Args:
        ledger, model, example_inputs, training, counts: as for :func:`run`.
        fake: True: try only meta tensors. False: try only real tensors. None: try both.

    Raises: what the last run raises. If real tensors are tried after meta tensors, the first run leaves nothing in
    ``ledger``.
    """
    mark = ledger.checkpoint()
    try:
        run(ledger, model, example_inputs, training=training, fake=fake is not False, counts=counts)
        return
    except Exception:
        if fake is not None:
            raise
        ledger.back_to(mark)
    run(ledger, model, example_inputs, training=training, fake=False, counts=counts)


def _computes_alike(func: Any) -> bool:
    """Return whether an operator computes each element of its result from the elements at the same place, without
    randomness, and returns a new tensor.
    """
    drawn = torch.Tag.nondeterministic_seeded in func.tags
    elementwise = torch.Tag.pointwise in func.tags or rules.base_name(func) in ("clone", "_to_copy")
    return elementwise and not drawn and not func._schema.is_mutable


@contextmanager
def _plain_operators() -> Iterator[None]:
    """Open a block in which operators arrive one by one: no gradients, no fused attention, recurrent layers as
    products.

    Warnings are silent, because the model gives the same ones in an ordinary run.
    """
    with warnings.catch_warnings(), torch.no_grad(), inputs.unfused(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield


class Tracer(TorchDispatchMode):
    """A dispatch mode that calls the rule of every operator that reads a tensor with units.

    Args:
        ledger: where the rules write.
        names: module -> its name, for the modules of the model.
        training: the mode in which the model runs.

    Attributes:
        ledger, training, fake, closed, alive, added, counts: as in :func:`run`.
        uniform: id of a constant tensor -> (tensor, whether it is 0), for constants with one value everywhere.
    """

    def __init__(self, ledger: Ledger, names: dict[nn.Module, str], training: bool) -> None:
        super().__init__()
        self.ledger, self.training = ledger, training
        self.fake = self.counts = False
        self.closed: Tensor | None = None
        self.alive: dict[int, tuple[float, float]] = {}
        self.added: set[int] = set()
        self.uniform: dict[int, tuple[Tensor, bool]] = {}
        # the keys below are ids of tensors; the entries hold the tensors, so that no id is used twice
        self._even: dict[int, tuple[Tensor, set[int]]] = {}  # other constants; dimensions along which each is the same
        self._unwritten: set[int] = set()  # tensors from ``empty`` that nothing was written into yet
        self._names = names
        self._stack: list[nn.Module] = []  # the running modules, the innermost last
        self._marks: dict[int, tuple[Tensor, Marks | None]] = {}
        self._twins: dict[int, int] = {}  # id of a meta tensor -> id of the real one that it stands for
        self._meta: dict[int, tuple[Tensor, Tensor]] = {}  # real tensor -> (that tensor, its meta tensor)
        self._views: dict[int, tuple[Tensor, Any, tuple[Any, ...], dict[str, Any]]] = {}  # view -> base and operator

    def hooks(self, model: nn.Module) -> list[Any]:
        """Register hooks on all modules of ``model`` that keep track of the running module; returns their handles."""

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            """End the running module, as a forward hook."""
            del self._stack[-1]

        handles: list[Any] = [
            m.register_forward_pre_hook(lambda module, args: self._stack.append(module)) for m in model.modules()
        ]
        return handles + [m.register_forward_hook(leave, always_call=True) for m in model.modules()]

    def module_name(self) -> str:
        """Return the name of the module that is running; "" for the model itself, or outside of all modules."""
        return self._names.get(self._stack[-1], "") if self._stack else ""

    def module(self) -> str:
        """Return type and name of the module that is running, as in "Linear 'fc'"; "" outside of all modules."""
        if not self._stack:
            return ""
        name = self._names.get(self._stack[-1], "")
        return f"{type(self._stack[-1]).__name__} {name!r}" if name else type(self._stack[-1]).__name__

    def marks(self, tensor: Tensor) -> Marks | None:
        """Return the marks of a tensor (its axes, and whether it is a weight); None for a constant, which neither
        inputs nor parameters went into.

        A parameter or buffer is noted as reached in the present mode.
        """
        if id(tensor) in self._marks:
            return self._marks[id(tensor)][1]
        if not self.owned(tensor):
            return None
        _, name, marks = self.ledger.known[self._twins.get(id(tensor), id(tensor))]
        self.ledger.reached.setdefault(name, set()).add(self.training)
        return marks

    def owned(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter or buffer with units, or the meta tensor of one."""
        return self._twins.get(id(tensor), id(tensor)) in self.ledger.known

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of a parameter or buffer, also from its meta tensor; None for other tensors."""
        key = self._twins.get(id(tensor), id(tensor))
        return self.ledger.known[key][1] if key in self.ledger.known else None

    def mark(self, tensor: Tensor, marks: Marks | None) -> None:
        """Remember the marks of a tensor; None says that it is a constant. The tensor is kept alive, so that no other
        gets its id.
        """
        self._marks[id(tensor)] = tensor, marks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator, call its rule, and remember the axes of what it returned.

        Operators without a rule are decomposed if torch can do so. An operator that reads nothing with units is a
        constant. A call that a rule raises for counts as an unknown operator.
        """
        kwargs = kwargs or {}
        name = rules.base_name(func)
        rule = rules.of(func, name)
        if func.namespace == "prim":
            rule = rules.nothing
        parts = rules.parts_of(func) if rule is None else None
        if parts is not None:
            with self:
                result = parts(*args, **kwargs)
            if result is not NotImplemented:
                return result
        operator, call_args = self._as_a_view(func, args)
        out = self._result(func, name, args, kwargs)
        tensors = meta.tensors_of((call_args, kwargs))
        marks = [self.marks(t) for t in tensors]
        if all(m is None for m in marks) or name.startswith("new_"):
            self._constant(func, name, args, kwargs, tensors, out)
        else:
            call = Call(self, operator, name, call_args, kwargs, out, tensors, marks)
            try:
                self._record(call, (rule or rules.opaque)(call))
            except Exception as error:  # the rule does not handle this form of the call
                self._record(call, rules.opaque(call, f"that is called in an unknown way ({error})"))
        return out

    def _as_a_view(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """Replace an operator that changes a shape in place (``transpose_``) by its view form.

        The rule then sees a tensor that still has the old shape. Other operators and their arguments are returned
        unchanged.

        Args:
            func: the operator, which has not been run yet.
            args: its positional arguments.

        Returns: (operator, arguments).
        """
        view = _view_of(func) if func._schema.is_mutable else None
        if view is None:
            return func, args
        before = args[0].detach()
        self.mark(before, self.marks(args[0]))
        if id(args[0]) in self._views:
            self._views[id(before)] = self._views[id(args[0])]
        return view, (before, *args[1:])

    def _result(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run an operator and return what it returns. With ``fake``, it is called on meta tensors in place of real
        ones.

        Args:
            func: the operator.
            name: its name, as :func:`.rules.base_name` returns it.
            args, kwargs: its arguments.
        """
        if not self.fake or name.startswith("lift_fresh"):
            return func(*args, **kwargs)
        args, kwargs = meta.mapped(self.on_meta, args), meta.mapped(self.on_meta, kwargs)
        return meta.computed(func, args, meta.to_meta(func, kwargs))

    def on_meta(self, tensor: Tensor) -> Tensor:
        """Return the meta tensor that stands for ``tensor``: of the same shape, strides and dtype, always the same
        object.
        """
        if tensor.device.type == "meta":
            return tensor
        if id(tensor) not in self._meta or self._meta[id(tensor)][1].shape != tensor.shape:
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._meta[id(tensor)] = (
                tensor,
                nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin,
            )
            self._twins[id(self._meta[id(tensor)][1])] = id(tensor)
        return self._meta[id(tensor)][1]

    def swap(self, model: nn.Module) -> None:
        """Replace parameters and buffers by meta tensors, also in lists that modules keep; :func:`as_it_was` undoes
        this.
        """
        for module in model.modules():
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for table in tables:
                table.update({name: self.on_meta(t) for name, t in table.items() if t is not None})
            for listed in vars(module).values():
                if isinstance(listed, list):
                    listed[:] = [self.on_meta(t) if isinstance(t, Tensor) and self.owned(t) else t for t in listed]

    def _constant(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], out: Any) -> None:
        """Record what is known of the result of an operator that no parameter and no input went into.

        That is: whether it has one value everywhere, along which dimensions it does not change, and what it is a view
        of.

        Args:
            func: the operator.
            name: its name, as :func:`.rules.base_name` returns it.
            args, kwargs: its arguments.
            tensors: the tensors among the arguments.
            out: what it returned.
        """
        if func._schema.is_mutable:
            self._no_longer_even(args[0])
            self._unwritten.discard(id(self._root(args[0])))
        if name in _EMPTY.split():
            self._unwritten.add(id(out))
            self.mark(out, None)
        kept = tensors and name in _KEEPS_UNIFORM.split() and all(id(t) in self.uniform for t in tensors)
        if name in _UNIFORM.split() or (kept and not func._schema.is_mutable):
            zero = self.is_zero(tensors[0]) if kept else "zeros" in name
            self.uniform.update({id(t): (t, zero) for t in meta.tensors_of(out)})
        elif tensors and isinstance(out, Tensor) and _computes_alike(func):
            dims = {d for d in range(out.dim()) if all(self.is_even(t, d - out.dim()) for t in tensors)}
            if all(id(t) in self.uniform for t in tensors):
                self.uniform[id(out)] = out, False
            elif dims:
                self._even[id(out)] = out, dims
        if isinstance(out, Tensor) and func._schema.returns[0].alias_info is not None and not func._schema.is_mutable:
            self.mark(out, None)
            self._views[id(out)] = args[0], func, args, kwargs

    def is_zero(self, tensor: Tensor) -> bool:
        """Return whether a tensor of constants is known to be zero everywhere."""
        return self.uniform.get(id(tensor), (tensor, False))[1]

    def is_even(self, tensor: Tensor, dim: int) -> bool:
        """Return whether a tensor of constants is known to be the same along a dimension, without a look at its values.

        Args:
            tensor: the tensor.
            dim: the dimension, counted from the last one (-1). Along one that the tensor does not have, it is the same.
        """
        if id(tensor) in self.uniform or dim < -tensor.dim() or tensor.shape[dim] == 1:
            return True
        if tensor.layout is torch.strided and tensor.stride(dim) == 0:
            return True
        return id(tensor) in self._even and dim + tensor.dim() in self._even[id(tensor)][1]

    def _bases(self, tensor: Any) -> Iterator[Tensor]:
        """Yield the tensor that ``tensor`` is a view of, then the tensor that that one is a view of, and so on."""
        while id(tensor) in self._views and self._views[id(tensor)][0] is not tensor:
            tensor = self._views[id(tensor)][0]
            yield tensor

    def _root(self, tensor: Tensor) -> Tensor:
        """Return the tensor at the end of :meth:`_bases`; ``tensor`` itself if it is not a view."""
        return [tensor, *self._bases(tensor)][-1]

    def _no_longer_even(self, written: Any) -> None:
        """Forget what was known of the values of a constant that is written into, and of all tensors that it is a view
        of.
        """
        for tensor in (written, *self._bases(written)):
            self.uniform.pop(id(tensor), None)
            self._even.pop(id(tensor), None)

    def _record(self, call: Call, result: Axes | tuple[Axes, ...]) -> None:
        """Remember the axes that a rule returned for the results of a call.

        Args:
            call: the call.
            result: the axes of its result, or a tuple with the axes of each of its results.

        Raises: AssertionError if an axis does not fit its result.
        """
        outs = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
        results = result if isinstance(result, tuple) else (result, *((None,) * (len(outs) - 1)))
        weight = all(call.is_weight(t) for t in call.given)
        numbers = call.numbers()
        if numbers:
            self.ledger.numbers.append((call.name, *numbers))
        for out, axes in zip(outs, results, strict=True):
            if not isinstance(out, Tensor) or self.owned(out):  # a parameter or buffer written in place keeps its units
                continue
            marks = Marks(_checked(call.name, moving(axes or []), out), weight, not weight and _is_scaled(call))
            self.mark(out, marks)
            if call.writes_in_place() and not self.owned(call.args[0]):
                self.mark(call.args[0], marks)  # with ``fake``, ``out`` is a meta tensor, not the one written to
                self._write_through(call.args[0], call)
            elif call.is_view():
                self._views[id(out)] = call.args[0], call.func, call.args, call.kwargs

    def _write_through(self, child: Tensor, call: Call) -> None:
        """Give the base of a view the units that were written into the view, and so on to the root.

        The view's operator, applied to the positions 0, 1, 2, ... of the base, tells which elements were written. An
        axis that was written takes the place of the one along the same dimensions. Units of axes that overlap otherwise
        are fixed.

        Args:
            child: the view.
            call: the operator that wrote into it.
        """
        root = id(self._root(child))
        # Of memory with one value everywhere, what is never written has the units of what is written beside it.
        first = root in self._unwritten or root in self.uniform
        self._unwritten.discard(root)
        self.uniform.pop(root, None)
        while id(child) in self._views:
            base, func, args, kwargs = self._views[id(child)]
            axes = call.axes(child)
            if base is child or self.owned(base):
                return
            if not axes:  # values without units, but no constants
                self.mark(base, Marks(call.axes(base)))
                child = base
                continue
            # the position in the base of each element of the view
            places = func(torch.arange(base.numel()).reshape(base.shape), *args[1:], **kwargs)
            places = places if isinstance(places, Tensor) else next((p for p in places if p.shape == child.shape), None)
            old = call.axes(base)
            written = [_written(axis, places, base) for axis in axes] if places is not None else []
            pairs = _paired(written, old)
            if places is None or pairs is None:
                self.ledger.fix(axes + old, call.why("mixed", "its channels are written in place into a view"))
                return
            merged: Axes = []
            for axis, old_axis in pairs:
                if axis is None or old_axis is None:
                    # units on one side alone stay; elements that were not written have none
                    merged += [present.clamp(min=0) for present in (axis, old_axis) if present is not None]
                elif varying(axis) == varying(old_axis) and bool((axis >= 0).all()):
                    merged.append(torch.where(old_axis == 0, axis, old_axis))
                    self.ledger.unite(axis, merged[-1], call)  # one width, whether its rows are written or not
                else:
                    merged.append(axis.clamp(min=0) if first else narrow(torch.where(axis < 0, old_axis, axis)))
            self.mark(base, Marks(moving(merged)))
            child = base


@functools.cache
def _view_of(func: Any) -> Any:
    """Return the operator that returns as a view what ``func`` does in place (``transpose`` for ``transpose_``); None
    if there is none.
    """

    def arguments(operator: Any) -> list[tuple[str, str]]:
        """Return names and types of an operator's arguments."""
        return [(argument.name, str(argument.type)) for argument in operator._schema.arguments]

    packet = getattr(torch.ops.aten, rules.base_name(func), None) if func.namespace == "aten" else None
    for name in packet.overloads() if packet is not None else ():
        view = getattr(packet, name)
        returned = [value.alias_info for value in view._schema.returns]
        if not view._schema.is_mutable and None not in returned and returned and arguments(view) == arguments(func):
            return view
    return None


def _paired(axes: Axes, old: Axes) -> list[tuple[Tensor | None, Tensor | None]] | None:
    """Match the axes of values that are written into memory with the axes of the values that were there before.

    Axes match if they change along the same dimensions; a single new axis also matches a single old one.

    Args:
        axes: the axes of the new values.
        old: the axes of the old values.

    Returns: pairs (new axis, old axis), with None for an axis without a match. None if a new and an old axis have some
    of their dimensions in common, but not all.
    """
    if len(axes) == 1 and len(old) <= 1:
        return [(axes[0], old[0] if old else None)]
    for axis in axes:
        if any(varying(axis) & varying(old_axis) and varying(axis) != varying(old_axis) for old_axis in old):
            return None
    matches = [next((old_axis for old_axis in old if varying(old_axis) == varying(axis)), None) for axis in axes]
    unmatched = [old_axis for old_axis in old if all(old_axis is not other for other in matches)]
    return [*zip(axes, matches, strict=True), *((None, old_axis) for old_axis in unmatched)]


def _written(axis: Tensor, places: Tensor, base: Tensor) -> Tensor:
    """Return an axis of a view as an axis of its base, with -1 for the units of elements that the view does not hold.

    Along a dimension in which all elements of the view belong to one unit, the others count as that unit's too.

    Args:
        axis: an axis of the view.
        places: int64, of the shape of the view: the position in the flattened base of each of its elements.
        base: the tensor that it is a view of.
    """
    flat = torch.full((base.numel(),), -1)
    flat[places.reshape(-1)] = axis.expand(places.shape).reshape(-1)
    units = flat.reshape(base.shape)
    for dim in range(units.dim()):
        most = units.amax(dim, keepdim=True)
        if bool(((units == most) | (units < 0)).all()):
            units = most
    return narrow(units)


# what is 0 in the first argument of these is 0 in the result
_NAMES = (
    "div pow square sqrt abs neg clone _unsafe_view _to_copy view reshape expand permute transpose unsqueeze squeeze "
    "t repeat flatten unflatten sum"
)
_KEEP_ZEROS = frozenset(_NAMES.split())


def _is_scaled(call: Call) -> bool:
    """Return whether the result of a call is 0 where a weight is (:class:`~.ledger.Marks`)."""
    if call.name == "mul":
        return rules.scaled_weight(call) is not None
    first = call.of(call.args[0]) if call.args and call.name in _KEEP_ZEROS else None
    return first is not None and first.scaled


def _checked(name: str, axes: Axes, out: Tensor) -> Axes:
    """Return ``axes``, after a check that each fits the shape of ``out``, the result of the operator called ``name``.

    Raises: AssertionError if one does not, which is an error in the rule of the operator.
    """
    for axis in axes:
        if axis.dim() != out.dim() or any(n not in (1, m) for n, m in zip(axis.shape, out.shape, strict=True)):
            raise AssertionError(f"{name}: axis of shape {tuple(axis.shape)} for a tensor of shape {tuple(out.shape)}")
    return axes
