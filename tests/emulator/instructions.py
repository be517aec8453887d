"""Translates a PTX instruction to lines of Python, with one function for each kind of instruction.

For example ``add.f32 %f3, %f1, %f2`` becomes ``r[3] = (r[1].view(f4) + r[2].view(f4)).view(u4)``. An instruction that
is not known raises :class:`NotEmulated`, which says what is not known about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.emulator.arithmetic import BITS, DTYPES, SHORT, WIDTH
from tests.emulator.program import NotEmulated, Program, raw_kind
from tests.emulator.ptx import Instruction, elements

_BINARY = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
_COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
# Comparisons that hold for NaN too: each is the negation of the ordered comparison given here.
_UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_ROUNDED = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
_HALVES = ("f16x2", "bf16x2", "bf16", "f16")
_MATRIX_KINDS = ("bf16", "f16", "tf32")
_WIDE = {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32"}
_HIGH = {"s32": ("i8", "i4"), "u32": ("u8", "u4")}
_SAME_WIDTH = {
    "add",
    "sub",
    "mul",
    "mad",
    "fma",
    "div",
    "rem",
    "min",
    "max",
    "and",
    "or",
    "xor",
    "not",
    "neg",
    "abs",
    "shl",
    "shr",
    "selp",
    "sqrt",
}
_FUNCTIONS = {
    "div": "{0} / {1}",
    "sqrt": "np.sqrt({0})",
    "rcp": "1.0 / {0}",
    "rsqrt": "1.0 / np.sqrt({0})",
    "ex2": "np.exp2({0})",
    "lg2": "np.log2({0})",
}


class Context:
    """An instruction that is being translated, with short names for reading its operands and writing its result."""

    def __init__(self, program: Program, ins: Instruction, active: str, at: str) -> None:
        self.program, self.ins, self.active, self.at = program, ins, active, at
        self.o, self.op, self.suffixes = ins.operands, ins.operation, ins.suffixes
        self.kind = self.suffixes[-1] if self.suffixes else ""

    def get(self, i: int, kind: str | None = None) -> str:
        """Python for the value of operand ``i`` as ``kind``, by default the instruction's own type."""
        return self.program.get(self.o[i], self.kind if kind is None else kind)

    def list_of(self, i: int, kind: str = "b32") -> str:
        """Python for the elements of the vector operand ``i``, separated by commas."""
        return ", ".join(self.program.get(e, kind) for e in elements(self.o[i]))

    def put(self, text: str, kind: str | None = None) -> list[str]:
        """A line that assigns the Python expression ``text`` to the first operand."""
        return [self.program.put(self.o[0], text, self.kind if kind is None else kind, self.active)]

    def put_each(self, kind: str = "b32", value: str = "t[{}]") -> list[str]:
        """Lines that assign the elements of the Python variable ``t`` to the registers of the first operand."""
        return [self.program.put(e, value.format(i), kind, self.active) for i, e in enumerate(elements(self.o[0]))]

    def address(self, i: int, kind: str) -> str:
        """Python for the address that operand ``i`` stands for."""
        return self.program.address(self.o[i], kind)

    def call(self, method: str, *arguments: str) -> str:
        """Python that calls a method of the machine, with the active threads and the instruction's place as last
        arguments.
        """
        return f"M.{method}({', '.join((*arguments, self.active, self.at))})"

    def unknown(self, what: str) -> NotEmulated:
        """The exception for an instruction of which the emulator does not know ``what``."""
        return NotEmulated(f"{self.ins.opcode}: {what}")


def translate(program: Program, ins: Instruction, active: str, at: str) -> list[str]:
    """The Python lines of one instruction, for the threads that the Python expression ``active`` masks ("None":
    all).
    """
    c = Context(program, ins, active, at)
    if ins.is_barrier:
        if c.o != ["0"] or ins.guard is not None:
            raise c.unknown("a named barrier, or a conditional one")
        return []  # ends the block: what happens is up to the scheduler
    if c.op not in _TABLE:
        raise c.unknown("no such instruction")
    mixed = c.suffixes[-2:] in (["f32", "bf16"], ["f32", "f16"])
    if c.op in _SAME_WIDTH and "wide" not in c.suffixes and not mixed:
        declared = program.function.registers[c.o[0]]
        if declared != "pred" and WIDTH[declared] != WIDTH[c.kind]:
            raise c.unknown("a register of another width than the operation")
    return _TABLE[c.op](c)


# ---- moves and conversions ----


def _move(c: Context) -> list[str]:
    """mov and cvta: between registers, or packing several registers into one wider one, or unpacking."""
    full = SHORT[DTYPES[c.kind]] if c.kind != "pred" else ""
    if c.o[0].startswith("{"):
        parts = elements(c.o[0])
        width = WIDTH[c.kind] // len(parts)
        shifted = f"(t >> {full}({{}} * {8 * width})).astype({SHORT[DTYPES[BITS[width]]]})"
        lines = [
            c.program.put(part, shifted.format(i), BITS[width], c.active) for i, part in enumerate(parts) if part != "_"
        ]
        return [f" t = {c.get(1)}", *lines]
    sources = elements(c.o[-1])
    if len(sources) == 1:
        return c.put(c.get(1))
    width = WIDTH[c.kind] // len(sources)
    words = (c.program.get(s, BITS[width]) for s in sources)
    return c.put(" | ".join(f"({word}.astype({full}) << {full}({8 * width * i}))" for i, word in enumerate(words)))


def _convert(c: Context) -> list[str]:
    """cvt: between types."""
    to, source = c.suffixes[-2:]
    if to in ("bf16x2", "f16x2") and source == "f32":
        down = "f32_to_bf16({})" if to == "bf16x2" else "{}.astype(f2).view(u2)"
        lines = [f" {name} = {down.format(c.get(i, 'f32'))}" for i, name in ((1, "h"), (2, "l"))]
        return [*lines, *c.put("(h.astype(u4) << u4(16)) | l.astype(u4)", "b32")]
    if to == "tf32" and source == "f32":  # rna: to nearest, ties away
        return c.put(f"({c.get(1, 'b32')} + u4(0x1000)) & u4(0xFFFFE000)", "b32")
    if "sat" in c.suffixes:
        raise c.unknown("saturation")
    value = f"bf16_to_f32({c.get(1, 'b16')})" if source == "bf16" else c.get(1, source)
    how = next((s for s in c.suffixes if s in _ROUNDED), None)
    if to == "bf16":
        if source != "f32":
            raise c.unknown("a conversion to bfloat16 from something else than float32")
        return c.put(f"f32_to_bf16({value})", "b16")
    dtype = SHORT[DTYPES[to]]
    if source[0] in "fb" and to[0] in "us":
        if how is None:
            raise c.unknown("a conversion to integers without a rounding")
        return c.put(f"to_integer({value}, {dtype}, '{how}')", to)
    if source == to and how is not None:
        return c.put(f"np.{_ROUNDED[how]}({value})", to)
    return c.put(f"{value}.astype({dtype})", to)


def _select(c: Context) -> list[str]:
    """selp: one of two values by a predicate."""
    return c.put(f"np.where({c.get(3, 'pred')}, {c.get(1)}, {c.get(2)})")


# ---- arithmetic ----


def _half(c: Context, formula: str) -> list[str]:
    """Arithmetic on f16, bf16 and pairs of them: computed in float32 and rounded once."""
    pair, element = c.kind.endswith("x2"), c.kind.removesuffix("x2")
    up = "bf16_to_f32({})" if element == "bf16" else "{}.view(f2).astype(f4)"
    down = "f32_to_bf16({})" if element == "bf16" else "({}).astype(f2).view(u2)"
    lines, halves = [], []
    for half in range(2 if pair else 1):
        for name, operand in zip("xyz", c.o[1:], strict=False):
            raw = c.program.get(operand, "b32" if pair else "b16")
            raw = f"(({raw} >> u4({16 * half})).astype(u2))" if pair else raw
            lines.append(f" {name} = {up.format(raw)}")
        lines.append(f" h{half} = {down.format(formula)}")
        halves.append(f"(h{half}.astype(u4) << u4({16 * half}))")
    return [*lines, *(c.put(" | ".join(halves), "b32") if pair else c.put("h0", "b16"))]


def _mixed(c: Context) -> list[str] | None:
    """An add, sub or fma whose last operand is float32 and whose others are f16 or bf16; None for any other
    instruction.
    """
    if c.suffixes[-2:] not in (["f32", "bf16"], ["f32", "f16"]):
        return None
    last = c.program.get(c.o[-1], "f32")
    first = range(1, len(c.o) - 1)
    values = [f"bf16_to_f32({c.get(i, 'b16')})" if c.kind == "bf16" else f"{c.get(i, 'f16')}.astype(f4)" for i in first]
    return c.put(
        f"fma32({', '.join(values)}, {last})" if c.op == "fma" else f"{values[0]} {_BINARY[c.op]} {last}", "f32"
    )


def _packed(c: Context, formula: str) -> list[str]:
    """Arithmetic on two float32 in a register of 64 bits."""
    return c.put(f"pairs({formula}, {', '.join(c.get(i, 'b64') for i in range(1, len(c.o)))})", "b64")


def _add(c: Context) -> list[str]:
    """add and sub."""
    mixed = _mixed(c)
    if mixed is not None:
        return mixed
    sign = _BINARY[c.op]
    if c.kind == "f32x2":
        return _packed(c, f"lambda x, y: x {sign} y")
    if c.kind in _HALVES:
        return _half(c, f"x {sign} y")
    if "cc" in c.suffixes:
        raise c.unknown("a carry")
    return c.put(f"{c.get(1)} {sign} {c.get(2)}")


def _logic(c: Context) -> list[str]:
    """and, or, xor."""
    return c.put(f"{c.get(1)} {_BINARY[c.op]} {c.get(2)}")


def _not(c: Context) -> list[str]:
    return c.put(f"~{c.get(1)}")


def _negate(c: Context) -> list[str]:
    if c.kind in _HALVES:
        return _half(c, "-x")
    return c.put(f"{SHORT[DTYPES[c.kind]]}(0) - {c.get(1)}" if c.kind[0] == "s" else f"-{c.get(1)}")


def _absolute(c: Context) -> list[str]:
    return _half(c, "np.abs(x)") if c.kind in _HALVES else c.put(f"np.abs({c.get(1)})")


def _multiply(c: Context) -> list[str]:
    """mul, and mad, which adds its last operand to the product."""
    if c.kind == "f32x2":
        return _packed(c, "lambda x, y: x * y")
    if c.kind in _HALVES:
        return _half(c, "x * y")
    kind = _WIDE[c.kind] if "wide" in c.suffixes else c.kind
    a, b = c.get(1), c.get(2)
    if "wide" in c.suffixes:
        double = SHORT[DTYPES[kind]]
        text = f"{a}.astype({double}) * {b}.astype({double})"
    elif "hi" in c.suffixes:
        double, single = _HIGH[c.kind]
        text = f"((({a}.astype({double}) * {b}.astype({double})) >> {double}(32)).astype({single}))"
    else:
        text = f"{a} * {b}"
    return c.put(f"{text} + {c.get(3, kind)}" if c.op == "mad" else text, kind)


def _fused(c: Context) -> list[str]:
    """fma."""
    mixed = _mixed(c)
    if mixed is not None:
        return mixed
    if c.kind == "f32x2":
        return _packed(c, "fma32")
    if c.kind == "f32":
        return c.put(f"fma32({c.get(1)}, {c.get(2)}, {c.get(3)})")
    if c.kind not in _HALVES:
        raise c.unknown("this type")
    return _half(c, "x * y + z")


def _function(c: Context) -> list[str]:
    """div, rem, square roots, reciprocals, powers. In float32 the result is exact where the instruction rounds; an
    approximate one errs as :func:`arithmetic.inexact` says.
    """
    if c.op in ("div", "rem") and c.kind[0] in "su":
        name = "divide" if c.op == "div" else "np.fmod"
        return c.put(f"{name}({c.get(1)}, {c.get(2)})")
    if c.kind != "f32":
        raise c.unknown("this type")
    text = _FUNCTIONS[c.op].format(*(f"{c.get(i)}.astype(f8)" for i in range(1, len(c.o))))
    return c.put(f"({text}).astype(f4)" if "rn" in c.suffixes else f"M.inexact({text}, '{c.op}')")


def _extreme(c: Context) -> list[str]:
    """min and max."""
    nan = "NaN" in c.suffixes
    if c.kind in _HALVES:
        return _half(c, f"np.{c.op}imum(x, y)" if nan else f"np.f{c.op}(x, y)")
    name = f"{c.op}imum" if nan or c.kind[0] != "f" else f"f{c.op}"
    return c.put(f"np.{name}({c.get(1)}, {c.get(2)})")


def _shift(c: Context) -> list[str]:
    """shl and shr. A shift by the width or more leaves zeros, or copies of the sign."""
    last, dtype, amount = 8 * WIDTH[c.kind] - 1, SHORT[DTYPES[c.kind]], c.get(2, "u32")
    if c.op == "shr" and c.kind[0] == "s":
        return c.put(f"{c.get(1)} >> np.minimum({amount}, u4({last})).astype({dtype})")
    shifted = f"{c.get(1)} {'<<' if c.op == 'shl' else '>>'} ({amount} & u4({last})).astype({dtype})"
    return c.put(f"np.where({amount} <= u4({last}), {shifted}, {dtype}(0))")


def _extract(c: Context) -> list[str]:
    """bfe: a field of bits, moved to the lowest bits and extended by zeros or by its sign."""
    position, length = int(c.o[2], 0), int(c.o[3], 0)
    if c.kind == "u32":
        return c.put(f"({c.get(1)} >> u4({position})) & u4({2**length - 1})")
    if c.kind != "s32":
        raise c.unknown("this type")
    return c.put(f"({c.get(1)} << i4({32 - position - length})) >> i4({32 - length})")


def _insert(c: Context) -> list[str]:
    """bfi: one number's lowest bits put into a field of another."""
    if c.kind != "b32":
        raise c.unknown("this type")
    position, length = int(c.o[3], 0), int(c.o[4], 0)
    field = (2**length - 1) << position
    return c.put(f"(({c.get(1)} << u4({position})) & u4({field})) | ({c.get(2)} & u4({~field & 0xFFFFFFFF}))")


def _permute(c: Context) -> list[str]:
    return c.put(f"permute_bytes({c.get(1, 'u32')}, {c.get(2, 'u32')}, {c.get(3, 'u32')})", "b32")


def _lookup(c: Context) -> list[str]:
    """lop3: any function of three bits, given by its truth table."""
    table, terms = int(c.o[4], 0), []
    for i in range(8):
        if table >> i & 1:
            signs = ("" if i >> (2 - j) & 1 else "~" for j in range(3))
            terms.append(" & ".join(f"{sign}{c.get(1 + j, 'b32')}" for j, sign in enumerate(signs)))
    return c.put(" | ".join(f"({term})" for term in terms) or "u4(0)", "b32")


def _compare(c: Context) -> list[str]:
    """setp: a comparison, joined with another predicate if the instruction says so."""
    a, b, how = c.get(1), c.get(2), c.suffixes[0]
    if "|" in c.o[0]:
        raise c.unknown("two predicates")
    nan = f"np.isnan({a}) | np.isnan({b})"
    if how in ("num", "nan"):
        text = f"~({nan})" if how == "num" else nan
    elif how in _UNORDERED:
        text = f"~({a} {_UNORDERED[how]} {b})" if how != "equ" else f"({a} == {b}) | {nan}"
    elif how == "ne" and c.kind[0] == "f":
        text = f"({a} != {b}) & ~({nan})"
    else:
        text = f"{a} {_COMPARE[how]} {b}"
    for joined, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        if joined in c.suffixes:
            other = f"{'~' if c.o[3].startswith('!') else ''}{c.program.get(c.o[3].lstrip('!'), 'pred')}"
            text = f"({text}) {sign} {other}"
    return c.put(text, "pred")


# ---- memory ----


def _memory(c: Context) -> list[str]:
    """ld and st of global memory, shared memory and parameters."""
    if "param" in c.suffixes:
        return c.put(f"P['{c.o[1].strip('[] ')}'].view({SHORT[DTYPES[c.kind]]})")
    shared = any(s.startswith("shared") for s in c.suffixes)
    if not shared and "global" not in c.suffixes:
        raise c.unknown("this space of memory")
    space, pointer = ("shared", "u32") if shared else ("global", "u64")
    raw, size = raw_kind(c.kind), str(WIDTH[c.kind])
    if c.op == "st":
        return [f" {c.call(f'store_{space}', c.address(0, pointer), f'[{c.list_of(1, raw)}]', size)}"]
    found = f" t = {c.call(f'load_{space}', c.address(1, pointer), size, str(len(elements(c.o[0]))))}"
    signed = c.kind[0] == "s"
    return [
        found,
        *c.put_each(c.kind if signed else raw, f"t[{{}}].view({SHORT[DTYPES[c.kind]]})" if signed else "t[{}]"),
    ]


def _copy(c: Context) -> list[str]:
    """cp.async: copies, commits of groups and waits."""
    if c.suffixes[0] != "async" or c.suffixes[1] not in ("commit_group", "wait_group", "wait_all", "ca", "cg"):
        raise c.unknown("no such copy")
    if c.suffixes[1] == "commit_group":
        return [f" M.shared.commit({c.active})"]
    if c.suffixes[1] == "wait_group":
        return [f" M.shared.wait({int(c.o[0], 0)}, {c.active})"]
    if c.suffixes[1] == "wait_all":
        return [f" M.shared.commit({c.active})", f" M.shared.wait(0, {c.active})"]
    size = int(c.o[2], 0)
    filled = c.get(3, "u32") if len(c.o) > 3 else f"u4({size})"
    return [f" {c.call('copy_async', c.address(0, 'u32'), c.address(1, 'u64'), str(size), filled)}"]


def _load_matrix(c: Context) -> list[str]:
    """ldmatrix."""
    count = next(s for s in c.suffixes if s in ("x1", "x2", "x4"))[1:]
    return [f" t = {c.call('load_matrix', c.address(1, 'u32'), count, str('trans' in c.suffixes))}", *c.put_each()]


def _store_matrix(c: Context) -> list[str]:
    """stmatrix."""
    return [f" {c.call('store_matrix', c.address(0, 'u32'), f'[{c.list_of(1)}]', str('trans' in c.suffixes))}"]


# ---- warps, matrices, barriers ----


def _mma(c: Context) -> list[str]:
    """mma.sync."""
    kinds = c.suffixes[-4:]
    if kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] not in _MATRIX_KINDS:
        raise c.unknown("these types")
    return [f" t = {c.call('mma', repr(kinds[1]), *(f'({c.list_of(i)},)' for i in (1, 2, 3)))}", *c.put_each()]


def _wgmma(c: Context) -> list[str]:
    """wgmma: the matrix product, and its commit and wait."""
    what = c.suffixes[0]
    if what == "fence":
        return []
    if what == "commit_group":
        return [" M.shared.commit_reads()"]
    if what == "wait_group":
        return [f" M.shared.wait_reads({int(c.o[0], 0)})"]
    kinds, shape = c.suffixes[-3:], re.search(r"n(\d+)k", c.ins.opcode)
    if shape is None or kinds[0] != "f32" or kinds[1] not in _MATRIX_KINDS or c.o[4:6] != ["1", "1"]:
        raise c.unknown("these types, or a scaled operand")
    in_registers = c.o[1].startswith("{")
    a = f"({c.list_of(1)},)" if in_registers else c.get(1, "u64")
    given = [str(int(x, 0)) for x in c.o[6:]]
    transposed = [*(["0"] if in_registers else []), *given, "0", "0"][:2]
    arguments = a, c.get(2, "u64"), c.get(3, "pred"), f"({', '.join(transposed)})", f"({c.list_of(0)})"
    return [f" t = {c.call('wgmma', shape[1], repr(kinds[1]), *arguments)}", *c.put_each()]


def _tensor(c: Context) -> list[str]:
    """tcgen05: matrix products, loads and stores of tensor memory."""
    what = c.suffixes[0]
    if what.startswith(("wait", "fence", "dealloc", "relinquish")):
        return []
    if what == "alloc":
        return [f" {c.call('tensor_alloc', c.address(0, 'u32'))}"]
    if what == "commit":
        return [f" {c.call('barrier_arrive', c.address(0, 'u32'))}"]
    if what in ("ld", "st"):
        return _tensor_move(c, what == "ld")
    if what != "mma":
        raise c.unknown("no such instruction")
    kind = next(s for s in c.suffixes if s.startswith("kind::")).removeprefix("kind::")
    if kind not in ("f16", "tf32") or len(c.o) != 5 or "cta_group::1" not in c.suffixes:
        raise c.unknown("these types, more operands, or pairs of CTAs")
    inside = c.o[1].startswith("[")
    a = c.address(1, "u32") if inside else c.get(1, "u64")
    operands = c.address(0, "u32"), a, c.get(2, "u64"), c.get(3, "u32"), c.get(4, "pred")
    return [f" {c.call('tensor_mma', *operands, repr(kind), str(inside))}"]


def _tensor_move(c: Context, load: bool) -> list[str]:
    """tcgen05.ld and tcgen05.st: between registers and tensor memory."""
    shape = next(s for s in c.suffixes if s in ("32x32b", "16x32bx2"))
    if "pack::16b" in c.suffixes or "unpack::16b" in c.suffixes:
        raise c.unknown("packing")
    split = "0" if shape == "32x32b" else str(int(c.o[2 if load else 1], 0))
    if load:
        found = c.call("tensor_load", c.address(1, "u32"), str(len(elements(c.o[0]))), repr(shape), split)
        return [f" t = {found}", *c.put_each()]
    return [f" {c.call('tensor_store', c.address(0, 'u32'), f'[{c.list_of(len(c.o) - 1)}]', repr(shape), split)}"]


def _mbarrier(c: Context) -> list[str]:
    """mbarrier: init and try_wait."""
    what = c.suffixes[0]
    if what == "init":
        return [f" {c.call('barrier_init', c.address(0, 'u32'), c.get(1, 'u32'))}"]
    if what == "inval":
        return []
    if what == "try_wait":
        return c.put(c.call("barrier_test", c.address(1, "u32"), c.get(2, "u32")), "pred")
    raise c.unknown("no such instruction")


def _elect(c: Context) -> list[str]:
    """elect.sync: the predicate holds in lane 0 of each warp."""
    target, _, valid = c.o[0].partition("|")
    return [c.program.put(target, "u4(0)", "b32", c.active), c.program.put(valid, "M.lane == 0", "pred", c.active)]


def _shuffle(c: Context) -> list[str]:
    """shfl.sync; the second result, if it is asked for, is the predicate that the source lane is in range."""
    target, _, valid = c.o[0].partition("|")
    lines = [f" t = {c.call('shuffle', repr(c.suffixes[1]), *(c.get(i, 'u32') for i in (1, 2, 3)))}"]
    lines.append(c.program.put(target, "t[0]", "b32", c.active))
    return lines + ([c.program.put(valid, "t[1]", "pred", c.active)] if valid else [])


def _reduce(c: Context) -> list[str]:
    """redux.sync: one result over the values of a warp."""
    return c.put(c.call("reduce_warp", repr(c.suffixes[1]), c.get(1)))


def _vote(c: Context) -> list[str]:
    """vote.sync."""
    how = c.suffixes[1]
    return c.put(f"M.vote('{how}', {c.get(1, 'pred')}, {c.active})", "b32" if how == "ballot" else "pred")


def _warp_barrier(c: Context) -> list[str]:
    """bar.warp.sync: only checked to be reached by whole warps, as threads run in lock step."""
    if c.suffixes[0] != "warp":
        raise c.unknown("no such barrier")
    return [f" M.whole_warps({c.active}, {c.at})"]


def _nothing(c: Context) -> list[str]:
    """Fences and hints, which need nothing since the emulator runs everything in order; branches and returns, which the
    scheduler handles.
    """
    return []


def _trap(c: Context) -> list[str]:
    return [f" raise Trap('a trap instruction, ' + {c.at})"]


_TABLE: dict[str, Callable[[Context], list[str]]] = {
    **dict.fromkeys(("bra", "ret", "exit", "fence", "membar", "nanosleep", "griddepcontrol", "setmaxnreg"), _nothing),
    **dict.fromkeys(("mov", "cvta"), _move),
    **dict.fromkeys(("add", "sub"), _add),
    **dict.fromkeys(("and", "or", "xor"), _logic),
    **dict.fromkeys(("mul", "mad"), _multiply),
    **dict.fromkeys((*_FUNCTIONS, "rem"), _function),
    **dict.fromkeys(("min", "max"), _extreme),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("ld", "st"), _memory),
    "trap": _trap,
    "cvt": _convert,
    "selp": _select,
    "not": _not,
    "neg": _negate,
    "abs": _absolute,
    "fma": _fused,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _lookup,
    "setp": _compare,
    "cp": _copy,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _mma,
    "wgmma": _wgmma,
    "tcgen05": _tensor,
    "mbarrier": _mbarrier,
    "elect": _elect,
    "shfl": _shuffle,
    "redux": _reduce,
    "vote": _vote,
    "bar": _warp_barrier,
}
