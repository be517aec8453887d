"""How the house is built, where a linter does not look."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import dampr

ROOT = Path(dampr.__file__).parents[1]
SOURCES = sorted((ROOT / "dampr").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES}
# modules that are private to the package, not to a file
SHARED = {"_checks", "_progress", "_version", "__version__", "_C"}


def crossing(path: Path) -> Iterator[str]:
    """Private names of other modules of the package that a module uses."""
    tree, place = ast.parse(path.read_text()), path.relative_to(ROOT).with_suffix("").parts
    known: dict[str, str] = {}  # local name -> module
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        above = place[: len(place) - node.level] if node.level else ()
        base = ".".join((*above, *([node.module] if node.module else [])))
        if not base.startswith("dampr"):
            continue
        for alias in node.names:
            if f"{base}.{alias.name}" in MODULES:
                known[alias.asname or alias.name] = f"{base}.{alias.name}"
            elif alias.name.startswith("_") and alias.name not in SHARED:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {base}.{alias.name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name) or node.value.id not in known:
            continue
        if node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in SHARED:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {known[node.value.id]}.{node.attr}"


def test_no_module_uses_a_private_name_of_another() -> None:
    assert len(SOURCES) > 100
    assert [use for path in SOURCES for use in crossing(path)] == []


def test_private_parts_of_torch_stand_in_one_module() -> None:
    private = re.compile(
        r"(torch|ops\.aten|environ|profiler|forward_ad)\._(?!_)|ops\.mkldnn|super\([\w.]*Function,|_dynamo_marked"
    )
    rooms = [path for path in SOURCES if {"ops", "nn"} & {*path.relative_to(ROOT).parts} and path.name != "_torch.py"]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in rooms
        for line in path.read_text().splitlines()
        if private.search(re.sub(r"``.*?``", "", line))
    ]
    assert len(rooms) > 40
    assert found == []
