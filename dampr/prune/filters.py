"""The arguments ``include`` and ``exclude``: which layers are meant by globs of names, and by types."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

Filter = Sequence[str | type] | str | type | None


def wanted(aliases: list[tuple[str, nn.Module]], include: Filter, exclude: Filter) -> bool:
    """Whether a layer is included and not excluded.

    ``aliases``: (name, module) of the layer, under all its names, and of the modules that it is a part of.
    """
    included = any(_hits(*alias, include, "include", default=True) for alias in aliases)
    return included and not any(_hits(*alias, exclude, "exclude", default=False) for alias in aliases)


def _hits(name: str, layer: nn.Module, wanted: Filter, argument: str, default: bool) -> bool:
    """Whether one of the globs or types in ``wanted`` fits the layer; ``default`` if it is None.

    Raises: TypeError, naming the ``argument``, for a rule that is neither a string nor a type.
    """
    if wanted is None:
        return default
    rules = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
    for rule in rules:
        if not isinstance(rule, (str, type)):
            raise TypeError(f"{argument}={rule!r}: expected name globs and types")
    return any(fnmatchcase(name, rule) if isinstance(rule, str) else type(layer) is rule for rule in rules)
