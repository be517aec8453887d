"""Describe layers of torch.nn and dampr.nn as plain data for a file, and build layers from such data."""

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


def _is_container(kind: type) -> bool:
    return issubclass(kind, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def describe(module: nn.Module) -> dict[str, Any]:
    """A layer as plain data: its type, and its constructor's arguments or its children.

    Raises: TypeError for a layer that such data does not determine.
    """
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
    if _is_container(kind):
        children = {name: describe(child) for name, child in module._modules.items()}  # type: ignore[arg-type]
        return {"type": kind.__name__, "children": children}
    if module._modules:
        raise TypeError(f"{kind.__name__} has layers in it")
    return {"type": kind.__name__, "arguments": arguments_of(module, kind)}


def describe_leftovers(model: nn.Module) -> dict[str, Any]:
    """The outermost layers of dampr.nn and ``nn.Identity`` in a model: name -> description.

    Compaction leaves these in place of other layers of the dense model. Those that data cannot describe are left
    out.
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
    """The parameters of a type's constructor and their defaults, without device, dtype and process_group.

    Recurrent layers pass theirs on to nn.RNNBase, whose signature is read instead.
    """
    recurrent = issubclass(kind, nn.RNNBase)
    signature = inspect.signature(nn.RNNBase if recurrent else kind)
    named = {n: p.default for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if recurrent:
        named = {k: v for k, v in named.items() if k != "mode"} | ({"nonlinearity": "tanh"} if kind is nn.RNN else {})
    return {name: default for name, default in named.items() if name not in ("device", "dtype", "process_group")}


def arguments_of(module: nn.Module, kind: type[Any]) -> dict[str, Any]:
    """The constructor's arguments that a layer has as attributes of the same names, without those that equal the
    defaults.
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
    """Build a model from its description, on the meta device.

    Args:
        description: as :func:`describe` returns it, read from a file.
        content: the file, for messages and as a limit for counts of layers.
        depth: how many containers are around this one.

    Raises: FileError for a description that :func:`describe` cannot have written.
    """
    where = f"{content.where}: architecture"
    if not isinstance(description, dict) or not isinstance(description.get("type"), str):
        raise FileError(f"{where}: {description!r} has to be an object with a type")
    if description["type"] in composites.BUILDERS:
        return _build_composite(description, content, depth)
    kind = getattr(nn, description["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module):
        raise FileError(f"{where} names {description['type']!r}: expected a class of torch.nn")
    parts = description.get("children" if _is_container(kind) else "arguments")
    if not isinstance(parts, dict):
        raise FileError(f"{where}: torch.nn.{kind.__name__} comes without children or arguments")
    if _is_container(kind):
        container = kind()
        for name, child in parts.items():
            if not name or "." in name or hasattr(container, name) or depth > 100:
                raise FileError(f"{where}: {name!r} cannot be in torch.nn.{kind.__name__}")
            container.add_module(name, build(child, content, depth + 1))
        return container
    # A large number of layers would take long to build, even on the meta device.
    layers = [value for name, value in parts.items() if name.endswith("_layers")]
    if set(parts) - set(parameters_of(kind)) or not all(is_size(n) and n <= len(content.state) for n in layers):
        raise FileError(f"{where}: torch.nn.{kind.__name__} does not take {parts}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in parts.items()}
    _check_kinds(parameters_of(kind), given, f"{where}: torch.nn.{kind.__name__}")
    return construct(kind, given, where)


def _check_kinds(parameters: dict[str, Any], given: dict[str, Any], where: str) -> None:
    """Raise FileError if an argument has another type than the default of its parameter.

    The constructors of torch check few arguments.
    """
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
    """Whether a value is an integer (not a bool) that fits 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _build_composite(description: dict[str, Any], content: Content, depth: int) -> nn.Module:
    """Build a layer of :mod:`.composites` from its arguments and children. Raises FileError as :func:`build` does."""
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
    """A layer of this type on the meta device. Raises FileError if its constructor does not take the arguments."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(**arguments)
    except Exception as error:  # a constructor may raise anything for wrong values
        raise FileError(f"{where}: torch.nn.{kind.__name__} does not take {arguments} ({error})") from error
