"""Deep copies of modules, with the result of ``copy.deepcopy`` and several times as fast."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# types whose values a deep copy shares
_AS_IT_IS = {int, float, bool, complex, str, bytes, type, type(None), BuiltinFunctionType, torch.dtype}
_MAKE = vars(copyreg)["__newobj__"]  # the function that pickle calls for objects made by ``cls.__new__`` alone
_MAPPINGS = (dict, OrderedDict)
_PARTS: Any = "the ids of the modules that are copied"  # a key of memos, beside ids


def deep(module: nn.Module, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(module, memo)``, in which functions that hold parts of the module hold those of the copy.

    Such a function is ``layer.forward = lambda x: 2 * old(x)``, or a hook. What Python cannot copy, such as a lock, is
    shared. Numbers, names and the dozen empty dicts for hooks of every module are copied here, which is fast. Other
    values, and modules that define how they are copied, are left to ``copy.deepcopy``.
    """
    if id(module) in memo:
        return memo[id(module)]
    if _PARTS not in memo:
        memo[_PARTS] = {id(part) for part in module.modules()}
    parts: Any = None if hasattr(type(module), "__deepcopy__") else module.__reduce_ex__(4)
    # (constructor, its arguments, state, items of a list, items of a dict)
    if (
        type(parts) is not tuple
        or len(parts) < 3
        or type(parts[2]) is not dict
        or any(p is not None for p in parts[3:])
    ):
        return copy.deepcopy(module, memo)
    memo[id(module)] = made = parts[0](*(_value(one, memo) for one in parts[1]))
    state: dict[str, Any] = {}
    for name, value in parts[2].items():
        kept = type(value)
        if kept in _AS_IT_IS:
            state[name] = value
        elif kept in _MAPPINGS and not value and id(value) not in memo:
            state[name] = memo[id(value)] = kept()
        else:
            state[name] = _value(value, memo)
    made.__setstate__(state)
    return made


def value(one: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(one, memo)`` of an object that is not a module."""
    memo[_PARTS] = set()
    return _value(one, memo)


def _value(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of one attribute's value."""
    kind: Any = type(value)
    if kind in _AS_IT_IS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return deep(value, memo)
    if kind in (FunctionType, partial):
        return _function(value, memo) if _holds_parts(value, memo[_PARTS], set()) else value
    if kind in _MAPPINGS:
        memo[id(value)] = made = kind()
        for key, inner in value.items():
            made[_value(key, memo)] = _value(inner, memo)
        return made
    if kind is list:
        memo[id(value)] = listed = list[Any]()
        listed.extend(_value(inner, memo) for inner in value)
        return listed
    if kind is tuple:
        if all(type(inner) in _AS_IT_IS for inner in value):  # such as the size of a kernel
            return value
        several = tuple(_value(inner, memo) for inner in value)
        return memo.setdefault(id(value), several)  # a tuple that is reached again from within has its copy already
    if kind is set and not value:
        memo[id(value)] = empty = set[Any]()
        return empty
    if kind is ReferenceType:
        return ref(_value(value(), memo)) if _holds_parts(value, memo[_PARTS], set()) else value
    try:
        state = _state_of(value)
        if state is None:
            return copy.deepcopy(value, memo)
    except TypeError:  # Python cannot copy it: a lock, a file, a generator
        return value
    memo[id(value)] = made = kind.__new__(kind)
    vars(made).update((name, _value(inner, memo)) for name, inner in state.items())
    return made


def _state_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that ``copy.deepcopy`` would copy one by one; None for other objects."""
    kind = type(value)
    own = ("__deepcopy__", "__setstate__")
    if isinstance(value, (Tensor, type)) or not hasattr(value, "__dict__") or any(hasattr(kind, name) for name in own):
        return None
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return None
    parts: Any = value.__reduce_ex__(4)  # (constructor, its arguments, state, items of a list, items of a dict)
    plain = parts[:2] == (_MAKE, (kind,)) and all(part is None for part in parts[3:])
    return parts[2] if plain and type(parts[2]) is dict else None


def _function(function: Any, memo: dict[int, Any]) -> Any:
    """A copy of a function, or partial function, that holds copies of the parts of the module that it holds."""

    def inner(content: Any) -> Any:
        return _value(content, memo) if _holds_parts(content, memo[_PARTS], set()) else content

    made: Any
    if isinstance(function, partial):
        keywords = {name: inner(value) for name, value in function.keywords.items()}
        made = partial(inner(function.func), *map(inner, function.args), **keywords)
    else:
        cells = tuple(CellType() for _ in function.__closure__)
        made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
        made.__kwdefaults__ = function.__kwdefaults__
        memo[id(function)] = made  # before its closure, which may hold the function itself
        for cell, own in zip(cells, function.__closure__, strict=True):
            with suppress(ValueError):  # a cell without a value yet
                cell.cell_contents = inner(own.cell_contents)
    memo[id(function)] = made
    vars(made).update((name, inner(value)) for name, value in vars(function).items())
    return made


def _holds_parts(value: Any, parts: set[int], seen: set[int]) -> bool:
    """Whether a value is one of these modules, a method of one, a weak reference to one, or a function with one in its
    closure.
    """
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, nn.Module):
        return id(value) in parts
    if isinstance(value, MethodType):
        return _holds_parts(value.__self__, parts, seen)
    if isinstance(value, ReferenceType):
        return _holds_parts(value(), parts, seen)
    if isinstance(value, partial):
        return any(_holds_parts(one, parts, seen) for one in (value.func, *value.args, *value.keywords.values()))
    if not isinstance(value, FunctionType):
        return False
    return any(_holds_parts(content, parts, seen) for content in _contents(value))


def _contents(function: Any) -> Iterator[Any]:
    """What the closure of a function holds."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            yield cell.cell_contents


def detached(model: nn.Module) -> dict[int, Any]:
    """id -> a detached copy, for every tensor with an autograd graph that modules keep in attributes.

    ``copy.deepcopy`` refuses such tensors; as a memo this makes it take the copies.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) in _AS_IT_IS or (isinstance(value, (dict, set)) and not value) or name == "_modules":
                continue
            for t in pytree.tree_leaves(value):
                if isinstance(t, Tensor) and not t.is_leaf:
                    found[id(t)] = t.detach().clone()
    return found
