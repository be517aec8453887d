"""How the house is built, where a linter does not look."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def run_together(node: ast.AST) -> Iterator[str]:
    """Arguments and attributes that begin in the middle of a line of their section, where nobody finds them."""
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    parts = node.body if isinstance(node, ast.ClassDef) else [node]
    names = {a.target.id for a in parts if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)}
    for function in parts:
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names |= {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    section = re.compile(r"^(?:Args|Attributes):(.*?)(?:^\S|\Z)", re.MULTILINE | re.DOTALL)
    for text in section.findall(f"{ast.get_docstring(node) or ''}\n"):
        begun = re.findall(r"(?:^|(?<![.])[.:]) (?:\w+, )*(\w+): ", text, re.MULTILINE)
        yield from (f"{node.name}: {name}" for name in begun if name in names)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Args:\n        x: one.\n        y: two.", []),
        ("Args: x: one.\n        y: two.", ["f: x"]),
        ("Args:\n        x: one. y: two.", ["f: y"]),
        ("Args:\n        x: one, of which\n            some. y: two.", ["f: y"]),
        ("Returns: x. y: no section of arguments.", []),
    ],
)
def test_arguments_that_run_together_are_found(text: str, found: list[str]) -> None:
    (function,) = ast.parse(f'def f(x, y):\n    """It does.\n\n    {text}\n    """\n').body
    assert list(run_together(function)) == found


def test_each_argument_begins_a_line_of_its_docstring() -> None:
    nodes = [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    assert [f"{path.relative_to(ROOT)}: {said}" for path, node in nodes for said in run_together(node)] == []


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


TYPES_OF_LAYERS = re.compile(r"nn\.(?!Module$|Parameter$)\w[\w.]*|(\w+\.)?(Gated|Pruned)\w+|Scale|ScaledRNN|StackedRNN")
OF_LAYERS = 47  # type tests of layers in dampr/prune today; the aim was less than 60 of 198


def type_tests(sources: dict[str, str]) -> Iterator[str]:
    """``isinstance`` and ``issubclass`` with a class of layers, or with a constant that holds some."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    constants: set[str] = set()

    def of_layers(node: ast.AST) -> bool:
        found = (ast.unparse(n) for n in ast.walk(node) if isinstance(n, (ast.Attribute, ast.Name)))
        return any(TYPES_OF_LAYERS.fullmatch(name) or name.rpartition(".")[2] in constants for name in found)

    for tree in (*trees.values(), *trees.values()):  # twice, for constants of constants
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and of_layers(node.value):
                constants |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("isinstance", "issubclass") and of_layers(node.args[1]):
                yield f"{name}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("isinstance(m, nn.Linear)", 1),
        ("isinstance(m, (nn.Module, Tensor)) or isinstance(m, nn.Parameter)", 0),
        ("issubclass(m, nn.modules.conv._ConvNd)", 1),
        ("isinstance(m, dampr_nn.GatedLinear) or isinstance(m, Scale)", 2),
        ("isinstance(m, other._SOME) or isinstance(m, (*MORE, int))", 2),
        ("isinstance(m, int) and type(m) is nn.Linear", 0),
    ],
)
def test_type_tests_of_layers_are_found(line: str, count: int) -> None:
    sources = {"other.py": "_SOME = (nn.Linear, int)\nMORE = (*_SOME, str)\nNONE = (int, str)", "one.py": line}
    assert len(list(type_tests(sources))) == count


def test_what_a_kind_of_layer_is_stands_in_one_room() -> None:
    """A new branch by a layer's type belongs into its kind, dampr/prune/layers."""
    room = ROOT / "dampr" / "prune"
    sources = {str(p.relative_to(room)): p.read_text() for p in SOURCES if room in p.parents}
    found = [test for test in type_tests(sources) if not test.startswith("layers/")]
    assert len(found) <= OF_LAYERS, "\n".join(found)


NEEDS_TRITON = re.compile(r"(triton|tests\.emulator|dampr\.ops\.backend_triton)\b")


def needing_triton(text: str) -> Iterator[int]:
    """The lines of a test file that import what needs Triton before the file is skipped where there is none."""
    for node in ast.parse(text).body:
        if ast.unparse(node).startswith(("pytest.importorskip('triton'", "triton = pytest.importorskip('triton'")):
            return
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(NEEDS_TRITON.match(name) for name in names):
            yield node.lineno


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("import triton.language as tl", [1]),
        ("import torch\nfrom tests.emulator import driver", [2]),
        ("import pytest\npytest.importorskip('triton')\nfrom tests.emulator import driver", []),
        ("def test():\n    from tests.emulator import driver", []),
    ],
)
def test_imports_of_triton_are_found(text: str, lines: list[int]) -> None:
    assert list(needing_triton(text)) == lines


def test_tests_that_need_triton_are_skipped_without_it() -> None:
    """One import that fails stops ``make test-no-triton`` before its first test."""
    left_out = {ROOT / "tests" / "kernels", ROOT / "tests" / "interpreter"}
    run = [path for path in (ROOT / "tests").rglob("test_*.py") if left_out.isdisjoint(path.parents)]
    assert len(run) > 100
    found = [f"{path.relative_to(ROOT)}:{line}" for path in run for line in needing_triton(path.read_text())]
    assert found == []
