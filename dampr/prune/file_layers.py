"""Layers of torch.nn and dampr.nn as data, and layers built from such data."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from typing import Any

import torch
from torch import nn

from dampr import nn as dampr_nn

from . import composites
from .file_content import Content, FileError, is_size

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def describe(module: nn.Module) -> dict[str, Any]:
    kind = type(module)
    parts = composites.parts_of(module)
    if parts is not None:
        return {
            "type": kind.__name__,
            "arguments": parts[0],
            "children": {name: describe(child) for name, child in parts[1].items()},
        }
    if getattr(nn, kind.__name__, None) is not kind:
        raise TypeError(f"{kind.__name__} is not a class of torch.nn")
    if isinstance(module, _CONTAINERS):
        children = {name: describe(child) for name, child in module._modules.items()}  # type: ignore[arg-type]
        return {"type": kind.__name__, "children": children}
    if module._modules:
        raise TypeError(f"{kind.__name__} has layers in it")
    return {"type": kind.__name__, "arguments": arguments_of(module, kind)}


def describe_leftovers(model: nn.Module) -> dict[str, Any]:
    """The outermost layers of dampr.nn in a model by name, as far as data can tell what they are,
    and what stands for nothing at all.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if type(module) is nn.Identity or composites.is_own(module):
            with contextlib.suppress(TypeError):
                found[name] = describe(module)
    return found


def parameters_of(kind: type[Any]) -> dict[str, Any]:
    """The constructor's parameters and their defaults; recurrent layers pass theirs on to nn.RNNBase."""
    recurrent = issubclass(kind, nn.RNNBase)
    signature = inspect.signature(nn.RNNBase if recurrent else kind)
    named = {n: p.default for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if recurrent:
        named = {k: v for k, v in named.items() if k != "mode"} | ({"nonlinearity": "tanh"} if kind is nn.RNN else {})
    return {name: default for name, default in named.items() if name not in ("device", "dtype", "process_group")}


def arguments_of(module: nn.Module, kind: type[Any]) -> dict[str, Any]:
    """The constructor's arguments, from the attributes of the same names,
    as far as there are any and they are not the defaults.
    """
    arguments: dict[str, Any] = {}
    for name, default in parameters_of(kind).items():
        if hasattr(module, name):
            value = getattr(module, name)
            value = value is not None if name == "bias" and not isinstance(value, bool) else value
            if type(value) is not type(default) or value != default:
                arguments[name] = value
    return arguments


def build(description: Any, content: Content, depth: int = 0) -> nn.Module:
    """A model from its description, with tensors that take no memory."""
    where = f"{content.where}: architecture"
    if not isinstance(description, dict) or not isinstance(description.get("type"), str):
        raise FileError(f"{where}: {description!r} has to be an object with a type")
    if description["type"] in composites.BUILDERS:
        return _build_composite(description, content, depth)
    kind = getattr(nn, description["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module):
        raise FileError(f"{where} names {description['type']!r}: expected a class of torch.nn")
    parts = description.get("children" if issubclass(kind, _CONTAINERS) else "arguments")
    if not isinstance(parts, dict):
        raise FileError(f"{where}: torch.nn.{kind.__name__} comes without children or arguments")
    if issubclass(kind, _CONTAINERS):
        container = kind()
        for name, child in parts.items():
            if not name or "." in name or hasattr(container, name) or depth > 100:
                raise FileError(f"{where}: {name!r} cannot be in torch.nn.{kind.__name__}")
            container.add_module(name, build(child, content, depth + 1))
        return container
    # a count that takes time even without memory
    layers = [value for name, value in parts.items() if name.endswith("_layers")]
    if set(parts) - set(parameters_of(kind)) or not all(is_size(n) and n <= len(content.state) for n in layers):
        raise FileError(f"{where}: torch.nn.{kind.__name__} does not take {parts}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in parts.items()}
    _check_kinds(parameters_of(kind), given, f"{where}: torch.nn.{kind.__name__}")
    return construct(kind, given, where)


def _check_kinds(parameters: dict[str, Any], given: dict[str, Any], where: str) -> None:
    """Raise FileError for what is not of the kind of a constructor's default; those of torch look at few arguments."""
    for name, value in given.items():
        default = parameters.get(name)
        if isinstance(default, bool):
            fits = isinstance(value, bool)
        elif isinstance(default, float):
            fits = _is_number(value) or (value is None and name == "momentum")
        elif isinstance(default, int):
            whole = all(map(_is_whole, value)) if isinstance(value, tuple) else _is_whole(value)
            fits = whole or (isinstance(value, str) and name == "padding")
        else:
            fits = not isinstance(value, float) or _is_number(value)
        if not fits:
            raise FileError(f"{where} does not take {name}={value!r:.80}, expected something like {default!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _build_composite(description: dict[str, Any], content: Content, depth: int) -> nn.Module:
    arguments, children = description.get("arguments"), description.get("children")
    if (
        not isinstance(arguments, dict)
        or not isinstance(children, dict)
        or depth > 100
        or {"device", "dtype", *children} & set(arguments)
    ):
        raise FileError(
            f"{content.where}: architecture: {description['type']} comes without arguments and children of its own"
        )
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    maker = composites.BUILDERS[description["type"]]
    layer: type[Any] = getattr(nn, description["type"], None) or getattr(dampr_nn, description["type"])
    _check_kinds(parameters_of(layer), given, f"{content.where}: architecture: {description['type']}")
    parts = given | {name: build(child, content, depth + 1) for name, child in children.items()}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return maker(**parts)
    except Exception as error:
        raise FileError(
            f"{content.where}: architecture: {description['type']} does not take {arguments} ({error})"
        ) from error


def construct(kind: type[Any], arguments: dict[str, Any], where: str) -> nn.Module:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(**arguments)
    except Exception as error:  # whatever torch's constructors make of values that are not theirs
        raise FileError(f"{where}: torch.nn.{kind.__name__} does not take {arguments} ({error})") from error
