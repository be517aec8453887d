"""What the meter counts, on instructions written by hand."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.emulator.meter import Meter

LANES = np.arange(32, dtype=np.int64)


def counted(what: str, *args: object, lanes: int = 32) -> dict[str, int]:
    meter = Meter()
    meter.begin("kernel")
    getattr(meter, what)(*args, lanes)
    return dict(meter.counts["kernel"])


@pytest.mark.parametrize(
    ("address", "size", "mask", "sectors"),
    [
        (4 * LANES, 4, None, 4),  # a line of 128 bytes
        (4 * LANES + 4, 4, None, 5),  # the same across a border
        (32 * LANES, 4, None, 32),  # a sector each
        (np.int64(64), 4, None, 1),  # all the same
        (16 * LANES, 16, None, 16),
        (4 * LANES, 4, LANES < 8, 1),
        (4 * LANES, 4, LANES < 0, 0),
    ],
)
def test_a_warp_asks_for_whole_sectors(address: np.ndarray, size: int, mask: np.ndarray | None, sectors: int) -> None:
    found = counted("memory", "read", address, size, mask)
    assert found["read"] == 32 * sectors
    assert found["useful"] == size * (32 if mask is None else int(mask.sum()))


@pytest.mark.parametrize(
    ("address", "size", "passes", "conflicts"),
    [
        (4 * LANES, 4, 1, 0),
        (8 * LANES, 4, 2, 1),  # every second bank
        (128 * LANES, 4, 32, 31),  # one bank
        (np.int64(0), 4, 1, 0),  # one word for all
        (16 * LANES, 16, 4, 0),  # a quarter of a warp at a time
        (2 * LANES, 2, 1, 0),
    ],
)
def test_banks_deliver_one_word_at_a_time(address: np.ndarray, size: int, passes: int, conflicts: int) -> None:
    found = counted("shared", address, size, None)
    assert (found["shared"], found["conflicts"]) == (passes, conflicts)


def test_instructions_are_those_of_warps_and_a_branch_parts_a_warp() -> None:
    assert counted("instructions", 7, LANES < 3, lanes=32)["instructions"] == 7
    meter = Meter()
    meter.begin("kernel")
    meter.branch(np.concatenate((LANES < 3, LANES < 32, LANES < 0)), None)
    assert meter.counts["kernel"]["parted"] == 1
