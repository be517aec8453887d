"""Run operators on meta tensors, which have shapes and no values, and remember the shape of each result.

torch takes milliseconds for many an operator even without values, and a model has many equal blocks. A call like an
earlier one gets new tensors of the remembered form instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .values import with_tensors

_MANY = 50_000  # with more remembered calls than this, all are forgotten
_PLAIN = (Tensor, nn.Parameter)
_KEYS = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Form(NamedTuple):
    """Shape, strides and dtype of a meta tensor: all that results on it depend on."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


_known: dict[Any, Any] = {}
_ITSELF = object()  # remembered instead of a form: the call returns its first argument, changed in place


class _UnknownError(Exception):
    """Raised for a call that cannot be remembered, because an argument or a result is of another type than those
    expected.
    """


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` on meta tensors.

    If a call with the same operator, forms and numbers was remembered, new tensors of the same form are returned, or
    the first argument if the operator changes that in place.
    """
    if func is torch.ops.aten.native_batch_norm.default and not kwargs:
        found = _batch_norm(*args)
        if found is not None:
            return found
    try:
        key: Any = _key(func, args, kwargs) if func.namespace == "aten" else None
    except _UnknownError:
        key = None
    if key is None:
        return func(*args, **kwargs)
    if key in _known:
        form = _known[key]
        return args[0] if form is _ITSELF else _made(form)
    found = func(*args, **kwargs)
    try:
        form = _form(found)
        if func._schema.is_mutable:
            if found is not args[0] or _key(func, args, kwargs) != key:
                return found
            form = _ITSELF
    except _UnknownError:
        return found
    if len(_known) >= _MANY:
        _known.clear()
    _known[key] = form
    return found


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...] | None:
    """What ``native_batch_norm`` returns; torch decomposes it into operators without values, which takes milliseconds.

    None if the sizes do not fit, or strides are neither those of a contiguous nor of a channels-last tensor.
    """
    dense = (
        x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()
    )
    channels = x.shape[1:2]
    if not dense or any(t is not None and t.shape != channels for t in (weight, bias, mean, variance)):
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    statistics = [x.new_empty(channels if training else 0, dtype=dtype) for _ in range(2)]
    return torch.empty_like(x), *statistics


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the result of a call depends on, hashable. Raises :class:`_UnknownError` for arguments of other types."""
    parts = [_part(value) for value in args]
    if kwargs:
        parts += [(name, _part(value)) for name, value in kwargs.items()]
    return func, torch.get_default_dtype(), tuple(parts)


def _part(value: Any) -> Any:
    """One argument as a part of the key: the form of a tensor, or the value of a number, with its type."""
    kind = type(value)
    if kind in _PLAIN:
        return _form(value)
    if kind in (list, tuple, torch.Size):
        return tuple(_part(inner) for inner in value)
    if kind in _KEYS:
        return kind, value
    raise _UnknownError


def _form(found: Any) -> Any:
    """The forms of the tensors that a call returned, in the same nesting. Raises :class:`_UnknownError` for other
    results.
    """
    if type(found) in _PLAIN:
        if found.is_meta and found.layout is torch.strided and not found.is_complex():
            return _Form(found.shape, found.stride(), found.dtype)
    elif found is None:
        return None
    elif type(found) in (list, tuple):
        return type(found)(map(_form, found))
    raise _UnknownError


def _made(form: Any) -> Any:
    """New meta tensors of these forms."""
    if type(form) is _Form:
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
    return None if form is None else type(form)(map(_made, form))


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value``, the arguments or results of an operator, with ``function(tensor)`` in place of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, inner) for inner in value])
    if isinstance(value, dict):
        return {name: mapped(function, inner) for name, inner in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in ``value``, the arguments or results of an operator, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for inner in value for t in tensors_of(inner)]


def to_meta(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of an operator, with device "meta" if the operator has such an argument."""
    if "device" in kwargs or any(argument.name == "device" for argument in func._schema.arguments):
        return {**kwargs, "device": torch.device("meta")}
    return kwargs


class OnMeta(TorchDispatchMode):
    """A mode in which operators get meta tensors in place of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def of(example_inputs: Any) -> Any:
        """The example inputs as meta tensors."""
        return with_tensors(lambda t: t.to("meta"), example_inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.name().startswith("aten::lift_fresh"):
            return func(*args, **kwargs)
        args, kwargs = mapped(self._twin, args), mapped(self._twin, kwargs)
        return computed(func, args, to_meta(func, kwargs))

    def _twin(self, tensor: Tensor) -> Tensor:
        """The meta tensor in place of ``tensor``, always the same one."""
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._twins or self._twins[id(tensor)][1].shape != tensor.shape:
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._twins[id(tensor)] = tensor, twin
        return self._twins[id(tensor)][1]
