"""A PTX function as Python: each basic block becomes a Python function over the registers of a batch of CTAs.

A register is an array of unsigned integers of its width with an element for each thread, or one number where all
threads agree. In the code of a block, ``r`` is the list of registers, ``M`` the machine, ``m`` the mask of the threads
that run it (None: all), and ``P`` the parameters by name.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

from tests.emulator import arithmetic
from tests.emulator.arithmetic import BITS, DTYPES, RAW, SHORT, WIDTH, f4, f8, i2, i4, i8, u4, u8
from tests.emulator.memory import Trap
from tests.emulator.ptx import Function, Instruction

_ENDS_BLOCK = ("bra", "ret", "exit", "trap")
_HELPERS = ("bf16_to_f32", "f32_to_bf16", "to_integer", "divide", "fma32", "pairs", "when", "permute_bytes")
_SPECIAL = {"%tid": "M.tid", "%ntid": "u4(M.threads)", "%laneid": "M.lane.astype(u4)"}


class NotEmulated(Exception):
    """Says what about an instruction is not known. The program traps only when it reaches that instruction."""


class Program:
    """A PTX function whose basic blocks are translated to Python when they are first reached."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.index = {name: i for i, name in enumerate(function.registers)}
        starts = {0, *function.labels.values()}
        starts |= {
            i + 1 for i, ins in enumerate(function.instructions) if ins.operation in _ENDS_BLOCK or ins.is_barrier
        }
        self.starts = sorted(s for s in starts if s < len(function.instructions))
        self.ends = dict(zip(self.starts, [*self.starts[1:], len(function.instructions)], strict=True))
        self.code: dict[tuple[int, bool], Any] = {}
        self.constants = 0
        self.namespace: dict[str, Any] = {
            **{name: getattr(arithmetic, name) for name in (*SHORT.values(), *_HELPERS)},
            "np": np,
            "Trap": Trap,
        }

    def fresh_registers(self) -> list[Any]:
        """Registers full of zeros, each one number for all threads."""
        return [np.bool_(False) if kind == "pred" else RAW[WIDTH[kind]](0) for kind in self.function.registers.values()]

    def block(self, start: int, masked: bool) -> Any:
        """The Python function of the block that begins at instruction ``start``; ``masked`` if only a part of the
        threads runs it.
        """
        if (start, masked) not in self.code:
            lines = ["def block(r, M, m, P):"]
            for number in range(start, self.ends[start]):
                lines += self._lines(self.function.instructions[number], masked)
            lines.append(" return None")
            exec(compile("\n".join(lines), f"<{self.function.name} at {start}>", "exec"), self.namespace)
            self.code[start, masked] = self.namespace.pop("block")
        return self.code[start, masked]

    def _lines(self, ins: Instruction, masked: bool) -> list[str]:
        """The Python lines of one instruction; a line that raises Trap for an instruction that is not emulated."""
        from tests.emulator.instructions import translate  # which needs this module's names

        active, lines = ("m" if masked else "None"), []
        if ins.guard is not None:
            guard = f"{'~' if ins.negated else ''}r[{self.index[ins.guard]}]"
            if ins.operation == "bra":
                return [f" return {guard}"]
            lines.append(f" a = M.full({guard}{' & m' if masked else ''})")
            active = "a"
        try:
            return lines + translate(self, ins, active, f"'{ins.where} [{ins.text[:70]}]'".replace("\\", ""))
        except (NotEmulated, KeyError, ValueError, IndexError, TypeError, StopIteration) as error:
            return [*lines, f" raise Trap({f'not emulated: {ins.text}, {ins.where} ({error!r})'!r})"]

    def constant(self, value: Any) -> str:
        """The Python name of a constant, which is added to the blocks' namespace."""
        name = f"k{self.constants}"
        self.constants += 1
        self.namespace[name] = value
        return name

    def get(self, operand: str, kind: str) -> str:
        """A Python expression for the value of an operand as ``kind``."""
        if operand in self.index:
            return self._register(operand, kind)
        if operand in self.function.shared_symbols:
            return self.constant(DTYPES[kind](0))
        special = _special(operand)
        return self.constant(literal(operand, kind)) if special is None else special

    def _register(self, operand: str, kind: str) -> str:
        """A Python expression for the value of a register as ``kind``."""
        declared, text = self.function.registers[operand], f"r[{self.index[operand]}]"
        if declared == "pred" or kind == "pred":
            return text
        if WIDTH[kind] != WIDTH[declared]:
            text = f"{text}.astype({SHORT[RAW[WIDTH[kind]]]})"
        dtype = DTYPES[kind]
        return text if dtype is RAW[WIDTH[kind]] else f"{text}.view({SHORT[dtype]})"

    def put(self, operand: str, text: str, kind: str, active: str) -> str:
        """A Python line that assigns ``text``, an expression of ``kind``, to a register of the ``active`` threads."""
        if operand == "_":
            return f" {text}"
        declared, place = self.function.registers[operand], f"r[{self.index[operand]}]"
        if declared != "pred" and kind != "pred":
            text = _as_register(text, kind, WIDTH[declared])
        return f" {place} = {text}" if active == "None" else f" {place} = when({active}, {text}, {place})"

    def address(self, operand: str, kind: str) -> str:
        """A Python expression for the address ``[base + offset]``."""
        base, _, offset = operand.strip("[] ").partition("+")
        text = self.get(base.strip(), kind)
        return f"({text} + {self.get(offset.strip(), kind)})" if offset and int(offset, 0) else text


def literal(operand: str, kind: str) -> Any:
    """The numpy scalar of a constant in PTX, such as ``0f3F800000`` or ``-5``, as ``kind``."""
    if kind == "pred":
        return np.bool_(int(operand, 0) != 0)
    dtype = DTYPES[kind]
    if re.match("0[fF]", operand):
        value = f4(struct.unpack(">f", bytes.fromhex(operand[2:]))[0])
        return value if dtype is f4 else value.view(u4) if WIDTH[kind] == 4 else dtype(value)
    if re.match("0[dD]", operand):
        double = f8(struct.unpack(">d", bytes.fromhex(operand[2:]))[0])
        return double if dtype is f8 else double.view(u8)
    raw = RAW[WIDTH[kind]](int(operand.rstrip("U"), 0) & (2 ** (8 * WIDTH[kind]) - 1))
    return raw if dtype is raw.dtype.type else raw.view(dtype)


def _as_register(text: str, kind: str, wanted: int) -> str:
    """A Python expression for ``text`` of ``kind`` as the unsigned integer of ``wanted`` bytes that a register holds;
    signed values are extended by their sign.
    """
    dtype = DTYPES[kind]
    if WIDTH[kind] == wanted:
        return text if dtype is RAW[wanted] else f"({text}).view({SHORT[RAW[wanted]]})"
    if not np.issubdtype(dtype, np.signedinteger):
        return f"({text}).astype({SHORT[RAW[wanted]]})"
    signed: Any = {8: i8, 4: i4, 2: i2}[wanted]
    return f"({text}).astype({SHORT[signed]}).view({SHORT[RAW[wanted]]})"


def _special(operand: str) -> str | None:
    """A Python expression for a special register such as ``%tid.x``; None for any other operand."""
    name, _, axis = operand.partition(".")
    if name in ("%ctaid", "%nctaid"):
        return f"M.{name[1:]}[{'xyz'.index(axis)}]"
    if name in ("%tid", "%ntid") and axis in ("y", "z"):
        return "u4(0)" if name == "%tid" else "u4(1)"
    return _SPECIAL.get(name)


def raw_kind(kind: str) -> str:
    """The untyped kind of the same width, such as "b32" for "f32"."""
    return BITS[WIDTH[kind]]
