"""Widths that stay because something that the examples do not show in evaluation may have them."""

from __future__ import annotations

from collections.abc import Iterable

from .partition import Units


def protected(units: Units, parameters: Iterable[str]) -> dict[int, str]:
    """class -> why it stays: because a parameter has it that only training reaches, or that no run reaches and that may
    have it.

    Args:
        units: the partition.
        parameters: the names of the model's parameters (a buffer that nothing reads is no sign of another way).
    """
    return units.in_training_alone() | _beside_unreached(units, set(parameters))


def _beside_unreached(units: Units, parameters: set[str]) -> dict[int, str]:
    """class -> why it stays, for widths that may lead into a module which no run reached.

    Such modules are experts to which no row of the examples goes, or the other branch of an ``if``. Beside modules with
    parameters of the same names and shapes they are taken to have the widths of these. Else they may have every width
    of one of their sizes that leads from one module beside them to another. A norm or a bias that nothing uses is often
    left over, so it says nothing, unless it stands in a list of others alike.
    """
    reached = [name for name in units.origin if units.reached.get(name)]
    found: dict[int, str] = {}
    for above, unseen in _highest(parameters.intersection(units.origin).difference(reached), reached):
        shapes = _shapes(units, parameters, above, unseen)
        beside = {part for name in reached if (part := _part(name, above)) is not None}
        alike = {part for part in beside if _shapes(units, parameters, above, part) == shapes}
        token = "" in shapes and _has_parts(reached, above)
        if alike != beside and not token and all(len(dims) < 2 for dims in shapes.values()):
            continue
        sizes = {size for own in shapes.values() for _, size in own}
        reason = (
            f"the example inputs do not reach {_joined(above, unseen)!r}, which may share its width: give inputs that "
            "do (dampr.Several), or remove it"
        )
        for name in reached:
            part = _part(name, above)
            for dim, _, size in units.origin[name] if part is not None else ():
                if part in alike or (not alike and size in sizes):
                    found |= {one: reason for one in set(units.classes(name, dim)) if _leads_on(units, one, above)}
    return found


def _highest(lost: Iterable[str], reached: Iterable[str]) -> set[tuple[str, str]]:
    """For each lost parameter, the largest module of which nothing is reached, or the parameter itself: (the name of
    what contains it, its own name there).
    """
    seen = {name[:at] for name in reached for at in (0, *(i for i, letter in enumerate(name) if letter == "."))}
    found = set()
    for name in lost:
        parts = name.split(".")
        depth = max((at for at in range(len(parts)) if ".".join(parts[:at]) in seen), default=None)
        if depth is not None:
            found.add((".".join(parts[:depth]), parts[depth]))
    return found


def _joined(above: str, part: str) -> str:
    """The full name of a part of the module ``above``."""
    return f"{above}.{part}" if above else part


def _part(name: str, above: str) -> str | None:
    """The part of the module ``above`` that holds a parameter, or is it; None for a parameter outside of it."""
    if above and not name.startswith(f"{above}."):
        return None
    return name.removeprefix(f"{above}.").split(".")[0]


def _has_parts(names: Iterable[str], above: str) -> bool:
    """Whether a parameter lies in a module within the module ``above``."""
    return any(name.removeprefix(above).lstrip(".").count(".") for name in names if _part(name, above) is not None)


def _shapes(units: Units, parameters: set[str], above: str, part: str) -> dict[str, list[tuple[int, int]]]:
    """The parameters of a part of a module: name there -> (dimension, size) of each dimension longer than 1."""
    path = _joined(above, part)
    return {
        name.removeprefix(path): [(dim, size) for dim, _, size in dims]
        for name, dims in units.origin.items()
        if name in parameters and (name == path or name.startswith(f"{path}."))
    }


def _leads_on(units: Units, one: int, above: str) -> bool:
    """Whether a class has members in more than one part of the module ``above``, or outside of it."""
    return len({_part(member.name, above) for member in units.members[one]}) > 1
