"""What a layer is called with: by position or by keyword."""

from __future__ import annotations

from typing import Any


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor that a layer reads: its first argument, by position or as the keyword ``input`` (the name in torch's
    layers) or the first keyword; None if there is no argument.
    """
    if args:
        return args[0]
    return kwargs.get("input", next(iter(kwargs.values()), None))


def with_first(args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) with another value in place of what :func:`first_argument` returns."""
    if args:
        return (value, *args[1:]), kwargs
    name = "input" if "input" in kwargs else next(iter(kwargs))
    return (), kwargs | {name: value}
