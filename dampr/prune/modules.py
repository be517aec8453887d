"""Find the modules of a type in a model; a module that has several names is found once."""

from __future__ import annotations

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
