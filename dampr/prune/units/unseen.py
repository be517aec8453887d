"""Finds widths that must not be cut because a part of the model that the examples do not reach may depend on them.

A run reaches a parameter if an operator reads it. A class is an integer that stands for units which can be cut only
together; a member of a class is its part in one dimension of a parameter. ``above`` is the name of the module that
contains what is in question; "" for the model.
"""

from __future__ import annotations

from collections.abc import Iterable

from .partition import Units


def protected(units: Units, parameters: Iterable[str]) -> dict[int, str]:
    """Find the classes that must not be cut, because a parameter that evaluation does not reach depends on them.

    That is a parameter which only training reaches, or one which no run reaches and which may share the width.

    Args:
        units: the partition.
        parameters: the names of the model's parameters. Buffers do not count: one that no run reads does not mean that
            part of the model was not reached.

    Returns: class -> why it must not be cut.
    """
    return units.in_training_alone() | _beside_unreached(units, set(parameters))


def _beside_unreached(units: Units, parameters: set[str]) -> dict[int, str]:
    """Find the classes that stay because their width may lead into a module which no run reached.

    Such a module is an expert to which no row of the examples goes, or the other branch of an ``if``. Its widths are
    guessed from the modules in the same parent that a run reached:

    - If some of these have parameters of the same names and shapes, it has their widths.
    - Else it may have each width of one of its own sizes that connects a module of this parent to another module.

    An unreached module that has vectors alone is ignored, because an unused norm or bias is often left over. It is not
    ignored if all modules of the parent are like it, or if it is a bare parameter beside modules (a class token, say).

    Args:
        units: the partition.
        parameters: the names of the model's parameters.

    Returns: class -> why it stays.
    """
    reached = [name for name in units.origin if units.reached.get(name)]
    reasons: dict[int, str] = {}
    for above, unseen in _highest(parameters.intersection(units.origin).difference(reached), reached):
        shapes = _shapes(units, parameters, above, unseen)
        siblings = {part for name in reached if (part := _part(name, above)) is not None}
        alike = {part for part in siblings if _shapes(units, parameters, above, part) == shapes}
        token = "" in shapes and _has_parts(reached, above)
        if alike != siblings and not token and all(len(dims) < 2 for dims in shapes.values()):
            continue
        sizes = {size for lengths in shapes.values() for _, size in lengths}
        reason = (
            f"the example inputs do not reach {_joined(above, unseen)!r}, which may share its width: give inputs that "
            "do (dampr.Several), or remove it"
        )
        for name in reached:
            part = _part(name, above)
            for dim, _, size in units.origin[name] if part is not None else ():
                if part in alike or (not alike and size in sizes):
                    reasons |= {
                        class_id: reason
                        for class_id in set(units.classes(name, dim))
                        if _leads_on(units, class_id, above)
                    }
    return reasons


def _highest(lost: Iterable[str], reached: Iterable[str]) -> set[tuple[str, str]]:
    """For each parameter in ``lost``, the largest module that contains it and of which no run reached a parameter.

    Args:
        lost: the names of the parameters that no run reached.
        reached: the names of the parameters that a run reached.

    Returns: pairs (name of the module that contains the unreached one, name of the unreached one within it). If no such
    module exists, the pair names the parameter itself.
    """
    seen = {name[:at] for name in reached for at in (0, *(i for i, letter in enumerate(name) if letter == "."))}
    pairs = set()
    for name in lost:
        parts = name.split(".")
        depth = max((at for at in range(len(parts)) if ".".join(parts[:at]) in seen), default=None)
        if depth is not None:
            pairs.add((".".join(parts[:depth]), parts[depth]))
    return pairs


def _joined(above: str, part: str) -> str:
    """Return the full name of a part of the module ``above``, from its name within it."""
    return f"{above}.{part}" if above else part


def _part(name: str, above: str) -> str | None:
    """Return the name within ``above`` of the submodule that contains the parameter ``name``, or of the parameter
    itself.

    None for a parameter outside of the module ``above``.
    """
    if above and not name.startswith(f"{above}."):
        return None
    return name.removeprefix(f"{above}.").split(".")[0]


def _has_parts(names: Iterable[str], above: str) -> bool:
    """Return whether one of the parameters called ``names`` lies in a module within the module ``above``."""
    return any(name.removeprefix(above).lstrip(".").count(".") for name in names if _part(name, above) is not None)


def _shapes(units: Units, parameters: set[str], above: str, part: str) -> dict[str, list[tuple[int, int]]]:
    """Return the names and shapes of the parameters in a submodule, to compare it with the submodules beside it.

    Args:
        units: the partition.
        parameters: the names of the model's parameters; buffers are left out.
        above: the name of the module that contains the submodule; "" for the model itself.
        part: the name of the submodule, or of a parameter, within ``above``.

    Returns: name of a parameter within the submodule (".weight", or "" if ``part`` is a parameter) -> [(dimension,
    size)] of its dimensions longer than 1.
    """
    path = _joined(above, part)
    return {
        name.removeprefix(path): [(dim, size) for dim, _, size in dims]
        for name, dims in units.origin.items()
        if name in parameters and (name == path or name.startswith(f"{path}."))
    }


def _leads_on(units: Units, class_id: int, above: str) -> bool:
    """Return whether the class ``class_id`` has members in several submodules of the module ``above``, or outside of
    it.
    """
    return len({_part(member.name, above) for member in units.members[class_id]}) > 1
