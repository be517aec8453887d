"""Single instructions, written by hand."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.emulator import execute, memory, program, ptx

FRAME = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 .ptr .global .align 1 out, .param .u64 .ptr .global .align 1 x)
.reqntid 32
{{
    .reg .pred %p<4>;
    .reg .b16 %h<8>;
    .reg .b32 %r<16>;
    .reg .b64 %d<8>;
    .loc 1 7 3
    ld.param.b64 %d1, [out];
    ld.param.b64 %d2, [x];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %d3, %r1, 4;
    add.s64 %d4, %d1, %d3;
    add.s64 %d5, %d2, %d3;
    ld.global.b32 %r2, [%d5];
    {body}
    st.global.b32 [%d4], %r3;
    ret;
}}
"""


def run(body: str, x: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """%r3 of each of 32 threads, where %r2 is an element of ``x``; and what was noted."""
    function = program.Program(ptx.parse(FRAME.format(body=body)))
    out, inside = np.zeros(32, np.uint32), np.full(128, memory.INSIDE, np.uint8)
    device = memory.Global([(1, out.view(np.uint8), inside), (2, x.view(np.uint8), inside)])
    values = [np.uint64(device.device_address(1, 0)), np.uint64(device.device_address(2, 0))]
    notes = execute.run(function, (1, 1, 1), values, device, 256)
    start = device.where[1]
    return device.data[start : start + 128].view(np.uint32), list(notes + device.notes)


COUNT = np.arange(32, dtype=np.uint32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s32 %r3, %r2, -5;", COUNT - np.uint32(5)),
        ("mul.hi.u32 %r3, %r2, 0x80000000;", COUNT // 2),
        ("shl.b32 %r3, %r2, 33;", COUNT * 0),
        ("shr.s32 %r4, 0x80000000, %r2; shr.u32 %r3, %r4, 31;", COUNT * 0 + 1),
        ("bfe.u32 %r3, %r2, 1, 3;", COUNT >> 1 & 7),
        ("bfi.b32 %r3, %r2, 0, 8, 8;", COUNT << 8),
        ("lop3.b32 %r3, %r2, 0xF0, 0x0F, 0xE8;", (COUNT & 0xF0) | (COUNT & 0x0F) | (0xF0 & 0x0F)),
        ("prmt.b32 %r3, %r2, 0, 0x0123;", COUNT << 24),
        ("cvt.rn.f32.u32 %r4, %r2; cvt.rzi.u32.f32 %r3, %r4;", COUNT),
        ("{ .reg .b32 t; add.u32 t, %r2, 1; mov.b32 %r3, t; }", COUNT + 1),
        (  # an inner scope with a register of the same name, declared before the outer one's
            "{ { .reg .b32 t; add.u32 t, %r2, 7; } .reg .b32 t; mov.b32 t, %r2; { .reg .b32 t; mov.b32 t, 9; }"
            " mov.b32 %r3, t; }",
            COUNT,
        ),
        ("{ mov.b32 %r3, 1; bra.uni done; mov.b32 %r3, 2; done: }", COUNT * 0 + 1),
        ("{ mov.b32 %r3, 1; bra.uni done; done: } { bra.uni done; mov.b32 %r3, 2; done: }", COUNT * 0 + 1),
        ("shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", COUNT ^ 1),
        ("setp.lt.u32 %p1, %r2, 9; vote.sync.ballot.b32 %r3, %p1, -1;", COUNT * 0 + 511),
        (
            "setp.lt.u32 %p1, %r2, 9; @%p1 bra $L1; mov.b32 %r3, 2; bra.uni $L2; $L1: mov.b32 %r3, 1; $L2:",
            np.where(COUNT < 9, 1, 2),
        ),
        ("mov.b32 %r4, 0f7FC00000; setp.equ.f32 %p1, %r4, %r4; selp.b32 %r3, 1, 0, %p1;", COUNT * 0 + 1),
        ("mov.b32 %r4, 0f7FC00000; setp.ne.f32 %p1, %r4, %r4; selp.b32 %r3, 1, 0, %p1;", COUNT * 0),
        ("mov.b16 %h1, 0x3F80; neg.bf16 %h2, %h1; mov.b32 %r3, {%h2, %h1};", COUNT * 0 + 0x3F80BF80),
    ],
)
def test_an_instruction_does_what_the_manual_says(body: str, expected: np.ndarray) -> None:
    out, notes = run(body, COUNT)
    assert (out == expected.astype(np.uint32)).all(), out
    assert not notes


@pytest.mark.parametrize(
    "body", ["popc.b32 %r3, %r2;", "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%r3}, {%r2}, {%r2}, {%r2};"]
)
def test_what_is_not_emulated_is_named(body: str) -> None:
    with pytest.raises(memory.Trap, match=f"not emulated: {body.split()[0]}.*1:7"):
        run(body, COUNT)


def test_what_is_not_emulated_is_no_matter_where_it_is_not_reached() -> None:
    out, _ = run("mov.b32 %r3, %r2; bra $L1; popc.b32 %r3, %r2; $L1:", COUNT)
    assert (out == COUNT).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s64 %d5, %d5, 4; ld.global.b32 %r3, [%d5];", "load of 4 bytes outside of every storage, lane 31"),
        ("add.s64 %d5, %d5, 2; ld.global.b32 %r3, [%d5];", "misaligned"),
        ("mov.b32 %r4, 256; st.shared.b32 [%r4], %r2; mov.b32 %r3, 0;", "beyond its 256 bytes"),
        ("setp.lt.u32 %p1, %r2, 9; @%p1 bra $L1; bar.sync 0; $L1: mov.b32 %r3, 0;", "deadlock"),
        (
            "setp.lt.u32 %p1, %r2, 9; @%p1 bra $L1; redux.sync.add.s32 %r4, %r2, -1; $L1: mov.b32 %r3, 0;",
            "by a part of a warp",
        ),
        ("trap; mov.b32 %r3, 0;", "a trap instruction"),
    ],
)
def test_what_a_gpu_would_fault_on_or_leave_undefined_traps(body: str, message: str) -> None:
    with pytest.raises(memory.Trap, match=message):
        run(body, COUNT)


def test_threads_that_store_different_values_to_one_place_race() -> None:
    _, notes = run("mov.b32 %r4, 0; st.shared.b32 [%r4], %r2; mov.b32 %r3, 0;", COUNT)
    assert any("different values" in note for note in notes)


def test_a_race_of_stores_says_where_it_is() -> None:
    _, notes = run("st.global.b32 [%d1], %r2; mov.b32 %r3, %r2;", COUNT)
    assert any("RACE: two threads store different values, " in note and "1:7" in note for note in notes), notes
