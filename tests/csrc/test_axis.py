"""Entries of an axis and matrices that csrc/axis.h moves, and the list of open gates,
against torch and dampr.reference, to the bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dampr import reference, spec
from dampr.ops.gate_args import GateArgs
from tests.limits import HANG

_C = pytest.importorskip("dampr._C", reason="dampr was built without its C++ extension", exc_type=ImportError)

from dampr.ops.backend_cpp import axis  # noqa: E402

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
DTYPES = list(CODES)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
RULES = {
    "sample": spec.hard_concrete(),
    "beta_0.5": spec.hard_concrete(beta=0.5, gamma=-0.3, zeta=1.2),
    "paper": spec.hard_concrete("paper"),
    "median": spec.hard_concrete("median"),
    "ramp": spec.ramp("square_ratio"),
    "mask": spec.mask(),
    "value": spec.value(),
}
SHAPES = [
    (0, 5, 3),
    (4, 0, 1),
    (3, 5, 0),
    (1, 1, 1),
    (7, 33, 1),
    (5, 2053, 1),
    (1, 40_001, 1),
    (3, 17, 5),
    (2, 2051, 3),
    (9, 65, 131),
    (2, 3, 40_003),
]
MARK = -99  # what memory holds that nothing is to be written to


def ptr(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def random_bits(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every kind of number, NaN with a payload, infinities, -0.0 and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = BITS[dtype.itemsize]
    x = torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64, generator=generator).to(bits)
    special = [-0.0, float("inf"), float("nan")]
    x.view(-1)[: len(special)] = torch.tensor(special, dtype=dtype).view(bits)[: x.numel()]
    return x.view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = BITS[a.dtype.itemsize]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
    )


def some_places(n: int, count: int) -> torch.Tensor:
    """In no order: a list of open gates is sorted, what takes it need not know."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))[:count].to(torch.int32)


def counts(n: int) -> list[int]:
    return sorted({0, min(1, n), n // 3, max(0, n - 1), n})


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One element more than there is room for, to see whether it is left alone."""
    return torch.full((torch.Size(shape).numel() + 1,), MARK, dtype=dtype)


def left_alone(memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    assert memory[-1] == MARK, "written behind the end"
    return memory[:-1].view(shape)


def pick(x: torch.Tensor, places: torch.Tensor, threads: int = 2) -> torch.Tensor:
    (outer, n, inner), count = x.shape, places.numel()
    out = filled((outer, count, inner), x.dtype)
    _C.pick(CODES[x.dtype], ptr(x), outer, n, inner, ptr(places), count, ptr(out), threads)
    return left_alone(out, (outer, count, inner))


def place(x: torch.Tensor, places: torch.Tensor, n: int, threads: int = 2) -> torch.Tensor:
    outer, count, inner = x.shape
    out = filled((outer, n, inner), x.dtype)
    _C.place(CODES[x.dtype], ptr(x), outer, n, inner, ptr(places), count, ptr(out), threads)
    return left_alone(out, (outer, n, inner))


def placed(x: torch.Tensor, places: torch.Tensor, n: int, dim: int = 1) -> torch.Tensor:
    """The truth: zeros, and x at places."""
    out = torch.zeros((*x.shape[:dim], n, *x.shape[dim + 1 :]), dtype=x.dtype)
    out.movedim(dim, 0)[places.long()] = x.movedim(dim, 0)
    return out


def list_open(rule: Any, log_alpha: torch.Tensor, seed: torch.Tensor | None, length: int) -> tuple[int, list[int]]:
    places = filled((length,), torch.int32)
    open_ = _C.open_gates(
        rule, CODES[log_alpha.dtype], ptr(log_alpha), ptr(seed), log_alpha.numel(), ptr(places), length
    )
    return open_, left_alone(places, (length,)).tolist()


def gates(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    log_alpha = 3 * torch.randn(n, generator=generator)
    log_alpha[::3] = 0.0  # closed where a parameter is the gate
    log_alpha[1::7] = -0.0
    return log_alpha.to(dtype)


# Which gates are open


@pytest.mark.parametrize("n", [0, 1, 17, 1000, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_open_gates_are_those_of_the_reference_and_filled_up_in_order(
    rule: spec.GateSpec, dtype: torch.dtype, n: int
) -> None:
    log_alpha, seed = gates(n, dtype), torch.tensor([2**63 - 1])
    is_open = reference.gate_values(log_alpha, rule, seed) != 0
    expected, closed = is_open.nonzero().flatten().tolist(), (~is_open).nonzero().flatten().tolist()
    assert n < 1000 or 0 < len(expected) < n
    k = len(expected)
    assert _C.open_gates(rule, CODES[dtype], ptr(log_alpha), ptr(seed), n) == k
    for length in sorted({k, min(k + 1, n), (k + n) // 2, n}):
        assert list_open(rule, log_alpha, seed, length) == (k, sorted(expected + closed[: length - k]))


@pytest.mark.parametrize("rule", ["sample", "paper", "value"])
def test_a_gate_that_is_not_a_number_is_open(rule: str) -> None:
    log_alpha = torch.tensor([float("nan"), float("-inf"), float("nan"), float("inf")])
    if rule == "value":
        log_alpha[1] = 0.0
    assert list_open(RULES[rule], log_alpha, torch.tensor([3]), 3) == (3, [0, 2, 3])


@pytest.mark.parametrize(
    ("length", "message"), [(-1, r"length=-1: expected 0 to 6"), (7, "length=7"), (2, r"length=2: expected 3 or more")]
)
def test_a_list_is_no_shorter_than_the_open_gates_and_no_longer_than_all(length: int, message: str) -> None:
    z, places = torch.tensor([1.0, 0.0, 2.0, 0.0, -1.0, 0.0]), torch.full((8,), MARK, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        _C.open_gates(spec.value(), 0, ptr(z), 0, 6, ptr(places), length)
    assert (places == MARK).all()


@pytest.mark.parametrize(
    ("multiple", "share", "expected"),
    [
        (1, 1.0, [2, 5]),
        (4, 1.0, [0, 1, 2, 5]),
        (16, 1.0, [*range(11)]),
        (4, 4 / 11, [0, 1, 2, 5]),
        (4, 0.36, None),
        (1, 0.0, None),
    ],
)
def test_a_list_has_a_multiple_or_all_or_there_is_none(multiple: int, share: float, expected: list[int] | None) -> None:
    z = torch.zeros(11)
    z[2], z[5] = 0.5, float("nan")
    places = axis.open_gates(GateArgs(z, None, spec.value()), multiple, share)
    assert (None if places is None else places.tolist()) == expected
    assert places is None or places.dtype == torch.int32


def test_a_list_of_no_gates_is_empty_and_of_closed_ones_has_one() -> None:
    for n, expected in ((0, []), (5, [0])):
        places = axis.open_gates(GateArgs(torch.zeros(n), None, spec.value()), 1, 1.0)
        assert places is not None
        assert places.tolist() == expected


def test_a_list_reads_parameters_that_do_not_lie_side_by_side() -> None:
    z = torch.tensor([1.0, 0.0, 0.0, 9.0, 2.0, 0.0])
    places = axis.open_gates(GateArgs(z[::2], None, spec.value()), 1, 1.0)
    assert places is not None
    assert places.tolist() == [0, 2]


# Moving


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moves_are_those_of_indexing_to_the_bit(shape: tuple[int, int, int], dtype: torch.dtype, threads: int) -> None:
    outer, n, inner = shape
    x = random_bits(*shape, dtype=dtype)
    for count in counts(n):
        places = some_places(n, count)
        out = pick(x, places, threads)
        assert same_bits(out, x[:, places.long()]), count
        back = place(out, places, n, threads)
        assert same_bits(back, placed(out, places, n)), count
        y = random_bits(outer, count, inner, dtype=dtype, seed=1)
        assert same_bits(pick(place(y, places, n, threads), places, threads), y), count
        assert count < n or same_bits(back, x)


def test_zeros_that_are_put_in_are_positive() -> None:
    for inner in (1, 3):
        zeros = place(torch.full((2, 1, inner), -1.0), torch.tensor([4], dtype=torch.int32), 9)
        assert not zeros[:, [j for j in range(9) if j != 4]].signbit().any()


MATRICES = [(0, 3), (3, 0), (1, 1), (16, 16), (15, 17), (33, 64), (256, 65), (257, 130), (5, 2051), (2051, 5)]


def transpose(x: torch.Tensor, threads: int = 2) -> torch.Tensor:
    rows, n = x.shape
    out = filled((n, rows), x.dtype)
    _C.transpose(CODES[x.dtype], ptr(x), rows, n, ptr(out), threads)
    return left_alone(out, (n, rows))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_matrices_are_transposed_to_the_bit(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    x = random_bits(*shape, dtype=dtype)
    assert same_bits(transpose(x, threads), x.t())


@pytest.mark.parametrize("in_scratch", [False, True])
def test_matrices_of_any_layout_are_transposed(in_scratch: bool) -> None:
    x = torch.randn(40, 50)
    for t in (x, x.t(), x[::2, 3:], x[:1].expand(7, 50)):
        out = axis.transpose(t, in_scratch)
        assert torch.equal(out, t.t())
        assert out.is_contiguous()


def moved() -> list[int]:
    """A number for each result, whatever instruction set is in use."""
    sums = []
    for shape in SHAPES:
        for dtype in DTYPES:
            x, places = random_bits(*shape, dtype=dtype), some_places(shape[1], shape[1] // 2)
            for result in (
                pick(x, places),
                place(pick(x, places), places, shape[1]),
                transpose(x.reshape(shape[0] * shape[1], shape[2])),
            ):
                bits = result.contiguous().view(BITS[dtype.itemsize]).flatten().long()
                sums.append(int((bits * torch.arange(1, bits.numel() + 1)).sum()))
    log_alpha, seed = gates(1000, torch.float32), torch.tensor([5])
    return sums + [j for rule in RULES.values() for j in list_open(rule, log_alpha, seed, 1000 - 1)[1]]


@pytest.mark.parametrize("isa", _C.build_info()["isas"])
def test_every_instruction_set_moves_the_same(isa: str) -> None:
    environment = os.environ | {
        "DAMPR_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    command = [sys.executable, "-c", "from tests.csrc import test_axis as t; print(t._C.isa()); print(t.moved())"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=False)
    if "this processor offers" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.stdout.split("\n")[:2] == [isa, str(moved())], run.stderr


# Tensors


def layouts() -> dict[str, torch.Tensor]:
    x = torch.arange(1.0, 1 + 3 * 5 * 4 * 6).view(3, 5, 4, 6)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": x.repeat_interleave(2, dim=2)[:, :, ::2],
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3).transpose(2, 3),
        "expanded": x[:, :1, :1].expand(3, 5, 4, 6),
        "a pixel": x[:, :, :1, :1],
        "nobody": x[:0],
    }


@pytest.mark.parametrize(
    ("dim", "channels_last"), [(0, False), (1, False), (2, False), (3, False), (0, True), (1, True)]
)
@pytest.mark.parametrize("layout", layouts())
def test_tensors_of_any_layout_keep_what_is_asked_for(layout: str, dim: int, channels_last: bool) -> None:
    x = layouts()[layout]
    n = x.shape[dim]
    for count in {0, min(1, n), n // 2, n}:
        places = some_places(n, count)
        out = axis.gather(x, places, dim, channels_last)
        back = axis.scatter(out, places, n, dim, channels_last)
        assert torch.equal(out, x.index_select(dim, places.long()))
        assert torch.equal(back, placed(out, places, n, dim))
        assert torch.equal(axis.gather(back, places, dim, channels_last), out)
        assert torch.equal(
            axis.scatter(out.transpose(0, 1).contiguous().transpose(0, 1), places, n, dim, channels_last), back
        )
        for t in (out, back):
            assert not t.numel() or t.is_contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )


def test_vectors_and_matrices_move_along_each_dimension() -> None:
    for shape in ((7,), (7, 4), (2, 3, 7)):
        x = torch.randn(shape)
        for dim in range(x.dim()):
            places = some_places(shape[dim], shape[dim] // 2 + 1)
            out = axis.gather(x, places, dim)
            assert torch.equal(out, x.index_select(dim, places.long()))
            assert torch.equal(axis.scatter(out, places, shape[dim], dim), placed(out, places, shape[dim], dim))


# Wrong arguments

WRONG = {
    r"dtype=4: expected": {"dtype": 4},
    r"dtype=-1: expected": {"dtype": -1},
    r"outer=-1: expected a size": {"outer": -1},
    r"n=-2: expected a size": {"n": -2},
    r"inner=-3: expected a size": {"inner": -3},
    r"outer=9223372036854775807: expected": {"outer": 2**63 - 1},
    r"inner=64: expected .*outer \* n": {"outer": 2**57, "n": 4, "inner": 64, "count": 1},
    r"count=-1: expected 0 to n=3": {"count": -1},
    r"count=4: expected 0 to n=3": {"count": 4},
    r"count=1: expected 0 to n=2147483648, below 2\^31": {"outer": 0, "n": 2**31, "count": 1},
    r"places=0: expected an address, as there are 2": {"places": 0},
    r"places=3: expected 0 to 2": {"places": [0, 3]},
    r"places=-1: expected 0 to 2": {"places": [-1, 0]},
    r"x=0: expected an address": {"x": 0},
    r"out=0: expected an address": {"out": 0},
    r"threads=0: expected": {"threads": 0},
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("name", ["pick", "place"])
def test_wrong_arguments_are_named(name: str, message: str) -> None:
    memory = torch.zeros(64, dtype=torch.float64)
    listed = torch.tensor(WRONG[message].get("places") or [0, 2], dtype=torch.int32)
    right = {
        "dtype": 1,
        "x": ptr(memory),
        "outer": 2,
        "n": 3,
        "inner": 2,
        "count": 2,
        "out": ptr(memory[32:]),
        "threads": 1,
    }
    given = right | WRONG[message] | {"places": 0 if WRONG[message].get("places") == 0 else ptr(listed)}
    with pytest.raises(ValueError, match=message):
        getattr(_C, name)(**given)
    assert not memory.any()


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (r"dtype=4: expected", {"dtype": 4}),
        (r"rows=-1: expected a size", {"rows": -1}),
        (r"n=-2: expected a size", {"n": -2}),
        (r"rows=9223372036854775807: expected", {"rows": 2**63 - 1}),
        (r"x=0: expected an address, as there are 6", {"x": 0}),
        (r"out=0: expected an address", {"out": 0}),
        (r"threads=0: expected", {"threads": 0}),
    ],
)
def test_wrong_matrices_are_named(message: str, wrong: dict[str, int]) -> None:
    memory = torch.zeros(16, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        _C.transpose(
            **({"dtype": 1, "x": ptr(memory), "rows": 2, "n": 3, "out": ptr(memory[8:]), "threads": 1} | wrong)
        )
    assert not memory.any()


WRONG_GATES = {
    r"dtype=2: expected 0 \(float32\) or 1": {"dtype": 2},
    r"n=-1: expected a size": {"n": -1},
    r"n=2147483648: expected fewer than 2\^31": {"n": 2**31},
    r"seed_ptr=0: expected": {"spec": spec.hard_concrete(), "seed_ptr": 0},
    r"log_alpha=0: expected": {"log_alpha": 0},
    r"spec\.family=9: expected": {"spec": spec.value()._replace(family=9)},
}


@pytest.mark.parametrize("message", WRONG_GATES)
def test_wrong_gates_are_named(message: str) -> None:
    z = torch.ones(4)
    with pytest.raises(ValueError, match=message):
        _C.open_gates(
            **({"spec": spec.value(), "dtype": 0, "log_alpha": ptr(z), "seed_ptr": 0, "n": 4} | WRONG_GATES[message])
        )
