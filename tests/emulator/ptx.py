"""A parser for the PTX that Triton prints: one entry function with its registers, instructions and labels."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import NamedTuple

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_SPACE = re.compile(r"\s*")
_LABEL = re.compile(r"\s*([$\w]+):(?!:)")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s*)?(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?([$\w]+)(\[\d+\])?\s*$"
)
_REG = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_NAME = re.compile(r"%?[A-Za-z_$][\w$]*")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([$\w]+)\[")


@dataclass
class Instruction:
    """``@guard opcode operands``; ``where``: the line of Triton source that it came from."""

    opcode: str
    operands: list[str]
    guard: str | None  # a predicate register
    negated: bool
    where: str
    text: str

    @property
    def operation(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.split(".", 1)[0]

    @property
    def suffixes(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def is_barrier(self) -> bool:
        """Whether it is a barrier of the whole CTA."""
        return self.opcode.startswith(("bar.sync", "barrier.sync", "barrier.cta.sync"))


@dataclass
class Function:
    """An entry function: parameters as (name, type) in order, threads of a CTA, types of registers by name,
    instructions, and for each label the index of its instruction.
    """

    name: str
    params: list[tuple[str, str]]
    threads: int
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared_symbols: list[str] = field(default_factory=list)


def parse(text: str) -> Function:
    """The entry function of a PTX module. Raises ValueError for text that is not laid out as Triton lays it out."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    text = _COMMENT.sub("", text)
    entry = re.search(r"\.entry\s+([$\w]+)\s*\((.*?)\)(.*?)\{", text, re.S)
    if entry is None:
        raise ValueError("the PTX has no entry function")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    if threads is None:
        raise ValueError(f"{entry[1]}: its PTX does not say how many threads a CTA has")
    function = Function(entry[1], [_param(part) for part in entry[2].split(",") if part.strip()], int(threads[1]))
    function.shared_symbols = _SHARED.findall(text[: entry.start()])
    _Reader(text[entry.end() :], function, files).read()
    return function


def elements(operand: str) -> list[str]:
    """The members of ``{a, b}``, or the operand itself."""
    return [part.strip() for part in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


def _param(text: str) -> tuple[str, str]:
    """(name, type) of a parameter's declaration. Raises ValueError for text of another form."""
    found = _PARAM.search(" ".join(text.split()))
    if found is None:
        raise ValueError(f"parameter {text!r}: expected a .param declaration")
    return found[2], found[1]


def _operands(text: str) -> list[str]:
    """Split operands at the commas that stand in no bracket."""
    found, depth, current = [], 0, ""
    for char in text:
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += char
    return [*found, current.strip()] if current.strip() else found


class _Scope(NamedTuple):
    """A scope that is open: its number, the unique names of what it declares, and of these its labels; ``first``: the
    number of its first instruction.
    """

    number: int
    names: dict[str, str]
    labels: dict[str, str]
    first: int

    def unique(self, name: str) -> str:
        """The unique name of what the scope declares under a name; the body of a function keeps its names."""
        return f"{name}@{self.number}" if self.number else name


class _Reader:
    """Reads the body of a function into a :class:`Function`.

    Inline assembly opens scopes with names of their own, which are made unique by adding the scope's number.
    """

    def __init__(self, text: str, function: Function, files: dict[str, str]) -> None:
        self.text, self.function, self.files = text, function, files
        self.position, self.where, self.opened = 0, "", 0
        self.scopes = [_Scope(0, {}, {}, 0)]  # those that are open, innermost last

    def read(self) -> None:
        """Read everything up to the end of the body. Raises ValueError for a directive that is not emulated."""
        while self.scopes:
            found = _SPACE.match(self.text, self.position)
            assert found is not None
            self.position = found.end()
            if self.position >= len(self.text):
                return
            if self._scope() or self._location() or self._label():
                continue
            end = self.text.index(";", self.position)
            self._statement(" ".join(self.text[self.position : end].split()))
            self.position = end + 1

    def _scope(self) -> bool:
        """Open or close a scope at a brace; whether there was one."""
        char = self.text[self.position]
        if char == "}":
            self._close(self.scopes.pop())
        elif char == "{":
            self.opened += 1
            self.scopes.append(_Scope(self.opened, {}, {}, len(self.function.instructions)))
        else:
            return False
        self.position += 1
        return True

    def _close(self, scope: _Scope) -> None:
        """Give the branches of a scope to labels that stand behind them the unique names of these."""
        if scope.labels:
            found = self.function.instructions
            for at in range(scope.first, len(found)):
                operands = [scope.labels.get(operand, operand) for operand in found[at].operands]
                found[at] = dataclasses.replace(found[at], operands=operands)

    def _location(self) -> bool:
        """Take the source line from a ``.loc`` and skip a ``.file``; whether there was one."""
        if not self.text.startswith((".loc", ".file"), self.position):
            return False
        end = self.text.index("\n", self.position)
        parts = self.text[self.position : end].replace(",", " ").split()
        if parts[0] == ".loc" and parts[2] != "0":
            name = self.files.get(parts[1], parts[1]).rsplit("/", 1)[-1]
            self.where = f"{name}:{parts[2]}"
        self.position = end
        return True

    def _label(self) -> bool:
        """Record a label; whether there was one."""
        found = _LABEL.match(self.text, self.position)
        if found is None:
            return False
        scope = self.scopes[-1]
        unique = scope.labels[found[1]] = scope.unique(found[1])
        self.function.labels[unique] = len(self.function.instructions)
        self.position = found.end()
        return True

    def _statement(self, statement: str) -> None:
        """Read a statement: a declaration of registers or an instruction."""
        if not statement or statement.startswith(".pragma"):
            return
        declared = _REG.match(statement)
        if declared is not None:
            self._declare(declared[1], declared[2])
        elif statement.startswith("."):
            raise ValueError(f"not emulated: the directive {statement!r}")
        else:
            self.function.instructions.append(self._instruction(statement))

    def _declare(self, kind: str, listed: str) -> None:
        """Record the registers that are listed, such as ``%r<3>`` for %r0, %r1 and %r2, as of type ``kind``."""
        for part in listed.split(","):
            name = part.strip()
            many = re.fullmatch(r"(%\w+?)<(\d+)>", name)
            for plain in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = self.scopes[-1].names[plain] = self.scopes[-1].unique(plain)
                self.function.registers[unique] = kind

    def _instruction(self, text: str) -> Instruction:
        """The instruction of a statement, with names made unique."""
        statement = _NAME.sub(self._resolve, text) if len(self.scopes) > 1 else text
        guard, negated = None, False
        guarded = re.match(r"@(!?)(\S+)\s+(.*)", statement)
        if guarded is not None:
            guard, negated, statement = guarded[2], guarded[1] == "!", guarded[3]
        opcode, _, rest = statement.partition(" ")
        return Instruction(opcode, _operands(rest), guard, negated, self.where, text)

    def _resolve(self, match: re.Match[str]) -> str:
        """The unique name of a name, that of the innermost scope which declares it."""
        return next((scope.names[match[0]] for scope in reversed(self.scopes) if match[0] in scope.names), match[0])
