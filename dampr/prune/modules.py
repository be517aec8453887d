"""Find the modules of a type in a model; a module that has several names is found once."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, TypeVar, overload

from torch import nn

from dampr.gates import Gate

M = TypeVar("M")
Kinds = tuple[type[Any], ...]


@overload
def of_kind(model: nn.Module, kind: type[M]) -> list[M]: ...
@overload
def of_kind(model: nn.Module, kind: Kinds) -> list[Any]: ...
def of_kind(model: nn.Module, kind: Any) -> list[Any]:
    """The modules of type ``kind``, or of one of these types, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, kind)]


@overload
def by_name(model: nn.Module, kind: type[M]) -> dict[str, M]: ...
@overload
def by_name(model: nn.Module, kind: Kinds) -> dict[str, Any]: ...
def by_name(model: nn.Module, kind: Any) -> dict[str, Any]:
    """name -> module for the modules of type ``kind``, or of one of these types; the first name of each."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def gates_of(model: nn.Module) -> list[Gate]:
    """Every gate of a model, each once."""
    return [module for module in model.modules() if isinstance(module, Gate)]


def is_exactly(layer: nn.Module, types: Container[type]) -> bool:
    """Whether a layer does what one of these types does: its type is one of them, not derived, and nobody has given the
    object a ``forward`` of its own (``layer.forward = ...``).
    """
    return type(layer) in types and not has_own_forward(layer)


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a ``forward`` was set on the object, by other code than this package and torch."""
    own = vars(layer).get("forward")
    return own is not None and not getattr(getattr(own, "func", own), "__module__", "").startswith(("torch.", "dampr."))
