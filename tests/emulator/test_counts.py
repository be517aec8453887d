"""What kernels do to the machine may grow by 5 % over what is recorded, unless the record is written again."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from tests.emulator import counts  # noqa: E402

ALLOWED_GROWTH = 1.05


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if "tile" in name else ()) for name in counts.JOBS]
)
def test_a_kernel_does_no_more_than_recorded(name: str) -> None:
    recorded = counts.recorded()
    if not recorded:
        pytest.skip(f"no counts recorded for triton {triton.__version__} (python -m tests.emulator.counts --write)")
    for kernel, found in counts.measure(name).items():
        grown = {
            what: (number, recorded[kernel][what])
            for what, number in found.items()
            if number > ALLOWED_GROWTH * recorded[kernel][what]
        }
        assert not grown, (
            f"{kernel}: {grown} (found, recorded); if the growth is wanted: python -m tests.emulator.counts --write"
        )


def test_no_branch_parts_a_warp_in_a_hot_kernel() -> None:
    assert {kernel: found["parted"] for kernel, found in counts.recorded().items() if found["parted"] > 1e-3} == {}
