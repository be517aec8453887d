"""One draw per step on all ranks, compared with one process to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import checks_draws
from tests.distributed.launch import launch, names


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def ran(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("draws")
    return launch("checks_draws", request.param, folder), folder, request.param


@pytest.mark.parametrize("check", names("checks_draws"))
def test_every_rank_says_ok(ran, check) -> None:
    said, _, world = ran
    assert said[check] == ["ok"] * world, "\n".join(said[check])


def test_ranks_draw_per_batch_what_one_process_draws_to_the_bit(ran) -> None:
    _, folder, world = ran
    alone = checks_draws.families()
    for rank in range(world):
        found = torch.load(folder / f"drawn{rank}.pt")["families"]
        assert found.keys() == alone.keys()
        for name, values in alone.items():
            assert torch.equal(found[name], values), name
            assert len(values.unique()) > 5, name


def test_rows_of_the_ranks_together_are_those_of_the_whole_batch(ran) -> None:
    _, folder, world = ran
    alone = checks_draws.rows()
    parts = [torch.load(folder / f"drawn{rank}.pt")["rows"] for rank in range(world)]
    for name, whole in alone.items():
        together = torch.cat([part[name] for part in parts])
        if "gates" in name:
            assert torch.equal(together, whole), name
            assert len(whole.unique(dim=0)) > len(whole) // 2, name
        else:
            torch.testing.assert_close(
                together, whole, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
